"""Fusions that are not made have typed reasons, and doing what a reason says helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import cpu
from int8compile.sites import FusionReason, NotFused
from tests.helpers.lowered import Seen, compiled

K = 64
needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no CPU kernel here")


class Parts(nn.Module):
    """Linears of one module, which are rotated alike, and a linear of another module."""

    def __init__(self, call: Callable[[Any, Tensor], object], count: int = 2) -> None:
        super().__init__()
        self.call = call
        self.a, self.b, self.c, self.d = (nn.Linear(K, 32) for _ in range(4))
        self.inner = nn.Sequential(nn.Linear(K, 32))
        self.unbiased = nn.Linear(K, 32, bias=False)
        self.wide = nn.Linear(K, 1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


def both(m: Parts, x: Tensor) -> object:
    return m.a(x), m.b(x)


def written_between(m: Parts, x: Tensor) -> object:
    z = x * 2
    a = m.a(x)
    z.add_(1)
    return a, m.b(x), z


def late_bias(m: Parts, x: Tensor) -> object:
    a = F.linear(x, m.a.weight, m.a.bias)
    return a, F.linear(x, m.b.weight, a.flatten()[:32].clone())


def shared_weight(m: Parts, x: Tensor) -> object:
    return m.a(x), m.b(x), m.b(x * 2)


SIBLINGS: dict[FusionReason, tuple[Callable[[Any, Tensor], object], str]] = {
    FusionReason.WEIGHT_SHARED: (shared_weight, "b"),
    FusionReason.SWITCHED: (written_between, "b"),
    FusionReason.ROTATED_APART: (lambda m, x: (m.a(x), m.inner(x)), "inner.0"),
    FusionReason.BIAS: (lambda m, x: (m.a(x), m.unbiased(x)), "unbiased"),
    FusionReason.LATE_BIAS: (late_bias, "b"),
    FusionReason.COUNT: (lambda m, x: (m.a(x), m.b(x), m.c(x), m.d(x)), "d"),
}


def siblings_in(report: int8compile.Report) -> list[tuple[str, FusionReason]]:
    return [(fusion.path, fusion.reason) for fusion in report.unfused if fusion.kind == "siblings"]


@needs_kernel
@pytest.mark.parametrize("reason", SIBLINGS, ids=lambda reason: reason.name)
def test_explain_says_why_siblings_are_not_joined(reason: FusionReason) -> None:
    call, path = SIBLINGS[reason]
    report = int8compile.explain(Parts(call), torch.randn(3, K))
    assert siblings_in(report) == [(path, reason)]
    assert f"- siblings not fused: {path}: {reason.value}" in str(report)
    (data,) = report.to_dict()["unfused"]
    assert (data["kind"], data["path"], data["reason_code"]) == ("siblings", path, reason.name.lower())


@needs_kernel
def test_siblings_that_are_joined_have_no_reason() -> None:
    assert int8compile.explain(Parts(both), torch.randn(3, K)).unfused == []


@needs_kernel
def test_one_rotation_for_all_joins_linears_of_two_modules() -> None:
    model = Parts(SIBLINGS[FusionReason.ROTATED_APART][0])
    assert int8compile.explain(model, torch.randn(3, K), config={"rotate": False}).unfused == []


@needs_kernel
def test_weights_of_int8_modules_are_joined_once_they_are_given_up() -> None:
    model, x = Parts(both), torch.randn(3, K)
    int8compile.quantize_(model, {"skip_modules": ["wide"]}, progress=False)
    assert siblings_in(int8compile.explain(model, x)) == [("b", FusionReason.HELD)]
    assert int8compile.explain(model, x, config={"free_weights": True}).unfused == []


@needs_kernel
def test_one_threshold_joins_int8_modules() -> None:
    model, x = Parts(both), torch.randn(3, K)
    model.a = int8compile_linear(model.a, 3.0)
    model.b = int8compile_linear(model.b, 5.0)
    report = int8compile.explain(model, x, config={"free_weights": True})
    assert siblings_in(report) == [("b", FusionReason.THRESHOLDS)]
    model.b.threshold = 3.0
    assert int8compile.explain(model, x, config={"free_weights": True}).unfused == []


def int8compile_linear(linear: nn.Linear, threshold: float) -> nn.Module:
    holder = nn.Sequential(linear)
    int8compile.quantize_(holder, {"threshold": threshold, "rotate": False}, progress=False)
    return holder[0]


def paths_of(report: int8compile.Report) -> list[str]:
    """The paths of a module that stands twice in a model begin where each stands."""
    return [fusion.path for fusion in report.unfused]


@needs_kernel
def test_every_module_has_a_row_of_its_own() -> None:
    model = nn.Sequential(*(Breaking(SIBLINGS[FusionReason.BIAS][0]) for _ in range(2)))
    report = int8compile.explain(model, torch.randn(3, K))
    assert paths_of(report) == ["0.unbiased", "1.unbiased"]


class Breaking(Parts):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        a, b = self.call(self, x)  # type: ignore[misc]
        return torch.cat([a, b], -1)


ACTIVATIONS: dict[str, tuple[Callable[[Any, Tensor], object], list[NotFused]]] = {
    "alone": (lambda m, x: F.relu(m.a(x)), []),
    "gate": (lambda m, x: F.silu(m.a(x)) * m.b(x), []),
    "read twice": (
        lambda m, x: (F.relu(y := m.a(x)), y),
        [NotFused("activation", "a", FusionReason.READ_ELSEWHERE)],
    ),
    "joined": (lambda m, x: F.gelu(m.a(x)) * m.b(x), [NotFused("activation", "a", FusionReason.JOINED)]),
    "up is read twice": (
        lambda m, x: (F.silu(m.a(x)) * (up := m.b(x)), up),
        [NotFused("gate", "a", FusionReason.READ_ELSEWHERE), NotFused("activation", "a", FusionReason.JOINED)],
    ),
    "up is of another shape": (
        lambda m, x: F.silu(m.a(x)) * m.wide(x),
        [NotFused("gate", "a", FusionReason.SHAPES), NotFused("activation", "a", FusionReason.JOINED)],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_why_an_activation_is_not_part_of_a_product(name: str, seen: Seen) -> None:
    call, expected = ACTIVATIONS[name]
    model = Parts(call)
    compiled(model, min_features=1)(torch.randn(3, K))
    assert seen.lowered.unfused == expected


def test_what_autograd_records_is_not_joined(seen: Seen) -> None:
    model, x = Parts(both), torch.randn(3, K)
    compiled(model)(x.clone().requires_grad_())
    assert seen.lowered.unfused == [NotFused("siblings", "b", FusionReason.RECORDED)]
    with torch.no_grad():
        compiled(model)(x)
    assert seen.lowered.unfused == []


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_norms_that_a_reason_advises_are_fused(norm: type[nn.Module], seen: Seen) -> None:
    linear = nn.Linear(K, 32)
    compiled(nn.Sequential(norm(K), linear))(torch.randn(3, K))
    assert (seen.lowered.norms, seen.lowered.unfused) == (1, [])
