"""`calibrate()`: what the inputs of a model's linears look like, so that they are rotated in the best way.

Before a row of activations is rotated and written in 8 bits, its elements are divided by c, and the weight's columns
multiplied (`ops.reference.input_scales`). Without calibration c is made from the weights alone. With statistics of the
activations it balances both roundings, which makes the divergence from the float model about half as large.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from int8compile.checksum import sha256_of_all
from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, ConfigError, InputError, Int8Warning, ModelError, first_line, listed
from int8compile.explaining import looks_fused, multiplies
from int8compile.observation import Given, Linear, captured, check_not_freed, observed, plain
from int8compile.ops import input_scales, rotation_of, rotation_size
from int8compile.passes import RULES, WeightView, finite
from int8compile.stored.modules import Int8Module
from int8compile.weights import STORE

# A parameter by identity, since comparing tensors compares elements, and the weight as a view of it.
_Key = tuple[int, WeightView]

# Random tokens are given in rows of so many.
SEQUENCE = 128
# With fewer rows an expert is rotated as its weights alone ask for.
FEW = 16
# Rows that are counted together.
_PART = 1024
_FORMAT = "int8compile calibration 1"
# Another weight, not the same one in another dtype: bfloat16 moves a column's rms by less than 0.2 %.
_SAME = 0.01
# All that can be int8 with some configuration.
_EVERYTHING = Int8Config(lm_head="int8", min_features=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight that was calibrated.

    Attributes:
        name: The parameter's name.
        shape: The parameter's shape.
        view: The weight as a view of it.
        rms: [K] or [B, K] float64, of each of its columns: what tells whether it is still the same weight.
    """

    name: str
    shape: tuple[int, ...]
    view: WeightView
    rms: Tensor = dataclasses.field(repr=False)

    def check(self, weight: Tensor) -> None:
        """Raise `CheckpointError` where a weight is another one, beyond what its dtype rounds.

        Shapes:
            weight: [N, K] or [B, N, K]; on the meta device only its shape is compared.
        """
        if tuple(weight.shape) != self.view.shape:
            raise self._misfit(f"is {list(weight.shape)}, not {list(self.view.shape)}")
        if weight.is_meta:
            return
        found = _column_rms(weight, each=self.rms.dim() > 1)
        # NaN is no less than anything.
        if not float((found - self.rms).norm()) <= _SAME * float(self.rms.norm()):
            raise self._misfit("has other values")

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter that it is a view of, checked as `check` does."""
        parameter = parameters.get(self.name)
        if parameter is None:
            raise self._misfit("is not in the model")
        if tuple(parameter.shape) != self.shape:
            raise self._misfit(f"is {list(parameter.shape)}, not {list(self.shape)}")
        last = self.view.offset + sum((n - 1) * step for n, step in zip(self.view.size, self.view.stride, strict=True))
        if parameter.storage_offset() + last >= parameter.untyped_storage().nbytes() // parameter.itemsize:
            raise self._misfit("lies otherwise in memory")
        self.check(self.view.of(parameter))
        return parameter

    def _misfit(self, how: str) -> CheckpointError:
        return CheckpointError(f"the calibration does not fit the model: {self.name} {how}. Calibrate this model again")


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Linears that read the same x.

    Attributes:
        weights: Their weights.
        rows: How many rows of x the statistics are of.
        activations: a [K] float64: the root of the mean, over rows, of the squares of x, each row divided by its rms.
            [B, K] for the weights [B, N, K] of experts that read rows of their own, zero for those that had few.
    """

    weights: tuple[Weight, ...]
    rows: int
    activations: Tensor = dataclasses.field(repr=False)

    @functools.cached_property
    @torch.inference_mode(False)  # Backward passes could not save an inference tensor.
    def d(self) -> Tensor:
        """What x is multiplied by before it is rotated, [K] or [B, K] float32; one tensor for all of the weights."""
        # Of the columns' rms alone: so a part of the model has the same as all of it.
        counts = [math.prod(weight.view.shape[:-1]) for weight in self.weights]
        squares = [weight.rms.square() * count for weight, count in zip(self.weights, counts, strict=True)]
        columns = (torch.stack(squares).sum(dim=0) / sum(counts)).sqrt()
        if self.activations.dim() == 1:
            return rotation_of(input_scales([columns[None]], self.activations))
        each = zip(columns, self.activations, strict=True)
        return torch.stack([rotation_of(input_scales([w[None]], a if a.any() else None)) for w, a in each])


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` found. `print(calibration)` shows a table.

    Attributes:
        groups: Linears that read the same x, with the statistics of that.
        missing: Names of weights that are not calibrated, with the reason.
    """

    groups: tuple[Group, ...]
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Have a float model's linears rotated so, wherever they become int8: compiled, quantized, saved or exported.

        Args:
            model: The model that was calibrated, or a copy of it, in any dtype.

        Raises:
            CheckpointError: A weight is not in the model, has another shape, or is another one since.
            ModelError: A weight is int8 already.
        """
        model = plain(model)
        _check_in_float(model)
        parameters = _parameters(model)
        for weight in (weight for group in self.groups for weight in group.weights):
            weight.of(parameters)
        self._set(parameters)

    def _set(self, parameters: Mapping[str, Tensor]) -> None:
        for group in self.groups:
            STORE.calibrate([(parameters[weight.name], weight.view) for weight in group.weights], group.d)

    def d_of(self, names: Sequence[str], weights: Sequence[Tensor]) -> Tensor | None:
        """Return what rotates some weights, for models whose weights are never in memory together.

        Weights of one group get the same tensor. Where a name is given that is of another group than the first, the
        first one's group decides: ask for one name at a time to have the groups of the calibration.

        Args:
            names: The parameters' names.
            weights: The weights.

        Shapes:
            weights: [N, K] or [B, N, K] each, any float dtype; result: [K] or [B, K] float32.

        Returns:
            None where none of them is calibrated.

        Raises:
            CheckpointError: A weight has another shape than when it was calibrated, or is another one since.
        """
        d = None
        for name, weight in zip(names, weights, strict=True):
            shape, known = tuple(weight.shape), self._places.get(name, [])
            for group, calibrated in known:
                if calibrated.view.shape == shape or sorted(calibrated.shape) != sorted(shape):
                    calibrated.check(weight)
                    d = group.d if d is None else d
                # Else the model multiplies by parts of it, and this is the whole.
        return d

    @functools.cached_property
    def _places(self) -> dict[str, list[tuple[Group, Weight]]]:
        places: dict[str, list[tuple[Group, Weight]]] = {}
        for group in self.groups:
            for weight in group.weights:
                places.setdefault(weight.name, []).append((group, weight))
        return places

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file of safetensors."""
        tensors, described = {}, []
        for number, group in enumerate(self.groups):
            tensors[f"{number}.activations"] = group.activations
            tensors |= {f"{number}.{place}.rms": weight.rms for place, weight in enumerate(group.weights)}
            weights = [{"name": weight.name, "shape": weight.shape, "view": weight.view} for weight in group.weights]
            described.append({"rows": group.rows, "weights": weights})
        about = {"format": _FORMAT, "groups": json.dumps(described), "missing": json.dumps(dict(self.missing))}
        save_file(tensors, path, {**about, "checksum": _checksum(tensors, about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file cannot be read, is not one of them, or is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise CheckpointError(f"{str(path)!r} is not a calibration, or one of a later version")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            if about.pop("checksum", None) != _checksum(tensors, about):
                raise CheckpointError(
                    f"{str(path)!r} is damaged: its SHA-256 is another one. Calibrate the model again"
                )
            described = json.loads(about["groups"])
            groups = (_group(tensors, str(number), group) for number, group in enumerate(described))
            return cls(tuple(groups), json.loads(about["missing"]))
        except CheckpointError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read as a calibration: {first_line(error)}") from error

    def summary(self) -> str:
        """Return how many linears are calibrated, and which are not and why."""
        count = sum(len(group.weights) for group in self.groups)
        lines = [f"{count} linears calibrated, in {len(self.groups)} groups" if count else "no linear is calibrated"]
        by_reason: dict[str, list[str]] = {}
        for name, why in self.missing.items():
            by_reason.setdefault(why, []).append(name)
        return "\n".join(lines + [f"- not calibrated: {listed(names)}: {why}" for why, names in by_reason.items()])

    def __str__(self) -> str:
        from tabulate import tabulate

        if not self.groups:
            return self.summary()
        rows = []
        for group in self.groups:
            names = [weight.name.removesuffix(".weight") for weight in group.weights]
            c = group.d.abs().reciprocal()
            divided = f"{float(c.min()):.2g} to {float(c.max()):.2g}"
            largest = f"{float(group.activations.max()):.3g}"
            rows.append((_short(names), group.d.shape[-1], group.rows, largest, divided))
        headers = ("linears that read the same x", "K", "rows", "largest input / rms", "divided by")
        table = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
        return f"{table}\n\n{self.summary()}"


def calibrate(
    model: nn.Module, batches: Iterable[Any] | None = None, *, tokens: int = 512, progress: bool = True
) -> Calibration:
    """Run a model in float on some inputs, and have its linears rotated as is best for such inputs.

    `torch.compile(model, backend="int8")`, `quantize_`, `save` and `export` use it from then on. The model runs as it
    is (`model.eval()` is the caller's), under `torch.no_grad()`. Its buffers and the state of the random number
    generators are restored afterwards. Few inputs are enough, and random tokens are nearly as good as text.

    Args:
        model: A float model.
        batches: Inputs: each a tensor, a tuple of arguments or a dictionary of keyword arguments. Without, a language
            model of transformers is given random tokens, always the same ones.
        tokens: Rows that each linear is to see; it stops when all have. 64 to 1024 are usual.
        progress: Whether to show a progress bar.

    Returns:
        What was found, to be looked at, or saved and applied to the same model elsewhere.

    Raises:
        FreedWeightError: The model's float weights were freed.
        InputError: There is no batch, one is none of those, or no tokens can be made up for the model.
        ModelError: The model has int8 modules, or no data.
    """
    model = plain(model)
    _check_in_float(model)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"tokens={tokens!r}: give a whole number of at least 1")
    if batches is None:
        batches = list(token_batches(model, tokens))
    elif isinstance(batches, Tensor | Mapping):
        batches = [batches]
    elif not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise InputError(f"batches is {type(batches).__name__}; give a list of inputs, or a DataLoader")
    parameters = _parameters(model)
    found, count = _Found(parameters, _tables(model), tokens), 0
    # Inputs of different sizes are compiled once each, or once for all of them.
    many: Any = torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096)
    with many, captured(model, found.record) as call:
        for batch in tqdm(batches, desc="Calibrating", disable=not progress, leave=False):
            count += 1
            args, kwargs = _arguments(batch)
            call(*args, **kwargs)
            if found.complete:
                break
    calibration = found.calibration(model)
    if not count:
        raise InputError("batches is empty, or was iterated over before; give at least one batch of inputs")
    if not calibration.groups:
        why = calibration.summary() if calibration.missing else "the model multiplies by no weight"
        warnings.warn(f"calibrate() has calibrated nothing: {why}", Int8Warning, stacklevel=2)
    calibration._set(parameters)
    return calibration


@dataclasses.dataclass(eq=False)
class _Statistics:
    """Sums over rows of the x of some linears.

    Attributes:
        members: The parameters and weights, by identity.
        seen: Rows that were given, for each matrix of weights that read rows of their own.
        rows: Those that are counted, [] or [B] int64.
        total: [K] or [B, K] float64: of the squares of x, each row divided by its mean square.
    """

    members: dict[_Key, tuple[Tensor, WeightView]]
    seen: int = 0
    rows: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(0))
    total: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, given: Given, limit: int, *, each: bool) -> None:
        """Count rows of an x, only so many that `limit` are seen; of each matrix where each has its own rows."""
        rows, left = given.x.detach(), limit - self.seen
        if left <= 0:
            return
        if each and given.ends is not None:
            self._add_grouped(rows.reshape(-1, rows.shape[-1]), given.ends)
            return
        rows = rows if each else rows.reshape(-1, rows.shape[-1])
        rows = rows[..., :: max(1, math.ceil(rows.shape[-2] / left)), :]
        counted, usable = _normalized(rows)
        self.seen += rows.shape[-2]
        self.total = self.total + counted.sum(dim=-2)
        self.rows = self.rows + usable.sum(dim=-1)

    def _add_grouped(self, rows: Tensor, ends: Tensor) -> None:
        """Count all rows of experts, which lie one behind the other."""
        ends = ends.cpu()
        experts = len(ends)
        # Behind the last end there may be some of none.
        rows = rows[: int(ends[-1])] if experts else rows[:0]
        total = torch.zeros(experts, rows.shape[-1], dtype=torch.float64)
        count = torch.zeros(experts, dtype=torch.int64)
        owner = torch.searchsorted(ends.long(), torch.arange(len(rows)), right=True)
        for part, of in zip(rows.split(_PART), owner.split(_PART), strict=True):
            counted, usable = _normalized(part)
            total.index_add_(0, of, counted)
            count.index_add_(0, of, usable.to(torch.int64))
        self.seen += math.ceil(len(rows) / max(1, experts))
        self.total, self.rows = self.total + total, self.rows + count

    def join(self, other: _Statistics) -> None:
        """Take over what another has seen."""
        self.members |= other.members
        self.seen += other.seen
        self.rows, self.total = self.rows + other.rows, self.total + other.total

    def activations(self) -> Tensor:
        """Return a, see `Group`."""
        a = (self.total / self.rows.clamp_min(1).unsqueeze(-1)).sqrt()
        # Few rows of an expert tell less than its weights.
        return a if not self.rows.dim() else a * (self.rows >= FEW).unsqueeze(-1)


def _normalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of rows, each divided by its mean square; 0 for those that cannot be used; and which can be.

    Shapes:
        rows: [..., M, K]; results: the same, float64, and [..., M].
    """
    squares = rows.to("cpu", torch.float64).square()
    size = squares.mean(dim=-1, keepdim=True)
    usable = size.isfinite() & (size > 0)
    # NaN times 0 is NaN.
    return torch.where(usable, squares / size, 0), usable.squeeze(-1)


class _Found:
    """What is seen while a model runs.

    Args:
        parameters: The model's, by name.
        tables: Ids of those that are embedding tables, which are never rotated.
        limit: Rows that each linear is to see.
    """

    def __init__(self, parameters: Mapping[str, Tensor], tables: set[int], limit: int) -> None:
        # The first one of those that have several.
        self._names = {id(parameter): name for name, parameter in reversed(list(parameters.items()))}
        self._tables = tables
        self._limit = limit
        self._of: dict[_Key, _Statistics] = {}

    def record(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """See what the linears of a graph are given whenever it runs; a Dynamo backend."""
        return observed(gm, example_inputs, _EVERYTHING, (*RULES, finite), self._see)[0]

    @property
    def complete(self) -> bool:
        """True if every linear has seen enough."""
        return bool(self._of) and all(statistics.seen >= self._limit for statistics in self._of.values())

    def _see(self, linear: Linear, given: Given) -> None:
        members: dict[_Key, tuple[Tensor, WeightView]] = {
            (id(parameter), view): (parameter, view)
            for parameter, view in given.group
            if id(parameter) in self._names and id(parameter) not in self._tables
        }
        if not linear.first or not members:
            return
        # Those that were seen apart, in another graph or for another x, may be together here.
        known = list(dict.fromkeys(self._of[key] for key in members if key in self._of))
        statistics = known[0] if known else _Statistics({})
        for other in known[1:]:
            statistics.join(other)
        statistics.members |= members
        self._of.update(dict.fromkeys(statistics.members, statistics))
        statistics.add(given, self._limit, each=linear.each)

    def calibration(self, model: nn.Module) -> Calibration:
        """Return all that was found."""
        groups, missing = [], dict[str, str]()
        for statistics in dict.fromkeys(self._of.values()):
            each = statistics.rows.dim() > 0
            weights = tuple(self._weight(parameter, view, each=each) for parameter, view in statistics.members.values())
            activations = statistics.activations()
            if activations.any():
                groups.append(Group(weights, int(statistics.rows.sum()), activations))
            else:
                missing |= {weight.name: "no row of its input was usable (all zero, NaN or Inf)" for weight in weights}
        seen = {identity for identity, _ in self._of}
        for owner in model.modules():
            for parameter in owner._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                if multiplies(owner, parameter) or looks_fused(owner, parameter):
                    missing[self._names[id(parameter)]] = self._why_not(parameter)
        return Calibration(tuple(groups), missing)

    def _weight(self, parameter: Tensor, view: WeightView, *, each: bool) -> Weight:
        rms = _column_rms(view.of(parameter), each=each)
        return Weight(self._names[id(parameter)], tuple(parameter.shape), view, rms)

    def _why_not(self, parameter: Tensor) -> str:
        if id(parameter) in self._tables:
            return "it is also the embedding table, which is not rotated"
        if parameter.dim() == 2 and rotation_size(parameter.shape[1]) == 1:
            return "its inputs are not rotated, their number is no multiple of 16"
        return "it was not used, or in a way that stays in float (int8compile.explain tells)"


def check_rotates(config: Int8Config) -> None:
    """Raise `ConfigError` where a calibration is given beside options that rotate nothing."""
    if not config.rotates:
        option = "rotate=False" if config.outliers == "row" else "outliers='column'"
        raise ConfigError(f"a calibration has no effect with {option}, which rotates nothing. Leave one of them out")


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Return the SHA-256 of what a file holds: tensors, and what is said of them."""
    said = json.dumps([sha256_of_all(tensors), about], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _group(tensors: Mapping[str, Tensor], name: str, described: Mapping[str, Any]) -> Group:
    """Return a group as a file has it."""
    weights = []
    for place, weight in enumerate(described["weights"]):
        size, stride, offset, shape = weight["view"]
        view = WeightView(tuple(size), tuple(stride), offset, tuple(shape))
        rms = tensors[f"{name}.{place}.rms"]
        weights.append(Weight(weight["name"], tuple(weight["shape"]), view, rms))
    return Group(tuple(weights), described["rows"], tensors[f"{name}.activations"])


def _column_rms(weight: Tensor, *, each: bool) -> Tensor:
    if each:
        return torch.stack([_column_rms(matrix, each=False) for matrix in weight])
    rows = weight.detach().reshape(-1, weight.shape[-1])
    # By parts: a float64 copy of all of it may not fit.
    squares = [part.to(torch.float64).square().sum(dim=0) for part in rows.split(1024)]
    return (torch.stack(squares).sum(dim=0) / len(rows)).sqrt().cpu()


def _check_in_float(model: nn.Module) -> None:
    """Raise where a model has no float weights that could be rotated."""
    held = [path or "the model" for path, module in model.named_modules() if isinstance(module, Int8Module)]
    if held:
        raise ModelError(f"{listed(held)}: int8 already. Calibrate the float model, before quantize_")
    parameters = _parameters(model)
    check_not_freed(parameters, "Calibrate it before compiling")
    if empty := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise ModelError(f"{listed(empty)}: on the meta device, without data. Load the weights before calibrating")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by the names that they have where no part of the model is compiled."""
    return {
        name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _tables(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that are read by rows."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise InputError(
        f"a batch is {type(batch).__name__}; give a tensor, a tuple of arguments or a dictionary of keyword arguments"
    )


def token_batches(model: nn.Module, ids: Tensor | int, length: int = SEQUENCE) -> Iterator[dict[str, Any]]:
    """Return inputs for a language model of transformers.

    Args:
        model: The model.
        ids: Tokens, [1, T]; or how many random ones, the same ones every time.
        length: The most tokens of a batch, of which each has one row.

    Raises:
        InputError: It is no language model, or its configuration does not say how many tokens there are.
    """
    accepted = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if not reads_text or "input_ids" not in accepted or not isinstance(vocabulary, int):
        raise InputError(
            f"{type(model).__name__} is no language model for which tokens can be made up; give batches of inputs, "
            "int8compile.calibrate(model, [inputs, ...])"
        )
    if isinstance(ids, int):
        ids = torch.randint(vocabulary, (1, ids), generator=torch.Generator().manual_seed(0))
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    also: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    for row in ids.to(next(model.parameters()).device).split(length, dim=1):
        both = {"decoder_input_ids": row} if getattr(config, "is_encoder_decoder", False) else {}
        yield {"input_ids": row, **both, **also}


def _short(names: Sequence[str]) -> str:
    """Return names of one group, those that stand beside the first without their path."""
    parent = names[0].rpartition(".")[0]
    rest = [name.removeprefix(f"{parent}.") if name.rpartition(".")[0] == parent else name for name in names[1:]]
    return ", ".join([names[0], *rest])
