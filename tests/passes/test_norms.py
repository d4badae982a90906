"""Norms fused into the quantization of their results: every spelling and its kind, and norms that are not fused."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from int8compile import Int8Config, ops
from int8compile.exporting.exporter import rewrite
from int8compile.ops import quantized
from int8compile.passes.lower_gpu import Lowered
from int8compile.report import Report
from int8compile.sites import FusionReason, NotFused
from tests.helpers.lowered import Seen, by_operator, compiled, near
from tests.helpers.models import INT8_ERROR

K = 64
DTYPES = [torch.float32, torch.bfloat16]

# Operators that remain of a norm that is computed separately.
OF_NORMS = {"rms_norm", "layer_norm", "native_layer_norm", "rsqrt", "pow", "square", "mean"}


class Norm(nn.Module):
    """A norm with a weight and a bias, computed by a function."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.weight, self.bias = nn.Parameter(torch.rand(K) + 0.5), nn.Parameter(torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight, self.bias)


def llama(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """The norm of transformers' Llama, Mistral, Qwen2, Phi-3 and others."""
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return weight * x.to(dtype)


def gemma(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """The norm of transformers' Gemma and Qwen3-Next."""
    v = x.float()
    y = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    y = y * (1.0 + weight.float())
    return y.type_as(x)


def gemma_3n(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    v = x.float()
    y = v * torch.pow(v.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
    return (y * weight.float()).type_as(x)


def olmo_2(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    v = x.to(torch.float32)
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight * v).to(x.dtype)


def t5(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """x is promoted to float32 by a product with a float32 number."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    y = x * torch.rsqrt(variance + 1e-6)
    return weight * (y.to(weight.dtype) if weight.dtype == torch.bfloat16 else y)


def cohere(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    v = x.to(torch.float32)
    mean = v.mean(-1, keepdim=True)
    variance = (v - mean).pow(2).mean(-1, keepdim=True)
    v = (v - mean) * torch.rsqrt(variance + 1e-5)
    return (weight.to(torch.float32) * v).to(x.dtype)


def reversed_operands(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    v = x.float()
    y = torch.rsqrt(torch.add(1e-6, torch.mean(torch.mul(v, v), dim=(-1,), keepdim=True))).mul(v)
    return y.type_as(x).mul(weight)


def by_methods(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    v = x.type(torch.float32)
    y = v.mul(v.square().mean(dim=x.dim() - 1, keepdim=True).add(1e-6).rsqrt()).to(dtype=x.dtype)
    return y.mul(weight)


def centered_weight(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """1 + weight is rounded to x's dtype, so it is an ordinary weight."""
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(-1, True) + 1e-6) * (1.0 + weight).float()).type_as(x)


def in_float32(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w, b: call(x.float(), (K,), w.float(), b.float()).to(x.dtype)


RMS, ROUNDED, PLUS_ONE, LAYER = quantized.RMS, quantized.RMS_ROUNDED, quantized.RMS_PLUS_ONE, quantized.LAYER

# A model's spelling, and the norm it is: the kind, eps, its weight (or one plus it) and bias.
SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int, float, str]] = {
    "rms_norm": (lambda x, w, b: F.rms_norm(x, (K,), w, 1e-5), RMS, 1e-5, "w"),
    "rms_norm without eps": (lambda x, w, b: F.rms_norm(x, [K], w), RMS, 2.0**-23, "w"),
    "rms_norm without weight": (lambda x, w, b: torch.rms_norm(x, (K,), eps=1e-5), RMS, 1e-5, ""),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (K,), w, b), LAYER, 1e-5, "wb"),
    "layer_norm by names": (lambda x, w, b: F.layer_norm(x, (K,), eps=1e-3, bias=b, weight=w), LAYER, 1e-3, "wb"),
    "torch.layer_norm": (lambda x, w, b: torch.layer_norm(x, (K,), w, b, 1e-3), LAYER, 1e-3, "wb"),
    "layer_norm without bias": (lambda x, w, b: F.layer_norm(x, (K,), w), LAYER, 1e-5, "w"),
    "layer_norm without weight": (lambda x, w, b: F.layer_norm(x, (K,)), LAYER, 1e-5, ""),
    "layer_norm in float32": (in_float32(F.layer_norm), LAYER, 1e-5, "wb"),
    "native_layer_norm": (lambda x, w, b: torch.native_layer_norm(x, (K,), w, b, 1e-5)[0], LAYER, 1e-5, "wb"),
    "llama": (llama, ROUNDED, 1e-6, "w"),
    "gemma": (gemma, PLUS_ONE, 1e-6, "w"),
    "gemma 3n": (gemma_3n, RMS, 1e-6, "w"),
    "olmo 2": (olmo_2, RMS, 1e-6, "w"),
    "t5": (t5, ROUNDED, 1e-6, "w"),
    "cohere": (cohere, LAYER, 1e-5, "w"),
    "reversed operands": (reversed_operands, ROUNDED, 1e-6, "w"),
    "by methods": (by_methods, ROUNDED, 1e-6, "w"),
    "no weight": (lambda x, w, b: (x * torch.rsqrt(x.float().square().mean(-1, True) + 1e-6)).to(x), RMS, 1e-6, ""),
    "a weight that is computed": (centered_weight, RMS, 1e-6, "1"),
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + residual": lambda x, residual: x + residual,
    "torch.add": torch.add,
    "a method": lambda x, residual: x.add(residual),
    "in place": lambda x, residual: (x * 1).add_(residual),
    "augmented": lambda x, residual: operator.iadd(x * 1, residual),
}


