"""Quantization of activations: rotated fixed point, one scale per row, two digits, optionally after a norm.

Each program quantizes one row. It views the row as [P, L, C] with P * L = B and rotates each of the C columns, so any
number of columns can be processed at a time. The P parts [L, C] are loaded separately, so the first butterflies run
between a thread's own registers. Then the row is split along L, which moves data between threads once; after that the
other butterflies run between registers too.

Device functions share two tuples: `row`, pointers to the tensors of a row, all of which but x may be None; and the
constants `SHAPE`, in which BC is the number of columns processed at a time.
"""

from __future__ import annotations

# Tuples change their length, which Triton accepts and mypy does not.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import prefetch, wait_for_inputs

TINY = tl.constexpr((127 - 100) << 23)  # the bits of 2.0**-100, as reference.TINY
INF = tl.constexpr(0x7F800000)
# A quantization step is at most a 127th of the largest magnitude, and at least what keeps integers within
# reference.Q_LARGEST.
C1 = tl.constexpr(1 / 127)
C3 = tl.constexpr(1 / 32639)
# 1.5 * 2**23, and its bits. Float32 has no fraction at this size, so adding it rounds to an integer, half to even.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)
# Norms, numbered as in int8compile.ops.quantized; None for no norm.
RMS_ROUNDED = tl.constexpr(1)
RMS_PLUS_ONE = tl.constexpr(2)
LAYER = tl.constexpr(3)
# Indices in the tuples.
X_PTR, RESIDUAL_PTR, SUM_PTR, WEIGHT_PTR, BIAS_PTR, NORMED_PTR, D_PTR = (tl.constexpr(i) for i in range(7))
C, P, L, BC = (tl.constexpr(i) for i in range(4))


