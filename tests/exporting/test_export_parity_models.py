"""The same rules rewrite exported graphs, for options, modules, regions, symbolic sizes and whole models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import Int8Config, SkipReason, ops, quantize_
from int8compile.exporting.exporter import rewrite
from int8compile.ops import rotation_of
from int8compile.passes import WeightView
from int8compile.weights import STORE
from tests.helpers.implementations import needs_kernel
from tests.helpers.int8_modules import int8_embedding, int8_experts, int8_linear
from tests.helpers.models import Attention, Stack
from tests.helpers.parity import (
    IDS,
    TWO,
    Case,
    Tied,
    X,
    _linear,
    assert_equal,
    check,
    compiled,
    exported,
    modules,
    of_weights,
    params,
    rows,
    values,
    weight,
)
from tests.helpers.spellings import SPELLINGS, Weights

# Packages need the CPU kernels.
pytestmark = needs_kernel


# Options and dtypes


@pytest.mark.parametrize(
    "options",
    [
        {"skip_modules": ["layers.0"]},
        {"skip_modules": ["up", "layers.1.down"]},
        {"min_features": 33},
        {"outliers": "column", "threshold": 2.0},
        {"threshold": 0.0},
        {"threshold": 2.0},
        {"rotate": False},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(4, 32)
    x[2, 3] = 9.0
    check(Case(Stack, (x,), options=options), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(Case(lambda: Stack().to(dtype), (values(4, 32).to(dtype),)), monkeypatch)
    assert len(found.report.rewritten) == (0 if dtype == torch.float64 else 4)


def test_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a matrix share a call if their biases exist before the first; other matrices have another d."""

    def call(m: Any, x: Tensor) -> list[Tensor]:
        scaled = m.bias * 2
        joined = [F.linear(x, m.w[:48], m.bias), F.linear(x, m.w[48:], scaled)]
        return [*joined, F.linear(x, m.kn.t(), m.other), F.linear(x, m.buffer, m.bias), x @ m.square + m.bias[:32]]

    assert check(of_weights(call), monkeypatch).called == {
        "packed_linear_pair_no_grad": 1,
        "packed_linear_no_grad": 2,
    }


def test_writes_between_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(m: Any, x: Tensor) -> list[Tensor]:
        x = x * 1
        row = x[1]
        before = F.linear(x, m.w, m.other.repeat(2))
        row[3] = 100.0
        m.other.add_(1)
        return [before, x @ m.kn + m.other, F.linear(x, m.w, m.other.repeat(2))]

    check(of_weights(call), monkeypatch)


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(48, 32)


def calibrated() -> nn.Module:
    model = Attention()
    members = [(part.weight, WeightView((48, 32), (32, 1), 0, (48, 32))) for part in model.children()]
    STORE.calibrate(members, rotation_of(torch.rand(32) + 0.5))
    return model


