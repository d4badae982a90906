"""Product of activations in fixed point, at about float32's precision, with an int8 weight.

Each int8 digit is multiplied exactly; the sums of all digits combine to one of 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8compile.triton_kernels.numerics import NONE, WHOLE, finish, of_outputs


@triton.jit(do_not_specialize=["M"])
def weight_only(
    X_ptr,
    unit_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    DIGITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute a tile of BM rows and BN outputs per program; programs of the same outputs run together.

    Arguments besides those of `numerics`:
        X_ptr: [4, M, K] int8, the digits of the activations.
        unit_ptr: [M] float32, the units of the rows' integers.
        DIGITS: Number of digits in use, 3 or 4.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    X_ptr += row.to(tl.int64)[:, None] * K
    weight_ptr += column.to(tl.int64)[None, :] * K
    plane = M.to(tl.int64) * K
    acc0 = tl.zeros((BM, BN), tl.int32)
    acc1 = tl.zeros((BM, BN), tl.int32)
    acc2 = tl.zeros((BM, BN), tl.int32)
    acc3 = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        w = tl.load(weight_ptr + at[:, None], mask=(column[None, :] < N) & (at[:, None] < K), other=0)
        to = X_ptr + at[None, :]
        inside = (row[:, None] < M) & (at[None, :] < K)
        acc0 = tl.dot(tl.load(to, mask=inside, other=0), w, acc0, out_dtype=tl.int32)
        acc1 = tl.dot(tl.load(to + plane, mask=inside, other=0), w, acc1, out_dtype=tl.int32)
        acc2 = tl.dot(tl.load(to + 2 * plane, mask=inside, other=0), w, acc2, out_dtype=tl.int32)
        if DIGITS == 4:
            acc3 = tl.dot(tl.load(to + 3 * plane, mask=inside, other=0), w, acc3, out_dtype=tl.int32)
    acc = ((acc3.to(tl.int64) * 256 + acc2) * 256 + acc1) * 256 + acc0
    y = acc.to(tl.float32) * tl.load(unit_ptr + row, mask=row < M, other=0.0)[:, None]
    outputs = of_outputs(scale_ptr, bias_ptr, column, N)
    finish(y, y_ptr, outputs, row, column, M, N, 0, 0, NONE, WHOLE, BM, BN)
