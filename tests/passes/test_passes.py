"""Every spelling of a matmul with a static weight, on Dynamo and on exported graphs; and every reason to leave one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import int8compile
from int8compile import Int8Config, SkipReason
from int8compile.ops import quantize_weight, rotation_size
from int8compile.passes import AttributeBinder, rewrite_graph
from int8compile.passes.binding import WeightSlot
from int8compile.passes.contraction import roles
from int8compile.passes.names import clean_path
from int8compile.passes.rules import matches
from int8compile.weights import STORE, quantize_checked
from tests.helpers.models import INT8_ERROR, by_operator, relative_error, rotation_from


class Weights(nn.Module):
    """Parameters in the layouts that the spellings below need; `call` says how they are used."""

    def __init__(self, call: Callable[[Weights, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.nk = nn.Parameter(torch.randn(48, 32))
        self.kn = nn.Parameter(torch.randn(32, 48))
        self.bias = nn.Parameter(torch.randn(48))
        self.experts = nn.Parameter(torch.randn(2, 32, 48))
        self.expert_bias = nn.Parameter(torch.randn(2, 1, 48))
        self.heads = nn.Parameter(torch.randn(32, 3, 16))
        self.channels = nn.Parameter(torch.randn(48, 5, 1, 1))
        self.qkv = nn.Parameter(torch.randn(96, 32))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


# x is [2, 5, 32]. Each: name, what the report calls it, the call.
SPELLINGS: list[tuple[str, str, Callable[[Weights, Tensor], Tensor]]] = [
    ("F.linear", "linear", lambda m, x: F.linear(x, m.nk)),
    ("F.linear with bias", "linear", lambda m, x: F.linear(x, m.nk, m.bias)),
    ("F.linear of a 1-D input", "linear", lambda m, x: F.linear(x[0, 0], m.nk, m.bias)),
    ("F.linear of a slice of a weight", "linear", lambda m, x: F.linear(x, m.qkv[32:80], m.bias)),
    ("F.linear of a chunk of a weight", "linear", lambda m, x: F.linear(x, m.qkv.chunk(3)[1])),
    ("F.linear of a cast weight", "linear", lambda m, x: F.linear(x.bfloat16(), m.nk.to(torch.bfloat16)).float()),
    ("addmm", "addmm", lambda m, x: torch.addmm(m.bias, x[0], m.kn)),
    ("addmm with beta and alpha", "addmm", lambda m, x: torch.addmm(m.bias, x[0], m.kn, beta=0.5, alpha=2.0)),
    ("addmm with beta 0", "addmm", lambda m, x: torch.addmm(m.bias, x[0], m.kn, beta=0)),
    ("addmm of a matrix", "addmm", lambda m, x: torch.addmm(x[0, :, :1], x[0], m.kn)),
    ("Tensor.addmm", "addmm", lambda m, x: m.bias.addmm(x[0], m.kn)),
    ("addmm with the weight first", "addmm", lambda m, x: torch.addmm(x[0, :, 0], m.nk, x[0].t())),
    ("addmv", "addmv", lambda m, x: torch.addmv(m.bias, m.nk, x[0, 0])),
    ("mm", "mm", lambda m, x: torch.mm(x[0], m.kn)),
    ("mm by keyword", "mm", lambda m, x: torch.mm(input=x[0], mat2=m.kn)),
    ("Tensor.mm", "mm", lambda m, x: x[0].mm(m.kn)),
    ("mv", "mv", lambda m, x: m.nk.mv(x[0, 0])),
    ("inner", "inner", lambda m, x: torch.inner(x, m.nk)),
    ("matmul", "matmul", lambda m, x: torch.matmul(x, m.kn)),
    ("matmul of t()", "matmul", lambda m, x: torch.matmul(x, m.nk.t())),
    ("matmul of a 1-D input", "matmul", lambda m, x: torch.matmul(x[0, 0], m.kn)),
    ("linalg.matmul", "matmul", lambda m, x: torch.linalg.matmul(x, m.kn)),
    ("@", "matmul", lambda m, x: x @ m.kn),
    ("@ of .T", "matmul", lambda m, x: x @ m.nk.T),
    ("@ of .mT", "matmul", lambda m, x: x @ m.nk.mT),
    ("@ of transpose", "matmul", lambda m, x: x @ m.nk.transpose(0, 1).contiguous()),
    ("@ with the weight first", "matmul", lambda m, x: m.nk @ x.mT),
    ("Tensor.matmul", "matmul", lambda m, x: x.matmul(m.kn)),
    ("bmm over experts", "bmm", lambda m, x: torch.bmm(x, m.experts)),
    ("Tensor.bmm", "bmm", lambda m, x: x.bmm(m.experts)),
    ("matmul over experts", "matmul", lambda m, x: x @ m.experts),
    ("matmul over experts, 4-D", "matmul", lambda m, x: x.expand(3, 2, 5, 32) @ m.experts),
    ("baddbmm", "baddbmm", lambda m, x: torch.baddbmm(m.expert_bias, x, m.experts)),
    ("baddbmm of a full addend", "baddbmm", lambda m, x: torch.baddbmm(x[:, :, :1], x, m.experts, beta=2, alpha=0.5)),
    ("einsum", "einsum", lambda m, x: torch.einsum("bsk,kn->bsn", x, m.kn)),
    ("einsum, implicit result", "einsum", lambda m, x: torch.einsum("abk,kn", x, m.kn)),
    ("einsum with an ellipsis", "einsum", lambda m, x: torch.einsum("...k,nk->...n", x, m.nk)),
    ("einsum with a permuted result", "einsum", lambda m, x: torch.einsum("bsk,nk->nbs", x, m.nk)),
    ("einsum into heads", "einsum", lambda m, x: torch.einsum("bsk,khd->bhsd", x, m.heads)),
    ("einsum out of heads", "einsum", lambda m, x: torch.einsum("bhd,khd->bk", x[:, :3, :16], m.heads)),
    ("einsum over experts", "einsum", lambda m, x: torch.einsum("esk,ekn->sen", x, m.experts)),
    ("einsum over experts, one row", "einsum", lambda m, x: torch.einsum("ek,ekn->en", x[:, 0], m.experts)),
    ("einsum over experts, more rows", "einsum", lambda m, x: torch.einsum("esjk,ekn->jesn", x[:, :, None], m.experts)),
    ("einsum with the weight first", "einsum", lambda m, x: torch.einsum("nk,bsk->bsn", m.nk, x)),
    ("tensordot", "tensordot", lambda m, x: torch.tensordot(x, m.kn, 1)),
    ("tensordot with axes", "tensordot", lambda m, x: torch.tensordot(x, m.nk, ([2], [1]))),
    ("1x1 conv2d", "convolution", lambda m, x: F.conv2d(x.unflatten(2, (4, 8)), m.channels, m.bias)),
    ("1x1 conv2d with stride", "convolution", lambda m, x: F.conv2d(x.unflatten(2, (4, 8)), m.channels, stride=(2, 3))),
    ("1x1 conv2d, unbatched", "convolution", lambda m, x: F.conv2d(x[0].unflatten(1, (4, 8)), m.channels, m.bias)),
    ("1x1 conv1d", "convolution", lambda m, x: F.conv1d(x, m.channels.squeeze(3), m.bias, padding="same")),
    ("1x1 conv3d", "convolution", lambda m, x: F.conv3d(x.reshape(2, 5, 4, 4, 2), m.channels[..., None], m.bias)),
]
NAMES = [spelling[0] for spelling in SPELLINGS]


def quantized(slot: WeightSlot, given: Mapping[Node, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a slot of one weight holds, of the parameters by their nodes."""
    (member,) = slot.members
    d, group = None, slot.group
    if group is not None:
        members, among = ([(given[each.source], each.view) for each in part] for part in (group.members, group.among))
        d = STORE.share(members, among, each=group.each)
    return *quantize_checked(given[member.source], member.view, member.path, d), d


