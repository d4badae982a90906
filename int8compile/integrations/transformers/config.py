"""`Int8CompileConfig`: how a model becomes int8, as `from_pretrained` takes it and config.json stores it."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from int8compile.config import Int8Config, LmHead, OutlierPolicy
from int8compile.errors import CheckpointError, ConfigError, did_you_mean, listed
from int8compile.integrations.folders import ADVICE
from int8compile.stored.convert import Target, describe, make_rotations
from int8compile.tuning.calibration import Calibration, check_rotates
from int8compile.weights import STORE

log = logging.getLogger(__name__)


class _Method(enum.StrEnum):
    """The value of `quant_method` in a config.json; diffusers asks for its `value`."""

    INT8COMPILE = "int8compile"


METHOD = _Method.INT8COMPILE
# The options of `Int8Config` that quantization depends on.
FIELDS = ("threshold", "outliers", "skip_modules", "modules", "lm_head", "min_features", "rotate")
# Option names of bitsandbytes, and the names here.
_RENAMED = {"llm_int8_threshold": "threshold", "llm_int8_skip_modules": "skip_modules"}
# Options of bitsandbytes without a counterpart, with the values that have no effect here.
_WITHOUT_EFFECT = {
    "load_in_8bit": (True,),
    "load_in_4bit": (False,),
    "llm_int8_enable_fp32_cpu_offload": (False, True),  # Offloaded modules stay int8.
    "llm_int8_has_fp16_weight": (False,),
}


class Int8CompileConfig(QuantizationConfigMixin):
    """The options of `int8compile.quantize_`, for `from_pretrained(quantization_config=...)`.

    Args:
        threshold: See `int8compile.Int8Config`; also for the next six. None for the default.
        outliers: "row", or "column" as in bitsandbytes.
        skip_modules: Patterns of modules that stay in float.
        modules: Settings for some modules, by pattern. The config.json of an int8 model has its int8 modules here, by
            path, as `int8compile.stored.convert.describe` returns them; the other options have no effect then.
        lm_head: "native", "int8_weight" or "int8".
        min_features: Weights with fewer inputs or outputs stay in float.
        rotate: Whether activations and weights are rotated.
        checkpoint_format: "int8compile", or "bitsandbytes" for its checkpoints, see `bitsandbytes_config`.
        checksums: The SHA-256 of the tensors of a checkpoint's int8 modules, by name; not for users.
        checksum: The SHA-256 of `modules` and `checksums`; not for users.
        calibration: The result of `int8compile.calibrate` for this model, or the path of its file.
        **options: `llm_int8_threshold`, `llm_int8_skip_modules` and `load_in_8bit` of bitsandbytes are understood.

    Raises:
        CheckpointError: The file of a calibration cannot be read.
        ConfigError: A name is unknown, or a value is not allowed.
    """

    threshold: float | None
    outliers: OutlierPolicy
    skip_modules: list[str]
    modules: dict[str, dict[str, Any]]
    lm_head: LmHead
    min_features: int
    rotate: bool

    def __init__(
        self,
        threshold: float | None = None,
        outliers: OutlierPolicy = "row",
        skip_modules: Iterable[str] | None = None,
        lm_head: LmHead = "native",
        min_features: int = 16,
        rotate: bool = True,
        checkpoint_format: str = METHOD,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        checksums: Mapping[str, str] | None = None,
        checksum: str | None = None,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        options.pop("quant_method", None)
        modules = _of_names("modules", modules, Mapping)
        # Descriptions name the kind of layer, which settings cannot.
        of_checkpoint = checksums is not None or any("source" in said for said in modules.values())
        given = {
            "threshold": threshold,
            "outliers": outliers,
            "skip_modules": skip_modules or (),
            "modules": {} if of_checkpoint else modules or {},
            "lm_head": lm_head,
            "min_features": min_features,
            "rotate": rotate,
        }
        config = Int8Config.from_options(given | _from_bitsandbytes(options))
        for name in FIELDS:
            setattr(self, name, getattr(config, name))
        self.skip_modules = list(config.skip_modules)
        if calibration is not None:
            check_rotates(config)
        self.calibration = Calibration.load(calibration) if isinstance(calibration, str | os.PathLike) else calibration
        if not isinstance(self.calibration, Calibration | None):
            raise ConfigError(
                f"calibration={self.calibration!r:.60}: give what int8compile.calibrate(model) returned, or the path "
                "of a file of it"
            )
        if checkpoint_format not in (METHOD, "bitsandbytes"):
            raise ConfigError(f"checkpoint_format={checkpoint_format!r}: allowed are '{METHOD}' and 'bitsandbytes'")
        self.checkpoint_format = checkpoint_format
        # The int8 modules, for `put_described`.
        self.int8_modules: dict[str, Any] = modules if of_checkpoint else {}
        self.checksums = _of_names("checksums", checksums, str)
        if self.checksums and checksum is not None and checksum != self._checksum():
            raise ConfigError(
                f"the SHA-256 of the quantization_config's modules and checksums is {self._checksum()}, and it says "
                f"{checksum}. The config.json is damaged or was edited. {ADVICE}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json: for an int8 model its modules, for a float model the options."""
        shown = super().to_dict()
        del shown["calibration"]
        described = shown.pop("int8_modules")
        if not self.checksums:
            del shown["checksums"]
        if not described:
            return dict(shown)
        shown["modules"] = described
        names = ("quant_method", "checkpoint_format", "modules", "checksums")
        shown = {name: shown[name] for name in names if name in shown}
        return shown | ({"checksum": self._checksum()} if self.checksums else {})

    def _checksum(self) -> str:
        """Return the SHA-256 of modules and checksums, as config.json stores them."""
        said = json.dumps([self.int8_modules, self.checksums], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def config(self) -> Int8Config:
        """Return the options as an `Int8Config`."""
        return Int8Config.from_options({name: getattr(self, name) for name in FIELDS})

    @classmethod
    def of(cls, config: Int8Config, calibration: Calibration | None = None) -> Int8CompileConfig:
        """Return a config with the quantization options of an `Int8Config`."""
        return cls(**{name: getattr(config, name) for name in FIELDS}, calibration=calibration)

    def check_calibration(self, targets: Sequence[Target]) -> None:
        """Check, before weights are read, the names and shapes of the calibration; values are checked later.

        Raises:
            CheckpointError: It has none of the weights, or a weight of another shape.
        """
        if self.calibration is None or not self.calibration.groups or not targets:
            return
        weights = [target.view.of(target.weight.to("meta")) for target in targets]
        if self.calibration.d_of([target.name for target in targets], weights) is None:
            names = listed([target.name for target in targets])
            raise CheckpointError(f"the calibration does not fit the model: it has no {names}. Calibrate this model")

    def rotate_group(self, group: Sequence[Target]) -> None:
        """Choose the rotation of the weights of one group, before the first of them is quantized."""
        if self.calibration is not None:
            for target in group:
                d = self.calibration.d_of([target.name], [target.view.of(target.weight)])
                if d is not None:
                    STORE.calibrate([(target.weight, target.view)], d)
        make_rotations(group)

    def describe(self, model: Any) -> None:
        """Record the int8 modules of a model.

        A module's dtype is recorded only where it differs from the model's, which may be loaded in another dtype.
        """
        own = str(model.dtype).removeprefix("torch.")
        self.int8_modules = {
            path: {name: value for name, value in options.items() if (name, value) != ("dtype", own)}
            for path, options in describe(model).items()
        }


# Not by `register_quantization_config`, which refuses where int8compile_autoload has entered a stand-in.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8CompileConfig


def _of_names(option: str, given: object, kind: type[Any]) -> dict[str, Any]:
    """Return an option of a checkpoint that maps names to values of one type.

    Raises:
        ConfigError: It does not.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(value, kind) for value in given.values()):
        raise ConfigError(
            f"{option} of the quantization_config is {given!r:.60}; it must have a {kind.__name__} for each name. The "
            f"config.json is damaged or was edited. {ADVICE}"
        )
    return dict(given)


def _from_bitsandbytes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of options of bitsandbytes, under the names here.

    Raises:
        ConfigError: A name is unknown, or a value has no counterpart.
    """
    found = {}
    known = [*FIELDS, "calibration", "checkpoint_format", *_RENAMED, *_WITHOUT_EFFECT]
    for name, value in options.items():
        if name in _RENAMED and value is not None:
            found[_RENAMED[name]] = value
            note = "; with outliers='column' it means what it means in bitsandbytes" if "threshold" in name else ""
            log.warning("%s of bitsandbytes is taken as %s%s", name, _RENAMED[name], note)
        elif name in _WITHOUT_EFFECT:
            if value not in _WITHOUT_EFFECT[name]:
                raise ConfigError(f"{name}={value!r} has no counterpart in int8compile, which is 8 bit inference only")
            log.warning("%s of bitsandbytes has no effect here: int8 is what Int8CompileConfig asks for", name)
        elif name not in _RENAMED:
            hint = did_you_mean(name, known)
            raise ConfigError(f"unknown option {name!r} of Int8CompileConfig{hint}. Allowed: {', '.join(known)}")
    return found


def bitsandbytes_config(name: str, **kwargs: Any) -> Any:
    """Return the config of an 8 bit checkpoint of bitsandbytes, changed so that int8compile loads it.

    `AutoModelForCausalLM.from_pretrained(name, config=bitsandbytes_config(name))` works without bitsandbytes and takes
    the int8 values unchanged. Saved again, the model is a checkpoint of int8compile.

    Args:
        name: A folder or a hub name.
        **kwargs: Other arguments of `AutoConfig.from_pretrained`.

    Raises:
        CheckpointError: It is not an 8 bit checkpoint of bitsandbytes.
    """
    config = AutoConfig.from_pretrained(name, **kwargs)
    theirs = getattr(config, "quantization_config", None) or {}
    if not theirs.get("load_in_8bit"):
        found = f"has the quantization_config {theirs}" if theirs else "has no quantization_config"
        raise CheckpointError(f"{name} was not saved in 8 bit by bitsandbytes: its config.json {found}")
    config.quantization_config = Int8CompileConfig(
        threshold=theirs.get("llm_int8_threshold", 6.0),
        outliers="column",
        skip_modules=theirs.get("llm_int8_skip_modules"),
        checkpoint_format="bitsandbytes",
    ).to_dict()
    return config
