"""Fuse norms with the quantization of their results: residual add, norm and `quantize_rows` become one operator.

    quantize_rows(norm(x + residual)) -> norm_quantize_rows(x, residual, ...)

A decode layer then has one launch for the three. A norm is matched in Dynamo's and in exported graphs: a call of
`rms_norm` or `layer_norm`, or a chain `x * rsqrt(mean(x ** 2) + eps)`, with or without a weight, in any order of
operands. Other readers of the sum get it from the operator.

The operator computes `int8compile.ops.quantized.norm`: in float32, rounded where the model rounds. Only the order of
its sums and float32 products differs from PyTorch's. Before quantization, its result therefore differs from PyTorch's
in the last bits of float32, and rarely, by one step, in bfloat16 and float16.

A norm that is found but not fused gets a reason.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from int8compile import ops
from int8compile.ops import quantized
from int8compile.ops.declaration import SUPPORTED_DTYPES
from int8compile.passes.names import module_path
from int8compile.passes.siblings import not_fused
from int8compile.passes.static import SAME_VALUES, may_be_view, meta_tensor, traced
from int8compile.sites import FusionReason, NotFused

aten = torch.ops.aten

# Each operation as Dynamo's and exported graphs spell it, with the names of its arguments.
_NORM = ("input", "normalized_shape", "weight")
_SPELLINGS: dict[str, tuple[set[Any], tuple[str, ...]]] = {
    "add": ({operator.add, torch.add, "add", aten.add.Tensor, aten.add.Scalar}, ("input", "other", "alpha")),
    "iadd": ({operator.iadd, "add_", aten.add_.Tensor}, ("input", "other", "alpha")),
    "sub": ({operator.sub, torch.sub, "sub", aten.sub.Tensor}, ("input", "other", "alpha")),
    "mul": ({operator.mul, torch.mul, "mul", aten.mul.Tensor}, ("input", "other")),
    "div": ({operator.truediv, torch.div, "div", aten.div.Tensor}, ("input", "other")),
    "pow": ({operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar}, ("input", "exponent")),
    "square": ({torch.square, "square", aten.square.default}, ("input",)),
    "sqrt": ({torch.sqrt, "sqrt", aten.sqrt.default}, ("input",)),
    "rsqrt": ({torch.rsqrt, "rsqrt", aten.rsqrt.default}, ("input",)),
    "mean": ({torch.mean, "mean", aten.mean.dim}, ("input", "dim", "keepdim")),
    "rms_norm": ({F.rms_norm, torch.rms_norm, aten.rms_norm.default, aten._fused_rms_norm.default}, (*_NORM, "eps")),
    "layer_norm": (
        {
            F.layer_norm,
            torch.layer_norm,
            torch.native_layer_norm,
            aten.layer_norm.default,
            aten.native_layer_norm.default,
        },
        (*_NORM, "bias", "eps", "cudnn_enable"),
    ),
    "first": ({operator.getitem}, ("input", "index")),
}
_OPERATIONS = {target: name for name, (targets, _) in _SPELLINGS.items() for target in targets}

# Views that may keep whole rows.
_VIEWS: set[Any] = {
    *("view", "reshape", "flatten", torch.reshape, torch.flatten),
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints),
}
_SIZES: set[Any] = {"size", aten.sym_size.int}
_FLOATS = set(SUPPORTED_DTYPES)


class NotFusedError(Exception):
    """A norm is not fused with the quantization of its result.

    Attributes:
        verdict: The reason, and what was found.
    """

    def __init__(self, reason: FusionReason, detail: str = "") -> None:
        super().__init__(reason.why(detail))
        self.verdict = reason, detail


@dataclasses.dataclass
class Norm:
    """A norm over the last dimension.

    Attributes:
        x: The node of the input.
        kind: Its number in `int8compile.ops.quantized`.
        eps: The number that is added to the mean of squares.
        weight: The node of the vector that the result is multiplied by; None where there is none.
        bias: The node of the vector that is added to it; None where there is none.
    """

    x: Node
    kind: int
    eps: float
    weight: Node | None = None
    bias: Node | None = None


class _Match:
    """An attempt to read a norm from its result.

    Attributes:
        result: The node of its result.
        nodes: The nodes that compute the norm, the result among them.
        widened: The nodes before them that convert x, weight and bias to float32.
    """

    def __init__(self, result: Node) -> None:
        self.nodes: list[Node] = []
        self.widened: list[Node] = []
        self.result = result
        self._dtype = traced(result).dtype

    def norm(self) -> Norm | None:
        """Return the norm; None where the result is not made by a norm.

        Raises:
            NotFusedError: The operator does not compute this norm.
        """
        inner = self._made_from(self.result)
        found = self._by_function(inner) or self._by_chain(inner)
        if found is None:
            if _is_like_a_norm(self.result):
                raise NotFusedError(FusionReason.FORM)
            return None
        self._check(found)
        return found

    def _check(self, found: Norm) -> None:
        x = traced(found.x)
        for name, vector in (("weight", found.weight), ("bias", found.bias)):
            if vector is not None and not _fits(traced(vector), x):
                raise NotFusedError(FusionReason.NO_VECTOR, name)
        if x.dtype != self._dtype:
            if found.weight is not None and traced(found.weight).dtype != x.dtype:
                raise NotFusedError(FusionReason.DTYPES, _two_dtypes(found.weight, found.x))
            raise NotFusedError(FusionReason.DTYPES, f"it makes {_name(self._dtype)} of {_name(x.dtype)}")
        if any(tensor.requires_grad for node in self.nodes if (tensor := meta_tensor(node)) is not None):
            raise NotFusedError(FusionReason.RECORDED)

    def _made_from(self, node: Any) -> Any:
        """Follow a node back through views of whole rows, and casts that round at most to the result's dtype."""
        while _is_cast(node) or _is_view_of_rows(node):
            made, given = traced(node).dtype, traced(node.args[0]).dtype
            if made not in (given, self._dtype, torch.float32):
                break
            self.nodes.append(node)
            node = node.args[0]
        return node

    def _given(self, node: Any, dtype: torch.dtype | None = None) -> Any:
        """Follow x, or a weight, back through casts that lose nothing, but not past a node of the given dtype."""
        while _is_cast(node):
            made, given = traced(node).dtype, traced(node.args[0]).dtype
            if made != given and (made != torch.float32 or made == dtype):
                break
            self.widened.append(node)
            node = node.args[0]
        return node

    def _by_function(self, node: Any) -> Norm | None:
        """Read a call of one of PyTorch's functions."""
        first = _call(node, "first")
        # The first of several tensors. Of a call that returns the norm alone, it would be the first row.
        several = first is not None and meta_tensor(first["input"]) is None
        call = first["input"] if first and several and first["index"] == 0 else node
        given = _call(call, "rms_norm", "layer_norm")
        if given is None:
            return None
        if len(given["normalized_shape"]) != 1:
            raise NotFusedError(FusionReason.DIMENSIONS)
        self.nodes += dict.fromkeys((node, call))
        layer = _OPERATIONS[call.target] == "layer_norm"
        eps = given.get("eps", 1e-5 if layer else None)
        if eps is None:
            # PyTorch uses the eps of the dtype that it computes in, which is float32 for all supported dtypes.
            eps = torch.finfo(torch.float32).eps
        x = self._given(given["input"], self._dtype)
        weight, bias = (self._given(given.get(name)) for name in ("weight", "bias"))
        return Norm(x, quantized.LAYER if layer else quantized.RMS, eps, weight, bias)

    def _by_chain(self, node: Any) -> Norm | None:
        """Read a norm that a model computes in steps."""
        if found := self._normalized(node):
            return found
        for factor, weight in _operands(node, "mul"):
            before = [*self.nodes]
            inner = self._made_from(factor)
            if isinstance(weight, Node) and _is_cast(inner) and self._normalized(inner.args[0]):
                raise NotFusedError(FusionReason.DTYPES, _two_dtypes(weight, inner))
            rounded = any(traced(cast).dtype != torch.float32 for cast in self.nodes[len(before) :])
            if not isinstance(weight, Node) or not (found := self._normalized(inner)):
                self.nodes = before
                continue
            self.nodes.append(node)
            weight = self._given(weight)
            if rounded and found.kind == quantized.LAYER:
                return None
            if rounded:
                return dataclasses.replace(found, weight=weight, kind=quantized.RMS_ROUNDED)
            for vector, one in _operands(weight, "add"):
                if found.kind == quantized.RMS and one == 1 and traced(weight).dtype == torch.float32:
                    self.widened.append(weight)
                    return dataclasses.replace(found, weight=self._given(vector), kind=quantized.RMS_PLUS_ONE)
            return dataclasses.replace(found, weight=weight)
        return None

    def _normalized(self, node: Any) -> Norm | None:
        """Read x * rsqrt(mean(x ** 2) + eps), or the same of x - mean(x)."""
        for x, inverse in _operands(node, "mul"):
            shifted = _inverse_root(inverse)
            for mean, eps in _operands(shifted, "add"):
                squares = _mean_of_rows(mean)
                steps = [node, inverse, shifted, mean, squares]
                origin, kind, rows = self._rows(x, steps)
                same = (origin, kind) == self._rows(_squared(squares), steps)[:2]
                if not same or origin is None or not isinstance(eps, int | float):
                    continue
                for step in steps:
                    if traced(step).dtype != torch.float32:
                        raise NotFusedError(FusionReason.PRECISION, _name(traced(step).dtype))
                self.nodes += dict.fromkeys(steps)
                return Norm(rows, kind, eps)
        return None

    def _rows(self, node: Any, steps: list[Node]) -> tuple[Any, int, Any]:
        """Follow x, or x - mean(x), back to where x comes from; with the kind of norm, and x in the result's dtype."""
        inner = self._given(node)
        if given := _call(inner, "sub"):
            origin = self._given(given["input"])
            if origin is self._given(_mean_of_rows(given["other"])):
                steps += (inner, given["other"])
                return origin, quantized.LAYER, self._given(given["input"], self._dtype)
        return inner, quantized.RMS, self._given(node, self._dtype)


