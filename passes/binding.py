"""Where the int8 weights of a rewritten graph come from: new placeholders (Dynamo) or attributes (export)."""

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
    """The nodes of a weight in int8.

    Attributes:
        qweight: [N, K] or [B, N, K] int8.
        scale: [N] or [B, N] float32.
        d: What it is rotated with, [K] or [B, K] float32; None where it is not.
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
        d: The node of what that parameter is rotated with.
    """

    source: Node
    view: WeightView
    path: str
    scale: Node | None = None
    d: Node | None = None


@dataclasses.dataclass(eq=False)
class Group:
    """Weights of a graph that are rotated by one d, because they read one x.

    Attributes:
        node: The node of the d.
        among: The weights that a d is made of where they have none yet: these and those that stand beside them.
        each: Whether each matrix of a weight [B, N, K] has its own.
        members: The weights.
    """

    node: Node
    among: list[Member]
    each: bool = False
    members: list[Member] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class WeightSlot:
    """One weight that a rewritten graph takes.

    Attributes:
        members: What it is made of: one view of a parameter, or several, one behind the other.
        nodes: The nodes of the int8 weight.
        group: What is rotated alike; None where it is not rotated.
        packed: Whether `nodes.qweight` is laid out as `int8compile.ops.pack_weight` does.
        interleaved: Whether the rows of its two members take turns, instead of lying one behind the other.
    """

    members: tuple[Member, ...]
    nodes: QuantizedNodes
    group: Group | None = None
    packed: bool = False
    interleaved: bool = False

    @property
    def sharing(self) -> Group | None:
        """The group whose d it is to get; None where it is not rotated, or is int8 already and has its d."""
        return self.group if self.members[0].scale is None else None


class Binder(abc.ABC):
    """Gives a graph nodes for its int8 weights, which are made elsewhere.

    Attributes:
        slots: What was bound, in order.
    """

    # Of the names of its nodes.
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
            group: Equal for weights that one d is made of, see `groups`; None for one that is not rotated.
            x: What it multiplies; those that read one have one d in any case.
            each: Whether each matrix of a weight [B, N, K] has its own.
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
        """Replaces slots that nothing reads any more by one that holds all of their weights."""
        fused = self.join(slots)
        self.drop(slots)
        return fused

    def join(self, slots: Sequence[WeightSlot], *, interleaved: bool = False) -> WeightSlot:
        """Adds a slot that holds the weights of others, one behind the other or with their rows in turns."""
        joined = self._add(tuple(member for slot in slots for member in slot.members), slots[0].group)
        joined.interleaved = interleaved
        return joined

    def drop(self, slots: Sequence[WeightSlot]) -> None:
        """Removes slots that nothing reads any more."""
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
        """Makes a node for a tensor, before all that computes."""


def stored_placeholder(graph: Graph, name: str) -> Node:
    """Add a placeholder behind the others of a Dynamo graph, for a tensor of the model."""
    # There is one at least, the parameter's own.
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(name)
    node._dynamo_source = None  # AOTAutograd asks each placeholder for it; this one has none.
    node.meta |= STORED
    return node


class PlaceholderBinder(Binder):
    """Adds placeholders for weights, scales and d to a Dynamo graph; the backend fills them at every call."""

    def _node(self, name: str) -> Node:
        return stored_placeholder(self._graph, name)


class AttributeBinder(Binder):
    """Reads buffers in an exported graph; they are empty until `fill`, when all passes have run."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._module = module

    def fill(self, make: Callable[[WeightSlot], tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Gives the buffers their values.

        Args:
            make: Makes what a slot holds, in int8 (packed if the slot is), its scales and its d.
        """
        for slot in self.slots:
            for node, tensor in zip(slot.nodes, make(slot), strict=True):
                if node is not None:
                    setattr(self._module, str(node.target), tensor)

    def drop(self, slots: Sequence[WeightSlot]) -> None:
        """See `Binder`."""
        super().drop(slots)
        for slot in slots:
            for node in slot.nodes[:2]:
                delattr(self._module, str(node.target))

    def _node(self, name: str) -> Node:
        self._module.register_buffer(name, torch.empty(0))
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        with self._graph.inserting_before(first):
            return self._graph.get_attr(name)
