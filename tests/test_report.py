"""Following a reason's advice helps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import BadWeightError, Int8Warning, Report, SkipReason
from tests.helpers.models import INT8_ERROR, Uses, relative_error

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Linear:
    return nn.Linear(64, 64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape or (64, 64)))


def explain(model: Any, x: Tensor = X, **options: Any) -> Report:
    return int8compile.explain(model, x, config=options)


def quantize(model: nn.Module, **options: Any) -> Report:
    return int8compile.quantize_(model, options, progress=False)


def by_name() -> tuple[Report, Report]:
    model = nn.Sequential(linear(), linear())
    return explain(model, skip_modules=["1"]), explain(model)


def lm_head() -> tuple[Report, Report]:
    model = Uses(lambda m, x: m.lm_head(x), lm_head=linear())
    return explain(model), explain(model, lm_head="int8")


def tied() -> tuple[Report, Report]:
    model = Uses(lambda m, x: m.out(m.table(x)), table=nn.Embedding(64, 64), out=nn.Linear(64, 64, bias=False))
    model.out.weight = model.table.weight
    return explain(model, torch.arange(3)), explain(model, torch.arange(3), lm_head="int8_weight")


def not_static() -> tuple[Report, Report]:
    buffer = Uses(lambda m, x: F.linear(x, m.w))
    buffer.register_buffer("w", torch.randn(64, 64))
    return explain(buffer), explain(Uses(lambda m, x: F.linear(x, m.w), w=parameter()))


def computed() -> tuple[Report, Report]:
    model = Uses(lambda m, x: x @ (m.w * m.s), w=parameter(), s=parameter(64))
    return explain(model), explain(Uses(lambda m, x: x @ m.w, w=nn.Parameter(model.w * model.s)))


def subclass() -> tuple[Report, Report]:
    class Tagged(nn.Parameter):
        pass

    model = nn.Sequential(linear())
    model[0].weight = Tagged(model[0].weight.data)
    before = quantize(model)
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Tensor))
    return before, quantize(model)


def module() -> tuple[Report, Report]:
    class Own(nn.Linear):
        pass

    model = Uses(
        lambda m, x: m.attention(m.own(x), x, x)[0] + m.convolution(x[..., None]).squeeze(-1),
        attention=nn.MultiheadAttention(64, 4),
        convolution=nn.Conv1d(64, 64, 1),
        own=Own(64, 64),
    )
    return quantize(model), explain(model)


def hooked() -> tuple[Report, Report]:
    model, other = nn.Sequential(linear()), nn.Sequential(linear())
    for each in (model, other):
        each[0].register_forward_hook(lambda *_: None)
    other[0]._forward_hooks.clear()
    return quantize(model), quantize(other)


def saved_in_float() -> tuple[Report, Report]:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], r=32)
    model = peft.get_peft_model(nn.Sequential(linear()), config).eval()
    after = explain(model)
    return quantize(model), after


def uninitialized() -> tuple[Report, Report]:
    model = nn.Sequential(nn.LazyLinear(64))
    before = quantize(model)
    model(X)
    return before, quantize(model)


def small() -> tuple[Report, Report]:
    model = nn.Linear(8, 64)
    return explain(model, X[:, :8]), explain(model, X[:, :8], min_features=8)


def large() -> tuple[Report, Report]:
    k = 2**17
    x = torch.randn(2, k)
    whole = Uses(lambda m, x: m.a(x), a=nn.Linear(k, 32))
    halves = Uses(
        lambda m, x: m.a(x[:, : k // 2]) + m.b(x[:, k // 2 :]), a=nn.Linear(k // 2, 32), b=nn.Linear(k // 2, 32)
    )
    return explain(whole, x), explain(halves, x)


def dtype() -> tuple[Report, Report]:
    model = linear().double()
    return explain(model, X.double()), explain(model.to(torch.bfloat16), X.to(torch.bfloat16))


def form() -> tuple[Report, Report]:
    weights = {"v": parameter(), "w": parameter()}
    chain = Uses(lambda m, x: torch.linalg.multi_dot([x, m.v, m.w]), **weights)
    return explain(chain), explain(Uses(lambda m, x: x @ m.v @ m.w, **weights))


def recurrent() -> tuple[Report, Report]:
    cell = nn.RNNCell(64, 64)
    by_hand = Uses(
        lambda m, x: torch.tanh(F.linear(x, m.c.weight_ih, m.c.bias_ih) + F.linear(x, m.c.weight_hh, m.c.bias_hh)),
        c=cell,
    )
    return quantize(nn.Sequential(copy.deepcopy(cell))), explain(by_hand)


def fused() -> tuple[Report, Report]:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    weights = (attention.in_proj_weight, attention.in_proj_bias, *attention.out_proj.parameters())
    x = X[None]
    before = explain(lambda x: torch._native_multi_head_attention(x, x, x, 64, 4, *weights)[0], x)
    return before, explain(Uses(lambda m, x: m.a(x, x, x)[0], a=attention), x)


def not_captured() -> tuple[Report, Report]:
    def in_a_loop(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = m.a(x)
        return x

    model = Uses(in_a_loop, a=linear())
    return explain(model), explain(Uses(lambda m, x: m.a(m.a(x)), a=linear()))


def custom_op() -> tuple[Report, Report]:
    with torch.library._scoped_library("int8compile_advice", "FRAGMENT") as library:
        library.define("product(Tensor x, Tensor w) -> Tensor")
        library.impl("product", lambda x, w: x @ w, "CompositeExplicitAutograd")
        torch.library.register_fake("int8compile_advice::product", lambda x, w: x @ w, lib=library)
        before = explain(Uses(lambda m, x: torch.ops.int8compile_advice.product(x, m.w), w=parameter()))
    return before, explain(Uses(lambda m, x: x @ m.w, w=parameter()))


def column_batched() -> tuple[Report, Report]:
    model = Uses(lambda m, x: torch.bmm(x.expand(4, -1, -1), m.w), w=parameter(4, 64, 64))
    return explain(model, outliers="column"), explain(model)


def activation() -> tuple[Report, Report]:
    model = linear().requires_grad_(False)
    rows = torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(3, 64)], layout=torch.jagged)
    return explain(model, rows), explain(model, rows.values())


def transformed() -> tuple[Report, Report]:
    model = nn.Sequential(linear()).requires_grad_(False)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    before, expected = explain(gradient), gradient(X)
    quantize(model)
    torch._dynamo.reset()
    assert 0 < relative_error(torch.compile(gradient, backend="int8")(X), expected) < INT8_ERROR
    return before, explain(gradient)


CASES: dict[SkipReason, list[Callable[[], tuple[Report, Report]]]] = {
    SkipReason.NAME: [by_name],
    SkipReason.LM_HEAD: [lm_head],
    SkipReason.TIED: [tied],
    SkipReason.NOT_STATIC: [not_static],
    SkipReason.COMPUTED: [computed],
    SkipReason.SUBCLASS: [subclass],
    SkipReason.MODULE: [module],
    SkipReason.HOOKED: [hooked],
    SkipReason.SAVED_IN_FLOAT: [saved_in_float],
    SkipReason.UNINITIALIZED: [uninitialized],
    SkipReason.SMALL: [small],
    SkipReason.LARGE: [large],
    SkipReason.DTYPE: [dtype],
    SkipReason.FORM: [form, recurrent],
    SkipReason.FUSED_OP: [fused],
    SkipReason.NOT_CAPTURED: [not_captured],
    SkipReason.CUSTOM_OP: [custom_op],
    SkipReason.COLUMN_BATCHED: [column_batched],
    SkipReason.ACTIVATION: [activation],
    SkipReason.TRANSFORMED: [transformed],
}
# Tested below, or without advice: weights that change at every call, and regions captured as a separate graph.
OTHERS = {SkipReason.TRAINED, SkipReason.BAD_VALUES, SkipReason.CHANGED, SkipReason.NESTED}


def test_every_reason_is_here() -> None:
    assert {*CASES, *OTHERS} == {*SkipReason}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Everything is in float; some modules are new.
@pytest.mark.parametrize(
    ("reason", "case"), [pytest.param(reason, case, id=case.__name__) for reason in CASES for case in CASES[reason]]
)
def test_doing_what_a_reason_says_helps(reason: SkipReason, case: Callable[[], tuple[Report, Report]]) -> None:
    before, after = case()
    assert {site.reason for site in before.skipped} == {reason}
    assert after.rewritten
    assert not after.skipped


def test_what_may_be_being_trained() -> None:
    model = nn.Sequential(linear())
    compiled = torch.compile(model, backend="int8")
    with pytest.warns(Int8Warning, match=SkipReason.TRAINED.value[:60]):
        assert relative_error(compiled(X), model(X)) < 1e-5
    with torch.no_grad():
        assert 0 < relative_error(compiled(X), model(X)) < INT8_ERROR
    model.requires_grad_(False)
    torch._dynamo.reset()  # PyTorch 2.11 does not notice that.
    assert 0 < relative_error(compiled(X), model(X)) < INT8_ERROR


def test_bad_values_raise_as_the_reason_says() -> None:
    model = nn.Sequential(linear()).requires_grad_(False)
    model[0].weight[0, 0] = float("nan")
    assert [site.reason for site in explain(model).sites] == [SkipReason.BAD_VALUES]
    with pytest.raises(BadWeightError, match="has 1 NaN or Inf"):
        torch.compile(model, backend="int8")(X)