def quantized(make: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def changed() -> nn.Module:
        model = make()
        quantize_(model, options, progress=False)
        return model

    return changed


MODULES: dict[str, Case] = {
    "Linear": Case(_linear(32, 48), (X,)),
    "Linear without bias": Case(_linear(32, 48, bias=False), (X,)),
    "Linear of one row": Case(_linear(32, 48), (X[0, 0],)),
    "Conv1D": Case(conv1d, (X,)),
    "Conv2d": Case(lambda: nn.Conv2d(32, 48, 1), (X.mT[..., None],)),
    "Conv2d that is no matmul": Case(lambda: nn.Conv2d(5, 16, 3, padding=1), (X[:, None].mT.mT.reshape(2, 5, 4, 8),)),
    "Bilinear": Case(lambda: nn.Bilinear(32, 32, 32), (X, X)),
    "Sequential": Case(lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Sequential(nn.Linear(48, 32))), (X,)),
    "ModuleDict": Case(modules(lambda m, x: m.a["b"](x), a=lambda: nn.ModuleDict({"b": nn.Linear(32, 48)})), (X,)),
    "ParameterList": Case(
        modules(lambda m, x: x @ m.a[1], a=lambda: nn.ParameterList([weight(32, 48), weight(32, 48)])), (X,)
    ),
    "the weight of another module": Case(modules(lambda m, x: F.linear(x, m.a.weight), a=_linear(32, 48)), (X,)),
    "weight_norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 48)), (X,)),
    "spectral_norm": Case(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, 48)), (X,)),
    "LSTMCell": Case(lambda: nn.LSTMCell(32, 32), (X[0],)),
    "LoRA": Case(
        modules(
            lambda m, x: m.base(x) + m.up(m.down(x)), base=_linear(32, 48), down=_linear(32, 16), up=_linear(16, 48)
        ),
        (X,),
    ),
    "MultiheadAttention": Case(lambda: nn.MultiheadAttention(32, 4, batch_first=True), (X, X + 1, X)),
    "MultiheadAttention, with weights": Case(lambda: nn.MultiheadAttention(32, 4), (X, X, X), {"need_weights": True}),
    "MultiheadAttention, projections apart": Case(
        lambda: nn.MultiheadAttention(32, 4, kdim=16, vdim=16, bias=False, batch_first=True),
        (X, X[..., :16], X[..., 16:]),
        {"need_weights": False},
    ),
    "MultiheadAttention, rows of zeros": Case(
        lambda: nn.MultiheadAttention(32, 4, add_zero_attn=True, add_bias_kv=True, batch_first=True), (X, X, X)
    ),
    "TransformerDecoderLayer": Case(lambda: nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), (X, X + 1)),
    "one d for q, k and v": Case(Attention, (X,)),
    "one d for q, k and v, calibrated": Case(calibrated, (X,)),
    "Int8Linear": Case(int8_linear, (values(5, 48),), options={"free_weights": True}),
    "Int8Linear, weight only": Case(
        lambda: int8_linear(weight_only=True), (values(5, 48),), options={"free_weights": True}
    ),
    "Int8Linear, not rotated": Case(
        lambda: int8_linear(rotated=False), (values(5, 48),), options={"free_weights": True}
    ),
    "Int8Linear by column": Case(
        lambda: int8_linear(rotated=False, outliers="column"), (values(5, 48),), options={"free_weights": True}
    ),
    "Int8Embedding": Case(int8_embedding, (IDS,)),
    "Int8Experts": Case(
        modules(lambda m, x: m.a(x, torch.tensor([2, 5, 9], dtype=torch.int32)), a=int8_experts), (values(9, 48),)
    ),
    "quantize_": Case(quantized(Stack), (X,), options={"free_weights": True}),
    "quantize_ of a part": Case(quantized(Stack, skip_modules=["up"]), (X,), options={"free_weights": True}),
    "quantize_ with a tied head": Case(
        quantized(lambda: Tied("lm_head", "parameter"), lm_head="int8_weight"), (IDS,), options={"free_weights": True}
    ),
    "quantize_ of Conv1D": Case(quantized(lambda: nn.Sequential(conv1d())), (X,), options={"free_weights": True}),
}


