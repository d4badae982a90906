"""The calls that the passes know, in Dynamo graphs and in ATen graphs.

`_TABLE` lists the spellings: calls that are a matmul, whichever factor is a weight (`pipeline` decides that). `_OPAQUE`
lists calls that hide matmuls: no reader describes them. `_ATTENTION` and `_EMBEDDINGS` list fused attention and
embedding lookups.

To add a spelling, add its targets to `_TABLE`, remove them from `_OPAQUE` if they are there, and, if no reader fits,
write one: a function that turns the arguments into a `Contraction`.

Labels that the readers use: "k" is summed, "m" are rows, "n" outputs; "a0", "a1", ... any other dimensions of the first
factor, or those that both share; "n0", "n1", ... dimensions of the second factor; ".0", ".1", ... the dimensions of an
ellipsis; "b" the batch of a convolution, "kernel a0" a dimension of its kernel. einsum keeps the letters that the user
wrote.
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
from int8compile.sites import SkipReason

aten = torch.ops.aten


class Spelling(NamedTuple):
    """A way to write a matmul.

    Attributes:
        name: The name of the call in reports.
        parameters: Names of the call's parameters, in order.
        read: The reader. It returns the contraction, given the name and the parameters' values (None for those not
            given), or None where no equation describes the call.
    """

    name: str
    parameters: tuple[str, ...]
    read: Callable[..., Contraction | None]


def read_contraction(node: Node) -> Contraction | None:
    """Return a call as a matmul of two tensors.

    A call that can be read but not rewritten has `refused` set.

    Returns:
        None for a node that is not in the table, and for a call in the table that no equation describes, which
        `opaque_matmul` reports.
    """
    spelling = _TABLE.get(_called(node))
    if spelling is None or len(node.args) > len(spelling.parameters):
        return None
    given = dict(zip(spelling.parameters, node.args, strict=False)) | dict(node.kwargs)
    found = spelling.read(spelling.name, *(given.get(name) for name in spelling.parameters))
    unread = [name for name, value in given.items() if name not in spelling.parameters and value is not None]
    if found is not None and unread:
        return found._replace(refused=f"it is given {unread[0]}=")
    return found


def _called(node: Node) -> Any:
    """Return the key of a call in the tables, or None for a node that is no call.

    Returns:
        A function, the name of a method, or an ATen operator without its overload: exported graphs name the overload,
        Dynamo leaves it open where the user writes `torch.ops.aten.mm(x, w)`.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def is_attention(node: Node) -> bool:
    """Return whether a node is a fused attention; the report counts it as one matmul of activations."""
    return node.op == "call_function" and node.target in _ATTENTION


def opaque_matmul(node: Node) -> tuple[str, SkipReason] | None:
    """Return the name of a call that may contain matmuls, and why the weights among its arguments stay in float.

    These are the calls in `_OPAQUE`, the calls in the table that no equation describes, and custom operators.

    Returns:
        None for any other node.
    """
    called = _called(node)
    if called in _OPAQUE:
        return _OPAQUE[called]
    if called in _TABLE and read_contraction(node) is None:
        # An einsum of three tensors, for example. A convolution with a larger kernel is no matmul.
        name = _TABLE[called].name
        return None if name == "convolution" else (name, SkipReason.FORM)
    if isinstance(called, torch._ops.OpOverloadPacket) and not str(called).startswith(_KNOWN_NAMESPACES):
        return str(called), SkipReason.CUSTOM_OP
    return None


def embedding_table(node: Node) -> Node | None:
    """Return the table in which a node looks up rows; a matmul with the same parameter is tied to the embedding."""
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
    """Return a message if a dimension of size 1 is broadcast, which labels cannot express; otherwise ""."""
    sizes = [dict(zip(*each, strict=True)) for each in zip(labels, shapes, strict=True)]
    same = all(sizes[0][label] == sizes[1][label] for label in sizes[0].keys() & sizes[1].keys())
    return "" if same else "it broadcasts a dimension of size 1"


def _linear(name: str, x: Node, w: Node, bias: Node | None) -> Contraction | None:
    shapes = _shape(x), _shape(w)
    if shapes[0] is None or shapes[1] is None:
        return None
    rows = _letters(len(shapes[0]) - 1)
    outputs = ("n",) if len(shapes[1]) == 2 else ()
    return Contraction(
        name,
        (x, w),
        ((*rows, "k"), (*outputs, "k")),
        (*rows, *outputs),
        weight_role=True,
        addend=bias,
        addend_label="n",
    )