class Normed(nn.Module):
    """A sum that others read, its norm, and two linears that read the norm."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor], sum_: str = "x + residual") -> None:
        super().__init__()
        self.sum = SUMS[sum_]
        self.norm, self.first, self.second = Norm(form), nn.Linear(K, 32), nn.Linear(K, 48)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        h = self.sum(x, residual)
        y = self.norm(h)
        return self.first(y), self.second(y), h * 2


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, K, dtype=dtype), torch.randn(2, 5, K, dtype=dtype)


def exported(model: nn.Module, *args: Tensor, **options: Any) -> tuple[GraphModule, Report]:
    """Return a model as int8compile.export rewrites it for a GPU."""
    module: Any = torch.export.export(model, args, strict=False, **options).module(check_guards=False)
    return module, rewrite(module, Int8Config(), for_gpu=True)


def calls(graph: GraphModule, target: object = ops.norm_quantize_rows.default) -> list[Node]:
    return [node for node in graph.graph.nodes if node.target is target]


def names(graph: GraphModule) -> set[str]:
    return {getattr(node.target, "__name__", str(node.target)).partition(".")[0] for node in graph.graph.nodes}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_fused(name: str, dtype: torch.dtype, seen: Seen) -> None:
    """Each spelling becomes its kind of norm, as close to it as float32 and x's dtype allow."""
    form, kind, eps, parts = SPELLINGS[name]
    model = Normed(form).to(dtype)
    x, residual = inputs(dtype)
    weight, bias = model.norm.weight if parts else None, model.norm.bias if "b" in parts else None
    h = x + residual
    y = quantized.norm(h, 1 + weight if parts == "1" and weight is not None else weight, bias, kind, eps)

    def check(graph: GraphModule, results: Sequence[Tensor]) -> None:
        (call,) = calls(graph)
        assert call.args[1] is not None
        assert call.args[6] == eps
        if dtype != torch.float32:  # In float32, kinds that differ only in where they round are the same.
            assert call.args[5] == kind
        assert names(graph).isdisjoint(OF_NORMS)
        assert all(map(near, results, (by_operator(model.first, y), by_operator(model.second, y), h * 2)))

    results = compiled(model)(x, residual)
    assert seen.lowered == Lowered(products=1, quantized=1, norms=1)
    check(seen.graph, results)
    module, report = exported(model, x, residual)
    check(module, module(x, residual))
    assert (report.fused_norms, report.unfused_norms) == (1, [])
    # Sums of K elements in float32 and a few products; then one rounding to x's dtype, or two.
    deviation = (
        (h.float() - (h.float().mean(-1, keepdim=True) if kind == LAYER else 0)).square().mean(-1, keepdim=True).sqrt()
    )
    scale = 3 * h.abs().amax(-1, keepdim=True) / deviation * (1 + model.norm.weight.abs()) + model.norm.bias.abs()
    bound = (K + 16) * 2.0**-24 * scale + (2 if kind == ROUNDED else 1) * torch.finfo(dtype).eps * y.abs()
    assert ((model.norm(h).float() - y.float()).abs() <= bound).all()


