"""Activations in fixed point times an int8 weight: for outputs whose activations are to keep about float32's precision.

Sums of 64 bits, so exact. There are no matrix instructions for these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import NONE, WHOLE, finish


@triton.jit(do_not_specialize=["M"])
def weight_only(
    X_ptr,
    unit_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One row and BN outputs a program; those with the same outputs run together, and share the weight in the cache.

    Args:
        X_ptr: [M, K] int32.
        unit_ptr: [M] float32.
        weight_ptr: [N, K] int8, contiguous.
        scale_ptr: [N] float32.
        bias_ptr: [N], any float dtype.
        y_ptr: [M, N].
        M: Rows.
        N: Outputs.
        K: Inputs.
        HAS_BIAS: Whether there is a bias.
        BN: Outputs a program computes.
        BK: Inputs it takes together.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    weight_ptr += column.to(tl.int64)[:, None] * K
    X_ptr += row.to(tl.int64) * K
    sums = tl.zeros((BN, BK), tl.int64)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        w = tl.load(weight_ptr + at[None, :], mask=(column[:, None] < N) & (at[None, :] < K), other=0)
        X = tl.load(X_ptr + at, mask=at < K, other=0)
        sums += w.to(tl.int64) * X.to(tl.int64)[None, :]
    y = tl.sum(sums, axis=1).to(tl.float32) * tl.load(unit_ptr + row)
    row += tl.zeros((1,), tl.int32)
    finish(y[None, :], y_ptr, scale_ptr, bias_ptr, row, column, M, N, 0, 0, HAS_BIAS, NONE, WHOLE, 1, BN)
