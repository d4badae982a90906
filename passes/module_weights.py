"""Weights of int8 modules that code reads instead of calling the module: the operator `int8compile::module_weight`.

Matmuls with one are sites like others. What writes to one is applied to the module's scales, or refused: the operator
makes a new tensor, so a write to it would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch.fx import Graph, GraphModule, Node

from int8compile import ops
from int8compile.errors import Int8WeightError
from int8compile.passes import names
from int8compile.passes.static import ALIASES, WeightView, is_written, scaling, traced, written


class ModuleWeight(NamedTuple):
    """What an operator stands for.

    Attributes:
        qweight: The node of the int8 weight, [..., N, K].
        scale: The node of its scales.
        threshold: How the module multiplies with it, see `Int8Config`.
        outliers: See `Int8Config`.
        weight_only: Whether activations stay in float.
    """

    qweight: Node
    scale: Node
    threshold: float
    outliers: Literal["row", "column"]
    weight_only: bool

    def is_all(self, view: WeightView) -> bool:
        """Whether a view is the weight as the module holds it."""
        return view.is_all_of(traced(self.qweight))


def is_stored(node: object) -> bool:
    """Whether a tensor is the model's; others are inputs of the call, or computed."""
    if not isinstance(node, Node):
        return False
    return node.op == "get_attr" or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


# The meta of a placeholder that is the model's, as Dynamo writes it: its address does not change.
STORED = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


def module_weights(graph: Graph) -> Iterator[tuple[Node, ModuleWeight]]:
    """The operators of a graph whose int8 weights are stored."""
    for node in graph.find_nodes(op="call_function", target=ops.module_weight.default):
        qweight, scale, _, *options = node.args
        if is_stored(qweight) and is_stored(scale):
            yield node, ModuleWeight(qweight, scale, *options)


def apply_writes(module: GraphModule) -> None:
    """Has a multiplication of a module's weight by a number, in place, multiply the module's scales.

    Raises:
        Int8WeightError: The graph writes something else to it.
    """
    for node, held in list(module_weights(module.graph)):
        _apply_writes(module.graph, node, held)


def _apply_writes(graph: Graph, node: Node, held: ModuleWeight) -> None:
    for call in _writers(node):
        factor = scaling(call)
        if factor is None or traced(node).shape != traced(call).shape:
            break
        with graph.inserting_before(call):
            scaled = [graph.call_method("mul_", (held.scale, abs(factor)))]
            if factor < 0:
                scaled.append(graph.call_method("neg_", (held.qweight,)))
        for made, source in zip(scaled, (held.scale, held.qweight), strict=False):
            made.meta["example_value"] = traced(source)
        with graph.inserting_after(call):
            again = graph.node_copy(node)
        # What reads it from here on reads the product.
        named = (node, *_names(node))
        for name in named:
            name.replace_all_uses_with(again, lambda user: again < user)  # noqa: B023  called at once
        call.replace_all_uses_with(again)
        for name in (call, *reversed(named)):
            if not name.users:
                graph.erase_node(name)
        return _apply_writes(graph, again, held)
    if is_written([node]):
        raise Int8WeightError(
            f"{names.parameter_name(node)} is written to in the forward pass, but it is int8: all of it can be "
            "multiplied by a number, and nothing else. skip_modules leaves the module in float"
        )
    return None


def _writers(node: Node) -> list[Node]:
    """The calls that write to a tensor, in order."""
    named = (node, *_names(node))
    return [user for user in node.graph.nodes if any(name in written(user) for name in named)]


def _names(node: Node) -> list[Node]:
    """Other names of the same tensor: `weight.data`, `weight.detach()`."""
    found: list[Node] = []
    pending = [node]
    while pending:
        current = pending.pop()
        same = [user for user in current.users if user.target in ALIASES and user.args[0] is current]
        found += same
        pending += same
    return found
