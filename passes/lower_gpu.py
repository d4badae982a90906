"""Lower a rewritten graph to GPU kernels: quantize once per activation, then products.

q, k and v become one product with their concatenated weights. `silu(gate) * up` becomes one product with the rows of
the two weights interleaved, which computes the silu and the multiplication at its end. An activation function that
alone reads a linear is computed at the end of that linear's product. A norm that only quantized linears read becomes
part of the quantization, with the residual add before it (`norms.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from int8compile import hardware, ops
from int8compile.ops import quantized
from int8compile.passes.binding import Binder, Member, QuantizedNodes, WeightSlot
from int8compile.passes.norms import NormFusion
from int8compile.passes.siblings import (
    find_siblings,
    first_that_holds,
    is_recorded,
    not_fused,
    stream_of,
    stretches_of,
    why_apart,
)
from int8compile.passes.static import meta_tensor, traced, weight_view
from int8compile.sites import FusionReason, NotFused, Verdict

aten = torch.ops.aten

_PARTS = 3
# Each function as Dynamo's graphs and as exported graphs spell it.
_RELU = (F.relu, torch.relu, "relu", aten.relu.default)
_SILU = (F.silu, aten.silu.default)
_GELU = (F.gelu, aten.gelu.default)
_MUL = (operator.mul, torch.mul, "mul", aten.mul.Tensor)


@dataclasses.dataclass
class Lowered:
    """The result of lowering a graph.

    Attributes:
        products: Products with quantized activations.
        quantized: Activations that are quantized for the products.
        norms: Norms that are fused with the quantization of their results.
        unfused: Fusions that were not made.
    """

    products: int = 0
    quantized: int = 0
    norms: int = 0
    unfused: list[NotFused] = dataclasses.field(default_factory=list, compare=False)


def lower_for_gpu(
    module: GraphModule,
    binder: Binder,
    parameters: Mapping[Node, Tensor],
    is_gpu: Callable[[torch.device], bool] | None = None,
) -> Lowered:
    """Split the operators whose weight is on a GPU into quantize and product, in place.

    Operators that autograd records are left alone. So are operators on streams of the user's: kernels share buffers,
    such as the counters of split sums, and streams would have to wait for each other.

    Args:
        module: A rewritten graph.
        binder: The binder of its int8 weights.
        parameters: The graph's parameters by their nodes.
        is_gpu: Tells which devices are meant; by default GPUs with int8 kernels.
    """
    is_gpu = is_gpu or has_int8_kernels
    slots = {
        slot.nodes.qweight: slot
        for slot in binder.slots
        if all(is_gpu(parameters[member.source].device) for member in slot.members)
    }
    held = _held(module, slots, is_gpu)
    lowering = _Lowering(module, binder, slots | held)
    parts: list[list[Node]] = []
    for group in find_siblings(module, ops.linear.default, slots | held, limit=len(module.graph.nodes)):
        nodes = [node for node in group if not is_recorded(node) and stream_of(node) is None]
        parts += lowering.plan([node for node in nodes if node.args[1] in slots])
        for node in nodes:
            if node.args[1] in held:
                parts += lowering.plan([node])
        parts += [[node] for node in group if node not in nodes]
    lowering.done.unfused += why_apart(parts, slots, module.graph)
    lowering.emit()
    return lowering.done


def _held(
    module: GraphModule, slots: Mapping[Node, WeightSlot], is_gpu: Callable[[torch.device], bool]
) -> dict[Node, WeightSlot]:
    """Return the weights that modules hold in int8. They are not joined, because memory would hold them twice."""
    held = {}
    for node in module.graph.nodes:
        if node.target is not ops.linear.default:
            continue
        _, qweight, scale, d, *_ = node.args
        weight = meta_tensor(qweight)  # None for a weight of a slot.
        if qweight not in slots and weight is not None and is_gpu(weight.device):
            view = weight_view(weight, [0, 1], tuple(weight.shape))
            held[qweight] = WeightSlot((Member(qweight, view, "", scale, d),), QuantizedNodes(qweight, scale, d))
    return held


def has_int8_kernels(device: torch.device) -> bool:
    """Return whether a device is a GPU for which Triton has int8 matrix instructions."""
    isa = hardware.of(device).isa if device.type == "cuda" else ""
    return bool(hardware.kernel_family(isa)) and not hardware.weight_only(isa)


class _Lowering:
    """Replaces the linears of a graph: `plan` notes the products, `emit` makes them."""

    def __init__(self, module: GraphModule, binder: Binder, slots: Mapping[Node, WeightSlot]) -> None:
        self.done = Lowered()
        self._graph = module.graph
        self._binder = binder
        self._slots = slots
        self._planned: list[tuple[Node, Callable[[], None]]] = []
        self._quantized: dict[tuple[Node, Node | None, float, int], Node] = {}
        # Nodes of one stretch may share results, but not with nodes on other streams.
        self._stretch = stretches_of(module.graph)
        self._stretch |= {node: -1 for node in module.graph.nodes if stream_of(node) is not None}
        self._reads: dict[Node, tuple[Node | None, float, int]] = {}
        self._norms = NormFusion(module.graph, self._stretch, self._reads)

    def plan(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """Plan the products of linears of one activation, which can run at the place of the first of them.

        Returns:
            The linears of each product, except products that compute `silu(gate) * up`.
        """
        rest = list(nodes)
        for node in nodes:
            *_, d, _, threshold = node.args
            self._reads[node] = (d, threshold, self._stretch[node])  # type: ignore[assignment]
        for pair in _gated(nodes):
            rest = [node for node in rest if node not in pair]
            first = next(node for node in nodes if node in pair)
            self._planned.append((first, functools.partial(self._lower_gated, first, *pair)))
        parts = [rest[begin : begin + _PARTS] for begin in range(0, len(rest), _PARTS)]
        for part in parts:
            self._planned.append((part[0], functools.partial(self._lower_parts, part)))
            self.done.unfused += _unfused_activations(part, nodes)
        return parts

    def emit(self) -> None:
        """Make the products in the order of the graph, so that later products find activations already quantized."""
        for _, lower in sorted(self._planned, key=lambda planned: planned[0]):
            lower()
        self._norms.clean()
        self.done.norms = self._norms.fused
        self.done.unfused += self._norms.unfused

    def _lower_gated(self, first: Node, gate: Node, up: Node, silu: Node, mul: Node) -> None:
        slots = self._slots_of([gate, up])
        slot = self._binder.join(slots, interleaved=True)
        bias = None
        with self._graph.inserting_before(first):
            if gate.args[4] is not None:
                stacked = self._graph.call_function(torch.stack, ([gate.args[4], up.args[4]], 1))
                bias = self._graph.call_method("flatten", (stacked,))
            (y,) = self._product(first, slot, bias, quantized.SILU_MUL, [slot.members[0].view.shape[0]])
        self._replace(y, mul, silu, gate, up)
        self._binder.drop(slots)

    def _lower_parts(self, nodes: Sequence[Node]) -> None:
        """Make one product for up to three linears of one activation."""
        first, slots = nodes[0], self._slots_of(nodes)
        alone = len(nodes) == 1
        activation, last = _activation(first) if alone else (quantized.NONE, first)
        slot = slots[0] if alone else self._binder.join(slots)
        bias: Any = first.args[4]
        with self._graph.inserting_before(first):
            if bias is not None and not alone:
                bias = self._graph.call_function(torch.cat, ([node.args[4] for node in nodes],))
            sizes = [member.view.shape[0] for member in slot.members]
            results = self._product(first, slot, bias, activation, sizes)
        if alone:
            self._replace(results[0], *dict.fromkeys((last, first)))
            return
        for node, result in zip(nodes, results, strict=True):
            self._replace(result, node)
        self._binder.drop(slots)

    def _replace(self, result: Node, last: Node, *others: Node) -> None:
        """Replace the last of the calls that a result was computed for, and erase all of them."""
        result.meta.update(last.meta)
        last.replace_all_uses_with(result)
        for node in (last, *others):
            self._graph.erase_node(node)

    def _slots_of(self, nodes: Sequence[Node]) -> list[WeightSlot]:
        return [self._slots[node.args[1]] for node in nodes]  # type: ignore[index]

    def _product(
        self, at: Node, slot: WeightSlot, bias: Node | None, activation: int, sizes: Sequence[int]
    ) -> list[Node]:
        """Append a product of the activation that `at` reads; return its parts, shaped as linears' results."""
        graph, rank = self._graph, traced(at.args[0]).dim()  # type: ignore[arg-type]
        call = self._quantize(at.args[0], *self._reads[at])  # type: ignore[arg-type]
        begin = int(call.target is ops.norm_quantize_rows.default)  # Its first result is the sum.
        activations = [graph.call_function(operator.getitem, (call, begin + i)) for i in range(3)]
        n0, n1 = (*sizes[:-1], 0, 0)[:2]
        y = graph.call_function(
            ops.quantized_linear.default,
            (*activations, slot.nodes.qweight, slot.nodes.scale, bias, activation, n0, n1, traced(at).dtype),
        )
        self.done.products += 1
        if len(sizes) == 1 and rank == 2:
            return [y]
        # The number of rows may change from call to call, so it is read from tensors.
        m = graph.call_method("size", (activations[0], 1))
        leading = [m] if rank == 2 else [graph.call_method("size", (call.args[0], i)) for i in range(rank - 1)]
        if len(sizes) == 1:
            return [graph.call_method("view", (y, *leading, sizes[0]))]
        results, begin = [], 0
        for size in sizes:
            length = graph.call_function(operator.mul, (m, size))
            part = graph.call_method("narrow", (y, 0, graph.call_function(operator.mul, (m, begin)), length))
            results.append(graph.call_method("view", (part, *leading, size)))
            begin += size
        return results

    def _quantize(self, x: Node, d: Node | None, threshold: float, stretch: int) -> Node:
        """Return the quantization of an activation, appended with the norm before it if there is none yet."""
        key = (x, d, threshold, stretch)
        if key not in self._quantized:
            unfused = (ops.quantize_rows.default, (x, d, threshold))
            self._quantized[key] = self._norms.quantize(*key) or self._graph.call_function(*unfused)
            self.done.quantized += 1
        return self._quantized[key]


