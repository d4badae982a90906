"""The same rules rewrite exported graphs: the same sites, for the same reasons, and the same numbers, bit for bit.

Each model is explained and compiled (Dynamo), and exported and rewritten (ATen). Inductor is left out on both sides:
the rewritten graphs run as they are, so that all float operators around the int8 ones are the same. What differs,
because torch.export makes another graph, is named at the end.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

import int8compile
from int8compile import BadWeightError, InputError, Int8Config, Int8Warning, SkipReason, ops, quantize_
from int8compile.exporting.exporter import rewrite
from int8compile.ops import rotation_of
from int8compile.passes import WeightView
from int8compile.report import Report
from int8compile.weights import STORE
from tests.helpers.implementations import needs_kernel
from tests.helpers.models import Stack
from tests.passes.test_passes import REASONS, SPELLINGS, Weights
from tests.stored.test_modules import int8_embedding, int8_experts, int8_linear
from tests.test_weights import Attention

# Export is for the CPU kernels.
pytestmark = needs_kernel


class Uses(nn.Module):
    """Parameters, buffers and modules; `call` says how they are used."""

    def __init__(self, call: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.call = call
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.call(self, *args)


@dataclasses.dataclass
class Case:
    """A model, made anew each time it is asked for, and what it is called with."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model, always with the same numbers."""
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs of its own for every call: some models write to them."""
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, (self.args, self.kwargs))


@dataclasses.dataclass
class Found:
    """What was made of a model.

    Attributes:
        report: What it says of it.
        called: How often the rewritten graphs call each operator of ours.
        floats: The float parameters that they read.
        outputs: What they return.
    """

    report: Report
    called: collections.Counter[str]
    floats: collections.Counter[tuple[Any, ...]]
    outputs: list[Tensor]


# How many linears a call of an operator computes.
COUNTS = collections.defaultdict(lambda: 1, {"packed_linear_pair_no_grad": 2, "packed_linear_triple_no_grad": 3})


def calls(graphs: Sequence[GraphModule]) -> collections.Counter[str]:
    targets: list[Any] = [node.target for graph in graphs for node in graph.graph.nodes]
    ours = [each for each in targets if isinstance(each, torch._ops.OpOverload) and each.namespace == "int8compile"]
    # An operator without a kernel, of which only the definition is left.
    columns = sum(getattr(each, "__name__", "") == "column_linear" for each in targets)
    return collections.Counter(each._opname for each in ours) + collections.Counter(column_linear=columns)


def compiled(case: Case, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Through Dynamo and the backend; what it gives to Inductor runs eagerly."""
    args, kwargs = case.inputs()
    report = int8compile.explain(case.model(), *args, config=case.options, **kwargs)
    graphs: list[GraphModule] = []

    def eager(module: GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", eager)
    args, kwargs = case.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rewrote none", Int8Warning)
        outputs = torch.compile(case.model(), backend="int8", options=case.options)(*args, **kwargs)
    floats = {}
    for graph in graphs:
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            if node.users and isinstance(value, nn.Parameter):
                # By where it lies: Dynamo takes two parameters that are the same memory for two.
                floats[value.untyped_storage()._cdata, value.storage_offset()] = (tuple(value.shape), value.dtype)
    return Found(report, calls(graphs), collections.Counter(floats.values()), _tensors(outputs))


def export(case: Case) -> GraphModule:
    args, kwargs = case.inputs()
    with torch.no_grad():
        module = torch.export.export(case.model(), args, kwargs, strict=False).module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def exported(case: Case, form: str = "fast", *, for_gpu: bool = False) -> Found:
    """Through torch.export; the rewritten graph runs eagerly."""
    module = export(case)
    meant = [node.meta["val"] for node in tree_leaves(module.graph.output_node().args) if isinstance(node, Node)]
    with torch.no_grad():
        report = rewrite(module, Int8Config.from_options(case.options), form, for_gpu=for_gpu)
        module.recompile()
        args, kwargs = case.inputs()
        outputs = module(*args, **kwargs)
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr") if node.users}
    floats = {name: value for name, value in module.named_parameters(remove_duplicate=False) if name in read}
    shapes = collections.Counter((tuple(value.shape), value.dtype) for value in floats.values())
    found = Found(report, calls([module]), shapes, _tensors(outputs))
    # Laid out as in the graph in float: what reads it may rely on that.
    assert [_strides(each) for each in found.outputs] == [_strides(each) for each in _tensors(meant)]
    return found


def _tensors(outputs: Any) -> list[Tensor]:
    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]


