"""Variants that `bench_models` compares: ways to run a decoder model, where possible as one compiled graph."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from int8compile.app.decoding import layer_caches, run_layers

CPP = {"cpp_wrapper": True}
# torchao's documentation asks for this on CPUs; without it, weights are unpacked at every call.
FROZEN = {"freezing": True, "max_autotune": True}

# Arguments of torch.compile for each variant; None for eager mode.
COMPILERS: dict[str, dict[str, Any] | None] = {
    "float32": {},
    "bfloat16": {},
    "float32, cpp_wrapper": {"options": CPP},
    "bfloat16, cpp_wrapper": {"options": CPP},
    "int8 float32": {"backend": "int8"},
    "int8 bfloat16": {"backend": "int8"},
    "int8 float32, cpp_wrapper": {"backend": "int8", "options": {"inductor": CPP}},
    "int8 bfloat16, cpp_wrapper": {"backend": "int8", "options": {"inductor": CPP}},
    "int8 float32, lm_head, cpp_wrapper": {"backend": "int8", "options": {"lm_head": "int8_weight", "inductor": CPP}},
    "int8 bfloat16, lm_head, cpp_wrapper": {"backend": "int8", "options": {"lm_head": "int8_weight", "inductor": CPP}},
    "bitsandbytes float32": None,
    "bitsandbytes bfloat16": None,
    "bitsandbytes bfloat16, compiled": {},
    "torchao weight-only bfloat16": {},
    "torchao dynamic bfloat16": {},
    "torchao weight-only bfloat16, frozen": {"options": FROZEN},
    "torchao dynamic bfloat16, frozen": {"options": FROZEN},
    "torchao dynamic float32, frozen": {"options": FROZEN},
}
OPTIONAL = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}


class Whole(nn.Module):
    """A Llama-like transformers model with a cache of fixed size, which one graph can hold.

    Args:
        model: A `LlamaForCausalLM`, or a model of the same structure.
        length: Number of tokens that fit into the cache.
        head: Whether to compute the last token's logits; otherwise its hidden state.
    """

    def __init__(self, model: Any, length: int, head: bool) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.caches = layer_caches(model, length)
        self.slots = torch.arange(length)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the last token's output. Shapes: ids [1, T]; positions [T]; result [1, 1, vocabulary or hidden]."""
        body = self.model.model
        hidden = run_layers(self.model, body.layers, self.caches, self.slots, ids, positions)
        result: Tensor = body.norm(hidden[:, -1:])
        return self.model.lm_head(result) if self.head else result


def missing(name: str) -> str:
    """Return why a variant cannot be made here; "" if it can."""
    package = OPTIONAL.get(name.split()[0])
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else ""


def packages() -> dict[str, str]:
    """Return the versions of the installed packages among those that are compared with or that define the models."""
    names = (*OPTIONAL.values(), "transformers", "llama_cpp_python")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def make(name: str, models: Mapping[str, Any], length: int, head: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a variant as a function of ids and positions.

    Args:
        name: A key of `COMPILERS`.
        models: The model, by the dtype of its weights.
        length: See `Whole`.
        head: See `Whole`.
    """
    model = models["bfloat16" if "bfloat16" in name else "float32"]
    with warnings.catch_warnings():
        # Other packages emit warnings, and pytest turns warnings into errors.
        warnings.simplefilter("ignore")
        if name.startswith("bitsandbytes"):
            model = _with_bitsandbytes(copy.deepcopy(model))
        elif name.startswith("torchao"):
            model = _with_torchao(copy.deepcopy(model), dynamic="dynamic" in name)
    # All variants share the code of one `forward`, and each has a graph for the prompt and one for a token.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(COMPILERS))
    whole: Any = Whole(model, length, head).eval().requires_grad_(False)
    compiler = COMPILERS[name]
    if compiler is None:
        return whole  # type: ignore[no-any-return]
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(whole, fullgraph=True, dynamic=False, **compiler)
    return compiled


def _with_bitsandbytes(model: Any) -> Any:
    """Replace the linears that int8compile rewrites, those of the layers, by LLM.int8()."""
    bnb = importlib.import_module("bitsandbytes")
    # Otherwise it logs at every call of every layer that inputs are cast to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                bias = child.bias is not None
                layer = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, bias=bias, threshold=6.0, has_fp16_weights=False
                )
                layer.weight = bnb.nn.Int8Params(child.weight.detach(), requires_grad=False, has_fp16_weights=False)
                layer.bias = child.bias
                # The move to a device quantizes it.
                setattr(module, name, layer.to("cpu").eval())
    return model


def _with_torchao(model: Any, dynamic: bool) -> Any:
    quantization = importlib.import_module("torchao.quantization")
    config = quantization.Int8DynamicActivationInt8WeightConfig if dynamic else quantization.Int8WeightOnlyConfig
    # torchao's settings of Inductor are global and would affect the other variants.
    quantization.quantize_(model.model.layers, config(set_inductor_config=False))
    return model
