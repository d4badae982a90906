"""The interface that transformers calls while it loads, saves and dequantizes a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from int8compile.errors import CheckpointError, listed
from int8compile.integrations.folders import ADVICE, Arrivals, check_loaded, is_offloaded, quantized, tensors_of
from int8compile.integrations.transformers.config import METHOD, Int8CompileConfig
from int8compile.integrations.transformers.mapped import MappedFiles
from int8compile.integrations.transformers.names import fitted, fitted_names, guard_patterns, guards, rename_ties
from int8compile.integrations.transformers.reading import (
    as_buffers,
    as_parameters,
    check_checkpoint,
    is_loaded,
    rescale,
    tie,
)
from int8compile.stored.convert import (
    Converter,
    Target,
    attach,
    dequantize_,
    plan,
    put_described,
    report,
    warn_if_all_float,
    without_data,
)
from int8compile.stored.modules import BUFFERS, Int8Module, share_rotations


@register_quantizer(METHOD)
class Int8CompileQuantizer(HfQuantizer):
    """The quantizer that transformers calls while it loads, saves and dequantizes a model."""

    quantization_config: Int8CompileConfig

    def __init__(self, quantization_config: Int8CompileConfig, **kwargs: Any) -> None:
        # A copy: entries are added to it for this model, and the user may load other models with the original.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        # The weights that become int8, and those of them that have been read.
        self.targets: list[Target] = []
        self.arrivals = Arrivals(())
        self.named = ""
        self.converter: Converter | None = None
        self.mapped = MappedFiles(())
        # The file of each tensor, for a checkpoint that is already int8.
        self.files: dict[str, str] = {}

    @property
    def quantized_element_size(self) -> float:
        """Bytes per element of an int8 weight, for device maps."""
        return 1

    @property
    def is_trainable(self) -> bool:
        """False: int8 weights get no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: the modules have no graph break."""
        return True

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` works."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        files = [str(file) for file in checkpoint_files or ()]
        self.mapped = MappedFiles(files)
        if self.pre_quantized and config.int8_modules:
            targets = put_described(model, fitted(config.int8_modules, model), ADVICE)
        else:
            targets = self._plan(model)
        if self.pre_quantized:
            self.files = check_checkpoint(model, files)
            for module in model.modules():
                if isinstance(module, Int8Module):
                    as_parameters(module)
        rename_ties(model, {target.name: target.rotation > 1 for target in targets})
        if self.pre_quantized:
            unknown = [r"\.weight_format$"] if config.checkpoint_format != METHOD else guard_patterns(model)
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unknown}

    def _plan(self, model: Any) -> list[Target]:
        """Return the weights that become int8 under the options.

        A checkpoint that is already int8 and does not list its modules is one of bitsandbytes: its int8 modules are
        put in place here.
        """
        config = self.quantization_config
        if not self.pre_quantized:
            # Modules that the model's authors keep in float32 overflow or lose accuracy in 16 bit.
            kept = list(model._keep_in_fp32_modules_strict or [])
            if model.dtype == torch.float16:
                kept += model._keep_in_fp32_modules or []
            config.skip_modules += [name for name in kept if name not in config.skip_modules]
        tie(model)  # So that the plan sees the ties.
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
        """Return whether a float weight of the checkpoint becomes int8."""
        self.named = param_name
        return param_name in self.arrivals

    def get_quantize_ops(self) -> Quantize:
        """Return the operation that quantizes a weight; transformers calls this for each before it reads any."""
        self.arrivals.expect(self.named)
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """Return how names of a checkpoint are changed: those of bitsandbytes into those of int8 modules."""
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
                missing += [f"{path}.{name}" for name in tensors_of(module) if not is_loaded(getattr(module, name))]
                as_buffers(module, plain)
        if missing:
            raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
        self._quantize_the_rest()
        share_rotations(model)
        check_loaded(model, fitted_names(self.quantization_config.checksums, model), self.files)
        self.quantization_config.checksums = {}
        self.files = {}
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            rescale(model)
            self.quantization_config.checkpoint_format = METHOD
        self.quantization_config.describe(model)
        # Tensors are saved under the names of the modules, not of the float checkpoint, which may split experts.
        model._weight_conversions = []
        self.targets, self.arrivals, self.converter = [], Arrivals(()), None
        self.mapped = MappedFiles(())
        # A model inside this one can be saved alone.
        attach(model, self.quantization_config.config())

    def _quantize_the_rest(self) -> None:
        """Quantize weights that still wait for their group, and weights that transformers has loaded in float.

        Where a checkpoint stores several weights as one tensor, transformers asks about the first only, and that may
        be one that stays in float.
        """
        loaded: dict[str, Tensor] = {}
        for target in self.targets:
            weight = target.module._parameters.get(target.name.rpartition(".")[2])
            if weight is not None and target.name in self.arrivals and is_loaded(weight):
                loaded[target.name] = weight
                self.arrivals.expect(target.name)
        groups = [self.arrivals.add(name, weight) for name, weight in loaded.items()]
        for target, made in quantized([*chain(*groups, *self.arrivals.rest())], self.quantization_config.rotate_group):
            assert self.converter is not None
            self.converter.put(target, *made)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Return the tensors to save: those of the model, and empty ones under the names of its float weights.

        A process that has not imported this package takes the model for a float one, and transformers would initialize
        missing weights at random. With the empty tensors it raises an error about their shapes instead.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        # Each has memory of its own, or transformers would take them for one shared tensor.
        empty = {name: torch.empty(1, device="cpu")[:0] for name in guards(model)}
        return {**model.state_dict(), **empty}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # dtype is a string after `save_pretrained` has made one of the config's.
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


class Quantize(ConversionOps):
    """Quantizes the weights of a group once all are loaded, and puts int8 modules in the place of their layers."""

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
        """Return the int8 tensors of a group of weights; a weight waits until its whole group has been read.

        `input_dict` holds several weights where the checkpoint stores them as one tensor. A weight that does not fit
        the model is returned unchanged, for transformers to report. See `ConversionOps.convert`.

        A weight with NaN or Inf raises `BadWeightError`, which transformers logs and turns into a RuntimeError.
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
        """Put a module without data in place, once; transformers fills it, or writes the data to a disk."""
        converter = self.quantizer.converter
        assert converter is not None
        if converter.holds(target):
            module = converter.put(target, *without_data(target))
            as_parameters(module)
            # The initialization of missing weights does not know this module.
            target.module._is_hf_initialized = module._is_hf_initialized = True  # type: ignore[assignment]
