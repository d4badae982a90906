"""Make the candidates of `evaluate`: the same model in other formats."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from int8compile.config import Int8Config
from int8compile.errors import ConfigError, did_you_mean
from int8compile.stored.convert import quantize_
from int8compile.tuning.calibration import calibrate_on_tokens
from int8compile.tuning.peers import installed, with_bitsandbytes, with_torchao

# The reference, and a model that is int8 already.
FLOAT, STORED = "float32", "as stored"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to make a candidate.

    Attributes:
        make: Takes a copy of the model in float32, which it may change, and the batches, and returns the candidate.
        package: The package that it needs; "" for none.
        config: The config of int8 modules; None for other formats.
        calibrates: Whether it is calibrated: on the batches, where no tokens can be made up for the model.
    """

    make: Callable[[nn.Module, Sequence[Any]], Any]
    package: str = ""
    config: Int8Config | None = None
    calibrates: bool = False


def quantized(config: Int8Config) -> Candidate:
    """Return the candidate of a config: int8 modules, which run the same kernels as a compiled model."""

    def make(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
        quantize_(model, config, progress=False)
        return model

    return Candidate(make, config=config)


def _calibrated(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    calibrate_on_tokens(model, batches)
    quantize_(model, progress=False)
    return model


def _by_peer(convert: Callable[[Any], Any]) -> Callable[[nn.Module, Sequence[Any]], Any]:
    @functools.wraps(convert)
    def make(model: nn.Module, batches: Sequence[Any]) -> Any:
        with warnings.catch_warnings():
            # About other uses of the libraries.
            warnings.simplefilter("ignore")
            return convert(model)

    return make


CANDIDATES: Mapping[str, Candidate] = {
    "bfloat16": Candidate(lambda model, batches: model.to(torch.bfloat16)),
    "default": quantized(Int8Config()),
    "calibrated": Candidate(_calibrated, config=Int8Config(), calibrates=True),
    "column": quantized(Int8Config(outliers="column")),
    "no outliers": quantized(Int8Config(threshold=0)),
    "bitsandbytes": Candidate(_by_peer(with_bitsandbytes), "bitsandbytes"),
    "torchao": Candidate(_by_peer(functools.partial(with_torchao, dynamic=True)), "torchao"),
}
STANDARD = tuple(CANDIDATES)


def chosen(
    configs: Mapping[str, Any] | Iterable[str] | None, stored: nn.Module | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the candidates that were asked for, and notes on those that were left out.

    Args:
        configs: See `int8compile.evaluate`.
        stored: The model, if it is int8 already.

    Returns:
        Candidates by name, each a `Candidate` or a model; the notes.

    Raises:
        ConfigError: A candidate or an option is not known.
    """
    if configs is None:
        configs = STANDARD if stored is None else ("bfloat16",)
    elif isinstance(configs, str):
        configs = (configs,)
    given = dict(configs) if isinstance(configs, Mapping) else {name: name for name in configs}
    found: dict[str, Any] = {} if stored is None else {STORED: stored}
    notes = []
    for name, spec in given.items():
        if isinstance(spec, str) and spec in (FLOAT, STORED):
            if spec == STORED and stored is None:
                raise ConfigError(f"{name!r}: the model is not int8, so there is nothing that is stored")
            continue  # They are there anyway.
        candidate = _candidate(name, spec)
        if isinstance(candidate, Candidate) and candidate.package and not installed(candidate.package):
            notes.append(f"{name} is left out: the package {candidate.package} is not installed.")
        else:
            found[name] = candidate
    return found, notes


def _candidate(name: str, spec: Any) -> Any:
    if isinstance(spec, str):
        if spec not in CANDIDATES:
            known = (FLOAT, *CANDIDATES)
            raise ConfigError(
                f"unknown candidate {spec!r}{did_you_mean(spec, known)}. Allowed: {', '.join(known)}, or a mapping "
                "from a name to an Int8Config"
            )
        return CANDIDATES[spec]
    if isinstance(spec, Int8Config | Mapping):
        return quantized(Int8Config.from_options(spec))
    if isinstance(spec, Candidate) or callable(spec):
        return spec
    raise ConfigError(
        f"{name!r} is {type(spec).__name__}; give the name of a candidate, an Int8Config, a mapping of its options, or "
        "a model"
    )
