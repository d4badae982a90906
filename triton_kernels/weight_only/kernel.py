"""Float rows times an int8 weight.

For outputs that are to be exact in the activations, and for GPUs without int8 matrix instructions in Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import WHOLE, finish


@triton.jit(do_not_specialize=["M"])
def weight_only_gemm(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    stride_m,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of BM rows and BN outputs a program; sums in float32.

    Args:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        weight_ptr: [N, K] int8, contiguous.
        scale_ptr: [N] float32.
        bias_ptr: [N], any float dtype.
        y_ptr: [M, N] of x's dtype.
        stride_m: Elements from row to row of x.
        M: Rows.
        N: Outputs.
        K: Inputs.
        HAS_BIAS: Whether there is a bias.
        ACTIVATION: See `numerics`.
        BM: Rows of a tile.
        BN: Outputs of a tile.
        BK: Inputs a step.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    w_ptr = weight_ptr + column.to(tl.int64)[None, :] * K
    x_ptr += row.to(tl.int64)[:, None] * stride_m
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        x = tl.load(x_ptr + at[None, :], mask=(row[:, None] < M) & (at[None, :] < K), other=0.0)
        w = tl.load(w_ptr + at[:, None], mask=(column[None, :] < N) & (at[:, None] < K), other=0)
        # int8 values are exact in every float dtype.
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
    finish(acc, y_ptr, scale_ptr, bias_ptr, row, column, M, N, 0, 0, HAS_BIAS, ACTIVATION, WHOLE, BM, BN)
