"""Compare the sites and reasons of an exported graph with those of `torch.compile`."""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

import int8compile
from int8compile import Int8Config, Int8Warning, SkipReason
from int8compile.exporting.exporter import rewrite
from int8compile.report import Report


class Uses(nn.Module):
    """Parameters, buffers and modules, used by `call`."""

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
    """A model, built anew for each use, and the inputs it is called with."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def model(self) -> nn.Module:
        """Return the model, always with the same numbers."""
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return fresh inputs: some models write to them."""
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, (self.args, self.kwargs))


@dataclasses.dataclass
class Found:
    """The result of rewriting a model.

    Attributes:
        report: Its report.
        called: The number of calls of each of our operators in the rewritten graphs.
        floats: The float parameters that the graphs read.
        outputs: The outputs.
    """

    report: Report
    called: collections.Counter[str]
    floats: collections.Counter[tuple[Any, ...]]
    outputs: list[Tensor]


# The number of linears that one call of an operator computes.
COUNTS = collections.defaultdict(lambda: 1, {"packed_linear_pair_no_grad": 2, "packed_linear_triple_no_grad": 3})


def calls(graphs: Sequence[GraphModule]) -> collections.Counter[str]:
    targets: list[Any] = [node.target for graph in graphs for node in graph.graph.nodes]
    ours = [each for each in targets if isinstance(each, torch._ops.OpOverload) and each.namespace == "int8compile"]
    # An operator that has no kernel, only its definition.
    columns = sum(getattr(each, "__name__", "") == "column_linear" for each in targets)
    return collections.Counter(each._opname for each in ours) + collections.Counter(column_linear=columns)


def compiled(case: Case, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Rewrite through Dynamo and the backend; the graphs meant for Inductor run eagerly."""
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
                # By address: Dynamo counts two parameters of the same memory as two.
                floats[value.untyped_storage()._cdata, value.storage_offset()] = (tuple(value.shape), value.dtype)
    return Found(report, calls(graphs), collections.Counter(floats.values()), _tensors(outputs))


def export(case: Case) -> GraphModule:
    args, kwargs = case.inputs()
    with torch.no_grad():
        module = torch.export.export(case.model(), args, kwargs, strict=False).module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def exported(case: Case, form: str = "fast", *, for_gpu: bool = False) -> Found:
    """Rewrite through torch.export; the rewritten graph runs eagerly."""
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
    # With the strides of the float graph: its readers may rely on them.
    assert [_strides(each) for each in found.outputs] == [_strides(each) for each in _tensors(meant)]
    return found


def _tensors(outputs: Any) -> list[Tensor]:
    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]


def rows(report: Report) -> list[tuple[Any, ...]]:
    """Return the rows of the report for sites that both can see.

    `explain` also names parameters that no graph uses; a package does not hold them. Weights are numbered, because a
    shared weight is known by one of its names, and a computed weight by a node's name.
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
    """Require that the two agree on a model, and return the exported one."""
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
    """Return numbers that are always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


X = values(2, 5, 32)

IDS = torch.arange(6)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def of_weights(call: Callable[[Any, Tensor], Any], **options: Any) -> Case:
    """Return a model of bare parameters and buffers."""

    def make() -> nn.Module:
        held: dict[str, Any] = {"w": weight(96, 32), "kn": weight(32, 48), "experts": weight(2, 32, 48)}
        held |= {"heads": weight(32, 3, 16), "square": weight(32, 32), "cubes": weight(4, 32, 32), "bias": weight(48)}
        held |= {"buffer": torch.randn(48, 32), "mask": torch.rand(96, 32).round(), "other": torch.randn(48)}
        return Uses(call, **held)

    return Case(make, (X,), options=options)


def _shared(call: Callable[..., Any], share: Callable[[Any], Any], **held: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Uses(call, **{name: each() for name, each in held.items()})
        share(model)
        return model

    return make


def _linear(k: int = 32, n: int = 32, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(k, n, **options)


TWO = {"a": _linear(), "b": _linear()}


class Tied(nn.Module):
    """An embedding and a head: two modules of one parameter, two parameters of one memory, or separate."""

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


def modules(call: Callable[..., Any], **held: Callable[[], Any]) -> Callable[[], nn.Module]:
    return _shared(call, lambda m: None, **held)
