"""int8 models in diffusers: import this module, then load what `save_pretrained` wrote, or pass an `Int8CompileConfig`.

`quantize_` of a model of diffusers, or of a part of a pipeline, imports it by itself. Another process that loads the
folder must import it before `from_pretrained`; without it diffusers raises an error about an unknown quantization type.
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
        # Weights that become int8, and what the checkpoint has.
        self.arrivals = Arrivals(())
        self.loaded_keys: list[str] = []
        self.converter: Converter | None = None
        # Where each tensor of a checkpoint that is int8 already is.
        self.files: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what int8 modules cannot do.

        Raises:
            ModelError: A part is for the disk: diffusers offloads parameters only, and int8 weights are buffers.
            ConfigError: The checkpoint is one of bitsandbytes.
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
        """Take down what the checkpoint has, as diffusers calls this first."""
        self.files = dict.fromkeys(map(str, checkpoint_files), "")
        self.loaded_keys = list(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, keep_in_fp32_modules: Any = (), **kwargs: Any) -> None:
        model.is_quantized = False
        config = self.quantization_config
        if self.pre_quantized:
            dtype = str(model.dtype).removeprefix("torch.")
            modules = {path: {"dtype": dtype, **options} for path, options in config.modules.items()}
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
        """Return whether a tensor of the checkpoint is for an int8 module, or a float weight that becomes int8."""
        return param_name in self.arrivals or _place(model, param_name) is not None

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        """Check the shape of a tensor, which diffusers asks for where it is not the model's.

        Raises:
            CheckpointError: It is never right then.
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
        """Put a tensor in its int8 module, or quantize float weights once those of a group are there."""
        if (place := _place(model, param_name)) is not None:
            module, name = place
            # Not `param_value`, of which scales were cast to the dtype that was asked for.
            # A copy, because what is read from a file is mapped, and so changes with the file.
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
        missing = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, Int8Module) and not is_offloaded(module)
            for name in tensors_of(module)
            if getattr(module, name).is_meta
        ]
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
    """The int8 module that a tensor of a checkpoint is for, and the buffer."""
    path, _, last = name.rpartition(".")
    if last not in BUFFERS:
        return None
    module = model.get_submodule(path)
    return (module, last) if isinstance(module, Int8Module) else None


def _check_checkpoint(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """Compare what is int8 in a checkpoint with what is in the model, and return the file of each tensor.

    Raises:
        CheckpointError: A layer is int8 in the one and float in the other, its tensors have other dtypes, or a file
            cannot be read.
    """
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    files = [file for file in files if file.endswith(".safetensors")]
    for file in files:
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dictionary
                path, _, name = key.rpartition(".")
                found[key] = file
                if isinstance(module := modules.get(path), Int8Module):
                    check_tensor(key, name, module, tensors)
                elif name == "qweight":
                    raise CheckpointError(
                        f"{key} of the checkpoint is int8, but by its config.json {path} is float. {ADVICE}"
                    )
    expected = [
        f"{path}.{name}"
        for path, module in modules.items()
        if isinstance(module, Int8Module)
        for name in tensors_of(module)
    ]
    if files and (missing := [name for name in expected if name not in found]):
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
    return found


def attach(model: Any, config: Int8Config, *, nested: bool = False) -> None:
    """Have a model whose modules were made int8 without diffusers save and load as one that it quantized.

    Args:
        model: The model.
        config: What led to it.
        nested: Whether a model that holds this one saves itself, too; without effect, as its config is its own.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if is_others(quantizer, Int8CompileDiffusersQuantizer):
        return  # What it says of itself stays so; it cannot be saved.
    if quantizer is None:
        quantizer = Int8CompileDiffusersQuantizer(Int8CompileConfig.of(config), pre_quantized=True)
    quantizer.quantization_config.describe(model)
    model.hf_quantizer = quantizer
    model.quantization_method = METHOD
    _set_config(model, quantizer.quantization_config)


def detach(model: Any) -> None:
    """Undo `attach`, and what loading does: the model saves and loads as a float one."""
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
    """While a model is saved, its config describes its int8 modules and has their checksums.

    Modules and values may have changed since it was quantized or loaded.
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
        _set_config(model, config)  # Saving makes a dictionary of it.


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8CompileConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8CompileDiffusersQuantizer
describe_when_saved(ModelMixin, _described)
