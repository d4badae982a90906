"""The weight of an int8 module, for code that reads it instead of calling the module.

Examples are `F.linear(x, self.qkv.weight, bias)` in a parent, and `x @ encoder.weight` in a tied autoencoder. Matmuls
run in int8, in every spelling that the passes know. Under torch.compile the weight is the operator
`int8compile::module_weight`. In eager mode each call becomes a graph of its own, made once for each combination of
sizes. Any other use gets the weight in float.
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
    """A weight in int8, and how activations are multiplied by it.

    Attributes:
        qweight: [..., N, K] int8.
        scale: [..., N] float32.
        d: [K] or [..., K] float32, the factors of its rotation; None where it is not rotated.
        dtype: The dtype of the dequantized weight.
        policy: See `int8compile.ops.module_weight`.
        path: The path of the module, for messages.
        made: The version of `qweight` when a copy was made; None for the module's own weight.
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
        """The name of the module, for messages."""
        return self.path or "an int8 module"

    def in_float(self) -> Tensor:
        """Return the dequantized weight, [..., N, K], by an operator that the passes know."""
        result: Tensor = ops.module_weight.default(self.qweight, self.scale, self.d, self.dtype, self.policy)
        return result

    def copied(self) -> Held:
        """Return a copy with scales of its own, which do not follow the module's."""
        made = None if self.qweight.is_inference() else self.qweight._version
        return dataclasses.replace(self, scale=self.scale.clone(), made=made)

    def check(self) -> None:
        """Raise `Int8WeightError` for a copy whose module has changed its integers since."""
        if self.made is not None and self.qweight._version != self.made:
            raise Int8WeightError(
                f"{self.name}: its weight has changed since this copy was made, which has only scales of its own. "
                "module.dequantize() makes a copy in float"
            )


class Step:
    """A call with a weight as its first argument, which makes a view or a copy of it.

    Args:
        func: The function, as `__torch_function__` gets it.
        args: The other positional arguments, none of them a tensor.
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
        """Make the call."""
        return self.func(value, *self.args, **self.kwargs)

    def append(self, node: Node) -> Node:
        """Append the call to the graph of a node."""
        return _append(node.graph, self.func, (node, *self.args), self.kwargs)


class Int8Weight(Tensor):
    """A float weight that exists only in int8, with the shape, strides, dtype and device of the float weight.

    A matmul with it, or with a view of it, runs in int8. A matmul with other rows than the module's (its transpose)
    keeps an int8 weight of its own. Multiplying all of it in place by a number multiplies the scales. Other writes
    raise `Int8WeightError`. Any other use gets the dequantized weight, with one warning. Dynamo does not trace it: a
    compiled function has a graph break where it gets one as an argument, but none where it reads `module.weight`.
    """

    # transformers initializes weights where this is False.
    _is_hf_initialized = True

    held: Held
    # The calls that make this tensor of the module's weight, in order.
    steps: tuple[Step, ...]

    @classmethod
    def make(cls, held: Held, like: Tensor, steps: tuple[Step, ...] = ()) -> Int8Weight:
        """Return a weight with the sizes, strides and dtype of a tensor without data."""
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
        """True if it has each element of the module's weight once, in any order."""
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
            f"{self.held.name}: its weight is int8 and cannot be an nn.Parameter; nn.Parameter(module.dequantize()) "
            "has it in float"
        )

    def in_float(self) -> Tensor:
        """Return the dequantized values."""
        self.held.check()
        value = self.held.in_float()
        for step in self.steps:
            value = step(value)
        return value

    def check_is(self, value: Any) -> None:
        """Raise `Int8WeightError` unless the tensor assigned in its place is this weight, as in `weight.data *= 2`."""
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
        # Reached by calls that skip __torch_function__: other subclasses, and code below PyTorch's Python.
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.is_write and isinstance(value, cls):
                raise _not_writable(value, _name(func))
        args, kwargs = tree_map(functools.partial(_in_float, _name(func)), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        about = f"shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}"
        return f"Int8Weight({self.held.path!r}, {about})"


# Calls that may change the device or dtype; a tensor without elements shows which.
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as}
# Views with the shape of another tensor.
_SHAPED_AS: dict[Any, Callable[..., Any]] = {
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
    Tensor.expand_as: Tensor.expand,
}
# Calls that read no values.
_LIKE = {
    *(Tensor.new_empty, Tensor.new_empty_strided, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros),
    *(torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like, torch.rand_like, torch.randn_like),
    *(torch.result_type, Tensor.to, Tensor.type_as),
}


