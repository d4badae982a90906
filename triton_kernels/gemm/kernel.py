"""Product of rows and a weight, in tiles of both."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import add_products, finish, of_outputs, row_scales, second_digits


@triton.jit
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the indices of the row tile and column tile; programs that run together share both in the L2 cache."""
    tiles_n = tl.cdiv(N, BN)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tl.cdiv(M, BM) - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % size, within // size


@triton.jit
def sums(
    q_ptr,
    rows_ptr,
    w_ptr,
    row,
    x_inside,
    w_inside,
    M,
    K,
    first,
    last,
    WORDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the int32 sums [BM, BN] of a tile over the inputs from `first` to `last`.

    The sums over first digits and over second digits are computed separately, because Triton's mma.sync saturates: each
    stays within 127 * 128 * K, which is less than 2**31. Only their sum may wrap on the way.

    The arguments are those of `numerics.second_digits`.
    """
    if WORDS:
        # These loads run while the first digits are multiplied.
        word = first // 4096 + tl.arange(0, WORDS)
        at = M.to(tl.int64) * (1 + word)[:, None] + row[None, :]
        bits = tl.load(rows_ptr + at, mask=(word * 4096 < last)[:, None] & x_inside[None, :], other=0)
    acc = tl.zeros((BM, BN), tl.int32)
    x_ptr = q_ptr + row.to(tl.int64)[:, None] * K
    acc = add_products(acc, x_ptr, w_ptr, x_inside[:, None], w_inside, first, last, K, BK)
    if WORDS:  # noqa: SIM102 - WORDS is a compile-time constant
        if tl.reduce_or(tl.reshape(bits, (WORDS * BM,)), 0) != 0:  # type: ignore[possibly-undefined]
            acc += second_digits(q_ptr, rows_ptr, w_ptr, row, x_inside, w_inside, M, K, first, last, BM, BN)
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm(
    q_ptr,
    rows_ptr,
    counters_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    partials_ptr,
    M,
    N,
    K,
    stride_n,
    n0,
    n1,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute a tile of BM rows and BN outputs per program.

    If `partials_ptr` is given, several programs share a tile, each with a part of the inputs. Each program stores its
    sums there, and the last one to finish adds them all up. They are integers, so the order makes no difference.
    """
    tile = tl.program_id(0)
    tile_m, tile_n = tile_of(tile, M, N, BM, BN, GROUP_M)
    row = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    if BM < 128:  # Larger tiles need the registers.
        outputs = of_outputs(scale_ptr, bias_ptr, column, N)
        row_scale = row_scales(rows_ptr, row, row < M)
    w_ptr = weight_ptr + column.to(tl.int64)[None, :] * stride_n
    first = 0
    last = K
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    if partials_ptr is not None:
        # Whole steps, and whole blocks of 128 inputs for the second digits.
        STEP: tl.constexpr = max(BK, 128)
        steps = tl.cdiv(K, STEP)
        first = steps * part // parts * STEP
        last = steps * (part + 1) // parts * STEP
    acc = sums(
        q_ptr, rows_ptr, w_ptr, row, row < M, column[None, :] < N, M, K, first, last, WORDS, BM, BN, BK
    )  # fmt: skip
    ends = True
    if partials_ptr is not None:
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row[:, None] < M) & (column[None, :] < N)
        size = M.to(tl.int64) * N
        tl.store(partials_ptr + part * size + at, acc, mask=inside)
        # All threads have to store before one of them counts the program as finished.
        tl.debug_barrier()
        ends = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == parts - 1
        if ends:
            tl.store(counters_ptr + tile, 0)
            acc = tl.zeros((BM, BN), tl.int32)
            # Several loads in flight. They bypass the first-level cache, which can hold old values.
            for other in tl.range(0, parts, loop_unroll_factor=4 if BM * BN <= 2048 else 2):
                acc += tl.load(partials_ptr + other * size + at, mask=inside, other=0, cache_modifier=".cg")
    if ends:
        if BM >= 128:
            outputs = of_outputs(scale_ptr, bias_ptr, column, N)
            row_scale = row_scales(rows_ptr, row, row < M)
        y = acc.to(tl.float32) * row_scale[:, None]  # type: ignore[possibly-undefined]
        finish(
            y, y_ptr, outputs, row, column, M, N, n0, n1,  # type: ignore[possibly-undefined]
            ACTIVATION, PARTS, BM, BN,
        )  # fmt: skip