def computed(model: Normed, h: Tensor) -> list[Tensor]:
    """Return the results by the definitions, for a model whose norm is `llama`."""
    y = quantized.norm(h, model.norm.weight, None, RMS, 1e-6)
    return [by_operator(model.first, y), by_operator(model.second, y), h * 2]


@torch.no_grad()
@pytest.mark.parametrize("name", SUMS)
def test_every_sum_is_fused(name: str, seen: Seen) -> None:
    model, args = Normed(llama, name), inputs()
    results = compiled(model)(*args)
    assert all(map(near, results, computed(model, args[0] + args[1])))  # type: ignore[call-overload]
    module, _ = exported(model, *args)
    assert all(map(near, module(*args), results))  # type: ignore[call-overload]
    for graph in (seen.graph, module):
        (call,) = calls(graph)
        assert call.args[1] is not None
        assert names(graph).isdisjoint({"add", "add_", "iadd"})


def seen_elsewhere(x: Tensor, residual: Tensor) -> Tensor:
    x = x * 1
    rows = x.flatten(0, 1)
    x += residual
    return x + rows.mean() * 0


OTHER_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no sum": lambda x, residual: x * residual,
    "a number": lambda x, residual: x + 1,
    "broadcast": lambda x, residual: x + residual[:1],
    "scaled": lambda x, residual: torch.add(x, residual, alpha=2),
    "another dtype": lambda x, residual: x + residual,
    "not contiguous": lambda x, residual: x.mT.contiguous().mT + residual.mT.contiguous().mT,
    "an input in place": lambda x, residual: x.add_(residual),
    "a view of an input in place": lambda x, residual: x.flatten(0, 1).add_(residual.flatten(0, 1)).view_as(x),
    "in place, and seen elsewhere": seen_elsewhere,
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER_SUMS)
def test_a_norm_is_fused_without_a_sum_that_is_none(name: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUMS, name, OTHER_SUMS[name])
    model, (x, residual) = Normed(llama, name), inputs()
    if name == "another dtype":
        residual = residual.half()
    given = x.clone()
    results = compiled(model)(x, residual)
    (call,) = calls(seen.graph)
    assert call.args[1] is None
    assert seen.lowered == Lowered(products=1, quantized=1, norms=1)
    before = given.clone()
    assert all(map(near, results, computed(model, OTHER_SUMS[name](before, residual))))  # type: ignore[call-overload]
    assert torch.equal(x, before)


@torch.no_grad()
def test_a_sum_is_computed_before_all_that_read_it(seen: Seen) -> None:
    """If a weight is computed after the sum, either all readers follow it, or the sum stays separate."""
    model, (x, residual) = Normed(llama), inputs()

    def call(x: Tensor, residual: Tensor, early: bool) -> tuple[Tensor, ...]:
        h = x + residual
        before = h * 3 if early else None
        y = llama(h, model.norm.weight * 2, model.norm.bias)
        return model.first(y), model.second(y), h * 2 if before is None else before - h

    for early in (False, True):
        results = compiled(call)(x, residual, early)
        (fused,) = calls(seen.graph)
        assert (fused.args[1] is None) == early
        h = x + residual
        y = quantized.norm(h, model.norm.weight * 2, None, RMS, 1e-6)
        assert all(map(near, results, (by_operator(model.first, y), by_operator(model.second, y), h * 2)))  # type: ignore[call-overload]


