"""Graphs lowered for GPUs, run on the CPU, where the same operators compute their definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from int8compile import backend, ops, triton_kernels
from int8compile.ops import quantize_weight, reference
from int8compile.passes import lower_gpu, lowering
from int8compile.passes.lower_gpu import Lowered
from int8compile.weights import STORE


class Seen:
    """The last graph after lowering."""

    lowered = Lowered()
    graph: GraphModule
    graphs = 0

    def products(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.target is ops.quantized_linear.default]

    def activations(self) -> list[object]:
        return [node.args[6] for node in self.products()]

    def parts(self) -> list[tuple[object, ...]]:
        return [node.args[7:9] for node in self.products()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Make the backend take the CPU for a GPU."""
    seen = Seen()

    def lower(module: GraphModule, binder: object, parameters: object, is_gpu: object) -> Lowered:
        if is_gpu is not None:  # An export.
            return lower_gpu.lower_for_gpu(module, binder, parameters, is_gpu)  # type: ignore[arg-type]
        seen.lowered = lower_gpu.lower_for_gpu(module, binder, parameters, lambda device: True)  # type: ignore[arg-type]
        seen.graph = module
        seen.graphs += 1
        return seen.lowered

    monkeypatch.setattr(lowering, "lower_for_gpu", lower)
    monkeypatch.setattr(backend, "_any_on", lambda kind, parameters: kind == "cuda")
    monkeypatch.setattr(triton_kernels, "load", lambda: True)
    return seen


def compiled(call: Callable[..., object], **options: object) -> Callable[..., object]:
    return torch.compile(call, backend="int8", fullgraph=True, options=options)


def by_operator(layer: nn.Linear, x: Tensor, threshold: float = 12.0) -> Tensor:
    """Return the linear by the reference, rotated as the store rotates it."""
    (weight,) = STORE.weights(layer.weight).values()
    assert weight.d is not None
    return reference.linear(x, *quantize_weight(layer.weight.detach(), weight.d), weight.d, layer.bias, threshold)


def near(actual: Tensor, expected: Tensor) -> bool:
    """Compare, allowing for the last bits of activation functions."""
    return bool(((actual - expected).abs() <= 1e-6 * expected.abs().max()).all())
