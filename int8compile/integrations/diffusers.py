"""int8 models in diffusers: import this module, then load a saved int8 folder, or pass an `Int8CompileConfig`.

`quantize_` imports it when it is given a model of diffusers or a part of a pipeline, and `int8compile_autoload` when
diffusers loads an int8 folder. Where torch's entry points are turned off, processes without the import get an error
about an unknown quantization type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, ConfigError, ModelError, listed
from int8compile.integrations.folders import (
    ADVICE,
    Arrivals,
    check_files,
    check_loaded,
    check_quantizer,
    checksums,
    describe_when_saved,
    has_int8,
    int8_tensors,
    is_offloaded,
    is_others,
    quantized,
)
from int8compile.integrations.transformers import METHOD, Int8CompileConfig
from int8compile.stored.convert import (
    Converter,
    Target,
    dequantize_,
    plan,
    put_described,
    report,
    warn_if_all_float,
)
from int8compile.stored.convert import attach as attach_all
from int8compile.stored.modules import BUFFERS, Int8Module, share_rotations

__all__ = ["Int8CompileConfig", "Int8CompileDiffusersQuantizer"]


class Int8CompileDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers has no annotations
    """The interface that diffusers calls while it loads, saves and dequantizes a model.

    Models stay unmarked (`is_quantized` is False), because diffusers refuses to cast marked ones, and int8 modules can
    be cast.
    """

    quantization_config: Int8CompileConfig
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Int8CompileConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # The weights that become int8, and the names in the checkpoint.
        self.arrivals = Arrivals(())
        self.loaded_keys: list[str] = []
        self.converter: Converter | None = None
        # The file of each tensor, for a checkpoint that is already int8.
        self.files: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise an error for options that int8 modules do not support.

        Raises:
            ModelError: A part would be offloaded to disk: diffusers offloads parameters only, int8 weights are buffers.
            ConfigError: It is a checkpoint of bitsandbytes.
        """
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ModelError(
                "device_map puts parts on the disk, where int8 weights of diffusers cannot be. Leave it out"
            )
        if self.quantization_config.checkpoint_format != METHOD:
            raise ConfigError(
                f"checkpoint_format={self.quantization_config.checkpoint_format!r} is for models of transformers. "
                "Quantize the float model"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Iterable[Any]) -> list[str]:
        """Record the names and files of the checkpoint; diffusers calls this first."""
        self.files = dict.fromkeys(map(str, checkpoint_files), "")
        self.loaded_keys = list(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, keep_in_fp32_modules: Any = (), **kwargs: Any) -> None:
        model.is_quantized = False
        config = self.quantization_config
        if self.pre_quantized:
            dtype = str(model.dtype).removeprefix("torch.")
            modules = {path: {"dtype": dtype, **options} for path, options in config.int8_modules.items()}
            put_described(model, modules, ADVICE)
            self.files = _check_checkpoint(model, self.files)
            return
        config.skip_modules += [name for name in keep_in_fp32_modules or () if name not in config.skip_modules]
        self.converter = Converter(model, config.config())
        found = plan(model, config.config())
        targets = [target for target in found if target.reason is None]
        config.check_calibration(targets)
        self.arrivals = Arrivals(targets)
        for name in self.loaded_keys:
            self.arrivals.expect(name)
        if found and not targets:
            warn_if_all_float(report(model, config.config()), "Int8CompileConfig")

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Return whether a tensor of the checkpoint belongs to an int8 module, or is a weight that becomes int8."""
        return param_name in self.arrivals or _place(model, param_name) is not None

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        """Raise an error: diffusers calls this where the shape of a tensor is not the model's.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"{param_name} has shape {list(loaded.shape)} in the checkpoint, {list(current.shape)} in the model. "
            f"{ADVICE}"
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a tensor in its int8 module, or quantize float weights once their group is complete."""
        if (place := _place(model, param_name)) is not None:
            module, name = place
            # Not `param_value`, where scales were cast to the requested dtype. A copy, because the tensor is mapped
            # from the file, and so changes with it.
            module._buffers[name] = state_dict[param_name].to(target_device, copy=True)
            return
        self._quantize(self.arrivals.add(param_name, param_value.to(target_device)))

    def _quantize(self, read: Sequence[tuple[Target, Tensor]]) -> None:
        """Put int8 modules in the place of targets, with the weights that were read for them."""
        assert self.converter is not None
        for target, made in quantized(read, self.quantization_config.rotate_group):
            self.converter.put(target, *made)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for read in self.arrivals.rest():
            self._quantize(read)
        missing = [name for name, module, tensor in int8_tensors(model) if tensor.is_meta and not is_offloaded(module)]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
        share_rotations(model)
        check_loaded(model, self.quantization_config.checksums, self.files)
        self.quantization_config.checksums = {}
        self.arrivals, self.loaded_keys, self.converter, self.files = Arrivals(()), [], None, {}
        model.hf_quantizer = self
        attach_all(model, self.quantization_config.config())

    def dequantize(self, model: Any) -> Any:
        """Make the int8 modules of a model ordinary ones again, see `int8compile.dequantize_`."""
        dequantize_(model)
        return model


def _place(model: nn.Module, name: str) -> tuple[Int8Module, str] | None:
    """Return the int8 module and the buffer that a tensor of a checkpoint is for; None for other tensors."""
    path, _, last = name.rpartition(".")
    if last not in BUFFERS:
        return None
    module = model.get_submodule(path)
    return (module, last) if isinstance(module, Int8Module) else None


def _check_checkpoint(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """Check that the int8 layers of a checkpoint are those of a model, and return the file of each tensor.

    Raises:
        CheckpointError: A layer is int8 on one side only, its tensors have a wrong dtype, or a file cannot be read.
    """
    found = check_files(model, files)
    if found and (missing := [name for name, _, _ in int8_tensors(model) if name not in found]):
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
    return found


def attach(model: Any, config: Int8Config, *, nested: bool = False) -> None:
    """Have a model that was quantized without diffusers save and load like one that diffusers quantized.

    Args:
        model: The model.
        config: The options it was quantized with.
        nested: Whether it is inside a model that saves itself too; no effect, because configs are separate.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if is_others(quantizer, Int8CompileDiffusersQuantizer):
        return  # Its description stays; saving it raises an error.
    if quantizer is None:
        quantizer = Int8CompileDiffusersQuantizer(Int8CompileConfig.of(config), pre_quantized=True)
    quantizer.quantization_config.describe(model)
    model.hf_quantizer = quantizer
    model.quantization_method = METHOD
    _set_config(model, quantizer.quantization_config)


