"""Weights that the passes rotate, and weights that share one d."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import int8compile
from int8compile import Int8Config, SkipReason
from int8compile.ops import quantize_weight, rotation_size
from int8compile.passes import AttributeBinder, rewrite_graph
from tests.helpers.models import Uses, rotation_from
from tests.helpers.spellings import Weights, quantized


@dataclasses.dataclass
class Rotated:
    """A call of an int8 operator.

    Attributes:
        node: The name of the node of d.
        d: The value of d.
        threshold: The threshold; None for weight-only products.
    """

    node: str | None
    d: Tensor | None
    threshold: float | None


def exported(model: nn.Module, x: Tensor) -> tuple[GraphModule, dict[Node, Tensor], AttributeBinder]:
    """Return an exported graph, the parameters by their nodes, and a binder for it."""
    module: Any = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    named = dict(module.named_parameters(remove_duplicate=False))
    parameters = {node: named[str(node.target)] for node in module.graph.find_nodes(op="get_attr")}
    return module, parameters, AttributeBinder(module)


def rewritten(model: nn.Module, x: Tensor, **options: object) -> dict[str, Rotated]:
    """Return the calls of a model's rewritten graph by the paths of their modules or parameters."""
    module, parameters, binder = exported(model.requires_grad_(False), x)
    report = rewrite_graph(module, parameters, Int8Config.from_options(options), binder)
    made: dict[Node, Tensor | None] = {}
    for slot in binder.slots:
        made |= zip(slot.nodes, quantized(slot, parameters), strict=True)
    found = {}
    calls = [node for node in module.graph.nodes if getattr(node.target, "namespace", "") == "int8compile"]
    for node, site in zip(calls, report.rewritten, strict=True):
        given = dict(zip([each.name for each in node.target._schema.arguments], node.args, strict=True))
        d = given.get("d")
        assert (d is None) == (made[d] is None)
        assert site.rotation == (1 if d is None else rotation_size(made[d].shape[-1]))
        found[site.path] = Rotated(d and d.name, made[d], given.get("threshold"))
    return found


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}


def test_linears_of_one_input_in_one_module_have_one_d() -> None:
    """The d is made from all their weights. Output projections, and linears with another K, have their own."""
    held = linears(q_proj=(32, 48), k_proj=(32, 20), v_proj=(32, 32), o_proj=(32, 32), down=(48, 16))
    model = Uses(lambda m, x: (m.down(m.q_proj(x)), m.k_proj(x), m.o_proj(m.v_proj(x))), **held)
    found = rewritten(model, torch.randn(5, 32))
    shared = [found[name] for name in ("q_proj", "k_proj", "v_proj")]
    assert len({each.node for each in shared}) == 1
    assert len({each.node for each in found.values()}) == 3
    d = rotation_from(*(held[name].weight for name in ("q_proj", "k_proj", "v_proj")))
    assert all(torch.equal(each.d, d) for each in shared)
    for name in ("o_proj", "down"):
        assert torch.equal(found[name].d, rotation_from(held[name].weight))
    assert {each.threshold for each in found.values()} == {12.0}


def test_one_d_serves_neighbours_of_other_inputs() -> None:
    """Where modules are quantized one by one, their inputs are unknown."""
    held = linears(first=(32, 32), second=(32, 32))
    found = rewritten(Uses(lambda m, x: m.second(torch.relu(m.first(x))), **held), torch.randn(5, 32))
    assert found["first"].node != found["second"].node  # Calls with one input share a node.
    assert torch.equal(found["first"].d, rotation_from(held["first"].weight, held["second"].weight))
    assert found["first"].d is found["second"].d


def test_numbered_modules_have_their_own_d() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))
    found = rewritten(model, torch.randn(5, 32))
    assert len({each.node for each in found.values()}) == 3
    for name, each in found.items():
        assert torch.equal(each.d, rotation_from(model.get_submodule(name).weight))


def test_parts_of_a_bare_matrix_have_one_d_and_stacked_matrices_their_own() -> None:
    model = Weights(lambda m, x: ([F.linear(x, part) for part in m.qkv.chunk(3)], [x @ part for part in m.experts]))
    module, parameters, binder = exported(model, torch.randn(5, 32))
    rewrite_graph(module, parameters, Int8Config(), binder)
    parts, stacked = binder.slots[:3], binder.slots[3:]
    assert len({id(slot.group) for slot in parts}) == 1
    assert len({id(slot.group) for slot in stacked}) == 2
    for slot, weight in zip(stacked, model.experts, strict=True):
        assert torch.equal(quantized(slot, parameters)[2], rotation_from(weight.mT))


