"""Calls of the kernels that quantize activations."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from int8compile.ops.reference import QMAX, rotation
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.quantize.kernel import fixed_point, quantize_rows

# Elements of a row that are held in registers: those of 1024 threads, the most a program has. Longer rows are looked at
# several times, in chunks. So are rows of more than half the length where there are many: several programs then share
# a multiprocessor. An H200 takes 72 us instead of 88 for 2048 rows of 14336, but 9.7 instead of 5.9 for one.
MAX_ELEMENTS, CHUNK_ELEMENTS, MANY_ROWS = 16384, 8192, 1024
# Elements of a thread, of whole rows and of chunks.
THREAD_ELEMENTS, THREAD_CHUNK_ELEMENTS = 16, 32


def in_chunks(m: int, k: int) -> bool:
    """Return whether M rows of K inputs, without a norm, are looked at in chunks because there are so many."""
    return m >= MANY_ROWS and k > CHUNK_ELEMENTS


def launch(
    x: Tensor,
    d: Tensor | None,
    threshold: float,
    q: Tensor,
    rows: Tensor,
    counters: Tensor,
    ends: Tensor | None = None,
    rows_per_group: int = 0,
) -> Launch:
    """Quantize x [M, K], its rows contiguous, into what `int8compile.ops.quantized.empty_rows` made.

    With d [E, K] each row takes its expert's: `ends` [E] int32 or int64 are where the rows of each end, None for
    `rows_per_group` each. Rows beyond the last expert's are quantized with its d.
    """
    return launch_norm(x, None, None, None, d, None, 0.0, threshold, None, q, rows, counters, ends, rows_per_group)


def launch_norm(
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
    """Quantize a norm of x [M, K], or of x + residual, which is stored in `sum`: `norm_quantize_rows`.

    x and the residual have contiguous rows, everything else is contiguous. Without a residual `sum` is not used; `kind`
    is None for no norm. `normed` [M, K], in x's dtype, gets what is quantized. For the rest see `launch`.
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
    return _launch(quantize_rows, x, d, args, constants)


def launch_fixed_point(x: Tensor, d: Tensor | None, digits: Tensor, unit: Tensor) -> Launch:
    """Write x [M, K], its rows contiguous, as digits [4, M, K] of rotated integers, with units [M] float32."""
    args = {"d_ptr": d, "X_ptr": digits, "unit_ptr": unit, "stride_m": x.stride(0), "M": x.shape[0]}
    return _launch(fixed_point, x, d, args, {"DIGITS": digits_of(d)})


def digits_of(d: Tensor | None) -> int:
    """Return how many digits hold the largest integer of fixed point: 2**22, or 2**29 where it is rotated."""
    return 3 if rotation(d) == 1 else 4


def _launch(kernel: Any, x: Tensor, d: Tensor | None, args: dict[str, Any], constants: dict[str, Any]) -> Launch:
    m, k = x.shape
    b = rotation(d)
    bc = triton.next_power_of_2(k // b)
    norm, elements = constants.get("NORM") is not None, THREAD_ELEMENTS
    # A norm of float32 needs more than the 64 registers that each of 1024 threads has.
    wide = norm and x.dtype == torch.float32
    if b * bc > (CHUNK_ELEMENTS if wide else MAX_ELEMENTS) or (in_chunks(m, k) and not norm):
        bc, elements = CHUNK_ELEMENTS // b, THREAD_ELEMENTS if norm else THREAD_CHUNK_ELEMENTS
    low = min(b, 16)
    shape = {"C": k // b, "P": b // low, "L": low, "BC": bc, "CHUNKS": triton.cdiv(k // b, bc)}
    warps = max(b * bc // (elements * (64 if torch.version.hip else 32)), 1)
    given, overlap = {"x_ptr": x, **args}, "OVERLAP" in kernel.arg_names
    return Launch(kernel, m, (Programs(rows=1),), given, {**constants, **shape}, num_warps=warps, overlap=overlap)
