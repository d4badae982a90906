"""Rows, weights and sizes for the CPU kernel, and its result beside that of the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from int8compile.ops import SUPPORTED_DTYPES, reference
from int8compile.ops.reference import TINY
from tests.helpers.implementations import operator
from tests.helpers.operators import factors

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31 - 1)

DTYPES = st.sampled_from(SUPPORTED_DTYPES)


def rows(kind: str, K: int) -> Tensor:
    """Return a row of float32 values of one kind."""
    x = torch.randn(K)
    largest = torch.finfo(torch.float32).max
    return {
        "normal": lambda: x,
        "outliers": lambda: torch.where(torch.rand(K) < 0.02, x * 40, x),
        "outliers of few bits": lambda: torch.where(torch.rand(K) < 0.02, x * 40, x).bfloat16().float(),
        "outlier columns": lambda: torch.where((torch.arange(K) % 23 == 3) & (torch.rand(K) < 0.8), x * 40, x),
        "zeros": lambda: x * 0,
        "minus zeros": lambda: torch.full((K,), -0.0),
        "mostly zeros": lambda: torch.where(torch.rand(K) < 0.9, 0.0, x),
        "one element": lambda: x * (torch.arange(K) == K // 2),
        "one huge": lambda: torch.where(torch.arange(K) == K // 3, 1e4, x),
        "constant": lambda: torch.where(x < 0, -1.5, 1.5),
        "all equal": lambda: torch.full((K,), 0.7),
        "alternating": lambda: torch.where(torch.arange(K) % 2 == 0, 3.1, -3.1),
        "ties": lambda: torch.cat([torch.tensor([127.0]), (x * 40).round() + 0.5])[:K],
        "subnormal": lambda: x * 1e-40,
        # On both sides of the limit below which a value counts as zero.
        "tiny": lambda: x / x.abs().amax().clamp(min=1e-3) * TINY if K else x,
        "huge": lambda: (x * largest / 3).clamp(-largest, largest),
        "all sizes": lambda: x * 2.0 ** torch.randint(-126, 120, (K,)),
        "few bits": lambda: x.mul(8).round() / 8,
        "NaN": lambda: torch.where(torch.rand(K) < 0.05, math.nan, x),
        "Inf": lambda: torch.where(torch.rand(K) < 0.05, math.inf, x),
        "both Infs": lambda: torch.where(torch.rand(K) < 0.1, x.sign() * math.inf, x),
    }[kind]()


KINDS = (
    "normal",
    "outliers",
    "outliers of few bits",
    "zeros",
    "minus zeros",
    "mostly zeros",
    "one element",
    "constant",
    "subnormal",
    "tiny",
)

KINDS += ("huge", "all sizes", "few bits", "NaN", "Inf", "both Infs", "one huge", "all equal", "alternating", "ties")

FINITE = ("normal", "outliers", "zeros", "mostly zeros", "one element", "constant", "few bits", "one huge", "ties")


def batch(M: int, K: int, dtype: torch.dtype, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """Return M rows of kinds chosen by torch's seed."""
    chosen = torch.randint(len(kinds), (M,)).tolist()
    x = torch.stack([rows(kinds[kind], K) for kind in chosen]) if M else torch.empty(0, K)
    return x.to(dtype)


def weights(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return int8 values that include -128, and scales that include 0, a subnormal and a large number."""
    qweight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    scale = torch.rand(N)
    for value in (0.0, 1e-40, 1e30):
        scale = torch.where(torch.rand(N) < 0.05, value, scale)
    return qweight, scale


# Not rotated; all B, with runs from 1 element to more than a vector holds.
INPUTS = st.one_of(
    st.integers(0, 80),
    st.sampled_from([127, 129, 255, 257, 1041, 4999]),
    st.sampled_from([16, 48, 112, 32, 96, 64, 192, 576, 128, 256, 384, 640, 1024, 1152, 2048, 2176, 4096]),
)

SIZES = st.tuples(
    st.one_of(st.integers(0, 9), st.integers(10, 70)), INPUTS, st.one_of(st.integers(0, 20), st.integers(21, 100))
)

ROTATIONS = st.sampled_from(["none", "signs", "factors", "overflow"])


def rotation(kind: str, K: int) -> Tensor | None:
    """Return a d of one kind.

    The last kind turns large elements into Inf, and rows that count as zero into others.
    """
    return {
        "none": lambda: None,
        "signs": lambda: reference.signs(K),
        "factors": lambda: factors(K),
        "overflow": lambda: factors(K) * 1e25,
    }[kind]()


def run(name: str, by: str, *args: Any) -> Any:
    """Run an operator in memory filled with NaN, so that elements it does not write are NaN."""
    x, _, scale, *_ = args
    size = (*x.shape[:-1], scale.shape[-1])
    for dirt in [torch.full(size, math.nan, dtype=x.dtype) for _ in range(2)]:
        del dirt
    return operator(name, by)(*args)


def both_products(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor, bias: Tensor
) -> list[tuple[str, tuple[Any, ...], Tensor]]:
    """Return the operators for packed weights, each with its last arguments and its expected result."""
    return [
        ("packed_linear_no_grad", (2.5,), reference.linear(x, qweight, scale, d, bias, 2.5)),
        ("packed_weight_only_linear_no_grad", (), reference.weight_only_linear(x, qweight, scale, d, bias)),
    ]
