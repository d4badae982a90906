"""Compute `linear` by PyTorch's operators alone, for exported graphs on devices for which a package has no kernels.

Inductor compiles them; on a GPU they become Triton kernels around cuBLAS's int8 product. The two steps are those of
`quantized.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int8compile.ops import quantized, reference

# Digits of 8 bits for an integer in fixed point, which is at most 2**29.
DIGITS = 4
# cuBLAS needs sizes that are multiples of 8, and at least 32 rows.
_MULTIPLE, _ROWS = 8, 32


def quantized_linear(
    q: Tensor, row_scale: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    """Return the second step of `reference.linear`, rounded once to x's dtype.

    Shapes:
        q, row_scale: The results of `quantized.row_digits` for x; qweight: [N, K] int8; scale: [N] float32; bias: [N];
            x: [..., K]; result: [..., N].
    """
    y = quantized.affine_product(q, row_scale, qweight, scale, bias, _int_matmul)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    """Return `reference.batched_linear`: linears of B independent weights.

    Shapes:
        x: [B, M, K]; qweight: [B, N, K] int8; scale: [B, N] float32; d: [K] or [B, K]; bias: [B, N]; result: [B, M, N]
            in x's dtype.
    """
    return reference.each_of(_linear, x, qweight, scale, d, bias, threshold)


def weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `reference.weight_only_linear`. It uses float64 on CPUs only, because many GPUs are slow at it.

    Shapes:
        As in `reference.linear`.
    """
    compute = weight_only_by_digits if x.is_cuda else reference.weight_only_linear
    return compute(x, qweight, scale, d, bias)


def weight_only_by_digits(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `reference.weight_only_linear` by int8 products of digits, which are exact too."""
    rest, unit, _ = reference.fixed_point(quantized.flattened(x), d)
    digits = []
    for _ in range(DIGITS):
        digits.append((((rest + 128) & 255) - 128).to(torch.int8))
        rest = (rest + 128) >> 8
    sums = _int_matmul(torch.cat(digits), qweight).view(DIGITS, *unit.shape, qweight.shape[0])
    powers = 256 ** torch.arange(DIGITS, device=x.device)
    y = (sums * powers[:, None, None]).sum(dim=0).to(torch.float32) * unit[:, None] * scale
    y = y if bias is None else y + bias.to(torch.float32)
    return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


def _linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    return quantized_linear(*quantized.row_digits(x, d, threshold), qweight, scale, bias, x)


def _int_matmul(q: Tensor, qweight: Tensor) -> Tensor:
    """Return `reference.int_matmul`, by cuBLAS on GPUs. On CPUs without VNNI oneDNN's product is wrong."""
    if not q.is_cuda:
        return reference.int_matmul(q, qweight)
    (m, k), n = q.shape, qweight.shape[0]
    q = torch.nn.functional.pad(q, (0, -k % _MULTIPLE, 0, _ROWS))
    qweight = torch.nn.functional.pad(qweight, (0, -k % _MULTIPLE, 0, -n % _MULTIPLE))
    return torch._int_mm(q, qweight.mT)[:m, :n]
