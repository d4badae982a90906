"""The one table of spellings: every call that multiplies by a weight, on Dynamo graphs and on ATen graphs.

To teach the passes a new spelling, add its targets to `_TABLE` and, if no function here fits, one that turns its
arguments into a `Contraction`.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from int8compile.passes.contraction import Contraction, Labels
from int8compile.passes.static import meta_tensor
from int8compile.report import SkipReason

aten = torch.ops.aten


class Spelling(NamedTuple):
    """One way to write a matmul.

    Attributes:
        name: The user's word for it.
        parameters: Names of the call's parameters, in order.
        read: Makes the contraction of the name and the parameters' values; None stands for one that is not given.
    """

    name: str
    parameters: tuple[str, ...]
    read: Callable[..., Contraction | None]


def contraction(node: Node) -> Contraction | None:
    """Reads a node as a matmul of two tensors; None for any other node."""
    if node.op not in ("call_function", "call_method") or node.target not in _TABLE:
        return None
    spelling = _TABLE[node.target]
    if len(node.args) > len(spelling.parameters):
        return None
    given = dict(zip(spelling.parameters, node.args, strict=False)) | dict(node.kwargs)
    found = spelling.read(spelling.name, *(given.get(name) for name in spelling.parameters))
    unread = [name for name, value in given.items() if name not in spelling.parameters and value is not None]
    if found is not None and unread:
        return found._replace(form=f"it is given {unread[0]}=")
    return found


def is_attention(node: Node) -> bool:
    """Whether a node is a fused attention: two matmuls of activations."""
    return node.op == "call_function" and node.target in _ATTENTION


def opaque_matmul(node: Node) -> tuple[str, SkipReason] | None:
    """For an operator that has matmuls inside, or may have: its name, and why the weights it takes stay in float."""
    if node.op != "call_function":
        return None
    if node.target in _OPAQUE:
        return _OPAQUE[node.target]
    if node.target in _TABLE and contraction(node) is None:
        # An einsum of three tensors, say. A convolution with a larger kernel is no matmul.
        spelling = _TABLE[node.target].name
        return None if spelling == "convolution" else (spelling, SkipReason.FORM)
    # Dynamo leaves the overload open that exported graphs name.
    packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    if isinstance(packet, torch._ops.OpOverloadPacket) and not str(packet).startswith(_TORCHS_OWN):
        return str(packet), SkipReason.CUSTOM_OP
    return None


def embedding_table(node: Node) -> Node | None:
    """The table that a node looks rows up in; a matmul with the same parameter is tied to the embedding."""
    if node.op != "call_function":
        return None
    if node.target in _INDEXING:
        table, index = node.args
        rows = meta_tensor(table)
        first, *rest = index if isinstance(index, (list, tuple)) else [index]
        whole = all(each in (None, slice(None), ...) for each in rest)
        looked_up = rows is not None and rows.dim() == 2 and meta_tensor(first) is not None and whole
        return table if looked_up and isinstance(table, Node) else None
    if node.target not in _EMBEDDINGS:
        return None
    position, name = _EMBEDDINGS[node.target]
    found = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return found if isinstance(found, Node) else None


def _letters(count: int, first: str = "a") -> Labels:
    return tuple(f"{first}{i}" for i in range(count))


def _shape(operand: Any) -> Sequence[Any] | None:
    tensor = meta_tensor(operand)
    return None if tensor is None else tensor.shape


def _broadcasts(labels: tuple[Labels, Labels], shapes: Sequence[Sequence[Any]]) -> str:
    """Labels say which dimensions belong together; where one of two is 1 it is broadcast, which they cannot say."""
    sizes = [dict(zip(*each, strict=True)) for each in zip(labels, shapes, strict=True)]
    same = all(sizes[0][label] == sizes[1][label] for label in sizes[0].keys() & sizes[1].keys())
    return "" if same else "it broadcasts a dimension of size 1"


def _linear(spelling: str, x: Node, w: Node, bias: Node | None) -> Contraction | None:
    shapes = _shape(x), _shape(w)
    if shapes[0] is None or shapes[1] is None:
        return None
    rows = _letters(len(shapes[0]) - 1)
    outputs = ("n",) if len(shapes[1]) == 2 else ()
    return Contraction(
        spelling,
        (x, w),
        ((*rows, "k"), (*outputs, "k")),
        (*rows, *outputs),
        weight_role=True,
        addend=bias,
        addend_label="n",
    )


def _matmul(spelling: str, left: Node, right: Node) -> Contraction | None:
    shapes = _shape(left), _shape(right)
    if shapes[0] is None or shapes[1] is None or not shapes[0] or not shapes[1]:
        return None
    left_core: Labels = ("m", "k") if len(shapes[0]) > 1 else ("k",)
    right_core: Labels = ("k", "n") if len(shapes[1]) > 1 else ("k",)
    counts = len(shapes[0]) - len(left_core), len(shapes[1]) - len(right_core)
    batch = _letters(max(counts))
    labels = (*batch[len(batch) - counts[0] :], *left_core), (*batch[len(batch) - counts[1] :], *right_core)
    out = (*batch, *(label for label in (*left_core, *right_core) if label != "k"))
    return Contraction(spelling, (left, right), labels, out, form=_broadcasts(labels, (shapes[0], shapes[1])))


def _reflected_matmul(spelling: str, right: Node, left: Node) -> Contraction | None:
    return _matmul(spelling, left, right)


def _addmm(spelling: str, addend: Node, left: Node, right: Node, beta: Any, alpha: Any) -> Contraction | None:
    product = _matmul(spelling, left, right)
    if product is None:
        return None
    return product._replace(
        addend=addend,
        addend_label=product.out[-1],
        beta=1 if beta is None else beta,
        alpha=1 if alpha is None else alpha,
    )


def _inner(spelling: str, left: Node, right: Node) -> Contraction | None:
    shapes = _shape(left), _shape(right)
    if shapes[0] is None or shapes[1] is None or not shapes[0] or not shapes[1]:
        return None
    lefts, rights = _letters(len(shapes[0]) - 1), _letters(len(shapes[1]) - 1, "n")
    return Contraction(spelling, (left, right), ((*lefts, "k"), (*rights, "k")), (*lefts, *rights))


def _tensordot(spelling: str, left: Node, right: Node, dims: Any) -> Contraction | None:
    shapes = _shape(left), _shape(right)
    if shapes[0] is None or shapes[1] is None or isinstance(dims, Node):
        return None
    if dims is None:
        dims = 2
    if isinstance(dims, int):
        dims = list(range(len(shapes[0]) - dims, len(shapes[0]))), list(range(dims))
    lefts, rights = list(_letters(len(shapes[0]))), list(_letters(len(shapes[1]), "n"))
    for i, j in zip(*dims, strict=True):
        rights[j] = lefts[i]
    out = [label for label in lefts if label not in rights] + [label for label in rights if label not in lefts]
    labels = tuple(lefts), tuple(rights)
    return Contraction(spelling, (left, right), labels, tuple(out), form=_broadcasts(labels, (shapes[0], shapes[1])))


def _aten_tensordot(spelling: str, left: Node, right: Node, dims: Any, other_dims: Any) -> Contraction | None:
    return _tensordot(spelling, left, right, (dims, other_dims))


def _einsum(spelling: str, equation: Any, *operands: Any) -> Contraction | None:
    if isinstance(equation, Node):  # einsum(x, [0, 1], w, [1, 2]): numbers for the labels.
        given = [each for each in (equation, *operands) if each is not None]
        equation, operands = ",".join(map(_numbered, given[1:4:2])), tuple(given[:4:2])
        equation += "->" + _numbered(given[4]) if given[4:] else ""
    if isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    operands = tuple(operand for operand in operands if operand is not None)
    shapes = [_shape(operand) for operand in operands]
    if not isinstance(equation, str) or len(operands) != 2 or shapes[0] is None or shapes[1] is None:
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    hidden = [len(shape or ()) - len(term.replace("...", "")) for shape, term in zip(shapes, terms, strict=True)]
    dots = _letters(max(0, *hidden), ".")

    def expand(term: str, count: int) -> Labels:
        before, found, after = term.partition("...")
        return (*before, *(dots[len(dots) - count :] if found and count else ()), *after)

    labels = expand(terms[0], hidden[0]), expand(terms[1], hidden[1])
    if arrow:
        out = expand(result, len(dots))
    else:  # Implicit result: the ellipsis, then every label that occurs once, in alphabetical order.
        flat = [*labels[0], *labels[1]]
        out = (*dots, *sorted(label for label in flat if label not in dots and flat.count(label) == 1))
    return Contraction(
        spelling, (operands[0], operands[1]), labels, out, form=_broadcasts(labels, (shapes[0], shapes[1]))
    )


def _numbered(labels: Any) -> str:
    """A term of an equation; PyTorch sorts numbers as it sorts these letters."""
    letters = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if label is ... else letters[label] for label in labels)


def _convolution(
    spelling: str, x: Node, w: Node, bias: Node | None, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Contraction | None:
    """A convolution with a kernel of size 1 is a linear over the channels; any other is not a matmul of this kind."""
    del dilation  # Means nothing to a kernel of size 1.
    shapes = _shape(x), _shape(w)
    if shapes[0] is None or shapes[1] is None or any(size != 1 for size in shapes[1][2:]):
        return None
    space = _letters(len(shapes[1]) - 2)
    batch = ("b",) if len(shapes[0]) == len(shapes[1]) else ()
    steps = tuple((label, step) for label, step in zip(space, _each(stride, 1, space), strict=True) if step != 1)
    ones = tuple(f"kernel {label}" for label in space)
    form = ""
    if groups not in (None, 1):
        form = "its channels are in groups"
    elif padding not in ("valid", "same") and any(_each(padding, 0, space)):
        form = "it pads its input"
    return Contraction(
        spelling,
        (x, w),
        ((*batch, "k", *space), ("n", "k", *ones)),
        (*batch, "n", *space),
        weight_role=True,
        addend=bias,
        addend_label="n",
        steps=steps,
        ones=ones,
        form=form,
    )


def _aten_convolution(
    spelling: str,
    x: Node,
    w: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: Any,
) -> Contraction | None:
    del output_padding  # Of transposed convolutions only.
    return None if transposed else _convolution(spelling, x, w, bias, stride, padding, dilation, groups)


def _each(value: Any, default: int, space: Labels) -> list[Any]:
    """A convolution's parameter for each dimension of space, from a number or a list."""
    if value is None:
        value = default
    if isinstance(value, (list, tuple)):
        return list(value) * (len(space) if len(value) == 1 else 1)
    return [value] * len(space)


