"""Nodes for the int8 weights of a rewritten graph: new placeholders (Dynamo) or attributes (export)."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from int8compile.passes.static import QUANTIZED, STORED, WeightView


class QuantizedNodes(NamedTuple):
    """The nodes of an int8 weight.

    Attributes:
        qweight: [N, K] or [B, N, K] int8.
        scale: [N] or [B, N] float32.
        d: Its rotation, [K] or [B, K] float32; None where it is not rotated.
    """

    qweight: Node
    scale: Node
    d: Node | None = None


class Member(NamedTuple):
    """A view of a parameter.

    Attributes:
        source: The parameter's node: a placeholder of the graph as captured, or a get_attr.
        view: The weight as a view of the parameter.
        path: Module path of the first site that uses it.
        scale: The node of the scales, where the parameter is int8 already.
        d: The node of that parameter's rotation.
    """

    source: Node
    view: WeightView
    path: str
    scale: Node | None = None
    d: Node | None = None


@dataclasses.dataclass(eq=False)
class Group:
    """Weights of a graph that share one rotation d, because they read one x.

    Attributes:
        node: The node of the d.
        among: The weights that a new d is computed from: the members and the linears beside them.
        each: Whether each matrix of a weight [B, N, K] has a d of its own.
        members: The weights.
    """

    node: Node
    among: list[Member]
    each: bool = False
    members: list[Member] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class WeightSlot:
    """A weight that a rewritten graph takes as an input or attribute.

    Attributes:
        members: The views of parameters that it is made of. Several are concatenated.
        nodes: The nodes of the int8 weight.
        group: The weights that share its rotation; None where it is not rotated.
        packed: Whether `nodes.qweight` is laid out as `int8compile.ops.pack_weight` does.
        interleaved: Whether the rows of its two members alternate, instead of being concatenated.
    """

    members: tuple[Member, ...]
    nodes: QuantizedNodes
    group: Group | None = None
    packed: bool = False
    interleaved: bool = False

    @property
    def sharing(self) -> Group | None:
        """The group whose d it gets; None where it is not rotated, or is int8 already and has a d."""
        return self.group if self.members[0].scale is None else None


class Binder(abc.ABC):
    """Adds nodes to a graph for its int8 weights. The tensors are made elsewhere.

    Attributes:
        slots: The weights that were bound, in order.
    """

    # The names of its nodes begin with this.
    PREFIX = "int8_"

    def __init__(self, module: GraphModule) -> None:
        self.slots: list[WeightSlot] = []
        self._bound: dict[tuple[Node, WeightView], WeightSlot] = {}
        self._groups: dict[Hashable, Group] = {}
        self._among: dict[Hashable, list[Member]] = {}
        self._numbers = itertools.count()
        self._graph = module.graph

    @property
    def groups(self) -> list[Group]:
        """The groups of all slots, each once."""
        return list(dict.fromkeys(slot.group for slot in self.slots if slot.group is not None))

    def bind(
        self, member: Member, group: Hashable = None, x: Node | None = None, *, each: bool = False
    ) -> QuantizedNodes:
        """Make the nodes that hold a weight, once per (source, view).

        Args:
            member: The weight.
            group: Equal for weights that one d is computed from, see `groups`; None for a weight that is not rotated.
            x: The activation. Weights of one group that multiply the same x share their d.
            each: Whether each matrix of a weight [B, N, K] has a d of its own.
        """
        key = (member.source, member.view)
        if key not in self._bound:
            rotated = None if group is None else self._group(member, group, x, each)
            self._bound[key] = self._add((member,), rotated)
        return self._bound[key].nodes

    def _group(self, member: Member, key: Hashable, x: Node | None, each: bool) -> Group:
        among = self._among.setdefault(key, [])
        among.append(member)
        if (key, x) not in self._groups:
            node = self._node(f"{self.PREFIX}{next(self._numbers)}_d")
            node.meta[QUANTIZED] = True
            self._groups[key, x] = Group(node, among, each)
        self._groups[key, x].members.append(member)
        return self._groups[key, x]

    def fuse(self, slots: Sequence[WeightSlot]) -> WeightSlot:
        """Replace slots that nothing reads any more by one slot that holds all of their weights."""
        fused = self.join(slots)
        self.drop(slots)
        return fused

    def join(self, slots: Sequence[WeightSlot], *, interleaved: bool = False) -> WeightSlot:
        """Add a slot that holds the weights of other slots, concatenated or with their rows interleaved."""
        joined = self._add(tuple(member for slot in slots for member in slot.members), slots[0].group)
        joined.interleaved = interleaved
        return joined

    def drop(self, slots: Sequence[WeightSlot]) -> None:
        """Remove slots that nothing reads any more."""
        for slot in slots:
            self.slots.remove(slot)
            for node in slot.nodes[:2]:
                self._graph.erase_node(node)

    def _add(self, members: tuple[Member, ...], group: Group | None) -> WeightSlot:
        stem = f"{self.PREFIX}{next(self._numbers)}"
        qweight, scale = self._node(f"{stem}_qweight"), self._node(f"{stem}_scale")
        for node in (qweight, scale):
            node.meta[QUANTIZED] = True
        self.slots.append(WeightSlot(members, QuantizedNodes(qweight, scale, group.node if group else None), group))
        return self.slots[-1]

    @abc.abstractmethod
    def _node(self, name: str) -> Node:
        """Add a node for a tensor, in front of the nodes that compute."""


def stored_placeholder(graph: Graph, name: str) -> Node:
    """Add a placeholder behind the others of a Dynamo graph, for a tensor of the model."""
    # There is at least the parameter's own placeholder.
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(name)
    node._dynamo_source = None  # AOTAutograd reads this attribute of every placeholder.
    node.meta |= STORED
    return node


class PlaceholderBinder(Binder):
    """Adds placeholders for weights, scales and d to a Dynamo graph; the backend fills them at every call."""

    def _node(self, name: str) -> Node:
        return stored_placeholder(self._graph, name)


class AttributeBinder(Binder):
    """Adds buffers to an exported module. They stay empty until `fill`, which is called after all passes."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._module = module

    def fill(self, make: Callable[[WeightSlot], tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Set the values of the buffers.

        Args:
            make: Returns the int8 weight of a slot (packed if the slot is), its scales and its d.
        """
        for slot in self.slots:
            for node, tensor in zip(slot.nodes, make(slot), strict=True):
                if node is not None:
                    setattr(self._module, str(node.target), tensor)

    def drop(self, slots: Sequence[WeightSlot]) -> None:
        """Remove slots and their buffers."""
        super().drop(slots)
        for slot in slots:
            for node in slot.nodes[:2]:
                delattr(self._module, str(node.target))

    def _node(self, name: str) -> Node:
        self._module.register_buffer(name, torch.empty(0))
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        with self._graph.inserting_before(first):
            return self._graph.get_attr(name)
