"""The same rules rewrite exported graphs, for every spelling, every reason, and shared weight memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8compile import SkipReason
from tests.helpers.implementations import needs_kernel
from tests.helpers.parity import (
    IDS,
    TWO,
    Case,
    Tied,
    X,
    _linear,
    _shared,
    assert_equal,
    check,
    exported,
    of_weights,
    params,
    rows,
    weight,
)
from tests.helpers.spellings import REASONS, SPELLINGS, Weights

# Packages need the CPU kernels.
pytestmark = needs_kernel


# Spellings, and reasons not to rewrite


class Spellings(nn.Module):
    """A model with a matmul per submodel, side by side."""

    def __init__(self, op: str) -> None:
        super().__init__()
        for name, spelled, call in SPELLINGS:
            if spelled == op:
                self.add_module(re.sub(r"\W+", "_", name), Weights(call))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.children()]


@pytest.mark.parametrize("op", sorted({op for _, op, _ in SPELLINGS}))
def test_spellings(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(Case(lambda: Spellings(op), (X,), options={"min_features": 5}), monkeypatch)
    assert [site.rewritten for site in found.report.sites] == [True] * sum(each == op for _, each, _ in SPELLINGS)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("op", sorted({op for _, op, _ in SPELLINGS}))
def test_spellings_for_gpus(op: str, threshold: float) -> None:
    """Each spelling is lowered to the operators for GPUs, which compute their definition here."""
    case = Case(lambda: Spellings(op), (X,), options={"min_features": 5, "threshold": threshold})
    expected, actual = exported(case), exported(case, for_gpu=True)
    assert rows(actual.report) == rows(expected.report)
    assert set(actual.called) <= {"quantize_rows", "quantized_linear", "batched_linear"}
    products = actual.called["quantized_linear"] + actual.called["batched_linear"]
    assert 0 < products <= len(actual.report.rewritten)
    assert_equal(actual.outputs, expected.outputs)


@pytest.mark.parametrize(
    ("reason", "case"),
    [
        pytest.param(reason, Case(lambda call=call: Weights(call), (X,), options=options), id=f"{reason.name} {i}")
        for i, (reason, call, options) in enumerate(REASONS)
    ],
)
def test_reasons(reason: SkipReason, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [site.reason for site in check(case, monkeypatch).report.sites] == [reason]


VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "chunk": lambda m, x: [F.linear(x, part) for part in m.w.chunk(3)],
    "split": lambda m, x: [F.linear(x, part) for part in m.w.split(32)],
    "split into sizes": lambda m, x: [F.linear(x, part) for part in torch.split(m.w, [64, 32])],
    "tensor_split": lambda m, x: [F.linear(x, part) for part in m.w.tensor_split(3)],
    "tensor_split at indices": lambda m, x: [F.linear(x, part) for part in m.w.tensor_split([32, 64])],
    "unbind": lambda m, x: [x @ part for part in m.experts.unbind(0)],
    "for": lambda m, x: [x @ part for part in m.experts],
    "expand": lambda m, x: x @ m.experts[:1].expand(2, 32, 48),
    "expand to its own shape": lambda m, x: F.linear(x, m.w.expand(96, 32)),
    "expand_as": lambda m, x: F.linear(x, m.w.expand_as(m.w)),
    "broadcast_to": lambda m, x: x @ torch.broadcast_to(m.kn, (32, 48)),
    "repeat": lambda m, x: x @ m.experts[:1].repeat(2, 1, 1),
    "narrow": lambda m, x: F.linear(x, m.w.narrow(0, 16, 32)),
    "select": lambda m, x: x @ m.experts.select(0, 1),
    "int index": lambda m, x: x @ m.cubes[2],
    "slices": lambda m, x: x @ m.experts[1, :, 8:40],
    "slice with a step": lambda m, x: F.linear(x, m.w[::2]),
    "slice from the end": lambda m, x: F.linear(x, m.w[-48:]),
    "slice of columns": lambda m, x: F.linear(x[..., :16], m.w[..., :16]),
    "list index": lambda m, x: x @ m.experts[[0, 1]],
    "index of an input": lambda m, x: x @ m.cubes[(x[:, 0, 0] > 0).long()],
    "index_select": lambda m, x: torch.bmm(x, m.cubes.index_select(0, (x[:, 0, 0] > 0).long())),
    "gather": lambda m, x: x @ m.cubes.gather(0, (x[:, :1, :1] > 0).long().expand(2, 32, 32)),
    "unsqueeze": lambda m, x: x @ m.kn.unsqueeze(0).squeeze(0),
    "squeeze of dims": lambda m, x: F.linear(x, m.w[None, :, None].squeeze((0, 2))),
    "None index": lambda m, x: x @ m.kn[None],
    "view": lambda m, x: F.linear(x, m.w.view(3, 32, 32)[1]),
    "view_as": lambda m, x: F.linear(x, m.w.view_as(m.w)),
    "reshape": lambda m, x: F.linear(x, m.w.reshape(3, 32, 32)[1]),
    "ravel": lambda m, x: F.linear(x, m.w.ravel().view(96, 32)),
    "flatten": lambda m, x: F.linear(x, m.heads.flatten(1).T),
    "flatten that copies": lambda m, x: x @ m.experts.permute(1, 0, 2).flatten(1),
    "unflatten": lambda m, x: F.linear(x, m.w.unflatten(0, (3, 32))[2]),
    "movedim": lambda m, x: x @ m.w.movedim(0, 1),
    "movedim of several": lambda m, x: x @ m.experts.movedim((0, 1), (1, 0))[:, 0],
    "moveaxis": lambda m, x: x @ torch.moveaxis(m.w, 0, 1),
    "swapaxes": lambda m, x: x @ m.w.swapaxes(0, 1),
    "swapdims": lambda m, x: x @ torch.swapdims(m.w, 0, 1),
    "permute": lambda m, x: x @ m.w.permute(1, 0),
    "transpose": lambda m, x: x @ m.w.transpose(-1, -2),
    "adjoint": lambda m, x: x @ m.w.adjoint(),
    "T": lambda m, x: x @ m.w.T,
    "mT": lambda m, x: x @ m.w.mT,
    "H": lambda m, x: x @ m.w.H,
    "mH": lambda m, x: x @ m.w.mH,
    "contiguous": lambda m, x: x @ m.w.t().contiguous(),
    "clone": lambda m, x: x @ m.w.t().clone(),
    "detach": lambda m, x: F.linear(x, m.w.detach()),
    "to another dtype": lambda m, x: F.linear(x.bfloat16(), m.w.to(torch.bfloat16)),
    "to and back": lambda m, x: F.linear(x, m.w.half().float()),
    "to its own dtype": lambda m, x: F.linear(x, m.w.to(x.dtype)),
    "to a device": lambda m, x: F.linear(x, m.w.to("cpu")),
    "to a device and a dtype": lambda m, x: F.linear(x.bfloat16(), m.w.to("cpu", torch.bfloat16)),
    "to a tensor": lambda m, x: F.linear(x.bfloat16(), m.w.to(x.bfloat16())),
    "type": lambda m, x: F.linear(x.bfloat16(), m.w.type(torch.bfloat16)),
    "type_as": lambda m, x: F.linear(x.bfloat16(), m.w.type_as(x.bfloat16())),
    "double": lambda m, x: F.linear(x.double(), m.w.double()),
    "view as another dtype": lambda m, x: F.linear(x, m.w.view(torch.int32).view(torch.float32)),
    "as_strided": lambda m, x: F.linear(x, m.w.as_strided((48, 32), (32, 1))),
    "operators of ATen": lambda m, x: torch.ops.aten.linear(x, torch.ops.aten.alias(m.w)),
}


@pytest.mark.parametrize("case", params({name: of_weights(call) for name, call in VIEWS.items()}))
def test_views(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


COMPUTED: dict[str, Callable[[Any, Tensor], Any]] = {
    "scaled": lambda m, x: F.linear(x, m.w * 2),
    "scaled by a parameter": lambda m, x: x @ (m.kn * m.bias),
    "scaled by a buffer": lambda m, x: x @ (m.kn * m.other),
    "masked": lambda m, x: F.linear(x, torch.where(m.mask > 0, m.w, 0.0)),
    "of an input": lambda m, x: F.linear(x, m.w * x.sum()),
    "joined": lambda m, x: F.linear(x, torch.cat([m.w, m.w])),
    "a product of two": lambda m, x: F.linear(x, m.w @ m.square),
    "times a constant": lambda m, x: x @ (m.kn @ torch.eye(48)),
    "a buffer": lambda m, x: F.linear(x, m.buffer),
    "a buffer, as an operand": lambda m, x: x @ m.buffer.t(),
    "an input": lambda m, x: F.linear(x, x[0]),
    "a constant": lambda m, x: F.linear(x, torch.ones(48, 32)),
    "numbers": lambda m, x: F.linear(x[..., :2], torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
    "numbers, as an operand": lambda m, x: x[..., :2] @ (torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 2),
    "a scaled activation": lambda m, x: (m.square[0] * x) @ x.mT,
    "attention": lambda m, x: torch.softmax(x @ x.mT, -1) @ x + F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("case", params({name: of_weights(call) for name, call in COMPUTED.items()}))
def test_what_is_no_parameter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(site.path == "kn" for site in check(case, monkeypatch).report.rewritten)


def _write(m: Any, x: Tensor, written: Tensor, change: Callable[[Tensor], Any] = lambda each: each.mul_(3)) -> Tensor:
    change(written)
    return F.linear(x, m.w)


def _augmented(m: Any, x: Tensor) -> Tensor:
    alias = m.w
    alias *= 3
    return F.linear(x, alias)


def _set_item(m: Any, x: Tensor) -> Tensor:
    m.w[0] = 1.0
    return F.linear(x, m.w)


def _later(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.w)
    m.w.t().mul_(2)
    return y


def _branch(m: Any, x: Tensor) -> Tensor:
    def scaled(x: Tensor) -> Tensor:
        m.w.view(-1)[5:7].mul_(50)
        return x * 2

    return torch.cond(x.sum() > 0, scaled, lambda x: x * 3, (x,)) @ m.square + (x @ m.w.t())[..., :32]


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place": lambda m, x: _write(m, x, m.w),
    "and what that returns": lambda m, x: F.linear(x, m.w.mul_(3)),
    "augmented": _augmented,
    "an item": _set_item,
    "copied to": lambda m, x: _write(m, x, m.w, lambda each: each.copy_(m.mask)),
    "out": lambda m, x: _write(m, x, m.w, lambda each: torch.mul(each, 3, out=each)),
    "in a list": lambda m, x: _write(m, x, m.w, lambda each: torch._foreach_mul_([each], 3)),
    "inplace=True": lambda m, x: _write(m, x, m.w, lambda each: F.relu(each, inplace=True)),
    "a view": lambda m, x: _write(m, x, m.w.view(-1)[3:5]),
    "a diagonal": lambda m, x: _write(m, x, m.w.diagonal()),
    "another chunk": lambda m, x: (m.w.chunk(2)[0].mul_(3), F.linear(x, m.w.chunk(2)[1]))[1],
    "what may be a view": lambda m, x: _write(m, x, m.w.contiguous()),
    "later": _later,
    "in a branch": _branch,
}


# PyTorch's decompositions use one of its deprecated functions.
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated")
@pytest.mark.parametrize("case", params({name: of_weights(call) for name, call in WRITES.items()}))
def test_weights_that_are_written_to(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(case, monkeypatch).report
    assert found.skipped[-1].reason is SkipReason.CHANGED
    assert all(site.path == "square" for site in found.rewritten)


def test_a_copy_may_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(of_weights(lambda m, x: (m.w.clone().mul_(3), F.linear(x, m.w))[1]), monkeypatch)
    assert len(found.report.rewritten) == 1
    found = check(of_weights(lambda m, x: F.linear(x, m.w.clone().mul_(3))), monkeypatch)
    assert [site.reason for site in found.report.sites] == [SkipReason.CHANGED]


def _same_weight(m: Any) -> None:
    m.b.weight = m.a.weight


def _slices(m: Any) -> None:
    """Some optimizers flatten all parameters into one in this way."""
    flat = torch.randn(2 * 32 * 32)
    m.a.weight.data, m.b.weight.data = flat.view(2, 32, 32)


def _buffer_of_all(m: Any) -> None:
    m.register_buffer("held", m.a.weight.data)


def _buffer_of_a_part(m: Any) -> None:
    m.register_buffer("held", m.a.weight.data[3:5])


SHARED: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "a module called twice": (2, _shared(lambda m, x: m.a(m.a(x)), lambda m: None, **TWO)),
    "a weight": (2, _shared(lambda m, x: m.a(m.b(x)), _same_weight, **TWO)),
    "slices": (2, _shared(lambda m, x: m.a(m.b(x)), _slices, **TWO)),
    "the other slice is written to": (
        0,
        _shared(lambda m, x: (m.a.weight.mul_(3), m.b(x))[1], _slices, **TWO),
    ),
    "a buffer": (1, _shared(lambda m, x: m.a(x) + x @ m.held, _buffer_of_all, a=_linear())),
    "a buffer that is written to": (
        0,
        _shared(lambda m, x: (m.held.mul_(3), m.a(x))[1], _buffer_of_all, a=_linear()),
    ),
    "a buffer of a part is written to": (
        0,
        _shared(lambda m, x: (m.held.mul_(3), m.a(x))[1], _buffer_of_a_part, a=_linear()),
    ),
}


@pytest.mark.parametrize(
    ("rewritten", "case"), [pytest.param(count, Case(make, (X,)), id=name) for name, (count, make) in SHARED.items()]
)
def test_shared_memory(rewritten: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(check(case, monkeypatch).report.rewritten) == rewritten


@pytest.mark.parametrize("lm_head", ["native", "int8_weight", "int8"])
@pytest.mark.parametrize(
    ("name", "tie"),
    [("lm_head", "none"), ("lm_head", "parameter"), ("projection", "parameter"), ("projection", "data")],
)
def test_heads(name: str, tie: str, lm_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(Case(lambda: Tied(name, tie), (IDS,), options={"lm_head": lm_head}), monkeypatch)
    (site,) = found.report.sites
    is_head = name == "lm_head" or tie != "none"
    expected = ("float" if lm_head == "native" else lm_head.replace("_", " ")) if is_head else "int8"
    assert site.runs_in == expected


LOOK_UPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda table, ids: F.embedding(ids, table, padding_idx=3),
    "torch.embedding": torch.embedding,
    "cast": lambda table, ids: F.embedding(ids, table.to(torch.float32)),
    "index": lambda table, ids: table[ids],
    "index of rows": lambda table, ids: table[ids, :],
    "index of two dimensions": lambda table, ids: table[ids[None]][0],
    "bag": lambda table, ids: F.embedding_bag(ids[:, None], table),
    "bag with offsets": lambda table, ids: F.embedding_bag(ids, table, torch.arange(6)),
}


@pytest.mark.parametrize("look_up", LOOK_UPS.values(), ids=LOOK_UPS.keys())
def test_ties(look_up: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    make = _shared(lambda m, ids: look_up(m.table, ids) @ m.table.t(), lambda m: None, table=lambda: weight(64, 32))
    assert [site.reason for site in check(Case(make, (IDS,)), monkeypatch).report.sites] == [SkipReason.TIED]
