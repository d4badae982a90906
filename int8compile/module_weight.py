"""The weight of an int8 module, for code that reads it instead of calling the module.

`F.linear(x, self.qkv.weight, bias)` in a parent, or `x @ encoder.weight` in a tied autoencoder: matmuls run in
int8. The passes that rewrite graphs find them, in every spelling that these know. Under torch.compile the weight is the
operator `int8compile::module_weight`; in eager mode each call becomes a graph of its own, once for each combination of
sizes. Anything else that reads the weight gets it in float.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from int8compile import ops
from int8compile.config import Int8Config
from int8compile.errors import Int8Warning, Int8WeightError
from int8compile.passes import PlaceholderBinder, rewrite_graph
from int8compile.passes.module_weights import STORED
from int8compile.passes.static import SAME_VALUES, is_view, scaling, static_weight, written
from int8compile.weights import METADATA, STORE


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A weight in int8, and how it is multiplied with.

    Attributes:
        qweight: [..., N, K] int8.
        scale: [..., N] float32.
        dtype: What it is dequantized to.
        threshold: See `Int8Config`.
        outliers: See `Int8Config`.
        weight_only: Whether activations stay in float.
        path: The module's, for messages.
    """

    qweight: Tensor
    scale: Tensor
    dtype: torch.dtype
    threshold: float
    outliers: str
    weight_only: bool
    path: str

    def in_float(self) -> Tensor:
        """The weight dequantized, [..., N, K], by an operator that the passes know."""
        result: Tensor = ops.module_weight.default(
            self.qweight, self.scale, self.dtype, self.threshold, self.outliers, self.weight_only
        )
        return result


class Step:
    """A call that a weight is read through, of which the weight is the first argument.

    Args:
        func: As `__torch_function__` is given it.
        args: The other arguments.
        kwargs: The keyword arguments.
    """

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, tuple(args), dict(kwargs)

    def __call__(self, value: Any) -> Any:
        """Makes the call."""
        return self.func(value, *self.args, **self.kwargs)

    def append(self, node: Node) -> Node:
        """Appends the call to a graph."""
        return _append(node.graph, self.func, (node, *self.args), self.kwargs)


