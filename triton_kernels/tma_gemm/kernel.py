"""Many rows times a weight on sm_90: tiles of both by the copy engine (TMA)."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.gemm.kernel import outlier_sums, tile_of
from int8compile.triton_kernels.numerics import finish


@triton.jit(do_not_specialize=["M"])
def tma_gemm(
    x_desc,
    weight_desc,
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

    Not several, one after the other: Triton 3.6 makes new barriers in shared memory for each tile, and on an H200
    programs with more than one waited at them for ever, now and then.

    `x_desc` and `weight_desc` are tensor descriptors of q[0], in blocks [BM, BK], and of the weight, in blocks
    [BN, BK]: rows of both begin at multiples of 16 bytes. The other arguments are those of `gemm`. Second digits come
    by pointers: most rows have none in memory.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    acc = outlier_sums(q_ptr, rows_ptr, weight_ptr, row, column, M, N, K, stride_n, OUTLIERS, BM, BN, BK)
    for k in range(0, K, BK):
        x = x_desc.load([tile_m * BM, k])
        w = weight_desc.load([tile_n * BN, k])
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    row_scale = tl.load(rows_ptr + row, mask=row < M, other=0.0)[:, None]
    # One half at a time: for activation functions of 256 columns there are no registers.
    halves = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    for i in tl.static_range(2):
        column = tile_n * BN + i * (BN // 2) + tl.arange(0, BN // 2)
        finish(
            halves[i].to(tl.float32) * row_scale, y_ptr, scale_ptr, bias_ptr, row, column, M, N, n0, n1,
            HAS_BIAS, ACTIVATION, PARTS, BM, BN // 2,
        )  # fmt: skip
