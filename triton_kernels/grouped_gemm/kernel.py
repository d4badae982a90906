"""Product of groups of rows with a weight per group; only the GPU knows which rows belong to a group."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.gemm.kernel import sums
from int8compile.triton_kernels.numerics import NONE, WHOLE, finish, of_outputs, row_scales


@triton.jit(do_not_specialize=["M", "rows_per_group"])
def grouped_gemm(
    q_ptr,
    rows_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    ends_ptr,
    y_ptr,
    M,
    E,
    N,
    K,
    stride_e,
    stride_n,
    rows_per_group,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute tiles of at most BM rows of one group and BN outputs.

    Rows after the last group become zero. All rows become NaN if the ends do not ascend or exceed M.

    Arguments besides those of `numerics`; weight, scale and bias have an additional first dimension E:
        ends_ptr: [E] int32 or int64, the end of each group's rows; None for groups of `rows_per_group`.
        E: Number of groups, at least 1.
        stride_e: Elements from one group's weight to the next.
        rows_per_group: Rows of each group if `ends_ptr` is None.
        GROUPS: A power of two, larger than E.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    # The rows after the last group form group E.
    group = tl.arange(0, GROUPS)
    if ends_ptr is None:
        begins = tl.minimum(group * rows_per_group, M)
        ends = tl.minimum(begins + rows_per_group, M)
    else:
        begins = tl.load(ends_ptr + group - 1, mask=(group > 0) & (group <= E), other=0)
        ends = tl.load(ends_ptr + group, mask=group < E, other=0)
        ends = tl.where(group == E, M, ends)
    wrong = tl.max(((group <= E) & (begins > ends)).to(tl.int32), axis=0) > 0
    begins = tl.where(wrong | (group > E), 0, begins).to(tl.int32)
    ends = tl.where(group > E, 0, tl.where(wrong, tl.where(group == E, M, 0), ends)).to(tl.int32)
    tiles = tl.cdiv(ends - begins, BM)
    behind = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(1), tl.sum(tiles, axis=0), tl.num_programs(1)):
        mine = tl.sum((behind <= tile).to(tl.int32), axis=0)
        begin = tl.sum(tl.where(group == mine, begins, 0), axis=0)
        end = tl.sum(tl.where(group == mine, ends, 0), axis=0)
        before = tl.sum(tl.where(group == mine, behind - tiles, 0), axis=0)
        row = begin + (tile - before) * BM + tl.arange(0, BM)
        if mine < E:
            w_ptr = weight_ptr + mine.to(tl.int64) * stride_e + column.to(tl.int64)[None, :] * stride_n
            acc = sums(q_ptr, rows_ptr, w_ptr, row, row < end, column[None, :] < N, M, K, 0, K, WORDS, BM, BN, BK)
            of_group = mine * N + column
            outputs = of_outputs(scale_ptr, bias_ptr, of_group, (mine + 1) * N)
            y = acc.to(tl.float32) * row_scales(rows_ptr, row, row < end)[:, None]
            finish(y, y_ptr, outputs, row, column, end, N, 0, 0, NONE, WHOLE, BM, BN)
        else:
            fill = tl.full((BM, BN), tl.where(wrong, float("nan"), 0.0), tl.float32).to(y_ptr.dtype.element_ty)
            inside = (row[:, None] < end) & (column[None, :] < N)
            tl.store(y_ptr + row.to(tl.int64)[:, None] * N + column[None, :], fill, mask=inside)