def _stand_in(leaf: Any) -> Any:
    """Return a tensor with the metadata of a weight and the memory of one element; other arguments unchanged."""
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


# Runs a call, given its flat arguments.
Plan = Callable[[list[Any]], Any]
_PLANS: dict[Any, Plan] = {}
_MOST_PLANS = 1024
_lock = threading.Lock()
# The types of arguments that a plan may depend on, besides tensors.
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
        # Outside torch.func, whose tensors wrap others.
        with torch._C._DisableFuncTorch():
            plan = _plan(func, leaves, spec)
        with _lock:
            _PLANS[key] = plan
            if len(_PLANS) > _MOST_PLANS:
                del _PLANS[next(iter(_PLANS))]
    return plan


def _is_plain(leaf: Any) -> bool:
    """Return whether a plan can depend on an argument: a dense tensor with data, or a constant."""
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
        return read  # The call itself raises its error.
    (first, *others) = positions
    is_first = bool(call.args) and call.args[0] is call.inputs[first]
    if is_first and not others and (viewed := call.view(first)) is not None:
        return viewed
    if may_multiply(call.node) and (product := call.product()) is not None:
        return product
    return read


class _Call:
    """A call as a graph, in which tensors are placeholders and int8 weights are `module_weight` operators.

    It holds the tensors, so plans, which are kept, must not hold it.

    Attributes:
        inputs: The nodes of the tensors among the arguments, by their positions.
        args: The positional arguments, with nodes for tensors.
        node: The node of the call.
    """

    def __init__(self, func: Any, leaves: list[Any], spec: Any) -> None:
        self._func, self._leaves, self._spec = func, leaves, spec
        graph = Graph()
        # The position of an argument, and the name of its tensor in `Held`; "" for an ordinary tensor.
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
        """Return a plan for a call that makes views or a copy of a weight; None for other calls."""
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
        """Return a plan that multiplies in int8; None for a call without a matmul that has an int8 counterpart."""
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
        # The position of the slot and the name of its tensor, for each placeholder that slots have added.
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


# Calls that return a copy of the weight.
_COPIES = {
    *(Tensor.clone, torch.clone, Tensor.contiguous, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
    Tensor.type,
}


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _append(graph: Graph, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
    """Append a call to a graph, and run it on tensors without data."""
    node = _spelled(graph, func, args, kwargs)
    node.meta["example_value"] = _on_meta(func, args, kwargs)
    return node


def _on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = torch.fx.node.map_arg((tuple(args), dict(kwargs)), lambda arg: arg.meta["example_value"])
    with torch.no_grad():
        return func(*args, **kwargs)


def _spelled(graph: Graph, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
    """Append a call as Dynamo spells it: functions, methods by name, Python's operators, or `getattr`."""
    name = getattr(func, "__name__", "")
    if func in _GETTERS:
        return graph.call_function(getattr, (args[0], _GETTERS[func]))
    if func == Tensor.data.__get__:  # type: ignore[attr-defined]
        return graph.call_method("detach", tuple(args))
    if getattr(Tensor, name, None) is not func:
        return graph.call_function(func, tuple(args), dict(kwargs))
    # `__imul__` is operator.imul. The reflected `__rmatmul__` has no operator, and is a method.
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
            part.setflags(write=False)  # A write to the memory of a copy would be lost.
    return result


def _in_float(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, Int8Weight):
        return leaf
    _warn_of_read(name, leaf)
    return leaf.in_float()


def _warn_of_read(name: str, weight: Int8Weight) -> None:
    warn_once(
        f"{weight.held.name}: {name} reads its weight, which is dequantized at every call. Matmuls with it "
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
        f"{weight.held.name}: {what} would write to its weight, which is int8 and can only be multiplied by a "
        "number as a whole. int8compile.dequantize_(model) makes a float model; skip_modules leaves a module in float"
    )


def _name(func: Any) -> str:
    return str(torch.overrides.resolve_name(func) or getattr(func, "__name__", type(func).__name__))