def _count(module: torch.fx.GraphModule) -> int:
    ops = (torch.ops.int8compile.linear.default, torch.ops.int8compile.batched_linear.default)
    return sum(node.target in ops for node in module.graph.nodes)


@pytest.mark.parametrize(("op", "call"), [spelling[1:] for spelling in SPELLINGS], ids=NAMES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_dynamo_graph(op: str, call: Callable[[Weights, Tensor], Tensor], dynamic: bool) -> None:
    """Rewritten, reported under its name, in the layout of the original; int8 close to float."""
    model, x = Weights(call), torch.randn(2, 5, 32)
    config = Int8Config(min_features=5)
    report = int8compile.explain(model, x, config=config)
    assert [(site.op, site.rewritten) for site in report.sites] == [(op, True)], str(report)
    assert report.activation_matmuls == 0

    captured = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list) -> Callable[..., object]:
        from int8compile.backend import copy_graph, rewrite_captured

        module = copy_graph(gm)
        binder, _ = rewrite_captured(module, example_inputs, config)
        captured.append(_count(module))
        placeholders = module.graph.find_nodes(op="placeholder")

        def run(*args: Tensor) -> object:
            given = dict(zip(placeholders, args, strict=False))
            for slot in binder.slots:
                given |= zip(slot.nodes, quantized(slot, given), strict=True)
            return module(*(given[node] for node in placeholders))

        return run

    actual = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(x)
    expected = model(x)
    assert captured == [1]
    assert actual.shape == expected.shape
    # Later views of it, and the next graph, rely on its strides. Those of dimensions of size 1 mean nothing.
    real = [size != 1 for size in expected.shape]
    assert [*itertools.compress(actual.stride(), real)] == [*itertools.compress(expected.stride(), real)]
    assert relative_error(actual, expected) < INT8_ERROR