def _matmul(name: str, left: Node, right: Node) -> Contraction | None:
    shapes = _shape(left), _shape(right)
    if shapes[0] is None or shapes[1] is None or not shapes[0] or not shapes[1]:
        return None
    left_core: Labels = ("m", "k") if len(shapes[0]) > 1 else ("k",)
    right_core: Labels = ("k", "n") if len(shapes[1]) > 1 else ("k",)
    counts = len(shapes[0]) - len(left_core), len(shapes[1]) - len(right_core)
    batch = _letters(max(counts))
    labels = (*batch[len(batch) - counts[0] :], *left_core), (*batch[len(batch) - counts[1] :], *right_core)
    out = (*batch, *(label for label in (*left_core, *right_core) if label != "k"))
    return Contraction(name, (left, right), labels, out, refused=_broadcasts(labels, (shapes[0], shapes[1])))


def _addmm_in_place(name: str, *arguments: Any) -> Contraction | None:
    found = _addmm(name, *arguments)
    return found and found._replace(refused="it writes to its first argument")


def _reflected_matmul(name: str, right: Node, left: Node) -> Contraction | None:
    return _matmul(name, left, right)


def _addmm(name: str, addend: Node, left: Node, right: Node, beta: Any, alpha: Any) -> Contraction | None:
    product = _matmul(name, left, right)
    if product is None:
        return None
    return product._replace(
        addend=addend,
        addend_label=product.out[-1],
        beta=1 if beta is None else beta,
        alpha=1 if alpha is None else alpha,
    )


def _inner(name: str, left: Node, right: Node) -> Contraction | None:
    shapes = _shape(left), _shape(right)
    if shapes[0] is None or shapes[1] is None or not shapes[0] or not shapes[1]:
        return None
    lefts, rights = _letters(len(shapes[0]) - 1), _letters(len(shapes[1]) - 1, "n")
    return Contraction(name, (left, right), ((*lefts, "k"), (*rights, "k")), (*lefts, *rights))


def _tensordot(name: str, left: Node, right: Node, dims: Any) -> Contraction | None:
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
    return Contraction(name, (left, right), labels, tuple(out), refused=_broadcasts(labels, (shapes[0], shapes[1])))


def _aten_tensordot(name: str, left: Node, right: Node, dims: Any, other_dims: Any) -> Contraction | None:
    return _tensordot(name, left, right, (dims, other_dims))


def _einsum(name: str, equation: Any, *operands: Any) -> Contraction | None:
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
        name, (operands[0], operands[1]), labels, out, refused=_broadcasts(labels, (shapes[0], shapes[1]))
    )


def _numbered(labels: Any) -> str:
    """Return a term of an equation, with letters that sort as PyTorch sorts the numbers."""
    letters = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if label is ... else letters[label] for label in labels)


