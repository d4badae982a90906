"""Replaces operators that have no kernel by functions in PyTorch, which a compiler traces through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from int8compile import ops
from int8compile.ops import SUPPORTED_DTYPES, column
from int8compile.passes.rewrite import NEEDS_GRAD


def inline_column(module: GraphModule, *, gradients: bool = True) -> None:
    """Replace `column_linear`, for which there is no kernel, by its definition, in place.

    Args:
        module: A rewritten graph.
        gradients: Whether gradients may be asked of the graph. Calls that need them keep the operator, which has a
            formula for them: the definition rounds, so its derivative is not the one of the product.
    """
    for node in module.graph.find_nodes(op="call_function", target=ops.column_linear.default):
        # The user has made the calls that are not marked, with a weight that is no site's.
        if not gradients or not node.meta.get(NEEDS_GRAD, True):
            node.target = _column_linear


def without_autocast(compute: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Return a function that does under autocast what an operator does: x is cast, all else computes as written.

    Args:
        compute: A function.
        position: That of x among its arguments.
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


_column_linear = without_autocast(column.column_linear, 0)
