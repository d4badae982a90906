"""Lower a rewritten graph to CPU kernels: packed weights, and one operator for linears of the same activation.

q, k and v, or gate and up, read one tensor: one operator quantizes it once and costs one call. Weights that modules
hold in int8 are not packed here, because memory would hold them twice: the kernel packs them during the product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from int8compile import ops
from int8compile.passes.binding import Binder, QuantizedNodes, WeightSlot
from int8compile.passes.siblings import find_siblings, is_recorded, why_apart
from int8compile.passes.static import meta_tensor
from int8compile.sites import NotFused

# Each operator with its form for packed weights.
_PACKED: dict[object, Callable[..., object]] = {
    ops.linear.default: ops.packed_linear.default,
    ops.batched_linear.default: ops.packed_batched_linear.default,
    ops.weight_only_linear.default: ops.packed_weight_only_linear.default,
}
# Each operator with its form that records no gradients.
_NO_GRAD: dict[object, Callable[..., object]] = {
    ops.linear.default: ops.linear_no_grad.default,
    ops.weight_only_linear.default: ops.weight_only_linear_no_grad.default,
    ops.packed_linear.default: ops.packed_linear_no_grad.default,
    ops.packed_weight_only_linear.default: ops.packed_weight_only_linear_no_grad.default,
}
_FUSED = {2: ops.packed_linear_pair_no_grad.default, 3: ops.packed_linear_triple_no_grad.default}


def lower_for_cpu(module: GraphModule, binder: Binder, parameters: Mapping[Node, Tensor]) -> list[NotFused]:
    """Lower the operators whose weight is on a CPU, in place: they take it packed, and siblings become one call.

    Args:
        module: A rewritten graph.
        binder: The binder of its int8 weights.
        parameters: The graph's parameters by their nodes.

    Returns:
        The siblings that stay separate calls.
    """
    slots = {slot.nodes.qweight: slot for slot in binder.slots if _on_cpu(slot, parameters)}
    linears: list[Node] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in _PACKED:
            continue
        weight, is_linear = node.args[1], node.target is ops.linear.default
        if weight in slots:
            slots[weight].packed = True
            node.target = _PACKED[node.target]
        held = meta_tensor(weight)  # None for a weight of a slot.
        if weight in slots or (held is not None and held.device.type == "cpu"):
            _without_gradients(node)
            linears += [node] * is_linear
    groups = find_siblings(module, ops.packed_linear_no_grad.default, slots, max(_FUSED))
    grouped = {node for group in groups for node in group}
    alone = [[node] for node in linears if node not in grouped]
    unfused = [*why_apart([*groups, *alone], slots, module.graph)]
    for group in groups:
        if len(group) > 1:
            _fuse(module, binder, group, [slots[node.args[1]] for node in group])  # type: ignore[index]
    return unfused


def _on_cpu(slot: WeightSlot, parameters: Mapping[Node, Tensor]) -> bool:
    return all(parameters[member.source].device.type == "cpu" for member in slot.members)


def _without_gradients(node: Node) -> None:
    """Use the form without a formula for gradients, which costs 8 us a call, where nothing is recorded."""
    if not is_recorded(node):
        node.target = _NO_GRAD.get(node.target, node.target)


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