class NormFusion:
    """The fusion of norms in a graph, one activation after the other.

    Attributes:
        fused: The number of norms that were fused.
        unfused: The other norms, with the reason.
    """

    def __init__(self, graph: Graph, stretches: Mapping[Node, int], readers: Mapping[Node, tuple[Any, ...]]) -> None:
        """Prepare for a graph.

        Args:
            graph: The graph.
            stretches: The number of barriers in front of each of its nodes.
            readers: The linears that read quantized activations, each with d, threshold and stretch. Those with the
                same x and the same values share a quantization.
        """
        self.fused = 0
        self.unfused: list[NotFused] = []
        self._graph = graph
        self._stretches = stretches
        self._readers = readers
        self._seen: set[Node] = set()
        self._unread: list[Node] = []

    def quantize(self, result: Node, d: Node | None, threshold: float, stretch: int) -> Node | None:
        """Append a norm with the quantization of its result, at the graph's insertion point or in place of the sum.

        Returns:
            The operator's node; None where there is no norm that can be fused.
        """
        if result in self._seen:
            return None
        self._seen.add(result)
        match = _Match(result)
        try:
            norm = match.norm()
            if norm is None:
                return None
            self._check(match, norm, (d, threshold, stretch))
        except NotFusedError as why:
            self.unfused.append(not_fused("norm", result, why.verdict))
            return None
        rest = (norm.weight, norm.bias, d, norm.kind, float(norm.eps), threshold)
        self._unread += [*match.nodes, *match.widened]
        call = self._append(norm.x, match, stretch, rest)
        for node in match.nodes:
            for user in list(node.users):
                if user.target in _SIZES:
                    user.replace_input_with(node, call.args[0])  # type: ignore[arg-type]
        self.fused += 1
        return call

    def clean(self) -> None:
        """Erase the nodes of fused norms, once no linear reads them any more."""
        for node in sorted(dict.fromkeys(self._unread), reverse=True):
            self._erase_idle(node)
            if not node.users:
                self._graph.erase_node(node)

    def _check(self, match: _Match, norm: Norm, key: tuple[Any, ...]) -> None:
        """Raise NotFusedError for a norm that has other readers, or cannot move to its quantization."""
        result, x = match.result, traced(norm.x)
        for node in match.nodes:
            for user in node.users:
                if user in match.nodes or _is_idle(user):
                    continue
                if user.target in _SIZES and traced(node).shape == x.shape:
                    continue
                if node is not result or user not in self._readers or result in user.args[1:]:
                    raise NotFusedError(FusionReason.READ_ELSEWHERE, f"by {_call_name(user)}")
                if self._readers[user][:-1] != key[:-1]:
                    raise NotFusedError(FusionReason.ROTATED_APART)
                if self._readers[user] != key:
                    raise NotFusedError(FusionReason.SWITCHED)
        if any(self._stretches.get(node) != key[-1] for node in (*match.nodes, *match.widened)):
            raise NotFusedError(FusionReason.SWITCHED)
        if any(traced(user).dtype != traced(result).dtype for user in result.users if user in self._readers):
            raise NotFusedError(FusionReason.ROUNDED)
        if traced(result).dim() != 2 and traced(result).shape != x.shape:
            raise NotFusedError(FusionReason.RESHAPED)

    def _append(self, x: Node, match: _Match, stretch: int, rest: tuple[Any, ...]) -> Node:
        """Append the operator. Where x is a sum that it can compute too, it takes the place of the sum."""
        terms = self._terms(x, stretch)
        last = max(node for node in (x, *rest) if isinstance(node, Node))
        gone = {*match.nodes}
        # From the last to the first, because a node that stays keeps the nodes that it is made from.
        for node in sorted({*match.widened}, reverse=True):
            if {*node.users} <= gone:
                gone.add(node)
        if terms is None or not all(last < user for user in x.users if user not in gone and not _is_idle(user)):
            return self._graph.call_function(ops.norm_quantize_rows.default, (x, None, *rest))
        with self._graph.inserting_after(last):
            call = self._graph.call_function(ops.norm_quantize_rows.default, (*terms, *rest))
        with self._graph.inserting_after(call):
            total = self._graph.call_function(operator.getitem, (call, 0))
        total.meta.update(x.meta)
        self._erase_idle(x)
        x.replace_all_uses_with(total)
        self._graph.erase_node(x)
        return call

    def _erase_idle(self, node: Node) -> None:
        for user in list(node.users):
            if _is_idle(user):
                self._graph.erase_node(user)

    def _terms(self, add: Node, stretch: int) -> tuple[Node, Node] | None:
        """Return the terms of a sum, where they are two tensors that the operator can add; None otherwise."""
        given = _call(add, "add", "iadd")
        if given is None or self._stretches.get(add) != stretch:
            return None
        total, terms = traced(add), (given["input"], given["other"])
        for part in map(meta_tensor, terms):
            if part is None or (part.shape, part.dtype, part.device) != (total.shape, total.dtype, total.device):
                return None
        in_place = _OPERATIONS[add.target] == "iadd" and not _is_temporary(terms[0])
        return terms if total.is_contiguous() and not in_place else None


