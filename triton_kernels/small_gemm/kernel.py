"""A few rows times a weight: all rows in one tile, so that the weight is read once, and outliers as planes of digits.

The matrix unit has time to spare here: a second and a third product with the weight's tile, which is there already,
costs less than lists of outliers would.
"""

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


@triton.jit(do_not_specialize=["M"])
def small_gemm(
    planes_ptr,
    info_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of BM rows and BN outputs a program.

    Args:
        planes_ptr: [1 + DIGITS, M, K] int8.
        info_ptr: int32, the numbers of rows.
        weight_ptr: [N, K] int8, rows `stride_n` apart.
        scale_ptr: [N] float32.
        bias_ptr: [N], any float dtype.
        y_ptr: [M, N], or [M, N / 2] for SILU_MUL.
        M: Rows.
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
        BM: Rows of a tile.
        BN: Outputs of a tile.
        BK: Inputs a step.
    """
    q_ptr = planes_ptr
    digits_ptr = planes_ptr + M.to(tl.int64) * K
    rows_ptr = rows_of(info_ptr)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    # Read as [K, N]: 8-bit matrix instructions want both factors with K contiguous.
    weight_ptr += column.to(tl.int64)[None, :] * stride_n
    x_at = row.to(tl.int64)[:, None] * K
    plane = M.to(tl.int64) * K
    acc = tl.zeros((BM, BN), tl.int32)
    low = tl.zeros((BM, BN), tl.int32)
    middle = tl.zeros((BM, BN), tl.int32)
    high = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        w = tl.load(weight_ptr + at[:, None], mask=(column[None, :] < N) & (at[:, None] < K), other=0)
        mask = (row[:, None] < M) & (at[None, :] < K)
        to = x_at + at[None, :]
        acc = tl.dot(tl.load(q_ptr + to, mask=mask, other=0), w, acc, out_dtype=tl.int32)
        if SPLIT:
            low = tl.dot(tl.load(digits_ptr + to, mask=mask, other=0), w, low, out_dtype=tl.int32)
            middle = tl.dot(tl.load(digits_ptr + plane + to, mask=mask, other=0), w, middle, out_dtype=tl.int32)
            if DIGITS == 3:
                high = tl.dot(tl.load(digits_ptr + 2 * plane + to, mask=mask, other=0), w, high, out_dtype=tl.int32)
    inside = row < M
    y = acc.to(tl.float32) * tl.load(rows_ptr + SCALE * M + row, mask=inside, other=0.0)[:, None]
    if SPLIT:
        unit = tl.load(rows_ptr + UNIT * M + row, mask=inside, other=0.0)[:, None]
        if JOIN:
            y = add_digits(y, middle * 256 + low, unit, 0)
        else:
            if DIGITS == 3:
                y = add_digits(y, high, unit, 2)
            y = add_digits(y, middle, unit, 1)
            y = add_digits(y, low, unit, 0)
    special = tl.load(rows_ptr + SPECIAL * M + row, mask=inside, other=0.0)
    if tl.max(tl.abs(special)) > 0:
        signs = tl.zeros((BM, BN), tl.int32)
        for k in range(0, K, BK):
            at = k + tl.arange(0, BK)
            w = tl.load(weight_ptr + at[:, None], mask=(column[None, :] < N) & (at[:, None] < K), other=0)
            x = tl.load(q_ptr + x_at + at[None, :], mask=(row[:, None] < M) & (at[None, :] < K), other=0)
            signs = tl.dot(x, sign_of(w), signs, out_dtype=tl.int32)
        y = override_special(y, signs, special[:, None])
    finish(y, y_ptr, scale_ptr, bias_ptr, row, column, M, N, n0, n1, HAS_BIAS, ACTIVATION, PARTS, BM, BN)
