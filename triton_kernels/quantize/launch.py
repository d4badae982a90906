"""Calls of the kernels that quantize activations: `quantize_rows` and `fixed_point`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from int8compile.ops.reference import QMAX, rotation
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.quantize.kernel import fixed_point, quantize_rows

# A program of 1024 threads, the most there can be, holds MAX_ELEMENTS of a row in registers. Longer rows are read more
# than once, in chunks. So are rows longer than CHUNK_ELEMENTS if there are MANY_ROWS: several programs can then share a
# multiprocessor. With chunks an H200 takes 72 us instead of 88 for 2048 rows of 14336, but 9.7 instead of 5.9 for one.
MAX_ELEMENTS, CHUNK_ELEMENTS, MANY_ROWS = 16384, 8192, 1024
# Elements per thread; more where there are MANY_ROWS.
THREAD_ELEMENTS, MANY_ROWS_ELEMENTS = 16, 32


def in_chunks(m: int, k: int) -> bool:
    """Return whether M rows of K inputs, without a norm, are read in chunks only because there are so many."""
    return m >= MANY_ROWS and CHUNK_ELEMENTS < k <= MAX_ELEMENTS


def quantize_launch(
    x: Tensor,
    d: Tensor | None,
    threshold: float,
    q: Tensor,
    rows: Tensor,
    counters: Tensor,
    ends: Tensor | None = None,
    rows_per_group: int = 0,
) -> Launch:
    """Return the call that quantizes x [M, K], whose rows are contiguous.

    `int8compile.ops.quantized.empty_rows` allocates q, rows and counters. If d is [E, K], each row takes the d of its
    expert: `ends` [E], int32 or int64, are the ends of the experts' rows, or None for `rows_per_group` each. Rows after
    the last expert's are quantized with the last d.
    """
    return norm_launch(x, None, None, None, d, None, 0.0, threshold, None, q, rows, counters, ends, rows_per_group)


def norm_launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d: Tensor | None,
    kind: int | None,
    eps: float,
    threshold: float,
    sum: Tensor | None,  # noqa: A002 - the result's name
    q: Tensor,
    rows: Tensor,
    counters: Tensor,
    ends: Tensor | None = None,
    rows_per_group: int = 0,
    normed: Tensor | None = None,
) -> Launch:
    """Return the call of `norm_quantize_rows`: quantize a norm of x [M, K], or of x + residual, stored in `sum`.

    x and the residual have contiguous rows, the other tensors are contiguous. Without a residual `sum` is not used;
    `kind` is None for no norm. The norm's result is also stored in `normed` [M, K], in x's dtype, unless this is None.
    The other arguments are those of `quantize_launch`.
    """
    args = {
        "residual_ptr": residual,
        "sum_ptr": None if residual is None else sum,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "normed_ptr": normed,
        "d_ptr": d,
        "ends_ptr": ends,
        "q_ptr": q,
        "rows_ptr": rows,
        "counters_ptr": counters,
        "stride_m": x.stride(0),
        "residual_stride_m": 0 if residual is None else residual.stride(0),
        "M": x.shape[0],
        "rows_per_group": rows_per_group,
        "c2": threshold / (QMAX * x.shape[1]) if threshold else 2.0**100,
        "eps": eps,
    }
    constants = {
        "OUTLIERS": q.shape[0] > 1,
        "NORM": kind,
        "EXPERTS": d.shape[0] if d is not None and d.dim() == 2 else 0,
        "COUNTERS": counters.shape[0],
        "WORDS": triton.next_power_of_2(max(rows.shape[0] - 1, 1)),
    }
    return _launch_of(quantize_rows, x, d, args, constants)


def fixed_point_launch(x: Tensor, d: Tensor | None, digits: Tensor, unit: Tensor) -> Launch:
    """Return the call that writes x [M, K] as digits [4, M, K] of rotated integers, with units [M] float32."""
    args = {"d_ptr": d, "X_ptr": digits, "unit_ptr": unit, "stride_m": x.stride(0), "M": x.shape[0]}
    return _launch_of(fixed_point, x, d, args, {"DIGITS": digits_of(d)})


def digits_of(d: Tensor | None) -> int:
    """Return the number of digits for the largest fixed-point integer: 2**22, or 2**29 after a rotation."""
    return 3 if rotation(d) == 1 else 4


def _launch_of(kernel: Any, x: Tensor, d: Tensor | None, args: dict[str, Any], constants: dict[str, Any]) -> Launch:
    m, k = x.shape
    b = rotation(d)
    bc = triton.next_power_of_2(k // b)
    norm, elements = constants.get("NORM") is not None, THREAD_ELEMENTS
    # A norm of float32 needs more than 64 registers per thread, which is all that 1024 threads have.
    wide = norm and x.dtype == torch.float32
    if b * bc > (CHUNK_ELEMENTS if wide else MAX_ELEMENTS):
        bc = CHUNK_ELEMENTS // b
    elif in_chunks(m, k) and not norm:
        bc, elements = CHUNK_ELEMENTS // b, MANY_ROWS_ELEMENTS
    low = min(b, 16)
    shape = {"C": k // b, "P": b // low, "L": low, "BC": bc, "CHUNKS": triton.cdiv(k // b, bc)}
    warps = max(b * bc // (elements * (64 if torch.version.hip else 32)), 1)
    given, overlap = {"x_ptr": x, **args}, "OVERLAP" in kernel.arg_names
    return Launch(kernel, m, (Programs(rows=1),), given, {**constants, **shape}, num_warps=warps, overlap=overlap)