# What core ATen makes of these is no matmul of a view of a parameter any more: mv becomes a product and a sum, the
# others expand or copy the weight first.
DECOMPOSED_AWAY = {"mv", "@ with the weight first", "einsum out of heads", "matmul over experts, 4-D"}


@pytest.mark.parametrize(
    ("call", "decomposed"),
    [
        pytest.param(call, decomposed, id=f"{name}{', decomposed' * decomposed}")
        for name, _, call in SPELLINGS
        for decomposed in (False, True)
        if not (decomposed and name in DECOMPOSED_AWAY)
    ],
)
def test_exported_graph(call: Callable[[Weights, Tensor], Tensor], decomposed: bool) -> None:
    """The same rules rewrite ATen graphs, as exported and after decomposition into core ATen operators."""
    model, x = Weights(call), torch.randn(2, 5, 32)
    program = torch.export.export(model, (x,))
    if decomposed:
        program = program.run_decompositions()
    module = program.module()
    parameters = {
        node: module.get_parameter(node.target)
        for node in module.graph.find_nodes(op="get_attr")
        if node.target in dict(module.named_parameters())
    }
    binder = AttributeBinder(module)
    report = rewrite_graph(module, parameters, Int8Config(min_features=5), binder)
    binder.fill(lambda slot: quantized(slot, parameters))
    assert [site.rewritten for site in report.sites] == [True], str(report)
    assert _count(module) == 1
    expected = model(x)
    actual = module(x)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < INT8_ERROR


def test_two_spellings_of_one_weight_share_one_view() -> None:
    """F.linear(x, w) and x @ w.t() read the same numbers in the same order."""
    model = Weights(lambda m, x: F.linear(x, m.nk) + x @ m.nk.t() + torch.einsum("bsk,nk->bsn", x, m.nk))
    report = int8compile.explain(model, torch.randn(2, 5, 32))
    assert [site.rewritten for site in report.sites] == [True] * 3
    assert len({site.layout for site in report.sites}) == 1
    # Three sites, one weight: 48 x 32 floats before; int8, 48 scales and what rotates 32 inputs after.
    assert report.totals()["bytes_before"] == 4 * 48 * 32
    assert report.totals()["bytes_after"] == 48 * 32 + 4 * 48 + 4 * 32