def _call(node: Any, *names: str) -> dict[str, Any] | None:
    """Return the arguments of a call of one of some operations; None for anything else."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    name = _OPERATIONS.get(node.target)
    if name not in names:
        return None
    _, parameters = _SPELLINGS[name]
    given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
    known = len(node.args) <= len(parameters) and set(given) <= set(parameters)
    return given if known and given.pop("alpha", 1) == 1 else None


def _operands(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield the operands of a commutative operation, in both orders; nothing for anything else."""
    if given := _call(node, name):
        yield given["input"], given["other"]
        yield given["other"], given["input"]


def _mean_of_rows(node: Any) -> Any:
    """Return x where a node is its mean over the last dimension, which is kept; None for any other node."""
    given = _call(node, "mean")
    if given is None or given.get("keepdim") is not True:
        return None
    dims = given.get("dim")
    dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
    return given["input"] if dim in (-1, traced(node).dim() - 1) else None


def _squared(node: Any) -> Any:
    """Return x where a node is its square; None for any other node."""
    given = _call(node, "pow", "square", "mul")
    same = given is not None and given.get("exponent", 2) == 2 and given.get("other", given["input"]) is given["input"]
    return given["input"] if given is not None and same else None


def _inverse_root(node: Any) -> Any:
    """Return x where a node is `1 / sqrt(x)`; None for any other node."""
    given = _call(node, "rsqrt", "pow")
    return given["input"] if given is not None and given.get("exponent", -0.5) == -0.5 else None


