"""Every spelling of a matmul with a static weight, on Dynamo graphs and on exported ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import Int8Config, SkipReason
from int8compile.backend import copy_graph, rewrite_captured
from int8compile.config import matches
from int8compile.ops import quantize_weight
from int8compile.passes import AttributeBinder, rewrite_graph
from int8compile.passes.contraction import roles
from int8compile.passes.names import clean_path
from tests.helpers.models import INT8_ERROR, Attention, by_operator, relative_error, rotation_from
from tests.helpers.spellings import REASONS, SPELLINGS, Weights, quantized

NAMES = [spelling[0] for spelling in SPELLINGS]


def _count(module: torch.fx.GraphModule) -> int:
    ops = (torch.ops.int8compile.linear.default, torch.ops.int8compile.batched_linear.default)
    return sum(node.target in ops for node in module.graph.nodes)


@pytest.mark.parametrize(("op", "call"), [spelling[1:] for spelling in SPELLINGS], ids=NAMES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_dynamo_graph(op: str, call: Callable[[Weights, Tensor], Tensor], dynamic: bool) -> None:
    """Each spelling is rewritten and reported by name, keeps its layout, and is close to float."""
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
    # Later views and the next graph rely on the strides, except for dimensions of size 1.
    real = [size != 1 for size in expected.shape]
    assert [*itertools.compress(actual.stride(), real)] == [*itertools.compress(expected.stride(), real)]
    assert relative_error(actual, expected) < INT8_ERROR


# Core ATen does not keep these as matmuls of a view of a parameter: mv becomes a product and a sum, the others expand
# or copy the weight first.
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
    """The same rules rewrite ATen graphs, as exported and decomposed into core ATen operators."""
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
    # Three sites, one weight: 48 x 32 floats before; int8, 48 scales and the d of 32 inputs after.
    assert report.totals()["bytes_before"] == 4 * 48 * 32
    assert report.totals()["bytes_after"] == 48 * 32 + 4 * 48 + 4 * 32


def test_two_layouts_of_one_weight_are_counted_both() -> None:
    model = Weights(lambda m, x: (x @ m.kn) @ m.kn.t())
    totals = int8compile.explain(model, torch.randn(2, 5, 32)).totals()
    assert totals["bytes_after"] == (48 * 32 + 4 * 48 + 4 * 32) + (48 * 32 + 4 * 32 + 4 * 48)


def test_a_bias_is_fused_where_it_is_one_number_per_output() -> None:
    """A fused bias is added in float32 before the only rounding, which shows in bfloat16."""
    model = Weights(lambda m, x: F.linear(x, m.nk, m.bias)).bfloat16()
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    actual = torch.compile(model, backend="int8")(x)
    d = rotation_from(model.nk)
    expected = torch.ops.int8compile.linear(x, *quantize_weight(model.nk, d), d, model.bias, 12.0)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("reason", "call", "options"), REASONS, ids=[f"{row[0].name} {i}" for i, row in enumerate(REASONS)]
)
def test_reasons(reason: SkipReason, call: Callable[[Weights, Tensor], Tensor], options: dict) -> None:
    report = int8compile.explain(Weights(call), torch.randn(2, 5, 32), config=options)
    assert [site.reason for site in report.sites] == [reason], str(report)
    assert report.sites[0].why().startswith(reason.value)
    assert report.sites[0].bytes_after == report.sites[0].bytes_before > 0


# PyTorch's decompositions use one of its deprecated functions.
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
    """Read as another dtype, the same bytes are other numbers."""
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
    """As in a LoRA merge, the product is a weight and not an activation."""
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
    # In grad mode the adapters train in float and the frozen base runs in int8, exactly as composed here.
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
    """RMSNorm ends with weight * norm(x), an activation although a parameter comes first."""
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
    expected = SkipReason.TIED if tied else SkipReason.LM_HEAD if name == "lm_head" else None
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
    """The operator of an encoder layer is opened; the linears of other fused operators are named."""
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
        ("mk", "kn", "n", None),  # m is summed in x alone.
        ("mk", "kn", "mkn", None),  # Nothing is summed.
        ("kk", "kn", "n", None),  # A diagonal.
        ("mk", "kn", "mz", None),  # An unknown result.
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


def test_settings_of_some_modules_in_the_graph() -> None:
    """Each operator has the threshold and the rotation of its own path; linears of one x may differ."""
    modules = {"k": {"threshold": 3.0}, "v": {"rotate": False}, "zzz": {"threshold": 5.0}}
    model, x, ops = Attention("qkv"), torch.randn(4, 32), []

    def backend(gm: torch.fx.GraphModule, example_inputs: list) -> Callable[..., object]:
        module = copy_graph(gm)
        rewrite_captured(module, example_inputs, Int8Config(modules=modules))
        calls = [node for node in module.graph.nodes if node.target is torch.ops.int8compile.linear.default]
        ops.extend((node.args[3] is not None, node.args[5]) for node in calls)
        return gm.forward

    torch.compile(model, backend=backend)(x)
    assert ops == [(True, 12.0), (True, 3.0), (False, 6.0)]
    report = int8compile.explain(model, x, config={"modules": modules})
    assert [site.rotation for site in report.sites] == [32, 32, 1]
    assert report.unused_patterns == ("zzz",)
