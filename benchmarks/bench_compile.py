"""Compile time that the backend adds: passes and quantization, without Inductor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from int8compile import Int8Config
from int8compile.backend import copy_graph, rewrite_captured
from int8compile.groups import make_d
from int8compile.ops import quantize_weight


class Blocks(nn.Module):
    """A stack of MLPs with residual connections."""

    def __init__(self, depth: int = 20, width: int = 64) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the stack. Shapes: x and the result [M, width]."""
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def test_passes(benchmark: Any) -> None:
    """Time copying and rewriting a graph of 40 linears."""
    captured = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.append(benchmark(lambda: rewrite_captured(copy_graph(gm), example_inputs, Int8Config())[1]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Blocks(), backend=backend)(torch.randn(4, 64))
    assert len(captured[0].rewritten) == 40


def test_quantize_weight(benchmark: Any) -> None:
    """Time rotating and quantizing a weight of 4096 x 4096."""
    weight = torch.randn(4096, 4096)
    qweight, _ = benchmark(quantize_weight, weight, make_d([weight]))
    assert qweight.dtype == torch.int8
