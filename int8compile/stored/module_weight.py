"""The weight of an int8 module, for callers that read it instead of calling the module.

`F.linear(x, self.qkv.weight, bias)` in a parent, or `x @ encoder.weight` in a tied autoencoder: matmuls run in
int8. The passes that rewrite graphs find them, in every spelling that they know. Under torch.compile the weight is the
operator `int8compile::module_weight`; in eager mode each call becomes a graph of its own, once for each combination of
sizes. What else reads the weight gets it in float.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_unflatten

from int8compile import ops
from int8compile.config import Int8Config
from int8compile.errors import Int8WeightError, warn_once
from int8compile.passes import PlaceholderBinder, may_multiply, rewrite_graph
from int8compile.passes.static import STORED, scaling, written
from int8compile.weights import METADATA, STORE


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A weight in int8, and how it is multiplied with.

    Attributes:
        qweight: [..., N, K] int8.
        scale: [..., N] float32.
        d: [K] or [..., K] float32, what it is rotated with; None where it is not.
        dtype: What it is dequantized to.
        policy: See `int8compile.ops.module_weight`.
        path: The module's, for messages.
        made: The version of `qweight` that a copy was made of; None for the module's own weight.
    """

    qweight: Tensor
    scale: Tensor
    d: Tensor | None
    dtype: torch.dtype
    policy: str
    path: str
    made: int | None = None

    @property
    def name(self) -> str:
        """The module, for messages."""
        return self.path or "an int8 module"

    def in_float(self) -> Tensor:
        """The weight dequantized, [..., N, K], by an operator that the passes know."""
        result: Tensor = ops.module_weight.default(self.qweight, self.scale, self.d, self.dtype, self.policy)
        return result

    def copied(self) -> Held:
        """A copy, which does not follow the module: with scales of its own."""
        made = None if self.qweight.is_inference() else self.qweight._version
        return dataclasses.replace(self, scale=self.scale.clone(), made=made)

    def check(self) -> None:
        """Raises `Int8WeightError` for a copy of integers that are not there any more."""
        if self.made is not None and self.qweight._version != self.made:
            raise Int8WeightError(
                f"{self.name}: its weight has changed since this copy of it was made, which has its scales only. "
                "module.dequantize() makes a copy in float"
            )


class Step:
    """A call that a weight is read through, of which the weight is the first argument.

    Args:
        func: As `__torch_function__` is given it.
        args: The other arguments, none of them a tensor.
        kwargs: The keyword arguments.
    """

    def __init__(self, func: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.func, self.args, self.kwargs = func, tuple(args), dict(kwargs or {})
        self._key = (func, repr(self.args), repr(self.kwargs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, value: Any) -> Any:
        """Makes the call."""
        return self.func(value, *self.args, **self.kwargs)

    def append(self, node: Node) -> Node:
        """Appends the call to a graph."""
        return _append(node.graph, self.func, (node, *self.args), self.kwargs)


class Int8Weight(Tensor):
    """A float weight of which there is only the int8 one; it has the shape, strides, dtype and device of the float one.

    A matmul with it, or with a view of it, runs in int8; one by other rows than the module's (its transpose) keeps an
    int8 weight of its own. Multiplying all of it in place by a number multiplies the scales; other writes raise
    `Int8WeightError`. Whatever else reads it gets the dequantized weight, with one warning. Dynamo does not trace it: a
    compiled function that is given one breaks its graph there; one that reads `module.weight` itself does not.
    """

    # What transformers asks before it initializes a weight.
    _is_hf_initialized = True

    held: Held
    # The last makes this tensor of what the others make of the module's weight.
    steps: tuple[Step, ...]

    @classmethod
    def make(cls, held: Held, like: Tensor, steps: tuple[Step, ...] = ()) -> Int8Weight:
        """Makes one of the sizes, strides and dtype of a tensor without data."""
        made = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=held.qweight.device,
        )
        made.held, made.steps = held, steps
        return made

    @property
    def is_entire(self) -> bool:
        """True if it has every element of the module's weight once, in any order."""
        qweight = self.held.qweight
        return self.numel() == qweight.numel() and not any(
            stride == 0 and size > 1 for size, stride in zip(self.shape, self.stride(), strict=True)
        )

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # nn.Parameter marks what it is given.
        raise Int8WeightError(
            f"{self.held.name}: its weight is int8 and can be no nn.Parameter; nn.Parameter(module.dequantize()) has "
            "it in float"
        )

    def in_float(self) -> Tensor:
        """The values, dequantized."""
        self.held.check()
        value = self.held.in_float()
        for step in self.steps:
            value = step(value)
        return value

    def check_is(self, value: Any) -> None:
        """Raises `Int8WeightError` unless what is assigned in its place is the same weight: `weight.data *= 2`."""
        if not (isinstance(value, Int8Weight) and value.is_entire and value.held.scale is self.held.scale):
            raise _not_writable(self, "assigning another tensor")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = _in_float("copy.deepcopy", self)
        return copied

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo would compile it by itself.
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[0], cls):  # type: ignore[attr-defined]
            return args[0].check_is(args[1])
        if func in _SHAPED_AS and isinstance(args[0], cls):
            return _SHAPED_AS[func](args[0], args[1].shape)
        if func in _MOVES and isinstance(args[0], cls):
            return _moved(func, *args, **kwargs)
        if func in _LIKE or (func is Tensor.type and len(args) == 1 and not kwargs):
            args, kwargs = tree_map(_stand_in, (args, kwargs))
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            plan = _planned(func, leaves, spec)
        return plan(leaves)

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What has gone past __torch_function__: other subclasses, and code below PyTorch's Python.
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.is_write and isinstance(value, cls):
                raise _not_writable(value, _name(func))
        args, kwargs = tree_map(functools.partial(_in_float, _name(func)), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        about = f"shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}"
        return f"Int8Weight({self.held.path!r}, {about})"


# Which may change the device; the result is asked of a tensor without elements.
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as}
# Views by the shape of another tensor.
_SHAPED_AS: dict[Any, Callable[..., Any]] = {
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
    Tensor.expand_as: Tensor.expand,
}
# What reads no values.
_LIKE = {
    *(Tensor.new_empty, Tensor.new_empty_strided, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros),
    *(torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like, torch.rand_like, torch.randn_like),
    *(torch.result_type, Tensor.to, Tensor.type_as),
}


