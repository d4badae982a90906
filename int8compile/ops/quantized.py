"""Registers `quantize_rows` and `quantized_linear`: `linear` in two steps, for graphs on GPUs.

All linears that read an activation share its quantization, and up to three of them (q, k and v) can be one product: of
`n0`, `n1` and the remaining outputs each, whose results [M, n0], [M, n1], ... lie one behind the other.

The Triton kernels (`int8compile.triton_kernels`) implement both for the dispatch key CUDA; the implementation here, in
PyTorch, is their definition. Whether outliers lie in planes or in lists is between the two steps of one implementation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.errors import InputError
from int8compile.ops import digits
from int8compile.ops.digits import ACTIVATIONS, SILU_MUL, Activations, lists_of
from int8compile.ops.linear import OUTLIER_POLICIES, SUPPORTED_DTYPES, register_no_grad
from int8compile.ops.reference import MAX_K


def check_quantize_rows(x: Tensor, threshold: float, by_column: bool) -> None:
    """Raises `InputError` where x cannot be quantized."""
    if x.dtype not in SUPPORTED_DTYPES or x.dim() < 1:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise InputError(
            f"int8compile::quantize_rows: x is {x.dtype} {list(x.shape)}; give [..., K] of one of {allowed}"
        )
    if x.shape[-1] > MAX_K:
        raise InputError(
            f"int8compile::quantize_rows: K is {x.shape[-1]}; at most {MAX_K} is exact in int32. Split the layer or "
            "skip it"
        )
    if not (math.isfinite(threshold) and threshold >= 0):
        raise InputError(
            f"int8compile::quantize_rows: threshold is {threshold}; give a finite number >= 0 (0 turns the split off)"
        )


def check_quantized_linear(
    x: Activations,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> None:
    """Raises `InputError` where the parts do not fit each other."""
    name = "int8compile::quantized_linear"
    for given in (x.info, qweight, scale, bias):
        if given is not None and given.device != x.planes.device:
            raise InputError(f"{name}: tensors are on {x.planes.device} and {given.device}; give all on one device")
    n, k = qweight.shape if qweight.dim() == 2 else (-1, -1)
    if qweight.dtype != torch.int8 or x.planes.dim() != 3 or k != x.planes.shape[2]:
        raise InputError(
            f"{name}: qweight is {qweight.dtype} {list(qweight.shape)} and planes {list(x.planes.shape)}; give int8 "
            "[N, K] for [1 + digits, M, K], as quantize_rows makes them"
        )
    # Kernels read as far as that.
    planes, m, _ = x.planes.shape
    size = 4 * m + (lists_of(m) * (1 + k) if threshold > 0 else 0)
    fits = planes in (3, 4) if threshold > 0 else planes >= 1
    dtypes = (x.planes.dtype, x.info.dtype) == (torch.int8, torch.int32)
    if not (fits and dtypes and x.info.dim() == 1 and x.info.shape[0] >= size):
        raise InputError(
            f"{name}: planes are {x.planes.dtype} {list(x.planes.shape)} and info is {x.info.dtype} "
            f"{list(x.info.shape)}; give what quantize_rows made with the threshold {threshold}"
        )
    if scale.dtype != torch.float32 or list(scale.shape) != [n]:
        raise InputError(f"{name}: scale is {scale.dtype} {list(scale.shape)}; give float32 [{n}]")
    if bias is not None and (list(bias.shape) != [n] or not bias.is_floating_point()):
        raise InputError(f"{name}: bias is {bias.dtype} {list(bias.shape)}; give [{n}] of a float dtype, or None")
    if not 0 <= activation < len(ACTIVATIONS) or (activation == SILU_MUL and n % 2):
        raise InputError(
            f"{name}: activation is {activation} for {n} outputs; give one of int8compile.ops.digits, and an even "
            "number of outputs to SILU_MUL"
        )
    if not (min(n0, n1) >= 0 and n0 + n1 <= n) or (n1 and not n0) or (n0 and activation == SILU_MUL):
        raise InputError(f"{name}: parts of {n0} and {n1} outputs of {n}; give sizes that leave some to the last part")
    if dtype not in SUPPORTED_DTYPES:
        raise InputError(f"{name}: dtype is {dtype}; allowed are {', '.join(str(each) for each in SUPPORTED_DTYPES)}")


def parts(n0: int, n1: int, n: int) -> list[int]:
    """The outputs of each part, of one, two or three."""
    return [size for size in (n0, n1, n - n0 - n1) if size]


def empty_result(planes: Tensor, qweight: Tensor, activation: int, n0: int, dtype: torch.dtype) -> Tensor:
    """Allocates what `quantized_linear` returns: [M, N], or [M * N] of several parts."""
    m, n = planes.shape[1], qweight.shape[0]
    if n0:
        return planes.new_empty(m * n, dtype=dtype)
    return planes.new_empty(m, n // 2 if activation == SILU_MUL else n, dtype=dtype)


def flattened(x: Tensor) -> Tensor:
    """X as [M, K], also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _quantize_rows(x: Tensor, threshold: float, by_column: bool) -> tuple[Tensor, ...]:
    check_quantize_rows(x, threshold, by_column)
    return tuple(digits.quantize_rows(flattened(x), threshold, OUTLIER_POLICIES[by_column]))


def _quantize_rows_fake(x: Tensor, threshold: float, by_column: bool) -> tuple[Tensor, ...]:
    check_quantize_rows(x, threshold, by_column)
    return tuple(Activations.empty(flattened(x), threshold, by_column))


def by_definition(
    planes: Tensor,
    info: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    by_column: bool,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    """`quantized_linear` in PyTorch."""
    x = Activations(planes, info)
    check_quantized_linear(x, qweight, scale, bias, threshold, activation, n0, n1, dtype)
    y = digits.linear(x, qweight, scale, bias, activation).to(dtype)
    return torch.cat([part.flatten() for part in y.split(parts(n0, n1, y.shape[1]), dim=1)]) if n0 else y


def _quantized_linear_fake(
    planes: Tensor,
    info: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    by_column: bool,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    x = Activations(planes, info)
    check_quantized_linear(x, qweight, scale, bias, threshold, activation, n0, n1, dtype)
    return empty_result(planes, qweight, activation, n0, dtype)


quantize_rows = register_no_grad(
    "quantize_rows",
    "(Tensor x, float threshold, bool by_column) -> (Tensor planes, Tensor info)",
    _quantize_rows,
    _quantize_rows_fake,
)
quantized_linear = register_no_grad(
    "quantized_linear",
    "(Tensor planes, Tensor info, Tensor qweight, Tensor scale, Tensor? bias, float threshold, bool by_column, "
    "int activation, int n0, int n1, ScalarType dtype) -> Tensor",
    by_definition,
    _quantized_linear_fake,
)
