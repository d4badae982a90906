"""Rows times a weight, by tiles of both."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import add_products, finish


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
def outlier_sums(
    q_ptr,
    rows_ptr,
    weight_ptr,
    row,
    column,
    M,
    N,
    K,
    stride_n,
    OUTLIERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Return what the int32 sums of a tile begin with: 256 times those of second digits; 0 where no row has any.

    Args:
        q_ptr: [2, M, K] int8.
        rows_ptr: [2, M] float32.
        weight_ptr: [N, K] int8, rows `stride_n` apart.
        row: [BM] numbers of the rows.
        column: [BN] numbers of the outputs.
        M: Rows.
        N: Outputs.
        K: Inputs.
        stride_n: Elements from row to row of the weight.
        OUTLIERS: Whether there are second digits.
        BM: Rows of the tile.
        BN: Outputs of the tile.
    """
    acc = tl.zeros((BM, BN), tl.int32)
    if OUTLIERS:
        counts = tl.load(rows_ptr + M + row, mask=row < M, other=0.0) > 0
        if tl.max(counts.to(tl.int32)) > 0:
            x_ptr = q_ptr + M.to(tl.int64) * K + row.to(tl.int64)[:, None] * K
            w_ptr = weight_ptr + column.to(tl.int64)[None, :] * stride_n
            # It runs seldom, in short steps that are not pipelined: the main loop needs the registers.
            acc = add_products(acc, x_ptr, w_ptr, counts[:, None], column[None, :] < N, K, 64, 1) * 256
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm(
    q_ptr,
    rows_ptr,
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
    OUTLIERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of BM rows and BN outputs a program.

    Args:
        q_ptr: [2, M, K] int8; [1, M, K] without outliers.
        rows_ptr: [2, M] float32.
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
        OUTLIERS: Whether there are second digits.
        BM: Rows of a tile.
        BN: Outputs of a tile.
        BK: Inputs a step.
        GROUP_M: Row tiles whose programs run together.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    acc = outlier_sums(q_ptr, rows_ptr, weight_ptr, row, column, M, N, K, stride_n, OUTLIERS, BM, BN)
    x_ptr = q_ptr + row.to(tl.int64)[:, None] * K
    w_ptr = weight_ptr + column.to(tl.int64)[None, :] * stride_n
    acc = add_products(acc, x_ptr, w_ptr, row[:, None] < M, column[None, :] < N, K, BK)
    y = acc.to(tl.float32) * tl.load(rows_ptr + row, mask=row < M, other=0.0)[:, None]
    finish(y, y_ptr, scale_ptr, bias_ptr, row, column, M, N, n0, n1, HAS_BIAS, ACTIVATION, PARTS, BM, BN)
