"""Lower a rewritten graph to operators of PyTorch alone, so that its export runs on any device.

Each activation is quantized once for all linears that read it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from int8compile import ops
from int8compile.ops import SUPPORTED_DTYPES, portable, quantized
from int8compile.ops.column import column_linear
from int8compile.passes.siblings import is_barrier


def lower_to_pytorch(module: GraphModule) -> None:
    """Replace the int8 operators by functions that a compiler traces through, in place.

    Args:
        module: A rewritten graph. Its calls of `grouped_linear` stay, because that depends on values.
    """
    activations: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    graph = module.graph
    for node in list(graph.nodes):
        if is_barrier(node):
            activations.clear()
        if node.target is ops.linear.default:
            x, qweight, scale, d, bias, threshold = node.args
            key = (x, d, threshold)
            if key not in activations:
                with graph.inserting_before(node):
                    call = graph.call_function(_quantized, key)
                    q, rows = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
                activations[key] = q, rows
            node.target = _quantized_linear
            node.args = (*activations[key], qweight, scale, bias, x)
        elif node.target is ops.batched_linear.default:
            node.target = _batched_linear
        elif node.target is ops.weight_only_linear.default:
            node.target = _weight_only_linear


def inline_columns(module: GraphModule) -> None:
    """Replace `column_linear`, for which a package has no kernel, by its definition, in place."""
    for node in module.graph.find_nodes(op="call_function", target=ops.column_linear.default):
        node.target = _column_linear


def _without_autocast(compute: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Return a function that treats autocast as the operators do: it casts x and computes without autocast.

    Args:
        compute: A function.
        position: The position of x among its arguments.
    """

    @functools.wraps(compute)
    def call(*args: Any) -> Any:
        given = list(args)
        device = given[position].device.type
        if not torch.is_autocast_enabled(device):
            return compute(*given)
        if given[position].dtype in SUPPORTED_DTYPES:
            given[position] = given[position].to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return compute(*given)

    return call


_quantized = _without_autocast(quantized.row_digits, 0)
_quantized_linear = _without_autocast(portable.quantized_linear, -1)
_batched_linear = _without_autocast(portable.batched_linear, 0)
_weight_only_linear = _without_autocast(portable.weight_only_linear, 0)
_column_linear = _without_autocast(column_linear, 0)