def rows(report: Report) -> list[tuple[Any, ...]]:
    """What is said of each site that both can see.

    `explain` also names parameters that no graph uses; a package does not have those. Weights are numbered: a weight
    that is shared is known by one of its names, and what is computed by the name of a node.
    """
    numbers: dict[str, int] = {}
    return [
        (
            *(site.path, site.op, tuple(re.sub(r"\bs\d+", "s", size) for size in site.shape)),
            *(numbers.setdefault(site.weight, len(numbers)), site.layout),
            *(site.weight_bytes, site.bytes_before, site.bytes_after, site.weight_only, site.why()),
        )
        for site in report.sites
        if site.reason is not SkipReason.NOT_CAPTURED
    ]


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [(each.dtype, each.shape) for each in actual] == [(each.dtype, each.shape) for each in expected]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Has the two agree on a model; what is exported."""
    expected, actual = compiled(case, monkeypatch), exported(case)
    assert rows(actual.report) == rows(expected.report)
    assert actual.report.activation_matmuls == expected.report.activation_matmuls
    assert actual.called == expected.called
    assert sum(COUNTS[name] * count for name, count in actual.called.items()) == len(actual.report.rewritten)
    assert actual.floats == expected.floats
    assert_equal(actual.outputs, expected.outputs)
    return actual


def _strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def params(cases: dict[str, Case], slow: Sequence[str] = ()) -> list[Any]:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in slow else []) for name, case in cases.items()
    ]


def values(*shape: int) -> Tensor:
    """Numbers that are always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


X = values(2, 5, 32)
IDS = torch.arange(6)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


# Spellings, and reasons not to rewrite


class Spellings(nn.Module):
    """Models of one matmul each, side by side."""

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
    """Each is lowered to the operators for GPUs, which compute their definition here."""
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


def of_weights(call: Callable[[Any, Tensor], Any], **options: Any) -> Case:
    """A model of bare parameters and buffers."""

    def make() -> nn.Module:
        held: dict[str, Any] = {"w": weight(96, 32), "kn": weight(32, 48), "experts": weight(2, 32, 48)}
        held |= {"heads": weight(32, 3, 16), "square": weight(32, 32), "cubes": weight(4, 32, 32), "bias": weight(48)}
        held |= {"buffer": torch.randn(48, 32), "mask": torch.rand(96, 32).round(), "other": torch.randn(48)}
        return Uses(call, **held)

    return Case(make, (X,), options=options)


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


# Decompositions of torch use a function of torch that is deprecated.
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


# Memory that is known by several names


