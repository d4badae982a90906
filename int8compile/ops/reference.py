"""Define the numerics in plain PyTorch. Kernels are compared with these functions, bit for bit.

`y = (acc * s_x[m]) * s_w[n] + bias[n]`, where `acc` is one exact int32 sum: activations are rotated, then written as
integers on one grid for each row. Almost all of them fit in 8 bits. The few others, outliers, have a second digit.

Symbols: M rows (tokens), K inputs, N outputs; `q` int8, `Q` integers of up to 16 bits; `scale` multiplies to
dequantize.
Every float step rounds to float32, half to even: no fused multiply-add, no approximate division, no flushed results.

Sources: Dettmers et al. 2022, "LLM.int8()", https://arxiv.org/abs/2208.07339 (one scale for each row, outliers kept
precise); Ashkboos et al. 2024, "QuaRot", https://arxiv.org/abs/2404.00456 (rotation by Hadamard matrices); Xiao et al.
2022, "SmoothQuant", https://arxiv.org/abs/2211.10438 (scales of inputs, moved into the weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

QMAX = 127
# The largest |Q|: two digits of 8 bits, the upper one at most 127.
Q_LARGEST = 32639
# The largest K whose int32 sum cannot overflow, see `linear`.
MAX_K = 131071
MAX_ROTATION, MIN_ROTATION = 128, 16
# A row whose largest element is smaller counts as zero.
TINY = 2.0**-100
# A row of a weight whose absmax is smaller counts as zero: 127 / absmax would overflow float32.
TINY_WEIGHT = 2.0**-120
# Bits of a row's elements in fixed point, besides the sign.
BITS = 22
# A sum of this many products of two int8 values, -128 included, is at most 2**24, so float32 holds every partial sum.
EXACT_K = 2**24 // 128**2
_NO_LIMIT = 2.0**100


class Grid(NamedTuple):
    """Activations on their grid.

    Shapes:
        Q: [M, K] int32, |Q| <= 32639; an outlier does not fit in 8 bits.
        scale: [M] float32. NaN for a row with NaN or Inf, 0 for a row that counts as zero; Q is 0 in both.
    """

    Q: Tensor
    scale: Tensor


def rotation_size(k: int) -> int:
    """Return B, the number of elements of a row that are mixed with each other; 1 if K has few factors of two."""
    b = min(MAX_ROTATION, k & -k)
    return b if b >= MIN_ROTATION else 1


def signs(k: int, device: torch.device | None = None) -> Tensor:
    """Return the signs of inputs, which depend on K alone. Without them a large mean would become one large element.

    Shapes:
        result: [K] float32, -1 where the hash is odd, else 1.
    """
    # int64 with masks, because PyTorch has little arithmetic for uint32.
    h = (torch.arange(k, dtype=torch.int64, device=device) * 0x9E3779B1 + k) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    return 1.0 - 2.0 * (h & 1).to(torch.float32)


def butterflies(x: Tensor, size: int) -> Tensor:
    """Return `x'[i*C + j] = sum_b H[i,b] * x[b*C + j]`, H Sylvester's Hadamard matrix.

    `H[i,b] = (-1)**popcount(i & b)`. The steps are additions and subtractions at distances of 1, 2, 4, ... runs of
    C = K / size elements. Float32 results depend on this order, integers do not. Applied twice, the function multiplies
    by `size`.

    Shapes:
        x: [..., K]; result: the same.
    """
    k, distance = x.shape[-1], 1
    while distance < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * distance), 2, distance * (k // size))
        u, v = pairs.unbind(-2)
        x = torch.stack([u + v, u - v], dim=-2).reshape(*x.shape[:-1], k)
        distance *= 2
    return x


def rotation(d: Tensor | None) -> int:
    """Return B of a weight: that of its K if it has a `d`, else 1."""
    return 1 if d is None else rotation_size(d.shape[-1])


def over_rows(d: Tensor) -> Tensor:
    """Return d in a shape that multiplies the rows of a matrix, or of each matrix of a batch.

    Shapes:
        d: [K], or [..., K] for matrices [..., M, K]; result: [K], or [..., 1, K].
    """
    return d if d.dim() == 1 else d.unsqueeze(-2)


def fixed_point(x: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Write rows times d as integers, `x * d = X * 2**(p - 22)`, and rotate these. Their sums do not depend on order.

    |X| <= 2**22 before the rotation and 2**29 after it, which int32 holds exactly.

    Shapes:
        x: [M, K], any float dtype; d: [K] float32; results: X [M, K] int32, `2**(p - 22)` [M] float32, and [M] bool:
            whether rows count as zero. The scale is NaN for a row with NaN or Inf, or whose product with d is not
            finite. X is 0 there and in rows that count as zero.
    """
    v = x.to(torch.float32) if d is None else x.to(torch.float32) * d
    magnitude = v.view(torch.int32) & 0x7FFFFFFF
    u = magnitude.amax(dim=-1) if v.shape[-1] else magnitude.new_zeros(v.shape[0])
    zero, special = u < _bits(TINY), u >= 0x7F800000
    p = torch.where(zero | special, 0, (u >> 23) - 126)
    up, down = _power(BITS - p), _power(p - BITS)
    integers = (v.masked_fill((zero | special)[:, None], 0) * up[:, None]).round().to(torch.int32)
    return butterflies(integers, rotation(d)), torch.where(special, math.nan, down), zero


