"""Where the int8 weights of a rewritten graph come from: new placeholders (Dynamo) or attributes (export)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from int8compile.passes.static import QUANTIZED, WeightView


class QuantizedNodes(NamedTuple):
    """The nodes of a weight in int8.

    Attributes:
        qweight: [N, K] or [B, N, K] int8.
        scale: [N] or [B, N] float32.
    """

    qweight: Node
    scale: Node


class Binder(Protocol):
    """Gives the rewritten graph access to a quantized weight."""

    def bind(self, source: Node, view: WeightView, path: str, scale: Node | None = None) -> QuantizedNodes:
        """Makes the nodes that hold the weight, once per (source, view).

        Args:
            source: The parameter's node.
            view: The weight as a view of the parameter.
            path: Module path of the site, for messages.
            scale: The node of the scales, where the parameter is int8 already.
        """
        ...


class Member(NamedTuple):
    """A view of a parameter.

    Attributes:
        source: Placeholder of the parameter in the graph as captured; its position is the argument's.
        view: The weight as a view of the parameter.
        path: Module path of the first site that uses it.
        scale: Placeholder of the scales, where the parameter is int8 already.
    """

    source: Node
    view: WeightView
    path: str
    scale: Node | None = None


@dataclasses.dataclass(eq=False)
class WeightSlot:
    """One weight that a rewritten Dynamo graph takes.

    Attributes:
        members: What it is made of: one view of a parameter, or several, one behind the other.
        nodes: The placeholders of the int8 weight.
        packed: Whether `nodes.qweight` is laid out as `int8compile.ops.pack_weight` does.
        interleaved: Whether the rows of its two members take turns, instead of lying one behind the other.
    """

    members: tuple[Member, ...]
    nodes: QuantizedNodes
    packed: bool = False
    interleaved: bool = False


class PlaceholderBinder:
    """Adds two placeholders per weight to a Dynamo graph; the backend fills them at every call.

    Attributes:
        slots: What was bound, in order.
    """

    def __init__(self, module: GraphModule) -> None:
        self.slots: list[WeightSlot] = []
        self._bound: dict[tuple[Node, WeightView], WeightSlot] = {}
        self._numbers = itertools.count()
        self._graph = module.graph

    def bind(self, source: Node, view: WeightView, path: str, scale: Node | None = None) -> QuantizedNodes:
        """See `Binder`."""
        key = (source, view)
        if key not in self._bound:
            self._bound[key] = self._add((Member(source, view, path, scale),))
        return self._bound[key].nodes

    def fuse(self, slots: Sequence[WeightSlot]) -> WeightSlot:
        """Replaces slots that nothing reads any more by one that holds all of their weights."""
        fused = self.join(slots)
        self.drop(slots)
        return fused

    def join(self, slots: Sequence[WeightSlot], *, interleaved: bool = False) -> WeightSlot:
        """Adds a slot that holds the weights of others, one behind the other or with their rows in turns."""
        joined = self._add(tuple(member for slot in slots for member in slot.members))
        joined.interleaved = interleaved
        return joined

    def drop(self, slots: Sequence[WeightSlot]) -> None:
        """Removes slots that nothing reads any more."""
        for slot in slots:
            self.slots.remove(slot)
            for node in slot.nodes:
                self._graph.erase_node(node)

    def _add(self, members: tuple[Member, ...]) -> WeightSlot:
        stem = f"int8_{next(self._numbers)}"
        nodes = QuantizedNodes(self._placeholder(f"{stem}_qweight"), self._placeholder(f"{stem}_scale"))
        self.slots.append(WeightSlot(members, nodes))
        return self.slots[-1]

    def _placeholder(self, name: str) -> Node:
        # There is one at least, the parameter's own.
        with self._graph.inserting_after(self._graph.find_nodes(op="placeholder")[-1]):
            node = self._graph.placeholder(name)
        node.meta[QUANTIZED] = True
        # AOTAutograd asks each placeholder for the Dynamo source of its tensor; these have none. "unguarded" marks a
        # tensor whose address does not change between calls, which CUDA graphs need.
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        return node


class AttributeBinder:
    """Stores int8 weights as buffers of an exported module, and reads them with get_attr.

    Attributes:
        bound: What was bound, with the names of the two buffers.
    """

    def __init__(self, module: GraphModule, parameters: dict[Node, Tensor], quantize: Quantize) -> None:
        self.bound: dict[tuple[Node, WeightView], tuple[str, str]] = {}
        self._module = module
        self._parameters = parameters
        self._quantize = quantize

    def bind(self, source: Node, view: WeightView, path: str, scale: Node | None = None) -> QuantizedNodes:
        """See `Binder`."""
        if scale is not None:
            return QuantizedNodes(source, scale)  # It is stored as a buffer of the module already.
        key = (source, view)
        if key not in self.bound:
            stem = f"int8_{len(self.bound)}"
            self.bound[key] = (f"{stem}_qweight", f"{stem}_scale")
            for name, tensor in zip(self.bound[key], self._quantize(self._parameters[source], view, path), strict=True):
                self._module.register_buffer(name, tensor)
        graph = self._module.graph
        return QuantizedNodes(*map(graph.get_attr, self.bound[key]))


class Quantize(Protocol):
    """Quantizes a parameter's view; the weight store does."""

    def __call__(self, parameter: Tensor, view: WeightView, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns int8 values and float32 scales."""
        ...
