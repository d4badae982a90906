"""One row times a weight, without matrix instructions: it lives from memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import finish


@triton.jit
def gemv(
    q_ptr,
    rows_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    stride_n,
    n0,
    n1,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN outputs a program.

    Args:
        q_ptr: [2, K] int8; [1, K] without outliers.
        rows_ptr: [2] float32.
        weight_ptr: [N, K] int8, rows `stride_n` apart.
        scale_ptr: [N] float32.
        bias_ptr: [N], any float dtype.
        y_ptr: [N], or [N / 2] for SILU_MUL.
        N: Outputs.
        K: Inputs.
        stride_n: Elements from row to row of the weight.
        n0: Outputs of the first of several parts.
        n1: Outputs of the second of three parts.
        HAS_BIAS: Whether there is a bias.
        ACTIVATION: See `numerics`.
        PARTS: See `numerics`.
        OUTLIERS: Whether there are second digits.
        BN: Outputs a program computes.
        BK: Inputs it takes together.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    weight_ptr += column.to(tl.int64)[:, None] * stride_n
    sums = tl.zeros((BN, BK), tl.int32)
    if OUTLIERS:
        # How many second digits count.
        counted = tl.where(tl.load(rows_ptr + 1) > 0, K, 0)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        inside = at < K
        mask = (column[:, None] < N) & inside[None, :]
        # No other program reads it.
        w = tl.load(weight_ptr + at[None, :], mask=mask, other=0, eviction_policy="evict_first").to(tl.int32)
        x = tl.load(q_ptr + at, mask=inside, other=0).to(tl.int32)
        if OUTLIERS:
            x += 256 * tl.load(q_ptr + K + at, mask=at < counted, other=0).to(tl.int32)
        sums += w * x[None, :]
    y = tl.sum(sums, axis=1).to(tl.float32) * tl.load(rows_ptr)
    row = tl.zeros((1,), tl.int32)
    finish(y[None, :], y_ptr, scale_ptr, bias_ptr, row, column, 1, N, n0, n1, HAS_BIAS, ACTIVATION, PARTS, 1, BN)
