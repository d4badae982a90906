"""The error of single layers, and the outliers in what they read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from int8compile.config import Int8Config
from int8compile.observation import args_in, dtype_of, some_rows
from int8compile.ops import column, input_scales, reference, rotation_of
from int8compile.stored.convert import Target, plan
from int8compile.stored.modules import Int8Linear

# Rows of activations to keep of each layer.
ROWS = 256


class Layer(NamedTuple):
    """A layer of a candidate, compared with the same layer of the float model.

    Attributes:
        path: The path of the module.
        kind: The path with `*` for its numbers, which layers of one kind have in common.
        sqnr_db: The signal-to-quantization-noise ratio of the layer's own output in decibels, `10 log10(|y|^2 / |y' -
            y|^2)`, where both layers read what the float model's layer reads.
        inputs: The number of elements in a row of its activations.
        outliers: The share of outliers among its activations; None where none are counted.
    """

    path: str
    kind: str
    sqnr_db: float
    inputs: int
    outliers: float | None


class Spread(NamedTuple):
    """The peak-to-mean ratio of the activations that a layer reads: the largest over the mean magnitude of its row.

    Attributes:
        path: The path of the module.
        kind: As in `Layer`.
        plain: The largest such ratio, of activations as they are.
        rotated: The same after the default rotation.
    """

    path: str
    kind: str
    plain: float
    rotated: float


def kind_of(path: str) -> str:
    """Return the path of a module with `*` for its numbers."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def block_of(path: str) -> str:
    """Return the path of the outermost numbered module that a module is in, e.g. `model.layers.3`; "" for none."""
    parts = path.split(".")
    return next((".".join(parts[: end + 1]) for end, part in enumerate(parts[:-1]) if part.isdecimal()), "")


def depth_of(path: str) -> int:
    """Return the first number in the path of a module; 0 if there is none."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), 0)


class Observed:
    """The layers of a float model with some rows of what they read, kept in files.

    Args:
        model: The float model.
        folder: An empty folder.
        batches: The number of batches that the model will run on.
    """

    def __init__(self, model: nn.Module, folder: Path, batches: int) -> None:
        self._targets = [
            target for target in plan(model, Int8Config(lm_head="int8", min_features=1)) if _is_layer(target)
        ]
        # The experts of one module are one layer.
        self.modules = {_path(target): target.module for target in self._targets}
        self._folder = folder
        self._files: dict[str, list[Path]] = {}
        self._rows = math.ceil(ROWS / batches)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers read while the model runs inside the context."""
        hooks = [
            module.register_forward_pre_hook(self._recorder(path, number), with_kwargs=True)
            for number, (path, module) in enumerate(self.modules.items())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, path: str, number: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            files = self._files.setdefault(path, [])
            given = (*args, *kwargs.values())
            if not isinstance(module, nn.Linear) and len(given) > 1:  # Experts, whose rows belong together.
                if files:
                    return
            elif len(files) * self._rows >= ROWS:
                return
            else:
                given = (some_rows(given[0], self._rows).clone(),)
            files.append(self._folder / f"layer-{number}-{len(files)}.pt")
            torch.save(given, files[-1])

        return record

    def given(self, path: str) -> tuple[Any, ...]:
        """Return the arguments of a layer; () for a layer that was not called."""
        parts = [torch.load(file, weights_only=True) for file in self._files.get(path, [])]
        return tuple(torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))

    def noise(self, path: str, other: nn.Module) -> tuple[float, float] | None:
        """Return |y' - y|^2 and |y|^2 of another module's output y' in a layer's place; None without activations."""
        given = self.given(path)
        if not given:
            return None
        expected = self.modules[path](*given).double()
        found = other(*args_in(given, dtype_of(other))).double()
        return float((found - expected).square().sum()), float(expected.square().sum())

    def compare(self, candidate: nn.Module) -> list[Layer]:
        """Return the layers of a candidate that are not the float model's, with their errors."""
        others = dict(candidate.named_modules())
        found = []
        for path in self.modules:
            other = others.get(path)
            noise = None if other is None else self.noise(path, other)
            if other is None or noise is None:
                continue
            sqnr = _db(*noise)
            if sqnr < math.inf:
                x = self.given(path)[0]
                found.append(Layer(path, kind_of(path), sqnr, x.shape[-1], _outliers(other, x)))
        return found

    def spreads(self) -> list[Spread]:
        """Return the largest activations of the linears, before and after the default rotation."""
        groups: dict[Hashable, list[Target]] = {}
        for target in self._targets:
            if target.source != "experts":
                groups.setdefault(target.path if target.group is None else target.group, []).append(target)
        found = []
        for group in groups.values():
            d = None
            if group[0].rotation > 1:
                d = rotation_of(input_scales([each.view.of(each.weight.detach()) for each in group]))
            for target in group:
                if given := self.given(target.path):
                    x = given[0].to(torch.float32)
                    both = (_spread(x), _spread(reference.rotated(x, d)))
                    found.append(Spread(target.path, kind_of(target.path), *both))
        order = {path: place for place, path in enumerate(self.modules)}
        return sorted(found, key=lambda spread: order[spread.path])


def _is_layer(target: Target) -> bool:
    return target.reason is None and target.source != "embedding"


def _path(target: Target) -> str:
    return target.path.rpartition(".")[0] if target.source == "experts" else target.path


def _db(noise: float, signal: float) -> float:
    return 10 * math.log10(signal / noise) if noise and signal else (-math.inf if noise else math.inf)


def _outliers(module: nn.Module, x: Tensor) -> float | None:
    """Return the share of activations with a second digit, or of columns in float."""
    if not isinstance(module, Int8Linear) or module.weight_only:
        return None
    if module.outliers == "column":
        return float(column.outliers(x, module.threshold).any(dim=0).double().mean())
    _, q1 = reference.digits(reference.quantize_rows(x, module.d, module.threshold).Q)
    return float((q1 != 0).double().mean())


def _spread(x: Tensor) -> float:
    size = x.abs()
    mean = size.mean(dim=-1)
    ratios = size.amax(dim=-1)[mean > 0] / mean[mean > 0]
    return float(ratios.max()) if len(ratios) else 0.0
