"""A linear in a graph, which the rules judge and `rewrite.emit` replaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from int8compile import hardware
from int8compile.config import Int8Config, matches
from int8compile.passes.contraction import Contraction, Labels, Roles, merged_size, permutation
from int8compile.passes.module_weights import ModuleWeight
from int8compile.passes.static import StaticWeight, WeightView, traced, weight_view
from int8compile.sites import SkipReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSite:
    """A matmul of an activation with an operand in the role of a weight. It is a `rules.Candidate`.

    Attributes:
        node: The call in the graph.
        path: Module path.
        contraction: How the call is written.
        position: Position of the activation among the contraction's operands.
        roles: The role of each label; None where the call is not a plain matmul.
        static: The parameter behind the weight; None where the weight is no view of one.
        parameter: That parameter itself.
        held: The operator that stands for the weight, where an int8 module holds it.
        problem: Why there is no static weight, where there is none.
        constant: Whether both factors are parameters, as in a merge of LoRA weights.
        sharing: The inputs and attributes of the graph that share the parameter's memory, the parameter among them.
        tied: Whether an embedding of the graph reads the parameter too.
        grad_mode: Whether gradients are recorded where the call stands.
        transformed: Whether torch.func differentiates the call inside the graph.
    """

    node: Node
    path: str
    contraction: Contraction
    position: int
    roles: Roles | None
    static: StaticWeight | None
    parameter: Tensor | None
    held: ModuleWeight | None
    problem: SkipReason | None
    constant: bool
    sharing: Sequence[Node]
    tied: bool
    grad_mode: bool
    transformed: bool

    @property
    def x(self) -> Node:
        """The activation."""
        return self.contraction.operands[self.position]

    @property
    def x_labels(self) -> Labels:
        """A label for each of the activation's dimensions."""
        return self.contraction.labels[self.position]

    @property
    def weight(self) -> Node:
        """The weight operand."""
        return self.contraction.operands[1 - self.position]

    @property
    def weight_labels(self) -> Labels:
        """A label for each of the weight's dimensions."""
        return self.contraction.labels[1 - self.position]

    @property
    def is_lm_head(self) -> bool:
        """True for the model's output projection, recognized by its name or by sharing its weight with an embedding."""
        return self.tied or matches("lm_head", self.path)

    @property
    def subclass(self) -> str:
        """The name of the weight's class where it changes the meaning of the data, otherwise ""."""
        # Transformers and FreedWeight subclass Parameter in Python; only __torch_dispatch__ changes the data.
        dispatch = getattr(type(self.parameter), "__torch_dispatch__", None)
        changed = dispatch is not None and dispatch is not torch.Tensor.__torch_dispatch__
        return type(self.parameter).__name__ if changed and self.held is None else ""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the activation and of the weight."""
        assert self.parameter is not None
        return traced(self.x).dtype, self.parameter.dtype

    @property
    def batched(self) -> bool:
        """True if the call multiplies by several matrices."""
        return self.roles is not None and bool(self.roles.batch)

    @property
    def features(self) -> tuple[int, int]:
        """K and N."""
        assert self.roles is not None
        sizes = self.sizes()
        return merged_size(sizes, self.roles.summed), merged_size(sizes, self.roles.outputs)

    def weight_only(self, config: Int8Config) -> bool:
        """Return whether only the weight becomes int8 and activations keep 23 bits.

        Either the configuration asks for that, or the GPU supports nothing else.
        """
        if self.held.weight_only if self.held else config.lm_head == "int8_weight" and self.is_lm_head:
            return True
        if self.parameter is None or self.roles is None or self.batched:
            return False
        return _on_gpu_without_int8(self.parameter)

    def view(self) -> WeightView:
        """Return the weight as the operators take it: [N, K], or [B, N, K] where there are batch dimensions."""
        assert self.roles is not None
        assert self.static is not None
        batch, summed, _, outputs = self.roles
        sizes = self.sizes()
        shape = (merged_size(sizes, outputs), merged_size(sizes, summed))
        order = permutation(self.weight_labels, (*batch, *outputs, *summed, *self.contraction.ones))
        return weight_view(self.static.tensor, order, (merged_size(sizes, batch), *shape) if batch else shape)

    def sizes(self) -> dict[str, Any]:
        """Return the size of each label; symbolic where it changes from call to call."""
        sizes: dict[str, Any] = {}
        # The weight last: its sizes are numbers where the activation's may be symbols for the same.
        for operand, labels in ((self.x, self.x_labels), (self.weight, self.weight_labels)):
            for label, size in zip(labels, traced(operand).shape, strict=True):
                if label not in sizes or not (isinstance(size, int) and size == 1):  # A 1 may be broadcast.
                    sizes[label] = size
        return sizes


def _on_gpu_without_int8(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda" and hardware.weight_only(hardware.of(parameter.device).isa)