@triton.jit
def _nearest(x, factor):
    """Return `x * factor`, rounded to float32 and then to an integer, half to even; at most 2**22."""
    return (x * factor + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def _places(chunk, SHAPE: tl.constexpr):
    """Return the offsets [L, BC] of a chunk's columns in the first part, and a mask [1, BC] of existing columns."""
    column = chunk * SHAPE[BC] + tl.arange(0, SHAPE[BC])[None, :]
    return tl.arange(0, SHAPE[L])[:, None] * SHAPE[C] + column, column < SHAPE[C]


@triton.jit
def _rotated_places(chunk, SHAPE: tl.constexpr):
    """Return offsets [P * BC] of the first tensor of `_rotate` and a mask; the other tensors follow C apart."""
    n = tl.arange(0, SHAPE[P] * SHAPE[BC])
    column = chunk * SHAPE[BC] + n % SHAPE[BC]
    return n // SHAPE[BC] * (SHAPE[L] * SHAPE[C]) + column, column < SHAPE[C]


@triton.jit
def _load(row, chunk, SHAPE: tl.constexpr):
    """Return P parts [L, BC] of x, or of x + residual rounded to x's dtype, as float32."""
    at, inside = _places(chunk, SHAPE)
    h = ()
    for part in tl.static_range(SHAPE[P]):
        to = part * SHAPE[L] * SHAPE[C]
        v = tl.load(row[X_PTR] + to + at, mask=inside, other=0.0)
        if row[RESIDUAL_PTR] is not None:
            v = v.to(tl.float32) + tl.load(row[RESIDUAL_PTR] + to + at, mask=inside, other=0.0).to(tl.float32)
            v = v.to(row[X_PTR].dtype.element_ty)
        h += (v.to(tl.float32),)
    return h


@triton.jit
def _store_sum(row, first, CHUNKS: tl.constexpr, SHAPE: tl.constexpr):
    """Store x + residual. It is separate from `_load` because no compiler moves later loads before a store."""
    for c in range(CHUNKS):
        h = first if CHUNKS == 1 else _load(row, c, SHAPE)
        at, inside = _places(c, SHAPE)
        for part in tl.static_range(SHAPE[P]):
            to = part * SHAPE[L] * SHAPE[C]
            tl.store(row[SUM_PTR] + to + at, h[part].to(row[SUM_PTR].dtype.element_ty), mask=inside)


@triton.jit
def _moment(row, first, mean, POWER: tl.constexpr, CHUNKS: tl.constexpr, SHAPE: tl.constexpr):
    """Return the mean of `(h - mean)**POWER` over a row; `first` is its chunk 0."""
    total = 0.0
    for c in range(CHUNKS):
        h = first if CHUNKS == 1 else _load(row, c, SHAPE)
        _, inside = _places(c, SHAPE)
        sums = tl.zeros_like(h[0])
        for part in tl.static_range(SHAPE[P]):
            v = tl.where(inside, h[part] - mean, 0.0)
            sums += v * v if POWER == 2 else v
        total += tl.sum(sums)
    return total / (SHAPE[C] * SHAPE[P] * SHAPE[L])


@triton.jit
def _norm_of(row, first, eps, NORM: tl.constexpr, CHUNKS: tl.constexpr, SHAPE: tl.constexpr):
    """Return the mean to subtract from a row, and the factor to multiply it with afterwards."""
    mean, factor = 0.0, 1.0
    if NORM == LAYER:
        mean = _moment(row, first, 0.0, 1, CHUNKS, SHAPE)
    if NORM is not None:
        factor = tl.rsqrt(_moment(row, first, mean, 2, CHUNKS, SHAPE) + eps)
    return mean, factor


@triton.jit
def _load_factors(row, chunk, SHAPE: tl.constexpr):
    """Return the parts of weight, bias and d."""
    at, inside = _places(chunk, SHAPE)
    weight = ()
    bias = ()
    d = ()
    for part in tl.static_range(SHAPE[P]):
        to = part * SHAPE[L] * SHAPE[C]
        if row[WEIGHT_PTR] is not None:
            weight += (tl.load(row[WEIGHT_PTR] + to + at, mask=inside, other=0.0),)
        if row[BIAS_PTR] is not None:
            bias += (tl.load(row[BIAS_PTR] + to + at, mask=inside, other=0.0),)
        if row[D_PTR] is not None:
            d += (tl.load(row[D_PTR] + to + at, mask=inside, other=0.0),)
    return weight, bias, d


@triton.jit
def _scaled(row, norm, h, factors, chunk, NORM: tl.constexpr, SHAPE: tl.constexpr):
    """Return the parts, normalized and rounded to x's dtype, times d."""
    dtype: tl.constexpr = row[X_PTR].dtype.element_ty
    at, inside = _places(chunk, SHAPE)
    weight, bias, d = factors
    result = ()
    for part in tl.static_range(SHAPE[P]):
        v = h[part]
        if NORM is not None:
            v = (v - norm[0] if NORM == LAYER else v) * norm[1]
            if NORM == RMS_ROUNDED:
                v = v.to(dtype).to(tl.float32)
            if row[WEIGHT_PTR] is not None:
                w = weight[part].to(tl.float32)
                v = v * (w + 1.0 if NORM == RMS_PLUS_ONE else w)
            if row[BIAS_PTR] is not None:
                v = v + bias[part].to(tl.float32)
            if row[NORMED_PTR] is not None:
                tl.store(row[NORMED_PTR] + part * SHAPE[L] * SHAPE[C] + at, v.to(dtype), mask=inside)
            v = tl.where(inside, v.to(dtype).to(tl.float32), 0.0)
        result += (v if row[D_PTR] is None else v * d[part],)
    return result


@triton.jit
def _values(row, norm, chunk, NORM: tl.constexpr, SHAPE: tl.constexpr):
    return _scaled(row, norm, _load(row, chunk, SHAPE), _load_factors(row, chunk, SHAPE), chunk, NORM, SHAPE)


@triton.jit
def _largest_bits(row, norm, first, NORM: tl.constexpr, CHUNKS: tl.constexpr, SHAPE: tl.constexpr):
    """Return the bits of a row's largest magnitude, where NaN is the largest; `first` holds the values of chunk 0."""
    u = 0
    for c in range(CHUNKS):
        v = first if CHUNKS == 1 else _values(row, norm, c, NORM, SHAPE)
        size = tl.abs(v[0])
        for part in tl.static_range(1, SHAPE[P]):
            size = tl.maximum(size, tl.abs(v[part]), propagate_nan=tl.PropagateNan.ALL)
        u = tl.maximum(u, tl.max(size.to(tl.int32, bitcast=True)))
    return u


@triton.jit
def _butterflies(X, SIZE: tl.constexpr):
    """Return a tuple of SIZE tensors multiplied with a Hadamard matrix."""
    for stage in tl.static_range(4):
        if 1 << stage < SIZE:
            Y = ()
            for i in tl.static_range(SIZE):
                other = X[i ^ (1 << stage)]
                Y += (other - X[i] if i >> stage & 1 else X[i] + other,)
            X = Y
    return X


@triton.jit
def _joined(X, SIZE: tl.constexpr):
    """Return a tuple of SIZE tensors as one, with new last dimensions of 2; the last is the index's lowest bit."""
    for stage in tl.static_range(3):
        if 1 << stage < SIZE:
            pairs = ()
            for i in tl.static_range(SIZE >> stage + 1):
                pairs += (tl.join(X[i], X[i + (SIZE >> stage + 1)]),)
            X = pairs
    return X[0]


@triton.jit
def _apart(X):
    """Return a tensor [N, 2, 2, 2, 2] as a tuple of 16 tensors [N]; the last dimension is the index's highest bit."""
    parts = (X,)
    for _ in tl.static_range(4):
        halves = ()
        for i in tl.static_range(len(parts)):
            halves += tl.split(parts[i])
        parts = halves
    return parts


@triton.jit
def _rotate(v, u, SHAPE: tl.constexpr):
    """Return `reference.fixed_point` of parts as L tensors [P * BC]; u holds the bits of the row's largest magnitude.

    Rows with NaN or Inf give arbitrary integers, rows that count as zero give 0.
    """
    up = ((149 - _exponent(u)) << 23).to(tl.float32, bitcast=True)
    X = ()
    for part in tl.static_range(SHAPE[P]):
        # A product with a power of two is exact, so ROUND can be added in the same instruction.
        X += (tl.fma(v[part], up, ROUND).to(tl.int32, bitcast=True) - ROUND_BITS,)
    X = _joined(_butterflies(X, SHAPE[P]), SHAPE[P])
    if SHAPE[L] == 1:
        rotated = (tl.reshape(X, (SHAPE[BC],)),)
    else:
        # [L, BC, P] to [P, BC, L]
        X = tl.permute(tl.reshape(X, (2, 2, 2, 2, SHAPE[BC], SHAPE[P])), (5, 4, 3, 2, 1, 0))
        rotated = _butterflies(_apart(tl.reshape(X, (SHAPE[P] * SHAPE[BC], 2, 2, 2, 2))), SHAPE[L])
    return rotated


@triton.jit
def _exponent(u):
    return tl.where((u >= TINY) & (u < INF), (u >> 23) - 126, 0)


@triton.jit
def _unit(u):
    """Return the unit of a row's integers; NaN for rows with NaN or Inf."""
    return tl.where(u < INF, ((_exponent(u) + 105) << 23).to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _larger_and_sum(a, b, c, d):
    return tl.maximum(a, c), b + d


@triton.jit(do_not_specialize=["M", "rows_per_group"])
def quantize_rows(
    x_ptr,
    residual_ptr,
    sum_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    d_ptr,
    ends_ptr,
    q_ptr,
    rows_ptr,
    counters_ptr,
    stride_m,
    residual_stride_m,
    M,
    rows_per_group,
    c2,
    eps,
    OVERLAP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    NORM: tl.constexpr,
    EXPERTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    WORDS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute `int8compile.ops.quantized.quantize` of x, of a norm of x, or of a norm of x + residual.

    Second digits are written only in rows that have a nonzero one.

    Arguments besides those of `numerics`:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        residual_ptr: [M, K] in x's dtype, rows `residual_stride_m` apart; or None.
        sum_ptr: [M, K] in x's dtype, for x + residual; None without a residual.
        weight_ptr: [K], any float dtype, the norm's weight; or None.
        bias_ptr: [K], any float dtype, the norm's bias; or None.
        normed_ptr: [M, K] in x's dtype, for the norm's result; or None.
        d_ptr: [K] float32, or [EXPERTS, K]; or None.
        ends_ptr: [EXPERTS] int32 or int64, the end of each expert's rows; None for `rows_per_group` each.
        stride_m: Elements from row to row of x.
        residual_stride_m: Elements from row to row of the residual.
        rows_per_group: Rows per expert.
        c2: The threshold divided by 127 * K.
        eps: The norm's epsilon.
        NORM: The number of the norm; or None.
        EXPERTS: Number of rows of d; 0 if all rows of x share one d.
        COUNTERS: Number of counters to set to zero.
        WORDS: A power of two, at least W and at least 1.
        C: K / B.
        P: B / L, 1 to 8.
        L: 16, or 1 if B is 1.
        BC: Columns processed at a time.
        CHUNKS: ceil(C / BC).
    """
    SHAPE: tl.constexpr = (C, P, L, BC)
    K: tl.constexpr = C * P * L
    m = tl.program_id(0).to(tl.int64)
    if OVERLAP and not EXPERTS:
        column = tl.minimum(tl.arange(0, max(triton.next_power_of_2(K) // 32, 1)) * 32, K - 1)
        if d_ptr is not None:
            prefetch(d_ptr + column)
        if weight_ptr is not None:
            prefetch(weight_ptr + column)
    wait_for_inputs(OVERLAP)
    if m == 0:
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))
    if EXPERTS:
        d_ptr += _expert(m, ends_ptr, rows_per_group, EXPERTS).to(tl.int64) * K
    x_ptr += m * stride_m
    if residual_ptr is not None:
        residual_ptr += m * residual_stride_m
        sum_ptr += m * K
    if normed_ptr is not None:
        normed_ptr += m * K
    row = (x_ptr, residual_ptr, sum_ptr, weight_ptr, bias_ptr, normed_ptr, d_ptr)
    # Start all loads before waiting for the first; 1024 threads have too few registers for this.
    EARLY: tl.constexpr = P * L * BC <= 8192
    factors = _load_factors(row, 0, SHAPE) if EARLY else None
    first = _load(row, 0, SHAPE)
    if residual_ptr is not None:
        _store_sum(row, first, CHUNKS, SHAPE)
    norm = _norm_of(row, first, eps, NORM, CHUNKS, SHAPE)
    if not EARLY:
        factors = _load_factors(row, 0, SHAPE)
    first = _scaled(row, norm, first, factors, 0, NORM, SHAPE)
    u = _largest_bits(row, norm, first, NORM, CHUNKS, SHAPE)
    rotated = _rotate(first, u, SHAPE)
    largest = 0
    total = tl.zeros((), tl.int64)
    for c in range(CHUNKS):
        X = rotated if CHUNKS == 1 else _rotate(_values(row, norm, c, NORM, SHAPE), u, SHAPE)
        size = tl.abs(X[0])
        sums = size
        for i in tl.static_range(1, L):
            size = tl.maximum(size, tl.abs(X[i]))
            # At most 4 * 2**29, by Cauchy-Schwarz: a rotation keeps the sum of squares, times 128.
            sums += tl.abs(X[i])
        here, more = tl.reduce((size, sums.to(tl.uint32).to(tl.int64)), 0, _larger_and_sum)
        largest = tl.maximum(largest, here)
        total += more
    top = largest.to(tl.float32)
    step = tl.maximum(tl.minimum(top * C1, total.to(tl.float32) * c2), top * C3)
    # Rows with NaN or Inf have arbitrary integers.
    inverse = tl.where(u < INF, tl.div_rn(1.0, tl.where(largest == 0, 1.0, step)), 0.0)
    tl.store(rows_ptr + m, (step * _unit(u)).to(tl.int32, bitcast=True))
    q_ptr += m * K
    for c in range(CHUNKS):
        X = rotated if CHUNKS == 1 else _rotate(_values(row, norm, c, NORM, SHAPE), u, SHAPE)
        at, inside = _rotated_places(c, SHAPE)
        for i in tl.static_range(L):
            tl.store(q_ptr + i * C + at, _nearest(X[i].to(tl.float32), inverse).to(tl.int8), mask=inside)
    if OUTLIERS:
        words = tl.zeros((WORDS,), tl.int32)
        if _nearest(top, inverse) > 127:
            q_ptr += M.to(tl.int64) * K
            for c in range(CHUNKS):
                X = rotated if CHUNKS == 1 else _rotate(_values(row, norm, c, NORM, SHAPE), u, SHAPE)
                at, inside = _rotated_places(c, SHAPE)
                for i in tl.static_range(L):
                    q1 = (_nearest(X[i].to(tl.float32), inverse) + 128) >> 8
                    tl.store(q_ptr + i * C + at, q1.to(tl.int8), mask=inside)
            # Read back, in the order of inputs, the digits that other threads of the program have stored.
            tl.debug_barrier()
            k = tl.arange(0, WORDS * 4096)
            found = (tl.load(q_ptr + k, mask=k < K, other=0) != 0).to(tl.int32)
            blocks = tl.max(tl.reshape(found, (WORDS, 32, 128)), axis=2)
            words = tl.sum(blocks << tl.arange(0, 32)[None, :], axis=1)
        w = tl.arange(0, WORDS)
        tl.store(rows_ptr + (1 + w) * M.to(tl.int64) + m, words, mask=w < (K + 4095) // 4096)


@triton.jit
def _expert(m, ends_ptr, rows_per_group, EXPERTS: tl.constexpr):
    if ends_ptr is None:
        expert = m // rows_per_group
    else:
        e = tl.arange(0, triton.next_power_of_2(EXPERTS))
        ends = tl.load(ends_ptr + e, mask=e < EXPERTS, other=0)
        expert = tl.minimum(tl.sum(((ends <= m) & (e < EXPERTS)).to(tl.int32)), EXPERTS - 1)
    return expert


@triton.jit(do_not_specialize=["M"])
def fixed_point(
    x_ptr,
    d_ptr,
    X_ptr,
    unit_ptr,
    stride_m,
    M,
    DIGITS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store `reference.fixed_point` as digits: X is the sum of 256**i * X[i].

    Arguments besides those of `quantize_rows`:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        d_ptr: [K] float32, or None.
        X_ptr: [4, M, K] int8.
        unit_ptr: [M] float32.
        DIGITS: Number of digits of the largest integer; digits above are not written.
    """
    SHAPE: tl.constexpr = (C, P, L, BC)
    m = tl.program_id(0).to(tl.int64)
    row = (x_ptr + m * stride_m, None, None, None, None, None, d_ptr)
    norm = (0.0, 1.0)
    first = _values(row, norm, 0, None, SHAPE)
    u = _largest_bits(row, norm, first, None, CHUNKS, SHAPE)
    tl.store(unit_ptr + m, _unit(u))
    for c in range(CHUNKS):
        X = _rotate(first if CHUNKS == 1 else _values(row, norm, c, None, SHAPE), u, SHAPE)
        at, inside = _rotated_places(c, SHAPE)
        for i in tl.static_range(L):
            Q = X[i]
            for digit in tl.static_range(DIGITS):
                tl.store(X_ptr + (digit * M + m) * (C * P * L) + i * C + at, Q.to(tl.int8), mask=inside)
                Q = (Q + 128) >> 8
