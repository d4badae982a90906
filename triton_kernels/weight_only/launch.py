"""Calls of `weight_only`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.quantize.launch import launch_fixed_point
from int8compile.triton_kernels.weight_only.kernel import weight_only

BN, BK = 8, 512


def empty_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate x [M, K] in fixed point: integers [M, K], and what they are multiplied with [M]."""
    return x.new_empty(x.shape, dtype=torch.int32), x.new_empty(x.shape[:1], dtype=torch.float32)


def launches(
    x: Tensor, d: Tensor | None, qweight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
) -> list[Launch]:
    """Multiply x [M, K], its rows contiguous, into y [M, N]."""
    (m, k), n = x.shape, qweight.shape[0]
    integers, unit = empty_integers(x)
    product = Launch(
        weight_only,
        m,
        (Programs(rows=1), Programs(math.ceil(n / BN))),
        {
            "X_ptr": integers,
            "unit_ptr": unit,
            "weight_ptr": qweight,
            "scale_ptr": scale,
            "bias_ptr": bias,
            "y_ptr": y,
            "M": m,
            "N": n,
            "K": k,
        },
        {"HAS_BIAS": bias is not None, "BN": BN, "BK": BK},
    )
    return [launch_fixed_point(x, d, integers, unit), product]