_ADDMM = Spelling("addmm", ("input", "mat1", "mat2", "beta", "alpha"), _addmm)
_ADDMV = Spelling("addmv", ("input", "mat", "vec", "beta", "alpha"), _addmm)
_BADDBMM = Spelling("baddbmm", ("input", "batch1", "batch2", "beta", "alpha"), _addmm)
_BMM = Spelling("bmm", ("input", "mat2"), _matmul)
_CONVOLUTION = Spelling(
    "convolution", ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _convolution
)
_ATEN_CONVOLUTION = Spelling(
    "convolution", (*_CONVOLUTION.parameters[:6], "transposed", "output_padding", "groups"), _aten_convolution
)
_EINSUM = Spelling("einsum", ("equation", "operands", "second", "third", "fourth"), _einsum)
_INNER = Spelling("inner", ("input", "other"), _inner)
_LINEAR = Spelling("linear", ("input", "weight", "bias"), _linear)
_MATMUL = Spelling("matmul", ("input", "other"), _matmul)
_MM = Spelling("mm", ("input", "mat2"), _matmul)
_MV = Spelling("mv", ("input", "vec"), _matmul)

# Keys are targets of call_function (objects) and names of call_method (strings).
_TABLE: dict[Any, Spelling] = {
    torch.addmm: _ADDMM,
    "addmm": _ADDMM,
    aten.addmm.default: _ADDMM,
    torch.addmv: _ADDMV,
    "addmv": _ADDMV,
    aten.addmv.default: _ADDMV,
    torch.baddbmm: _BADDBMM,
    "baddbmm": _BADDBMM,
    aten.baddbmm.default: _BADDBMM,
    torch.bmm: _BMM,
    "bmm": _BMM,
    aten.bmm.default: _BMM,
    torch.conv1d: _CONVOLUTION,
    torch.conv2d: _CONVOLUTION,
    torch.conv3d: _CONVOLUTION,
    aten.conv1d.default: _CONVOLUTION,
    aten.conv2d.default: _CONVOLUTION,
    aten.conv3d.default: _CONVOLUTION,
    aten.conv1d.padding: _CONVOLUTION,
    aten.conv2d.padding: _CONVOLUTION,
    aten.conv3d.padding: _CONVOLUTION,
    torch.convolution: _ATEN_CONVOLUTION,
    aten.convolution.default: _ATEN_CONVOLUTION,
    torch.einsum: _EINSUM,
    aten.einsum.default: _EINSUM,
    torch.inner: _INNER,
    "inner": _INNER,
    aten.inner.default: _INNER,
    torch.nn.functional.linear: _LINEAR,
    aten.linear.default: _LINEAR,
    torch.matmul: _MATMUL,
    torch.linalg.matmul: _MATMUL,
    aten.linalg_matmul.default: _MATMUL,
    operator.matmul: _MATMUL,
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    "__rmatmul__": Spelling("matmul", ("input", "other"), _reflected_matmul),
    aten.matmul.default: _MATMUL,
    torch.mm: _MM,
    "mm": _MM,
    aten.mm.default: _MM,
    torch.mv: _MV,
    "mv": _MV,
    aten.mv.default: _MV,
    torch.tensordot: Spelling("tensordot", ("a", "b", "dims"), _tensordot),
    aten.tensordot.default: Spelling("tensordot", ("self", "other", "dims_self", "dims_other"), _aten_tensordot),
}