@torch.no_grad()
def test_a_sum_that_what_stays_is_made_from_is_not_moved(seen: Seen) -> None:
    """Another call reads the second of two steps between sum and norm, before the weight is computed."""
    model, (x, residual) = Normed(llama), inputs()

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = (x + residual).float().clone()
        tripled = h * 3
        return model.first(F.rms_norm(h, (K,), model.norm.weight * 2, 1e-6)), tripled

    y, tripled = compiled(call)(x, residual)  # type: ignore[misc]
    (fused,) = calls(seen.graph)
    assert fused.args[1] is None
    h = x + residual
    assert torch.equal(tripled, h * 3)
    assert near(y, by_operator(model.first, quantized.norm(h, model.norm.weight * 2, None, RMS, 1e-6)))


@torch.no_grad()
def test_two_norms_of_one_sum(seen: Seen) -> None:
    """As in Falcon's and GPT-NeoX's layers, the first norm computes the sum for the second."""
    one, two, (x, residual) = Normed(llama), Normed(gemma), inputs()

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = x + residual
        return one.first(one.norm(h)), two.first(two.norm(h)), h

    first, second, h = compiled(call)(x, residual)  # type: ignore[misc]
    assert seen.lowered == Lowered(products=2, quantized=2, norms=2)
    assert [call.args[1] is None for call in calls(seen.graph)] == [False, True]
    assert torch.equal(h, x + residual)
    assert near(first, by_operator(one.first, quantized.norm(h, one.norm.weight, None, RMS, 1e-6)))
    assert near(second, by_operator(two.first, quantized.norm(h, two.norm.weight, None, PLUS_ONE, 1e-6)))


@torch.no_grad()
@pytest.mark.parametrize("rows", ["as they are", "flattened"])
def test_any_number_of_rows(rows: str, seen: Seen) -> None:
    """GPT-2's layers flatten the rows before they multiply."""

    class Model(Normed):
        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            h = x + residual
            y = self.norm(h)
            if rows == "flattened":
                y = y.view(-1, y.size(-1))
            return self.first(y), self.second(y), h * 2

    model = Model(llama)
    call = torch.compile(model, backend="int8", fullgraph=True, dynamic=True)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    module, report = exported(model, *inputs(), dynamic_shapes=(({0: batch, 1: tokens},) * 2))
    for b, t in ((2, 5), (3, 2), (4, 40)):
        args = torch.randn(b, t, K), torch.randn(b, t, K)
        every = call(*args), module(*args)
        expected = computed(model, args[0] + args[1])
        for results in every:
            for actual, wanted in zip(results, expected, strict=True):
                assert near(actual, wanted.reshape(actual.shape))
    assert seen.graphs == 1
    assert seen.lowered == Lowered(products=1, quantized=1, norms=1)
    assert (report.fused_norms, report.unfused_norms) == (1, [])


class Apart(nn.Module):
    """Two linears that share no d, like those of attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.other = (
            nn.RMSNorm(K),
            nn.Sequential(nn.Linear(K, 32)),
            nn.Sequential(nn.Linear(K, 32)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.one(y), self.other(y)


@torch.no_grad()
def test_a_norm_that_is_quantized_in_two_ways(seen: Seen) -> None:
    """GPT-J's, Phi's and Cohere's layers are built in this way."""
    model, (x, _) = Apart(), inputs()
    one, other = compiled(model)(x)  # type: ignore[misc]
    assert seen.lowered == Lowered(products=2, quantized=2)
    assert seen.lowered.unfused == [
        NotFused("siblings", "other.0", FusionReason.ROTATED_APART),
        NotFused("norm", "norm", FusionReason.ROTATED_APART),
    ]
    y = model.norm(x)
    assert near(one, by_operator(model.one[0], y))
    assert near(other, by_operator(model.other[0], y))
    compiled(model, rotate=False)(x)
    assert seen.lowered == Lowered(products=1, quantized=1, norms=1)
    assert not seen.lowered.unfused