@pytest.mark.parametrize("free", [False, True])
def test_modules_in_int8_that_share_a_d(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears share a call where their weights are taken over, as packages always do."""
    case = Case(quantized(Attention), (X,), options={"free_weights": free})
    expected, actual = compiled(case, monkeypatch), exported(case)
    assert actual.called == {"packed_linear_triple_no_grad": 1}
    assert expected.called == (actual.called if free else {"linear_no_grad": 3})
    assert_equal(actual.outputs, expected.outputs)
    assert_equal(actual.outputs, compiled(Case(Attention, (X,)), monkeypatch).outputs)


@pytest.mark.parametrize("case", params(MODULES))
def test_modules(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def test_what_rotates_is_in_a_package_as_it_is() -> None:
    """A package holds one d per input of joined linears, calibrated or not."""
    for make in (Attention, calibrated):
        model = make()
        module = torch.export.export(model, (X,), strict=False).module(check_guards=False)
        with torch.no_grad():
            rewrite(module, Int8Config())
        (call,) = [node for node in module.graph.nodes if node.target is ops.packed_linear_triple_no_grad.default]
        members = [(part.weight, WeightView((48, 32), (32, 1), 0, (48, 32))) for part in model.children()]
        assert module.get_buffer(str(call.args[3].target)) is STORE.share(members)


def test_custom_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.library._scoped_library("int8compile_test", "FRAGMENT") as library:
        library.define("enigma(Tensor x, Tensor w) -> Tensor")
        library.impl("enigma", lambda x, w: x @ w, "CompositeExplicitAutograd")
        torch.library.register_fake("int8compile_test::enigma", lambda x, w: x @ w, lib=library)
        found = check(of_weights(lambda m, x: torch.ops.int8compile_test.enigma(x, m.kn) + m.bias), monkeypatch)
    assert [(site.path, site.reason) for site in found.report.sites] == [("kn", SkipReason.CUSTOM_OP)]


FORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "addbmm": lambda m, x: torch.addbmm(m.bias, x, m.experts),
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x[0], m.w.t(), m.w]),
    "einsum of three": lambda m, x: torch.einsum("bsk,kn,n->bs", x, m.kn, m.bias),
    "einsum with numbers": lambda m, x: torch.einsum(x, [0, 1, 2], m.kn, [2, 3], [3, 0, 1]),
    "grouped_mm": lambda m, x: F.grouped_mm(
        x.flatten(0, 1).bfloat16(), m.experts.bfloat16(), offs=torch.tensor([4, 10], dtype=torch.int32)
    ),
    "fused attention": lambda m, x: torch._native_multi_head_attention(
        *(x, x, x, 32, 4, m.w, m.w[:, 0], m.square, m.square[0]), need_weights=False
    )[0],
}


@pytest.mark.parametrize("case", params({name: of_weights(call) for name, call in FORMS.items()}))
def test_forms(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


# Regions and nested graphs


def _autocast(m: Any, x: Tensor) -> Any:
    before = m.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = m.b(x), torch.addmm(x[0] * 2, x[1], m.a.weight, beta=0.5)
        with torch.autocast("cpu", enabled=False):
            off = m.b(x)
    return before, *inside, off, m.b(before)


def _rotary(m: Any, x: Tensor) -> Tensor:
    """Language models compute angles in this way: from two activations, with autocast disabled."""
    with torch.autocast("cpu", enabled=False):
        angles = x[0, :1, :16].float().T @ torch.arange(5)[None].float()
    return m.a(x) * angles.sum() + m.b(x)


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y)


def _grad(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.a(x)
        with torch.no_grad():
            y = m.b(y)
    return m.b(y)


def _inference_mode(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.a(x)
    return m.b(y)


def _cond(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.cond(x.sum() > 0, lambda x: m.a(x) * 2, lambda x: x @ m.a.weight.t(), (x,)))


def _cond_in_cond(m: Any, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 1, m.a, m.b, (x,))

    return torch.cond(x.sum() > 0, inner, lambda x: x @ x.mT @ x, (x,))


def _while(m: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, m.a(x)), (torch.tensor(0), m.b(x)))


REGIONS = {
    "autocast": (_autocast, [None] * 5),
    "autocast switched off": (_rotary, [None] * 2),
    "no_grad": (_no_grad, [None] * 2),
    "enable_grad": (_grad, [SkipReason.TRAINED, None, None]),
    "inference_mode": (_inference_mode, [None] * 2),
    "cond": (_cond, [SkipReason.NESTED, SkipReason.NESTED, None]),
    "cond in cond": (_cond_in_cond, [SkipReason.NESTED] * 2),
    "while_loop": (_while, [None, SkipReason.NESTED]),
}


@pytest.mark.parametrize(("call", "reasons"), REGIONS.values(), ids=REGIONS.keys())
def test_regions(call: Callable[..., Any], reasons: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export makes graphs of autocast and grad mode regions; linears inside them are rewritten as well."""
    found = check(Case(modules(call, **TWO), (X,)), monkeypatch)
    assert [site.reason for site in found.report.sites] == reasons
    assert {site.path for site in found.report.sites} <= {"a", "b"}


# The portable form knows which passes share work


@pytest.mark.parametrize("call", [_autocast, _rotary], ids=["autocast", "autocast switched off"])
def test_regions_in_the_portable_form(call: Callable[..., Any]) -> None:
    case = Case(modules(call, **TWO), (X,))
    assert_equal(exported(case, "portable").outputs, exported(case).outputs)


def test_writes_in_the_portable_form() -> None:
    """Linears share a quantized activation until the activation is written to."""

    def call(m: Any, x: Tensor) -> list[Tensor]:
        x = x * 1
        row = x[1]
        before = x @ m.kn
        row[3] = 100.0
        return [before, F.linear(x, m.w), x @ m.square]

    case = of_weights(call)
    assert_equal(exported(case, "portable").outputs, exported(case).outputs)


# Symbolic sizes


@pytest.mark.parametrize(
    "case",
    params(
        {
            name: Case(lambda call=call: Weights(call), (X,))
            for name, _, call in SPELLINGS
            if name in ("F.linear with bias", "addmm", "@ with the weight first", "einsum with a permuted result")
        }
    ),
)
def test_symbolic_sizes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_ = torch.export.Dim("rows", max=64)
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 1)
    report = int8compile.explain(case.model(), x)
    with torch.no_grad():
        module = torch.export.export(case.model(), (X,), dynamic_shapes=({1: rows_},)).module(check_guards=False)
        assert rows(rewrite(module, Int8Config())) == rows(report)
        assert re.search(r"s\d", " ".join(report.sites[0].shape))
        module.recompile()
        for size in (5, 2, 17):
            longer = dataclasses.replace(case, args=(values(2, size, 32),))
            assert_equal([module(*longer.args)], compiled(longer, monkeypatch).outputs)


# Models of transformers


@pytest.fixture(scope="module")
def architectures() -> dict[str, Case]:
    from tests.helpers.architectures import CASES

    plain = {name: Case(case.build, kwargs=case.inputs) for name, case in CASES.items()}
    options = {"free_weights": True}
    return plain | {
        f"{name}, quantize_": Case(quantized(case.build), kwargs=case.inputs, options=options)
        for name, case in CASES.items()
    }


FIRST = ["llama", "llama, tied", "gpt2", "bert", "mixtral, quantize_"]

OTHERS = [
    "t5",
    "whisper",
    "vit",
    "llama, eager attention",
    "mixtral",
    "llama4",
    "clip",
    "llama, quantize_",
    "t5, quantize_",
]


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_architectures(name: str, architectures: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    check(architectures[name], monkeypatch)
