"""Static weights: operands that are views of parameters, and what a graph writes to."""

from __future__ import annotations

import collections
import contextlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Key in the meta of a node of an int8 weight. Such a node counts as a constant, as its parameter does.
QUANTIZED = "int8compile_quantized"

# Key in the meta of a get_attr that reads a buffer of an exported model. It counts as an input, as in Dynamo's graphs.
BUFFER = "int8compile_buffer"

# The meta of a placeholder for a tensor of the model. "unguarded" is Dynamo's mark of a tensor whose address does not
# change between calls, which CUDA graphs need.
STORED = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


class WeightView(NamedTuple):
    """A weight as a view of a parameter: `param.as_strided(size, stride, offset).reshape(shape)`.

    Two spellings that read the same numbers in the same order (`F.linear(x, w)` and `x @ w.t()`) have equal views, so
    the weight is quantized once for both.

    Attributes:
        size: Sizes of the strided view.
        stride: Its strides, in elements.
        offset: Its first element, counted from the parameter's first.
        shape: [N, K] or [B, N, K].
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]

    def is_all_of(self, parameter: Tensor) -> bool:
        """Return whether the view is the whole parameter, in its own layout."""
        return self == WeightView(tuple(parameter.shape), parameter.stride(), 0, tuple(parameter.shape))

    def of(self, parameter: Tensor) -> Tensor:
        """Return the view of a parameter, which must have the layout that the view was made for."""
        return _strided(parameter, self.size, self.stride, self.offset).reshape(self.shape)

    def rows_of(self, parameter: Tensor) -> Tensor | None:
        """Return the rows of a contiguous parameter that it consists of; None where its rows are not whole rows of it.

        Shapes:
            parameter: [..., K]; result: [N] or [B, N] int64, counted over all dimensions but the last.
        """
        k, size, stride = parameter.shape[-1], list(self.size), list(self.stride)
        within = 1
        while within < k and size and stride[-1] == within:
            within *= size.pop()
            stride.pop()
        if not k or within != k or self.shape[-1] != k or not parameter.is_contiguous():
            return None
        if self.offset % k or any(step % k for step in stride):
            return None
        numbers = torch.arange(parameter.numel() // k)
        return numbers.as_strided(size, [step // k for step in stride], self.offset // k).reshape(self.shape[:-1])


def rotation_in_view(qweight: Tensor, d: Tensor | None, view: WeightView) -> tuple[bool, Tensor | None]:
    """Tell how a view of an int8 weight is rotated.

    Shapes:
        qweight: [..., N, K], of which only the sizes are read; d: [K] or [..., K], or None.

    Returns:
        Whether the view's integers are the weight's; and, where the weight has several d, the index of the d of each
        matrix of the view: [] for a view [N, K], [B] for a view [B, N, K].
    """
    if d is None or view.is_all_of(qweight):
        return True, None
    rows = view.rows_of(qweight)
    if rows is None or d.dim() == 1:
        return rows is not None, None
    matrix = rows // qweight.shape[-2]
    one_each = bool((matrix == matrix[..., :1]).all())
    return one_each, matrix[..., 0] if one_each else None


class StaticWeight(NamedTuple):
    """A node that reads a parameter through views only.

    Attributes:
        source: The parameter's own node: a placeholder (Dynamo) or a get_attr (export).
        tensor: A meta tensor with the view's sizes, strides and offset.
        chain: The nodes from the source to the one that reads it, both included.
    """

    source: Node
    tensor: Tensor
    chain: tuple[Node, ...]

    def of(self, parameter: Tensor) -> Tensor:
        """Return the same view of the parameter itself."""
        return _strided(parameter, self.tensor.shape, self.tensor.stride(), int(self.tensor.storage_offset()))


def _strided(parameter: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Return a view of a parameter's values; `offset` counts from its first element."""
    return parameter.detach().as_strided(size, stride, parameter.storage_offset() + offset)


