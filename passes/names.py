"""Module paths and source lines of graph nodes, as users know them."""

from __future__ import annotations

import os
import re
from typing import Any, cast

import torch
from torch.fx import Node

from int8compile import errors, ops

# Frames of these folders are not the user's code.
_PYTORCHS, _OURS = (os.path.dirname(module.__file__ or "") + os.sep for module in (torch, errors))
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
_ROOT = re.compile(r"^(?:[LG]\['[^']*'\])?\.?")
_CONTAINER = re.compile(r"\.?_(?:modules|parameters|buffers|orig_mod|closure)\b|__closure__\[\d+\]\.cell_contents\.?")
_KEY = re.compile(r"\[['\"]?([^'\"\]]*)['\"]?\]")


def clean_path(source: str) -> str:
    """Return Dynamo's name of a module or tensor as a dotted path.

    `L['self']._modules['layers']._modules['0'].mlp` is `layers.0.mlp`.
    """
    path = _CONTAINER.sub("", _ROOT.sub("", source))
    path = _KEY.sub(r".\1", path)
    return re.sub(r"\.+", ".", path).strip(".")


def parameter_name(source: Node) -> str:
    """Return the qualified name of a parameter's node, e.g. `layers.0.mlp.up_proj.weight`."""
    if source.op == "get_attr":
        return str(source.target)
    if source.target is ops.module_weight.default:
        return parameter_name(cast(Node, source.args[0])).removesuffix("qweight") + "weight"
    grapharg = source.meta.get("grapharg")
    name = getattr(getattr(grapharg, "source", None), "name", source.name)
    return clean_path(name() if callable(name) else name)


def module_path(node: Node, parameter: str | None = None) -> str:
    """Return the path of the module that a call belongs to.

    Args:
        node: The call.
        parameter: Qualified name of its weight, where there is one. It distinguishes several weights of one module.

    Returns:
        `layers.0.up_proj` for a call of `nn.Linear`, `experts.down_proj` for one that uses the parameter of that name.
    """
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    module = clean_path(list(stack.values())[-1][0]) if stack else ""
    if parameter is None:
        return module
    if module and not parameter.startswith(f"{module}."):
        return module  # A shared weight is named by the call's module, not by the weight's first owner.
    return parameter.removesuffix(".weight")


def source_line(node: Node) -> str:
    """Return the place of a call in the user's code, as `file.py:line`; "" where the graph has no stack trace.

    It is the innermost frame outside int8compile, and outside PyTorch if there is one.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    others = [frame for frame in frames if not frame[0].startswith(_OURS)]
    own = [frame for frame in others if not frame[0].startswith(_PYTORCHS)]
    file, line = (own or others or [("", "")])[-1]
    return f"{os.path.basename(file)}:{line}" if file else ""