def _is_cast(node: Any) -> bool:
    """Return whether a node casts a float tensor on the same device to another float dtype."""
    made, given = meta_tensor(node), meta_tensor(node.args[0]) if isinstance(node, Node) and node.args else None
    if made is None or given is None or node.target not in SAME_VALUES:
        return False
    return made.device == given.device and made.shape == given.shape and {made.dtype, given.dtype} <= _FLOATS


def _is_view_of_rows(node: Any) -> bool:
    if not isinstance(node, Node) or node.target not in _VIEWS or node.op not in ("call_function", "call_method"):
        return False
    made, given = meta_tensor(node), meta_tensor(node.args[0])
    return made is not None and given is not None and made.dtype == given.dtype and made.shape[-1:] == given.shape[-1:]


def _is_temporary(node: Node) -> bool:
    """Return whether one call alone sees a tensor, so that writing to it can be left out."""
    if node.op not in ("call_function", "call_method") or len(node.users) != 1:
        return False
    return all(_is_temporary(given) for given in node.all_input_nodes if may_be_view(node, given))


def _is_idle(node: Node) -> bool:
    """Return whether a node of an exported graph only asserts metadata, or takes a result that nothing reads."""
    return node.target is aten._assert_tensor_metadata.default or (node.target is operator.getitem and not node.users)


def _is_like_a_norm(node: Node) -> bool:
    """Return whether a node is made from a norm of any form: through casts, products, and sums with products."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if _call(node, "rms_norm", "layer_norm", "sqrt") or _inverse_root(node) is not None:
            return True
        inputs = node.all_input_nodes if _is_cast(node) or _is_view_of_rows(node) or _call(node, "mul", "div") else []
        if _call(node, "add"):
            inputs = [given for given in node.all_input_nodes if _call(given, "mul")]
        pending += [given for given in inputs if given not in seen]
        seen.update(inputs)
    return False


def _fits(vector: Tensor, x: Tensor) -> bool:
    return vector.shape == x.shape[-1:] and vector.device == x.device and vector.is_floating_point()


def _call_name(node: Node) -> str:
    name, path = getattr(node.target, "__name__", str(node.target)), module_path(node)
    return f"{name} in {path}" if path else name


def _two_dtypes(weight: Node, x: Node) -> str:
    return f"its weight is {_name(traced(weight).dtype)} and x {_name(traced(x).dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
