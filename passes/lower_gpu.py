"""Lowers a rewritten graph to GPU kernels: quantize once per activation, then products.

q, k and v become one product with the three weights one behind the other; `silu(gate) * up` one product with the two
weights' rows in turns, whose end computes it; and an activation function that alone reads a linear, that linear's end.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from int8compile import hardware, ops
from int8compile.ops import quantized
from int8compile.passes.binding import Binder, Member, QuantizedNodes, WeightSlot
from int8compile.passes.rewrite import NEEDS_GRAD
from int8compile.passes.siblings import is_barrier, siblings
from int8compile.passes.static import meta_tensor, traced, weight_view

aten = torch.ops.aten

_PARTS = 3
# Each as Dynamo's graphs and as exported ones spell it.
_RELU = (F.relu, torch.relu, "relu", aten.relu.default)
_SILU = (F.silu, aten.silu.default)
_GELU = (F.gelu, aten.gelu.default)
_MUL = (operator.mul, torch.mul, "mul", aten.mul.Tensor)


@dataclasses.dataclass
class Lowered:
    """What was made.

    Attributes:
        products: Products with quantized activations.
        quantized: Activations that are quantized for them.
    """

    products: int = 0
    quantized: int = 0


def lower_for_gpu(
    module: GraphModule,
    binder: Binder,
    parameters: Mapping[Node, Tensor],
    is_gpu: Callable[[torch.device], bool] | None = None,
) -> Lowered:
    """Splits the operators whose weight is on a GPU into quantize and product, in place.

    Operators that autograd records stay as they are.

    Args:
        module: A rewritten graph.
        binder: What its int8 weights were bound with.
        parameters: The graph's parameters by their nodes.
        is_gpu: Which devices are meant; by default GPUs with int8 kernels.
    """
    is_gpu = is_gpu or has_int8_kernels
    slots = {
        slot.nodes.qweight: slot
        for slot in binder.slots
        if all(is_gpu(parameters[member.source].device) for member in slot.members)
    }
    held = _held(module, slots, is_gpu)
    lowering = _Lowering(module, binder, slots | held)
    for group in siblings(module, ops.linear.default, slots | held, limit=len(module.graph.nodes)):
        nodes = [node for node in group if not node.meta.get(NEEDS_GRAD, True)]
        lowering.plan([node for node in nodes if node.args[1] in slots])
        for node in nodes:
            if node.args[1] in held:
                lowering.plan([node])
    lowering.emit()
    return lowering.done


def _held(
    module: GraphModule, slots: Mapping[Node, WeightSlot], is_gpu: Callable[[torch.device], bool]
) -> dict[Node, WeightSlot]:
    """The weights that modules hold in int8: they are not joined, since memory would hold them twice."""
    held = {}
    for node in module.graph.nodes:
        if node.target is not ops.linear.default:
            continue
        _, qweight, scale, d, *_ = node.args
        weight = meta_tensor(qweight)  # None for a slot's.
        if qweight not in slots and weight is not None and is_gpu(weight.device):
            view = weight_view(weight, [0, 1], tuple(weight.shape))
            held[qweight] = WeightSlot((Member(qweight, view, "", scale, d),), QuantizedNodes(qweight, scale, d))
    return held


def has_int8_kernels(device: torch.device) -> bool:
    """Whether a device is a GPU for which Triton has int8 matrix instructions."""
    isa = hardware.of(device).isa if device.type == "cuda" else ""
    return bool(hardware.kernel_family(isa)) and not hardware.weight_only(isa)


class _Lowering:
    def __init__(self, module: GraphModule, binder: Binder, slots: Mapping[Node, WeightSlot]) -> None:
        self.done = Lowered()
        self._graph = module.graph
        self._binder = binder
        self._slots = slots
        self._planned: list[tuple[Node, Callable[[], None]]] = []
        self._quantized: dict[tuple[Node, Node | None, float, torch.dtype, int], list[Node]] = {}
        # What lies between two barriers may share what is computed there.
        self._stretch: dict[Node, int] = {}
        stretch = 0
        for node in module.graph.nodes:
            stretch += is_barrier(node)
            self._stretch[node] = stretch

    def plan(self, nodes: Sequence[Node]) -> None:
        """Plans the products of linears of one activation, which can run at the place of the first of them."""
        rest = list(nodes)
        for pair in _gated(nodes):
            rest = [node for node in rest if node not in pair]
            first = next(node for node in nodes if node in pair)
            self._planned.append((first, functools.partial(self._lower_gated, first, *pair)))
        for begin in range(0, len(rest), _PARTS):
            part = rest[begin : begin + _PARTS]
            self._planned.append((part[0], functools.partial(self._lower_parts, part)))

    def emit(self) -> None:
        """Makes the products in the order of the graph: what the first quantizes is there for the others."""
        order = {node: position for position, node in enumerate(self._graph.nodes)}
        for _, lower in sorted(self._planned, key=lambda planned: order[planned[0]]):
            lower()

    def _lower_gated(self, first: Node, gate: Node, up: Node, silu: Node, mul: Node) -> None:
        slots = self._slots_of([gate, up])
        slot = self._binder.join(slots, interleaved=True)
        bias = None
        with self._graph.inserting_before(first):
            if gate.args[4] is not None:
                stacked = self._graph.call_function(torch.stack, ([gate.args[4], up.args[4]], 1))
                bias = self._graph.call_method("flatten", (stacked,))
            (y,) = self._product(first, slot, bias, quantized.SILU_MUL, [slot.members[0].view.shape[0]])
        y.meta.update(mul.meta)
        mul.replace_all_uses_with(y)
        for node in (mul, silu, gate, up):
            self._graph.erase_node(node)
        self._binder.drop(slots)

    def _lower_parts(self, nodes: Sequence[Node]) -> None:
        """One product for up to three linears of one activation."""
        first = nodes[0]
        biases = [node.args[4] for node in nodes]
        bias: Any = biases[0]
        slots = self._slots_of(nodes)
        if len(nodes) == 1:
            slot = slots[0]
            activation, replaced = _activation(first)
        else:
            slot = self._binder.join(slots)
            activation, replaced = quantized.NONE, first
        sizes = [member.view.shape[0] for member in slot.members]
        with self._graph.inserting_before(first):
            if bias is not None and len(nodes) > 1:
                bias = self._graph.call_function(torch.cat, (biases,))
            results = self._product(first, slot, bias, activation, sizes)
        if len(nodes) == 1:
            results[0].meta.update(replaced.meta)
            replaced.replace_all_uses_with(results[0])
            for node in dict.fromkeys((replaced, first)):
                self._graph.erase_node(node)
            return
        for node, result in zip(nodes, results, strict=True):
            result.meta.update(node.meta)
            node.replace_all_uses_with(result)
            self._graph.erase_node(node)
        self._binder.drop(slots)

    def _slots_of(self, nodes: Sequence[Node]) -> list[WeightSlot]:
        return [self._slots[node.args[1]] for node in nodes]  # type: ignore[index]

    def _product(
        self, at: Node, slot: WeightSlot, bias: Node | None, activation: int, sizes: Sequence[int]
    ) -> list[Node]:
        """Appends a product of the activation that `at` reads; its results by parts, shaped as linears' are."""
        x: Any = at.args[0]
        d, threshold = cast("Node | None", at.args[3]), cast("float", at.args[5])
        dtype = traced(at).dtype
        graph = self._graph
        q, rows = self._quantize(x, d, threshold, dtype, self._stretch[at])
        n0, n1 = (*sizes[:-1], 0, 0)[:2]
        y = graph.call_function(
            ops.quantized_linear.default,
            (q, rows, slot.nodes.qweight, slot.nodes.scale, bias, activation, n0, n1, dtype),
        )
        self.done.products += 1
        rank = traced(x).dim()
        # Sizes of rows may change from call to call, so they are read from the activation.
        leading = [graph.call_method("size", (x, i)) for i in range(rank - 1)]
        if len(sizes) == 1:
            return [y if rank == 2 else graph.call_method("view", (y, *leading, sizes[0]))]
        m = graph.call_method("size", (q, 1))
        results, begin = [], 0
        for size in sizes:
            length = graph.call_function(operator.mul, (m, size))
            part = graph.call_method("narrow", (y, 0, graph.call_function(operator.mul, (m, begin)), length))
            results.append(graph.call_method("view", (part, *leading, size)))
            begin += size
        return results

    def _quantize(self, x: Node, d: Node | None, threshold: float, dtype: torch.dtype, stretch: int) -> list[Node]:
        key = (x, d, threshold, dtype, stretch)
        if key not in self._quantized:
            call = self._graph.call_function(ops.quantize_rows.default, (x, d, threshold))
            self._quantized[key] = [self._graph.call_function(operator.getitem, (call, i)) for i in range(2)]
            self.done.quantized += 1
        return self._quantized[key]


