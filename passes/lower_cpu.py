"""Lowers a rewritten graph to CPU kernels: packed weights, and one operator for linears of the same activation.

q, k and v, or gate and up, read one tensor: together they quantize it once and cost one call. Weights that modules hold
in int8 stay as they are, so that memory holds them once: the kernel packs them as it goes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from int8compile import ops
from int8compile.passes.binding import Binder, QuantizedNodes, WeightSlot
from int8compile.passes.rewrite import NEEDS_GRAD
from int8compile.passes.siblings import siblings
from int8compile.passes.static import meta_tensor

# Each operator with its form for packed weights.
_PACKED: dict[object, Callable[..., object]] = {
    ops.linear.default: ops.packed_linear.default,
    ops.batched_linear.default: ops.packed_batched_linear.default,
    ops.weight_only_linear.default: ops.packed_weight_only_linear.default,
}
# And with its form without gradients.
_NO_GRAD: dict[object, Callable[..., object]] = {
    ops.linear.default: ops.linear_no_grad.default,
    ops.weight_only_linear.default: ops.weight_only_linear_no_grad.default,
    ops.packed_linear.default: ops.packed_linear_no_grad.default,
    ops.packed_weight_only_linear.default: ops.packed_weight_only_linear_no_grad.default,
}
_FUSED = {2: ops.packed_linear_pair_no_grad.default, 3: ops.packed_linear_triple_no_grad.default}


def lower_for_cpu(module: GraphModule, binder: Binder, parameters: Mapping[Node, Tensor]) -> None:
    """Has the operators whose weight is on a CPU take it packed, in place.

    Args:
        module: A rewritten graph.
        binder: What its int8 weights were bound with.
        parameters: The graph's parameters by their nodes.
    """
    slots = {slot.nodes.qweight: slot for slot in binder.slots if _on_cpu(slot, parameters)}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in _PACKED:
            continue
        weight = node.args[1]
        if weight in slots:
            slots[weight].packed = True
            node.target = _PACKED[node.target]
        held = meta_tensor(weight)  # None for a slot's.
        if weight in slots or (held is not None and held.device.type == "cpu"):
            _without_gradients(node)
    for group in siblings(module, ops.packed_linear_no_grad.default, slots, max(_FUSED)):
        if len(group) > 1:
            _fuse(module, binder, group, [slots[node.args[1]] for node in group])  # type: ignore[index]


def _on_cpu(slot: WeightSlot, parameters: Mapping[Node, Tensor]) -> bool:
    return all(parameters[member.source].device.type == "cpu" for member in slot.members)


def _without_gradients(node: Node) -> None:
    """Registering a formula for gradients costs 8 us a call, whether they are asked for or not."""
    # What is not marked the user has called, with a weight that is no site's.
    if node.meta.get(NEEDS_GRAD, True) or node.target not in _NO_GRAD:
        return
    node.target = _NO_GRAD[node.target]


def _fuse(module: GraphModule, binder: Binder, nodes: Sequence[Node], slots: Sequence[WeightSlot]) -> None:
    graph = module.graph
    first = nodes[0]
    x, _, _, d, bias, threshold = first.args
    sizes = [slot.members[0].view.shape[0] for slot in slots]
    biases = [node.args[4] for node in nodes]
    with graph.inserting_before(first):
        if bias is not None:
            bias = graph.call_function(torch.cat, (biases,))
        call = graph.call_function(_FUSED[len(nodes)])
        parts = [graph.call_function(operator.getitem, (call, i)) for i in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    fused = binder.fuse(slots)
    fused.packed = True
    weight: QuantizedNodes = fused.nodes
    call.args = (x, weight.qweight, weight.scale, d, bias, *sizes[:-1], threshold)
