"""One linear layer, compiled: int8 against float32 and bfloat16, over the rows that decode and prefill have.

Run with `make bench`, or `python -m pytest benchmarks/bench_linear.py --benchmark-only`. Compare the groups' medians
of one run; pytest-benchmark's `--benchmark-compare` finds regressions between two commits on one machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

SHAPES = [(576, 1536), (2048, 2048)]
ROWS = [1, 32, 512]
OUTLIERS = 0.003


def activations(m: int, k: int) -> torch.Tensor:
    """Normal rows with 0.3 % of elements twenty times as large, as a language model's hidden states have."""
    x = torch.randn(m, k)
    return torch.where(torch.rand(m, k) < OUTLIERS, 20 * x, x)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("k", "n"), SHAPES, ids=[f"{k}x{n}" for k, n in SHAPES])
@pytest.mark.parametrize("variant", ["float32", "bfloat16", "int8"])
def test_linear(benchmark: Any, variant: str, k: int, n: int, m: int) -> None:
    """Times one call; `group` puts the variants of a shape side by side."""
    benchmark.group = f"linear M={m} K={k} N={n}"
    torch._dynamo.reset()
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    layer = nn.Linear(k, n).to(dtype).requires_grad_(False)
    x = activations(m, k).to(dtype)
    compiled = torch.compile(layer, backend="int8" if variant == "int8" else "inductor", fullgraph=True)
    with torch.inference_mode():
        compiled(x)  # Compiles.
        y = benchmark(compiled, x)
    assert y.shape == (m, n)
