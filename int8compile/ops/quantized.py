"""Registers `quantize_rows` and `quantized_linear`: `linear` in two steps, for graphs on GPUs.

All linears that read an activation share its quantization, and up to three of them (q, k and v) can be one product: of
`n0`, `n1` and the remaining outputs each, whose results [M, n0], [M, n1], ... lie one behind the other.

The Triton kernels (`int8compile.triton_kernels`) implement both for the dispatch key CUDA; the implementation here, in
PyTorch, is their definition. Quantized activations are two tensors:

    q: [2, M, K] int8, the digits of Q = 256 * q[1] + q[0]; [1, M, K] where the threshold is 0, which has no outliers.
    rows: [2, M] float32, the scale of each row, and 1 where some |Q| is above 127. Elsewhere q[1] counts as zeros,
        whatever it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from int8compile.errors import InputError
from int8compile.ops import reference
from int8compile.ops.declaration import SUPPORTED_DTYPES, check_d, check_threshold
from int8compile.ops.linear import register_no_grad
from int8compile.ops.reference import MAX_K, QMAX


def _silu_mul(y: Tensor) -> Tensor:
    return torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]


# What can be done to the float32 result before it is rounded, by number: C++ can call schemas without strings.
# silu_mul takes gate and up from even and odd outputs.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y,
    torch.relu,
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    _silu_mul,
)
NONE, RELU, SILU, GELU, GELU_TANH, SILU_MUL = range(6)


def check_quantize_rows(x: Tensor, d: Tensor | None, threshold: float) -> None:
    """Check a call.

    Raises:
        InputError: x cannot be quantized.
    """
    name = "int8compile::quantize_rows"
    if x.dtype not in SUPPORTED_DTYPES or x.dim() < 1:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise InputError(f"{name}: x is {x.dtype} {list(x.shape)}; give [..., K] of one of {allowed}")
    if x.shape[-1] > MAX_K:
        raise InputError(f"{name}: K is {x.shape[-1]}; at most {MAX_K} is exact in int32. Split the layer or skip it")
    check_d(name, d, x.shape[-1], ())
    check_threshold(name, threshold)


def check_quantized_linear(
    q: Tensor,
    rows: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> None:
    """Check a call.

    Raises:
        InputError: The parts do not fit each other.
    """
    name = "int8compile::quantized_linear"
    for given in (rows, qweight, scale, bias):
        if given is not None and given.device != q.device:
            raise InputError(f"{name}: tensors are on {q.device} and {given.device}; give all on one device")
    n, k = qweight.shape if qweight.dim() == 2 else (-1, -1)
    if qweight.dtype != torch.int8 or q.dim() != 3 or k != q.shape[2]:
        raise InputError(
            f"{name}: qweight is {qweight.dtype} {list(qweight.shape)} and q {list(q.shape)}; give int8 [N, K] for "
            "[2, M, K], as quantize_rows makes it"
        )
    # Kernels read as far as that.
    fits = q.dtype == torch.int8 and q.shape[0] in (1, 2)
    if not (fits and rows.dtype == torch.float32 and list(rows.shape) == [2, q.shape[1]]):
        raise InputError(
            f"{name}: q is {q.dtype} {list(q.shape)} and rows are {rows.dtype} {list(rows.shape)}; give what "
            "quantize_rows made"
        )
    if scale.dtype != torch.float32 or list(scale.shape) != [n]:
        raise InputError(f"{name}: scale is {scale.dtype} {list(scale.shape)}; give float32 [{n}]")
    if bias is not None and (list(bias.shape) != [n] or not bias.is_floating_point()):
        raise InputError(f"{name}: bias is {bias.dtype} {list(bias.shape)}; give [{n}] of a float dtype, or None")
    if not 0 <= activation < len(ACTIVATIONS) or (activation == SILU_MUL and n % 2):
        raise InputError(
            f"{name}: activation is {activation} for {n} outputs; give one of int8compile.ops.quantized, and an even "
            "number of outputs to SILU_MUL"
        )
    if not (min(n0, n1) >= 0 and n0 + n1 <= n) or (n1 and not n0) or (n0 and activation == SILU_MUL):
        raise InputError(f"{name}: parts of {n0} and {n1} outputs of {n}; give sizes that leave some to the last part")
    if dtype not in SUPPORTED_DTYPES:
        raise InputError(f"{name}: dtype is {dtype}; allowed are {', '.join(str(each) for each in SUPPORTED_DTYPES)}")


def flattened(x: Tensor) -> Tensor:
    """Return x as [M, K], also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def empty_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Allocate what `quantize_rows` returns for x [M, K]."""
    m, k = x.shape
    planes = 2 if threshold else 1
    return x.new_empty((planes, m, k), dtype=torch.int8), x.new_empty((2, m), dtype=torch.float32)


def empty_result(q: Tensor, qweight: Tensor, activation: int, n0: int, dtype: torch.dtype) -> Tensor:
    """Allocate what `quantized_linear` returns: [M, N], or [M * N] of several parts."""
    m, n = q.shape[1], qweight.shape[0]
    if n0:
        return q.new_empty(m * n, dtype=dtype)
    return q.new_empty(m, n // 2 if activation == SILU_MUL else n, dtype=dtype)


def quantize(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Quantize activations in PyTorch: the definition, without checks.

    Shapes:
        x: [..., K]; d: [K] float32; results: q and rows, see above.
    """
    Q, scale = reference.quantize_rows(flattened(x), d, threshold)
    digits = reference.digits(Q) if threshold else (Q.to(torch.int8),)
    return torch.stack(digits), torch.stack([scale, (Q.abs() > QMAX).any(dim=-1).to(torch.float32)])


