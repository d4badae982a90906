"""What several kernels share: rounding, the sum of a tile's products, the epilogue. Device code only.

Quantized activations are two tensors, see `int8compile.ops.quantized`: the digits q [2, M, K] int8 and rows [2, M]
float32, of which the first is the scale and the second says whether the row's second digits count.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What is done to the result before it is rounded; the same numbers as int8compile.ops.quantized.ACTIVATIONS.
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)
GELU_TANH = tl.constexpr(4)
SILU_MUL = tl.constexpr(5)

# Where results go: one [M, N]; parts of several sizes one behind the other; the same, each tile in one part.
WHOLE = tl.constexpr(1)
SCATTERED = tl.constexpr(2)
TILED = tl.constexpr(3)


@triton.jit
def round_to_int(x):
    """Round half to even, for |x| <= 2**22: above 2**23 float32 has no fraction."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def add_products(acc, q_ptr, weight_ptr, x_inside, w_inside, K, BK: tl.constexpr, STAGES: tl.constexpr = None):
    """Add a tile's products to its int32 sums, which may wrap on the way.

    Args:
        acc: [BM, BN] int32.
        q_ptr: [BM, 1], where rows of q begin.
        weight_ptr: [1, BN], where rows of the weight begin.
        x_inside: [BM, 1], which rows count.
        w_inside: [1, BN], which outputs there are.
        K: Inputs.
        BK: Inputs a step.
        STAGES: Steps in flight; None for those of the launch.
    """
    for k in tl.range(0, K, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        x = tl.load(q_ptr + at[None, :], mask=x_inside & (at[None, :] < K), other=0)
        # Read as [K, N]: 8-bit matrix instructions want both factors with K contiguous.
        w = tl.load(weight_ptr + at[:, None], mask=w_inside & (at[:, None] < K), other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """An activation function in float32."""
    if ACTIVATION == RELU:
        # Not maximum, which need not keep NaN.
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == SILU:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(z)) / 2 is sigmoid(2 z), without its cancellation.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def finish(
    y,
    y_ptr,
    scale_ptr,
    bias_ptr,
    row,
    column,
    M,
    N,
    n0,
    n1,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The end of every kernel: `acc * s_x * s_w + bias`, the activation, one rounding, the store.

    Args:
        y: [BM, BN] float32, `acc * s_x`.
        y_ptr: [M, N], or [M, N / 2] for SILU_MUL, contiguous; or the parts one behind the other.
        scale_ptr: [N].
        bias_ptr: [N], where there is one.
        row: [BM] numbers of the rows.
        column: [BN] numbers of the columns.
        M: Rows of the result.
        N: Columns of the product.
        n0: Columns of the first of several parts.
        n1: Columns of the second of three parts.
        HAS_BIAS: Whether there is a bias.
        ACTIVATION: See above. SILU_MUL takes gate and up from even and odd columns.
        PARTS: See WHOLE, SCATTERED and TILED.
        BM: Rows of the tile.
        BN: Columns of the tile.
    """
    inside = column < N
    y = y * tl.load(scale_ptr + column, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == SILU_MUL:
        gate, up = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        y = gate * tl.sigmoid(gate) * up
        column = tl.min(column, axis=0) // 2 + tl.arange(0, BN // 2)
        N = N // 2
    else:
        y = activate(y, ACTIVATION)
    if PARTS == WHOLE:
        at = row.to(tl.int64)[:, None] * N + column[None, :]
    else:
        # For whole tiles a number, so that neighbours are stored together.
        first = tl.min(column, axis=0) if PARTS == TILED else column
        begin = tl.where(first < n0, 0, tl.where(first < n0 + n1, n0, n0 + n1))
        size = tl.where(first < n0, n0, tl.where(first < n0 + n1, n1, N - n0 - n1))
        at = begin.to(tl.int64) * M + (column - begin)
        if PARTS == TILED:
            at = row.to(tl.int64)[:, None] * size + at[None, :]
        else:
            at = row.to(tl.int64)[:, None] * size[None, :] + at[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < M) & (column[None, :] < N))