@pytest.mark.parametrize(("name", "each"), [("gate_up_proj", False), ("down_proj", True)])
def test_experts_have_one_d_where_they_read_tokens(name: str, each: bool) -> None:
    weight = nn.Parameter(torch.randn(3, 32, 48))
    (found,) = rewritten(Uses(lambda m, x: x @ getattr(m, name), **{name: weight}), torch.randn(3, 5, 32)).values()
    matrices = list(weight.mT)
    expected = torch.stack([rotation_from(matrix) for matrix in matrices]) if each else rotation_from(*matrices)
    assert torch.equal(found.d, expected)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({}, 12.0),
        ({"threshold": 3}, 3.0),
        ({"rotate": False}, 6.0),
        ({"rotate": False, "threshold": 12.0}, 12.0),
        ({"outliers": "column"}, 6.0),
        ({"outliers": "column", "threshold": 0.5}, 0.5),
    ],
    ids=str,
)
def test_thresholds_and_rotation_by_policy(options: dict[str, object], threshold: float) -> None:
    held = linears(plain=(32, 32))
    (found,) = rewritten(Uses(lambda m, x: m.plain(x), **held), torch.randn(5, 32), **options).values()
    assert found.threshold == threshold
    assert (found.d is not None) == (options.get("rotate", True) and "outliers" not in options)


def test_sizes_with_few_factors_of_two_are_not_rotated() -> None:
    """40 = 8 * 5. The threshold is the one for unrotated weights."""
    held = linears(first=(32, 40), second=(40, 48))
    found = rewritten(Uses(lambda m, x: m.second(m.first(x)), **held), torch.randn(5, 32))
    assert (found["first"].threshold, found["second"].threshold) == (12.0, 6.0)
    assert found["first"].d is not None
    assert found["second"].d is None


@pytest.mark.parametrize("lm_head", ["int8", "int8_weight"])
def test_a_tied_head_is_not_rotated(lm_head: str) -> None:
    """The head reads the embedding table, which is read by rows."""

    def call(m: Uses, x: Tensor) -> Tensor:
        return m.lm_head(m.mix(m.embedding(x)))

    for tied in (True, False):
        model = Uses(call, embedding=nn.Embedding(64, 32), mix=nn.Linear(32, 32), lm_head=nn.Linear(32, 64))
        if tied:
            model.lm_head.weight = model.embedding.weight
        found = rewritten(model, torch.arange(6), lm_head=lm_head)
        assert (found["lm_head"].d is None) == tied
        assert found["mix"].d is not None
        expected = 6.0 if tied else 12.0
        assert found["lm_head"].threshold == (None if lm_head == "int8_weight" else expected)


def test_columns_leave_weights_of_several_matrices_in_float() -> None:
    model = Weights(lambda m, x: (x @ m.experts, F.linear(x, m.nk)))
    report = int8compile.explain(model, torch.randn(2, 5, 32), config={"outliers": "column"})
    assert [site.reason for site in report.sites] == [SkipReason.COLUMN_BATCHED, None]


READS: dict[str, tuple[Callable[[Weights, Tensor], Tensor], Callable[[Weights], Tensor]]] = {
    "transposed": (lambda m, x: x @ m.kn, lambda m: m.kn.t()),
    "a slice of rows": (lambda m, x: F.linear(x, m.qkv[32:80]), lambda m: m.qkv[32:80]),
    "a slice along K": (lambda m, x: F.linear(x[..., :16], m.nk[:, :16]), lambda m: m.nk[:, :16]),
    "a slice along K, transposed": (lambda m, x: x[..., :16] @ m.kn[16:], lambda m: m.kn[16:].t()),
    "heads": (lambda m, x: torch.einsum("bsk,khd->bshd", x, m.heads).flatten(2), lambda m: m.heads.flatten(1).t()),
}


@pytest.mark.parametrize(("call", "weight"), READS.values(), ids=READS.keys())
def test_views_are_rotated_as_they_are_multiplied(
    call: Callable[[Weights, Tensor], Tensor], weight: Callable[[Weights], Tensor]
) -> None:
    """K is the view's: the weight is sliced first and rotated then."""
    model, x = Weights(call), torch.randn(2, 5, 32)
    actual = torch.compile(model, backend="int8", fullgraph=True)(x)
    used = weight(model)
    d, k = rotation_from(used), used.shape[-1]
    expected = torch.ops.int8compile.linear(x[..., :k], *quantize_weight(used, d), d, None, 12.0)
    assert torch.equal(actual, expected)


def test_a_batched_view_is_rotated_by_the_d_of_each_matrix() -> None:
    model, x = Weights(lambda m, x: torch.bmm(x, m.experts)), torch.randn(2, 5, 32)
    actual = torch.compile(model, backend="int8", fullgraph=True)(x)
    d = torch.stack([rotation_from(matrix.mT) for matrix in model.experts])
    expected = torch.ops.int8compile.batched_linear(x, *quantize_weight(model.experts.mT, d), d, None, 12.0)
    assert torch.equal(actual, expected)
