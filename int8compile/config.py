"""The options of the backend, validated when they are set."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from int8compile.errors import ConfigError, did_you_mean, first_line

OutlierPolicy = Literal["row", "column"]
LmHead = Literal["native", "int8_weight", "int8"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
# The fields that `modules` can set for some modules.
MODULE_SETTINGS = ("threshold", "outliers", "rotate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Config:
    """The options for a model's conversion to int8.

    Attributes:
        threshold: The size of outliers. With `outliers="row"`, an outlier is an element of more than about `threshold`
            times the mean magnitude of its row; `threshold` is at least 1, by default 12.0, or 6.0 where the weight is
            not rotated. With "column", an outlier is an element of at least `threshold`, by default 6.0. 0 turns
            outliers off.
        outliers: "row" puts all elements of a row on one integer grid, on which outliers take 16 bits, so results do
            not depend on the batch. "column" is LLM.int8() as published: a column with an outlier runs in float. It is
            slower, and meant for comparison.
        rotate: Whether activations and weights are rotated (Hadamard), which spreads outliers over 128 elements. The
            result is nearer to float on models of language and images. Rows with few elements other than 0, or with
            equal elements, are up to 1.5 times nearer without. Sizes that are not multiples of 16 are never rotated.
        skip_modules: Glob patterns of module paths that stay in float. A pattern matches whole path components
            anywhere in the path: "mlp" matches `layers.3.mlp.up_proj`, "layers.0" does not match `layers.01`.
        modules: Settings for some modules: patterns, as of `skip_modules`, with values for `threshold`, `outliers` and
            `rotate`. Where several patterns match a path, later ones win. `outliers` without `threshold` takes the
            default threshold, because thresholds of "row" and "column" mean different things.
        lm_head: "native" leaves the output projection (a module named `lm_head`, or a weight tied to the embedding)
            in float; "int8_weight" makes its weight int8 and keeps 23 bits of its activations; "int8" treats it as any
            other linear.
        min_features: A weight with fewer input or output features stays in float: quantizing its activations costs
            as much as its matmul (routers, small heads).
        free_weights: Whether to release the memory of rewritten float weights. Using them afterwards, in the eager
            model or `state_dict()`, raises `FreedWeightError`.
        mode: Inductor's mode. `torch.compile` does not allow `mode=` together with `options=`.
        inductor: Inductor's own options, as in `torch.compile(options=...)` of the default backend.

    Raises:
        ConfigError: A value is not allowed, or an Inductor option does not exist.
    """

    threshold: float | None = None
    outliers: OutlierPolicy = "row"
    rotate: bool = True
    skip_modules: tuple[str, ...] = ()
    modules: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    lm_head: LmHead = "native"
    min_features: int = 16
    free_weights: bool = False
    mode: Mode = "default"
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("outliers", self.outliers, get_args(OutlierPolicy))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _threshold(self.threshold, self.outliers))
        _check_choice("lm_head", self.lm_head, get_args(LmHead))
        _check_choice("mode", self.mode, get_args(Mode))
        if isinstance(self.min_features, bool) or not isinstance(self.min_features, int) or self.min_features < 1:
            raise ConfigError(f"min_features={self.min_features!r}: give a whole number of at least 1")
        for name in ("rotate", "free_weights"):
            _check_bool(name, getattr(self, name))
        object.__setattr__(self, "skip_modules", _patterns(self.skip_modules))
        object.__setattr__(self, "modules", _module_settings(self.modules, self.outliers))
        object.__setattr__(self, "inductor", _inductor_options(self.inductor))

    @classmethod
    def from_options(
        cls, options: Int8Config | Mapping[str, Any] | None = None, *, mode: str | None = None
    ) -> Int8Config:
        """Return the config for `torch.compile`'s `options` and `mode`.

        Args:
            options: Field names of this class and their values, or a config.
            mode: Inductor's mode. It must equal `options["mode"]` where both are given.

        Raises:
            ConfigError: A name is unknown (the message has the nearest one) or a value is not allowed.
        """
        options = dict(vars(options) if isinstance(options, Int8Config) else options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"unknown option {name!r} of backend 'int8'{did_you_mean(name, known)}. "
                    f"Allowed: {', '.join(known)}. Inductor's own options go under 'inductor'"
                )
        if mode is not None:
            if options.get("mode", mode) != mode:
                raise ConfigError(f"mode is given twice: {mode!r} and options['mode']={options['mode']!r}. Give one")
            options["mode"] = mode
        return cls(**options)

    def of(self, path: str) -> Int8Config:
        """Return the options for one module: these, with the settings of the patterns of `modules` that match its path.

        `modules` of the result is empty.
        """
        if not self.modules:
            return self
        effective = copy.copy(self)
        given: dict[str, Any] = {"modules": {}}
        for pattern, settings in self.modules.items():
            if matches(pattern, path):
                given |= settings if "outliers" not in settings else {"threshold": None, **settings}
        vars(effective).update(given)  # Each value has been checked.
        return effective

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `skip_modules` and `modules`."""
        return tuple(dict.fromkeys((*self.skip_modules, *self.modules)))

    @property
    def may_rotate(self) -> bool:
        """True if weights are rotated, at least those of some modules."""
        return self.rotates or any(
            settings.get("rotate") or settings.get("outliers") == "row" for settings in self.modules.values()
        )

    @property
    def rotates(self) -> bool:
        """True if weights are rotated where their size allows it. LLM.int8() finds outliers in unrotated columns."""
        return self.rotate and self.outliers == "row"

    def threshold_of(self, *, rotated: bool) -> float:
        """Return the threshold for a rotated or unrotated weight."""
        return default_threshold(rotated=rotated) if self.threshold is None else self.threshold

    def inductor_patches(self) -> dict[str, Any]:
        """Return Inductor's config patches: the patches of `mode`, overridden by `inductor`."""
        import torch._inductor

        patches: dict[str, Any] = {}
        if self.mode != "default":
            patches.update(torch._inductor.list_mode_options(self.mode))
        patches.update(self.inductor)
        return patches


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a JSON file says: options under the names of the fields of `Int8Config`, not checked yet.

    Raises:
        ConfigError: It cannot be read, or does not hold a JSON object.
    """
    try:
        options = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(options, dict):
        raise ConfigError(f'{str(path)!r} holds {options!r:.60}; give options, e.g. {{"threshold": 6.0}}')
    return options


def default_threshold(*, rotated: bool) -> float:
    """Return the default threshold. Unrotated activations have more outliers, and so a lower threshold."""
    return 12.0 if rotated else 6.0


def matches(pattern: str, path: str) -> bool:
    """Return whether a glob pattern matches whole components of a module path."""
    return fnmatch.fnmatchcase(f".{path}.", f"*.{pattern}.*")


def _threshold(value: object, outliers: str) -> float:
    """Return a threshold as a float, checked."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"threshold={value!r}: give a finite number >= 0 (0 for no outliers), or None for the usual")
    if outliers == "row" and 0 < value < 1:
        raise ConfigError(
            f"threshold={value!r}: it counts in mean magnitudes of a row, of which at least one element has 1. Give a "
            "number >= 1, 0 for no outliers, or None for the usual 12.0"
        )
    return float(value)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: give True or False")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{name}={value!r}: allowed are {listed}{did_you_mean(str(value), allowed)}")