def _stand_in(leaf: Any) -> Any:
    """A tensor of one element's memory with the metadata of a weight."""
    if not isinstance(leaf, Int8Weight):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)


def _moved(func: Any, weight: Int8Weight, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map(_stand_in, (args, kwargs))
    empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
    made = func(empty, *args, **kwargs)
    if made is empty:
        return weight
    if made.device != weight.device:
        return func(_in_float(_name(func), weight), *args, **kwargs)
    step = Step(Tensor.to, (made.dtype,), {"copy": True})
    with torch._C.DisableTorchFunctionSubclass():
        like = step(_without_data(weight))
    return _copied(weight, like, step)


def _copied(weight: Int8Weight, like: Tensor, step: Step) -> Int8Weight:
    return Int8Weight.make(weight.held.copied(), like, (*weight.steps, step))


# What to do with a call, by what it is given.
Plan = Callable[[list[Any]], Any]
_PLANS: dict[Any, Plan] = {}
_MOST_PLANS = 1024
_lock = threading.Lock()
# Arguments that a plan may depend on, beside tensors.
_CONSTANTS = (
    *(bool, int, float, complex, str, slice, type(None), type(...)),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _planned(func: Any, leaves: list[Any], spec: Any) -> Plan:
    """Return the plan for a call, made once for each combination of sizes."""
    if not all(map(_is_plain, leaves)) or _get_current_dispatch_mode() is not None:
        return functools.partial(_read, func, spec)
    key = (func, str(spec), torch.is_autocast_enabled("cpu"), *map(_signature, leaves))
    if (plan := _PLANS.get(key)) is None:
        # Not on a level of torch.func, whose tensors wrap others.
        with torch._C._DisableFuncTorch():
            plan = _plan(func, leaves, spec)
        with _lock:
            _PLANS[key] = plan
            if len(_PLANS) > _MOST_PLANS:
                del _PLANS[next(iter(_PLANS))]
    return plan


def _is_plain(leaf: Any) -> bool:
    """Return whether plans can depend on an argument: dense tensors with data, and constants."""
    if isinstance(leaf, Int8Weight):
        leaf = leaf.held.qweight
    elif not isinstance(leaf, Tensor):
        return isinstance(leaf, _CONSTANTS)
    return leaf.layout == torch.strided and not (leaf.is_nested or leaf.is_meta or isinstance(leaf, FakeTensor))


def _signature(leaf: Any) -> Any:
    """Return the properties of an argument that its plan depends on."""
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    about = (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if not isinstance(leaf, Int8Weight):
        return about
    held = leaf.held
    rotated = None if held.d is None else held.d.shape
    return *about, held.qweight.shape, held.qweight.stride(), rotated, held.dtype, held.policy, leaf.steps


def _plan(func: Any, leaves: list[Any], spec: Any) -> Plan:
    """Make the plan for a call.

    Raises:
        Int8WeightError: The call writes to a weight.
    """
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Int8Weight)]
    read: Plan = functools.partial(_read, func, spec)
    call = _Call(func, leaves, spec)
    changed = written(call.node)
    for position in positions:
        if call.inputs[position] in changed:
            factor = scaling(call.node)
            if factor is None or not leaves[position].is_entire or call.node.args[0] is not call.inputs[position]:
                raise _not_writable(leaves[position], _name(func))
            return functools.partial(_scale, position, factor)
    try:
        call.compute()
    except (RuntimeError, TypeError, NotImplementedError, IndexError, ValueError):
        return read  # The call itself raises what is wrong with it.
    (first, *others) = positions
    is_first = bool(call.args) and call.args[0] is call.inputs[first]
    if is_first and not others and (viewed := call.view(first)) is not None:
        return viewed
    if may_multiply(call.node) and (product := call.product()) is not None:
        return product
    return read


class _Call:
    """A call as a graph: tensors become placeholders, and int8 weights the operator that stands for them.

    Plans are kept, so they must not hold it: it holds the tensors.

    Attributes:
        inputs: The nodes that the call is given, by the positions of its tensors.
        args: The call's arguments, as it is spelled.
        node: The call.
    """

    def __init__(self, func: Any, leaves: list[Any], spec: Any) -> None:
        self._func, self._leaves, self._spec = func, leaves, spec
        graph = Graph()
        # Positions, and the name of a weight's tensor in `Held`; "" for an argument that is a tensor.
        self._given: dict[Node, tuple[int, str]] = {}
        self.inputs: dict[int, Node] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Int8Weight):
                for name in ("qweight", "scale", "d"):
                    if (tensor := getattr(leaf.held, name)) is not None:
                        node = graph.placeholder(f"{name}_{i}")
                        node.meta |= {"example_value": _without_data(tensor), **STORED}
                        self._given[node] = i, name
            elif isinstance(leaf, Tensor):
                self.inputs[i] = graph.placeholder(f"input_{i}")
                self.inputs[i].meta["example_value"] = _without_data(leaf)
                self._given[self.inputs[i]] = i, ""
        stored = {place: node for node, place in self._given.items()}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Int8Weight):
                tensors = [stored.get((i, name)) for name in ("qweight", "scale", "d")]
                options = (leaf.held.dtype, leaf.held.policy)
                node = _append(graph, ops.module_weight.default, (*tensors, *options), {})
                for step in leaf.steps:
                    node = step.append(node)
                self.inputs[i] = node
        given = [self.inputs.get(i, leaf) for i, leaf in enumerate(leaves)]
        self.args, self._kwargs = tree_unflatten(given, spec)
        self.node = _spelled(graph, func, self.args, self._kwargs)
        path = next(leaf.held.path for leaf in leaves if isinstance(leaf, Int8Weight))
        self.node.meta["nn_module_stack"] = {"": (path, None)}

    def compute(self) -> None:
        """Run the call on tensors without data."""
        self.node.meta["example_value"] = _on_meta(self._func, self.args, self._kwargs)

    def view(self, position: int) -> Plan | None:
        """Return a plan that makes a view or a copy of a weight; None where the call makes something else."""
        made, like = self.node.meta["example_value"], self.inputs[position].meta["example_value"]
        memory = like.untyped_storage()._cdata
        results = made if isinstance(made, tuple | list) else [made]
        if len(self.inputs) > 1 or not all(isinstance(result, Tensor) for result in results):
            return None
        args, kwargs = tree_unflatten(self._leaves, self._spec)
        step = Step(self._func, args[1:], kwargs)
        if isinstance(made, Tensor):
            if self._func in _COPIES and made.untyped_storage()._cdata != memory:
                return lambda leaves: _copied(leaves[position], made, step)
            if made.untyped_storage()._cdata == memory:
                return lambda leaves: _viewed(leaves[position], made, (step,))
        elif results and all(result.untyped_storage()._cdata == memory for result in results):
            takes = [Step(operator.getitem, (i,)) for i in range(len(results))]
            return lambda leaves: type(made)(
                _viewed(leaves[position], result, (step, take)) for result, take in zip(results, takes, strict=True)
            )
        return None

    def product(self) -> Plan | None:
        """Return a plan that multiplies in int8; None where the call has no matmul with an int8 counterpart."""
        graph, made = self.node.graph, self.node.meta["example_value"]
        if isinstance(made, tuple):
            parts = [_append(graph, operator.getitem, (self.node, i), {}) for i in range(len(made))]
            graph.output(tuple(None if made[i] is None else part for i, part in enumerate(parts)))
        else:
            graph.output(self.node)
        module = GraphModule({}, graph)
        binder = PlaceholderBinder(module)
        parameters = {node: node.meta["example_value"] for node, (_, tensor) in self._given.items() if tensor}
        report = rewrite_graph(module, parameters, Int8Config(), binder)
        if not report.rewritten:
            return None
        in_float = bool(report.notes)
        given, name = list(self._given.values()), _name(self._func)
        views = [(self._given[slot.members[0].source][0], slot.members[0].view) for slot in binder.slots]
        # The placeholders of slots, in their order.
        slots = [slot.nodes._asdict() for slot in binder.slots]
        added = {node: (i, tensor) for i, nodes in enumerate(slots) for tensor, node in nodes.items()}
        order = [added[node] for node in graph.find_nodes(op="placeholder") if node not in self._given]

        def run(leaves: list[Any]) -> Any:
            for leaf in leaves:
                if isinstance(leaf, Int8Weight):
                    leaf.held.check()
                    if in_float:
                        _warn_of_read(name, leaf)
            weights = []
            for i, view in views:
                held = leaves[i].held
                weights.append(STORE.get(held.qweight, view, held.path, scale=held.scale, d=held.d))
            inputs = [getattr(leaves[i].held, tensor) if tensor else leaves[i] for i, tensor in given]
            return module(*inputs, *[getattr(weights[i], tensor) for i, tensor in order])

        return run