def meta_tensor(node: Any) -> Tensor | None:
    """Return the fake tensor that a node's result was traced with; None where the result is no tensor."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def traced(node: Node) -> Tensor:
    """Return `meta_tensor` of a node whose result is known to be a tensor."""
    value = meta_tensor(node)
    assert value is not None
    return value


def attribute(module: GraphModule, node: Node) -> Any:
    """Return the attribute that a get_attr node reads."""
    return operator.attrgetter(str(node.target))(module)


def nested_graphs(call: Node) -> Iterator[tuple[GraphModule, dict[Node, Node]]]:
    """Yield the graphs among the arguments of a call, such as those of torch.cond.

    Yields:
        The module of each graph, and the arguments of the call by its placeholders.
    """
    owner, leaves = call.graph.owning_module, tree_leaves(call.args)
    for leaf in leaves:
        if isinstance(leaf, Node) and leaf.op == "get_attr" and owner is not None:
            nested = attribute(owner, leaf)
            if isinstance(nested, GraphModule):
                inputs = nested.graph.find_nodes(op="placeholder")
                # The inputs of the graphs are the last arguments of such a call.
                given = zip(inputs, leaves[max(len(leaves) - len(inputs), 0) :], strict=False)
                yield nested, {inner: outer for inner, outer in given if isinstance(outer, Node)}


def static_weight(node: Node, parameters: Mapping[Node, Tensor]) -> StaticWeight | None:
    """Follow a node back through views to a parameter.

    Args:
        node: An operand of a matmul.
        parameters: The parameters of the graph by their nodes.

    Returns:
        The weight; None where the node is not a pure view of one parameter.
    """
    chain: list[Node] = []
    while node not in parameters:
        viewed = node.args[0] if is_view(node) else _written_and_returned(node)
        if not isinstance(viewed, Node):
            return None
        chain.append(node)
        node = viewed
    parameter = parameters[node]
    if parameter.layout != torch.strided:
        return None
    base: Any = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    view = base
    for step in reversed(chain):
        if step.target not in _STEPS:
            continue  # It writes to the weight, which a rule refuses later.
        if step.target in SAME_VALUES:
            cast = meta_tensor(step)
            if cast is None or not cast.is_floating_point() or cast.element_size() < 2:
                return None  # Rounded to fewer bits than int8 keeps.
            continue
        try:
            view = _replay(step, view)
        except RuntimeError:
            return None  # A view of a copy, which is no view of the parameter.
    if not isinstance(view, Tensor) or view.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return None  # A step copied.
    if view.dtype != parameter.dtype:
        return None  # view(dtype) reads the same bytes as other numbers.
    if any(stride == 0 and size > 1 for size, stride in zip(view.shape, view.stride(), strict=True)):
        return None  # Repeated by expand: int8 copies would take more memory than the float weight.
    return StaticWeight(node, view, (node, *reversed(chain)))


def _replay(step: Node, tensor: Any) -> Any:
    rest = step.args[1:]
    if step.op == "call_method":
        return getattr(tensor, str(step.target))(*rest, **step.kwargs)
    return step.target(tensor, *rest, **step.kwargs)  # type: ignore[operator]


def weight_view(weight: Tensor, order: list[int], shape: tuple[int, ...]) -> WeightView:
    """Return the view that permutes a meta tensor's dimensions into `order` and flattens them into `shape`."""
    permuted = weight.permute(order)
    with contextlib.suppress(RuntimeError):
        # Where no view has that shape, `WeightView.of` copies.
        permuted = permuted.view(shape)
    return WeightView(tuple(permuted.shape), permuted.stride(), int(permuted.storage_offset()), shape)


def reads_parameter(node: Node, parameters: Mapping[Node, Tensor]) -> bool:
    """Return whether an operand is made from parameters alone: `w * scale`, or rows that an input chooses, `w[index]`.

    Args:
        node: The operand.
        parameters: The parameters of the graph by their nodes.
    """
    while node.target in _CHOICES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    found = False
    for origin in _origins(node, parameters):
        if origin in parameters:
            found = True
        elif _is_input(origin):
            return False
    return found


def depends_on_inputs(node: Node, parameters: Mapping[Node, Tensor]) -> bool:
    """Return whether a node is computed from anything but parameters and constants."""
    return any(origin not in parameters and _is_input(origin) for origin in _origins(node, parameters))


