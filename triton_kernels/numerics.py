"""Device code that several kernels share: a tile's integer sums, and the epilogue that scales and stores them.

An argument of one of these names means the same in all kernels and device functions:

    q_ptr: The activations' digits: [2, M, K] int8, or [1, M, K] without outliers. For this and the next two see
        `int8compile.ops.quantized`.
    rows_ptr: [1 + W, M] int32, the rows' scales and the bits of their blocks with second digits.
    counters_ptr: [512] int32, zero before and after the kernel.
    weight_ptr: [N, K] int8, rows `stride_n` elements apart.
    scale_ptr: [N] float32.
    bias_ptr: [N], any float dtype; None for no bias.
    y_ptr: The result, contiguous: [M, N], or [M, N / 2] for SILU_MUL; several parts lie one after the other.
    partials_ptr: [programs per tile, M, N] int32, uninitialized; None where each tile has one program.
    M, N, K: Rows, outputs, inputs.
    n0, n1: Number of outputs in the first of several parts and in the second of three; 0 where there is none.
    row, column: [BM] and [BN], indices of the tile's rows and outputs.
    first, last: Range of inputs: `first` is included, `last` is not and may be larger than K.
    OVERLAP: Whether the program may start while the kernel before it runs: see `wait_for_inputs`.
    ACTIVATION: One of the constants from NONE on. SILU_MUL takes gate and up from even and odd outputs.
    PARTS: One of the constants from WHOLE on.
    OUTLIERS: Whether there are second digits.
    WORDS: A power of two, at least W; 0 without outliers.
    BM, BN, BK: Rows and outputs of a tile, inputs per step of the main loop.
    GROUP_M: Number of row tiles whose programs run together.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Activation functions, applied before the result is rounded; numbered as in int8compile.ops.quantized.ACTIVATIONS.
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)
GELU_TANH = tl.constexpr(4)
SILU_MUL = tl.constexpr(5)

# Layout of the result: one [M, N]; parts of several sizes one after the other; the same, with each tile in one part.
WHOLE = tl.constexpr(1)
SCATTERED = tl.constexpr(2)
TILED = tl.constexpr(3)


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the kernels before this one have ended, and let the next one start.

    This is CUDA's programmatic dependent launch, available from compute capability 9.0 on: a kernel starts while the
    one before it ends. Before this call a program may only compute addresses and prefetch (see `prefetch`), because
    the earlier kernel may still write to any memory, weights included.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(ptr):
    """Load the cache lines of addresses into the L2 cache. It is coherent, so the memory may still be written."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr], tl.int32, False, 1)


@triton.jit
def lowest_bit(bits):
    """Return the index of the lowest set bit of a nonzero int32: the exponent of a power of two."""
    power = (bits & -bits).to(tl.uint32, bitcast=True).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def row_scales(rows_ptr, row, inside):
    """Return the float32 scales of rows, 0 where `inside` is false."""
    return tl.load(rows_ptr + row, mask=inside, other=0).to(tl.float32, bitcast=True)


