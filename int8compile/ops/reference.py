"""The definition of the numerics, in plain PyTorch. Kernels are compared with these functions.

Symbols: M rows (tokens), K inputs, N outputs; `q` int8; `scale` multiplies to dequantize; `acc` int32.
Source: Dettmers et al. 2022, "LLM.int8()", https://arxiv.org/abs/2208.07339, with the outlier policies of
`int8compile.Int8Config.outliers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

QMAX = 127
# Below this absmax a row counts as zero: 127 / absmax would overflow float32. It is where subnormals begin.
TINY = 2.0**-120
# A sum of this many products of two int8 values, -128 included, is at most 2**24, so float32 holds every partial sum.
EXACT_K = 2**24 // 128**2
# The largest K whose int32 sum cannot overflow: 2**31 / 127**2, less what saturating int8 instructions need.
MAX_K = 131071


class QuantizedRows(NamedTuple):
    """Activations after quantization.

    Shapes:
        q: [M, K] int8, 0 at outlier elements.
        scale: [M] float32, `absmax / 127`.
        outlier: [M, K] bool, the elements that are left out of `q`.
    """

    q: Tensor
    scale: Tensor
    outlier: Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight with one scale per output row: `q = rne(W * (127 * (1 / absmax)))`, `scale = absmax / 127`.

    Shapes:
        weight: [..., N, K], any float dtype; computed in float32.

    Returns:
        `qweight` [..., N, K] int8 in [-127, 127] and `scale` [..., N] float32. A zero row gives zeros and scale 0; one
        with NaN or Inf a scale that is not finite, and any values.
    """
    weight = weight.to(torch.float32)
    return _quantize(weight)


def outlier_mask(x: Tensor, threshold: float, outliers: str) -> Tensor:
    """Decides which elements of x are outliers.

    `row`: `x[m,k]^2 * K >= threshold^2 * sum(x[m,:]^2)`, that is `|x[m,k]| >= threshold * rms(x[m,:])`, with the
    squares of `fixed_point_squares`: their sum is exact, so every kernel that follows them comes to the same decision,
    however it splits the sum.
    `column`: `|x[m,k]| >= threshold`.
    NaN and Inf always are outliers (they cannot be quantized), zeros never, and `threshold` 0 turns the rest off.

    Shapes:
        x: [M, K] float32; result: [M, K] bool.
    """
    mask = ~x.isfinite()
    if threshold == 0:
        return mask
    if outliers == "column":
        return mask | ((x.abs() >= threshold) & (x != 0))
    square = fixed_point_squares(x.masked_fill(mask, 0))
    # Not threshold**2, which raises where the square is not finite.
    limit = square.sum(dim=-1, keepdim=True) * (threshold * threshold)
    return mask | ((square * x.shape[-1] >= limit) & (x != 0))


def fixed_point_squares(x: Tensor) -> Tensor:
    """The squares of a row, over that of the power of two above its largest element, rounded to multiples of 2**-35.

    They are below 1, so up to 2**17 of them (more than `MAX_K`) have a sum that float64 holds exactly, whatever the
    order of the additions; and squares of float32 values neither overflow nor vanish. The rounding shifts the rms by
    less than 2**-18 of it.

    Shapes:
        x: [M, K] float32, finite; result: [M, K] float64.
    """
    if x.shape[-1] == 0:
        return x.to(torch.float64)
    exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True)).exponent.to(torch.int64)
    # 2.0**-exponent by its bits: exp2 and ldexp need not be exact.
    scale = ((1023 - exponent) << 52).view(torch.float64)
    square = (x.to(torch.float64) * scale).square()
    # In [2**17, 2**18) the unit in the last place is 2**-35.
    return (square + 1.5 * 2**17) - 1.5 * 2**17


def quantize_rows(x: Tensor, threshold: float, outliers: str) -> QuantizedRows:
    """Quantizes activations with one scale per row, over the elements that are not outliers.

    Shapes:
        x: [M, K] float32.
    """
    outlier = outlier_mask(x, threshold, outliers)
    return QuantizedRows(*_quantize(x.masked_fill(outlier, 0)), outlier)


def int_matmul(q_x: Tensor, qweight: Tensor) -> Tensor:
    """The exact integer product `acc[m,n] = sum_k q_x[m,k] * qweight[n,k]`.

    It runs as float32 matmuls over slices of K short enough that every partial sum is an integer below 2**24, hence
    exact in any order of summation (in TF32 and bfloat16 mode too: int8 values are exact in both and the
    accumulator is float32). PyTorch's own int8 matmul on CPUs is slower and was wrong on some.

    Shapes:
        q_x: [M, K] int8; qweight: [N, K] int8; result: [M, N] int32. K is at most 131071, where int32 could overflow.
    """
    acc = torch.zeros(q_x.shape[0], qweight.shape[0], dtype=torch.int32, device=q_x.device)
    for begin in range(0, q_x.shape[1], EXACT_K):
        part = slice(begin, begin + EXACT_K)
        acc += (q_x[:, part].to(torch.float32) @ qweight[:, part].to(torch.float32).mT).to(torch.int32)
    return acc


