"""Registers `int8compile::linear` and `int8compile::batched_linear`.

Both have one schema, one fake, one implementation (the reference, until a device has a kernel), autograd for x and
bias, and an autocast rule. `define` + `impl` rather than `torch.library.custom_op`: a call costs 6 us instead of 31.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from int8compile.errors import InputError
from int8compile.ops import reference

OUTLIER_POLICIES = ("row", "column")
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_SCHEMA = "(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, float threshold, str outliers) -> Tensor"
_LIBRARY = torch.library.Library("int8compile", "DEF")

LinearFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, str], Tensor]


def _check(
    batch_dims: int, x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
) -> None:
    """Validates a call. The fake and the implementation both run it: a check in a fake alone is not seen in eager mode.

    Raises:
        InputError: Names the argument, what it was and what is allowed.
    """
    name = "int8compile::batched_linear" if batch_dims else "int8compile::linear"
    if x.dtype not in SUPPORTED_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise InputError(f"{name}: x is {x.dtype}; allowed are {allowed}. Convert it, e.g. x.to(torch.float32)")
    if qweight.dtype != torch.int8 or qweight.dim() != 2 + batch_dims:
        raise InputError(
            f"{name}: qweight is {qweight.dtype} {list(qweight.shape)}; give int8 of {2 + batch_dims} dimensions, "
            "as int8compile.ops.quantize_weight makes"
        )
    if scale.dtype != torch.float32 or scale.shape != qweight.shape[:-1]:
        raise InputError(
            f"{name}: scale is {scale.dtype} {list(scale.shape)}; give float32 {list(qweight.shape[:-1])}, "
            "one for each output of qweight"
        )
    fits = x.dim() == 3 and x.shape[0] == qweight.shape[0] if batch_dims else x.dim() >= 1
    if not fits or x.shape[-1] != qweight.shape[-1]:
        raise InputError(
            f"{name}: x is {list(x.shape)} and qweight {list(qweight.shape)}; x must be "
            f"{'[B, M, K] for qweight [B, N, K]' if batch_dims else '[..., K] for qweight [N, K]'}"
        )
    if qweight.shape[-1] > reference.MAX_K:
        raise InputError(
            f"{name}: K is {qweight.shape[-1]}; at most {reference.MAX_K} is exact in int32. Split the layer or skip it"
        )
    if bias is not None and (bias.shape != scale.shape or not bias.is_floating_point()):
        raise InputError(
            f"{name}: bias is {bias.dtype} {list(bias.shape)}; give {list(scale.shape)} of a float dtype, or None"
        )
    if not (math.isfinite(threshold) and threshold >= 0):
        raise InputError(f"{name}: threshold is {threshold}; give a finite number >= 0 (0 turns the split off)")
    if outliers not in OUTLIER_POLICIES:
        raise InputError(f"{name}: outliers is {outliers!r}; allowed are 'row' and 'column'")


def _dequantized_grad(grad: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """`grad_x = grad_y @ dequantized W`, gradients not quantized (LLM.int8(), appendix on training)."""
    return grad @ reference.dequantize_weight(qweight, scale, grad.dtype)


def _register(name: str, batch_dims: int, compute: LinearFunction) -> LinearFunction:
    _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"int8compile::{name}"
    op = cast(LinearFunction, getattr(torch.ops.int8compile, name))

    def implementation(
        x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
    ) -> Tensor:
        _check(batch_dims, x, qweight, scale, bias, threshold, outliers)
        return compute(x, qweight, scale, bias, threshold, outliers)

    def fake(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str) -> Tensor:
        _check(batch_dims, x, qweight, scale, bias, threshold, outliers)
        return x.new_empty(*x.shape[:-1], qweight.shape[-2])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, qweight, scale, bias, _, _ = inputs
        ctx.save_for_backward(qweight, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qweight, scale = ctx.saved_tensors
        grad_x = _dequantized_grad(grad, qweight, scale) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[3]:
            rows = grad.flatten(batch_dims, -2) if grad.dim() > batch_dims + 1 else grad.unsqueeze(-2)
            grad_bias = rows.sum(dim=-2, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None

    def autocast(device: str) -> LinearFunction:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def cast_x(
            x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
        ) -> Tensor:
            # Only x: torch.library.register_autocast would also cast the scales, which stay float32. As for F.linear,
            # autocast leaves integers and float64 alone, so that _check sees them.
            if x.dtype in SUPPORTED_DTYPES:
                x = x.to(torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(x, qweight, scale, bias, threshold, outliers)

        return cast_x

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, autocast(device), f"Autocast{device.upper()}")
    return op


linear = _register("linear", 0, reference.linear)
batched_linear = _register("batched_linear", 1, reference.batched_linear)
