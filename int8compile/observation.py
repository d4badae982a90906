"""Run a model once in float and observe its linears, for `explain` and `calibrate`.

Dynamo captures the model as it does for the backend, and the same passes find the linears, of any spelling. In the
observed graph each linear reports its activations and multiplies by its float weight.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame
from torch._inductor import config as inductor_config
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from int8compile import ops
from int8compile.backend import (
    captured_parameters,
    copy_graph,
    errors_unwrapped,
    lower_captured,
    rewrite_captured,
)
from int8compile.config import Int8Config
from int8compile.errors import FreedWeightError, ModelError, listed
from int8compile.groups import reads_tokens
from int8compile.ops import rotation_size
from int8compile.passes import PlaceholderBinder, rewrite_graph
from int8compile.passes.binding import Member
from int8compile.passes.names import parameter_name
from int8compile.passes.rules import Rule
from int8compile.passes.static import WeightView, static_weight, weight_view
from int8compile.report import Report
from int8compile.sites import Site
from int8compile.weights import FreedWeight, Members, view_of_int8

Record = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear of a captured graph that would be int8.

    Attributes:
        op: The operator that takes its place; None for experts that share one product, which only `quantize_` makes
            int8.
        threshold: The operator's threshold; 0 where it has none.
        site: Its row in the report; None for such experts.
        each: Whether each matrix of a weight [B, N, K] is rotated by a d of its own.
        first: Whether it is the first of the linears that read the same x and share a rotation.
    """

    op: Any = None
    threshold: float = 0.0
    site: Site | None = None
    each: bool = False
    first: bool = True


class Given(NamedTuple):
    """The arguments of a linear at a call.

    Attributes:
        x: Its activations, as the operator takes them.
        group: The linears that read the same x and share its rotation, itself among them; empty where it is not
            rotated, or int8 already.
        among: The linears that a new d of the group is computed from, see `int8compile.groups`.
        d: The rotation of a weight that is int8 already.
        ends: The end of each expert's rows, where the rows of all experts are concatenated; otherwise None.
    """

    x: Tensor
    group: Members
    among: Members
    d: Tensor | None
    ends: Tensor | None = None


See = Callable[[Linear, Given], None]


