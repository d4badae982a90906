"""Random inputs, and copies of weights that one pass over cannot find in the L2 cache."""

from __future__ import annotations

import torch
from torch import Tensor

from int8compile.ops import input_scales, quantize_weight, rotation_of, rotation_size

OUTLIERS = 0.003
# Copies of a weight together are this many times as large as the L2 cache: it does not evict strictly the oldest.
PASSES = 3


def activations(m: int, k: int, device: torch.device) -> Tensor:
    """Normal rows with 0.3 % of elements twenty times as large, as a language model's hidden states have.

    Shapes:
        result: [M, K] bfloat16.
    """
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    return torch.where(torch.rand(m, k, device=device) < OUTLIERS, 20 * x, x)


def with_outlier_columns(m: int, k: int, count: int, device: torch.device) -> Tensor:
    """Normal rows with `count` columns of 20 to 22: outliers for packages that know those of LLM.int8().

    Shapes:
        result: [M, K] bfloat16.
    """
    x = torch.randn(m, k, device=device)
    sign = torch.where(torch.rand(m, count, device=device) < 0.5, -1.0, 1.0)
    columns = torch.randperm(k, device=device)[:count]
    x[:, columns] = sign * (20 + 2 * torch.rand(m, count, device=device))
    return x.to(torch.bfloat16)


def with_outliers(m: int, k: int, device: torch.device) -> Tensor:
    """Normal rows with one massive element each, which stays an outlier when it is rotated.

    Shapes:
        result: [M, K] bfloat16.
    """
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    x[:, k // 2] = 1000
    return x


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight in int8, its scales, and what it is rotated with."""
    d = rotation_of(input_scales([weight])) if rotation_size(weight.shape[1]) > 1 else None
    return (*quantize_weight(weight, d), d)


def weight(k: int, n: int, device: torch.device) -> Tensor:
    """Shapes: result [N, K] bfloat16."""
    return torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)


def copies(tensor: Tensor, l2_bytes: int) -> list[Tensor]:
    """A tensor and as many copies of it as `copies_needed` says."""
    return [tensor, *(tensor.clone() for _ in range(copies_needed(tensor.nbytes, l2_bytes) - 1))]


def copies_needed(nbytes: int, l2_bytes: int) -> int:
    """How many tensors of a size, at least two, are together larger than `PASSES` times the L2 cache."""
    return max(2, PASSES * l2_bytes // nbytes + 1)
