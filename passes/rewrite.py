"""Emit the int8 operator for a site, with the permutations around it that the site's spelling needs."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from int8compile import ops
from int8compile.config import Int8Config
from int8compile.groups import group_of, reads_tokens
from int8compile.ops import rotation_size
from int8compile.passes import names
from int8compile.passes.binding import Binder, Member, QuantizedNodes
from int8compile.passes.contraction import Labels, permutation
from int8compile.passes.linear_site import LinearSite
from int8compile.passes.rules import rotation_of
from int8compile.passes.static import WeightView, is_view, rotation_in_view, traced


class Emitted(NamedTuple):
    """The weight of an operator that has replaced a call.

    Attributes:
        view: The view of the parameter that is quantized.
        d: The node of its rotation; None where it is not rotated.
    """

    view: WeightView
    d: Node | None


def emit(graph: Graph, site: LinearSite, config: Int8Config, binder: Binder) -> Emitted:
    """Replace the call of a site on which no rule had a verdict."""
    view = site.view()
    with graph.inserting_before(site.node):
        emitter = _Emitter(graph)
        weight = _weight(site, view, config, binder)
        result = _product(emitter, site, view, config, weight)
        call = site.contraction
        if call.alpha != 1:
            result = emitter.function(torch.mul, result, call.alpha)
        if call.addend is not None and not fuses_bias(site) and call.beta != 0:
            addend = call.addend if call.beta == 1 else emitter.function(torch.mul, call.addend, call.beta)
            # Under autocast the dtypes of product and addend differ.
            result = emitter.function(torch.add, result, emitter.method("type_as", addend, result))
        result = _restride(emitter, site, result)
    for node in emitter.nodes:
        node.meta.update({key: site.node.meta[key] for key in _KEPT_META if key in site.node.meta})
    result.meta.update({key: site.node.meta[key] for key in ("example_value", "val") if key in site.node.meta})
    site.node.replace_all_uses_with(result)
    graph.erase_node(site.node)
    assert site.static is not None
    _erase_unread_views(graph, site.static.chain)
    return Emitted(view, weight.d)


def _erase_unread_views(graph: Graph, chain: Sequence[Node]) -> None:
    """Erase views of a weight that nothing reads any more; they would keep the float weight an input."""
    for node in reversed(chain):
        for user in list(node.users):
            # Exported graphs read all parts of a split, and assert the metadata of a weight before a cast.
            unread = is_view(user) and not user.users
            if unread or user.target is torch.ops.aten._assert_tensor_metadata.default:
                graph.erase_node(user)
        if not node.users and node.op in ("call_function", "call_method"):
            graph.erase_node(node)


# Keys in the meta of an operator's node: whether autograd records it, and the path of its site.
NEEDS_GRAD = "int8compile_needs_grad"
PATH = "int8compile_path"

# Meta that is copied from the call. "custom" says which of the user's streams it runs on.
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


class _Emitter:
    """Appends nodes at a graph's insertion point and remembers them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []

    def method(self, name: str, *args: Any) -> Node:
        """Append `args[0].name(*args[1:])`."""
        self.nodes.append(self.graph.call_method(name, args))
        return self.nodes[-1]

    def function(self, target: Any, *args: Any) -> Node:
        """Append `target(*args)`."""
        self.nodes.append(self.graph.call_function(target, args))
        return self.nodes[-1]

    def permute(self, node: Node, source: Labels, target: Labels) -> Node:
        """Append the `permute` that brings dimensions labelled `source` into the order `target`, if they differ."""
        return node if source == target else self.method("permute", node, permutation(source, target))


def _product(emitter: _Emitter, site: LinearSite, view: WeightView, config: Int8Config, weight: QuantizedNodes) -> Node:
    """Append `x @ W` (with the bias where it is fused) in the layout that the call returned."""
    assert site.roles is not None
    assert site.static is not None
    batch, summed, rows, outputs = site.roles
    sizes = site.sizes()

    x = site.x
    if site.contraction.steps:
        steps = dict(site.contraction.steps)
        slices = tuple(slice(None, None, steps.get(label)) for label in site.x_labels)
        x = emitter.function(operator.getitem, x, slices)
    x = emitter.permute(x, site.x_labels, (*batch, *rows, *summed))
    # The batched operator takes exactly [B, M, K]; the other any number of rows dimensions.
    reshape = bool(batch) and (len(batch), len(rows)) != (1, 1)
    row_sizes: list[Node] = []
    if reshape:
        # The sizes of rows may change from call to call, so they are read from the tensor.
        row_sizes = [emitter.method("size", x, len(batch) + i) for i in range(len(rows))]
        x = emitter.method("reshape", x, (view.shape[0], -1, view.shape[-1]))
    elif len(summed) > 1:
        x = emitter.method("flatten", x, len(batch) + len(rows))

    bias = site.contraction.addend if fuses_bias(site) else None
    if bias is not None and batch:
        bias = emitter.method("reshape", bias, view.shape[:2])
    threshold = config.threshold_of(rotated=weight.d is not None)
    if site.weight_only(config):
        y = emitter.function(ops.weight_only_linear.default, x, *weight, bias)
    elif config.outliers == "column":
        y = emitter.function(ops.column_linear.default, x, weight.qweight, weight.scale, bias, threshold)
    else:
        op = ops.batched_linear.default if batch else ops.linear.default
        y = emitter.function(op, x, *weight, bias, threshold)
    y.meta |= {NEEDS_GRAD: traced(site.node).requires_grad, PATH: site.path}
    _trace(site, x, y, view)

    output_sizes = [int(sizes[label]) for label in outputs]
    if reshape:
        y = emitter.method("reshape", y, (*(int(sizes[label]) for label in batch), *row_sizes, *output_sizes))
    elif len(outputs) > 1:
        y = emitter.method("unflatten", y, -1, output_sizes)
    elif not outputs:
        y = emitter.method("squeeze", y, -1)
    return emitter.permute(y, (*batch, *rows, *outputs), site.contraction.out)