def _gated(nodes: Sequence[Node]) -> Iterator[tuple[Node, Node, Node, Node]]:
    """Yield pairs (gate, up) of linears of one activation, with the silu and the product in `silu(gate) * up`."""
    taken: set[Node] = set()
    for gate in nodes:
        silu, mul, up = _gate(gate)
        if up in nodes and not {gate, up} & taken and not _why_not_gated(gate, up):
            taken |= {gate, up}
            yield gate, up, silu, mul  # type: ignore[misc]


def _gate(gate: Node) -> tuple[Node | None, Node | None, Any]:
    """Return the silu that alone reads a linear, the product that alone reads that, and its other factor."""
    silu = _only_user(gate, _SILU)
    mul = None if silu is None else _only_user(silu, _MUL)
    if mul is None or len(mul.args) != 2 or mul.kwargs:
        return silu, None, None
    return silu, mul, mul.args[0] if mul.args[1] is silu else mul.args[1]


def _why_not_gated(gate: Node, up: Node) -> Verdict:
    """Return why `silu(gate) * up` of two siblings is not computed at the end of their product."""
    return first_that_holds(
        (FusionReason.READ_ELSEWHERE, len(up.users) != 1),
        (FusionReason.WEIGHT_SHARED, any(len(each.args[1].users) > 1 for each in (gate, up))),  # type: ignore[union-attr]
        (FusionReason.SHAPES, traced(up).shape != traced(gate).shape),
    )


