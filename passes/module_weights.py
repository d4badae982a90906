"""Weights of int8 modules that code reads without calling the module: the operator `int8compile::module_weight`.

Matmuls with such a weight are sites like others. A write to the weight is applied to the module's scales, or refused:
the operator makes a new tensor, so the write would be lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from int8compile import ops
from int8compile.config import Int8Config
from int8compile.errors import Int8WeightError
from int8compile.passes import names
from int8compile.passes.static import WeightView, is_written, may_be_view, meta_tensor, scaling, traced, written


class ModuleWeight(NamedTuple):
    """The weight that an operator `int8compile::module_weight` stands for.

    Attributes:
        qweight: The node of the int8 weight, [..., N, K].
        scale: The node of its scales.
        d: The node of its rotation; None where it is not rotated.
        policy: How the module multiplies with it, see `int8compile.ops.module_weight`.
    """

    qweight: Node
    scale: Node
    d: Node | None
    policy: str

    @property
    def weight_only(self) -> bool:
        """True if activations are not quantized to 8 bits."""
        return self.policy == "weight_only"

    def options(self, config: Int8Config) -> Int8Config:
        """Return the options of the module that holds the weight, which is int8 under any config."""
        given: dict[str, Any] = {"skip_modules": (), "modules": {}, "lm_head": "int8", "min_features": 1}
        given["rotate"] = self.d is not None
        if not self.weight_only:
            outliers, threshold = self.policy.split()
            given |= {"outliers": outliers, "threshold": float(threshold)}
        return dataclasses.replace(config, **given)

    def is_changed(self) -> bool:
        """Return whether the graph changes its integers, its scales or its d."""
        return is_written([node for node in (self.qweight, self.scale, self.d) if node is not None])

    def is_all(self, view: WeightView) -> bool:
        """Return whether a view is the weight as the module holds it."""
        return view.is_all_of(traced(self.qweight))


def is_stored(node: object) -> bool:
    """Return whether a tensor belongs to the model, instead of being an input of the call or computed."""
    if not isinstance(node, Node):
        return False
    return node.op == "get_attr" or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def find_module_weights(graph: Graph) -> Iterator[tuple[Node, ModuleWeight]]:
    """Yield the operators of a graph whose int8 weights belong to the model."""
    for node in graph.find_nodes(op="call_function", target=ops.module_weight.default):
        qweight, scale, d, _, policy = node.args
        if is_stored(qweight) and is_stored(scale) and (d is None or is_stored(d)):
            yield node, ModuleWeight(qweight, scale, d, str(policy))


def apply_writes(module: GraphModule) -> None:
    """Replace in-place multiplications of a module's weight by a number with multiplications of its scales.

    Raises:
        Int8WeightError: The graph writes to the weight in another way.
    """
    weights: dict[tuple[Node, Node], Node] = {}
    for node, held in find_module_weights(module.graph):
        weights.setdefault((held.qweight, held.scale), node)
    for (qweight, scale), node in weights.items():
        while (call := _first_write(module.graph, qweight, scale)) is not None:
            _apply(call, node, qweight, scale)
    for nested in module.modules():
        if isinstance(nested, GraphModule) and nested is not module:
            for node in nested.graph.find_nodes(op="call_function", target=ops.module_weight.default):
                if is_written([node]):
                    raise _refused(node)


def _tensors(graph: Graph, qweight: Node, scale: Node) -> list[Node]:
    """Return the operators of a weight and all views of them, in order."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        is_weight = node.target is ops.module_weight.default and node.args[:2] == (qweight, scale)
        if is_weight or any(may_be_view(node, tensor) for tensor in node.all_input_nodes if tensor in found):
            found[node] = None
    return list(found)


def _first_write(graph: Graph, qweight: Node, scale: Node) -> Node | None:
    tensors = set(_tensors(graph, qweight, scale))
    return next((node for node in graph.nodes if not tensors.isdisjoint(written(node))), None)


def _apply(call: Node, weight: Node, qweight: Node, scale: Node) -> None:
    """Replace a multiplication of the weight by a multiplication of the scales."""
    graph, factor = call.graph, scaling(call)
    target = call.args[0] if factor is not None else None
    # The write must change the whole weight, and each element once.
    entire = isinstance(target, Node) and traced(target).numel() == traced(qweight).numel()
    if factor is None or not entire or 0 in traced(target).stride():  # type: ignore[arg-type]
        raise _refused(weight)
    if qweight.op == "get_attr":
        raise Int8WeightError(
            f"{names.parameter_name(weight)} is multiplied by a number in the forward pass, which a package cannot "
            "keep. Run the model once before it is exported, if it does so at its first call only"
        )
    if torch.is_grad_enabled() and any(_needs_grad(node) for node in graph.find_nodes(op="placeholder")):
        # PyTorch would compute the gradient with the scales as they are after the write.
        raise Int8WeightError(
            f"{names.parameter_name(weight)} is multiplied by a number in a forward pass that records gradients. Call "
            "the model under torch.no_grad() first, if it does so at its first call only"
        )
    before = [tensor for tensor in _tensors(graph, qweight, scale) if tensor < call]
    following = call.next
    with graph.inserting_before(call):
        for tensor, name, *args in ((scale, "mul_", abs(factor)), (qweight, "neg_"))[: 1 + (factor < 0)]:
            graph.call_method(name, (tensor, *args)).meta["example_value"] = traced(tensor)
    # Later nodes read the weight with the new scales.
    anew: dict[Node, Node] = {}

    def again(tensor: Node) -> Node:
        if tensor in before and tensor not in anew:
            made = [again(node) for node in tensor.all_input_nodes]
            with graph.inserting_before(following):
                anew[tensor] = graph.node_copy(tensor, dict(zip(tensor.all_input_nodes, made, strict=True)).__getitem__)
        return anew.get(tensor, tensor)

    assert isinstance(target, Node)
    call.replace_all_uses_with(again(target))
    graph.erase_node(call)
    reads, node = [], following
    while node.op != "root":
        reads += [(node, tensor) for tensor in node.all_input_nodes if tensor in before]
        node = node.next
    for node, tensor in reads:
        if node not in anew.values():
            node.replace_input_with(tensor, again(tensor))
    for tensor in reversed([*before, *anew.values()]):
        if not tensor.users:
            graph.erase_node(tensor)


def _needs_grad(node: Node) -> bool:
    tensor = meta_tensor(node)
    return tensor is not None and tensor.requires_grad


def _refused(weight: Node) -> Int8WeightError:
    return Int8WeightError(
        f"{names.parameter_name(weight)} is written to in the forward pass, but it is int8: all of it can be "
        "multiplied by a number, and nothing else. skip_modules leaves the module in float"
    )
