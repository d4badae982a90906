"""`calibrate()`: statistics of the inputs of a model's linears, which improve their rotation.

Before a row of activations is rotated and written in 8 bits, its elements are divided by c, and the columns of the
weight are multiplied by c (`ops.reference.input_scales`). Without calibration, c is computed from the weights alone.
With statistics of the activations, c balances the rounding of both, which about halves the divergence from the float
model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from int8compile.checksum import sha256_of_all
from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, ConfigError, InputError, Int8Warning, ModelError, first_line, listed
from int8compile.observation import args_in, captured, check_has_data, dtype_of, plain
from int8compile.passes import WeightView
from int8compile.progress import progress_bar
from int8compile.stored.modules import Int8Module
from int8compile.tuning.groups import Group, Weight
from int8compile.tuning.statistics import Found
from int8compile.weights import STORE

# The number of random tokens in a row.
SEQUENCE = 128
_FORMAT = "int8compile calibration 1"
NO_BATCH = "batches is empty, or was iterated over before; give at least one batch of inputs"


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The result of `calibrate`. `print(calibration)` shows a table.

    Attributes:
        groups: Linears that read the same x, with statistics of it.
        missing: Names of weights that are not calibrated, with the reason.
    """

    groups: tuple[Group, ...]
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Have a float model's linears use the calibration wherever they become int8: compiled, saved, exported, ...

        Args:
            model: The model that was calibrated, or a copy of it, in any dtype.

        Raises:
            CheckpointError: A weight is not in the model, or has another shape or other values.
            ModelError: A weight is already int8.
        """
        model = plain(model)
        check_in_float(model)
        parameters = _parameters(model)
        for weight in (weight for group in self.groups for weight in group.weights):
            weight.of(parameters)
        self._set(parameters)

    def _set(self, parameters: Mapping[str, Tensor]) -> None:
        for group in self.groups:
            STORE.calibrate([(parameters[weight.name], weight.view) for weight in group.weights], group.d)

    def d_of(self, names: Sequence[str], weights: Sequence[Tensor]) -> Tensor | None:
        """Return the `d` of some weights, for models whose weights are never in memory together.

        All weights of a group have the same tensor. If the names are of several groups, the group of the first
        calibrated one decides. To get the groups of the calibration, ask for one name at a time.

        Args:
            names: The names of the parameters.
            weights: The weights.

        Shapes:
            weights: [N, K] or [B, N, K] each, any float dtype; result: [K] or [B, K] float32.

        Returns:
            None where none of them is calibrated.

        Raises:
            CheckpointError: A weight has another shape or other values than when it was calibrated.
        """
        d = None
        for name, weight in zip(names, weights, strict=True):
            shape, known = tuple(weight.shape), self._places.get(name, [])
            for group, calibrated in known:
                if calibrated.view.shape == shape or sorted(calibrated.shape) != sorted(shape):
                    calibrated.check(weight)
                    d = group.d if d is None else d
                # Otherwise the model multiplies by parts of the parameter, and this is the whole.
        return d

    @functools.cached_property
    def _places(self) -> dict[str, list[tuple[Group, Weight]]]:
        places: dict[str, list[tuple[Group, Weight]]] = {}
        for group in self.groups:
            for weight in group.weights:
                places.setdefault(weight.name, []).append((group, weight))
        return places

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to a safetensors file.

        Raises:
            CheckpointError: The file cannot be written.
        """
        tensors, described = {}, []
        for number, group in enumerate(self.groups):
            tensors[f"{number}.activations"] = group.activations
            tensors |= {f"{number}.{place}.rms": weight.rms for place, weight in enumerate(group.weights)}
            weights = [{"name": weight.name, "shape": weight.shape, "view": weight.view} for weight in group.weights]
            described.append({"rows": group.rows, "weights": weights})
        about = {"format": _FORMAT, "groups": json.dumps(described), "missing": json.dumps(dict(self.missing))}
        try:
            save_file(tensors, path, {**about, "checksum": _checksum(tensors, about)})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be written: {first_line(error)}. Name a file in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Return the calibration in a file that `save` wrote.

        Raises:
            CheckpointError: The file cannot be read, is not a calibration, or is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise CheckpointError(f"{str(path)!r} is not a calibration, or is of a later version")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dictionary
            if about.pop("checksum", None) != _checksum(tensors, about):
                raise CheckpointError(
                    f"{str(path)!r} is damaged: its SHA-256 does not match. Calibrate the model again"
                )
            described = json.loads(about["groups"])
            groups = (_group(tensors, str(number), group) for number, group in enumerate(described))
            return cls(tuple(groups), json.loads(about["missing"]))
        except CheckpointError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read as a calibration: {first_line(error)}") from error

    def summary(self) -> str:
        """Return the number of calibrated linears, and the names of the others with the reasons."""
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
    """Run a float model on some inputs, and choose the best rotation of its linears for such inputs.

    `torch.compile(model, backend="int8")`, `quantize_`, `save` and `export` use the calibration from then on. The model
    runs under `torch.no_grad()`, in the mode it is in (call `model.eval()` before). Its buffers and the state of the
    random number generators are restored afterwards. Few inputs are enough, and random tokens are nearly as good as
    text.

    Args:
        model: A float model.
        batches: Inputs: each a tensor, a tuple of arguments or a dictionary of keyword arguments. None gives a language
            model of transformers random tokens, always the same ones.
        tokens: The number of rows to see of each linear; the run stops when all have seen them. 64 to 1024 are usual.
        progress: Whether to show a progress bar.

    Returns:
        The calibration, to print, or to save and apply to the same model elsewhere.

    Raises:
        FreedWeightError: The model's float weights were freed.
        InputError: There is no batch, a batch is of another type, or no tokens can be made up for the model.
        ModelError: The model has int8 modules, or no data.
    """
    model = plain(model)
    check_in_float(model)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"tokens={tokens!r}: give a whole number of at least 1")
    if batches is None:
        batches = list(token_batches(model, tokens))
    else:
        batches = as_batches(batches)
    parameters = _parameters(model)
    found, count = Found(parameters, _tables(model), tokens), 0
    # Each size of input may be compiled once.
    many: Any = torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096)
    with many, captured(model, found.record) as call:
        for batch in progress_bar(batches, desc="Calibrating", shown=progress):
            count += 1
            args, kwargs = arguments(batch)
            call(*args, **kwargs)
            if found.complete:
                break
    groups, missing = found.result(model)
    calibration = Calibration(tuple(groups), missing)
    if not count:
        raise InputError(NO_BATCH)
    if not calibration.groups:
        why = calibration.summary() if calibration.missing else "the model multiplies by no weight"
        warnings.warn(f"calibrate() has calibrated nothing: {why}", Int8Warning, stacklevel=2)
    calibration._set(parameters)
    return calibration


