"""Device code that several kernels share: the sums of a tile's products, the epilogue.

Arguments of the same name are the same in all kernels and device functions:

    q_ptr, rows_ptr, counters_ptr: Quantized activations (`int8compile.ops.quantized`): [2, M, K] int8, or [1, M, K]
        without outliers; [1 + W, M] int32; [512] int32 zeros, which they are again in the end.
    weight_ptr: [N, K] int8, rows `stride_n` elements apart.
    scale_ptr: [N] float32.
    bias_ptr: [N], any float dtype; None where HAS_BIAS is false.
    y_ptr: [M, N], or [M, N / 2] for SILU_MUL, contiguous; or the parts one behind the other.
    partials_ptr: [programs of a tile, M, N] int32, uninitialized; None where each tile has one program.
    M, N, K: Rows, outputs, inputs.
    n0, n1: Outputs of the first of several parts, and of the second of three; 0 where there is none.
    row, column: [BM] and [BN], numbers of the tile's rows and outputs.
    first, last: The input to begin at, and the one to end before, which may be larger than K.
    OVERLAP: Whether the program may start while the kernel before it runs: see `wait_for_inputs`.
    HAS_BIAS: Whether there is a bias.
    ACTIVATION: See NONE and following. SILU_MUL takes gate and up from even and odd outputs.
    PARTS: See WHOLE and following.
    OUTLIERS: Whether there are second digits.
    WORDS: A power of two of at least W, or 0 without outliers.
    BM, BN, BK: Rows and outputs of a tile, inputs of a step.
    GROUP_M: Row tiles whose programs run together.
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
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the kernels before this one have ended, and let the next one start.

    This is programmatic dependent launch, of CUDA from compute capability 9.0 on: a kernel starts while the one before
    it ends. Until it has waited, a program only computes addresses and prefetches (see `prefetch`): that one may have
    written anything, weights too.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(ptr):
    """Have the L2 cache fetch the lines of addresses. It is coherent, so they may still be written."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr], tl.int32, False, 1)


@triton.jit
def lowest_bit(bits):
    """Return the number of the lowest bit that is set, of an int32 that is not 0: the exponent of a power of two."""
    power = (bits & -bits).to(tl.uint32, bitcast=True).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def row_scales(rows_ptr, row, inside):
    """Return the float32 scales of rows; 0 for those that are not inside."""
    return tl.load(rows_ptr + row, mask=inside, other=0).to(tl.float32, bitcast=True)


@triton.jit
def second_digits(
    q_ptr, rows_ptr, w_ptr, row, x_inside, w_inside, M, K, first, last, BM: tl.constexpr, BN: tl.constexpr
):
    """Return 256 times the sums of the second digits of a tile, int32 [BM, BN].

    Blocks of 128 inputs in which none of the rows has one are skipped. Elsewhere only rows with one are read: those of
    the others need not have been written.

    Arguments besides those above:
        w_ptr: [1, BN], where rows of the weight begin.
        x_inside: [BM], which rows count.
        w_inside: [1, BN], which outputs there are.
        first: A multiple of 128.
        last: A multiple of 128, or at least K.
    """
    acc = tl.zeros((BM, BN), tl.int32)
    x_ptr = q_ptr + (M.to(tl.int64) + row)[:, None] * K
    for word in range(first // 4096, tl.cdiv(tl.minimum(last, K), 4096)):
        own = tl.load(rows_ptr + M.to(tl.int64) * (1 + word) + row, mask=x_inside, other=0)
        # Blocks before `first` and from `last` on are for others.
        bits = tl.reduce_or(own, 0) & (-1 << (tl.maximum(first - word * 4096, 0) // 128))
        while bits != 0:
            block = lowest_bit(bits)
            bits &= bits - 1
            begin = (word * 32 + block) * 128
            if begin < last:
                counts = (((own >> block) & 1) != 0)[:, None]
                # In short steps that are not pipelined: it runs seldom, and the main loop needs the registers.
                acc = add_products(acc, x_ptr, w_ptr, counts, w_inside, begin, begin + 128, K, 64, 1)
    return acc << 8


@triton.jit
def add_products(acc, x_ptr, w_ptr, x_inside, w_inside, first, last, K, BK: tl.constexpr, STAGES: tl.constexpr = None):
    """Add a tile's products to its int32 sums, which the caller keeps below 2**31: Triton's mma.sync saturates.

    Arguments besides those above:
        acc: [BM, BN] int32.
        x_ptr: [BM, 1], where rows of digits begin.
        w_ptr: [1, BN], where rows of the weight begin.
        x_inside: [BM, 1], which rows count.
        w_inside: [1, BN], which outputs there are.
        last: `first` and a multiple of BK, or at least K.
        STAGES: Steps in flight; None for those of the launch.
    """
    for k in tl.range(first, last, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        x = tl.load(x_ptr + at[None, :], mask=x_inside & (at[None, :] < K), other=0)
        # Read as [K, N]: 8-bit matrix instructions want both factors with K contiguous.
        w = tl.load(w_ptr + at[:, None], mask=w_inside & (at[:, None] < K), other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Return an activation function of y, in float32."""
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
def of_outputs(scale_ptr, bias_ptr, column, N, HAS_BIAS: tl.constexpr):
    """Return the scales and the addends of outputs, float32. Kernels load them before they wait for anything else."""
    inside = column < N
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
    bias = scale
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return scale, bias


@triton.jit
def affine(y, scale, bias, HAS_BIAS: tl.constexpr):
    """Return `y * s_w + bias`, each rounded to float32; y is `acc * s_x`, [BM, BN], the others are `of_outputs`."""
    y = y * scale[None, :]
    if HAS_BIAS:
        y = y + bias[None, :]
    return y


@triton.jit
def gated(gate, up):
    """Return `silu(gate) * up`."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def places(row, column, M, N, n0, n1, PARTS: tl.constexpr):
    """Return where results go, [BM, BN] int64."""
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
    return at


@triton.jit
def finish(
    y,
    y_ptr,
    scale,
    bias,
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
    """Store results, the end of every kernel: `acc * s_x * s_w + bias`, the activation, one rounding.

    Arguments besides those above:
        y: [BM, BN] float32, `acc * s_x`.
        scale: [BN], see `of_outputs`.
        bias: [BN], if there is one.
    """
    y = affine(y, scale, bias, HAS_BIAS)
    if ACTIVATION == SILU_MUL:
        gate, up = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        y = gated(gate, up)
        column = tl.min(column, axis=0) // 2 + tl.arange(0, BN // 2)
        N = N // 2
    else:
        y = activate(y, ACTIVATION)
    at = places(row, column, M, N, n0, n1, PARTS)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < M) & (column[None, :] < N))