def _gated(nodes: Sequence[Node]) -> Iterator[tuple[Node, Node, Node, Node]]:
    """Pairs (gate, up) of linears of one activation, with the silu and the product in `silu(gate) * up`."""
    taken: set[Node] = set()
    for gate in nodes:
        silu = _only_user(gate, _SILU)
        mul = None if silu is None else _only_user(silu, _MUL)
        if mul is None or len(mul.args) != 2 or mul.kwargs:
            continue
        up: Any = mul.args[0] if mul.args[1] is silu else mul.args[1]
        fits = up in nodes and up is not gate and len(up.users) == 1 and not {gate, up} & taken
        if fits and traced(up).shape == traced(gate).shape and _alone(gate) and _alone(up):
            taken |= {gate, up}
            yield gate, up, silu, mul  # type: ignore[misc]


def _alone(node: Node) -> bool:
    """Whether no other call reads a linear's weight."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    return len(weight.users) == 1


def _activation(node: Node) -> tuple[int, Node]:
    """The activation function that alone reads a linear, and its node; NONE and the linear if there is none."""
    for number, targets in ((quantized.RELU, _RELU), (quantized.SILU, _SILU), (quantized.GELU, _GELU)):
        user = _only_user(node, targets)
        if user is None or user.args[1:]:
            continue
        if number == quantized.GELU and user.kwargs.get("approximate", "none") == "tanh":
            number = quantized.GELU_TANH
        return number, user
    return quantized.NONE, node


def _only_user(node: Node, targets: Sequence[object]) -> Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    same = meta_tensor(user) is not None and traced(user).dtype == traced(node).dtype
    return user if user.target in targets and node in user.args and same else None
