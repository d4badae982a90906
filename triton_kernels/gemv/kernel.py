"""One row times a weight, without matrix instructions: it lives from memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import (
    SCALE,
    SPECIAL,
    UNIT,
    add_digits,
    finish,
    override_special,
    rows_of,
    sign_of,
)


@triton.jit
def gemv(
    planes_ptr,
    info_ptr,
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
    SPLIT: tl.constexpr,
    DIGITS: tl.constexpr,
    JOIN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN outputs a program.

    Args:
        planes_ptr: [1 + DIGITS, K] int8.
        info_ptr: [4] int32, the numbers of the row.
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
        SPLIT: Whether there can be outliers but NaN and Inf.
        DIGITS: Digits of an outlier.
        JOIN: Whether the sum of outliers fits int32.
        BN: Outputs a program computes.
        BK: Inputs it takes together.
    """
    q_ptr = planes_ptr
    digits_ptr = planes_ptr + K
    rows_ptr = rows_of(info_ptr)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    weight_ptr += column.to(tl.int64)[:, None] * stride_n
    sums = tl.zeros((BN, BK), tl.int32)
    joined = tl.zeros((BN, BK), tl.int32)
    low = tl.zeros((BN, BK), tl.int32)
    middle = tl.zeros((BN, BK), tl.int32)
    high = tl.zeros((BN, BK), tl.int32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        inside = at < K
        mask = (column[:, None] < N) & inside[None, :]
        # No other program reads it.
        w = tl.load(weight_ptr + at[None, :], mask=mask, other=0, eviction_policy="evict_first").to(tl.int32)
        sums += w * tl.load(q_ptr + at, mask=inside, other=0).to(tl.int32)[None, :]
        if SPLIT:
            d0 = tl.load(digits_ptr + at, mask=inside, other=0).to(tl.int32)
            d1 = tl.load(digits_ptr + K + at, mask=inside, other=0).to(tl.int32)
            if JOIN:
                joined += w * (d1 * 256 + d0)[None, :]
            else:
                low += w * d0[None, :]
                middle += w * d1[None, :]
                if DIGITS == 3:
                    d2 = tl.load(digits_ptr + 2 * K + at, mask=inside, other=0).to(tl.int32)
                    high += w * d2[None, :]
    y = tl.sum(sums, axis=1).to(tl.float32) * tl.load(rows_ptr + SCALE)
    if SPLIT:
        unit = tl.load(rows_ptr + UNIT)
        if JOIN:
            y = add_digits(y, tl.sum(joined, axis=1), unit, 0)
        else:
            if DIGITS == 3:
                y = add_digits(y, tl.sum(high, axis=1), unit, 2)
            y = add_digits(y, tl.sum(middle, axis=1), unit, 1)
            y = add_digits(y, tl.sum(low, axis=1), unit, 0)
    special = tl.load(rows_ptr + SPECIAL)
    if special != 0:
        signs = tl.zeros((BN,), tl.int32)
        for k in range(0, K, BK):
            at = k + tl.arange(0, BK)
            mask = (column[:, None] < N) & (at < K)[None, :]
            w = sign_of(tl.load(weight_ptr + at[None, :], mask=mask, other=0)).to(tl.int32)
            signs += tl.sum(w * tl.load(q_ptr + at, mask=at < K, other=0).to(tl.int32)[None, :], axis=1)
        y = override_special(y, signs, special)
    row = tl.zeros((1,), tl.int32)
    finish(y[None, :], y_ptr, scale_ptr, bias_ptr, row, column, 1, N, n0, n1, HAS_BIAS, ACTIVATION, PARTS, 1, BN)
