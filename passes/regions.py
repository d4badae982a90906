"""Modes at a place in a Dynamo graph: grad mode, and the transforms of torch.func."""

from __future__ import annotations

import torch
from torch.fx import Node


class Region:
    """The modes at the current node of a walk through a graph in order.

    Attributes:
        grad_mode: Whether gradients are recorded.
        transforms: How many of torch.func's grad and jvp are open.
    """

    def __init__(self) -> None:
        self.grad_mode = torch.is_grad_enabled()
        self.transforms = 0
        self._outside: list[bool] = []

    def pass_by(self, node: Node) -> None:
        """Update the modes by a node that may switch one."""
        if node.op != "call_function":
            return
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            self.grad_mode = bool(node.args[0])
        elif name == "_enter_inference_mode":
            self._outside.append(self.grad_mode)
            self.grad_mode = self.grad_mode and not node.args[0]
        elif name == "_exit_inference_mode":
            self.grad_mode = self._outside.pop()
        elif name in ("_grad_increment_nesting", "_jvp_increment_nesting"):
            self.transforms += 1
        elif name in ("_grad_decrement_nesting", "_jvp_decrement_nesting"):
            self.transforms -= 1
