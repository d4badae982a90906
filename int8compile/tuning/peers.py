"""Other libraries' int8, to compare with: bitsandbytes and torchao, on the linears that int8compile converts."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from torch import nn

from int8compile.config import Int8Config
from int8compile.stored.convert import plan, replace
from int8compile.stored.targets import Target


def installed(name: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def with_bitsandbytes(model: Any) -> Any:
    """Replace the linears that int8compile converts by LLM.int8() of bitsandbytes, in place.

    Args:
        model: A float model on the CPU.

    Returns:
        The model.
    """
    bnb = importlib.import_module("bitsandbytes")
    # Otherwise it logs at every call of every layer that inputs are cast to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    chosen = {id(target.module) for target in _linears(model)}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in chosen:
                bias = child.bias is not None
                layer = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, bias=bias, threshold=6.0, has_fp16_weights=False
                )
                layer.weight = bnb.nn.Int8Params(child.weight.detach(), requires_grad=False, has_fp16_weights=False)
                layer.bias = child.bias
                # The move to a device quantizes it.
                replace([(module, name)], layer.to("cpu").eval())
    return model


def with_torchao(model: Any, *, dynamic: bool) -> Any:
    """Quantize the linears that int8compile converts with torchao, in place.

    Args:
        model: A float model.
        dynamic: Whether activations become int8 too; otherwise only weights do.

    Returns:
        The model.
    """
    quantization = importlib.import_module("torchao.quantization")
    config = quantization.Int8DynamicActivationInt8WeightConfig if dynamic else quantization.Int8WeightOnlyConfig
    chosen = {id(target.module) for target in _linears(model)}
    # torchao's settings of Inductor are global and would affect other models.
    quantization.quantize_(
        model, config(set_inductor_config=False), filter_fn=lambda module, path: id(module) in chosen
    )
    return model


def _linears(model: nn.Module) -> list[Target]:
    """Return the nn.Linear modules that int8compile converts by default."""
    return [target for target in plan(model, Int8Config()) if target.reason is None and target.source == "linear"]
