"""Quantizes activations: rotated fixed point, one grid for each row, two digits. One row a program.

A row is seen as [B, C], K = B * C, whose columns are rotated: any number of columns can be looked at alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import round_to_int

TINY = tl.constexpr((127 - 100) << 23)  # the bits of 2.0**-100, as reference.TINY
INF = tl.constexpr(0x7F800000)
# A step is a 127th of the largest magnitude, unless that would give too large integers: reference.Q_LARGEST.
C1 = tl.constexpr(1 / 127)
C3 = tl.constexpr(1 / 32639)


@triton.jit
def _places(chunk, C, B: tl.constexpr, BC: tl.constexpr):
    """Places [B, BC] of the columns `chunk * BC` to `(chunk + 1) * BC` in a row, and [1, BC] which there are."""
    column = chunk * BC + tl.arange(0, BC)[None, :]
    return tl.arange(0, B)[:, None] * C + column, column < C


@triton.jit
def _load(x_ptr, d_ptr, chunk, C, B: tl.constexpr, BC: tl.constexpr):
    """Columns of `x * d`."""
    at, inside = _places(chunk, C, B, BC)
    v = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if d_ptr is not None:
        v = v * tl.load(d_ptr + at, mask=inside, other=0.0)
    return v


@triton.jit
def _largest_bits(x_ptr, d_ptr, first, C, B: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr):
    """The bits of a row's largest magnitude, NaN above all; `first` is its chunk 0."""
    u = tl.max(first.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    for c in range(1, CHUNKS):
        v = _load(x_ptr, d_ptr, c, C, B, BC)
        u = tl.maximum(u, tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF))
    return u


@triton.jit
def _butterfly(X, DISTANCE: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, BC: tl.constexpr):
    pairs = tl.reshape(X, (SIZE // (2 * DISTANCE), 2, DISTANCE))
    u, v = tl.split(tl.permute(pairs, (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(u + v, u - v), (0, 2, 1)), (B, BC))


@triton.jit
def _rotated_integers(v, u, LOG_B: tl.constexpr, B: tl.constexpr, BC: tl.constexpr):
    """`reference.fixed_point` of columns; 0 in rows of NaN or Inf, and in those that count as zero."""
    up = ((149 - _exponent(u)) << 23).to(tl.float32, bitcast=True)
    X = round_to_int(tl.where((u >= TINY) & (u < INF), v, 0.0) * up)
    for i in tl.static_range(LOG_B):
        X = _butterfly(X, BC << i, BC << LOG_B, B, BC)
    return X


@triton.jit
def _digit(Q):
    """The lowest digit; with `(Q + 128) >> 8` the others follow."""
    return (((Q + 128) & 255) - 128).to(tl.int8)


@triton.jit
def _exponent(u):
    return tl.where((u >= TINY) & (u < INF), (u >> 23) - 126, 0)


@triton.jit
def _unit(u):
    """Return what integers of a row are multiplied with; NaN for NaN and Inf."""
    return tl.where(u < INF, ((_exponent(u) + 105) << 23).to(tl.float32, bitcast=True), float("nan"))


@triton.jit(do_not_specialize=["M"])
def quantize_rows(
    x_ptr,
    d_ptr,
    q_ptr,
    rows_ptr,
    stride_m,
    M,
    C,
    c2,
    OUTLIERS: tl.constexpr,
    LOG_B: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """`reference.quantize_rows` and its digits.

    Args:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        d_ptr: [K] float32, or None.
        q_ptr: [2, M, K] int8, or [1, M, K]; second digits are written in rows that have one.
        rows_ptr: [2, M] float32.
        stride_m: Elements from row to row.
        M: Rows.
        C: K / B.
        c2: The threshold over 127 * K.
        OUTLIERS: Whether there are second digits.
        LOG_B: log2(B).
        BC: Columns that are looked at together.
        CHUNKS: ceil(C / BC).
    """
    B: tl.constexpr = 1 << LOG_B
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_m
    q_ptr += m * C * B
    first = _load(x_ptr, d_ptr, 0, C, B, BC)
    u = _largest_bits(x_ptr, d_ptr, first, C, B, BC, CHUNKS)
    rotated = _rotated_integers(first, u, LOG_B, B, BC)
    largest = tl.max(tl.abs(rotated))
    total = tl.sum(tl.abs(rotated).to(tl.int64))
    for c in range(1, CHUNKS):
        X = _rotated_integers(_load(x_ptr, d_ptr, c, C, B, BC), u, LOG_B, B, BC)
        largest = tl.maximum(largest, tl.max(tl.abs(X)))
        total += tl.sum(tl.abs(X).to(tl.int64))
    top = largest.to(tl.float32)
    step = tl.maximum(tl.minimum(top * C1, total.to(tl.float32) * c2), top * C3)
    inverse = tl.div_rn(1.0, tl.where(largest == 0, 1.0, step))
    outliers = round_to_int(top * inverse) > 127
    tl.store(rows_ptr + m, step * _unit(u))
    tl.store(rows_ptr + M + m, outliers.to(tl.float32))
    for c in range(CHUNKS):
        X = rotated if CHUNKS == 1 else _rotated_integers(_load(x_ptr, d_ptr, c, C, B, BC), u, LOG_B, B, BC)
        at, inside = _places(c, C, B, BC)
        Q = round_to_int(X.to(tl.float32) * inverse)
        tl.store(q_ptr + at, _digit(Q), mask=inside)
        if OUTLIERS:  # noqa: SIM102 - known when the kernel is compiled
            if outliers:
                tl.store(q_ptr + M.to(tl.int64) * C * B + at, _digit((Q + 128) >> 8), mask=inside)


@triton.jit(do_not_specialize=["M"])
def fixed_point(
    x_ptr,
    d_ptr,
    X_ptr,
    unit_ptr,
    stride_m,
    M,
    C,
    DIGITS: tl.constexpr,
    LOG_B: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """`reference.fixed_point` in digits, X = sum of 256**i * X[i].

    Args:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        d_ptr: [K] float32, or None.
        X_ptr: [4, M, K] int8.
        unit_ptr: [M] float32.
        stride_m: Elements from row to row.
        M: Rows.
        C: K / B.
        DIGITS: How many digits hold the largest integer; others are not written.
        LOG_B: log2(B).
        BC: Columns that are looked at together.
        CHUNKS: ceil(C / BC).
    """
    B: tl.constexpr = 1 << LOG_B
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_m
    first = _load(x_ptr, d_ptr, 0, C, B, BC)
    u = _largest_bits(x_ptr, d_ptr, first, C, B, BC, CHUNKS)
    tl.store(unit_ptr + m, _unit(u))
    for c in range(CHUNKS):
        v = first if CHUNKS == 1 else _load(x_ptr, d_ptr, c, C, B, BC)
        at, inside = _places(c, C, B, BC)
        X = _rotated_integers(v, u, LOG_B, B, BC)
        for i in tl.static_range(DIGITS):
            tl.store(X_ptr + (i * M + m) * C * B + at, _digit(X), mask=inside)
            X = (X + 128) >> 8