def _weight(site: LinearSite, view: WeightView, config: Int8Config, binder: Binder) -> QuantizedNodes:
    """Return the nodes of the int8 weight; they are a module's where its weight can be used as it is."""
    assert site.static is not None
    if site.held is None:
        rotated = rotation_of(view.shape[-1], config, tied=site.tied) > 1
        alone = len(view.shape) == 3
        each = alone and not reads_tokens(site.path)
        # The path of a bare parameter is the parameter's name.
        own = alone or names.parameter_name(site.static.source) != f"{site.path}.weight"
        # Parts of one matrix, as for q, k and v, may read one x. Several matrices belong to layers or experts.
        several = alone or (own and traced(site.static.source).dim() > 2)
        key = (group_of(site.path, own=own), view if several else view.shape[-1]) if rotated else None
        return binder.bind(Member(site.static.source, view, site.path), key, site.x, each=each)
    qweight, scale, d, _ = site.held
    if site.held.is_all(view) and (not config.free_weights or site.held.is_changed()):
        return QuantizedNodes(qweight, scale, d)
    same, matrix = rotation_in_view(traced(qweight), None if d is None else traced(d), view)
    member = Member(qweight, view, site.path, scale, d)
    if same and matrix is None:
        return binder.bind(member)._replace(d=d)
    rotated = same or rotation_size(view.shape[-1]) > 1
    return binder.bind(member, (qweight, view) if rotated else None)


def _trace(site: LinearSite, x: Node, y: Node, view: WeightView) -> None:
    """Set the sizes and dtypes of the operator and its activation, which lowering reads."""
    assert site.roles is not None
    given = traced(site.x)
    steps = dict(site.contraction.steps)
    sizes = {label: -(-size // steps.get(label, 1)) for label, size in zip(site.x_labels, given.shape, strict=True)}
    leading = [sizes[label] for label in site.roles.rows]
    if site.roles.batch:
        leading = [view.shape[0], math.prod(leading)]
    if x is not site.x:
        x.meta["val"] = given.new_empty([*leading, view.shape[-1]])
    y.meta["val"] = given.new_empty([*leading, view.shape[-2]], dtype=traced(site.node).dtype)


def _restride(emitter: _Emitter, site: LinearSite, result: Node) -> Node:
    """Append the steps that give a result the memory layout of the call's, on which later views may rely."""
    assert site.roles is not None
    out = site.contraction.out
    made = [out.index(label) for label in (*site.roles.batch, *site.roles.rows, *site.roles.outputs)]
    expected = traced(site.node)
    # Hints are compared, because comparing symbols would add guards on their order.
    strides = [_hint(stride) for stride in expected.stride()]
    wanted = list(range(len(out)))
    if None not in strides:
        wanted.sort(key=lambda dim: -strides[dim])  # type: ignore[operator]
    # The place of a dimension of size 1 does not matter.
    matters = [_hint(size) != 1 for size in expected.shape]
    if [dim for dim in made if matters[dim]] == [dim for dim in wanted if matters[dim]]:
        return result
    ordered = emitter.method("contiguous", emitter.method("permute", result, wanted))
    return emitter.method("permute", ordered, [wanted.index(dim) for dim in range(len(out))])


def _hint(size: Any) -> int | None:
    """Return the number that a symbol was traced with; None for a symbol that depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else None


def fuses_bias(site: LinearSite) -> bool:
    """Return whether the addend is one number per output, which the operator adds in float32 before it rounds."""
    call = site.contraction
    if call.addend is None or site.roles is None or (call.alpha, call.beta) != (1, 1):
        return False
    addend = traced(call.addend)
    if not addend.is_floating_point() or site.roles.outputs != (call.addend_label,):
        return False
    per_output = [int(site.sizes()[label]) for label in site.roles.outputs]
    if not site.roles.batch:
        return list(addend.shape) == per_output
    per_batch = [int(site.sizes()[label]) for label in site.roles.batch]
    return list(addend.shape) == [*per_batch, 1, *per_output]
