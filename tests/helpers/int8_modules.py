"""Modules that hold int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from int8compile import Int8Embedding, Int8Experts, Int8Linear, ops


def int8_linear(
    k: int = 48, n: int = 24, *, bias: bool = True, rotated: bool = True, d: Tensor | None = None, **options: Any
) -> Int8Linear:
    weight = torch.randn(n, k)
    if d is None and rotated:
        d = ops.rotation_of(ops.input_scales([weight]))
    qweight, scale = ops.quantize_weight(weight, d)
    return Int8Linear(qweight, scale, nn.Parameter(torch.randn(n)) if bias else None, d=d, **options)


def int8_experts(rotated: str = "together", **options: Any) -> Int8Experts:
    weight = torch.randn(3, 24, 48)
    d = {
        "not": None,
        "together": ops.rotation_of(ops.input_scales(list(weight))),
        "each": torch.stack([ops.rotation_of(ops.input_scales([each])) for each in weight]),
    }[rotated]
    return Int8Experts(*ops.quantize_weight(weight, d), d=d, **options)


def int8_embedding(**options: Any) -> Int8Embedding:
    return Int8Embedding(*ops.quantize_weight(torch.randn(50, 16), None), **options)
