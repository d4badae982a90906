"""A literal transcription of NUMERICS in Python's floats and integers, and rows to compute with it."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from int8compile.ops.reference import rotation_of

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Relative error of one rounding in float32.
U = 2.0**-24

SEEDS = st.integers(0, 2**31 - 1)

# For each B, runs of one, an odd and an even number of elements.
SIZES = (1, 2, 7, 8, 40, 100, 16, 48, 80, 32, 96, 160, 64, 192, 128, 384, 640)

Row = list[float]


def f32(value: float) -> float:
    """Round to float32, half to even."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:  # half an ulp above the largest float32
        return math.copysign(math.inf, value)


def spec_absmax(row: Row, statistic: float) -> tuple[list[int], float]:
    """Return `q = rne(x * 127/absmax)` and `s = absmax/127`, in float32; a zero row gives q = 0, s = 0.

    `127 / tensor` is `tensor.reciprocal() * 127` in PyTorch, rounded twice, in bitsandbytes too. It decides ties.
    """
    if statistic < 2.0**-120:
        return [0] * len(row), 0.0
    inverse = f32(127 * f32(1 / statistic))
    return [round(f32(value * inverse)) for value in row], f32(statistic / 127)  # round() is half to even


def spec_size(k: int) -> int:
    """Return B: the largest power of two that divides K, at most 128; 1 below 16."""
    size = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if k % size == 0) if k else 1
    return size if size >= 16 else 1


def spec_hadamard(x: list[int], size: int) -> list[int]:
    """Return `x'[i*C + j] = sum_b H[i,b] * x[b*C + j]`."""
    run = len(x) // size if x else 0
    return [
        sum((-1) ** (i & b).bit_count() * x[b * run + j] for b in range(size)) for i in range(size) for j in range(run)
    ]


def factors(K: int, size: float = 1.0) -> Tensor:
    """Return a d for K inputs."""
    return rotation_of(0.25 + 2 * torch.rand(K)) * size


def attacks(K: int) -> Tensor:
    """Return rows that come closest to an overflow of the int32 sum (NUMERICS, 3).

    They have two values in several shares and ratios, or are one-hot, massive or alternating.
    """
    rows = [torch.ones(K), torch.zeros(K).index_fill(0, torch.tensor([K // 2]), 1.0)]
    for share, ratio in (
        (0.5, 1.0),
        (0.083, 11.9),
        (0.083, 12.0),
        (0.5, 2.01),
        (0.9, 1.1),
        (0.003, 300.0),
        (1e-4, 1e4),
    ):
        rows.append(torch.where(torch.rand(K) < share, ratio, 1.0))
        # Just above half a step, so that all round up.
        rows.append(torch.where(torch.rand(K) < share, 127 * ratio, 126.5001))
    rows.append(torch.where(torch.arange(K) % 2 == 0, 127.0, -126.51))
    massive = torch.randn(K)
    massive[K // 3] = 1e6
    return torch.stack([*rows, massive])
