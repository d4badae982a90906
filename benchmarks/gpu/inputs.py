"""Random inputs, and copies of weights that one pass over cannot find in the L2 cache."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Normal rows with outliers in all elements of exactly `count` columns, and nowhere else.

    At 20 to 22 they are above six times the rms, which they raise to at most 3, while `count` is at most K / 64; what
    is normal stays below six times 1.

    Shapes:
        result: [M, K] bfloat16.

    Raises:
        ValueError: There are too many: they would be no outliers any more.
    """
    if count * 64 > k:
        raise ValueError(f"{count} outlier columns of {k}: give at most {k // 64}")
    x = torch.randn(m, k, device=device).clamp(-5.5, 5.5)
    sign = torch.where(torch.rand(m, count, device=device) < 0.5, -1.0, 1.0)
    columns = torch.randperm(k, device=device)[:count]
    x[:, columns] = sign * (20 + 2 * torch.rand(m, count, device=device))
    return x.to(torch.bfloat16)


def weight(k: int, n: int, device: torch.device) -> Tensor:
    """Shapes: result [N, K] bfloat16."""
    return torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)


def copies(tensor: Tensor, l2_bytes: int) -> list[Tensor]:
    """A tensor and as many copies of it as `copies_needed` says."""
    return [tensor, *(tensor.clone() for _ in range(copies_needed(tensor.nbytes, l2_bytes) - 1))]


def copies_needed(nbytes: int, l2_bytes: int) -> int:
    """How many tensors of a size, at least two, are together larger than `PASSES` times the L2 cache."""
    return max(2, PASSES * l2_bytes // nbytes + 1)