class Int8Weight(Tensor):
    """A float weight of which there is only the int8 one; it has the shape, strides, dtype and device of the float one.

    A matmul with it, or with a view of it, runs in int8. Multiplying it in place by a number multiplies the scales;
    other writes raise `Int8WeightError`. Whatever else reads it gets the dequantized weight, with one warning.
    """

    # What transformers asks before it initializes a weight.
    _is_hf_initialized = True

    held: Held
    # The last makes this tensor of what the others make of the module's weight.
    steps: tuple[Step, ...]
    # Whether it is the module's weight itself, or another name for the same memory.
    whole: bool

    @classmethod
    def make(cls, held: Held, like: Tensor, steps: tuple[Step, ...] = (), *, whole: bool = True) -> Int8Weight:
        """Makes one of the sizes, strides and dtype of a tensor without data."""
        made = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=held.qweight.device,
        )
        made.held, made.steps, made.whole = held, steps, whole
        return made

    def in_float(self) -> Tensor:
        """The values, dequantized."""
        value = self.held.in_float()
        for step in self.steps:
            value = step(value)
        return value

    def check_is(self, value: Any) -> None:
        """Raises `Int8WeightError` unless what is assigned in its place is the same weight: `weight.data *= 2`."""
        if not (isinstance(value, Int8Weight) and value.whole and value.held.qweight is self.held.qweight):
            raise _not_writable(self, "an assignment")

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo would compile it by itself.
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[0], cls):  # type: ignore[attr-defined]
            return args[0].check_is(args[1])
        leaves, spec = tree_flatten((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            if all(map(_is_dense, leaves)):
                key = (func, str(spec), *map(_signature, leaves))
                plan = _PLANS.get(key)
                if plan is None:
                    if len(_PLANS) >= _MOST_PLANS:
                        _PLANS.clear()
                    plan = _PLANS[key] = _plan(func, leaves, spec)
            else:
                plan = functools.partial(_read, func, spec)
        return plan(leaves)

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What has gone past __torch_function__: other subclasses, and code below PyTorch's Python.
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.is_write and isinstance(value, cls):
                raise _not_writable(value, _name(func))
        args, kwargs = tree_map(functools.partial(_in_float, func), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        about = f"shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}"
        return f"Int8Weight({self.held.path!r}, {about})"


# What to do with a call, by what it is given.
Plan = Callable[[list[Any]], Any]
_PLANS: dict[Any, Plan] = {}
_MOST_PLANS = 1024


def _is_dense(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or (leaf.layout == torch.strided and not leaf.is_nested)


def _signature(leaf: Any) -> Any:
    """What a plan depends on."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    about = (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if not isinstance(leaf, Int8Weight):
        return *about, leaf.requires_grad, leaf.layout
    held = leaf.held
    return (
        *about,
        held.qweight.shape,
        held.dtype,
        held.threshold,
        held.outliers,
        held.weight_only,
        held.path,
        leaf.steps,
    )


def _plan(func: Any, leaves: list[Any], spec: Any) -> Plan:
    """Finds out what a call is."""
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Int8Weight)]
    read: Plan = functools.partial(_read, func, spec)
    try:
        call = _Call(func, leaves, spec)
    except Exception:  # The call itself raises what is wrong with it.
        return read
    changed = written(call.node)
    for position in positions:
        if call.inputs[position] in changed:
            factor = scaling(call.node)
            if factor is None or not leaves[position].whole or call.node.args[0] is not call.inputs[position]:
                raise _not_writable(leaves[position], _name(func))
            return functools.partial(_scale, position, factor)
    (first, *others) = positions
    if not others and is_view(call.node) and call.node.args[0] is call.inputs[first]:
        return call.view(first) or read
    return call.product() or read


class _Call:
    """A call as a graph: tensors become placeholders, and int8 weights the operator that stands for them.

    Plans are kept, so they must not hold it: it holds the tensors.

    Attributes:
        inputs: The nodes that the call is given, by the positions of its tensors.
        node: The call.
    """

    def __init__(self, func: Any, leaves: list[Any], spec: Any) -> None:
        self._func, self._leaves, self._spec = func, leaves, spec
        graph = Graph()
        self._placeholders: dict[int, tuple[Node, ...]] = {}
        self.inputs: dict[int, Node] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Int8Weight):
                held = leaf.held
                stored = graph.placeholder(f"qweight_{i}"), graph.placeholder(f"scale_{i}")
                for node, tensor in zip(stored, (held.qweight, held.scale), strict=True):
                    node.meta |= {"example_value": _without_data(tensor), **STORED}
                self._placeholders[i] = stored
            elif isinstance(leaf, Tensor):
                self.inputs[i] = graph.placeholder(f"input_{i}")
                self.inputs[i].meta["example_value"] = _without_data(leaf)
                self._placeholders[i] = (self.inputs[i],)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Int8Weight):
                held = leaf.held
                options = (held.dtype, held.threshold, held.outliers, held.weight_only)
                node = _append(graph, ops.module_weight.default, (*self._placeholders[i], *options), {})
                for step in leaf.steps:
                    node = step.append(node)
                self.inputs[i] = node
        given = [self.inputs.get(i, leaf) for i, leaf in enumerate(leaves)]
        self.node = _append(graph, func, *tree_unflatten(given, spec))
        self.node.meta["nn_module_stack"] = {"": (self._held.path, None)}

    @property
    def _held(self) -> Held:
        held: Held = next(leaf.held for leaf in self._leaves if isinstance(leaf, Int8Weight))
        return held

    def view(self, position: int) -> Plan | None:
        """A plan that makes a view of a weight; None where what it makes is none, but a copy on another device."""
        weight, like = self._leaves[position], self.inputs[position].meta["example_value"]
        args, kwargs = tree_unflatten(self._leaves, self._spec)
        step = Step(self._func, args[1:], kwargs)
        # Sizes do not matter to where a result is, and to its dtype.
        empty = torch.empty((0,) * weight.dim(), dtype=weight.dtype, device=weight.device)
        if self.node.target in SAME_VALUES and step(empty).device != weight.device:
            return None
        made = self.node.meta["example_value"]
        if len(self.inputs) > 1:  # `weight.type_as(x)`, of which the plan is to keep the dtype and not x.
            step = Step(Tensor.to, (made.dtype,), {})
        nodes = [self.node]
        if not isinstance(made, Tensor):
            nodes = [_append(self.node.graph, operator.getitem, (self.node, i), {}) for i in range(len(made))]
        (source,) = self.node.graph.find_nodes(op="call_function", target=ops.module_weight.default)
        if any(static_weight(node, {source: source.meta["example_value"]}) is None for node in nodes):
            return None
        results = [node.meta["example_value"] for node in nodes]

        def is_whole(result: Tensor) -> bool:
            same_memory = result.untyped_storage()._cdata == like.untyped_storage()._cdata
            return same_memory and (result.shape, result.stride()) == (like.shape, like.stride())

        if isinstance(made, Tensor):
            whole = is_whole(made)
            return lambda leaves: _viewed(leaves[position], made, (step,), whole)
        takes = [Step(operator.getitem, (i,), {}) for i in range(len(results))]
        return lambda leaves: type(made)(
            _viewed(leaves[position], result, (step, take), False) for result, take in zip(results, takes, strict=True)
        )

    def product(self) -> Plan | None:
        """A plan that multiplies in int8; None where the call has no matmul, or none with an int8 counterpart."""
        graph, made = self.node.graph, self.node.meta["example_value"]
        if isinstance(made, tuple):
            parts = [_append(graph, operator.getitem, (self.node, i), {}) for i in range(len(made))]
            graph.output(tuple(None if made[i] is None else part for i, part in enumerate(parts)))
        else:
            graph.output(self.node)
        module = GraphModule({}, graph)
        binder = PlaceholderBinder(module)
        stored = {node: i for i, nodes in self._placeholders.items() if len(nodes) > 1 for node in nodes}
        parameters = {node: node.meta["example_value"] for node in stored}
        report = rewrite_graph(module, parameters, Int8Config(), binder)
        if not report.rewritten:
            return None
        for note in report.notes:
            warn_once(note)
        views = [(stored[slot.members[0].source], slot.members[0].view) for slot in binder.slots]
        order = list(self._placeholders)

        def run(leaves: list[Any]) -> Any:
            inputs: list[Tensor] = []
            for i in order:
                leaf = leaves[i]
                inputs += (leaf.held.qweight, leaf.held.scale) if isinstance(leaf, Int8Weight) else (leaf,)
            for i, view in views:
                held = leaves[i].held
                weight = STORE.get(held.qweight, view, held.path, scale=held.scale)
                inputs += (weight.qweight, weight.scale)
            return module(*inputs)

        return run


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _append(graph: Graph, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
    """Appends a call as Dynamo would write it, with what it makes of tensors without data."""
    name = getattr(func, "__name__", "")
    if func in _GETTERS:
        node = graph.call_function(getattr, (args[0], _GETTERS[func]))
    elif func == Tensor.data.__get__:  # type: ignore[attr-defined]
        node = graph.call_method("detach", tuple(args))
    elif getattr(Tensor, name, None) is not func:
        node = graph.call_function(func, tuple(args), dict(kwargs))
    elif name.startswith("__") and hasattr(operator, name.strip("_")) and name != "__rmatmul__":
        node = graph.call_function(getattr(operator, name.strip("_")), tuple(args), dict(kwargs))
    else:
        node = graph.call_method(name, tuple(args), dict(kwargs))
    args, kwargs = torch.fx.node.map_arg((tuple(args), dict(kwargs)), lambda arg: arg.meta["example_value"])
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        node.meta["example_value"] = func(*args, **kwargs)
    return node


_GETTERS = {getattr(Tensor, name).__get__: name for name in ("T", "mT", "H", "mH")}


def _viewed(weight: Int8Weight, like: Tensor, steps: tuple[Step, ...], whole: bool) -> Int8Weight:
    return Int8Weight.make(weight.held, like, (*weight.steps, *steps), whole=whole and weight.whole)


def _read(func: Any, spec: Any, leaves: list[Any]) -> Any:
    args, kwargs = tree_unflatten([_in_float(func, leaf) for leaf in leaves], spec)
    return func(*args, **kwargs)


def _in_float(func: Any, leaf: Any) -> Any:
    if not isinstance(leaf, Int8Weight):
        return leaf
    warn_once(
        f"{leaf.held.path or 'an int8 module'}: {_name(func)} reads its weight, which is dequantized for that at every "
        "call. Matmuls with it run in int8; skip_modules leaves it in float"
    )
    return leaf.in_float()


@functools.cache
def warn_once(message: str) -> None:
    """Warns, unless it has said the same before."""
    warnings.warn(message, Int8Warning, stacklevel=2)


def _scale(position: int, factor: float, leaves: list[Any]) -> Int8Weight:
    weight: Int8Weight = leaves[position]
    with torch.no_grad():
        weight.held.scale.mul_(abs(factor))
        if factor < 0:
            weight.held.qweight.neg_()  # Its least value is -127.
    return weight


def _not_writable(weight: Int8Weight, what: str) -> Int8WeightError:
    return Int8WeightError(
        f"{weight.held.path or 'an int8 module'}: {what} would write to its weight, which is int8; all of it "
        "can be multiplied by a number. int8compile.dequantize_(model) makes a float model; skip_modules leaves a "
        "module in float"
    )


def _name(func: Any) -> str:
    return torch.overrides.resolve_name(func) or str(func)
