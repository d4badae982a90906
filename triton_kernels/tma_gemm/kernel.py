"""Many rows times a weight on sm_90: tiles of both by the copy engine (TMA)."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.gemm.kernel import epilogue, tile_of
from int8compile.triton_kernels.numerics import rows_of


@triton.jit(do_not_specialize=["M"])
def tma_gemm(
    x_desc,
    weight_desc,
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

    Not several, one after the other: Triton 3.6 makes new barriers in shared memory for each tile, and on an H200
    programs with more than one waited at them for ever, now and then.

    `x_desc` and `weight_desc` are tensor descriptors of q, in blocks [BM, BK], and of the weight, in blocks [BN, BK]:
    rows of both begin at multiples of 16 bytes. The other arguments are those of `gemm`.
    """
    q_ptr = planes_ptr
    digits_ptr = planes_ptr + M.to(tl.int64) * K
    rows_ptr = rows_of(info_ptr)
    lists_ptr = info_ptr + 4 * M
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        x = x_desc.load([tile_m * BM, k])
        w = weight_desc.load([tile_n * BN, k])
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    row = tile_m * BM + tl.arange(0, BM)
    if BN > 128:
        # The outliers of one half at a time: there are no registers for a second accumulator of the whole width.
        halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        column = tile_n * BN + tl.arange(0, BN // 2)
        epilogue(
            left, q_ptr, digits_ptr, rows_ptr, lists_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr,
            row, column, M, N, K, stride_n, n0, n1, HAS_BIAS, ACTIVATION, PARTS, SPLIT, LIST_ROWS, DIGITS, JOIN,
            BM, BN // 2, BF,
        )  # fmt: skip
        epilogue(
            right, q_ptr, digits_ptr, rows_ptr, lists_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr,
            row, column + BN // 2, M, N, K, stride_n, n0, n1, HAS_BIAS, ACTIVATION, PARTS, SPLIT, LIST_ROWS,
            DIGITS, JOIN, BM, BN // 2, BF,
        )  # fmt: skip
    else:
        column = tile_n * BN + tl.arange(0, BN)
        epilogue(
            acc, q_ptr, digits_ptr, rows_ptr, lists_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr,
            row, column, M, N, K, stride_n, n0, n1, HAS_BIAS, ACTIVATION, PARTS, SPLIT, LIST_ROWS, DIGITS, JOIN,
            BM, BN, BF,
        )  # fmt: skip
