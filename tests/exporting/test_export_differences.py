"""Differences between `torch.export` and `torch.compile`, and errors of the passes in exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import BadWeightError, InputError, SkipReason
from tests.helpers.implementations import needs_kernel
from tests.helpers.models import Stack
from tests.helpers.parity import (
    TWO,
    Case,
    Uses,
    X,
    _linear,
    _shared,
    assert_equal,
    check,
    compiled,
    export,
    exported,
    modules,
    of_weights,
)
from tests.helpers.spellings import Weights

# Export is for the CPU kernels.
pytestmark = needs_kernel


def _same_data(m: Any) -> None:
    m.b.weight.data = m.a.weight.data


# Errors


def test_errors() -> None:
    def broken() -> nn.Module:
        model = Stack()
        model.layers[1].up.weight.data[3] = float("nan")
        return model

    for case, error in ((Case(broken, (X,)), BadWeightError), (Case(Stack, (X.int(),)), InputError)):
        with pytest.raises(error) as one:
            torch.compile(case.model(), backend="int8")(*case.args)
        with pytest.raises(error) as other:
            exported(case)
        assert str(one.value).startswith(str(other.value))


# Differences


def test_two_parameters_of_one_memory_are_one_weight_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo passes them to its graph as two parameters, each of which may get other values."""
    case = Case(_shared(lambda m, x: m.a(m.b(x)), _same_data, **TWO), (X,))
    expected, actual = compiled(case, monkeypatch), exported(case)
    assert [site.path for site in actual.report.rewritten] == [site.path for site in expected.report.rewritten]
    assert expected.report.totals()["bytes_after"] == 2 * actual.report.totals()["bytes_after"]
    assert_equal(actual.outputs, expected.outputs)


def test_the_names_of_a_module_are_told_apart_by_torch_export_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo uses the name under which the module was called first."""

    def share(model: Any) -> None:
        model.b = model.a

    case = Case(_shared(lambda m, x: m.a(m.b(x)), share, a=_linear()), (X,))
    expected, actual = compiled(case, monkeypatch), exported(case)
    assert [site.path for site in expected.report.sites] == ["b", "b"]
    assert [site.path for site in actual.report.sites] == ["b", "a"]
    assert_equal(actual.outputs, expected.outputs)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_parameters_that_are_not_registered_are_constants_to_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants stay in float, as buffers do. `nn.ParameterList` would register them."""

    def make() -> nn.Module:
        hidden = [nn.Linear(32, 48), nn.Linear(32, 48)]
        return Uses(lambda m, x: hidden[0](x) + hidden[1](x))

    case = Case(make, (X,))
    assert [site.reason for site in compiled(case, monkeypatch).report.sites] == [None, None]
    assert [site.reason for site in exported(case).report.sites] == [SkipReason.NOT_STATIC] * 2


def test_torch_export_does_not_take_the_fused_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.TransformerEncoderLayer` calls one fused operator in inference, except when torch.export traces it."""
    case = Case(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (X,))
    expected, actual = compiled(case, monkeypatch).report, exported(case).report
    assert [site.path for site in actual.rewritten] == [site.path for site in expected.rewritten]
    assert len(expected.rewritten) == 4
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch._dynamo.reset()
        assert len(check(case, monkeypatch).report.rewritten) == 4
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_torch_export_does_not_keep_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation checkpointing is for training: Dynamo keeps it in a separate graph, torch.export drops it."""
    from torch.utils.checkpoint import checkpoint

    case = Case(modules(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), **TWO), (X,))
    expected, actual = compiled(case, monkeypatch).report, exported(case).report
    assert [(site.path, site.reason) for site in expected.sites] == [("a", SkipReason.NESTED), ("b", None)]
    assert [(site.path, site.reason) for site in actual.sites] == [("a", None), ("b", None)]


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_recurrent_layers_are_one_operator_to_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo leaves recurrent layers to Python, so no graph has their weights."""
    case = Case(lambda: nn.LSTM(32, 32), (X,))
    expected, actual = compiled(case, monkeypatch).report, exported(case).report
    assert [(site.path, site.reason) for site in expected.sites] == [
        ("weight_ih_l0", SkipReason.NOT_CAPTURED),
        ("weight_hh_l0", SkipReason.NOT_CAPTURED),
    ]
    assert [(site.path, site.reason) for site in actual.sites] == [
        ("weight_ih_l0", SkipReason.FORM),
        ("weight_hh_l0", SkipReason.FORM),
    ]


def test_parameters_that_nothing_reads_are_named_by_explain_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package does not contain unused parameters."""
    case = Case(modules(lambda m, x: m.a(x), **TWO), (X,))
    assert [site.path for site in compiled(case, monkeypatch).report.sites] == ["a", "b"]
    assert [site.path for site in exported(case).report.sites] == ["a"]


def test_torch_export_knows_lines_of_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in a function that `forward` calls is reported with the line in `forward`; other calls agree."""
    inside, outside = Case(Stack, (X,)), Case(lambda: Weights(lambda m, x: F.linear(x, m.nk)), (X,))
    expected, actual = compiled(inside, monkeypatch).report, exported(inside).report
    assert [site.source for site in actual.sites] == [site.source for site in expected.sites]
    assert compiled(outside, monkeypatch).report.sites[0].source.startswith("test_export_differences.py:")
    line = Weights.forward.__code__.co_firstlineno + 1
    assert exported(outside).report.sites[0].source == f"spellings.py:{line}"


def test_torch_export_lays_attention_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's graph of `nn.MultiheadAttention` ends with `contiguous`; the numbers are the same."""

    def attend(m: Any, x: Tensor) -> Tensor:
        return m.a(x, x, x, need_weights=False)[0]

    case = Case(modules(attend, a=lambda: nn.MultiheadAttention(32, 4, batch_first=True)), (X,))
    (one,), (other,) = check(case, monkeypatch).outputs, compiled(case, monkeypatch).outputs
    assert one.stride() == (32, 64, 1)
    assert other.stride() == (160, 32, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.linear(x, m.w.data),
        lambda m, x: torch.func.grad(lambda x: F.linear(x, m.w).square().sum())(x),
    ],
    ids=[".data", "torch.func.grad"],
)
def test_torch_export_refuses(call: Callable[[Any, Tensor], Any]) -> None:
    """torch.export raises its own errors. Dynamo accepts both calls: one is rewritten, the other stays in float."""
    report = int8compile.explain(of_weights(call).model(), X)
    assert [site.reason for site in report.sites] in ([None], [SkipReason.TRANSFORMED])
    with pytest.raises(Exception, match=r"fake tensor|functorch"):
        export(of_weights(call))