def test_two_layouts_of_one_weight_are_counted_both() -> None:
    model = Weights(lambda m, x: (x @ m.kn) @ m.kn.t())
    totals = int8compile.explain(model, torch.randn(2, 5, 32)).totals()
    assert totals["bytes_after"] == (48 * 32 + 4 * 48 + 4 * 32) + (48 * 32 + 4 * 32 + 4 * 48)


def test_a_bias_is_fused_where_it_is_one_number_per_output() -> None:
    """Fused: added in float32 before the one rounding. In bfloat16 that shows."""
    model = Weights(lambda m, x: F.linear(x, m.nk, m.bias)).bfloat16()
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    actual = torch.compile(model, backend="int8")(x)
    d = rotation_from(model.nk)
    expected = torch.ops.int8compile.linear(x, *quantize_weight(model.nk, d), d, model.bias, 12.0)
    assert torch.equal(actual, expected)


# What is rotated, and what by one d


class Holds(nn.Module):
    """Modules and parameters of any names; `call` says how they are used."""

    def __init__(self, call: Callable[..., object], **held: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = call
        for name, value in held.items():
            setattr(self, name, value)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


@dataclasses.dataclass
class Rotated:
    """A call of an int8 operator.

    Attributes:
        node: The name of its d's node.
        d: What that holds.
        threshold: What it is given; None where activations keep the precision of float.
    """

    node: str | None
    d: Tensor | None
    threshold: float | None


def rewritten(model: nn.Module, x: Tensor, **options: object) -> dict[str, Rotated]:
    """The calls of a model's rewritten graph by the paths of their modules or parameters."""
    program = torch.export.export(model.requires_grad_(False), (x,), strict=False)
    module = program.module(check_guards=False)
    named = dict(module.named_parameters(remove_duplicate=False))
    parameters = {node: named[str(node.target)] for node in module.graph.find_nodes(op="get_attr")}
    binder = AttributeBinder(module)
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
    """Made of all their weights. Output projections, and what has another K, have their own."""
    held = linears(q_proj=(32, 48), k_proj=(32, 20), v_proj=(32, 32), o_proj=(32, 32), down=(48, 16))
    model = Holds(lambda m, x: (m.down(m.q_proj(x)), m.k_proj(x), m.o_proj(m.v_proj(x))), **held)
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
    """Which input they read is not known where modules are quantized one by one."""
    held = linears(first=(32, 32), second=(32, 32))
    found = rewritten(Holds(lambda m, x: m.second(torch.relu(m.first(x))), **held), torch.randn(5, 32))
    assert found["first"].node != found["second"].node  # Calls of one input share a node.
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
    program = torch.export.export(model, (torch.randn(5, 32),), strict=False)
    module = program.module(check_guards=False)
    named = dict(module.named_parameters(remove_duplicate=False))
    parameters = {node: named[str(node.target)] for node in module.graph.find_nodes(op="get_attr")}
    binder = AttributeBinder(module)
    rewrite_graph(module, parameters, Int8Config(), binder)
    parts, stacked = binder.slots[:3], binder.slots[3:]
    assert len({id(slot.group) for slot in parts}) == 1
    assert len({id(slot.group) for slot in stacked}) == 2
    for slot, weight in zip(stacked, model.experts, strict=True):
        assert torch.equal(quantized(slot, parameters)[2], rotation_from(weight.mT))


@pytest.mark.parametrize(("name", "each"), [("gate_up_proj", False), ("down_proj", True)])
def test_experts_have_one_d_where_they_read_tokens(name: str, each: bool) -> None:
    weight = nn.Parameter(torch.randn(3, 32, 48))
    (found,) = rewritten(Holds(lambda m, x: x @ getattr(m, name), **{name: weight}), torch.randn(3, 5, 32)).values()
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
    (found,) = rewritten(Holds(lambda m, x: m.plain(x), **held), torch.randn(5, 32), **options).values()
    assert found.threshold == threshold
    assert (found.d is not None) == (options.get("rotate", True) and "outliers" not in options)


def test_sizes_with_few_factors_of_two_are_not_rotated() -> None:
    """40 = 8 * 5. Their threshold is that of weights that are not rotated."""
    held = linears(first=(32, 40), second=(40, 48))
    found = rewritten(Holds(lambda m, x: m.second(m.first(x)), **held), torch.randn(5, 32))
    assert (found["first"].threshold, found["second"].threshold) == (12.0, 6.0)
    assert found["first"].d is not None
    assert found["second"].d is None


@pytest.mark.parametrize("lm_head", ["int8", "int8_weight"])
def test_a_tied_head_is_not_rotated(lm_head: str) -> None:
    """The table is read by rows, too."""

    def call(m: Holds, x: Tensor) -> Tensor:
        return m.lm_head(m.mix(m.embedding(x)))

    for tied in (True, False):
        model = Holds(call, embedding=nn.Embedding(64, 32), mix=nn.Linear(32, 32), lm_head=nn.Linear(32, 64))
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
    """K is that of the view: what is read is cut first, and rotated then."""
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


REASONS: list[tuple[SkipReason, Callable[[Weights, Tensor], Tensor], dict]] = [
    (SkipReason.NAME, lambda m, x: F.linear(x, m.nk), {"skip_modules": ["n?"]}),
    (SkipReason.NOT_STATIC, lambda m, x: F.linear(x, x[0]), {}),
    (SkipReason.NOT_STATIC, lambda m, x: x @ m.experts[(x[:, 0, 0] > 0).long()], {}),
    (SkipReason.COMPUTED, lambda m, x: F.linear(x, m.nk * 2), {}),
    (SkipReason.COMPUTED, lambda m, x: x @ (m.kn + 1), {}),
    (SkipReason.SMALL, lambda m, x: F.linear(x, m.nk), {"min_features": 33}),
    (SkipReason.SMALL, lambda m, x: F.linear(x, m.nk[:3]), {}),
    (SkipReason.DTYPE, lambda m, x: F.linear(x.double(), m.nk.double()), {}),
    (SkipReason.FORM, lambda m, x: F.conv2d(x.unflatten(2, (4, 8)), m.channels, padding=1), {}),
    (SkipReason.FORM, lambda m, x: F.conv2d(x.repeat(1, 48, 1)[..., None], m.channels, groups=48), {}),
    (SkipReason.FORM, lambda m, x: torch.einsum("bsk,bkn->n", x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: x[:1] @ m.experts, {}),
    (SkipReason.FORM, lambda m, x: F.bilinear(x, x, m.experts[:, :, :32]), {}),
    (SkipReason.CHANGED, lambda m, x: F.linear(x, m.nk.mul_(2)), {}),
    (SkipReason.CHANGED, lambda m, x: (m.nk.add_(1), F.linear(x, m.nk))[1], {}),
]


@pytest.mark.parametrize(
    ("reason", "call", "options"), REASONS, ids=[f"{row[0].name} {i}" for i, row in enumerate(REASONS)]
)
def test_reasons(reason: SkipReason, call: Callable[[Weights, Tensor], Tensor], options: dict) -> None:
    report = int8compile.explain(Weights(call), torch.randn(2, 5, 32), config=options)
    assert [site.reason for site in report.sites] == [reason], str(report)
    assert report.sites[0].why().startswith(reason.value)
    assert report.sites[0].bytes_after == report.sites[0].bytes_before > 0


# Decompositions of torch use a function of torch that is deprecated.
PYTORCHS_OWN = pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated")


def _out(m: Weights, x: Tensor) -> Tensor:
    torch.mul(m.nk, 3, out=m.nk)
    return F.linear(x, m.nk)


def _foreach(m: Weights, x: Tensor) -> Tensor:
    torch._foreach_mul_([m.nk], 3)
    return F.linear(x, m.nk)


def _augmented(m: Weights, x: Tensor) -> Tensor:
    weight = m.nk
    alias = weight
    alias *= 3
    return F.linear(x, weight)


def _augmented_clone(m: Weights, x: Tensor) -> Tensor:
    weight = m.nk.clone()
    weight += 1
    return F.linear(x, weight)


def _inplace_keyword(m: Weights, x: Tensor) -> Tensor:
    F.relu(m.nk, inplace=True)
    return F.linear(x, m.nk)


def _diagonal(m: Weights, x: Tensor) -> Tensor:
    m.nk.diagonal().mul_(10)
    return F.linear(x, m.nk)


@PYTORCHS_OWN
@pytest.mark.parametrize("call", [_out, _foreach, _augmented, _augmented_clone, _inplace_keyword, _diagonal])
def test_a_weight_that_the_graph_writes_to_is_left_alone(call: Callable[[Weights, Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 32)
    (site,) = int8compile.explain(Weights(call), x).sites
    assert site.reason in (SkipReason.CHANGED, SkipReason.COMPUTED)
    model = Weights(call)
    expected = copy.deepcopy(model)(x)
    with pytest.warns(int8compile.Int8Warning, match="rewrote none"):
        assert torch.allclose(torch.compile(model, backend="int8")(x), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_read_as_another_dtype_is_no_view_of_it() -> None:
    """The same bytes are other numbers."""
    model = Weights(lambda m, x: F.linear(x.half(), m.nk.view(torch.float16))).bfloat16()
    (site,) = int8compile.explain(model, torch.randn(2, 5, 32)).sites
    assert site.reason is SkipReason.COMPUTED


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, ids: table[ids],
        lambda table, ids: F.embedding(ids, table.to(torch.float32)),
        lambda table, ids: F.embedding_bag(ids[:, None], table),
    ],
    ids=["getitem", "cast", "bag"],
)
def test_ties_are_seen_however_the_table_is_read(look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
    table = nn.Parameter(torch.randn(64, 32), requires_grad=False)
    (site,) = int8compile.explain(lambda ids: look_up(table, ids) @ table.t(), torch.arange(4)).sites
    assert site.reason is SkipReason.TIED


@PYTORCHS_OWN
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_inside_torch_func_linears_stay_in_float(transform: Callable) -> None:
    weight, x = nn.Parameter(torch.randn(48, 32), requires_grad=False), torch.randn(32)

    def call(x: Tensor) -> Tensor:
        return transform(lambda x: F.linear(x, weight).square().sum())(x)

    with pytest.warns(int8compile.Int8Warning, match=r"torch\.func differentiates it"):
        actual = torch.compile(call, backend="int8")(x)
    assert torch.allclose(actual, call(x), rtol=1e-4, atol=1e-4)


def test_a_matmul_of_two_parameters_stays_in_float() -> None:
    """As a LoRA merge: the product is a weight, not an activation."""
    model = Weights(lambda m, x: F.linear(x, m.nk + m.kn.t() @ m.nk.t()[:, :32]))
    report = int8compile.explain(model, torch.randn(2, 5, 32))
    assert [site.reason for site in report.sites] == [SkipReason.COMPUTED] * 2


def test_slices_of_a_weight_are_counted_once() -> None:
    model = Weights(lambda m, x: sum(F.linear(x, part) for part in m.qkv.chunk(3)))
    totals = int8compile.explain(model, torch.randn(2, 5, 32)).totals()
    assert totals["bytes_before"] == 4 * 96 * 32
    assert totals["bytes_after"] == 96 * 32 + 4 * 96 + 4 * 32


def test_bad_values_are_those_of_the_part_that_is_used() -> None:
    model = Weights(lambda m, x: F.linear(x, m.qkv[48:]))
    model.qkv[0] = float("nan")
    assert int8compile.explain(model, torch.randn(2, 5, 32)).sites[0].rewritten


def test_forms_that_no_pass_reads_are_named() -> None:
    model = Weights(lambda m, x: torch.einsum("bsk,kn,n->bs", x, m.kn, m.bias))
    assert [site.reason for site in int8compile.explain(model, torch.randn(2, 5, 32)).sites] == [SkipReason.FORM]
    model = Weights(lambda m, x: torch.tensordot(x[:, :1], m.experts[:, :5, :32].permute(1, 2, 0), 2))
    assert [site.reason for site in int8compile.explain(model, torch.randn(2, 5, 32)).sites] == [SkipReason.FORM]


def test_weight_being_trained_is_left_alone_in_grad_mode_only() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(32, 48).requires_grad_(False)
            self.down = nn.Linear(32, 16)
            self.up = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model, x = Lora(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x).sum().backward()
    # In grad mode the adapters train in float, the frozen base runs in int8: exactly this composition.
    base = by_operator(model.base, x, rotation_from(model.base.weight))
    assert torch.allclose(compiled(x), base + model.up(model.down(x)), atol=1e-5)
    assert all(layer.weight.grad is not None for layer in (model.down, model.up))
    with torch.no_grad():
        assert [site.rewritten for site in int8compile.explain(model, x).sites] == [True] * 3
        assert not torch.allclose(compiled(x), base + model.up(model.down(x)), atol=1e-5)


def test_attention_is_counted_and_left_alone() -> None:
    def attend(m: Weights, x: Tensor) -> Tensor:
        weighted = torch.softmax(torch.bmm(x, x.mT), -1) @ x
        return weighted + F.scaled_dot_product_attention(x[None], x[None], x[None])[0] + F.linear(x, m.kn.T[:32])

    report = int8compile.explain(Weights(attend), torch.randn(2, 5, 32))
    assert (report.activation_matmuls, len(report.rewritten), len(report.skipped)) == (3, 1, 0)


def test_an_einsum_with_a_scalar_is_no_matmul() -> None:
    report = int8compile.explain(Weights(lambda m, x: torch.einsum(",kn->kn", x.sum(), m.kn)), torch.randn(2, 5, 32))
    assert [site.reason for site in report.sites] == [SkipReason.FORM]


def test_a_scaled_activation_is_no_weight() -> None:
    """weight * norm(x), as RMSNorm ends, is an activation though a parameter comes first."""
    report = int8compile.explain(Weights(lambda m, x: (m.nk[0] * x) @ x.mT), torch.randn(2, 5, 32))
    assert (report.activation_matmuls, report.sites) == (1, [])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["lm_head", "projection"])
def test_lm_head_stays_native_by_name_and_by_tie(name: str, tied: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.add_module(name, nn.Linear(32, 64, bias=False))
            if tied:
                self.get_submodule(name).weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.get_submodule(name)(self.embedding(ids))

    ids = torch.arange(6)
    (site,) = int8compile.explain(Model(), ids).sites
    expected = SkipReason.LM_HEAD if name == "lm_head" else SkipReason.TIED if tied else None
    assert site.reason is expected
    assert site.path == name
    (site,) = int8compile.explain(Model(), ids, config={"lm_head": "int8"}).sites
    assert site.rewritten


@pytest.mark.parametrize("add_zero_attn", [False, True])
def test_multi_head_attention_is_opened(add_zero_attn: bool) -> None:
    """Dynamo keeps nn.MultiheadAttention as one call; its projections are found inside."""
    model = nn.MultiheadAttention(32, 4, batch_first=True, add_zero_attn=add_zero_attn).eval()
    x = torch.randn(2, 5, 32)
    report = int8compile.explain(model, x, x, x, need_weights=False)
    assert [(site.path, site.rewritten) for site in report.sites] == [("in_proj_weight", True), ("out_proj", True)]
    with torch.no_grad():
        for needed in (False, True):
            compiled = torch.compile(model, backend="int8", fullgraph=True)
            for actual, expected in zip(
                compiled(x, x, x, need_weights=needed), model(x, x, x, need_weights=needed), strict=True
            ):
                assert (actual is None) == (expected is None)
                if expected is not None:
                    assert relative_error(actual, expected) < INT8_ERROR


def test_linears_inside_fused_operators() -> None:
    """The operator of an encoder layer is opened; one that nobody opens has its linears named."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    report = int8compile.explain(layer, torch.randn(2, 5, 32))
    assert [site.path for site in report.rewritten] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    weights = (layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias, *layer.self_attn.out_proj.parameters())
    report = int8compile.explain(
        lambda x: torch._native_multi_head_attention(x, x, x, 32, 4, *weights)[0], torch.randn(2, 5, 32)
    )
    assert [site.reason for site in report.sites] == [SkipReason.FUSED_OP] * 2


def test_linears_in_nested_graphs_are_named() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(32, 48).requires_grad_(False)
    x = torch.randn(3, 32, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    reports = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list) -> Callable[..., object]:
        from int8compile.backend import copy_graph, rewrite_captured

        reports.append(rewrite_captured(copy_graph(gm), example_inputs, Int8Config())[1])
        return gm.forward

    torch.compile(model, backend=backend)(x)
    assert [site.reason for site in reports[0].sites] == [SkipReason.NESTED]


def test_custom_operators_with_weights_are_named() -> None:
    with torch.library._scoped_library("int8compile_test", "FRAGMENT") as library:
        library.define("mystery(Tensor x, Tensor w) -> Tensor")
        library.impl("mystery", lambda x, w: x @ w, "CompositeExplicitAutograd")
        torch.library.register_fake("int8compile_test::mystery", lambda x, w: x @ w, lib=library)
        model = Weights(lambda m, x: torch.ops.int8compile_test.mystery(x, m.kn))
        (site,) = int8compile.explain(model, torch.randn(2, 5, 32)).sites
    assert (site.reason, site.path) == (SkipReason.CUSTOM_OP, "kn")


@pytest.mark.parametrize(
    ("x", "w", "out", "expected"),
    [
        ("abk", "nk", "abn", ("", "k", "ab", "n")),
        ("bmk", "bkn", "bmn", ("b", "k", "m", "n")),
        ("k", "kn", "n", ("", "k", "", "n")),
        ("mk", "kn", "n", None),  # m is summed in x alone
        ("mk", "kn", "mkn", None),  # nothing is summed
        ("kk", "kn", "n", None),  # a diagonal
        ("mk", "kn", "mz", None),  # an unknown result
    ],
)
def test_roles(x: str, w: str, out: str, expected: tuple[str, ...] | None) -> None:
    found = roles(tuple(x), tuple(w), tuple(out))
    assert found == (None if expected is None else tuple(map(tuple, expected)))


@pytest.mark.parametrize(
    ("pattern", "path", "matched"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("head", "lm_head", False),
        ("mlp", "layers.3.mlp.up_proj", True),
        ("layers.0", "layers.0.mlp", True),
        ("layers.0", "layers.01.mlp", False),
        ("layers.*.o_proj", "model.layers.3.self_attn.o_proj", True),
        ("*_proj", "layers.3.mlp.up_proj", True),
    ],
)
def test_patterns_match_whole_components(pattern: str, path: str, matched: bool) -> None:
    assert matches(pattern, path) is matched


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['layers']._modules['0'].mlp", "layers.0.mlp"),
        ("L['self'].model.layers[0].mlp", "model.layers.0.mlp"),
        ("L['self']._parameters['weight']", "weight"),
        ("L['self']", ""),
        ("G['model'].fc", "fc"),
    ],
)
def test_clean_path(source: str, path: str) -> None:
    assert clean_path(source) == path