def product(
    q: Tensor,
    rows: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    int_matmul: Callable[[Tensor, Tensor], Tensor] = reference.int_matmul,
) -> Tensor:
    """Multiply quantized activations in PyTorch: the definition, up to the activation function.

    Shapes:
        q, rows: See above; qweight: [N, K] int8; scale: [N] float32; bias: [N]; result: [M, N] float32.
    """
    planes, m, k = q.shape
    if planes > 1:
        q = torch.stack([q[0], q[1].masked_fill((rows[1] == 0)[:, None], 0)])
    sums = int_matmul(q.reshape(planes * m, k), qweight).reshape(planes, m, qweight.shape[0])
    acc = sums[0] if planes == 1 else sums[0] + 256 * sums[1]
    y = acc.to(torch.float32) * rows[0, :, None] * scale
    return y if bias is None else y + bias.to(torch.float32)


def _quantize_rows(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    check_quantize_rows(x, d, threshold)
    return quantize(x, d, threshold)


def _quantize_rows_fake(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    check_quantize_rows(x, d, threshold)
    return empty_rows(flattened(x), threshold)


def by_definition(
    q: Tensor,
    rows: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `quantized_linear` in PyTorch."""
    check_quantized_linear(q, rows, qweight, scale, bias, activation, n0, n1, dtype)
    y = ACTIVATIONS[activation](product(q, rows, qweight, scale, bias)).to(dtype)
    sizes = [size for size in (n0, n1, y.shape[1] - n0 - n1) if size]
    return torch.cat([part.flatten() for part in y.split(sizes, dim=1)]) if n0 else y


def _quantized_linear_fake(
    q: Tensor,
    rows: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    check_quantized_linear(q, rows, qweight, scale, bias, activation, n0, n1, dtype)
    return empty_result(q, qweight, activation, n0, dtype)


quantize_rows = register_no_grad(
    "quantize_rows",
    "(Tensor x, Tensor? d, float threshold) -> (Tensor q, Tensor rows)",
    _quantize_rows,
    _quantize_rows_fake,
)
quantized_linear = register_no_grad(
    "quantized_linear",
    "(Tensor q, Tensor rows, Tensor qweight, Tensor scale, Tensor? bias, int activation, int n0, int n1, "
    "ScalarType dtype) -> Tensor",
    by_definition,
    _quantized_linear_fake,
)