def _origins(node: Node, parameters: Mapping[Node, Tensor]) -> Iterator[Node]:
    """Yield the parameters, inputs and constants that a node is computed from."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current in parameters or not current.all_input_nodes:
            yield current
            continue
        new = [arg for arg in current.all_input_nodes if arg not in seen]
        seen.update(new)
        pending.extend(new)


def _is_input(node: Node) -> bool:
    return (node.op == "placeholder" and QUANTIZED not in node.meta) or BUFFER in node.meta


class Memory:
    """The tensors that a graph takes or holds, by the memory that they share."""

    def __init__(self, graph: Graph) -> None:
        self._place: dict[Node, tuple[Any, ...]] = {}
        self._of: dict[Any, list[Node]] = collections.defaultdict(list)
        for node in (*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")):
            tensor = meta_tensor(node)
            if tensor is None or tensor.layout != torch.strided:
                continue
            with contextlib.suppress(RuntimeError):  # Some subclasses have no storage.
                storage = tensor.untyped_storage()._cdata
                self._place[node] = storage, tensor.storage_offset(), tensor.shape, tensor.stride()
                self._of[storage].append(node)

    def sharing(self, node: Node) -> Sequence[Node]:
        """Return the nodes whose tensors lie in the same storage, the given node among them."""
        return self._of[self._place[node][0]] if node in self._place else [node]

    def same(self, node: Node) -> Sequence[Node]:
        """Return all nodes of the same tensor, as after `lm_head.weight.data = embedding.weight.data`."""
        return [other for other in self.sharing(node) if self._place.get(other) == self._place.get(node)]


def changed_in_graph(weight: StaticWeight, sharing: Sequence[Node]) -> bool:
    """Return whether the graph writes to a weight, anywhere.

    Args:
        weight: The weight.
        sharing: The inputs and attributes of the graph that share its parameter's memory, the parameter among them.
    """
    if weight.source.op == "placeholder" and _counted_writes(weight, sharing):
        return True
    # Updates of lists (_foreach_mul_) are not counted, and exported graphs do not count.
    return is_written((*sharing, *weight.chain))


def is_written(nodes: Sequence[Node]) -> bool:
    """Return whether a graph writes to tensors or to views of them."""
    pending = [*nodes]
    while pending:
        node = pending.pop()
        for user in node.users:
            if node in written(user):
                return True
            if may_be_view(user, node):
                pending.append(user)
    return False


def _counted_writes(weight: StaticWeight, sharing: Sequence[Node]) -> bool:
    """Return whether Dynamo's fake tensors have counted a write, in any spelling."""
    given = [tensor for node in sharing if (tensor := meta_tensor(node)) is not None]
    # Making a fake tensor counts too, unless it is the first of its storage and begins where that does.
    made = max(0, len(given) - all(tensor.storage_offset() == 0 for tensor in given))
    if sum(tensor._version for tensor in given) > made:
        return True
    views = [tensor for node in weight.chain[1:] if (tensor := meta_tensor(node)) is not None]
    return any(tensor._version > made for tensor in views)


