"""Product of many rows and a weight on sm_90, in Gluon: plain Triton keeps no int8 products in flight.

The kernel is warp-specialized. One warp, the producer, has the copy engine (TMA) fill STAGES stages of shared
memory, each with BK inputs of both factors; the other warps, the consumers, multiply. A program computes several tiles,
one after the other. Both sides take the same steps in the same order: for each tile, one step per block of inputs in
which any of its rows has a second digit, then the steps of the main loop. Step i uses stage `stage_of(i)`.

Each stage has two barriers in shared memory, with one arrival per phase:

    ready: the producer arrives with `expect`, then the copied bytes complete the phase. In step i the consumers wait
        for the phase of parity `phase_of(i)`.
    empty: the consumers arrive when no product reads the stage any more. Before step i the producer waits for the
        previous phase, which has the other parity. A new barrier behaves as if a phase had completed before its first,
        so the first STAGES steps do not wait.

No stage is overwritten before it is read: step i + STAGES is copied after the arrival for step i. There is no deadlock:

    - Both sides take the same steps.
    - The copies of step i need only the consumers' arrivals up to step i - STAGES. These come when the next step is
      multiplied or the tile ends; with two stages or more that is before step i.
    - The consumers' step i needs only the copies up to step i.

A parity is enough to tell phases apart, because neither side is ever two phases of a barrier ahead of the other. Fewer
steps than stages, or no tile at all, need no special cases. (test_gluon_gemm.py runs this code with events in any
order.)
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from int8compile.triton_kernels.gemm.kernel import tile_of
from int8compile.triton_kernels.numerics import (
    SILU_MUL,
    activate,
    affine,
    gated,
    lowest_bit,
    of_outputs,
    places,
    row_scales,
)

# Renamed after Triton 3.6.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Inputs per bit that marks second digits, and inputs per word of bits.
BLOCK = gl.constexpr(128)
WORD = gl.constexpr(4096)
# Registers per thread of the producer; the consumers have the rest.
PRODUCER_REGISTERS = gl.constexpr(40)


@gluon.jit
def stage_of(step, STAGES: gl.constexpr):
    """Return the stage that a step uses."""
    return step % STAGES


@gluon.jit
def phase_of(step, STAGES: gl.constexpr):
    """Return the parity of the phase that makes a step's stage ready."""
    return (step // STAGES) & 1


@gluon.constexpr_function
def _sums_layout(columns, warps):
    """Return the layout in which the matrix instruction leaves int32 sums: 16 rows per warp."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, min(columns, 128), 32])


@gluon.constexpr_function
def _result_layout(rows, columns, width, warps):
    """Return the layout of results: the same rows per warp, `width` columns per thread, four threads side by side."""
    inner = width.bit_length() - 1
    column = [[0, 1 << bit] for bit in range(columns.bit_length() - 1)]
    row = [[1 << bit, 0] for bit in range(rows.bit_length() - 1)]
    by_warp = row[4 : 4 + warps.bit_length() - 1]
    rest = column[inner + 2 :] + row[3:4] + row[4 + len(by_warp) :]
    lanes = column[inner : inner + 2] + row[:3]
    return gl.DistributedLinearLayout(column[:inner] + rest, lanes, by_warp, [], [rows, columns])


@gluon.jit
def part_of(K, SPLIT: gl.constexpr, BK: gl.constexpr):
    """Return the first of a program's inputs, and their end: at least one whole step if programs share a tile."""
    first = 0
    last = K
    if SPLIT:
        steps = gl.cdiv(K, BK)
        part = gl.program_id(1)
        first = steps * part // gl.num_programs(1) * BK
        last = gl.minimum(steps * (part + 1) // gl.num_programs(1) * BK, K)
    return first, last


@gluon.jit
def words_of(rows_ptr, tile_m, M, first, last, BM: gl.constexpr):
    """Return the end of a tile's words of bits for inputs from `first` to `last`; 0 if no row has a bit set."""
    # Each warp holds all rows, so the reduction needs no shared memory and no barriers.
    row = tile_m * BM + gl.arange(0, BM, gl.BlockedLayout([BM // 32], [32], [gl.num_warps()], [0]))
    end = gl.cdiv(last, WORD)
    found = gl.zeros_like(row)
    for word in range(first // WORD, end):
        found |= bits_of(rows_ptr, word, row, M)
    return gl.where(gl.reduce_or(found, 0) != 0, end, 0)


@gluon.jit
def bits_of(rows_ptr, word, row, M):
    """Return one word of bits for each row."""
    return gl.load(rows_ptr + (1 + word) * M.to(gl.int64) + row, mask=row < M, other=0)


@gluon.jit
def word_of(rows_ptr, word, tile_m, M, first, last, BM: gl.constexpr):
    """Return the OR of one word of bits over a tile's rows, limited to the inputs from `first` to `last`."""
    row = tile_m * BM + gl.arange(0, BM, gl.BlockedLayout([BM // 32], [32], [gl.num_warps()], [0]))
    bits = gl.reduce_or(bits_of(rows_ptr, word, row, M), 0)
    begin = gl.maximum(first - word * WORD, 0) // BLOCK
    end = gl.cdiv(last - word * WORD, BLOCK)
    return bits & (-1 << begin) & gl.where(end < 32, (1 << (end & 31)) - 1, -1)


@gluon.jit
def produce(
    x_desc,
    weight_desc,
    x_tiles,
    w_tiles,
    ready,
    empty,
    rows_ptr,
    M,
    N,
    K,
    OUTLIERS: gl.constexpr,
    SPLIT: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Have the copy engine fill the stages, in the order in which `consume` reads them."""
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    first, last = part_of(K, SPLIT, BK)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, M, N, BM, BN, GROUP_M)
        if OUTLIERS:
            for word in range(first // WORD, words_of(rows_ptr, tile_m, M, first, last, BM)):
                bits = word_of(rows_ptr, word, tile_m, M, first, last, BM)
                while bits != 0:
                    k = word * WORD + lowest_bit(bits) * BLOCK
                    bits &= bits - 1
                    stage = stage_of(step, STAGES)
                    mbarrier.wait(empty.index(stage), phase_of(step, STAGES) ^ 1)
                    mbarrier.expect(ready.index(stage), BN * BK)
                    _copy(weight_desc, [tile_n * BN, k], ready.index(stage), w_tiles.index(stage))
                    step += 1
        for k in range(first, last, BK):
            stage = stage_of(step, STAGES)
            mbarrier.wait(empty.index(stage), phase_of(step, STAGES) ^ 1)
            mbarrier.expect(ready.index(stage), (BM + BN) * BK)
            _copy(x_desc, [tile_m * BM, k], ready.index(stage), x_tiles.index(stage))
            _copy(weight_desc, [tile_n * BN, k], ready.index(stage), w_tiles.index(stage))
            step += 1


@gluon.jit
def consume(
    x_tiles,
    w_tiles,
    ready,
    empty,
    q_ptr,
    rows_ptr,
    counters_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    partials_ptr,
    M,
    N,
    K,
    n0,
    n1,
    ACTIVATION: gl.constexpr,
    PARTS: gl.constexpr,
    OUTLIERS: gl.constexpr,
    SPLIT: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Multiply the stages that `produce` fills, and store the results."""
    sums: gl.constexpr = _sums_layout(BN, gl.num_warps())
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    first, last = part_of(K, SPLIT, BK)
    step = 0
    tile_m, tile_n = tile_of(gl.program_id(0), M, N, BM, BN, GROUP_M)
    words = words_of(rows_ptr, tile_m, M, first, last, BM) if OUTLIERS else 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([BM, BN], gl.int32, sums)
        if OUTLIERS:
            for word in range(first // WORD, words):
                bits = word_of(rows_ptr, word, tile_m, M, first, last, BM)
                while bits != 0:
                    block = lowest_bit(bits)
                    bits &= bits - 1
                    stage = stage_of(step, STAGES)
                    mbarrier.wait(ready.index(stage), phase_of(step, STAGES))
                    # Not by the copy engine, which cannot leave out rows without second digits.
                    x = second_digits_of(q_ptr, rows_ptr, tile_m, word, block, M, K, BM)
                    x_tiles.index(stage).store(x)
                    fence_async_shared()
                    acc = warpgroup_mma(x_tiles.index(stage), w_tiles.index(stage).permute([1, 0]), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(empty.index(stage), count=1)
                    step += 1
            # With `acc << 8` the assembler would keep no product in flight in the loop below.
            acc = gl.inline_asm_elementwise("shl.b32 $0, $1, 8;", "=r,r", [acc], gl.int32, is_pure=False, pack=1)
        for k in range(first, last, BK):
            stage = stage_of(step, STAGES)
            mbarrier.wait(ready.index(stage), phase_of(step, STAGES))
            acc = warpgroup_mma(x_tiles.index(stage), w_tiles.index(stage).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if k > first:  # This step's product is in flight, the previous one is complete.
                mbarrier.arrive(empty.index(stage_of(step - 1, STAGES)), count=1)
            step += 1
        # Look up the next tile while the last product is in flight.
        next_m, next_n = tile_of(gl.minimum(tile + gl.num_programs(0), tiles - 1), M, N, BM, BN, GROUP_M)
        if OUTLIERS:
            words = words_of(rows_ptr, next_m, M, first, last, BM)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage_of(step - 1, STAGES)), count=1)
        ends = True
        if SPLIT:
            acc, ends = sums_of_all(acc, partials_ptr, counters_ptr + tile, tile_m * BM, tile_n * BN, M, N)
        if ends:
            finish(
                acc, rows_ptr, scale_ptr, bias_ptr, y_ptr, tile_m * BM, tile_n * BN, M, N, n0, n1,
                ACTIVATION, PARTS, BM, BN,
            )  # fmt: skip
        tile_m, tile_n = next_m, next_n


@gluon.jit
def sums_of_all(acc, partials_ptr, counter_ptr, first_row, first_column, M, N):
    """Store a program's part of a tile's sums; return the total, if this is the last program, and whether it is."""
    layout: gl.constexpr = acc.type.layout
    row = first_row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    at = row.to(gl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    size = M.to(gl.int64) * N
    gl.store(partials_ptr + gl.program_id(1) * size + at, acc, mask=inside)
    # All threads have to store before one of them counts the program as finished.
    tl.debug_barrier()
    ends = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == gl.num_programs(1) - 1
    if ends:
        gl.store(counter_ptr, 0)
        acc = gl.zeros_like(acc)
        for part in range(gl.num_programs(1)):
            # Bypass the first-level cache, which can hold old values.
            acc += gl.load(partials_ptr + part * size + at, mask=inside, other=0, cache_modifier=".cg")
    return acc, ends


@gluon.jit
def second_digits_of(q_ptr, rows_ptr, tile_m, word, block, M, K, BM: gl.constexpr):
    """Return the second digits of a tile's rows in one block of inputs, int8 [BM, BLOCK]; 0 where a row has none."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
    column = word * WORD + block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    has = (bits_of(rows_ptr, word, row, M) >> block) & 1 != 0
    at = (M + row).to(gl.int64)[:, None] * K + column[None, :]
    return gl.load(q_ptr + at, mask=has[:, None] & (column < K)[None, :], other=0)


@gluon.jit
def finish(
    acc,
    rows_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    first_row,
    first_column,
    M,
    N,
    n0,
    n1,
    ACTIVATION: gl.constexpr,
    PARTS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
):
    """Store a tile's results like `numerics.finish`, 64 columns at a time to save registers."""
    parts = halves(acc)
    if BN == 256:
        parts = halves(parts[0]) + halves(parts[1])
    columns: gl.constexpr = 64
    # Each thread stores 16 bytes, and neighbouring threads neighbouring bytes.
    result: gl.constexpr = y_ptr.dtype.element_ty
    width: gl.constexpr = 128 // result.primitive_bitwidth * (2 if ACTIVATION == SILU_MUL else 1)
    layout: gl.constexpr = _result_layout(BM, columns, width, gl.num_warps())
    row = first_row + gl.arange(0, BM, gl.SliceLayout(1, layout))
    row_scale = row_scales(rows_ptr, row, row < M)[:, None]
    for i in gl.static_range(BN // columns):
        first = first_column + i * columns
        column = first + gl.arange(0, columns, gl.SliceLayout(0, layout))
        y = gl.convert_layout(parts[i], layout).to(gl.float32) * row_scale
        outputs = of_outputs(scale_ptr, bias_ptr, column, N)
        y = affine(y, outputs)
        if ACTIVATION == SILU_MUL:
            gate, up = y.reshape([BM, columns // 2, 2]).split()
            store_tile(gated(gate, up), y_ptr, first_row, first // 2, M, N // 2, n0, n1, PARTS)
        else:
            store_tile(activate(y, ACTIVATION), y_ptr, first_row, first, M, N, n0, n1, PARTS)


@gluon.jit
def halves(tile):
    """Return the two halves of a tile's columns, [BM, BN / 2] each; no data moves between threads."""
    return tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def store_tile(y, y_ptr, first_row, first_column, M, N, n0, n1, PARTS: gl.constexpr):
    """Round results and store them."""
    layout: gl.constexpr = y.type.layout
    row = first_row + gl.arange(0, y.shape[0], gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    at = places(row, column, M, N, n0, n1, PARTS)
    gl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@gluon.jit(do_not_specialize=["M"])
def gluon_gemm(
    x_desc,
    weight_desc,
    q_ptr,
    rows_ptr,
    counters_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    partials_ptr,
    M,
    N,
    K,
    n0,
    n1,
    ACTIVATION: gl.constexpr,
    PARTS: gl.constexpr,
    OUTLIERS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Compute tiles of BM rows and BN outputs, several per program.

    `x_desc` and `weight_desc` are tensor descriptors of q[0], in blocks [BM, BK], and of the weight, in blocks
    [BN, BK]. Rows of both begin at multiples of 16 bytes. BK is BLOCK. The other arguments are those of `numerics`.
    """
    gl.static_assert(BK == BLOCK)
    gl.static_assert(STAGES >= 2)
    SPLIT: gl.constexpr = partials_ptr is not None
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], weight_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (x_tiles, w_tiles, ready, empty, q_ptr, rows_ptr, counters_ptr, scale_ptr, bias_ptr, y_ptr,
                       partials_ptr, M, N, K, n0, n1, ACTIVATION, PARTS, OUTLIERS, SPLIT,
                       BM, BN, BK, STAGES, GROUP_M)),
            (produce, (x_desc, weight_desc, x_tiles, w_tiles, ready, empty, rows_ptr, M, N, K,
                       OUTLIERS, SPLIT, BM, BN, BK, STAGES, GROUP_M)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