def written_between(m: Normed, x: Tensor) -> Tensor:
    h = x * 1
    y = m.norm(h)
    h.add_(1)
    return m.first(y)


def written_between_readers(m: Normed, x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = m.norm(x), x * 1
    first = m.first(y)
    z.add_(1)
    return first, m.second(y)


def autocast_between(m: Normed, x: Tensor) -> Tensor:
    y = m.norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        return m.first(y)


def autocast_around(m: Normed, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.first(m.norm(x)).float()


def deberta(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return weight * (centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)) + bias


def in_own_dtype(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def modulated(m: Normed, x: Tensor) -> Tensor:
    return m.first(m.norm(x) * (1 + x[:, :1]) + x[:, 1:2])


def a_step_is_read(m: Normed, x: Tensor) -> tuple[Tensor, Tensor]:
    square = x.pow(2).mean(-1, keepdim=True)
    return m.first(m.norm.weight * (x * torch.rsqrt(square + 1e-6))), square


def alone(m: Normed, x: Tensor) -> Tensor:
    return m.first(m.norm(x))


def of_bfloat16(m: Normed, x: Tensor) -> Tensor:
    return m.first(m.norm(x.bfloat16()).float())


Why = tuple[FusionReason, str]
WRITTEN: Why = (FusionReason.SWITCHED, "")
UNKNOWN: Why = (FusionReason.FORM, "")

# (norm, its readers, the reason why it is not fused)
UNFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Normed, Tensor], object], Why]] = {
    "returned": (llama, lambda m, x: (m.first(y := m.norm(x)), y), (FusionReason.READ_ELSEWHERE, "by output")),
    "read by a float linear": (
        llama,
        lambda m, x: (m.first(y := m.norm(x)), F.linear(y, x)),
        (FusionReason.READ_ELSEWHERE, "by linear"),
    ),
    "a step is read": (llama, a_step_is_read, (FusionReason.READ_ELSEWHERE, "by output")),
    "written between": (llama, written_between, WRITTEN),
    "written between readers": (llama, written_between_readers, WRITTEN),
    "autocast between": (llama, autocast_between, WRITTEN),
    "rounded by autocast": (llama, autocast_around, (FusionReason.ROUNDED, "")),
    "over two dimensions": (
        lambda x, w, b: F.layer_norm(x, x.shape),
        alone,
        (FusionReason.DIMENSIONS, ""),
    ),
    "a matrix of weights": (
        lambda x, w, b: llama(x, w.expand(5, K), b),
        alone,
        (FusionReason.NO_VECTOR, "weight"),
    ),
    "a number for a weight": (lambda x, w, b: llama(x, 2.0, b), alone, UNKNOWN),  # type: ignore[arg-type]
    "another form": (deberta, alone, UNKNOWN),
    "modulated": (llama, modulated, UNKNOWN),
    "reshaped": (llama, lambda m, x: m.first(m.norm(x).view(5, 1, K)), (FusionReason.RESHAPED, "")),
    "a weight of another dtype": (llama, of_bfloat16, (FusionReason.DTYPES, "its weight is float32 and x bfloat16")),
    "widened by its weight": (t5, of_bfloat16, (FusionReason.DTYPES, "its weight is float32 and x bfloat16")),
    "widened": (
        lambda x, w, b: x * torch.rsqrt(x.float().square().mean(-1, True) + 1e-6),
        of_bfloat16,
        (FusionReason.DTYPES, "it makes float32 of bfloat16"),
    ),
    "not in float32": (in_own_dtype, of_bfloat16, (FusionReason.PRECISION, "bfloat16")),
    "the mean of all": (lambda x, w, b: x * torch.rsqrt(x.square().mean(0, True) + 1e-6), alone, UNKNOWN),
    "the mean of cubes": (lambda x, w, b: x * torch.rsqrt(x.pow(4).mean(-1, True) + 1e-6), alone, UNKNOWN),
    "of another tensor": (lambda x, w, b: x * torch.rsqrt((x + 1).pow(2).mean(-1, True) + 1e-6), alone, UNKNOWN),
}


