"""Product of a row and a weight, without matrix instructions: memory bandwidth is the limit."""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import finish, of_outputs, prefetch, wait_for_inputs


@triton.jit
def products(w, x, INSTRUCTION: tl.constexpr):
    """Return the int32 products of the int8 in w and x; the four products of packed int8 are added up.

    Args:
        w: [BN, W] int8, or int32 that pack four int8 each.
        x: [1, W], likewise.
        INSTRUCTION: As in `Config.instruction`.
    """
    # No early `return`: Triton 3.6 also compiles the code after one in such a condition.
    if w.dtype == tl.int8:
        y = w.to(tl.int32) * x.to(tl.int32)
    elif INSTRUCTION == "dp4a":
        y = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [w, x], tl.int32, True, 1)
    elif INSTRUCTION == "v_dot4":
        y = tl.inline_asm_elementwise("v_dot4_i32_i8 $0, $1, $2, 0", "=v,v,v", [w, x], tl.int32, True, 1)
    else:
        y = (w >> 24) * (x >> 24)
        for shift in tl.static_range(8, 32, 8):
            y += ((w << shift) >> 24) * ((x << shift) >> 24)
    return y


@triton.jit
def gemv(
    q_ptr,
    rows_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    stride_n,
    n0,
    n1,
    OVERLAP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    WORD: tl.constexpr,
    INSTRUCTION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute BN outputs of one row per program.

    Arguments besides those of `numerics`:
        WORD: Inputs read as one integer: 4 if K, `stride_n` and addresses are multiples of 16, otherwise 1.
        INSTRUCTION: As in `Config.instruction`.
        BK: Inputs per step, at most 4096.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    if OVERLAP:
        # The first 4096 inputs, in cache lines of 128, while the activations are being quantized.
        line = 128 * tl.arange(0, 32)
        rows = tl.minimum(column, N - 1).to(tl.int64)[:, None] * stride_n
        prefetch(weight_ptr + (rows + tl.minimum(line, K - 1)[None, :]))
    wait_for_inputs(OVERLAP)
    outputs = of_outputs(scale_ptr, bias_ptr, column, N)
    row_scale = tl.load(rows_ptr).to(tl.float32, bitcast=True)
    words = K // WORD
    if WORD > 1:
        q_ptr = q_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        weight_ptr = weight_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        words = tl.multiple_of(words, 4)
        stride_n = tl.multiple_of(stride_n // WORD, 4)
    weight_ptr += column.to(tl.int64)[:, None] * stride_n
    W: tl.constexpr = BK // WORD
    # Four neighbours belong to one thread.
    sums = tl.zeros((BN, W // 4), tl.int32)
    for k in range(0, words, W):
        at = k + tl.arange(0, W)
        inside = at < words
        mask = (column[:, None] < N) & inside[None, :]
        if OUTLIERS:
            block = k * WORD // 128
            bits = tl.load(rows_ptr + 1 + block // 32)
        # No other program reads these weights.
        w = tl.load(weight_ptr + at[None, :], mask=mask, other=0, eviction_policy="evict_first")
        # The assembler may move loads behind instructions that wait for other loads, but not behind a barrier. So all
        # weights are being loaded before x, which the products wait for first; x is nearly always in the L1 cache.
        tl.debug_barrier()
        x = tl.load(q_ptr + at, mask=inside, other=0)
        sums += tl.sum(tl.reshape(products(w, x[None, :], INSTRUCTION), (BN, W // 4, 4)), axis=2)
        if OUTLIERS:
            # Drop the bits of later blocks; the right shift below drops those of earlier blocks.
            bits <<= 32 - BK // 128 - block % 32  # type: ignore[possibly-undefined]
            if bits != 0:
                counts = ((bits >> (tl.arange(0, W) * WORD // 128 + 32 - BK // 128)) & 1) != 0
                x = tl.load(q_ptr + words + at, mask=inside & counts, other=0)
                sums += 256 * tl.sum(tl.reshape(products(w, x[None, :], INSTRUCTION), (BN, W // 4, 4)), axis=2)
    y = tl.sum(sums, axis=1).to(tl.float32) * row_scale
    row = tl.zeros((1,), tl.int32)
    finish(y[None, :], y_ptr, outputs, row, column, 1, N, n0, n1, ACTIVATION, PARTS, 1, BN)
