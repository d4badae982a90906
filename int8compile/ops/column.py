"""Compute the column policy: LLM.int8() as published and as bitsandbytes computes it, for comparison.

Columns of x with any |x| >= threshold are multiplied in float, by the dequantized weight. The others are multiplied in
int8, on a grid of one step for each row. Weights are not rotated. Shapes of intermediate tensors do not depend on
values, so there is no graph break and no waiting for a GPU. Speed is not a goal.

Source: Dettmers et al. 2022, "LLM.int8()", https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.ops.reference import QMAX, TINY_WEIGHT, int_matmul


def column_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return `y = (acc * s_x[m] + out) * scale[n] + bias[n]`, rounded once to x's dtype.

    `acc` is the exact int32 sum over the columns without an outlier. `out` is the float32 sum over the other columns;
    its last bits depend on the order of additions. s_x is a 127th of the row's largest element below the threshold, in
    any column. One row's outliers change which columns of the other rows are multiplied in float.

    Args:
        x: Activations.
        qweight: The weight, quantized without rotation.
        scale: One float32 for each output.
        bias: Added in float32, or None.
        threshold: Elements at least this large are outliers, and so are NaN and Inf; 0 for NaN and Inf alone.

    Shapes:
        x: [..., K], float32, float16 or bfloat16; qweight: [N, K] int8; scale: [N]; bias: [N]; result: [..., N] in x's
        dtype.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(torch.float32)
    outlier = outliers(flat, threshold)
    columns = outlier.any(dim=0)
    kept = flat.masked_fill(outlier, 0)
    absmax = kept.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else kept.new_zeros(kept.shape[0], 1)
    # Below TINY_WEIGHT 127 / absmax would overflow.
    absmax = absmax.masked_fill(absmax < TINY_WEIGHT, 0)
    inverse = torch.where(absmax == 0, 0, absmax.reciprocal() * QMAX)
    q = (kept * inverse).round().masked_fill(columns, 0).to(torch.int8)
    out = flat.masked_fill(~columns, 0) @ qweight.to(torch.float32).mT
    y = (int_matmul(q, qweight) * (absmax / QMAX) + out) * scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def outliers(x: Tensor, threshold: float) -> Tensor:
    """Return which elements are outliers: NaN, Inf, and elements of at least the threshold, unless that is 0.

    Shapes:
        x: [..., K]; result: the same, bool.
    """
    special = ~x.isfinite()
    return special | ((x.abs() >= threshold) & (x != 0)) if threshold else special
