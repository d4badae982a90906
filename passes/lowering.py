"""The order of the lowering passes, the same for graphs that are compiled and graphs that are exported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

from torch import Tensor
from torch.fx import GraphModule, Node

from int8compile.ops import dequantize_weight
from int8compile.passes.binding import Binder
from int8compile.passes.lower_cpu import lower_for_cpu
from int8compile.passes.lower_gpu import lower_for_gpu
from int8compile.passes.lower_portable import inline_columns, lower_to_pytorch
from int8compile.passes.module_weights import find_module_weights
from int8compile.report import Report

# The kernels that a graph is lowered to: the C++ kernels, the Triton kernels, or operators of PyTorch alone.
Target: TypeAlias = Literal["cpu", "cuda", "portable"]


def lower(
    module: GraphModule,
    targets: Collection[Target],
    binder: Binder,
    parameters: Mapping[Node, Tensor],
    report: Report,
    *,
    packaged: bool = False,
) -> None:
    """Lower a rewritten graph to kernels, in place.

    Args:
        module: A rewritten graph.
        targets: The kinds of kernels to use. Each takes the operators whose weights are on its device.
        binder: The binder of its int8 weights.
        parameters: The graph's parameters by their nodes.
        report: Gets the fusions that were made and those that were not.
        packaged: Whether the graph goes into a package, which has kernels for one device and for few operators.
    """
    if packaged:
        # Functions that a compiler traces through, in place of operators that a package does not have.
        for node, _ in find_module_weights(module.graph):
            node.target, node.args = dequantize_weight, node.args[:4]
        inline_columns(module)
    if "portable" in targets:
        lower_to_pytorch(module)
    if "cpu" in targets:
        report.unfused += lower_for_cpu(module, binder, parameters)
    if "cuda" in targets:
        # The kernels of a package are compiled for a GPU that need not be here.
        lowered = lower_for_gpu(module, binder, parameters, (lambda device: True) if packaged else None)
        report.fused_norms += lowered.norms
        report.unfused += lowered.unfused
    module.graph.lint()