# Calls whose result is the weight again, in memory of its own.
_COPIES = {
    *(Tensor.clone, torch.clone, Tensor.contiguous, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
    Tensor.type,
}


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _append(graph: Graph, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
    """Append a call, and run it on tensors without data."""
    node = _spelled(graph, func, args, kwargs)
    node.meta["example_value"] = _on_meta(func, args, kwargs)
    return node


def _on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = torch.fx.node.map_arg((tuple(args), dict(kwargs)), lambda arg: arg.meta["example_value"])
    with torch.no_grad():
        return func(*args, **kwargs)


def _spelled(graph: Graph, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
    """Appends a call as Dynamo writes it: functions, methods by their names, Python's operators, and `getattr`."""
    name = getattr(func, "__name__", "")
    if func in _GETTERS:
        return graph.call_function(getattr, (args[0], _GETTERS[func]))
    if func == Tensor.data.__get__:  # type: ignore[attr-defined]
        return graph.call_method("detach", tuple(args))
    if getattr(Tensor, name, None) is not func:
        return graph.call_function(func, tuple(args), dict(kwargs))
    # `__imul__` is operator.imul; there is none for the reflected `__rmatmul__`, which has a spelling of its own.
    target = getattr(operator, name.strip("_"), None) if name.startswith("__") and name != "__rmatmul__" else None
    if target is not None:
        return graph.call_function(target, tuple(args), dict(kwargs))
    return graph.call_method(name, tuple(args), dict(kwargs))


_GETTERS = {getattr(Tensor, name).__get__: name for name in ("T", "mT", "H", "mH")}


def _viewed(weight: Int8Weight, like: Tensor, steps: tuple[Step, ...]) -> Int8Weight:
    return Int8Weight.make(weight.held, like, (*weight.steps, *steps))


def _read(func: Any, spec: Any, leaves: list[Any]) -> Any:
    args, kwargs = tree_unflatten([_in_float(_name(func), leaf) for leaf in leaves], spec)
    result = func(*args, **kwargs)
    for part in tree_iter(result):
        if isinstance(part, np.ndarray):
            part.setflags(write=False)  # It may be the memory of a copy, where a write would be lost.
    return result


def _in_float(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, Int8Weight):
        return leaf
    _warn_of_read(name, leaf)
    return leaf.in_float()


def _warn_of_read(name: str, weight: Int8Weight) -> None:
    warn_once(
        f"{weight.held.name}: {name} reads its weight, which is dequantized for that at every call. Matmuls with it "
        "run in int8; skip_modules leaves it in float"
    )


def _scale(position: int, factor: float, leaves: list[Any]) -> Int8Weight:
    weight: Int8Weight = leaves[position]
    held = weight.held
    held.check()
    if factor < 0 and held.made is not None:
        raise _not_writable(weight, "a multiplication by a negative number")  # A copy has the module's integers.
    with torch.no_grad():
        held.scale.mul_(abs(factor))
        if factor < 0:
            held.qweight.neg_()  # Its least value is -127.
    return weight


def _not_writable(weight: Int8Weight, what: str) -> Int8WeightError:
    return Int8WeightError(
        f"{weight.held.name}: {what} would write to its weight, which is int8; all of it can be multiplied by a "
        "number. int8compile.dequantize_(model) makes a float model; skip_modules leaves a module in float"
    )


def _name(func: Any) -> str:
    return str(torch.overrides.resolve_name(func) or getattr(func, "__name__", type(func).__name__))
