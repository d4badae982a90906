"""`linear` in operators of PyTorch alone, for exported graphs on devices for which no kernel of ours can be packed.

Inductor compiles them: to Triton kernels around cuBLAS's int8 product on a GPU. The two steps are those of
`quantized.py`; integers are those of the reference, and outliers are integers too (`digits`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from int8compile.ops import digits, reference
from int8compile.ops.digits import SCALE, SPECIAL, UNIT
from int8compile.ops.quantized import flattened

# cuBLAS wants sizes in multiples of this, and at least so many rows.
_MULTIPLE, _ROWS = 8, 32


def quantize_rows(x: Tensor, threshold: float, outliers: str) -> tuple[Tensor, Tensor]:
    """Quantizes activations, once for every linear that reads them.

    Shapes:
        x: [..., K], float32, float16 or bfloat16; result: planes [1 + digits, M, K] int8 and rows [4, M] float32, see
            `digits.Activations`.
    """
    made = digits.quantize_rows(flattened(x), threshold, outliers)
    return made.planes, made.rows


def quantized_linear(
    planes: Tensor, rows: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    """The rest of `reference.linear`, rounded once to x's dtype; rows of x with NaN or Inf become NaN.

    Shapes:
        planes, rows: What `quantize_rows` made of x; qweight: [N, K] int8; scale: [N] float32; bias: [N]; x: [..., K];
            result: [..., N].
    """
    count, m, k = planes.shape
    sums = _int_matmul(planes.reshape(count * m, k), qweight).view(count, m, qweight.shape[0])
    y = sums[0] * rows[SCALE, :, None]
    if count > 1:
        powers = 256.0 ** torch.arange(count - 1, dtype=torch.float64, device=x.device)
        # Exact in float64, rounded once.
        out = (sums[1:] * powers[:, None, None]).sum(dim=0) * rows[UNIT, :, None]
        y = y + out.to(torch.float32)
    y = torch.where(rows[SPECIAL, :, None] == 0, y, math.nan) * scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
) -> Tensor:
    """Linears of B independent weights, as `reference.batched_linear`.

    Shapes:
        x: [B, M, K]; qweight: [B, N, K] int8; scale: [B, N] float32; bias: [B, N]; result: [B, M, N] in x's dtype.
    """
    return reference.each_of(_linear, x, qweight, scale, bias, threshold, outliers)


def _linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str) -> Tensor:
    return quantized_linear(*quantize_rows(x, threshold, outliers), qweight, scale, bias, x)


def _int_matmul(q: Tensor, qweight: Tensor) -> Tensor:
    """As `reference.int_matmul`, by cuBLAS where there is one. oneDNN's product is wrong on CPUs without VNNI."""
    if not q.is_cuda:
        return reference.int_matmul(q, qweight)
    (m, k), n = q.shape, qweight.shape[0]
    q = torch.nn.functional.pad(q, (0, -k % _MULTIPLE, 0, _ROWS))
    qweight = torch.nn.functional.pad(qweight, (0, -k % _MULTIPLE, 0, -n % _MULTIPLE))
    return torch._int_mm(q, qweight.mT)[:m, :n]