def detach(model: Any) -> None:
    """Undo `attach` or loading in int8: the model saves and loads as a float one."""
    if isinstance(getattr(model, "hf_quantizer", None), Int8CompileDiffusersQuantizer):
        del model.hf_quantizer
        del model.quantization_method
    if isinstance(model.config.get("quantization_config"), Int8CompileConfig):
        _set_config(model, None)


def _set_config(model: Any, config: Int8CompileConfig | None) -> None:
    """Set or remove the quantization_config of a model's config, which is frozen."""
    rest = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = type(model.config)(rest if config is None else {**rest, "quantization_config": config})


@contextlib.contextmanager
def _described(model: Any) -> Iterator[None]:
    """Have a model's config describe its int8 modules, with their checksums, while the model is saved.

    Modules and values may have changed since the model was quantized or loaded.
    """
    if not has_int8(model):
        detach(model)  # Its parts may have been dequantized, or it was made from the config of an int8 model.
        yield
        return
    check_quantizer(model, Int8CompileDiffusersQuantizer)
    attach(model, Int8Config())
    config = model.hf_quantizer.quantization_config
    config.checksums = checksums(model)
    try:
        yield
    finally:
        config.checksums = {}
        _set_config(model, config)  # Saving has turned it into a dictionary.


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8CompileConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8CompileDiffusersQuantizer
describe_when_saved(ModelMixin, _described)
