"""Calls of the kernels that quantize activations."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from int8compile.ops.reference import QMAX, rotation
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.quantize.kernel import fixed_point, quantize_rows

# Elements of a row that are looked at together, in registers.
MAX_ELEMENTS = 16384


def launch(x: Tensor, d: Tensor | None, threshold: float, q: Tensor, rows: Tensor) -> Launch:
    """Quantize x [M, K], its rows contiguous, into what `int8compile.ops.quantized.empty_rows` made."""
    c2 = threshold / (QMAX * x.shape[1]) if threshold else 2.0**100
    constants = {"OUTLIERS": q.shape[0] > 1}
    return _launch(quantize_rows, x, d, {"q_ptr": q, "rows_ptr": rows}, {"c2": c2}, constants)


def launch_fixed_point(x: Tensor, d: Tensor | None, digits: Tensor, unit: Tensor) -> Launch:
    """Write x [M, K], its rows contiguous, as digits [4, M, K] of rotated integers, with units [M] float32."""
    return _launch(fixed_point, x, d, {"X_ptr": digits, "unit_ptr": unit}, {}, {"DIGITS": digits_of(d)})


def digits_of(d: Tensor | None) -> int:
    """Return how many digits hold the largest integer of fixed point: 2**22, or 2**29 where it is rotated."""
    return 3 if rotation(d) == 1 else 4


def _launch(
    kernel: Any, x: Tensor, d: Tensor | None, into: dict[str, Tensor], more: dict[str, float], constants: dict[str, Any]
) -> Launch:
    m, k = x.shape
    b = rotation(d)
    bc = min(triton.next_power_of_2(k // b), MAX_ELEMENTS // b)
    return Launch(
        kernel,
        m,
        (Programs(rows=1),),
        {"x_ptr": x, "d_ptr": d, **into, "stride_m": x.stride(0), "M": m, "C": k // b, **more},
        {**constants, "LOG_B": b.bit_length() - 1, "BC": bc, "CHUNKS": triton.cdiv(k // b, bc)},
        num_warps=min(max(b * bc // 1024, 1), 16),
    )