def _patterns(value: Iterable[str] | str) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"skip_modules={value!r}: give a list of patterns, e.g. [{value!r}]")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(
                f"skip_modules holds {pattern!r}: give non-empty strings, e.g. 'mlp' or 'layers.*.o_proj'"
            )
    return patterns


def _module_settings(modules: Mapping[str, Mapping[str, Any]], outliers: str) -> dict[str, dict[str, Any]]:
    """Return a copy of `modules`, checked.

    Args:
        modules: Settings by pattern.
        outliers: The value of the whole config.
    """
    if not isinstance(modules, Mapping):
        raise ConfigError(f"modules={modules!r}: give a dictionary, e.g. {{'o_proj': {{'rotate': False}}}}")
    checked: dict[str, dict[str, Any]] = {}
    for pattern, settings in modules.items():
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"modules holds the pattern {pattern!r}: give a non-empty string, e.g. 'mlp'")
        if not isinstance(settings, Mapping):
            raise ConfigError(f"modules[{pattern!r}]={settings!r}: give a dictionary, e.g. {{'threshold': 6.0}}")
        for name in settings:
            if name not in MODULE_SETTINGS:
                raise ConfigError(
                    f"modules[{pattern!r}] sets {name!r}{did_you_mean(str(name), MODULE_SETTINGS)}. Allowed: "
                    f"{', '.join(MODULE_SETTINGS)}; skip_modules leaves modules in float"
                )
        checked[pattern] = dict(settings)
        try:
            if "outliers" in settings:
                _check_choice("outliers", settings["outliers"], get_args(OutlierPolicy))
            if "rotate" in settings:
                _check_bool("rotate", settings["rotate"])
            if settings.get("threshold") is not None:
                # A later pattern may change `outliers`, and resets the threshold then; an earlier one may have set it.
                others = {outliers, *(before.get("outliers", outliers) for before in checked.values())}
                for policy in {settings["outliers"]} if "outliers" in settings else others:
                    checked[pattern]["threshold"] = _threshold(settings["threshold"], policy)
        except ConfigError as error:
            raise ConfigError(f"modules[{pattern!r}]: {error}") from None
    return checked


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(f"inductor={options!r}: give a dictionary of Inductor options")
    if not options:
        return {}
    import torch._inductor.config

    known = list(torch._inductor.config.get_config_copy())
    checked = {}
    for name, value in options.items():
        option = str(name).replace("-", "_")
        if option not in known:
            raise ConfigError(
                f"unknown Inductor option {name!r}{did_you_mean(option, known)}. "
                "torch._inductor.list_options() lists all of them"
            )
        default = torch._inductor.config.get_config_copy()[option]
        if isinstance(default, bool | int | float | str) and type(value) is not type(default):
            raise ConfigError(
                f"Inductor option {name}={value!r}: give a {type(default).__name__}, as its default {default!r} is"
            )
        checked[option] = value
    return checked