def outlier_product(x: Tensor, rows: QuantizedRows, qweight: Tensor, outliers: str) -> Tensor:
    """What the outliers add, in units of the weight's scale: `out[m,n] = sum_{k in O} r[m,k] * qweight[n,k]`.

    `row`: r is x at the outlier elements, else 0. `column`: r is `x - scale * q` in every column that holds an
    outlier, which equals "zero the column and multiply it in float" and needs no second pass over x.

    The sum runs in float64 and is rounded once. For the row policy it is exact whatever the order of summation, which
    makes a row's result independent of the batch: with t the threshold, outliers are at least t * rms, so all products
    are multiples of t * rms * 2**-24; there are at most K / t**2 of them, and their absolute sum is at most
    127 * K / t * rms, which is below 2**53 units while K / t**2 < 2**22 (for any K allowed, if t >= 0.18).

    Shapes:
        x: [M, K] float32; qweight: [N, K] int8; result: [M, N] float32.
    """
    columns = rows.outlier.any(dim=0).nonzero().squeeze(1)
    x, q, outlier = x[:, columns], rows.q[:, columns], rows.outlier[:, columns]
    residual = x - rows.scale[:, None] * q if outliers == "column" else x.masked_fill(~outlier, 0)
    return (residual.to(torch.float64) @ qweight[:, columns].to(torch.float64).mT).to(torch.float32)


def linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str) -> Tensor:
    """The whole operator: `y = (acc * s_x[m] + out) * scale[n] + bias[n]`, rounded once to x's dtype.

    Args:
        x: Activations.
        qweight: Weight, already quantized.
        scale: One float32 scale per output.
        bias: Added in float32, or none.
        threshold: See `outlier_mask`.
        outliers: "row" or "column"; a column's outliers are looked for over all rows of x.

    Shapes:
        x: [..., K], float32, float16 or bfloat16; qweight: [N, K] int8; scale: [N] float32; bias: [N];
        result: [..., N] in x's dtype.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(torch.float32)
    rows = quantize_rows(flat, threshold, outliers)
    acc = int_matmul(rows.q, qweight)
    y = (acc * rows.scale[:, None] + outlier_product(flat, rows, qweight, outliers)) * scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """int8 weights, float activations: `y = (sum_k x[m,k] * qweight[n,k]) * scale[n] + bias[n]`.

    x is taken as fixed point, integers of 23 bits in units of about absmax / 2**22 of the row: about what float32 keeps
    of the largest element, and what a float32 sum would keep of the others. It makes the sum exact whatever its order:
    results do not depend on batch, threads or instruction set. A row with NaN or Inf is NaN.

    Shapes:
        x: [..., K], float32, float16 or bfloat16; qweight: [N, K] int8; scale: [N] float32; bias: [N];
        result: [..., N] in x's dtype.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(torch.float32)
    d, unit = fixed_point_rows(flat)
    y = (d @ qweight.to(torch.float64).mT * unit[:, None]).to(torch.float32) * scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def fixed_point_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers of 23 bits: `d = rne(x / unit)`, `unit` the power of two with `absmax < 2**22 * unit`.

    Their products with int8 weights have sums below 2**22 * 2**7 * 2**17, which float64 holds exactly.

    Shapes:
        x: [M, K] float32; result: d [M, K] and unit [M], float64. unit is NaN where the row has NaN or Inf.
    """
    absmax = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    exponent = torch.frexp(absmax.masked_fill(~finite, 0)).exponent.to(torch.int64)
    # 2.0**(exponent - 22) by its bits: exp2 and ldexp need not be exact.
    unit = ((1023 + exponent - 22) << 52).view(torch.float64)
    d = (x.masked_fill(~finite[:, None], 0).to(torch.float64) / unit[:, None]).round()
    return d, unit.masked_fill(~finite, math.nan)


def batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
) -> Tensor:
    """`linear` for each of B independent weights, e.g. the experts of a mixture.

    Shapes:
        x: [B, M, K]; qweight: [B, N, K] int8; scale: [B, N] float32; bias: [B, N]; result: [B, M, N] in x's dtype.
    """
    return each_of(linear, x, qweight, scale, bias, threshold, outliers)


def each_of(
    compute: Callable[..., Tensor], x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, *policy: Any
) -> Tensor:
    """A linear of each of B weights, as `batched_linear`."""
    biases = [None] * x.shape[0] if bias is None else list(bias)
    products = [compute(*each, *policy) for each in zip(x, qweight, scale, biases, strict=True)]
    return torch.stack(products) if products else x.new_empty(0, x.shape[1], qweight.shape[1])


def dequantize_weight(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The float weight that the int8 weight stands for: `qweight * scale`.

    Shapes:
        qweight: [..., N, K] int8; scale: [..., N] float32; result: [..., N, K] in `dtype`.
    """
    return (qweight * scale[..., None]).to(dtype)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    absmax = absmax.masked_fill(absmax < TINY, 0)
    # Rounded twice, as bitsandbytes does on CPUs (`127 / tensor` is the same in PyTorch); 127 / absmax rounded once
    # decides ties differently, and ties are common among float16 and bfloat16 values.
    inverse = torch.where(absmax == 0, 0, absmax.reciprocal() * QMAX)
    # round() is round-half-to-even. absmax * inverse is at most 127 * (1 + 3 * 2**-24), which rounds to 127.
    return (x * inverse[..., None]).round().to(torch.int8), absmax / QMAX
