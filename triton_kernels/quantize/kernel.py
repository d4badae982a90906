"""Quantizes activations: int8 rows and their scales, and the outliers as digits, by column or in lists.

Up to `PLANES_ROWS` rows the digits lie in planes of the shape of x, 0 where there is no outlier: `quantize_rows` alone
makes them. For more rows, each tile of `LIST_ROWS` rows has a list of the columns that hold an outlier, and the digits
of those columns lie one beside the other: `quantize_rows` marks the columns, `list_columns` lists them, `gather_digits`
writes their digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import CUTOFF, HAS_NAN, SCALE, SPECIAL, UNIT, digit_of, round_to_int, rows_of


@triton.jit
def _load(x_ptr, chunk, K, BK: tl.constexpr):
    at = chunk * BK + tl.arange(0, BK)
    return tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)


@triton.jit
def _finite(x):
    """Magnitudes, with 0 for NaN and Inf."""
    magnitude = tl.abs(x)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def _exact_squares(a, to_unit):
    """`int8compile.ops.reference.fixed_point_squares`."""
    scaled = a.to(tl.float64) * to_unit
    return (scaled * scaled + 196608.0) - 196608.0


@triton.jit(do_not_specialize=["M"])
def quantize_rows(
    x_ptr,
    planes_ptr,
    info_ptr,
    flags_ptr,
    stride_m,
    M,
    K,
    square_of_threshold,
    low,
    high,
    threshold,
    SPLIT: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    LISTS: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
):
    """One row a program.

    The decision of the row policy is exact (see `reference.outlier_mask`) but needs float64 seldom: a float32 sum of
    squares with its error bound settles it, unless an element lies within the bound of the limit.

    Args:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        planes_ptr: [1 + DIGITS, M, K] int8. In a row with Inf q holds their signs and nothing else; digits are
            written if SPLIT, unless LISTS.
        info_ptr: int32; the numbers of rows are written.
        flags_ptr: [lists, ceil(K / 32)] int32, zeros: one bit a column; written if LISTS.
        stride_m: Elements from row to row.
        M: Rows.
        K: Columns.
        square_of_threshold: The bits of threshold**2 in float64.
        low: Below `low * sum` a square, relative to the row's, is certainly no outlier's.
        high: From `high * sum` on it certainly is.
        threshold: Of the column policy.
        SPLIT: Whether the threshold is not 0.
        BY_COLUMN: Outlier policy.
        LISTS: Whether columns are listed.
        LIST_ROWS: Rows that share a list; 0: all do.
        DIGITS: Digits of an outlier, 2 or 3.
        CHUNKS: ceil(K / BK).
        BK: Columns that are looked at together.
    """
    q_ptr = planes_ptr
    digits_ptr = planes_ptr + M.to(tl.int64) * K
    rows_ptr = rows_of(info_ptr)
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_m
    whole = _load(x_ptr, 0, K, BK)

    largest = 0.0
    infinities = 0
    nans = 0
    for c in range(CHUNKS):
        x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
        largest = tl.maximum(largest, tl.max(_finite(x)))
        infinities += tl.sum((tl.abs(x) == float("inf")).to(tl.int32))
        nans += tl.sum((x != x).to(tl.int32))
    special = infinities.to(tl.float32)
    special = tl.where(nans > 0, special * 0 + HAS_NAN, special)
    biased = largest.to(tl.int32, bitcast=True) >> 23

    # The least magnitude that is an outlier.
    cutoff = float("inf")
    if SPLIT and BY_COLUMN:
        cutoff = threshold
    elif SPLIT:
        # About 1 / largest; the float32 sum neither overflows nor vanishes.
        scale = (tl.maximum(254 - biased, 1) << 23).to(tl.float32, bitcast=True)
        total = 0.0
        for c in range(CHUNKS):
            x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
            scaled = _finite(x) * scale
            total += tl.sum(scaled * scaled)
        doubtful = 0
        for c in range(CHUNKS):
            x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
            a = _finite(x)
            square = (a * scale) * (a * scale)
            certain = (square >= high * total) & (a > 0)
            cutoff = tl.minimum(cutoff, tl.min(tl.where(certain, a, float("inf"))))
            doubtful += tl.sum(((square >= low * total) & (a > 0) & (square < high * total)).to(tl.int32))
        if (doubtful > 0) | (biased < 30):
            exponent = (largest.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
            # 2.0**-exponent by its bits; a row of zeros has no outliers, whatever this is.
            to_unit = ((1023 - tl.maximum(exponent, -1000)) << 52).to(tl.float64, bitcast=True)
            exact = largest.to(tl.float64) * 0
            for c in range(CHUNKS):
                x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
                exact += tl.sum(_exact_squares(_finite(x), to_unit))
            limit = exact * square_of_threshold.to(tl.int64).to(tl.float64, bitcast=True)
            cutoff = float("inf")
            for c in range(CHUNKS):
                x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
                a = _finite(x)
                passes = (_exact_squares(a, to_unit) * K >= limit) & (a > 0)
                cutoff = tl.minimum(cutoff, tl.min(tl.where(passes, a, float("inf"))))

    absmax = 0.0
    for c in range(CHUNKS):
        x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
        a = _finite(x)
        absmax = tl.maximum(absmax, tl.max(tl.where(a < cutoff, a, 0.0)))
    absmax = tl.where(absmax < 7.52316384526264e-37, 0.0, absmax)  # reference.TINY, 2**-120
    inverse = tl.where(absmax == 0, 0.0, tl.div_rn(1.0, absmax) * 127.0)
    row_scale = tl.div_rn(absmax, 127.0)

    # A power of two above all that digits hold: outliers, or else the residuals s_x * q - x of the column policy.
    bound = tl.where(largest >= cutoff, largest, row_scale)
    above = tl.maximum((bound.to(tl.int32, bitcast=True) >> 23) - 126, -100)
    BITS: tl.constexpr = 8 * DIGITS - 2
    to_digits = ((127 + BITS - above) << 23).to(tl.float32, bitcast=True)
    unit = ((127 - BITS + above) << 23).to(tl.float32, bitcast=True)

    tl.store(rows_ptr + SCALE * M + m, row_scale)
    tl.store(rows_ptr + UNIT * M + m, unit)
    tl.store(rows_ptr + SPECIAL * M + m, special)
    tl.store(rows_ptr + CUTOFF * M + m, cutoff)

    for c in range(CHUNKS):
        x = whole if CHUNKS == 1 else _load(x_ptr, c, K, BK)
        at = c * BK + tl.arange(0, BK)
        a = _finite(x)
        outlier = (a >= cutoff) & (a > 0)
        q = round_to_int(tl.where(outlier | (tl.abs(x) != a), 0.0, x) * inverse)
        # 0 < Inf, and neither holds for NaN.
        signs = (x == float("inf")).to(tl.int32) - (x == float("-inf")).to(tl.int32)
        q = tl.where(infinities + nans == 0, q, signs)
        tl.store(q_ptr + m * K + at, q.to(tl.int8), mask=at < K)
        if LISTS:
            marked = outlier | (tl.abs(x) != a)
            bits = tl.reshape(marked.to(tl.int32), (BK // 32, 32)) << tl.arange(0, 32)[None, :]
            word = tl.sum(bits, axis=1)
            words = (K + 31) // 32
            at = c * (BK // 32) + tl.arange(0, BK // 32)
            to = flags_ptr + at
            if LIST_ROWS > 0:
                to += (m // LIST_ROWS) * words
            # An outlier column often is one in every row: most bits are there already.
            known = tl.load(to, mask=(at < words) & (word != 0), other=0)
            tl.atomic_or(to, word, mask=(at < words) & ((word & ~known) != 0), sem="relaxed")
        elif SPLIT:
            d = round_to_int(tl.where(outlier & (infinities + nans == 0), x, 0.0) * to_digits)
            for which in tl.static_range(DIGITS):
                tl.store(digits_ptr + (which * M + m) * K + at, digit_of(d, which), mask=at < K)


@triton.jit(do_not_specialize=["M"])
def list_columns(flags_ptr, info_ptr, M, K, WORDS: tl.constexpr):
    """Turns marks into lists, one a program.

    Args:
        flags_ptr: [lists, ceil(K / 32)] int32, one bit a column.
        info_ptr: int32; the lists are written: how many marked columns there are, and their numbers, ascending.
        M: Rows.
        K: Columns.
        WORDS: Words that are looked at together.
    """
    tile = tl.program_id(0).to(tl.int64)
    lists_ptr = info_ptr + 4 * M + tile * (K + 1)
    words = (K + 31) // 32
    count = 0
    for begin in range(0, words, WORDS):
        at = begin + tl.arange(0, WORDS)
        word = tl.load(flags_ptr + tile * words + at, mask=at < words, other=0)
        marked = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, (WORDS * 32,))
        position = count + tl.cumsum(marked, axis=0) - 1
        column = begin * 32 + tl.arange(0, WORDS * 32)
        tl.store(lists_ptr + 1 + position, column, mask=marked != 0)
        count += tl.sum(marked)
    tl.store(lists_ptr, count)


@triton.jit(do_not_specialize=["M"])
def gather_digits(
    x_ptr,
    planes_ptr,
    info_ptr,
    stride_m,
    M,
    K,
    BY_COLUMN: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
):
    """Writes the digits of the listed columns, one beside the other. BM rows a program, all of one list.

    Args:
        x_ptr: [M, K], any float dtype, rows `stride_m` apart.
        planes_ptr: [1 + DIGITS, M, K] int8; digits are written: entry f belongs to column f of the row's list.
        info_ptr: int32, the numbers of rows and the lists.
        stride_m: Elements from row to row.
        M: Rows.
        K: Columns.
        BY_COLUMN: Whether a digit holds `x - s_x * q`, or x where it is an outlier.
        LIST_ROWS: Rows that share a list; 0: all do.
        DIGITS: Digits of an outlier, 2 or 3.
        BM: Rows a program takes.
        BF: Listed columns that are taken together.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    q_ptr = planes_ptr
    digits_ptr = planes_ptr + M.to(tl.int64) * K
    rows_ptr = rows_of(info_ptr)
    lists_ptr = info_ptr + 4 * M
    if LIST_ROWS > 0:
        lists_ptr += tl.program_id(0).to(tl.int64) * BM // LIST_ROWS * (K + 1)
    count = tl.load(lists_ptr)
    inside = row < M
    special = tl.load(rows_ptr + SPECIAL * M + row, mask=inside, other=0.0)
    unit = tl.load(rows_ptr + UNIT * M + row, mask=inside, other=1.0)
    # The inverse of a power of two, by its bits.
    to_digits = ((254 << 23) - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    scale = tl.load(rows_ptr + SCALE * M + row, mask=inside, other=0.0)
    cutoff = tl.load(rows_ptr + CUTOFF * M + row, mask=inside, other=float("inf"))
    for begin in range(0, count, BF):
        at = begin + tl.arange(0, BF)
        column = tl.load(lists_ptr + 1 + at, mask=at < count, other=0)
        mask = inside[:, None] & (at < count)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_m + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if BY_COLUMN:
            q = tl.load(q_ptr + row[:, None] * K + column[None, :], mask=mask, other=0).to(tl.float32)
            value = x - scale[:, None] * q
        else:
            value = tl.where(tl.abs(x) >= cutoff[:, None], x, 0.0)
        d = round_to_int(tl.where(special[:, None] == 0, value, 0.0) * to_digits[:, None])
        for which in tl.static_range(DIGITS):
            to = digits_ptr + (which * M + row[:, None]) * K + at[None, :]
            tl.store(to, digit_of(d, which), mask=mask)
