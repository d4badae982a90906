"""Many rows times a weight: tiles of both, and outliers from lists of columns."""

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
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Numbers of the row tile and the column tile: programs that run together share both factors in the L2 cache."""
    tiles_n = tl.cdiv(N, BN)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tl.cdiv(M, BM) - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % size, within // size


@triton.jit
def add_listed(
    y,
    digits_ptr,
    rows_ptr,
    lists_ptr,
    weight_ptr,
    row,
    column,
    M,
    N,
    K,
    stride_n,
    LIST_ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    JOIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    """Adds the outliers of a tile's list to `acc * s_x`; how many there are is read here, on the device.

    Digit by digit, each with the same int32 accumulator: beside y there is room for one.

    Args:
        y: [BM, BN] float32.
        digits_ptr: [DIGITS, M, K] int8.
        rows_ptr: [4, M] float32.
        lists_ptr: [lists, 1 + K] int32.
        weight_ptr: [N, K] int8.
        row: [BM] numbers of the rows, all of one list.
        column: [BN] numbers of the outputs.
        M: Rows.
        N: Outputs.
        K: Inputs.
        stride_n: Elements from row to row of the weight.
        LIST_ROWS: Rows that share a list; 0: all do.
        DIGITS: Digits of an outlier.
        JOIN: Whether the sum of outliers fits int32.
        BM: Rows of the tile.
        BN: Outputs of the tile.
        BF: Listed columns that are taken together.
    """
    if LIST_ROWS > 0:
        of_these = tl.min(row, axis=0).to(tl.int64) // LIST_ROWS
        lists_ptr += of_these * (K + 1)
    count = tl.load(lists_ptr)
    unit = tl.load(rows_ptr + UNIT * M + row, mask=row < M, other=0.0)[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for which in tl.static_range(DIGITS - 1, -1, -1):
        digit_ptr = digits_ptr + (which * M + row.to(tl.int64)[:, None]) * K
        for begin in tl.range(0, count, BF, num_stages=1):
            at = begin + tl.arange(0, BF)
            listed = tl.load(lists_ptr + 1 + at, mask=at < count, other=0)
            d = tl.load(digit_ptr + at[None, :], mask=(row[:, None] < M) & (at[None, :] < count), other=0)
            w_at = column.to(tl.int64)[None, :] * stride_n + listed[:, None]
            w = tl.load(weight_ptr + w_at, mask=(column[None, :] < N) & (at[:, None] < count), other=0)
            total = tl.dot(d, w, total, out_dtype=tl.int32)
        if not JOIN:
            y = add_digits(y, total, unit, which)
            total = tl.zeros((BM, BN), tl.int32)
        elif which > 0:
            total = total * 256
    if JOIN:
        y = add_digits(y, total, unit, 0)
    return y


@triton.jit
def special_signs(
    q_ptr, weight_ptr, row, column, M, N, K, stride_n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """For rows with Inf: sum of the Infs' signs times the weights' signs."""
    signs = tl.zeros((BM, BN), tl.int32)
    for k in tl.range(0, K, BK, num_stages=1):
        at = k + tl.arange(0, BK)
        w_at = column.to(tl.int64)[None, :] * stride_n + at[:, None]
        w = tl.load(weight_ptr + w_at, mask=(column[None, :] < N) & (at[:, None] < K), other=0)
        x_at = row.to(tl.int64)[:, None] * K + at[None, :]
        x = tl.load(q_ptr + x_at, mask=(row[:, None] < M) & (at[None, :] < K), other=0)
        signs = tl.dot(x, sign_of(w), signs, out_dtype=tl.int32)
    return signs


@triton.jit
def epilogue(
    acc,
    q_ptr,
    digits_ptr,
    rows_ptr,
    lists_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    row,
    column,
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
    LIST_ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    JOIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    """From the int32 sums of a tile to its results in memory; the arguments are those of `gemm` and `add_listed`."""
    y = acc.to(tl.float32) * tl.load(rows_ptr + SCALE * M + row, mask=row < M, other=0.0)[:, None]
    if SPLIT:
        y = add_listed(
            y, digits_ptr, rows_ptr, lists_ptr, weight_ptr, row, column, M, N, K,
            stride_n, LIST_ROWS, DIGITS, JOIN, BM, BN, BF,
        )  # fmt: skip
    special = tl.load(rows_ptr + SPECIAL * M + row, mask=row < M, other=0.0)
    if tl.max(tl.abs(special)) > 0:
        signs = special_signs(q_ptr, weight_ptr, row, column, M, N, K, stride_n, BM, BN, 32)
        y = override_special(y, signs, special[:, None])
    finish(y, y_ptr, scale_ptr, bias_ptr, row, column, M, N, n0, n1, HAS_BIAS, ACTIVATION, PARTS, BM, BN)


@triton.jit(do_not_specialize=["M"])
def gemm(
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
    LIST_ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    JOIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of BM rows and BN outputs a program.

    Args:
        planes_ptr: [1 + DIGITS, M, K] int8.
        info_ptr: int32, the numbers of rows and the lists.
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
        LIST_ROWS: Rows that share a list; 0: all do. BM divides it.
        DIGITS: Digits of an outlier.
        JOIN: Whether the sum of outliers fits int32.
        BM: Rows of a tile.
        BN: Outputs of a tile.
        BK: Inputs a step.
        BF: Listed columns that are taken together.
        GROUP_M: Row tiles whose programs run together.
    """
    q_ptr = planes_ptr
    digits_ptr = planes_ptr + M.to(tl.int64) * K
    rows_ptr = rows_of(info_ptr)
    lists_ptr = info_ptr + 4 * M
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    x_ptr = q_ptr + row.to(tl.int64)[:, None] * K
    # Read as [K, N]: 8-bit matrix instructions want both factors with K contiguous.
    w_ptr = weight_ptr + column.to(tl.int64)[None, :] * stride_n
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        x = tl.load(x_ptr + at[None, :], mask=(row[:, None] < M) & (at[None, :] < K), other=0)
        w = tl.load(w_ptr + at[:, None], mask=(column[None, :] < N) & (at[:, None] < K), other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    epilogue(
        acc, q_ptr, digits_ptr, rows_ptr, lists_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr,
        row, column, M, N, K, stride_n, n0, n1, HAS_BIAS, ACTIVATION, PARTS, SPLIT, LIST_ROWS, DIGITS, JOIN, BM, BN, BF,
    )  # fmt: skip