def written(call: Node) -> set[Node]:
    """Return the arguments that a call changes in place."""
    if isinstance(call.target, torch._ops.HigherOrderOperator):
        if "mutation" in call.target.__name__:
            return set(call.all_input_nodes)  # A Triton kernel of the user's may write to any argument.
        return {given for _, inputs in nested_graphs(call) for inner, given in inputs.items() if is_written([inner])}
    if isinstance(call.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _nodes([value for argument, value in _by_schema(call) if argument.is_write])
    name = str(call.target) if call.op == "call_method" else getattr(call.target, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    in_place = in_place or call.kwargs.get("inplace") is True
    # torch.nn.init passes its arguments on by name.
    first = next(iter((*call.args, *call.kwargs.values())), None)
    return _nodes([call.kwargs.get("out"), first if in_place else None])


def scaling(call: Node) -> float | None:
    """Return the number that an in-place call multiplies its whole first argument by; None for any other call."""
    if call.target not in _MULTIPLY | _DIVIDE or len(call.args) != 2 or call.kwargs:
        return None
    number = call.args[1]
    if not isinstance(number, int | float) or not math.isfinite(number):
        return None
    if call.target in _MULTIPLY:
        return float(number)
    return 1 / number if number else None


def _by_schema(call: Node) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments of a call of an operator, as its schema describes them, with their values."""
    # Dynamo leaves `torch.ops.library.name(...)` as it is written; its arguments would decide the overload.
    overloads: list[Any] = [call.target]
    if isinstance(call.target, torch._ops.OpOverloadPacket):
        overloads = [getattr(call.target, name) for name in call.target.overloads()]
    for overload in overloads:
        schema = overload._schema.arguments
        given = dict(zip((argument.name for argument in schema), call.args, strict=False)) | dict(call.kwargs)
        for argument in schema:
            yield argument, given.get(argument.name)


def _nodes(values: Any) -> set[Node]:
    found: set[Node] = set()

    def look(node: Node) -> Node:
        found.add(node)
        return node

    torch.fx.node.map_arg(values, look)
    return found


def _written_and_returned(call: Node) -> Node | None:
    """Return the tensor that an in-place call changes and returns; None for any other call."""
    if isinstance(call.target, torch._ops.OpOverload):
        returned = call.target._schema.returns
        if not returned or returned[0].alias_info is None or not returned[0].alias_info.is_write:
            return None
    elif call.op != "call_method" and (
        call.op != "call_function"
        or isinstance(call.target, torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator)
    ):
        return None
    changed = written(call)
    return changed.pop() if len(changed) == 1 else None


def may_be_view(call: Node, viewed: Node) -> bool:
    """Return whether the result of a call may share memory with one of its arguments."""
    if _shares_memory(call, viewed):
        return True
    if call.target in SAME_VALUES - ALIASES and "example_value" in call.meta and "example_value" in viewed.meta:
        return False  # A copy: Dynamo's fake tensors would share memory.
    if isinstance(call.target, torch._ops.OpOverload):
        return viewed in _nodes([value for argument, value in _by_schema(call) if argument.alias_info is not None])
    return call.target not in ("clone", torch.clone) and is_view(call) and call.args[0] is viewed


def _shares_memory(call: Node, given: Node) -> bool:
    """Return whether the fake tensors of a result and of an argument share memory."""
    made, tensor = call.meta.get("example_value", call.meta.get("val")), meta_tensor(given)
    with contextlib.suppress(RuntimeError, NotImplementedError):  # Some subclasses have no storage.
        memory = None if tensor is None else tensor.untyped_storage()._cdata
        parts = [part for part in tree_leaves(made) if isinstance(part, Tensor)]
        return any(part.untyped_storage()._cdata == memory for part in parts)
    return False


def is_view(node: Node) -> bool:
    """Return whether a node is a view or cast through which a weight may be read. Its input may be any tensor."""
    if node.op not in ("call_function", "call_method") or node.target not in _STEPS:
        return False
    if node.target is getattr and node.args[1] not in ("T", "mT", "H", "mH"):
        return False
    if not node.args or not isinstance(node.args[0], Node):
        return False
    # All arguments but the tensor must be constants, and sizes of a weight are. A cast is an exception: `w.to(x)`.
    return node.target in SAME_VALUES or node.all_input_nodes == [node.args[0]]


# Writes whose name does not end with an underscore.
_IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}

_MULTIPLY: set[Any] = {"mul_", "multiply_", operator.imul, aten.mul_.Tensor, aten.mul_.Scalar}
_DIVIDE: set[Any] = {"div_", "divide_", "true_divide_", operator.itruediv, aten.div_.Tensor, aten.div_.Scalar}

# Operations that select from their first argument.
_CHOICES: set[Any] = {
    *("__getitem__", "index_select", "gather", "take_along_dim", operator.getitem),
    *(torch.index_select, torch.gather, torch.take_along_dim),
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default),
}

# Views whose result depends only on the strides of their input.
_VIEWS: set[Any] = {
    *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten"),
    *("unflatten", "squeeze", "unsqueeze", "select", "narrow", "chunk", "split", "unbind", "tensor_split", "expand"),
    "adjoint",
    *(torch.t, torch.transpose, torch.swapaxes, torch.swapdims, torch.permute, torch.movedim, torch.moveaxis),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.select, torch.narrow),
    *(torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.adjoint, operator.getitem),
    getattr,  # x.T and x.mT
    *(aten.t.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.permute.default),
    *(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist),
    *(aten.view.default, aten.view.dtype, aten._unsafe_view.default),
    *(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim),
    *(aten.squeeze.dims, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.narrow.default),
    *(aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unbind.int),
    *(aten.tensor_split.sections, aten.tensor_split.indices, aten.numpy_T.default, aten.mT.default),
    *(aten.matrix_H.default, aten.mH.default, aten.adjoint.default, aten.expand.default),
}

# Other names of the same tensor; the last is x.data in newer graphs.
ALIASES: set[Any] = {
    *("detach", torch.detach, aten.detach.default, aten.alias.default),
    getattr(torch._C._autograd, "_get_data_attr", None),
}

# Steps that change neither the values (up to the precision that int8 keeps) nor their order.
SAME_VALUES: set[Any] = {
    *ALIASES,
    *("contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as"),
    *(torch.clone, aten.contiguous.default, aten.clone.default, aten.type_as.default),
    *(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
    aten.lift_fresh_copy.default,
}

# Dynamo leaves the overload open where the user writes `torch.ops.aten.t(w)`.
for _targets in (_VIEWS, SAME_VALUES):
    _targets.update([target.overloadpacket for target in _targets if isinstance(target, torch._ops.OpOverload)])

# Steps through which a weight may be read.
_STEPS = _VIEWS | SAME_VALUES