_ACTIVATIONS = ((quantized.RELU, _RELU), (quantized.SILU, _SILU), (quantized.GELU, _GELU))


def _activation(node: Node) -> tuple[int, Node]:
    """Return the activation function that alone reads a linear, and its node; NONE and the linear if there is none."""
    for number, targets in _ACTIVATIONS:
        user = _only_user(node, targets)
        if user is None or user.args[1:]:
            continue
        if number == quantized.GELU and user.kwargs.get("approximate", "none") == "tanh":
            number = quantized.GELU_TANH
        return number, user
    return quantized.NONE, node


def _unfused_activations(part: Sequence[Node], siblings: Sequence[Node]) -> Iterator[NotFused]:
    """Yield a row for each activation function behind the linears of one product that is computed separately."""
    known = {target for _, targets in _ACTIVATIONS for target in targets}
    for node in part:
        _, mul, up = _gate(node)
        if mul is not None and up in siblings and (verdict := _why_not_gated(node, up)):
            yield not_fused("gate", node, verdict)
        for user in node.users:
            if user.target in known and node in user.args and (verdict := _why_apart_from(user, node, part)):
                yield not_fused("activation", node, verdict)


def _why_apart_from(user: Node, node: Node, part: Sequence[Node]) -> Verdict:
    """Return why an activation function is not computed at the end of the linear that it reads."""
    return first_that_holds(
        (FusionReason.READ_ELSEWHERE, len(node.users) > 1),
        (FusionReason.JOINED, len(part) > 1),
        (FusionReason.STREAM, stream_of(user) != stream_of(node)),
        (FusionReason.ROUNDED, _only_user(node, [user.target]) is None),
        (FusionReason.FORM, bool(user.args[1:])),
    )


def _only_user(node: Node, targets: Sequence[object]) -> Node | None:
    """Return the one node that reads another, where it is a call of one of some functions in the same dtype."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    same = meta_tensor(user) is not None and traced(user).dtype == traced(node).dtype
    same = same and stream_of(user) == stream_of(node)
    return user if user.target in targets and node in user.args and same else None