# Dynamo leaves the overload open where the user writes `torch.ops.aten.mm(x, w)`.
_TABLE |= {
    target.overloadpacket: spelling for target, spelling in _TABLE.items() if isinstance(target, torch._ops.OpOverload)
}

_ATTENTION = {
    torch.nn.functional.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
}

_OPAQUE: dict[Any, tuple[str, SkipReason]] = {
    torch._transformer_encoder_layer_fwd: ("transformer_encoder_layer", SkipReason.FUSED_OP),
    torch._native_multi_head_attention: ("multi_head_attention", SkipReason.FUSED_OP),
    torch.nn.functional.multi_head_attention_forward: ("multi_head_attention", SkipReason.FUSED_OP),
    torch.addbmm: ("addbmm", SkipReason.FORM),
    torch.chain_matmul: ("chain_matmul", SkipReason.FORM),
    torch.linalg.multi_dot: ("multi_dot", SkipReason.FORM),
    torch._grouped_mm: ("grouped_mm", SkipReason.FORM),
    aten._grouped_mm.default: ("grouped_mm", SkipReason.FORM),
    torch.nn.functional.bilinear: ("bilinear", SkipReason.FORM),
    aten._transformer_encoder_layer_fwd.default: ("transformer_encoder_layer", SkipReason.FUSED_OP),
    aten._native_multi_head_attention.default: ("multi_head_attention", SkipReason.FUSED_OP),
    aten.addbmm.default: ("addbmm", SkipReason.FORM),
    aten.chain_matmul.default: ("chain_matmul", SkipReason.FORM),
    aten.linalg_multi_dot.default: ("multi_dot", SkipReason.FORM),
    aten.bilinear.default: ("bilinear", SkipReason.FORM),
}

for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _layer, _cell = getattr(aten, _name), getattr(aten, f"{_name}_cell")
    for _target in (getattr(torch, _name), _layer.input, _layer.data, getattr(torch, f"{_name}_cell"), _cell.default):
        _OPAQUE[_target] = (_name, SkipReason.FORM)

# Operators of any other namespace are somebody's own.
_TORCHS_OWN = ("aten.", "aten::", "prims.", "prim.", "int8compile.")

_INDEXING = {operator.getitem, aten.index.Tensor}

_EMBEDDINGS: dict[Any, tuple[int, str]] = {
    torch.nn.functional.embedding: (1, "weight"),
    torch.nn.functional.embedding_bag: (1, "weight"),
    torch.embedding: (0, "weight"),
    aten.embedding.default: (0, "weight"),
    aten.embedding_bag.default: (0, "weight"),
    aten.embedding_bag.padding_idx: (0, "weight"),
    aten._embedding_bag.default: (0, "weight"),
    aten.embedding: (0, "weight"),
    aten.embedding_bag: (0, "weight"),
}
