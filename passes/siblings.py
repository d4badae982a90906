"""Siblings: linears of one activation that can become one call, as q, k and v, or gate and up."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from int8compile.passes.names import module_path
from int8compile.passes.rewrite import NEEDS_GRAD, PATH
from int8compile.passes.static import written
from int8compile.sites import FusionReason, NotFused, Verdict


def find_siblings(module: GraphModule, target: object, weights: Collection[Node], limit: int) -> list[list[Node]]:
    """Return calls of one activation that can run at the place of the first of them, in groups.

    Args:
        module: The graph.
        target: The operator; its arguments are x, weight, scale, d, bias and the threshold.
        weights: The nodes of the weights that may be joined.
        limit: The largest group.

    Returns:
        All such calls; a call without siblings is a group of its own.
    """
    groups: list[list[Node]] = []
    open_groups: dict[object, list[Node]] = {}
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    stretches = stretches_of(module.graph)
    for node in module.graph.nodes:
        if node.target is not target or node.args[1] not in weights:
            continue
        x, qweight, _, d, bias, *threshold = node.args
        if len(qweight.users) > 1:  # Other calls read this weight alone.
            groups.append([node])
            continue
        key = (stretches[node], x, d, bias is None, *threshold)
        group = open_groups.get(key)
        # A bias may be computed only after the first call of the group.
        late = group is not None and bias is not None and order[bias] > order[group[0]]
        if group is None or len(group) == limit or late:
            group = open_groups[key] = []
            groups.append(group)
        group.append(node)
    return groups


def why_apart(calls: Iterable[Sequence[Node]], weights: Collection[Node], graph: Graph) -> Iterator[NotFused]:
    """Yield a row for each call that could have been joined with an earlier one of the same activation.

    Args:
        calls: The linears that become one call each, before they are lowered.
        weights: The nodes of the weights that may be joined.
        graph: The graph.
    """
    stretches = stretches_of(graph)
    by_input = collections.defaultdict(list)
    for nodes in sorted(calls, key=lambda nodes: nodes[0]):
        by_input[nodes[0].args[0]].append(nodes)
    for before, after in itertools.chain.from_iterable(map(itertools.pairwise, by_input.values())):
        if verdict := _apart([*before, *after], before[0], after[0], weights, stretches):
            yield not_fused("siblings", after[0], verdict)


def _apart(
    nodes: list[Node], first: Node, node: Node, weights: Collection[Node], stretches: Mapping[Node, int]
) -> Verdict:
    """Return why two groups of linears, which begin with `first` and `node`, are not joined."""
    return first_that_holds(
        (FusionReason.RECORDED, any(map(is_recorded, nodes))),
        (FusionReason.STREAM, any(stream_of(each) is not None for each in nodes)),
        (FusionReason.HELD, any(each.args[1] not in weights for each in nodes)),
        (FusionReason.WEIGHT_SHARED, any(len(each.args[1].users) > 1 for each in nodes)),  # type: ignore[union-attr]
        (FusionReason.SWITCHED, stretches[first] != stretches[node]),
        (FusionReason.ROTATED_APART, first.args[3] is not node.args[3]),
        (FusionReason.BIAS, (first.args[4] is None) != (node.args[4] is None)),
        (FusionReason.THRESHOLDS, first.args[5:] != node.args[5:]),
        (FusionReason.LATE_BIAS, isinstance(node.args[4], Node) and node.args[4] > first),
        (FusionReason.COUNT, True),
    )


def first_that_holds(*checks: tuple[FusionReason, bool]) -> Verdict:
    """Return the first reason that holds, None where a fusion can be made."""
    return next(((reason, "") for reason, holds in checks if holds), None)


def not_fused(kind: str, node: Node, verdict: tuple[FusionReason, str]) -> NotFused:
    """Return the row of a fusion with the call `node` that was not made."""
    return NotFused(kind, node.meta.get(PATH) or module_path(node) or node.name, *verdict)


def is_recorded(node: Node) -> bool:
    """Return whether autograd may record an int8 operator. Unmarked nodes are the user's own calls."""
    return bool(node.meta.get(NEEDS_GRAD, True))


def stretches_of(graph: Graph) -> dict[Node, int]:
    """Return the number of barriers up to each node. Calls may move to another place with the same number."""
    return dict(zip(graph.nodes, itertools.accumulate(map(is_barrier, graph.nodes)), strict=True))


def is_barrier(node: Node) -> bool:
    """Return whether a call must not pass this node: it writes to a tensor, waits, or switches autocast or the like."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True  # A Triton kernel of the user's, or a region with a graph of its own: either may write.
    operators = torch._ops.OpOverload | torch._ops.OpOverloadPacket
    if isinstance(node.target, operators) and str(node.target).startswith("streams."):
        return True  # It waits for another stream, or has another one wait.
    name = getattr(node.target, "__name__", "")
    return bool(written(node)) or name.startswith(("_enter_", "_exit_", "_set_", "_grad_", "_jvp_"))


def stream_of(node: Node) -> int | None:
    """Return which of the user's streams a call runs on, by Dynamo's number; None where none was chosen."""
    number: int | None = (node.meta.get("custom") or {}).get("stream")
    return number