@triton.jit
def second_digits(
    q_ptr, rows_ptr, w_ptr, row, x_inside, w_inside, M, K, first, last, BM: tl.constexpr, BN: tl.constexpr
):
    """Return 256 times a tile's sums over second digits, int32 [BM, BN].

    Blocks of 128 inputs without a second digit in any row are skipped. In other blocks only rows that have one are
    read: the digits of other rows are uninitialized memory.

    Arguments besides those above:
        w_ptr: [1, BN] pointers to the weight's rows.
        x_inside: [BM], true for rows that exist.
        w_inside: [1, BN], true for outputs that exist.
        first: A multiple of 128.
        last: A multiple of 128, or at least K.
    """
    acc = tl.zeros((BM, BN), tl.int32)
    x_ptr = q_ptr + (M.to(tl.int64) + row)[:, None] * K
    for word in range(first // 4096, tl.cdiv(tl.minimum(last, K), 4096)):
        own = tl.load(rows_ptr + M.to(tl.int64) * (1 + word) + row, mask=x_inside, other=0)
        # Blocks before `first` and from `last` on belong to other programs.
        bits = tl.reduce_or(own, 0) & (-1 << (tl.maximum(first - word * 4096, 0) // 128))
        while bits != 0:
            block = lowest_bit(bits)
            bits &= bits - 1
            begin = (word * 32 + block) * 128
            if begin < last:
                counts = (((own >> block) & 1) != 0)[:, None]
                # Short steps without pipelining: this runs rarely, and the main loop needs the registers.
                acc = add_products(acc, x_ptr, w_ptr, counts, w_inside, begin, begin + 128, K, 64, 1)
    return acc << 8


@triton.jit
def add_products(acc, x_ptr, w_ptr, x_inside, w_inside, first, last, K, BK: tl.constexpr, STAGES: tl.constexpr = None):
    """Add a tile's products to its int32 sums and return them.

    Triton's mma.sync saturates, so the caller has to keep the sums below 2**31.

    Arguments besides those above:
        acc: [BM, BN] int32.
        x_ptr: [BM, 1] pointers to the rows of digits.
        w_ptr: [1, BN] pointers to the weight's rows.
        x_inside: [BM, 1], true for rows that exist.
        w_inside: [1, BN], true for outputs that exist.
        last: `first` plus a multiple of BK, or at least K.
        STAGES: Pipeline stages; None for the launch's `num_stages`.
    """
    for k in tl.range(first, last, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        x = tl.load(x_ptr + at[None, :], mask=x_inside & (at[None, :] < K), other=0)
        # Read as [K, N]: 8-bit matrix instructions need both factors contiguous along K.
        w = tl.load(w_ptr + at[:, None], mask=w_inside & (at[:, None] < K), other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Return the activation function of y, in float32."""
    if ACTIVATION == RELU:
        # tl.maximum is not guaranteed to keep NaN.
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == SILU:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # sigmoid(2 z) equals (1 + tanh(z)) / 2 without the cancellation.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def of_outputs(scale_ptr, bias_ptr, column, N):
    """Return a tuple of the outputs' scales and, if there is a bias, their biases: float32, [BN] each.

    Kernels load them as early as their registers allow.
    """
    inside = column < N
    outputs = (tl.load(scale_ptr + column, mask=inside, other=0.0),)
    if bias_ptr is not None:  # Triton 3.6 cannot return None instead.
        outputs += (tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return outputs


@triton.jit
def affine(y, outputs):
    """Return `y * s_w + bias`, each operation rounded to float32; y is `acc * s_x`, [BM, BN]."""
    y = y * outputs[0][None, :]
    if len(outputs) > 1:
        y = y + outputs[1][None, :]
    return y


@triton.jit
def gated(gate, up):
    """Return `silu(gate) * up`."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def places(row, column, M, N, n0, n1, PARTS: tl.constexpr):
    """Return the offsets of a tile's results from `y_ptr`, int64 [BM, BN]."""
    if PARTS == WHOLE:
        at = row.to(tl.int64)[:, None] * N + column[None, :]
    else:
        # A scalar where a tile lies in one part, so that the compiler can vectorize the stores.
        first = tl.min(column, axis=0) if PARTS == TILED else column
        begin = tl.where(first < n0, 0, tl.where(first < n0 + n1, n0, n0 + n1))
        size = tl.where(first < n0, n0, tl.where(first < n0 + n1, n1, N - n0 - n1))
        at = begin.to(tl.int64) * M + (column - begin)
        if PARTS == TILED:
            at = row.to(tl.int64)[:, None] * size + at[None, :]
        else:
            at = row.to(tl.int64)[:, None] * size[None, :] + at[None, :]
    return at


@triton.jit
def finish(
    y,
    y_ptr,
    outputs,
    row,
    column,
    M,
    N,
    n0,
    n1,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Scale, activate, round and store a tile: `activation(acc * s_x * s_w + bias)`, rounded once to y's dtype.

    Arguments besides those above:
        y: [BM, BN] float32, `acc * s_x`.
        outputs: See `of_outputs`.
    """
    y = affine(y, outputs)
    if ACTIVATION == SILU_MUL:
        gate, up = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        y = gated(gate, up)
        column = tl.min(column, axis=0) // 2 + tl.arange(0, BN // 2)
        N = N // 2
    else:
        y = activate(y, ACTIVATION)
    at = places(row, column, M, N, n0, n1, PARTS)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < M) & (column[None, :] < N))
