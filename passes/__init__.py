"""Passes over FX graphs: find the linears of a graph and rewrite them to `int8compile` operators.

Read `pipeline.py` first. The same passes serve Dynamo graphs (torch.compile) and ATen graphs (torch.export).
"""

if __name__ != "int8compile.passes":
    raise ImportError(f"this package is int8compile.passes; import it by that name, not as {__name__!r}")

from int8compile.passes.binding import AttributeBinder, Binder, PlaceholderBinder
from int8compile.passes.lower_cpu import lower_for_cpu
from int8compile.passes.lower_gpu import lower_for_gpu
from int8compile.passes.lowering import Target, lower
from int8compile.passes.pipeline import int8_tensors, may_multiply, rewrite_graph
from int8compile.passes.rules import RULES, finite
from int8compile.passes.static import WeightView

__all__ = [
    "RULES",
    "AttributeBinder",
    "Binder",
    "PlaceholderBinder",
    "Target",
    "WeightView",
    "finite",
    "int8_tensors",
    "lower",
    "lower_for_cpu",
    "lower_for_gpu",
    "may_multiply",
    "rewrite_graph",
]