def _convolution(
    name: str, x: Node, w: Node, bias: Node | None, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Contraction | None:
    """Return a convolution with a kernel of size 1, which is a linear over the channels; None for any other."""
    del dilation  # Means nothing to a kernel of size 1.
    shapes = _shape(x), _shape(w)
    if shapes[0] is None or shapes[1] is None or any(size != 1 for size in shapes[1][2:]):
        return None
    space = _letters(len(shapes[1]) - 2)
    batch = ("b",) if len(shapes[0]) == len(shapes[1]) else ()
    steps = tuple((label, step) for label, step in zip(space, _each(stride, 1, space), strict=True) if step != 1)
    ones = tuple(f"kernel {label}" for label in space)
    refused = ""
    if groups not in (None, 1):
        refused = "its channels are in groups"
    elif padding not in ("valid", "same") and any(_each(padding, 0, space)):
        refused = "it pads its input"
    return Contraction(
        name,
        (x, w),
        ((*batch, "k", *space), ("n", "k", *ones)),
        (*batch, "n", *space),
        weight_role=True,
        addend=bias,
        addend_label="n",
        steps=steps,
        ones=ones,
        refused=refused,
    )


def _aten_convolution(
    name: str,
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
    return None if transposed else _convolution(name, x, w, bias, stride, padding, dilation, groups)


def _each(value: Any, default: int, space: Labels) -> list[Any]:
    """Return a convolution's parameter for each dimension of space, from a number or a list."""
    if value is None:
        value = default
    if isinstance(value, (list, tuple)):
        return list(value) * (len(space) if len(value) == 1 else 1)
    return [value] * len(space)


_ADDMM = Spelling("addmm", ("input", "mat1", "mat2", "beta", "alpha"), _addmm)
_ADDMM_IN_PLACE = _ADDMM._replace(read=_addmm_in_place)
_ADDMV = Spelling("addmv", ("input", "mat", "vec", "beta", "alpha"), _addmm)
_ADDMV_IN_PLACE = _ADDMV._replace(read=_addmm_in_place)
_BADDBMM = Spelling("baddbmm", ("input", "batch1", "batch2", "beta", "alpha"), _addmm)
_BADDBMM_IN_PLACE = _BADDBMM._replace(read=_addmm_in_place)
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

# Keys are functions, names of methods, and ATen operators without their overload.
_TABLE: dict[Any, Spelling] = {
    torch.addmm: _ADDMM,
    "addmm": _ADDMM,
    aten.addmm: _ADDMM,
    "addmm_": _ADDMM_IN_PLACE,
    aten.addmm_: _ADDMM_IN_PLACE,
    torch.addmv: _ADDMV,
    "addmv": _ADDMV,
    aten.addmv: _ADDMV,
    torch.addmv_: _ADDMV_IN_PLACE,
    "addmv_": _ADDMV_IN_PLACE,
    aten.addmv_: _ADDMV_IN_PLACE,
    torch.baddbmm: _BADDBMM,
    "baddbmm": _BADDBMM,
    aten.baddbmm: _BADDBMM,
    "baddbmm_": _BADDBMM_IN_PLACE,
    aten.baddbmm_: _BADDBMM_IN_PLACE,
    torch.bmm: _BMM,
    "bmm": _BMM,
    aten.bmm: _BMM,
    torch.conv1d: _CONVOLUTION,
    torch.conv2d: _CONVOLUTION,
    torch.conv3d: _CONVOLUTION,
    aten.conv1d: _CONVOLUTION,
    aten.conv2d: _CONVOLUTION,
    aten.conv3d: _CONVOLUTION,
    torch.convolution: _ATEN_CONVOLUTION,
    aten.convolution: _ATEN_CONVOLUTION,
    torch.einsum: _EINSUM,
    aten.einsum: _EINSUM,
    torch.inner: _INNER,
    "inner": _INNER,
    aten.inner: _INNER,
    torch.nn.functional.linear: _LINEAR,
    aten.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.linalg.matmul: _MATMUL,
    aten.linalg_matmul: _MATMUL,
    operator.matmul: _MATMUL,
    operator.imatmul: _MATMUL,  # Tensors have no __imatmul__: `x @= w` is `x = x @ w`.
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    "__rmatmul__": Spelling("matmul", ("input", "other"), _reflected_matmul),
    aten.matmul: _MATMUL,
    torch.mm: _MM,
    "mm": _MM,
    aten.mm: _MM,
    torch.mv: _MV,
    "mv": _MV,
    aten.mv: _MV,
    torch.tensordot: Spelling("tensordot", ("a", "b", "dims"), _tensordot),
    aten.tensordot: Spelling("tensordot", ("self", "other", "dims_self", "dims_other"), _aten_tensordot),
}

_ATTENTION = {
    torch.nn.functional.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
}

# Calls that hide matmuls, and why their weights stay in float; keys as in `_TABLE`.
_OPAQUE: dict[Any, tuple[str, SkipReason]] = {
    torch._transformer_encoder_layer_fwd: ("transformer_encoder_layer", SkipReason.FUSED_OP),
    torch._native_multi_head_attention: ("multi_head_attention", SkipReason.FUSED_OP),
    torch.nn.functional.multi_head_attention_forward: ("multi_head_attention", SkipReason.FUSED_OP),
    torch.addbmm: ("addbmm", SkipReason.FORM),
    "addbmm": ("addbmm", SkipReason.FORM),
    "addbmm_": ("addbmm", SkipReason.FORM),
    torch.chain_matmul: ("chain_matmul", SkipReason.FORM),
    torch.linalg.multi_dot: ("multi_dot", SkipReason.FORM),
    torch._grouped_mm: ("grouped_mm", SkipReason.FORM),
    aten._grouped_mm: ("grouped_mm", SkipReason.FORM),
    torch.nn.functional.bilinear: ("bilinear", SkipReason.FORM),
    aten._transformer_encoder_layer_fwd: ("transformer_encoder_layer", SkipReason.FUSED_OP),
    aten._native_multi_head_attention: ("multi_head_attention", SkipReason.FUSED_OP),
    aten.addbmm: ("addbmm", SkipReason.FORM),
    aten.addbmm_: ("addbmm", SkipReason.FORM),
    aten.chain_matmul: ("chain_matmul", SkipReason.FORM),
    aten.linalg_multi_dot: ("multi_dot", SkipReason.FORM),
    aten.bilinear: ("bilinear", SkipReason.FORM),
}

for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    for _operator in (_name, f"{_name}_cell"):
        _OPAQUE |= dict.fromkeys((getattr(torch, _operator), getattr(aten, _operator)), (_name, SkipReason.FORM))

# PyTorch's namespaces and this package's. Operators of any other namespace are custom operators.
_KNOWN_NAMESPACES = ("aten.", "aten::", "prims.", "prim.", "int8compile.")

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
