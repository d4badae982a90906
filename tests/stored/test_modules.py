"""Modules that hold int8: their results in eager mode and compiled, and their derivatives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import int8compile
from int8compile import FreedWeightError, Int8Experts, Int8Linear, backend, ops
from int8compile.errors import ConfigError, InputError
from int8compile.ops import column, reference
from tests.helpers.implementations import VARIANTS, needs_kernel, profiled
from tests.helpers.int8_modules import int8_embedding, int8_experts, int8_linear
from tests.helpers.models import INT8_ERROR, relative_error


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape)
    x[..., 3] = 30  # An outlier in both policies.
    return x.to(dtype)


def expected(module: Int8Linear, x: Tensor) -> Tensor:
    if module.weight_only:
        return reference.weight_only_linear(x, module.qweight, module.scale, module.d, module.bias)
    if module.outliers == "column":
        return column.column_linear(x, module.qweight, module.scale, module.bias, module.threshold)
    return reference.linear(x, module.qweight, module.scale, module.d, module.bias, module.threshold)


# Results


@pytest.mark.parametrize("dtype", ops.SUPPORTED_DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"weight_only": True}, {"threshold": 0.0}, {"rotated": False}, {"rotated": False, "weight_only": True}),
        {"rotated": False, "outliers": "column", "threshold": 4.0},
    ],
    ids=["default", "weight only", "no outliers", "not rotated", "weight only, not rotated", "column"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_reference(dtype: torch.dtype, options: dict[str, Any], bias: bool) -> None:
    module = int8_linear(bias=bias, **options)
    for shape in ((48,), (5, 48), (2, 3, 48), (0, 48)):
        x = activations(*shape, dtype=dtype) if 0 not in shape else torch.empty(shape, dtype=dtype)
        y = module(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected(module, x))


def test_linear_keeps_outliers() -> None:
    """Without a second digit, one large element of a row costs the other elements their precision."""
    module = int8_linear(512, 64, bias=False, rotated=False)
    plain = copy.deepcopy(module)
    plain.threshold = 0.0
    x = torch.randn(8, 512)
    x[:, 7] = 300
    exact = x @ module.dequantize().T
    assert (module(x) - exact).norm() < 0.05 * (plain(x) - exact).norm()


@pytest.mark.parametrize(("rotated", "threshold"), [(True, 12.0), (False, 6.0)])
@pytest.mark.parametrize("make", [int8_linear, lambda rotated: int8_experts("each" if rotated else "not")])
def test_the_threshold_that_is_not_given(make: Callable[..., Any], rotated: bool, threshold: float) -> None:
    module = make(rotated=rotated)
    assert (module.threshold, module.policy) == (threshold, f"row {threshold}")
    assert f"threshold={threshold:g}" in repr(module)
    assert ("rotation=16" in repr(module)) == rotated


@pytest.mark.parametrize("make", [int8_linear, int8_experts])
def test_thresholds_that_are_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"threshold=0\.5: it counts in mean magnitudes"):
        make(threshold=0.5)
    module = make(threshold=3)
    with pytest.raises(ConfigError, match=r"threshold=-1"):
        module.threshold = -1
    with pytest.raises(ConfigError, match=r"threshold=0\.5: it counts in mean magnitudes"):
        module.threshold = 0.5
    assert (module.threshold, module.policy) == (3.0, "row 3.0")
    module.threshold = None
    assert module.threshold == 12.0


def test_columns_are_of_weights_that_are_not_rotated() -> None:
    with pytest.raises(ConfigError, match=r"^Int8Linear: outliers='column' is for matrices that are not rotated"):
        int8_linear(outliers="column")
    module = int8_linear()
    module.path = "mlp.up"
    with pytest.raises(ConfigError, match=r"^mlp\.up: outliers='column' is for"):
        module.outliers = "column"
    assert module.policy == "row 12.0"
    with pytest.raises(ConfigError, match=r"^Int8Experts: outliers='column' is for matrices"):
        int8_experts("not").outliers = "column"
    assert int8_linear(rotated=False, outliers="column", threshold=0.5).policy == "column 0.5"


def test_gradients_reach_the_input_and_the_bias() -> None:
    module = int8_linear()
    x = torch.randn(5, 48, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 24) @ module.dequantize())
    assert torch.equal(module.bias.grad, torch.full((24,), 5.0))
    assert not module.qweight.requires_grad


def test_embedding() -> None:
    module, ids = int8_embedding(dtype=torch.bfloat16), torch.tensor([[3, 0], [49, 3]])
    assert torch.equal(module(ids), nn.functional.embedding(ids, module.dequantize()))
    assert module(ids).dtype == torch.bfloat16


def grouped(module: Int8Experts, x: Tensor, ends: list[int]) -> Tensor:
    y, begin = torch.zeros(x.shape[0], module.scale.shape[1], dtype=x.dtype), 0
    for expert, end in enumerate(ends):
        part, d = slice(begin, end), reference.of_each(module.d, expert)
        y[part] = reference.linear(x[part], module.qweight[expert], module.scale[expert], d, None, module.threshold)
        begin = end
    return y


@pytest.mark.parametrize("rotated", ["not", "together", "each"])
@pytest.mark.parametrize("ends", [[2, 5, 9], [0, 0, 9], [9, 9, 9], [0, 4, 6], [0, 0, 0]])
def test_experts(ends: list[int], rotated: str) -> None:
    """Each row goes through its expert; experts may have no rows, and rows without an expert give zeros."""
    module, x = int8_experts(rotated), activations(9, 48)
    assert torch.equal(module(x, torch.tensor(ends, dtype=torch.int32)), grouped(module, x, ends))


@pytest.mark.parametrize(
    ("ends", "message"), [([2, 1, 9], "must ascend"), ([2, 3, 10], "at most 9"), ([2, 9], r"ends is \[2\]")]
)
def test_experts_refuse_ends(ends: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        int8_experts()(torch.randn(9, 48), torch.tensor(ends, dtype=torch.int32))


def test_experts_pass_gradients_on() -> None:
    module, x = int8_experts(), torch.randn(9, 48, requires_grad=True)
    module(x, torch.tensor([2, 5, 8], dtype=torch.int32)).sum().backward()
    weights = module.dequantize()[torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])]
    torch.testing.assert_close(x.grad[:8], torch.einsum("sn,snk->sk", torch.ones(8, 24), weights))
    assert torch.equal(x.grad[8], torch.zeros(48))


def test_grouped_linear_is_a_complete_operator() -> None:
    module = int8_experts()
    x, ends = torch.randn(9, 48, requires_grad=True), torch.tensor([2, 5, 9], dtype=torch.int32)
    torch.library.opcheck(ops.grouped_linear.default, (x, module.qweight, module.scale, module.d, ends, 6.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, ends).dtype == torch.bfloat16


# Compiled


class Gated(nn.Module):
    """Linears that a graph could join: two with one input, and one that reads their result."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gate = int8_linear(64, 128, **options)
        self.up = int8_linear(64, 128, d=self.gate.d, **options)
        self.down = int8_linear(128, 64, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def called(graph: torch.fx.GraphModule) -> list[str]:
    return [node.target._opname for node in graph.graph.nodes if "int8compile" in str(node.target)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Collect the graphs that the backend hands to Inductor."""
    found: list[torch.fx.GraphModule] = []
    compile_graph = backend._compile

    def spy(module: torch.fx.GraphModule, *args: Any) -> Any:
        found.append(copy.deepcopy(module))
        return compile_graph(module, *args)

    monkeypatch.setattr(backend, "_compile", spy)
    return found


@torch.no_grad()
@pytest.mark.parametrize("weight_only", [False, True])
def test_compiled_gives_the_bits_of_eager(graphs: list[torch.fx.GraphModule], weight_only: bool) -> None:
    # A single linear: Inductor's exp differs from eager's by a bit.
    model, x = nn.Sequential(int8_linear(weight_only=weight_only)), activations(5, 48)
    y = model(x)
    assert torch.equal(torch.compile(model, backend="int8", fullgraph=True)(x), y)
    name = "weight_only_linear" if weight_only else "linear"
    assert called(graphs[0]) == [f"{name}_no_grad" if VARIANTS else name]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True)(x), y)
    assert len(graphs) == 1, "plain Inductor needs no backend of ours"


@needs_kernel
@torch.no_grad()
def test_weights_that_are_given_up_are_packed_and_joined(graphs: list[torch.fx.GraphModule]) -> None:
    model, x = Gated(), torch.randn(5, 64)
    kept, y = copy.deepcopy(model), model(x)
    before = int8compile.memory_footprint(model)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"free_weights": True})
    for _ in range(3):
        torch.testing.assert_close(compiled(x), y)
    assert called(graphs[0]) == ["packed_linear_pair_no_grad", "packed_linear_no_grad"]
    # Each weight is held once, packed, at sizes that need no padding here; d is unchanged. Modules keep their own copy
    # of the joined scales.
    assert int8compile.memory_footprint(model) == before + 4 * (128 + 128)
    with pytest.raises(FreedWeightError, match="free_weights=True"):
        model(x)
    with pytest.raises(FreedWeightError, match="free_weights=True"):
        torch.save(model.state_dict(), io.BytesIO())
    # A model that keeps its weights runs the same code and is not modified.
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(kept, backend="int8", fullgraph=True)(x), y)
    assert called(graphs[-1]) == ["linear_no_grad"] * 3
    assert int8compile.memory_footprint(kept) == before
    assert torch.equal(kept(x), y)


@torch.no_grad()
def test_one_graph_serves_many_modules(graphs: list[torch.fx.GraphModule]) -> None:
    for options in ({}, {"free_weights": True}):
        torch._dynamo.reset()
        graphs.clear()
        layers, x = [Gated() for _ in range(3)], torch.randn(5, 64)
        results = [layer(x) for layer in layers]
        for layer in layers:
            layer.compile(backend="int8", fullgraph=True, options=options)
        for _ in range(2):
            for layer, result in zip(layers, results, strict=True):
                torch.testing.assert_close(layer(x), result)
        # Newer versions of Dynamo compile once more when they notice that a weight is gone.
        assert len(graphs) <= (2 if options else 1)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"free_weights": True}])
def test_operators_that_the_user_calls_are_left_alone(graphs: list[torch.fx.GraphModule], options: Any) -> None:
    """Their weights are graph inputs or computed values, so they must not be taken over or freed."""
    module, x, scale = int8_linear(), torch.randn(5, 48), torch.rand(24)
    qweight, head = module.qweight.clone(), nn.Linear(24, 24)

    def call(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        y = ops.linear.default(x, qweight, scale, None, None, 6.0)
        return head(y + ops.linear.default(x, qweight.roll(1, 0), scale, None, None, 6.0))

    expected = call(x, qweight, scale)
    compiled = torch.compile(call, backend="int8", fullgraph=True, options=options)
    for _ in range(2):
        assert relative_error(compiled(x, qweight, scale), expected) < INT8_ERROR
    assert called(graphs[0])[:2] == ["linear", "linear"]
    assert type(qweight) is Tensor


def test_compiled_with_gradients(graphs: list[torch.fx.GraphModule]) -> None:
    module, x = int8_linear(), torch.randn(5, 48, requires_grad=True)
    torch.compile(module, backend="int8", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 24) @ module.dequantize())
    torch.testing.assert_close(module.bias.grad, torch.full((24,), 5.0))
    assert called(graphs[0]) == ["linear"]


@torch.no_grad()
def test_changed_weights_are_noticed_when_they_are_packed() -> None:
    model, x = nn.Sequential(int8_linear()), torch.randn(5, 48)
    other = nn.Sequential(int8_linear())
    other.load_state_dict(other.state_dict() | {"0.qweight": model[0].qweight + 1, "0.scale": model[0].scale})
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))


@torch.no_grad()
def test_explain_lists_them() -> None:
    model = nn.Sequential(int8_linear(64, 96), int8_linear(96, 64, weight_only=True), nn.Linear(64, 64))
    report = int8compile.explain(model, torch.randn(5, 64), config={"skip_modules": ["2"]})
    assert [(site.path, site.runs_in) for site in report.sites] == [("0", "int8"), ("1", "int8 weight"), ("2", "float")]
    assert [site.shape for site in report.rewritten] == [("5", "64", "96"), ("5", "96", "64")]
    assert [site.bytes_after for site in report.rewritten] == [64 * 96 + 4 * (96 + 64)] * 2


@needs_kernel
def test_eager_runs_the_kernel() -> None:
    """The definition calls PyTorch operators; the kernel calls none."""
    module, x = int8_linear(), torch.randn(5, 48)
    with torch.no_grad():
        names = profiled(lambda: module(x))
    assert names["int8compile::linear"] == 1
    assert not any("mm" in name for name in names), names


# Derivatives: those of the product with the dequantized weight


def models() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return an int8 model, its dequantized model, and the original float model."""
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 24)).eval().requires_grad_(False)
    other = copy.deepcopy(model)
    int8compile.quantize_(other, progress=False)
    dequantized = copy.deepcopy(other)
    int8compile.dequantize_(dequantized)
    return other, dequantized.requires_grad_(False), model


