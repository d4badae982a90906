"""Code that reads the weight of an int8 module: matmuls run in int8, other reads in float, most writes are refused."""

from __future__ import annotations

import copy
import gc
import pathlib
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import Int8Warning, Int8WeightError, SkipReason, ops
from int8compile.passes.static import WeightView
from int8compile.stored import module_weight
from int8compile.stored.module_weight import Int8Weight
from int8compile.weights import STORE, view_of_int8
from tests.helpers.implementations import profiled
from tests.helpers.int8_modules import int8_experts
from tests.helpers.models import INT8_ERROR, relative_error

Call = Callable[[Tensor, nn.Module], Tensor]


class Reader(nn.Module):
    """A parent that calls a function of its input and its linear, instead of the linear."""

    def __init__(self, call: Call, k: int = 64, n: int = 96) -> None:
        super().__init__()
        self.call = call
        self.inner = nn.Linear(k, n)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.inner)


def quantized(call: Call, **options: Any) -> tuple[Reader, Reader]:
    """Return a float model and the same model in int8."""
    model = Reader(call).eval()
    other = copy.deepcopy(model)
    report = int8compile.quantize_(other, options, progress=False)
    assert len(report.rewritten) == 1
    return model, other


@pytest.fixture(autouse=True)
def _warns_again() -> None:
    module_weight.warn_once.cache_clear()


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
H = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
X3 = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3))

# (call, input, number of linears it is).
MATMULS: dict[str, tuple[Call, Tensor, int]] = {
    "F.linear": (lambda x, m: F.linear(x, m.weight, m.bias), X3, 1),
    "keywords": (lambda x, m: F.linear(input=x, weight=m.weight, bias=m.bias), X, 1),
    "x @ w.t()": (lambda x, m: x @ m.weight.t(), X, 1),
    "x @ w.T": (lambda x, m: x @ m.weight.T, X, 1),
    "x @ w.mT": (lambda x, m: x @ m.weight.mT, X3, 1),
    "x @ w": (lambda x, m: x @ m.weight, H, 1),
    "w @ x": (lambda x, m: (m.weight @ x.t()).t(), X, 1),
    "F.linear of w.t()": (lambda x, m: F.linear(x, m.weight.t()), H, 1),
    "mm": (lambda x, m: torch.mm(x, m.weight.transpose(0, 1)), X, 1),
    "mv": (lambda x, m: torch.mv(m.weight, x[0]), X, 1),
    "addmm": (lambda x, m: torch.addmm(m.bias, x, m.weight.t(), alpha=2, beta=3), X, 1),
    "bias.addmm": (lambda x, m: m.bias.addmm(x, m.weight.t()), X, 1),
    "bmm": (lambda x, m: torch.bmm(x, m.weight.view(2, 48, 64).mT), X3, 1),
    "baddbmm": (lambda x, m: torch.baddbmm(x[..., :48], x, m.weight.view(2, 48, 64).mT), X3, 1),
    "einsum": (lambda x, m: torch.einsum("bk,nk->bn", x, m.weight), X, 1),
    "einsum over outputs": (lambda x, m: torch.einsum("bn,nk->bk", x, m.weight), H, 1),
    "heads": (lambda x, m: torch.einsum("bk,hdk->bhd", x, m.weight.view(4, 24, 64)), X, 1),
    "heads, back": (lambda x, m: torch.einsum("bhd,hdk->bk", x.view(5, 4, 24), m.weight.view(4, 24, 64)), H, 1),
    "tensordot": (lambda x, m: torch.tensordot(x, m.weight, dims=([1], [1])), X, 1),
    "inner": (lambda x, m: torch.inner(x, m.weight), X, 1),
    "conv1d": (lambda x, m: F.conv1d(x.mT, m.weight[:, :, None]), X3, 1),
    "aten": (lambda x, m: torch.ops.aten.mm(x, m.weight.t()), X, 1),
    "linalg": (lambda x, m: torch.linalg.matmul(x, m.weight.t()), X, 1),
    "chunk": (lambda x, m: torch.cat([F.linear(x, part) for part in m.weight.chunk(3)], -1), X, 3),
    "split": (lambda x, m: sum(F.linear(x, part) for part in m.weight.split(32)), X, 3),
    "unbind": (lambda x, m: sum(F.linear(x, part) for part in m.weight.view(3, 32, 64).unbind(0)), X, 3),
    "rows": (lambda x, m: F.linear(x, m.weight[:64], m.bias[:64]), X, 1),
    "columns": (lambda x, m: F.linear(x[:, :32], m.weight[:, :32]), X, 1),
    "data": (lambda x, m: F.linear(x, m.weight.data), X, 1),
    "detach": (lambda x, m: F.linear(x, m.weight.detach()), X, 1),
    "to": (lambda x, m: F.linear(x.bfloat16(), m.weight.to(torch.bfloat16)).float(), X, 1),
    "type_as": (lambda x, m: F.linear(x.half(), m.weight.type_as(x.half())).float(), X, 1),
    "clone": (lambda x, m: F.linear(x, m.weight.clone()), X, 1),
    "the module as well": (lambda x, m: m(x) + F.linear(x, m.weight), X, 2),
}