def quantize_rows(x: Tensor, d: Tensor | None, threshold: float) -> Grid:
    """Write rows as integers on one grid each, `x' = Q * scale`.

    The step of the grid is a 127th of the largest magnitude, or of `threshold` times the mean magnitude if that is
    less. Elements beyond 127 steps, at most K / threshold in a row, have more than 8 bits. The mean is better than the
    rms, which one huge element inflates, and with it the grid of all others.

    Shapes:
        x: [M, K]; d: [K] float32, or None for a weight that is not rotated.
    """
    integers, unit, zero = fixed_point(x, d)
    k = x.shape[-1]
    size = integers.abs()
    largest = size.amax(dim=-1) if k else size.new_zeros(size.shape[0])
    total = size.sum(dim=-1, dtype=torch.int64)
    c1, c3 = _float32(1 / QMAX), _float32(1 / Q_LARGEST)
    c2 = _float32(threshold / (QMAX * max(k, 1)) if threshold else _NO_LIMIT)
    top = largest.to(torch.float32)
    step = torch.maximum(torch.minimum(top * c1, total.to(torch.float32) * c2), top * c3)
    # 1 where all elements are 0, as in rows that count as zero or hold NaN or Inf.
    inverse = torch.where(largest == 0, 1, step).reciprocal()
    Q = (integers.to(torch.float32) * inverse[:, None]).round().to(torch.int32)
    return Grid(Q, torch.where(zero, 0, step * unit))


