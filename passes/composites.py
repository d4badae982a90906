"""Opens operators that hide linears, so that the other passes see them.

Dynamo keeps `F.multi_head_attention_forward` (all of `nn.MultiheadAttention`) as one call. It is traced into ATen
operators and those are put in its place.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger(__name__)

COMPOSITES = (torch.nn.functional.multi_head_attention_forward,)


def open_composites(module: GraphModule) -> None:
    """Replaces each composite call of a Dynamo graph by the operators it is made of."""
    for target in COMPOSITES:
        for node in module.graph.find_nodes(op="call_function", target=target):
            _open(module, node)


def _open(module: GraphModule, node: Node) -> None:
    # Each distinct node becomes one input: the composite tests whether query, key and value are the same tensor.
    inputs = list(dict.fromkeys(node.all_input_nodes))
    values = [arg.meta.get("example_value") for arg in inputs]
    if any(value is None for value in values):
        return

    def call(*tensors: Any) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        # In the mode of the inputs, so that what the composite makes anew (a row of zeros) is fake too.
        with next((value.fake_mode for value in values if isinstance(value, FakeTensor)), contextlib.nullcontext()):
            traced = make_fx(call, pre_dispatch=True)(*values)
    except Exception as error:
        # The composite stays as it is, and the report names its linears as out of reach.
        log.warning("%s cannot be opened: %s: %s", node.target.__name__, type(error).__name__, error)  # type: ignore[union-attr]
        return
    if any(traced.graph.find_nodes(op="get_attr")):
        return
    own = traced.graph.find_nodes(op="placeholder")
    replaced: dict[Node, Any] = dict(zip(own, inputs, strict=True))
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copied = module.graph.node_copy(inner, lambda arg: replaced[arg])
                copied.meta = {
                    "example_value": inner.meta.get("val"),
                    **{key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta},
                }
                replaced[inner] = copied
    (results,) = traced.graph.output_node().args
    for user in list(node.users):
        # The composite returns (output, attention weights): its users are getitems.
        result = cast(tuple[Node | None, ...], results)[cast(int, user.args[1])]
        if result is not None:
            user.replace_all_uses_with(replaced[result])
            module.graph.erase_node(user)
    if not node.users:
        module.graph.erase_node(node)
