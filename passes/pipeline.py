"""Find the linears of a graph, judge each by the rules, and rewrite those that become int8."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from int8compile import ops
from int8compile.config import Int8Config
from int8compile.ops import rotation_size
from int8compile.passes import names, vocabulary
from int8compile.passes.binding import Binder, Member
from int8compile.passes.composites import COMPOSITES, open_composites, open_regions
from int8compile.passes.contraction import Contraction, Labels, roles
from int8compile.passes.linear_site import LinearSite
from int8compile.passes.module_weights import ModuleWeight, apply_writes, find_module_weights, is_stored
from int8compile.passes.regions import Region
from int8compile.passes.rewrite import NEEDS_GRAD, Emitted, emit
from int8compile.passes.rules import RULES, Rule, Verdict, first_verdict
from int8compile.passes.static import (
    Memory,
    WeightView,
    depends_on_inputs,
    is_written,
    meta_tensor,
    nested_graphs,
    reads_parameter,
    static_weight,
    traced,
    weight_view,
)
from int8compile.report import Report
from int8compile.sites import Site, SkipReason


def rewrite_graph(
    module: GraphModule,
    parameters: Mapping[Node, Tensor],
    config: Int8Config,
    binder: Binder,
    *,
    rules: tuple[Rule, ...] = RULES,
) -> Report:
    """Rewrite the linear sites of a graph to int8, in place.

    Args:
        module: A Dynamo graph, or the module of an exported program.
        parameters: The graph's parameters by their nodes (placeholders or get_attr).
        config: The options.
        binder: Gives the graph its int8 weights.
        rules: Decide which sites stay in float.

    Returns:
        A row for each site, rewritten or not.
    """
    open_composites(module)
    open_regions(module)
    apply_writes(module)
    report = _rewrite_linears(module, parameters, config, binder, rules)
    module.graph.lint()
    module.recompile()
    return report


def _rewrite_linears(
    module: GraphModule,
    parameters: Mapping[Node, Tensor],
    config: Int8Config,
    binder: Binder,
    rules: tuple[Rule, ...],
) -> Report:
    report = Report(graphs=1)
    rotations: set[Node] = set()
    held = dict(find_module_weights(module.graph))
    # These are fake tensors, which have everything that is asked of a parameter.
    parameters = {**parameters, **{node: traced(node) for node in held}}
    memory = Memory(module.graph)
    tables = {
        weight.source
        for node in module.graph.nodes
        if (table := vocabulary.embedding_table(node)) is not None and (weight := static_weight(table, parameters))
    }
    region = Region()
    for node in list(module.graph.nodes):
        region.pass_by(node)
        report.sites.extend(_hidden_sites(node, parameters))
        if holds_int8(node):
            report.sites.append(_held_row(node, config, binder, region))
            continue
        call = vocabulary.read_contraction(node)
        if call is None:
            report.activation_matmuls += vocabulary.is_attention(node)
            continue
        site = _site(node, call, parameters, held, tables, memory, region)
        if site is None:
            report.activation_matmuls += 1
            continue
        options = config.of(site.path) if site.held is None else site.held.options(config)
        verdict = first_verdict(rules, site, options)
        made = emit(module.graph, site, options, binder) if verdict is None else None
        row = _row(site, verdict, made and made.view)
        if made is not None:
            rotation = rotation_size(made.view.shape[-1]) if made.d is not None else 1
            row = dataclasses.replace(row, weight_only=site.weight_only(options), rotation=rotation)
            if made.d is not None and made.d not in rotations:  # Sites that read one x share their d.
                rotations.add(made.d)
                row = dataclasses.replace(row, bytes_after=row.bytes_after + 4 * _d_numel(made, binder))
        report.sites.append(row)
    for node, _ in list(find_module_weights(module.graph)):
        if not node.users:  # The code asked for its dtype only, for example.
            module.graph.erase_node(node)
        else:
            where = ", ".join(dict.fromkeys(filter(None, map(names.source_line, node.users))))
            note = f"{names.parameter_name(node)} is int8, and dequantized at every call for what reads it in float"
            report.notes += (f"{note} ({where or 'outside of the graph'})",)
    return report


def may_multiply(node: Node) -> bool:
    """Return whether a call is a matmul, or a composite that may contain some."""
    return vocabulary.read_contraction(node) is not None or node.target in COMPOSITES


def _site(
    node: Node,
    call: Contraction,
    parameters: Mapping[Node, Tensor],
    held: Mapping[Node, ModuleWeight],
    tables: set[Node],
    memory: Memory,
    region: Region,
) -> LinearSite | None:
    """Return the site of a matmul, or None where both factors are activations."""
    weight_position = _weight_position(call, parameters)
    if weight_position is None:
        return None
    position = 1 - weight_position
    weight = call.operands[weight_position]
    found = static_weight(weight, parameters)
    problem = None
    if found is None:
        problem = SkipReason.NOT_STATIC if depends_on_inputs(weight, parameters) else SkipReason.COMPUTED
    weight_labels = tuple(label for label in call.labels[weight_position] if label not in call.ones)
    return LinearSite(
        node=node,
        path=names.module_path(node, names.parameter_name(found.source) if found else None),
        contraction=call,
        position=position,
        roles=roles(call.labels[position], weight_labels, call.out),
        static=found,
        parameter=parameters[found.source] if found else None,
        held=held.get(found.source) if found else None,
        problem=problem,
        sharing=memory.sharing(found.source) if found else (),
        tied=found is not None and not tables.isdisjoint(memory.same(found.source)),
        constant=not call.weight_role and not depends_on_inputs(call.operands[position], parameters),
        grad_mode=region.grad_mode,
        transformed=region.transforms > 0,
    )


def _weight_position(call: Contraction, parameters: Mapping[Node, Tensor]) -> int | None:
    """Return the position of the factor that is the weight; None where both are activations."""
    if call.weight_role:
        return 1
    for is_weight in (static_weight, reads_parameter):
        for position in (1, 0):
            if is_weight(call.operands[position], parameters):
                return position
    return None


def holds_int8(node: Node) -> bool:
    """Return whether a node is a linear of a module that `quantize_` made, with a weight that is int8 already."""
    if node.op != "call_function" or node.target not in _HELD:
        return False
    return all(map(is_stored, _tensors_of(node)))


def _tensors_of(call: Node) -> list[Node]:
    """Return the weight of a call, its scales and its d, if it has one."""
    count = 3 if call.target is ops.column_linear.default else 4
    return [tensor for tensor in call.args[1:count] if tensor is not None]  # type: ignore[misc]


def int8_tensors(graph: Graph) -> set[Node]:
    """Return the int8 weights, their scales and d, of modules that `quantize_` made."""
    called = {tensor for node in graph.nodes if holds_int8(node) for tensor in _tensors_of(node)}
    read = {tensor for _, held in find_module_weights(graph) for tensor in (held.qweight, held.scale, held.d)}
    return called | {tensor for tensor in read if tensor is not None}


# The operators that int8 modules call.
_HELD = {
    ops.linear.default,
    ops.batched_linear.default,
    ops.grouped_linear.default,
    ops.weight_only_linear.default,
    ops.column_linear.default,
}


def _held_row(node: Node, config: Int8Config, binder: Binder, region: Region) -> Site:
    """Return the row of a site that is int8 already, and bind its weight if the module is to give it up."""
    (qweight, scale, *its_d), x = _tensors_of(node), node.args[0]
    assert isinstance(x, Node)
    weight = traced(qweight)
    path = names.module_path(node)
    node.meta[NEEDS_GRAD] = traced(node).requires_grad or region.transforms > 0
    # A weight that is read by rows too, as by a tied embedding, would be in memory twice.
    alone = all(holds_int8(user) for user in qweight.users)
    if config.free_weights and alone and node.target is not ops.grouped_linear.default and not is_written([scale]):
        view = weight_view(weight, list(range(weight.dim())), tuple(weight.shape))
        d = its_d[0] if its_d else None
        bound = binder.bind(Member(qweight, view, path, scale, d))
        node.args = (x, bound.qweight, bound.scale, *node.args[3:])
    size = weight.numel() + 4 * sum(traced(tensor).numel() for tensor in (scale, *its_d))
    rows = math.prod(traced(x).shape[:-1])
    return Site(
        path=path,
        op=node.target._opname,  # type: ignore[union-attr]
        source=names.source_line(node),
        shape=tuple(map(str, (*weight.shape[:-2], rows, weight.shape[-1], weight.shape[-2]))),
        weight=names.parameter_name(qweight),
        weight_bytes=size,
        bytes_before=size,
        bytes_after=size,
        weight_only=node.target is ops.weight_only_linear.default,
        rotation=rotation_size(weight.shape[-1]) if its_d else 1,
    )


def _d_numel(made: Emitted, binder: Binder) -> int:
    """Return how many numbers the d of a site has."""
    if (known := meta_tensor(made.d)) is not None:
        return known.numel()
    *batch, _, k = made.view.shape
    of_each = bool(batch) and any(group.node is made.d and group.each for group in binder.groups)
    return k * (batch[0] if of_each else 1)


def _row(site: LinearSite, verdict: Verdict, view: WeightView | None) -> Site:
    weight = traced(site.weight)
    if site.held is not None:
        name = names.parameter_name(site.held.qweight)
        floats = [traced(tensor).numel() for tensor in (site.held.scale, site.held.d) if tensor is not None]
        before = whole = traced(site.held.qweight).numel() + 4 * sum(floats)
    elif site.static is not None and site.parameter is not None:
        name, whole = names.parameter_name(site.static.source), site.parameter.nbytes
        before = weight.numel() * site.parameter.element_size()
    else:
        name = site.weight.name
        before = whole = weight.numel() * weight.element_size()
    after = before
    groups: tuple[Labels, ...] = ()
    if site.roles is not None:
        groups = (site.roles.rows, site.roles.summed, site.roles.outputs)
        if site.roles.batch:
            groups = (site.roles.batch, *groups)
    sizes = site.sizes()
    shape = tuple(math.prod(sizes[label] for label in group) for group in groups)
    if view is not None:
        # One byte per value, and four bytes for the scale of each row of K.
        after = weight.numel() + 4 * (weight.numel() // view.shape[-1])
    reason, detail = verdict or (None, "")
    return Site(
        path=site.path,
        op=site.contraction.name,
        source=names.source_line(site.node),
        shape=tuple(map(str, shape)),
        weight=name,
        layout="" if view is None or (site.held is not None and site.held.is_all(view)) else str(view),
        weight_bytes=whole,
        bytes_before=before,
        bytes_after=after,
        reason=reason,
        detail=detail,
    )


def _hidden_sites(node: Node, parameters: Mapping[Node, Tensor]) -> Iterator[Site]:
    """Yield rows for matmuls that no pass can reach: inside fused operators and inside nested graphs."""
    opaque = vocabulary.opaque_matmul(node)
    if opaque is not None:
        for argument in node.all_input_nodes:
            weight = static_weight(argument, parameters)
            if weight is not None and weight.tensor.dim() > 1:
                yield _hidden_row(*opaque, node, parameters[weight.source], names.parameter_name(weight.source))
    if node.op == "call_function":
        yield from _nested_sites(node, parameters, {source: source for source in parameters})


def _nested_sites(call: Node, parameters: Mapping[Node, Tensor], sources: Mapping[Node, Node]) -> Iterator[Site]:
    """Yield rows for the matmuls in graphs that are arguments of a call.

    Args:
        call: The call.
        parameters: The parameters of the call's graph by their nodes.
        sources: For each of these nodes, the node of the outermost graph.
    """
    for nested, inputs in nested_graphs(call):
        weights = {inner: weight for inner, outer in inputs.items() if (weight := static_weight(outer, parameters))}
        own = {inner: weight.tensor for inner, weight in weights.items()}
        roots = {inner: sources[weight.source] for inner, weight in weights.items()}
        for node in nested.graph.nodes:
            if node.op == "call_function":
                yield from _nested_sites(node, own, roots)
            matmul = vocabulary.read_contraction(node)
            position = None if matmul is None else _weight_position(matmul, own)
            if matmul is None or position is None:
                continue
            operand = matmul.operands[position]
            found = static_weight(operand, own)
            if found is None:
                yield _hidden_row(matmul.name, SkipReason.NESTED, node, meta_tensor(operand), None, operand.name)
            else:
                name = names.parameter_name(roots[found.source])
                yield _hidden_row(matmul.name, SkipReason.NESTED, node, found.tensor, name)


def _hidden_row(
    name: str, reason: SkipReason, node: Node, weight: Tensor | None, parameter: str | None, otherwise: str = ""
) -> Site:
    size = 0 if weight is None else weight.numel() * weight.element_size()
    return Site(
        path=names.module_path(node, parameter),
        op=name,
        source=names.source_line(node),
        shape=(),
        weight=parameter or otherwise,
        weight_bytes=size,
        bytes_before=size,
        bytes_after=size,
        reason=reason,
    )
