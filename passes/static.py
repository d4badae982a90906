"""Which operands are static weights, and which view of a parameter they are."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

# Key in the meta of a node that holds an int8 weight, which is as constant as the parameter it was made from.
QUANTIZED = "int8compile_quantized"

# Key in the meta of a get_attr that reads a buffer of an exported model: no constant. Dynamo makes it an input.
BUFFER = "int8compile_buffer"


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

    def of(self, parameter: Tensor) -> Tensor:
        """Takes the view of a parameter of the layout it was made for."""
        return _strided(parameter, self.size, self.stride, self.offset).reshape(self.shape)


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
        """Takes the view of the parameter itself."""
        return _strided(parameter, self.tensor.shape, self.tensor.stride(), int(self.tensor.storage_offset()))


def _strided(parameter: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """A view of a parameter's values; `offset` counts from its first."""
    return parameter.detach().as_strided(size, stride, parameter.storage_offset() + offset)


def meta_tensor(node: Any) -> Tensor | None:
    """The fake tensor that a node's result was traced with; None where it is not a tensor."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def traced(node: Node) -> Tensor:
    """`meta_tensor` of a node that is known to make a tensor."""
    value = meta_tensor(node)
    assert value is not None
    return value


def static_weight(node: Node, parameters: Mapping[Node, Tensor]) -> StaticWeight | None:
    """Follows a node back through views to a parameter.

    Args:
        node: An operand of a matmul.
        parameters: The parameters of the graph by their nodes.

    Returns:
        None where the node is no pure view of one parameter.
    """
    chain: list[Node] = []
    while node not in parameters:
        if not _is_view(node):
            return None
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    parameter = parameters[node]
    if parameter.layout != torch.strided:
        return None
    base: Any = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    view = base
    for step in reversed(chain):
        if step.target in _SAME_VALUES:
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
    """The view that permutes a meta tensor's dimensions into `order` and flattens them into `shape`."""
    permuted = weight.permute(order)
    with contextlib.suppress(RuntimeError):
        # Where it is not viewable, `WeightView.of` copies.
        permuted = permuted.view(shape)
    return WeightView(tuple(permuted.shape), permuted.stride(), int(permuted.storage_offset()), shape)


def reads_parameter(node: Node, parameters: Mapping[Node, Tensor]) -> bool:
    """Whether an operand is made from parameters alone: `w * scale`, or rows of w that the inputs choose, `w[index]`.

    Args:
        node: The operand.
        parameters: The parameters of the graph by their nodes.
    """
    while node.target in _CHOICES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node in parameters or (bool(node.all_input_nodes) and not depends_on_inputs(node, parameters))


def depends_on_inputs(node: Node, parameters: Mapping[Node, Tensor]) -> bool:
    """Whether anything but parameters and constants goes into a node."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current in parameters:
            continue
        if (current.op == "placeholder" and QUANTIZED not in current.meta) or BUFFER in current.meta:
            return True
        new = [arg for arg in current.all_input_nodes if arg not in seen]
        seen.update(new)
        pending.extend(new)
    return False


def changed_in_graph(weight: StaticWeight) -> bool:
    """Whether the graph writes to a weight, anywhere."""
    # Dynamo's fake tensors count the writes that were traced, whatever the spelling.
    if any((tensor := meta_tensor(node)) is not None and tensor._version > 0 for node in weight.chain):
        return True
    # Exported graphs do not, nor are updates of lists (_foreach_mul_) counted: look at what is done to its views.
    pending = [weight.source]
    while pending:
        node = pending.pop()
        for user in node.users:
            if node in written(user):
                return True
            if _is_view(user):
                pending.append(user)
    return False


def written(call: Node) -> set[Node]:
    """The arguments that a call changes in place."""
    if isinstance(call.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        # Dynamo leaves `torch.ops.library.name(...)` as it is written; which overload it means its arguments decide.
        overloads: list[Any] = [call.target]
        if isinstance(call.target, torch._ops.OpOverloadPacket):
            overloads = [getattr(call.target, name) for name in call.target.overloads()]
        changed: list[Any] = []
        for overload in overloads:
            schema = overload._schema.arguments
            given = dict(zip((argument.name for argument in schema), call.args, strict=False)) | dict(call.kwargs)
            changed += [given.get(argument.name) for argument in schema if argument.is_write]
    else:
        name = str(call.target) if call.op == "call_method" else getattr(call.target, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        in_place = in_place or call.kwargs.get("inplace") is True
        changed = [call.kwargs.get("out"), call.args[0] if in_place and call.args else None]
    found: set[Node] = set()

    def look(node: Node) -> Node:
        found.add(node)
        return node

    torch.fx.node.map_arg(changed, look)
    return found


def _is_view(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in _STEPS:
        return False
    if node.target is getattr and node.args[1] not in ("T", "mT", "H", "mH"):
        return False
    # All but the tensor must be constants, and sizes of a weight are.
    return bool(node.args) and node.all_input_nodes == [node.args[0]]


# Writes whose name does not end with an underscore.
_IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}

# Operations that choose from their first tensor.
_CHOICES: set[Any] = {
    *("__getitem__", "index_select", "gather", "take_along_dim", operator.getitem),
    *(torch.index_select, torch.gather, torch.take_along_dim),
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default),
}

# Views whose result depends on the strides of their input only.
_VIEWS: set[Any] = {
    *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten"),
    *("unflatten", "squeeze", "unsqueeze", "select", "narrow", "chunk", "split", "unbind", "tensor_split", "expand"),
    *(torch.t, torch.transpose, torch.swapaxes, torch.swapdims, torch.permute, torch.movedim, torch.moveaxis),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.select, torch.narrow),
    *(torch.chunk, torch.split, torch.unbind, torch.tensor_split, operator.getitem),
    getattr,  # x.T and x.mT
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten.movedim.int, aten.view.default),
    *(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim),
    *(aten.squeeze.dims, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.narrow.default),
    *(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int),
    *(aten.numpy_T.default, aten.mT.default, aten.expand.default, aten._unsafe_view.default),
}

# Steps that change neither the values (up to the precision that int8 keeps) nor their order.
_SAME_VALUES: set[Any] = {
    *("contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "double", "type_as"),
    *(torch.clone, torch.detach, getattr(torch._C._autograd, "_get_data_attr", None)),  # x.data in newer graphs
    *(aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default),
    *(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.lift_fresh_copy.default),
}

# What a weight may be read through.
_STEPS = _VIEWS | _SAME_VALUES
