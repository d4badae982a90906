"""Random inputs, and enough copies of a weight that none is in the L2 cache when its turn comes."""

from __future__ import annotations

import torch
from torch import Tensor

from int8compile.ops import input_scales, quantize_weight, rotation_of, rotation_size

OUTLIERS = 0.003
# All copies of a weight exceed the L2 cache this many times, since the cache does not strictly evict the oldest data.
PASSES = 3


def activations(m: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normal rows [M, K] with 0.3 % of elements twenty times as large, like language models' hidden states."""
    x = torch.randn(m, k, device=device, dtype=dtype)
    return torch.where(torch.rand(m, k, device=device) < OUTLIERS, 20 * x, x)


def with_outlier_columns(m: int, k: int, count: int, device: torch.device) -> Tensor:
    """Return normal bfloat16 rows [M, K] with `count` columns of magnitude 20 to 22, as LLM.int8() expects outliers."""
    x = torch.randn(m, k, device=device)
    sign = torch.where(torch.rand(m, count, device=device) < 0.5, -1.0, 1.0)
    columns = torch.randperm(k, device=device)[:count]
    x[:, columns] = sign * (20 + 2 * torch.rand(m, count, device=device))
    return x.to(torch.bfloat16)


def with_outliers(m: int, k: int, device: torch.device) -> Tensor:
    """Return normal bfloat16 rows [M, K] with one massive element each, which stays an outlier after the rotation."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    x[:, k // 2] = 1000
    return x


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a weight in int8, its scales, and the scales of its rotation (None without rotation)."""
    d = rotation_of(input_scales([weight])) if rotation_size(weight.shape[1]) > 1 else None
    return (*quantize_weight(weight, d), d)


def weight(k: int, n: int, device: torch.device) -> Tensor:
    """Return a random bfloat16 weight [N, K]."""
    return torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)


def copies(tensor: Tensor, l2_bytes: int) -> list[Tensor]:
    """Return a tensor and its copies, `copies_needed` in all."""
    return [tensor, *(tensor.clone() for _ in range(copies_needed(tensor.nbytes, l2_bytes) - 1))]


def copies_needed(nbytes: int, l2_bytes: int) -> int:
    """Return the number of tensors of a size, at least two, that exceed `PASSES` times the L2 cache."""
    return max(2, PASSES * l2_bytes // nbytes + 1)
