"""What several kernels share: masks and digits of outliers, the epilogue, rows with NaN or Inf. Device code only.

**Activations** are two tensors, see `int8compile.ops.digits.Activations`: planes, of which the first is q and the
others digits; and info, which begins with four float32 numbers a row, `rows[4, M]`, indexed by the constants below.

**Digits.** What an outlier adds must not depend on how many others are summed with it, in which order or in which tile,
or a token's result would depend on the batch. So outliers are integers, `d = rne(x / unit)`, with `unit` a power of two
that depends on their row alone: 14 bits, or 22 with three digits. In int8 digits, `d = 256 * d1 + d0`, they go through
the same instructions as everything else, and their sum is exact in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Indices of rows[4, M].
SCALE = tl.constexpr(0)  # s_x: absmax of what is not an outlier, over 127
UNIT = tl.constexpr(1)  # of the row's digits
SPECIAL = tl.constexpr(2)  # 0; the number of Infs in the row; HAS_NAN
CUTOFF = tl.constexpr(3)  # row policy: the least magnitude that is an outlier, Inf if none is

HAS_NAN = tl.constexpr(-0.5)  # no sum of signs is that, nor the opposite of one

# What is done to the result before it is rounded; the same numbers as int8compile.ops.ACTIVATIONS.
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
def rows_of(info_ptr):
    """Where the numbers of rows are."""
    return info_ptr.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def round_to_int(x):
    """Rounds half to even, for |x| <= 2**22: above 2**23 float32 has no fraction."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def digit_of(value, which: tl.constexpr):
    """The int8 digit of weight 256**which of an integer, balanced: each is in [-128, 127]."""
    for _ in tl.static_range(which):
        value = (value + 128) >> 8
    return (((value + 128) & 255) - 128).to(tl.int8)


@triton.jit
def sign_of(w):
    """-1, 0 or 1, int8."""
    return (w > 0).to(tl.int8) - (w < 0).to(tl.int8)


@triton.jit
def add_digits(y, total, unit, which: tl.constexpr):
    """Adds an exact sum of digits to `acc * s_x`."""
    return y + total.to(tl.float32) * (unit * (1 << (8 * which)))


@triton.jit
def override_special(y, signs, special):
    """Rows with Inf: what float arithmetic gives; rows with NaN: NaN.

    Args:
        y: The result so far.
        signs: Sum over the row's Infs of their sign times the weight's.
        special: See SPECIAL, broadcast against y.
    """
    signs = signs.to(tl.float32)
    # All Infs of the sum have one sign and none met a zero, or the sum is NaN.
    infinite = tl.where(signs == special, float("inf"), tl.where(signs == -special, float("-inf"), float("nan")))
    return tl.where(special == 0, y, infinite)


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
    """The end of every kernel: `(acc * s_x + out) * s_w + bias`, the activation, one rounding, the store.

    Args:
        y: [BM, BN] float32, `acc * s_x + out`.
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
