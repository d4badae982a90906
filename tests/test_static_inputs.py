"""Weights, scales, biases and buffers must be static inputs, because CUDA graphs copy all others at every replay.

Inductor gets the same information on every device, so the tests inspect it on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx as inductor
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor

import int8compile
from int8compile import backend
from tests.helpers.models import Stack

# The dtype and sizes of a tensor; None for a number.
Input = tuple[torch.dtype, tuple[Any, ...]] | None


class Graphs:
    """The graphs given to Inductor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[list[Input]] = []
        self.others: list[list[Input]] = []
        self.skipped: list[str | None] = []
        compile_fx, compile_fx_inner = inductor.compile_fx, inductor.compile_fx_inner

        def inner(gm: Any, example_inputs: Any, **given: Any) -> Any:
            compiled = compile_fx_inner(gm, example_inputs, **given)
            static = given.get("static_input_idxs", ())
            described = [
                (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else None for value in example_inputs
            ]
            self.inputs.append(described)
            self.others.append([each for index, each in enumerate(described) if index not in static])
            self.skipped.append(
                check_for_mutation_ignore_cuda_graph_managed_tensor(
                    gm, compiled.mutated_inputs, compiled.mutated_input_idxs, static
                )
            )
            return compiled

        def outer(*args: Any, **kwargs: Any) -> Any:
            return compile_fx(*args, inner_compile=inner, **kwargs)

        monkeypatch.setattr(inductor, "compile_fx", outer)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    with torch._inductor.config.patch(fx_graph_cache=False):  # A graph from the cache would not reach Inductor.
        yield Graphs(monkeypatch)


class Cached(nn.Module):
    """A decoder step that writes, through views, to a cache kept as a buffer, like a static cache."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32, bias=False)
        self.register_buffer("keys", torch.zeros(16, 32))
        self.register_buffer("values", torch.zeros(16, 32))
        self.requires_grad_(False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        keys = self.keys.index_copy_(0, position, self.k(x))
        values = self.values.index_copy_(0, position, self.v(x))
        return self.out(torch.softmax(self.q(x) @ keys.T, dim=-1) @ values)


def quantized() -> nn.Module:
    model = Stack()
    int8compile.quantize_(model, progress=False)
    return model


@pytest.mark.parametrize(
    ("make", "options", "weights"),
    [
        (Stack, {}, 4),
        (Stack, {"free_weights": True}, 4),
        (quantized, {}, 4),
        (quantized, {"free_weights": True}, 4),
        (Cached, {}, 4),
    ],
    ids=["linears", "free_weights", "quantize_", "quantize_, free_weights", "static cache"],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_all_but_what_the_caller_gives_is_static(
    make: Callable[[], nn.Module], options: dict[str, Any], weights: int, dynamic: bool, graphs: Graphs
) -> None:
    model = make()
    given = [torch.randn(4, 32), *([torch.arange(4)] if isinstance(model, Cached) else [])]
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for _ in range(2):
            compiled(*given)
    # Freed weights are other parameters to Dynamo, which may compile once more for them.
    assert len(graphs.inputs) == 1 if not options.get("free_weights") else len(graphs.inputs) <= 2
    for inputs, others in zip(graphs.inputs, graphs.others, strict=True):
        dtypes = [each[0] for each in others if each is not None]
        assert sorted(dtypes, key=str) == sorted((value.dtype for value in given), key=str)
        held = [each for each in inputs if each is not None and each[0] in (torch.int8, torch.uint8)]
        assert len(held) == weights
    assert set(graphs.skipped) == {None}


def test_a_cache_that_the_caller_gives_is_seen_as_changed(graphs: Graphs) -> None:
    """The check above can fail: a cache outside the model is not a static input."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Linear(32, 32).requires_grad_(False)

        def forward(self, x: Tensor, keys: Tensor) -> Tensor:
            return keys.index_copy_(0, torch.arange(4), self.k(x)) + 1

    torch.compile(Given(), backend="int8", fullgraph=True)(torch.randn(4, 32), torch.zeros(16, 32))
    (skipped,) = graphs.skipped
    assert skipped is not None
    assert "mutated inputs" in skipped


def test_a_copied_graph_holds_all_that_the_module_held() -> None:
    """The comparison covers all that Dynamo sets in this version of torch."""
    copies = []

    def look(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        gm.add_module("hooks_on_saved_tensors", torch.fx.GraphModule(nn.Module(), torch.fx.Graph()))
        copied = backend.copy_graph(gm)
        copies.append(copied)
        assert "_param_name_to_source" in vars(gm)
        assert vars(copied).keys() >= vars(gm).keys()
        assert copied._param_name_to_source is gm._param_name_to_source
        assert dict(copied.named_children()) == dict(gm.named_children())
        assert copied.meta == gm.meta
        for node, original in zip(copied.graph.nodes, gm.graph.nodes, strict=True):
            assert node is not original
            assert node.meta.keys() == original.meta.keys()
            if node.op == "placeholder":
                assert node._dynamo_source is original._dynamo_source
        return gm.forward

    torch.compile(Cached(), backend=look, fullgraph=True)(torch.randn(4, 32), torch.arange(4))
    assert len(copies) == 1