def _shared(call: Callable[..., Any], share: Callable[[Any], Any], **held: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Uses(call, **{name: each() for name, each in held.items()})
        share(model)
        return model

    return make


def _linear(k: int = 32, n: int = 32, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(k, n, **options)


def _same_weight(m: Any) -> None:
    m.b.weight = m.a.weight


def _same_data(m: Any) -> None:
    m.b.weight.data = m.a.weight.data


def _slices(m: Any) -> None:
    """As after the flattening of all parameters into one, which optimizers do."""
    flat = torch.randn(2 * 32 * 32)
    m.a.weight.data, m.b.weight.data = flat.view(2, 32, 32)


def _buffer_of_all(m: Any) -> None:
    m.register_buffer("held", m.a.weight.data)


def _buffer_of_a_part(m: Any) -> None:
    m.register_buffer("held", m.a.weight.data[3:5])


TWO = {"a": _linear(), "b": _linear()}
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


class Tied(nn.Module):
    """An embedding and a head, as two modules of one parameter, as two parameters of one memory, or apart."""

    def __init__(self, name: str, tie: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.add_module(name, nn.Linear(32, 64, bias=False))
        self.head = name
        if tie == "parameter":
            self.get_submodule(name).weight = self.embedding.weight
        if tie == "data":
            self.get_submodule(name).weight.data = self.embedding.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        return self.get_submodule(self.head)(self.embedding(ids))


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
    """Parts of one matrix share a call where their biases are there before the first; other matrices have other d."""

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


# Modules


def modules(call: Callable[..., Any], **held: Callable[[], Any]) -> Callable[[], nn.Module]:
    return _shared(call, lambda m: None, **held)


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
    """They share a call where their weights are taken over; as in packages, which have no modules."""
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
    """For each input of joined linears, however many there are; a calibrated one too."""
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
    """As language models compute angles: two activations, under autocast that is switched off."""
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
    """torch.export makes graphs of regions of autocast and of grad modes; what is inside is rewritten all the same."""
    found = check(Case(modules(call, **TWO), (X,)), monkeypatch)
    assert [site.reason for site in found.report.sites] == reasons
    assert {site.path for site in found.report.sites} <= {"a", "b"}


# What the passes share is known to the portable form too


@pytest.mark.parametrize("call", [_autocast, _rotary], ids=["autocast", "autocast switched off"])
def test_regions_in_the_portable_form(call: Callable[..., Any]) -> None:
    case = Case(modules(call, **TWO), (X,))
    assert_equal(exported(case, "portable").outputs, exported(case).outputs)


def test_writes_in_the_portable_form() -> None:
    """Linears share what is quantized until it is written to."""

    def call(m: Any, x: Tensor) -> list[Tensor]:
        x = x * 1
        row = x[1]
        before = x @ m.kn
        row[3] = 100.0
        return [before, F.linear(x, m.w), x @ m.square]

    case = of_weights(call)
    assert_equal(exported(case, "portable").outputs, exported(case).outputs)


# Sizes that may change


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
    from tests.integrations.test_transformers import CASES

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


# What differs


def test_two_parameters_of_one_memory_are_one_weight_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives them to its graph as two, each of which may get other values."""
    case = Case(_shared(lambda m, x: m.a(m.b(x)), _same_data, **TWO), (X,))
    expected, actual = compiled(case, monkeypatch), exported(case)
    assert [site.path for site in actual.report.rewritten] == [site.path for site in expected.report.rewritten]
    assert expected.report.totals()["bytes_after"] == 2 * actual.report.totals()["bytes_after"]
    assert_equal(actual.outputs, expected.outputs)


def test_the_names_of_a_module_are_told_apart_by_torch_export_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To Dynamo it has the name that it was called by first."""

    def share(model: Any) -> None:
        model.b = model.a

    case = Case(_shared(lambda m, x: m.a(m.b(x)), share, a=_linear()), (X,))
    expected, actual = compiled(case, monkeypatch), exported(case)
    assert [site.path for site in expected.report.sites] == ["b", "b"]
    assert [site.path for site in actual.report.sites] == ["b", "a"]
    assert_equal(actual.outputs, expected.outputs)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_parameters_that_are_not_registered_are_constants_to_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants stay in float, as buffers do. `nn.ParameterList` registers them."""

    def make() -> nn.Module:
        hidden = [nn.Linear(32, 48), nn.Linear(32, 48)]
        return Uses(lambda m, x: hidden[0](x) + hidden[1](x))

    case = Case(make, (X,))
    assert [site.reason for site in compiled(case, monkeypatch).report.sites] == [None, None]
    assert [site.reason for site in exported(case).report.sites] == [SkipReason.NOT_STATIC] * 2


def test_torch_export_does_not_take_the_fused_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.TransformerEncoderLayer` calls one fused operator in inference, except while it is traced by torch.export."""
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
    """Activation checkpointing is for training; Dynamo keeps it in a graph of its own, torch.export leaves it out."""
    from torch.utils.checkpoint import checkpoint

    case = Case(modules(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), **TWO), (X,))
    expected, actual = compiled(case, monkeypatch).report, exported(case).report
    assert [(site.path, site.reason) for site in expected.sites] == [("a", SkipReason.NESTED), ("b", None)]
    assert [(site.path, site.reason) for site in actual.sites] == [("a", None), ("b", None)]


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_recurrent_layers_are_one_operator_to_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo leaves them to Python, so that no graph has their weights."""
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
    """A package does not have them."""
    case = Case(modules(lambda m, x: m.a(x), **TWO), (X,))
    assert [site.path for site in compiled(case, monkeypatch).report.sites] == ["a", "b"]
    assert [site.path for site in exported(case).report.sites] == ["a"]


def test_torch_export_knows_lines_of_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in a function that `forward` calls is reported with the line in `forward`; all others are the same."""
    inside, outside = Case(Stack, (X,)), Case(lambda: Weights(lambda m, x: F.linear(x, m.nk)), (X,))
    expected, actual = compiled(inside, monkeypatch).report, exported(inside).report
    assert [site.source for site in actual.sites] == [site.source for site in expected.sites]
    assert compiled(outside, monkeypatch).report.sites[0].source.startswith("test_export_parity.py:")
    line = Weights.forward.__code__.co_firstlineno + 1
    assert exported(outside).report.sites[0].source == f"test_passes.py:{line}"


def test_torch_export_lays_attention_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph of Dynamo's `nn.MultiheadAttention` ends with `contiguous`; the numbers are the same."""

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
    """The errors are its own. Dynamo takes both: the one is rewritten, the other stays in float."""
    report = int8compile.explain(of_weights(call).model(), X)
    assert [site.reason for site in report.sites] in ([None], [SkipReason.TRANSFORMED])
    with pytest.raises(Exception, match=r"fake tensor|functorch"):
        export(of_weights(call))
