"""Calls of the kernels for float activations: `fixed_point`, then `weight_only`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.quantize.launch import digits_of, fixed_point_launch
from int8compile.triton_kernels.weight_only.kernel import weight_only

BN, BK = 64, 128


def tile_rows(m: int) -> int:
    """Return the rows of a tile for M rows."""
    return 16 if m <= 16 else 32


def weight_only_launches(
    x: Tensor, d: Tensor | None, qweight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
) -> list[Launch]:
    """Return the calls that multiply x [M, K], whose rows are contiguous, with a weight into y [M, N]."""
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
        {"DIGITS": digits_of(d), "BM": bm, "BN": BN, "BK": BK},
    )
    return [fixed_point_launch(x, d, digits, unit), product]