def calibrate_on_tokens(model: nn.Module, batches: Iterable[Any]) -> Calibration:
    """Calibrate a language model on random tokens, as `calibrate` does by default, and another model on batches."""
    if takes_tokens(model):
        return calibrate(model, progress=False)
    called = (arguments(batch) for batch in batches)
    given = [args_in(kwargs or args, dtype_of(model)) for args, kwargs in called]
    return calibrate(model, given, progress=False)


def takes_tokens(model: nn.Module) -> bool:
    """Return whether `token_batches` can make up tokens for a model."""
    try:
        next(token_batches(model, 1))
    except InputError:
        return False
    return True


def check_rotates(config: Int8Config) -> None:
    """Raise `ConfigError` where options rotate nothing, so that a calibration has no effect."""
    if not config.may_rotate:
        option = "rotate=False" if config.outliers == "row" else "outliers='column'"
        raise ConfigError(f"a calibration has no effect with {option}, which rotates nothing. Leave one of them out")


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Return the SHA-256 of the tensors and metadata of a file."""
    said = json.dumps([sha256_of_all(tensors), about], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _group(tensors: Mapping[str, Tensor], name: str, described: Mapping[str, Any]) -> Group:
    """Return a group from the tensors and description of a file."""
    weights = []
    for place, weight in enumerate(described["weights"]):
        size, stride, offset, shape = weight["view"]
        view = WeightView(tuple(size), tuple(stride), offset, tuple(shape))
        rms = tensors[f"{name}.{place}.rms"]
        weights.append(Weight(weight["name"], tuple(weight["shape"]), view, rms))
    return Group(tuple(weights), described["rows"], tensors[f"{name}.activations"])


def check_in_float(
    model: nn.Module, verb: str = "calibrate", advice: str = "Calibrate the float model, before quantize_"
) -> None:
    """Raise an error where a model is int8, was freed or has no data, so that it cannot be calibrated.

    Args:
        model: The model.
        verb: What is to be done with it, for messages.
        advice: What to do where it is int8.
    """
    held = [path or "the model" for path, module in model.named_modules() if isinstance(module, Int8Module)]
    if held:
        raise ModelError(f"{listed(held)}: int8 already. {advice}")
    check_has_data(model, verb)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name; names of compiled parts are those of the parts themselves."""
    return {
        name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _tables(model: nn.Module) -> set[int]:
    """Return the ids of the embedding tables."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def as_batches(batches: Any) -> Iterable[Any]:
    """Return batches to iterate over; a tensor or a mapping is a single batch.

    Raises:
        InputError: It cannot be iterated over.
    """
    if isinstance(batches, Tensor | Mapping):
        return [batches]
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise InputError(f"batches is {type(batches).__name__}; give a list of inputs, or a DataLoader")
    return batches  # type: ignore[no-any-return]


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a batch stands for.

    Raises:
        InputError: It is not a tensor, a tuple or a mapping.
    """
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
        ids: Tokens, [1, T]; or the number of random tokens, which are the same every time.
        length: The most tokens in a batch; each batch has one row.

    Raises:
        InputError: It is not a language model, or its configuration has no vocabulary size.
    """
    accepted = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if not reads_text or "input_ids" not in accepted or not isinstance(vocabulary, int):
        raise InputError(
            f"{type(model).__name__} is not a language model for which tokens can be made up; give batches of inputs, "
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
    """Return the names of a group in one line; siblings of the first are written without their path."""
    parent = names[0].rpartition(".")[0]
    rest = [name.removeprefix(f"{parent}.") if name.rpartition(".")[0] == parent else name for name in names[1:]]
    return ", ".join([names[0], *rest])
