"""Calls of `weight_only`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.quantize.launch import digits_of, launch_fixed_point
from int8compile.triton_kernels.weight_only.kernel import weight_only

BN, BK = 64, 128


def tile_rows(m: int) -> int:
    """Return the rows of a tile for M rows."""
    return 16 if m <= 16 else 32


def launches(
    x: Tensor, d: Tensor | None, qweight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
) -> list[Launch]:
    """Multiply x [M, K], its rows contiguous, into y [M, N]."""
    (m, k), n = x.shape, qweight.shape[0]
    digits = x.new_empty((4, m, k), dtype=torch.int8)
    unit = x.new_empty(m, dtype=torch.float32)
    bm = tile_rows(m)
    product = Launch(
        weight_only,
        m,
        (Programs(rows=bm), Programs(math.ceil(n / BN))),
        {
            "X_ptr": digits,
            "unit_ptr": unit,
            "weight_ptr": qweight,
            "scale_ptr": scale,
            "bias_ptr": bias,
            "y_ptr": y,
            "M": m,
            "N": n,
            "K": k,
        },
        {"HAS_BIAS": bias is not None, "DIGITS": digits_of(d), "BM": bm, "BN": BN, "BK": BK},
    )
    return [launch_fixed_point(x, d, digits, unit), product]