@pytest.mark.parametrize("name", MATMULS)
def test_matmuls_run_in_int8(name: str) -> None:
    call, x, linears = MATMULS[name]
    model, other = quantized(call)
    other(x)  # The first call computes the shapes of the float product, on tensors without data.
    operators = profiled(lambda: other(x))
    assert operators["int8compile::linear"] + operators["int8compile::batched_linear"] == linears
    assert not [op for op in operators if op.startswith("aten::") and op.endswith(("mm", "matmul", "linear"))]
    assert 0 < relative_error(other(x), model(x)) < INT8_ERROR
    report = int8compile.explain(other, x)
    assert [site.path for site in report.sites] == ["inner"] * linears
    assert len(report.rewritten) == linears
    assert not report.notes[:-1]  # The last note names the CPU.


@pytest.mark.parametrize("name", ["F.linear", "x @ w", "heads", "heads, back", "chunk", "baddbmm", "conv1d", "columns"])
def test_compiled_as_in_eager_mode(name: str) -> None:
    call, x, _ = MATMULS[name]
    _, other = quantized(call)
    compiled = torch.compile(other, backend="int8", fullgraph=True)
    assert torch.equal(compiled(x), other(x))
    # aot_eager computes it in float.
    assert not torch.equal(other(x), torch.compile(other, backend="aot_eager", fullgraph=True)(x))