def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.cos(),))[1],
    "dual numbers": forward_mode,
    "grad": lambda model, x: torch.func.grad(loss(model))(x),
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](x[:, :24].cos())[0],
    "jacrev": lambda model, x: torch.func.jacrev(model)(x[0]),
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x[0]),
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "grad of each": lambda model, x: torch.func.vmap(torch.func.grad(loss(model)))(x),
    "hessian": lambda model, x: torch.func.hessian(loss(model))(x[0]),
    "grad of grad": lambda model, x: torch.func.grad(lambda x: torch.func.grad(loss(model))(x).square().sum())(x),
    "forward over forward": lambda model, x: torch.func.jacfwd(torch.func.jacfwd(loss(model)))(x[0]),
    "with respect to a bias": lambda model, x: torch.func.grad(
        lambda bias: torch.func.functional_call(model, {"0.bias": bias}, (x,)).square().sum()
    )(torch.ones(48)),
    "along a bias": lambda model, x: torch.func.jvp(
        lambda bias: torch.func.functional_call(model, {"0.bias": bias}, (x,)), (torch.ones(48),), (torch.ones(48),)
    )[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str) -> None:
    model, dequantized, _ = models()
    x = torch.randn(5, 48)
    transform = TRANSFORMS[name]
    # The results differ by the rounding of activations, which derivatives see only through the tanh.
    assert relative_error(transform(model, x), transform(dequantized, x)) < INT8_ERROR


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
@pytest.mark.parametrize("name", ["jvp", "grad", "vmap", "grad of each"])
def test_torch_func_in_a_compiled_function(name: str) -> None:
    x = torch.randn(5, 48)
    transform = TRANSFORMS[name]
    for model in models():
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, model=model: transform(model, x), backend="int8")
        assert relative_error(compiled(x), transform(model, x)) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"rotated": False}, {"rotated": False, "outliers": "column"}, {"weight_only": True}]
)
def test_tangents_are_those_of_the_dequantized_product(options: dict[str, Any]) -> None:
    module, (x, along) = int8_linear(**options), torch.randn(2, 5, 48)
    y, tangent = torch.func.jvp(module, (x,), (along,))
    assert torch.equal(y, module(x))
    torch.testing.assert_close(tangent, along @ module.dequantize().mT)
    batched = torch.func.vmap(module)(x[:, None])
    assert torch.equal(batched, torch.stack([module(row) for row in x[:, None]]))


def test_tangents_of_experts() -> None:
    module, (x, along) = int8_experts(), torch.randn(2, 5, 48)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    tangent = torch.func.jvp(lambda x: module(x, ends), (x,), (along,))[1]
    weights = module.dequantize()
    torch.testing.assert_close(tangent[:2], along[:2] @ weights[0].mT)
    torch.testing.assert_close(tangent[2:4], along[2:4] @ weights[2].mT)
    assert not tangent[4:].any()
