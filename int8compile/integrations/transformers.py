"""int8 models in transformers: import this module, then pass an `Int8CompileConfig` to `from_pretrained`.

Weights are quantized as they are read, on the device that they are for, those together that are rotated alike; the
float model is never in memory as a whole. What `save_pretrained` writes loads again without a config, as long as this
module was imported. Where it was not, transformers warns of an unknown quantization type and raises an error about the
shape of a weight.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import difflib
import enum
import functools
import hashlib
import importlib
import json
import logging
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from int8compile.config import Int8Config, LmHead, OutlierPolicy
from int8compile.errors import CheckpointError, ConfigError, listed
from int8compile.integrations.folders import (
    ADVICE,
    Arrivals,
    check_loaded,
    check_quantizer,
    check_tensor,
    checksums,
    describe_when_saved,
    has_int8,
    is_offloaded,
    is_others,
    opened,
    quantized,
    tensors_of,
)
from int8compile.stored.convert import (
    Converter,
    Target,
    dequantize_,
    describe,
    make_rotations,
    plan,
    put_described,
    report,
    warn_if_all_float,
    without_data,
)
from int8compile.stored.convert import attach as attach_all
from int8compile.stored.modules import BUFFERS, Int8Module, bitsandbytes_weight, check_layout, share_rotations
from int8compile.tuning.calibration import Calibration, check_rotates
from int8compile.weights import STORE

log = logging.getLogger(__name__)


class _Method(enum.StrEnum):
    """The value of `quant_method` in a config.json; diffusers asks for its `value`."""

    INT8COMPILE = "int8compile"


METHOD = _Method.INT8COMPILE
FIELDS = ("threshold", "outliers", "skip_modules", "lm_head", "min_features", "rotate")
# Names that users know from bitsandbytes, and ours.
_RENAMED = {"llm_int8_threshold": "threshold", "llm_int8_skip_modules": "skip_modules"}
# Those that have no counterpart, with the values that ask for nothing.
_WITHOUT_EFFECT = {
    "load_in_8bit": (True,),
    "load_in_4bit": (False,),
    "llm_int8_enable_fp32_cpu_offload": (False, True),  # What is offloaded stays int8.
    "llm_int8_has_fp16_weight": (False,),
}


@register_quantization_config(METHOD)
class Int8CompileConfig(QuantizationConfigMixin):
    """The options of `int8compile.quantize_`, for `from_pretrained(quantization_config=...)`.

    Args:
        threshold: See `int8compile.Int8Config`, as for the next five. None for the usual.
        outliers: "row", or "column" as in bitsandbytes.
        skip_modules: Patterns of modules that stay in float.
        lm_head: "native", "int8_weight" or "int8".
        min_features: The least number of inputs and outputs.
        rotate: Whether activations and weights are rotated.
        checkpoint_format: "int8compile", or "bitsandbytes" for checkpoints that it saved, see `bitsandbytes_config`.
        modules: What a checkpoint has in int8, by path, as `int8compile.stored.convert.describe` has it; not for users.
            Where it is given it decides, and the options above do not count.
        checksums: The SHA-256 of the tensors of a checkpoint's int8 modules, by their names; not for users.
        checksum: That of `modules` and `checksums`; not for users.
        calibration: What `int8compile.calibrate` found for this model, or a file of it.
        **options: `llm_int8_threshold`, `llm_int8_skip_modules` and `load_in_8bit` of bitsandbytes are understood.

    Raises:
        CheckpointError: The file of a calibration cannot be read.
        ConfigError: A name is unknown, or a value is not allowed.
    """

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
        given: dict[str, Any] = {
            "threshold": threshold,
            "outliers": outliers,
            "skip_modules": skip_modules or (),
            "lm_head": lm_head,
        }
        given |= {"min_features": min_features, "rotate": rotate}
        options.pop("quant_method", None)
        given |= _from_bitsandbytes(options)
        # Checked by the one who knows.
        config = Int8Config(**given)
        self.threshold = config.threshold
        self.outliers = config.outliers
        self.skip_modules = list(config.skip_modules)
        self.lm_head = config.lm_head
        self.min_features = config.min_features
        self.rotate = config.rotate
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
        self.modules = _of_names("modules", modules, Mapping)
        self.checksums = _of_names("checksums", checksums, str)
        if self.checksums and checksum is not None and checksum != self._checksum():
            raise ConfigError(
                f"the SHA-256 of the quantization_config's modules and checksums is {self._checksum()}, and it says "
                f"{checksum}. The config.json is damaged or was edited. {ADVICE}"
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: of a model that is int8, what is in it, and not the options that led to it."""
        shown = super().to_dict()
        del shown["calibration"]
        if not self.checksums:
            del shown["checksums"]
        if not self.modules:
            del shown["modules"]
            return dict(shown)
        names = ("quant_method", "checkpoint_format", "modules", "checksums")
        shown = {name: shown[name] for name in names if name in shown}
        return shown | ({"checksum": self._checksum()} if self.checksums else {})

    def _checksum(self) -> str:
        """The SHA-256 of what config.json says of modules and checksums."""
        said = json.dumps([self.modules, self.checksums], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def config(self) -> Int8Config:
        """The same as int8compile's own config."""
        return Int8Config(**{name: getattr(self, name) for name in FIELDS})

    @classmethod
    def of(cls, config: Int8Config, calibration: Calibration | None = None) -> Int8CompileConfig:
        """The fields of int8compile's own config that say how a model is quantized."""
        return cls(**{name: getattr(config, name) for name in FIELDS}, calibration=calibration)

    def check_calibration(self, targets: Sequence[Target]) -> None:
        """Check, before weights are read, that the calibration is of a model like this one; values are checked later.

        Raises:
            CheckpointError: It has none of the weights, or one of another shape.
        """
        if self.calibration is None or not self.calibration.groups or not targets:
            return
        weights = [target.view.of(target.weight.to("meta")) for target in targets]
        if self.calibration.d_of([target.name for target in targets], weights) is None:
            names = listed([target.name for target in targets])
            raise CheckpointError(f"the calibration does not fit the model: it has no {names}. Calibrate this model")

    def rotate_group(self, group: Sequence[Target]) -> None:
        """Decide what the weights of one group are rotated with, before the first of them is quantized."""
        if self.calibration is not None:
            for target in group:
                d = self.calibration.d_of([target.name], [target.view.of(target.weight)])
                if d is not None:
                    STORE.calibrate([(target.weight, target.view)], d)
        make_rotations(group)

    def describe(self, model: Any) -> None:
        """Takes down what is int8 in a model.

        A dtype only where it is not the model's: it may be loaded in another.
        """
        own = str(model.dtype).removeprefix("torch.")
        self.modules = {
            path: {name: value for name, value in options.items() if (name, value) != ("dtype", own)}
            for path, options in describe(model).items()
        }


def _of_names(option: str, given: object, kind: type[Any]) -> dict[str, Any]:
    """An option of a checkpoint that has something of a kind for each name.

    Raises:
        ConfigError: It has not.
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
    """The options that have names of bitsandbytes, under ours."""
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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown option {name!r} of Int8CompileConfig{hint}. Allowed: {', '.join(known)}")
    return found


@register_quantizer(METHOD)
class Int8CompileQuantizer(HfQuantizer):
    """What transformers calls while it loads, saves and dequantizes a model."""

    quantization_config: Int8CompileConfig

    def __init__(self, quantization_config: Int8CompileConfig, **kwargs: Any) -> None:
        # A copy: what is added to it is for this model, and the user may have others to load.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        # What becomes int8, and the weights that have been read.
        self.targets: list[Target] = []
        self.arrivals = Arrivals(())
        self.named = ""
        self.converter: Converter | None = None
        self.mapped = _MappedFiles(())
        # Where each tensor of a checkpoint that is int8 already is.
        self.files: dict[str, str] = {}

    @property
    def quantized_element_size(self) -> float:
        """Bytes of an int8 weight, for device maps."""
        return 1

    @property
    def is_trainable(self) -> bool:
        """int8 weights get no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The modules have no graph break."""
        return True

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        files = [str(file) for file in checkpoint_files or ()]
        self.mapped = _MappedFiles(files)
        if self.pre_quantized and config.modules:
            targets = put_described(model, _fitted(config.modules, model), ADVICE)
        else:
            targets = self._plan(model)
        if self.pre_quantized:
            self.files = _check_checkpoint(model, files)
            for module in model.modules():
                if isinstance(module, Int8Module):
                    _as_parameters(module)
        _rename_ties(model, {target.name: target.rotation > 1 for target in targets})
        if self.pre_quantized:
            unknown = [r"\.weight_format$"] if config.checkpoint_format != METHOD else _guard_patterns(model)
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unknown}

    def _plan(self, model: Any) -> list[Target]:
        """Finds what becomes int8, by the options.

        A checkpoint that is int8 already, and does not say in what, is one of bitsandbytes: there it is put.
        """
        config = self.quantization_config
        if not self.pre_quantized:
            # What the model's authors keep in float32 when the rest is in 16 bit overflows there, or loses accuracy.
            kept = list(model._keep_in_fp32_modules_strict or [])
            if model.dtype == torch.float16:
                kept += model._keep_in_fp32_modules or []
            config.skip_modules += [name for name in kept if name not in config.skip_modules]
        _tie(model)  # So that the plan sees it.
        self.converter = Converter(model, config.config())
        found = plan(model, config.config())
        self.targets = [target for target in found if target.reason is None]
        if self.pre_quantized:
            for target in self.targets:
                self.converter.put(target, *without_data(target))
        else:
            config.check_calibration(self.targets)
            self.arrivals = Arrivals(self.targets)
        if found and not self.targets:
            warn_if_all_float(report(model, config.config()), "Int8CompileConfig")
        return self.targets

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a float weight of the checkpoint becomes int8."""
        self.named = param_name
        return param_name in self.arrivals

    def get_quantize_ops(self) -> Quantize:
        """Return what quantizes a weight: transformers asks about each, before it reads any."""
        self.arrivals.expect(self.named)
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """How names of a checkpoint are changed: those of bitsandbytes into ours."""
        if self.quantization_config.checkpoint_format != "bitsandbytes":
            return []
        paths = "|".join(re.escape(target.path) for target in self.targets)
        return [
            WeightRenaming(rf"^({paths})\.weight$", r"\1.qweight"),
            WeightRenaming(rf"^({paths})\.SCB$", r"\1.scale"),
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        missing = []
        plain: dict[int, Tensor] = {}
        for path, module in model.named_modules():
            if not isinstance(module, Int8Module):
                continue
            if not is_offloaded(module):
                missing += [f"{path}.{name}" for name in tensors_of(module) if not _is_loaded(getattr(module, name))]
                _as_buffers(module, plain)
        if missing:
            raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
        self._quantize_the_rest()
        share_rotations(model)
        check_loaded(model, _fitted_names(self.quantization_config.checksums, model), self.files)
        self.quantization_config.checksums = {}
        self.files = {}
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            _rescale(model)
            self.quantization_config.checkpoint_format = METHOD
        self.quantization_config.describe(model)
        # Saved under the names that the modules have, not those of the float checkpoint, which may split experts.
        model._weight_conversions = []
        self.targets, self.arrivals, self.converter = [], Arrivals(()), None
        self.mapped = _MappedFiles(())
        # Models inside this one can be saved alone.
        attach_all(model, self.quantization_config.config())

    def _quantize_the_rest(self) -> None:
        """Quantize what still waits for others, and what transformers has loaded in float.

        Of several weights that a checkpoint has in one it asks about the first only, which may stay in float.
        """
        loaded: dict[str, Tensor] = {}
        for target in self.targets:
            weight = target.module._parameters.get(target.name.rpartition(".")[2])
            if weight is not None and target.name in self.arrivals and _is_loaded(weight):
                loaded[target.name] = weight
                self.arrivals.expect(target.name)
        groups = [self.arrivals.add(name, weight) for name, weight in loaded.items()]
        for target, made in quantized([*chain(*groups, *self.arrivals.rest())], self.quantization_config.rotate_group):
            assert self.converter is not None
            self.converter.put(target, *made)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Return what is saved: the tensors of the model and, under the names of its float weights, empty ones.

        Where this module was not imported, transformers takes the model for one in float, and would initialize at
        random what it finds no tensors for. It raises an error about the shapes of the empty ones instead.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        # Each with memory of its own, or they would be taken for one that is shared.
        guards = {name: torch.empty(1, device="cpu")[:0] for name in _guards(model)}
        return {**model.state_dict(), **guards}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # A string, after `save_pretrained` has made one of the config's.
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


class Quantize(ConversionOps):
    """Quantizes the weights of a group once they are loaded, and puts int8 modules where they are for."""

    def __init__(self, quantizer: Int8CompileQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See `ConversionOps.convert`. A weight waits until its group is there, with which it is returned.

        There are several weights where the checkpoint has them in one. What does not fit the model is left as it is,
        to be reported by transformers.

        A weight with NaN or Inf raises `BadWeightError`, of which transformers makes a RuntimeError after logging it.
        """
        arrivals = self.quantizer.arrivals
        names = [full_layer_name] if len(input_dict) == 1 else list(input_dict)
        weights = [given[0] if isinstance(given, list) else given for given in input_dict.values()]
        for name in names:
            arrivals.expect(name)
        result: dict[str, Tensor] = {}
        for name, weight in zip(names, weights, strict=True):
            whole = arrivals.add(name, weight) if name in arrivals else []
            if name not in arrivals:
                result[name] = weight
            for target, made in quantized(whole, self.quantizer.quantization_config.rotate_group):
                self._place(target)
                (missing_keys or set()).discard(target.name)
                named = zip(BUFFERS, made, strict=True)
                result |= {f"{target.path}.{buffer}": tensor for buffer, tensor in named if tensor is not None}
            self.quantizer.mapped.was_read(sum(weight.nbytes for _, weight in whole))
        return result

    def _place(self, target: Target) -> None:
        """Puts a module without data in place, once; transformers fills it, or writes the data to a disk."""
        converter = self.quantizer.converter
        assert converter is not None
        if converter.holds(target):
            module = converter.put(target, *without_data(target))
            _as_parameters(module)
            # What would initialize the weights of this module does not know it.
            target.module._is_hf_initialized = module._is_hf_initialized = True  # type: ignore[assignment]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class _MappedFiles:
    """The mapped files of a checkpoint, of which what was read can leave memory again.

    transformers keeps all of them mapped until it has loaded everything, so what was read would stay.

    Args:
        files: Their paths.
    """

    # Read in between: often enough for memory, seldom enough for time.
    STEP = 32 * 2**20

    def __init__(self, files: Iterable[str]) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int]] | None = None
        self._read = 0

    def was_read(self, size: int) -> None:
        """Counts bytes that were read and, now and then, takes all that was read out of memory.

        The files can still be read; what was written to a private mapping of one would be lost, but while a model is
        loaded nobody writes. With them goes what the C library keeps of casts and the like that were freed.
        """
        self._read += size
        if self._read < self.STEP:
            return
        self._read = 0
        if self._ranges is None:
            self._ranges = list(self._mapped())
        for low, high in self._ranges:
            _libc().madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)
        trim = getattr(_libc(), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))

    def _mapped(self) -> Iterator[tuple[int, int]]:
        """The addresses of the files; none on systems that do not say."""
        with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                addresses, _, _, _, _, *path = line.split(maxsplit=5)
                if path and path[0].strip() in self._files:
                    low, high = addresses.split("-")
                    yield int(low, 16), int(high, 16)


def _as_parameters(module: Int8Module) -> None:
    """Registers int8 weights as parameters while a model is loaded.

    accelerate offloads parameters, but keeps buffers on the device unless it is told otherwise.
    """
    for name in tensors_of(module):
        tensor = module._buffers.pop(name)
        assert tensor is not None
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _as_buffers(module: Int8Module, known: dict[int, Tensor]) -> None:
    """Registers int8 weights as the buffers that they are, the same parameter always as the same one."""
    for name in tensors_of(module):
        parameter = module._parameters.pop(name)
        assert parameter is not None
        module._buffers[name] = known.setdefault(id(parameter), parameter.data)


def _is_loaded(tensor: Tensor) -> bool:
    """Whether transformers has given a tensor the data of a checkpoint."""
    return not tensor.is_meta and bool(getattr(tensor, "_is_hf_initialized", False))


def _tie(model: Any) -> None:
    """Ties the weights of a model without data; while it is being loaded, its own `tie_weights` does nothing."""
    for name, source in model.all_tied_weights_keys.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))


def _fitted(modules: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, dict[str, Any]]:
    """The int8 modules of a checkpoint that a model has, under its names, and with its dtype where none is given.

    A model without the head that was saved, or with another one, has names with a part less or more.
    """
    known = {path for path, _ in model.named_modules()}
    dtype = str(model.dtype).removeprefix("torch.")
    fitted = {}
    for path, options in modules.items():
        parent = path.rpartition(".")[0] if options.get("source") == "experts" else path
        names = _spellings(parent, model)
        found = next((name for name in names if name in known), None)
        if found is not None:
            fitted[found + path.removeprefix(parent)] = {"dtype": dtype, **options}
    return fitted


def _fitted_names(digests: Mapping[str, str], model: Any) -> dict[str, str]:
    """The checksums of a checkpoint under the names that a model has for the tensors."""
    known = {path for path, module in model.named_modules() if isinstance(module, Int8Module)}
    fitted = {}
    for name, digest in digests.items():
        path, _, last = name.rpartition(".")
        for spelling in _spellings(path, model):
            if spelling in known:
                fitted[f"{spelling}.{last}"] = digest
                break
    return fitted


def _spellings(path: str, model: Any) -> tuple[str, str, str]:
    prefix = f"{model.base_model_prefix}."
    return path, path.removeprefix(prefix), prefix + path


def _check_checkpoint(model: Any, files: Iterable[str]) -> dict[str, str]:
    """Compares what is int8 in a checkpoint with what is in the model.

    transformers reports what is missing in a checkpoint, initializes it at random, and goes on.

    Returns:
        The file of each tensor, by the name that it has in the model.

    Raises:
        CheckpointError: A layer is int8 in the one and float in the other, its tensors have other dtypes or a layout
            that is not known, or a file cannot be read.
    """
    modules = dict(model.named_modules())
    files = [file for file in files if file.endswith(".safetensors")]
    found: dict[str, str] = {}
    for file in files:
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dictionary
                path, _, name = key.rpartition(".")
                path = next((spelling for spelling in _spellings(path, model) if spelling in modules), path)
                module = modules.get(path)
                found[f"{path}.{name}"] = file
                if name == "qweight" and module is not None and not isinstance(module, Int8Module):
                    raise CheckpointError(
                        f"{key} of the checkpoint is int8, but by its config.json {path} is float. {ADVICE}"
                    )
                if isinstance(module, Int8Module):
                    check_tensor(key, name, module, tensors)
                if name == "weight_format":
                    check_layout(path, tensors.get_tensor(key))
    # bitsandbytes' names are changed into ours while its checkpoints are loaded.
    renamed = {
        f"{path}.{name}"
        for path, _, last in (name.rpartition(".") for name in found)
        if last == "SCB"
        for name in BUFFERS
    }
    int8 = {path: module for path, module in modules.items() if isinstance(module, Int8Module)}
    missing = [f"{path}.{name}" for path, module in int8.items() for name in tensors_of(module)]
    missing = [name for name in missing if name not in found.keys() | renamed]
    tied = {name.removesuffix("weight") for name in model.all_tied_weights_keys}
    missing = [name for name in missing if name.rpartition(".")[0] + "." not in tied]
    if files and missing:
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
    return found


def _guards(model: nn.Module) -> Iterator[str]:
    """The names of float weights that an int8 model does not have."""
    for path, module in model.named_modules():
        if isinstance(module, Int8Module):
            yield path if module.source == "experts" else f"{path}.weight"


def _guard_patterns(model: Any) -> list[str]:
    """Patterns for what `get_state_dict_and_metadata` adds, in a model with another head, too."""
    return [rf"^{re.escape(spelling)}$" for name in _guards(model) for spelling in _spellings(name, model)]


def _rename_ties(model: Any, rotated: Mapping[str, bool]) -> None:
    """Tell transformers that tied weights are tied under other names.

    Args:
        model: The model.
        rotated: What is int8, by the names in the float model, and whether it is rotated.
    """

    def renamed(ties: Mapping[str, str]) -> dict[str, str]:
        result = {}
        for name, source in ties.items():
            if name in rotated and source in rotated:
                for buffer in BUFFERS if rotated[name] else BUFFERS[:2]:
                    result[name.removesuffix("weight") + buffer] = source.removesuffix("weight") + buffer
            else:
                result[name] = source
        return result

    model.all_tied_weights_keys = renamed(model.all_tied_weights_keys)
    if isinstance(model._tied_weights_keys, dict):
        model._tied_weights_keys = renamed(model._tied_weights_keys)


def _rotated(model: nn.Module) -> dict[str, bool]:
    """Return which weights of int8 modules are rotated, by their names in float, shared modules under every path."""
    return {
        path if module.source == "experts" else f"{path}.weight": module.d is not None
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Int8Module)
    }


def _rescale(model: nn.Module) -> None:
    """Bitsandbytes stores the largest element of a row, 127 times its scale."""
    done = set()
    for path, module in model.named_modules():
        if isinstance(module, Int8Module) and id(module.scale) not in done:
            module.scale.copy_(bitsandbytes_weight(path, module.qweight, module.scale)[1])
            done.add(id(module.scale))


def attach(model: Any, config: Int8Config, *, nested: bool = False) -> None:
    """Have a model whose modules were made int8 without transformers save and load as one that it quantized.

    Args:
        model: The model.
        config: What led to it.
        nested: Whether a model that holds this one saves itself, too. Their configs are then often one object or parts
            of one, so only the outer model's says that it is int8.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if is_others(quantizer, Int8CompileQuantizer):
        return  # What it says of itself stays so; it cannot be saved.
    _rename_ties(model, _rotated(model))
    if quantizer is None:
        quantizer = Int8CompileQuantizer(Int8CompileConfig.of(config), pre_quantized=True)
    quantizer.quantization_config.describe(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    if not nested:
        model.config.quantization_config = quantizer.quantization_config
    model._weight_conversions = []


def detach(model: Any) -> None:
    """Undo `attach`, and what loading does: the model saves and loads as a float one."""
    for name in ("_tied_weights_keys", "_weight_conversions"):
        vars(model).pop(name, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, Int8CompileQuantizer):
        quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _described(model: Any) -> Iterator[None]:
    """While a model is saved, its config describes its int8 modules and has their checksums.

    Modules and values may have changed since it was quantized or loaded.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        yield  # Only the adapter is saved.
        return
    int8 = has_int8(model)
    if int8:
        check_quantizer(model, Int8CompileQuantizer)
        attach(model, Int8Config(), nested=True)
    elif isinstance(getattr(model, "hf_quantizer", None), Int8CompileQuantizer):
        detach(model)  # Its parts were dequantized, and it was not told.
    # The configs of models inside are parts of this one's, and would be saved with it. A float model may have been made
    # from the config of an int8 one.
    configs = {id(model.config): model.config}
    configs |= {id(inner.config): inner.config for inner in model.modules() if isinstance(inner, PreTrainedModel)}
    before = [(held, vars(held).pop("quantization_config")) for held in configs.values() if _is_ours(held)]
    described = model.hf_quantizer.quantization_config if int8 else None
    if described is not None:
        described.checksums = checksums(model)
        model.config.quantization_config = described
    try:
        yield
    finally:
        if described is not None:
            described.checksums = {}
            vars(model.config).pop("quantization_config", None)
        for held, quantization_config in before:
            held.quantization_config = quantization_config


def _is_ours(config: Any) -> bool:
    """Return whether a model's config says that it is int8 by this package."""
    said = vars(config).get("quantization_config")
    return isinstance(said, Int8CompileConfig) or (isinstance(said, dict) and said.get("quant_method") == METHOD)


describe_when_saved(PreTrainedModel, _described)


def bitsandbytes_config(name: str, **kwargs: Any) -> Any:
    """The config of a checkpoint that bitsandbytes saved in 8 bit, changed so that it loads as int8compile's.

    `AutoModelForCausalLM.from_pretrained(name, config=bitsandbytes_config(name))` needs no bitsandbytes, and takes the
    int8 values as they are. Saved again, it is a checkpoint of int8compile.

    Args:
        name: A folder or a hub name.
        **kwargs: What else `AutoConfig.from_pretrained` takes.

    Raises:
        CheckpointError: It is no 8 bit checkpoint of bitsandbytes.
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


if "diffusers" in sys.modules:
    # Whose models take the config, too, and ask tables of their own for it.
    with contextlib.suppress(ImportError):  # A version that is not supported.
        importlib.import_module("int8compile.integrations.diffusers")