@torch.no_grad()
@pytest.mark.parametrize("name", UNFUSED)
def test_what_is_not_fused_has_a_reason(name: str, seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    form, call, reason = UNFUSED[name]
    model, x = Normed(form), torch.randn(5, K)
    caplog.set_level(logging.DEBUG, "int8compile.backend")
    results = compiled(lambda x: call(model, x))(x)
    (fusion,) = [fusion for fusion in seen.lowered.unfused if fusion.kind == "norm"]
    assert (fusion.reason, fusion.detail) == reason
    assert seen.lowered.norms == 0
    assert not calls(seen.graph)
    assert f"- norm not fused: {fusion.path}: {fusion.why()}" in caplog.text
    assert "0 of 1 norms fused with quantization" in caplog.text
    for actual, expected in zip(tensors(results), tensors(call(model, x)), strict=True):
        assert (actual - expected).norm() <= INT8_ERROR * expected.norm()


def tensors(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def test_what_autograd_records_is_not_fused(seen: Seen) -> None:
    model = Normed(llama).requires_grad_(False)
    x, residual = (given.requires_grad_() for given in inputs())

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return model.first(model.norm(h).detach()), h * 2

    first, doubled = compiled(call)(x, residual)  # type: ignore[misc]
    assert [(fusion.kind, fusion.reason) for fusion in seen.lowered.unfused] == [("norm", FusionReason.RECORDED)]
    assert not first.requires_grad
    doubled.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))


@torch.no_grad()
@pytest.mark.parametrize("form", ["rms_norm", "layer_norm"])
def test_the_first_rows_of_a_norm_are_not_the_norm(form: str, seen: Seen) -> None:
    """An operator that returns only the norm is indexed by row, `native_layer_norm` by result."""
    model, x = Normed(SPELLINGS[form][0]), torch.randn(3, 5, K)
    y = compiled(lambda x: model.first(model.norm(x)[0]))(x)
    expected = model.first(model.norm(x)[0])
    assert y.shape == expected.shape
    assert (y - expected).norm() <= INT8_ERROR * expected.norm()
    assert seen.lowered.norms == 0


@torch.no_grad()
def test_what_is_no_norm_has_no_reason(seen: Seen) -> None:
    layer = nn.Linear(K, 32)
    compiled(lambda x: layer(x * x.sigmoid() + x))(torch.randn(5, K))
    assert seen.lowered == Lowered(products=1, quantized=1)


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model", "config", "options", "kind", "left"),
    [
        ("LlamaForCausalLM", "LlamaConfig", TEXT, ROUNDED, 1),
        ("GemmaForCausalLM", "GemmaConfig", {**TEXT, "head_dim": 16}, PLUS_ONE, 1),
        # In each layer, the norms of q and k, and of the outputs of attention and MLP.
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 16}, PLUS_ONE, 9),
        ("GPT2LMHeadModel", "GPT2Config", GPT_2, LAYER, 1),
    ],
)
def test_decoders(
    model: str, config: str, options: dict[str, int], kind: int, left: int, dtype: torch.dtype, seen: Seen
) -> None:
    """Each layer has two norms, all but the first with the sum before them; the last is read in float."""
    transformers = pytest.importorskip("transformers")
    built = getattr(transformers, model)(getattr(transformers, config)(**options)).to(dtype).eval()
    given = {"input_ids": torch.arange(14).view(2, 7), "use_cache": False}
    expected = built(**given).logits
    logits = compiled(built)(**given).logits  # type: ignore[attr-defined]
    assert seen.lowered == Lowered(products=8, quantized=8, norms=4)
    fused = calls(seen.graph)
    assert [call.args[1] is None for call in fused] == [True, False, False, False]
    assert {call.args[5] for call in fused} == {RMS if dtype == torch.float32 and kind == ROUNDED else kind}
    roots = [node for node in seen.graph.graph.nodes if node.target in (torch.rsqrt, "rsqrt", F.layer_norm)]
    assert len(roots) == left
    assert (logits - expected).norm() <= INT8_ERROR * expected.norm()