# Experts [3, 24, 48]; x has the same number of rows for each of the three.
EXPERTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "one": lambda x, m: F.linear(x[0], m.weight[1]),
    "bmm": lambda x, m: torch.bmm(x, m.weight.mT),
    "some": lambda x, m: torch.bmm(x[:2], m.weight[1:].mT),
    "transposed": lambda x, m: torch.bmm(x[..., :24], m.weight),
    "as one": lambda x, m: F.linear(x[0], m.weight.flatten(0, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("rotated", ["not", "together", "each"])
@pytest.mark.parametrize("name", EXPERTS)
def test_the_weights_of_experts(name: str, rotated: str) -> None:
    """Each matrix may have a d of its own."""
    module, call, x = int8_experts(rotated), EXPERTS[name], torch.randn(3, 5, 48)
    expected = call(x, types.SimpleNamespace(weight=module.dequantize()))
    call(x, module)
    operators = profiled(lambda: call(x, module))
    assert operators["int8compile::linear"] + operators["int8compile::batched_linear"] == 1
    y = call(x, module)
    assert 0 < relative_error(y, expected) < INT8_ERROR
    assert torch.equal(torch.compile(lambda x: call(x, module), backend="int8", fullgraph=True)(x), y)


@torch.no_grad()
def test_columns_run_as_the_module_does() -> None:
    _, other = quantized(MATMULS["F.linear"][0], outliers="column", threshold=2.0)
    expected = other.inner(X)
    assert profiled(lambda: other(X))["int8compile::column_linear"] == 1
    assert torch.equal(other(X), expected)
    assert torch.equal(torch.compile(other, backend="int8", fullgraph=True)(X), expected)


def test_the_weight_as_it_is_takes_no_more_memory() -> None:
    _, other = quantized(MATMULS["chunk"][0])
    before = int8compile.memory_footprint(other)
    other(X)
    assert int8compile.memory_footprint(other) - before <= 4 * 96  # Scales of views; their rows keep the module's d.
    weights = list(STORE.weights(other.inner.qweight).values())
    assert len(weights) == 3
    assert all(weight.d is other.inner.d for weight in weights)
    _, other = quantized(MATMULS["F.linear"][0])
    other(X3)
    torch.compile(other, backend="int8")(X3)
    assert not STORE.weights(other.inner.qweight)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_transposed_weight_is_quantized_again_by_its_rows(rotated: bool) -> None:
    weight = torch.randn(48, 32)
    d = ops.rotation_of(ops.input_scales([weight])) if rotated else None
    qweight, scale = ops.quantize_weight(weight, d)
    values = ops.dequantize_weight(qweight, scale, d, torch.float32)
    again, scales, new_d = view_of_int8(qweight, scale, d, WeightView((32, 48), (1, 32), 0, (32, 48)))
    expected = ops.quantize_weight(values.t().contiguous(), new_d)
    assert torch.equal(again, expected[0])
    assert torch.equal(scales, expected[1])
    assert (new_d is not None) == rotated
    assert relative_error(ops.dequantize_weight(again, scales, new_d, torch.float32), values.t()) < 0.01
    part, rows, same_d = view_of_int8(qweight, scale, d, WeightView((2, 32), (32, 1), 64, (2, 32)))
    assert part.data_ptr() == qweight[2:].data_ptr()
    assert torch.equal(rows, scale[2:4])
    assert same_d is d


@pytest.mark.parametrize("in_place", [False, True])
def test_views_that_are_quantized_again_follow_the_d_of_the_module(in_place: bool) -> None:
    holder = nn.Module()
    holder.inner = nn.Linear(64, 96)
    int8compile.quantize_(holder, progress=False)
    y = torch.randn(5, 96)
    calls = [lambda: y @ holder.inner.weight, torch.compile(lambda: y @ holder.inner.weight, backend="int8")]
    with torch.no_grad():
        for call in calls:
            call()
        if in_place:
            holder.inner.d.mul_(2)
        else:
            holder.inner.d = holder.inner.d * 1.5
        expected = y @ holder.inner.dequantize()
        for call in calls:
            assert relative_error(call(), expected) < 0.02


READS: dict[str, Call] = {
    "multiplied": lambda x, m: F.linear(x, m.weight * 2),
    "chosen rows": lambda x, m: F.linear(x, m.weight[torch.tensor([0, 1, 2])]),
    "norm": lambda x, m: x * m.weight.norm(),
    "table": lambda x, m: F.embedding(torch.arange(5), m.weight),
    "concatenated": lambda x, m: F.linear(x, torch.cat([m.weight, m.weight])),
    "copied from": lambda x, m: torch.zeros(96, 64).copy_(m.weight) @ x.t(),
    "NumPy": lambda x, m: x * float(m.weight.numpy().sum()),
    "out": lambda x, m: torch.mm(x, m.weight.t(), out=torch.empty(5, 96)),
    "with itself": lambda x, m: m.weight @ m.weight.t() + x.sum(),
    "equal": lambda x, m: x * torch.equal(m.weight, m.weight),
}


@pytest.mark.parametrize("name", READS)
def test_other_reads_get_it_in_float_with_a_warning(name: str) -> None:
    _, other = quantized(READS[name])
    expected = copy.deepcopy(other)
    int8compile.dequantize_(expected)
    with torch.no_grad(), pytest.warns(Int8Warning, match=r"^inner: .* reads its weight, which is dequant") as caught:
        y = other(X)
    with torch.no_grad():
        assert torch.equal(y, expected(X))
        assert len(caught) == 1
        other(X)  # The warning comes once: a second one would be an error.


def test_a_read_in_a_compiled_graph_is_named() -> None:
    _, other = quantized(lambda x, m: F.linear(x, m.weight * 2))
    expected = copy.deepcopy(other)
    int8compile.dequantize_(expected)
    with pytest.warns(Int8Warning) as caught:
        y = torch.compile(other, backend="int8")(X)
    assert relative_error(y, expected(X)) < 1e-6
    said = [str(warning.message) for warning in caught if warning.category is Int8Warning]
    assert len(said) == 2
    assert "inner.weight is int8, and dequantized at every call for what reads it in float (test_module_w" in said[0]
    assert SkipReason.COMPUTED.value in said[1]


def test_metadata_needs_no_values() -> None:
    _, other = quantized(lambda x, m: x)
    weight, plain = other.inner.weight, torch.empty(96, 64)
    for name in ("shape", "dtype", "device", "ndim", "nbytes", "itemsize", "is_sparse", "is_quantized", "is_meta"):
        assert getattr(weight, name) == getattr(plain, name), name
    for name in ("numel", "stride", "is_contiguous", "get_device", "element_size", "is_floating_point", "is_complex"):
        assert getattr(weight, name)() == getattr(plain, name)(), name
    assert len(weight) == 96
    assert isinstance(weight, Int8Weight)
    assert "Int8Weight('inner', shape=[96, 64], dtype=torch.float32" in repr(weight)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert weight.t().shape == (64, 96)
    assert not hasattr(weight, "SCB")


def in_place(call: Callable[[nn.Module], Any]) -> Call:
    """Run a call before the first use, as models do that scale their weights when they first run."""

    def run(x: Tensor, module: nn.Module) -> Tensor:
        if not hasattr(module, "done"):
            with torch.no_grad():
                call(module)
            module.done = True
        return module(x) + F.linear(x, module.weight)

    return run


SCALINGS: dict[str, Callable[[nn.Module], Any]] = {
    "mul_": lambda m: m.weight.mul_(2),
    "div_": lambda m: m.weight.div_(2**3),
    "negative": lambda m: m.weight.mul_(-2),
    "twice": lambda m: (m.weight.mul_(2), m.weight.div_(3)),
    "detach": lambda m: m.weight.detach().mul_(2),
    "zero": lambda m: m.weight.mul_(0),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_multiplying_by_a_number_multiplies_the_scales(name: str, how: str) -> None:
    model, other = quantized(in_place(SCALINGS[name]))
    values = other.inner.qweight.clone()
    expected = model(X)
    run = torch.compile(other, backend="int8") if how == "compiled" else other
    for _ in range(2):  # The first run scales the weight; the second must see the scaled weight.
        assert relative_error(run(X), expected) < INT8_ERROR
    assert torch.equal(other.inner.qweight, -values if name == "negative" else values)
    assert (other.inner.scale >= 0).all()


def test_a_product_assigned_in_place() -> None:
    def multiply(module: nn.Module) -> None:
        module.weight *= 3
        module.weight.data *= 2

    model, other = quantized(in_place(multiply))
    assert relative_error(other(X), model(X)) < INT8_ERROR


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "zero_": lambda m: m.weight.zero_(),
    "add_": lambda m: m.weight.add_(1),
    "copy_": lambda m: m.weight.copy_(torch.zeros(96, 64)),
    "a part": lambda m: m.weight[:4].mul_(2),
    "by a vector": lambda m: m.weight.mul_(torch.ones(96, 1)),
    "by infinity": lambda m: m.weight.mul_(float("inf")),
    "by nothing": lambda m: m.weight.div_(0),
    "item": lambda m: m.weight.__setitem__(0, 1.0),
    "a list": lambda m: torch._foreach_mul_([m.weight], 2),
    "out": lambda m: torch.add(m.bias[:, None], torch.ones(64), out=m.weight),
    "init": lambda m: nn.init.normal_(m.weight),
    "another view": lambda m: m.weight.diagonal().fill_(0),
    "a view as another": lambda m: m.weight.view_as(m.weight).copy_(torch.zeros(96, 64)),
    "integers": lambda m: m.weight.view(torch.int32).zero_(),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_other_writes_are_refused(name: str, how: str) -> None:
    _, other = quantized(in_place(WRITES[name]))
    before = copy.deepcopy(other)
    run = torch.compile(other, backend="int8") if how == "compiled" else other
    with pytest.raises(Int8WeightError, match=r"inner.* int8.*skip_modules"):
        run(X)
    assert torch.equal(other.inner.qweight, before.inner.qweight)
    assert torch.equal(other.inner.scale, before.inner.scale)


def test_the_weight_is_not_replaced() -> None:
    _, other = quantized(lambda x, m: x)
    with pytest.raises(Int8WeightError, match=r"inner\.weight cannot be replaced, it is int8"):
        other.inner.weight = nn.Parameter(torch.zeros(96, 64))
    with pytest.raises(Int8WeightError, match=r"inner\.weight cannot be replaced, it is int8"):
        other.inner.weight = torch.zeros(96, 64)
    with pytest.raises(Int8WeightError, match=r"inner: assigning another tensor would write to its weight"):
        other.inner.weight.data = torch.zeros(96, 64)
    with pytest.raises(Int8WeightError, match=r"would write"):  # PEFT merges in this way.
        other.inner.weight.data += torch.ones(96, 64)


def test_orthogonal_initialization_is_refused() -> None:
    _, other = quantized(lambda x, m: x)
    with pytest.raises(Int8WeightError, match="would write"):
        nn.init.orthogonal_(other.inner.weight)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda w: w.clone(),
    "half": lambda w: w.half(),
    "double": lambda w: w.double(),
    "to": lambda w: w.to(torch.bfloat16),
    "copied to": lambda w: w.to(w.device, copy=True),
    "contiguous": lambda w: w.t().contiguous(),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
@pytest.mark.parametrize("name", COPIES)
def test_copies_do_not_follow_the_module(name: str) -> None:
    _, other = quantized(lambda x, m: x)
    weight = other.inner.weight
    kept, values = COPIES[name](weight), COPIES[name](other.inner.dequantize())
    assert (kept.shape, kept.stride(), kept.dtype) == (values.shape, values.stride(), values.dtype)
    weight.mul_(4)
    assert torch.equal(kept * 1, values)
    kept.mul_(8)
    # float16 has fewer bits for values near 0.
    torch.testing.assert_close(kept * 1, values * 8, rtol=0, atol=2**-22 if kept.dtype == torch.float16 else 0)
    assert (
        relative_error(other.inner.weight * 1, 4 * values.T.float() if name == "contiguous" else 4 * values.float())
        < 1e-2
    )
    if isinstance(kept, Int8Weight):
        weight.mul_(-1)
        with pytest.raises(Int8WeightError, match="has changed since this copy was made"):
            kept * 1


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
@pytest.mark.parametrize(
    "call",
    [
        lambda x, m: H @ m.weight,
        lambda x, m: F.linear(x, m.weight[:64]),
        lambda x, m: F.linear(x, m.weight),
        lambda x, m: m(x),
    ],
    ids=["transposed", "rows", "whole", "module"],
)
@pytest.mark.parametrize("options", [{}, {"free_weights": True}])
@pytest.mark.parametrize("factor", [2, -2])
def test_a_graph_that_scales_at_every_call(call: Call, options: dict[str, Any], factor: int) -> None:
    def run(x: Tensor, module: nn.Module) -> Tensor:
        module.weight.mul_(factor)
        return call(x, module)

    model, other = quantized(run)
    compiled = torch.compile(other, backend="int8", options=options)
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(compiled(X), model(X)) < INT8_ERROR


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
@pytest.mark.parametrize(
    "call",
    [
        lambda x, m: (m.weight.t(), m.weight.mul_(2))[0],
        lambda x, m: (m.weight.clone(), m.weight.mul_(2))[0].t(),
        lambda x, m: (m.weight.bfloat16(), m.weight.mul_(2))[0].t().float(),
        lambda x, m: (m.weight, m.weight.mul_(2))[0].t(),
        lambda x, m: (m.weight, m.weight.t().mul_(2))[1],
    ],
    ids=["view", "clone", "cast", "the weight", "of a view"],
)
def test_what_was_taken_before_a_write(call: Call) -> None:
    """Views follow the write, copies do not, in eager mode and compiled."""
    model, other = quantized(lambda x, m: x @ call(x, m))
    same = copy.deepcopy(other)
    with torch.no_grad():
        expected = model(X)
        assert relative_error(other(X), expected) < INT8_ERROR
        assert relative_error(torch.compile(same, backend="int8")(X), expected) < INT8_ERROR


def test_a_write_inside_a_nested_graph_is_refused() -> None:
    def run(x: Tensor, module: nn.Module) -> Tensor:
        return torch.cond(x.sum() > 1e6, lambda x: F.linear(x, module.weight.mul_(2)), module.forward, (x,))

    _, other = quantized(run)
    with pytest.raises(Exception, match=r"written to in the forward pass|mutat"):
        torch.compile(other, backend="int8")(X)


def test_scaling_while_gradients_are_recorded_is_refused() -> None:
    """PyTorch's gradient of a graph that changes a buffer uses the values after the change."""
    _, other = quantized(lambda x, m: (m.weight.mul_(2), F.linear(x, m.weight))[1])
    with pytest.raises(
        Int8WeightError, match=r"inner\.weight is multiplied by a number in a forward pass that records"
    ):
        torch.compile(other, backend="int8")(X.clone().requires_grad_())


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_sizes_and_options_of_each_module(dynamic: bool | None) -> None:
    """A single compiled function serves modules with different thresholds."""
    _, other = quantized(lambda x, m: F.linear(x, m.weight))
    compiled = torch.compile(other, backend="int8", dynamic=dynamic)
    held = other.inner
    for threshold in (6.0, 2.0):
        held.threshold = threshold
        for rows in (5, 9):
            x = torch.randn(rows, 64)
            expected = ops.linear(x, held.qweight, held.scale, held.d, None, threshold)
            assert torch.equal(compiled(x), expected)
            assert torch.equal(other(x), expected)


def test_torch_func_over_reads() -> None:
    for call, x in ((MATMULS["F.linear"][0], X), (MATMULS["x @ w"][0], H)):
        model, other = quantized(call)
        for transform in (
            lambda m, x: torch.func.grad(lambda x: m(x).square().sum())(x),
            lambda m, x: torch.func.jvp(m, (x,), (x.cos(),))[1],
            lambda m, x: torch.func.vmap(m)(x[:, None]),
        ):
            assert relative_error(transform(other, x), transform(model, x)) < INT8_ERROR


def test_without_data_only_shapes_are_known() -> None:
    model = Reader(MATMULS["x @ w"][0]).to("meta")
    int8compile.quantize_(model, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model(H.to("meta")).shape == (5, 64)
        _, other = quantized(MATMULS["x @ w"][0])
        traced = torch.fx.experimental.proxy_tensor.make_fx(other)(H)
    assert relative_error(traced(H), other(H)) < INT8_ERROR


def test_what_modules_ask_of_a_parameter() -> None:
    _, other = quantized(lambda x, m: x)
    weight = other.inner.weight
    weight.grad = None
    weight.requires_grad = False
    assert weight.type() == "torch.FloatTensor"
    assert weight.to(X.device) is weight
    assert weight.cpu() is weight
    assert weight.new_zeros(3).dtype == torch.float32
    assert torch.zeros_like(weight).shape == (96, 64)
    assert X.double().to(weight).dtype == torch.float32
    with pytest.raises(Int8WeightError, match=r"cannot be an nn\.Parameter"):
        nn.Parameter(weight)
    with pytest.raises(TypeError, match="cannot assign"):
        nn.Linear(64, 96).weight = weight


def test_conv1d_is_read_and_scaled_as_it_is_in_float() -> None:
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(96, 64)).requires_grad_(False)
    other = copy.deepcopy(model)
    int8compile.quantize_(other, progress=False)
    assert other[0].weight.shape == (64, 96)
    assert relative_error(X @ other[0].weight, X @ model[0].weight) < INT8_ERROR
    model[0].weight.mul_(3)
    other[0].weight.mul_(3)
    assert relative_error(other(X), model(X)) < INT8_ERROR


def test_refresh_is_for_int8_modules_too() -> None:
    _, other = quantized(MATMULS["x @ w"][0])
    other(H)
    other.inner.scale.data[3].mul_(100)
    expected = H @ other.inner.dequantize()
    assert relative_error(other(H), expected) > 0.5
    int8compile.refresh(other)
    # One output dominates every row of the transposed weight.
    assert relative_error(other(H), expected) < 2 * INT8_ERROR


def test_gradients_go_through_what_reads_the_weight() -> None:
    model, other = quantized(MATMULS["x @ w.t()"][0])
    gradients = []
    for each in (model, other):
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < INT8_ERROR


def test_nothing_keeps_a_model_that_was_read() -> None:
    for call in (MATMULS["chunk"][0], READS["norm"], MATMULS["heads, back"][0]):
        _, other = quantized(call)
        x = H if call is MATMULS["heads, back"][0] else X
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other(x)
        kept = weakref.ref(other.inner.qweight)
        del other
        gc.collect()
        assert kept() is None


def test_free_weights_reads_what_is_left() -> None:
    model, other = quantized(lambda x, m: F.linear(x, m.weight))
    compiled = torch.compile(other, backend="int8", options={"free_weights": True})
    assert relative_error(compiled(X), model(X)) < INT8_ERROR
    other.inner.scale.mul_(2)
    assert relative_error(compiled(X), 2 * model(X)) < INT8_ERROR


def test_an_exported_model_reads_it_in_float(tmp_path: pathlib.Path) -> None:
    _, other = quantized(lambda x, m: m(x) * m.weight.norm())
    int8compile.export(other, (X,), tmp_path / "reader.pt2")
    y = torch._inductor.aoti_load_package(tmp_path / "reader.pt2")(X)
    with pytest.warns(Int8Warning):
        assert relative_error(y, other(X)) < 1e-6
    _, other = quantized(lambda x, m: (m.weight.mul_(2), m(x))[1])
    with pytest.raises(Int8WeightError, match=r"inner\.weight is multiplied by a number .* which a package cannot k"):
        int8compile.export(other, (X,), tmp_path / "scales.pt2")


def test_an_exported_model_reads_it_too(tmp_path: pathlib.Path) -> None:
    model, other = quantized(lambda x, m: F.linear(F.linear(x, m.weight), m.weight.t()))
    report = int8compile.export(other, (X,), tmp_path / "reader.pt2")
    assert len(report.rewritten) == 2
    y = torch._inductor.aoti_load_package(tmp_path / "reader.pt2")(X)
    assert torch.equal(y, other(X))
    assert relative_error(y, model(X)) < INT8_ERROR


def test_embeddings_are_multiplied_with_their_activations_in_float() -> None:
    """A tied head: `F.linear(x, self.embedding.weight)`."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
            self.head.weight = self.table.weight
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.table.weight)

    model = Tied().eval()
    other = copy.deepcopy(model)
    int8compile.quantize_(other, {"lm_head": "int8_weight"}, progress=False)
    assert profiled(lambda: other(X))["int8compile::weight_only_linear"] == 1
    assert relative_error(other(X), model(X)) < INT8_ERROR


@pytest.mark.parametrize(
    ("activation", "norm_first", "padded"),
    [("relu", False, False), ("gelu", True, False), ("gelu", False, True), ("relu", True, True)],
)
def test_encoder_layers_of_pytorch(activation: str, norm_first: bool, padded: bool) -> None:
    """PyTorch's fused operator reads every weight and would compute in float."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation=activation, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    x, mask = torch.randn(3, 7, 64), torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4:] = True
    given = {"src_key_padding_mask": mask} if padded else {}
    other = copy.deepcopy(model)
    report = int8compile.quantize_(other, progress=False)
    assert len(report.rewritten) == 4
    with torch.no_grad():
        expected = model(x, **given)[~mask]
        for each, linears in ((model, 8), (other, 8)):
            torch._dynamo.reset()
            compiled = torch.compile(each, backend="int8")
            assert 1e-4 < relative_error(compiled(x, **given)[~mask], expected) < INT8_ERROR
            assert len(int8compile.explain(each, x, **given).rewritten) == linears
        operators = profiled(lambda: other(x, **given))
        assert operators["int8compile::linear"] == 4
        assert "aten::_transformer_encoder_layer_fwd" not in operators