def digits(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Split `Q = 256 * q1 + q0` into q0 and q1, both int8. Outliers have a q1 other than 0. q0 can be -128."""
    q0 = ((Q + 128) & 255) - 128
    return q0.to(torch.int8), ((Q - q0) >> 8).to(torch.int8)


def int_matmul(q: Tensor, qweight: Tensor) -> Tensor:
    """Return the exact integer product `acc[m,n] = sum_k q[m,k] * qweight[n,k]`.

    It is made of float32 matmuls over slices of K. The slices are so short that every partial sum is an integer of at
    most 2**24, and so exact in any order. That holds in TF32 and bfloat16 mode too: int8 values are exact in both, and
    the accumulator is float32. PyTorch's own int8 matmul on CPUs is slower, and was wrong on some CPUs.

    Shapes:
        q: [M, K] int8; qweight: [N, K] int8; result: [M, N] int32.
    """
    acc = torch.zeros(q.shape[0], qweight.shape[0], dtype=torch.int32, device=q.device)
    for begin in range(0, q.shape[1], EXACT_K):
        part = slice(begin, begin + EXACT_K)
        acc += (q[:, part].to(torch.float32) @ qweight[:, part].to(torch.float32).mT).to(torch.int32)
    return acc


def product(rows: Grid, qweight: Tensor) -> Tensor:
    """Return `acc[m,n] = sum_k Q[m,k] * qweight[n,k]`, int32.

    The sum cannot overflow. The step of a row's grid is at least S / (127 * K), S the sum of magnitudes. So the sum of
    |Q| is at most 127 * K, and half a unit of rounding for each element. Hence |acc| <= (127 * K + K / 2) * 128 < 2**31
    for K <= 131071, weights of -128 included. If the third term decides the step, the step is larger still. Partial
    sums may wrap around; the result is right.
    """
    q0, q1 = digits(rows.Q)
    columns = q1.any(dim=0).nonzero().squeeze(1)
    return int_matmul(q0, qweight) + 256 * int_matmul(q1[:, columns], qweight[:, columns])


def linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    """Return `y = x @ W.T + bias`, rounded once to x's dtype. No row's result depends on another row.

    Args:
        x: Activations.
        qweight: The weight, rotated and quantized by `quantize_weight`.
        scale: One float32 for each output.
        d: The d that the weight was rotated with, or None for a weight that is not rotated.
        bias: Added in float32, or None.
        threshold: Elements of more than this times the mean magnitude of their row are outliers. It is at least 1, or
            0 for no outliers.

    Shapes:
        x: [..., K], float32, float16 or bfloat16; qweight: [N, K] int8; scale: [N]; d: [K] float32; bias: [N];
        result: [..., N] in x's dtype.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    rows = quantize_rows(flat, d, threshold)
    y = _affine(product(rows, qweight).to(torch.float32) * rows.scale[:, None], scale, bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply int8 weights by activations in fixed point of 23 bits, about float32's precision of a row's largest.

    The sum of less than 2**17 products, each below 2**29 * 2**7, is exact in float64 in any order.

    Shapes:
        As in `linear`.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    integers, unit, _ = fixed_point(flat, d)
    # Adding 0 turns -0 into 0: integers have no -0.
    acc = (integers.to(torch.float64) @ qweight.to(torch.float64).mT + 0.0).to(torch.float32)
    return _affine(acc * unit[:, None], scale, bias).to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    """Return `linear` of each of B independent weights, e.g. the experts of a mixture.

    Shapes:
        x: [B, M, K]; qweight: [B, N, K] int8; scale: [B, N] float32; d: [K] or [B, K] float32; bias: [B, N];
        result: [B, M, N] in x's dtype.
    """
    return each_of(linear, x, qweight, scale, d, bias, threshold)


def each_of(
    compute: Callable[..., Tensor],
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    *policy: Any,
) -> Tensor:
    """Return `compute` of each of B weights, as in `batched_linear`."""
    count = x.shape[0]
    products = [
        compute(x[i], qweight[i], scale[i], of_each(d, i), None if bias is None else bias[i], *policy)
        for i in range(count)
    ]
    return torch.stack(products) if count else x.new_empty(0, x.shape[1], qweight.shape[1])


def of_each(d: Tensor | None, i: int) -> Tensor | None:
    """Return the d of the i-th of several weights, which may share one."""
    return d if d is None or d.dim() == 1 else d[i]


def quantize_weight(weight: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate a weight and quantize it with one scale for each output: `q = rne(W' * (127 * (1 / absmax)))`.

    `W'[n, i*C + j] = (1/B) * sum_b H[i,b] * W[n, b*C + j] / d[b*C + j]`, so that `x' @ W'.T = x @ W.T`.

    Shapes:
        weight: [..., N, K], any float dtype, computed in float32; d: [K] float32, or [..., K].

    Returns:
        `qweight` [..., N, K] int8 in [-127, 127] and `scale` [..., N] float32, `absmax / 127`. A zero row gives zeros
        and scale 0. A row with NaN or Inf gives a scale that is not finite, and any integers.
    """
    if weight.dim() < 2:
        return _quantized_rows(weight, d)
    parts = [_quantized_rows(part, d) for part in weight.split(_rows_at_once(weight), dim=-2)]
    return torch.cat([part[0] for part in parts], dim=-2), torch.cat([part[1] for part in parts], dim=-1)


def _rows_at_once(weight: Tensor) -> int:
    """Return the number of rows of a weight to work on at once: on a CPU as many as fit a core's cache in float32."""
    elements = 2**17 if weight.device.type == "cpu" else 2**26
    return max(1, elements // max(1, weight.numel() // max(1, weight.shape[-2])))


def _quantized_rows(weight: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = weight.to(torch.float32)
    if d is not None:
        rows = butterflies(rows * over_rows(d).reciprocal(), rotation(d)) * (1 / rotation(d))
    absmax = rows.abs().amax(dim=-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    absmax = absmax.masked_fill(absmax < TINY_WEIGHT, 0)
    # Rounded twice, as in bitsandbytes on CPUs (`127 / tensor` is the same in PyTorch). 127 / absmax, rounded once,
    # would decide ties differently, and ties are common among float16 and bfloat16 values.
    inverse = torch.where(absmax == 0, 0, absmax.reciprocal() * QMAX)
    # round() is round-half-to-even. absmax * inverse is at most 127 * (1 + 3 * 2**-24), which rounds to 127.
    return (rows * inverse[..., None]).round().to(torch.int8), absmax / QMAX


def dequantize_weight(qweight: Tensor, scale: Tensor, d: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the float weight of an int8 weight: `d * H(qweight * scale)`.

    Shapes:
        qweight: [..., N, K] int8; scale: [..., N] float32; d: [K] float32, or [..., K]; result: [..., N, K] in
            `dtype`.
    """
    return unrotated(qweight * scale[..., None], d).to(dtype)


def rotated(x: Tensor, d: Tensor | None) -> Tensor:
    """Return `H(x * d)` in floats, which `fixed_point` computes in integers.

    Shapes:
        x: [..., M, K] float32; d: [K], or [..., K]; result: the same as x.
    """
    return x if d is None else butterflies(x * over_rows(d), rotation(d))


def unrotated(x: Tensor, d: Tensor | None) -> Tensor:
    """Return `d * H(x)`, for a weight's rows or for `grad_y * scale @ qweight`, the gradient of rotated activations.

    Shapes:
        x: [..., M, K] float32; d: [K], or [..., K]; result: the same as x.
    """
    return x if d is None else butterflies(x, rotation(d)) * over_rows(d)


def input_scales(weights: Sequence[Tensor], activations: Tensor | None = None) -> Tensor:
    """Return the c of linears that read the same x: inputs are divided by c, and their weights multiplied by it.

    From the weights alone, c is `clamp(sqrt(mean(w) / w), 1, 32)`, w the rms of each column: small weights that
    suppress a massive activation keep their precision. With statistics of activations, c is `sqrt(a / w)` over its
    geometric mean, clamped to [1/32, 32]. Under a full rotation both errors scale with
    sum(a**2 / c**2) * sum(w**2 * c**2), and this c minimizes it (Cauchy-Schwarz).

    Args:
        weights: [N, K] each, any float dtype.
        activations: a [K]: the root of the mean, over rows, of the squares of x, with each row divided by its rms.

    Shapes:
        result: [K] float32.
    """
    # In parts, because a float64 copy of a whole weight may not fit into memory.
    parts = (part for weight in weights for part in weight.split(_rows_at_once(weight)))
    squares = sum(part.to(torch.float64).square().sum(dim=0) for part in parts)
    w = _floored((squares / max(1, sum(weight.shape[0] for weight in weights))).sqrt())
    if activations is None:
        return (w.mean() / w).sqrt().clamp(1, 32).to(torch.float32)
    c = (_floored(activations.to(torch.float64)) / w).sqrt()
    return (c / c.log().mean().exp()).clamp(1 / 32, 32).to(torch.float32)


def rotation_of(c: Tensor) -> Tensor:
    """Return the d of inputs: their signs divided by c.

    Shapes:
        c: [K] float32; result: the same.
    """
    return signs(c.shape[0], c.device) / c


def _floored(x: Tensor) -> Tensor:
    return x.clamp_min(1e-3 * float(x.mean())).clamp_min(torch.finfo(torch.float32).tiny)


def _affine(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = y * scale
    return y if bias is None else y + bias.to(torch.float32)


def _power(exponent: Tensor) -> Tensor:
    """Return 2.0**exponent in float32, made of its bits, because exp2 and ldexp need not be exact."""
    return ((exponent + 127) << 23).view(torch.float32)


def _bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32))


def _float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))
