"""Calls of one activation that can become one call: q, k and v, or gate and up."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from int8compile.passes.static import written


def siblings(module: GraphModule, target: object, weights: Collection[Node], limit: int) -> list[list[Node]]:
    """Calls of one activation that can run at the place of the first of them, at most `limit` together.

    Args:
        module: The graph.
        target: The operator; its arguments are x, weight, scale, d, bias and the threshold.
        weights: The nodes of the weights that may be joined.
        limit: The longest group.

    Returns:
        All such calls in groups, those that stand alone too.
    """
    groups: list[list[Node]] = []
    open_groups: dict[object, list[Node]] = {}
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        if is_barrier(node):
            open_groups.clear()
        if node.target is not target or node.args[1] not in weights:
            continue
        x, qweight, _, d, bias, *threshold = node.args
        if len(qweight.users) > 1:  # A weight that others read too stays as they know it.
            groups.append([node])
            continue
        key = (x, d, bias is None, *threshold)
        group = open_groups.get(key)
        # Where the first one stands, a bias that is computed may not be there yet.
        late = group is not None and bias is not None and order[bias] > order[group[0]]
        if group is None or len(group) == limit or late:
            group = open_groups[key] = []
            groups.append(group)
        group.append(node)
    return groups


def is_barrier(node: Node) -> bool:
    """Return whether a call must not pass this node: it writes to a tensor, waits, or switches autocast or the like."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True  # A Triton kernel of the user's, a region with a graph of its own: either may write.
    operators = torch._ops.OpOverload | torch._ops.OpOverloadPacket
    if isinstance(node.target, operators) and str(node.target).startswith("streams."):
        return True  # It waits for another stream, or has another one wait.
    name = getattr(node.target, "__name__", "")
    return bool(written(node)) or name.startswith(("_enter_", "_exit_", "_set_", "_grad_", "_jvp_"))


def stream_of(node: Node) -> int | None:
    """Return which of the user's streams a call runs on, by Dynamo's number; None where none was chosen."""
    number: int | None = (node.meta.get("custom") or {}).get("stream")
    return number
