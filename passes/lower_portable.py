"""Lowers a rewritten graph to operators of PyTorch alone: what is exported then runs on any device.

Each activation is quantized once for all linears that read it.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from int8compile import ops
from int8compile.ops import portable, reference


def lower_portable(module: GraphModule) -> None:
    """Replaces the int8 operators by functions that a compiler traces through, in place.

    Args:
        module: A rewritten graph. `grouped_linear`, which depends on values, stays.
    """
    quantized: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is ops.linear.default:
            x, qweight, scale, bias, threshold, outliers = node.args
            key = (x, threshold, outliers)
            if key not in quantized:
                with graph.inserting_before(node):
                    call = graph.call_function(portable.quantize_rows, key)
                    planes, rows = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
                quantized[key] = planes, rows
            node.target = portable.quantized_linear
            node.args = (*quantized[key], qweight, scale, bias, x)
        elif node.target is ops.batched_linear.default:
            node.target = portable.batched_linear
        elif node.target is ops.weight_only_linear.default:
            node.target = reference.weight_only_linear
