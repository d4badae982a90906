"""Calls of `weight_only_gemm`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.ops.digits import NONE
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.weight_only.kernel import weight_only_gemm

# Beyond it a product with the dequantized weight is faster.
MAX_ROWS = 64


def launch(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> Launch:
    """A product of a few float rows, x [M, K] and y [M, N]."""
    (m, k), n = x.shape, qweight.shape[0]
    bm, bn = next(rows for rows in (16, 32, 64) if rows >= min(m, 64)), 64
    return Launch(
        weight_only_gemm,
        m,
        (Programs(math.ceil(n / bn)), Programs(rows=bm)),
        {
            "x_ptr": x,
            "weight_ptr": qweight,
            "scale_ptr": scale,
            "bias_ptr": bias,
            "y_ptr": y,
            "stride_m": x.stride(0),
            "M": m,
            "N": n,
            "K": k,
        },
        {
            "HAS_BIAS": bias is not None,
            "ACTIVATION": NONE,
            "BM": bm,
            "BN": bn,
            # What two steps of fit into 64 KB.
            "BK": 64 if x.dtype == torch.float32 else 128,
        },
        num_stages=2,
    )