def plain(model: Any) -> Any:
    """Return the model or function that a compiled one was made from."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def check_has_data(model: nn.Module, verb: str) -> None:
    """Raise an error if a model has no data to run on in float.

    Args:
        model: The model.
        verb: What is to be done with it, for messages: "calibrate".

    Raises:
        FreedWeightError: A float weight was freed.
        ModelError: A parameter or buffer is on the meta device.
    """
    named = {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}
    check_not_freed(named, f"{verb.capitalize()} it before compiling")
    if empty := [name for name, tensor in (*named.items(), *model.named_buffers()) if tensor.is_meta]:
        raise ModelError(f"{listed(empty)}: on the meta device, without data. Load the weights first, then {verb} it")


def check_not_freed(parameters: Mapping[str, Tensor], advice: str) -> None:
    """Raise `FreedWeightError` if a model cannot run in float any more."""
    for name, parameter in parameters.items():
        if isinstance(parameter, FreedWeight):
            raise FreedWeightError(
                f"{name} has no float weight any more (free_weights=True), so the model cannot run in float. {advice}"
            )


def some_rows(x: Tensor, count: int) -> Tensor:
    """Return at most `count` rows, spread evenly over all.

    Shapes:
        x: [..., K]; result: [M, K].
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows[:: max(1, -(-len(rows) // count))]


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a module computes in, of its first float parameter or buffer; None if it has none."""
    own = itertools.chain(module.parameters(), module.buffers())
    # The scales of int8 modules are float32 whatever they compute in.
    said = getattr(module, "dtype", None)
    if isinstance(said, torch.dtype):  # Some modules have a string of this name.
        return said
    return next((each.dtype for each in own if each.is_floating_point()), None)


def model_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a float model in a dtype: itself if all of its float parameters are, else a copy."""
    if all(parameter.dtype == dtype for parameter in model.parameters() if parameter.is_floating_point()):
        return model
    return copy.deepcopy(model).to(dtype)


def args_in(given: Any, dtype: torch.dtype | None) -> Any:
    """Return arguments, of any structure, with their float tensors in a dtype; None leaves them as they are.

    Finite values stay finite: the least float32, which masks have, would be -inf in bfloat16, and a row of these NaN.
    """

    def convert(value: Any) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        largest = torch.finfo(dtype).max
        if largest >= torch.finfo(value.dtype).max:
            return value.to(dtype)
        return torch.where(value.isinf(), value, value.clamp(-largest, largest)).to(dtype)

    return given if dtype is None else pytree.tree_map(convert, given)


@contextlib.contextmanager
def captured(model: Any, record: Record) -> Iterator[Callable[..., Any]]:
    """Capture a model whenever it is called, without gradients.

    Buffers that calls change, the state of the random number generators and Dynamo's caches are restored afterwards.

    Args:
        model: A module or a function.
        record: Takes each captured graph, as a Dynamo backend.

    Yields:
        A function that calls the model.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps every backend for ever, and a backend that refers to `record` would keep all that it has seen.
    records = [record]

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return records[0](gm, example_inputs)

    # With freezing, parameters would not be inputs.
    thawed: Any = inductor_config.patch(freezing=False)
    with torch.no_grad(), thawed, torch.random.fork_rng(), buffers_restored(model), _dynamo_caches_dropped():
        try:
            yield torch.compile(_with_code_of_its_own(call), backend=backend)
        finally:
            records.clear()


def observed(
    gm: GraphModule, example_inputs: Sequence[Any], config: Int8Config, rules: tuple[Rule, ...], see: See
) -> tuple[GraphModule, Report]:
    """Copy a captured graph, with linears that report their arguments before they multiply in float.

    Args:
        gm: A Dynamo graph.
        example_inputs: The values that its placeholders were captured with.
        config: The options that decide which linears would be int8.
        rules: The rules that decide it.
        see: Called with each such linear at every call.

    Returns:
        The copy, which takes the same inputs, and the report on its linears.
    """
    module = copy_graph(gm)
    # int8 modules keep their weights while they are observed.
    config = dataclasses.replace(config, free_weights=False)
    with errors_unwrapped():
        binder, report = rewrite_captured(module, example_inputs, config, rules=rules)
    slots = {slot.nodes.qweight: slot for slot in binder.slots}
    graph = module.graph
    calls = [node for node in graph.nodes if node.target in _OPERATORS]
    for site, call in zip(report.rewritten, calls, strict=True):
        given = dict(zip((argument.name for argument in call.target._schema.arguments), call.args, strict=False))
        slot = slots.get(given["qweight"])
        member = None if slot is None else slot.members[0]
        group = None if slot is None else slot.sharing
        linear = Linear(
            site=site,
            op=call.target,
            threshold=given.get("threshold", 0.0),
            each=group is not None and group.each,
            first=group is None or group.members[0] is member,
        )
        members, among = ([], []) if group is None else (group.members, group.among)
        d = given.get("d") if member is None else member.d
        with graph.inserting_before(call):
            if member is not None and member.d is not None and given.get("d") is not member.d:
                # The call multiplies by a view of the module's weight.
                d = graph.call_function(_rotation_of, (member.source, member.scale, member.d, member.view))
            sources = [each.source for each in (*members, *among)]
            graph.call_function(_telling(see, linear, members, among), (given["x"], d, None, *sources))
            if member is not None:
                weight = member.source, member.scale, member.d
                product = graph.call_function(_multiplying(member.view), (given["x"], given["bias"], *weight))
                call.replace_all_uses_with(product)
                graph.erase_node(call)
    _observe_experts(module, captured_parameters(module, example_inputs), see)
    groups = binder.groups
    binder.drop(list(binder.slots))
    for group in groups:
        graph.erase_node(group.node)
    module.recompile()
    return module, report


def lowered_report(
    gm: GraphModule, example_inputs: Sequence[Any], config: Int8Config, rules: tuple[Rule, ...]
) -> Report:
    """Return the report on a captured graph as `torch.compile` would lower it, with fusions, without changing it.

    Args:
        gm: A Dynamo graph.
        example_inputs: The values that its placeholders were captured with.
        config: The options that decide which linears would be int8.
        rules: The rules that decide it.
    """
    module = copy_graph(gm)
    parameters = captured_parameters(module, example_inputs)
    binder = PlaceholderBinder(module)
    with errors_unwrapped():
        report = rewrite_graph(module, parameters, config, binder, rules=rules)
        lower_captured(module, parameters, binder, report, warn=False)
    return report


_OPERATORS = {
    ops.linear.default,
    ops.batched_linear.default,
    ops.grouped_linear.default,
    ops.weight_only_linear.default,
    ops.column_linear.default,
}


def _telling(see: See, linear: Linear, members: Sequence[Member], among: Sequence[Member]) -> Callable[..., None]:
    views = [member.view for member in (*members, *among)]
    count = len(members)

    def tell(x: Tensor, d: Tensor | None, ends: Tensor | None, *sources: Tensor) -> None:
        weights = list(zip(sources, views, strict=True))
        see(linear, Given(x, weights[:count], weights[count:], d, ends))

    return tell


def _observe_experts(module: GraphModule, parameters: Mapping[Node, Tensor], see: See) -> None:
    """Have products of concatenated rows of several experts report their arguments."""
    for node in module.graph.nodes:
        if node.op != "call_function" or "grouped_mm" not in str(node.target):
            continue
        given = dict(zip(("x", "weight", "offs"), node.args, strict=False)) | node.kwargs
        weight = static_weight(given["weight"], parameters)
        if weight is None or weight.tensor.dim() != 3 or given.get("offs") is None:
            continue
        experts, k, n = weight.tensor.shape
        path = parameter_name(weight.source)
        member = Member(weight.source, weight_view(weight.tensor, [0, 2, 1], (experts, n, k)), path)
        if rotation_size(k) > 1:
            tell = _telling(see, Linear(each=not reads_tokens(path)), [member], [])
            with module.graph.inserting_before(node):
                module.graph.call_function(tell, (given["x"], None, given["offs"], weight.source))


def _rotation_of(qweight: Tensor, scale: Tensor, d: Tensor, view: WeightView) -> Tensor | None:
    """Return the d of a view of an int8 weight."""
    return view_of_int8(qweight, scale, d, view)[2]


def _multiplying(view: WeightView) -> Callable[..., Tensor]:
    def multiply(x: Tensor, bias: Tensor | None, source: Tensor, scale: Tensor | None, d: Tensor | None) -> Tensor:
        if scale is not None:  # The int8 weight of a module, read by other code than the module.
            source = torch.empty_like(source, dtype=x.dtype).copy_(ops.dequantize_weight(source, scale, d, x.dtype))
        weight = view.of(source).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return x @ weight.mT if bias is None else x @ weight.mT + bias[:, None]

    return multiply


def _with_code_of_its_own(function: Any) -> FunctionType:
    """Return a copy with a new code object, because Dynamo gives up on code that was compiled 256 times."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


@contextlib.contextmanager
def buffers_restored(model: Any) -> Iterator[None]:
    """Restore a model's buffers after the context: their tensors and values."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # `forward` may replace the tensors or change their values.
    tensors = [(module, dict(module._buffers)) for module in modules]
    values = {
        buffer: buffer.clone()
        for _, buffers in tensors
        for buffer in buffers.values()
        if buffer is not None and not buffer.is_meta and not buffer.is_inference()
    }
    try:
        yield
    finally:
        for module, buffers in tensors:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def _dynamo_caches_dropped() -> Iterator[None]:
    """Drop the cache entries that Dynamo makes meanwhile: they would count against the model's own recompile limit.

    After a graph break, the model's own functions get entries. A function that had entries before keeps all of them,
    because these are the user's.
    """

    def compiled() -> set[Any]:
        codes = {code for ref in convert_frame.input_codes.seen if (code := ref()) is not None}
        return {code for code in codes if eval_frame._debug_get_cache_entry_list(code)}

    before = compiled()
    try:
        yield
    finally:
        for code in compiled() - before:
            eval_frame.reset_code(code)
