"""Save int8 models with `save_pretrained`, also those that transformers did not quantize itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from int8compile.config import Int8Config
from int8compile.integrations.folders import check_quantizer, checksums, describe_when_saved, has_int8, is_others
from int8compile.integrations.transformers.config import METHOD, Int8CompileConfig
from int8compile.integrations.transformers.names import rename_ties, rotated_weights
from int8compile.integrations.transformers.quantizer import Int8CompileQuantizer


def attach(model: Any, config: Int8Config, *, nested: bool = False) -> None:
    """Have a model that was quantized without transformers save and load like one that transformers quantized.

    Args:
        model: The model.
        config: The options it was quantized with.
        nested: Whether it is inside a model that saves itself too. The two configs are then often one object or parts
            of one, so only the outer model's config says that the model is int8.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if is_others(quantizer, Int8CompileQuantizer):
        return  # Its description stays; saving it raises an error.
    rename_ties(model, rotated_weights(model))
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
    """Undo `attach` or loading in int8: the model saves and loads as a float one."""
    for name in ("_tied_weights_keys", "_weight_conversions"):
        vars(model).pop(name, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, Int8CompileQuantizer):
        quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _described(model: Any) -> Iterator[None]:
    """Have a model's config describe its int8 modules, with their checksums, while the model is saved.

    Modules and values may have changed since the model was quantized or loaded.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        yield  # Only the adapter is saved.
        return
    int8 = has_int8(model)
    if int8:
        check_quantizer(model, Int8CompileQuantizer)
        attach(model, Int8Config(), nested=True)
    elif isinstance(getattr(model, "hf_quantizer", None), Int8CompileQuantizer):
        detach(model)  # Its parts were dequantized one by one.
    # Configs of inner models are parts of this config and would be saved with it. A float model may have been made from
    # the config of an int8 one.
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
