"""`torch.compile(model, backend="int8")`: a Dynamo graph in, a callable out.

The graph is copied, rewritten by `int8compile.passes`, and compiled by Inductor. The callable takes the arguments that
Dynamo passes, with the float weights among them, and replaces each by its int8 weight from the store.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import ShortenTraceback
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from int8compile import cpu, frames, hardware, triton_kernels
from int8compile.config import Int8Config
from int8compile.errors import FreedWeightError, Int8CompileError, Int8Warning, warn_once
from int8compile.passes import (
    PlaceholderBinder,
    int8_tensors,
    lower_for_cpu,
    lower_for_gpu,
    rewrite_graph,
)
from int8compile.passes.binding import WeightSlot, stored_placeholder
from int8compile.passes.names import parameter_name
from int8compile.passes.static import WeightView
from int8compile.report import Report
from int8compile.weights import FREED, STORE, FreedWeight, Key, QuantizedWeight, free

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def int8(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The Dynamo backend. Not called by users: `torch.compile(model, backend="int8", options={...})` does.

    Args:
        gm: The captured graph; parameters are placeholders. It is not changed: Dynamo reads it again later.
        example_inputs: What the placeholders were captured with; the real parameters among them.
        mode: Inductor's mode.
        options: Fields of `Int8Config`.

    Raises:
        ConfigError: An option is unknown or has a value that is not allowed.
        BadWeightError: A weight to be rewritten has NaN or Inf, or no data.
        FreedWeightError: The graph needs a float weight whose memory was given back.
    """
    with errors_unwrapped():
        return _int8(gm, example_inputs, Int8Config.from_options(options, mode=mode))


def register() -> None:
    """Makes the backend known by its name where the package was not installed, as in a bare checkout.

    An installed package needs no import for that: its entry point says where the backend is.
    """
    frames.watch()
    installed = importlib.metadata.entry_points(group="torch_dynamo_backends", name="int8")
    if not installed and "int8" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(int8, name="int8")


def _int8(gm: GraphModule, example_inputs: Sequence[Any], config: Int8Config) -> Compiled:
    frames.watch()
    module = copy_graph(gm)
    lifted = lift_attributes(module)
    example_inputs = [*example_inputs, *lifted]
    parameters = captured_parameters(module, example_inputs)
    binder, report = rewrite_captured(module, example_inputs, config)
    if report.rewritten and _any_on("cpu", parameters) and cpu.available():
        lower_for_cpu(module, binder, parameters)
        module.graph.lint()
    patches = config.inductor_patches()
    if inductor_config.freezing:  # Which its freezing of constants would need, and inputs are none.
        patches = {"freezing": False} | patches
    if report.rewritten and _any_on("cuda", parameters) and _gpu_kernels(parameters):
        lowered = lower_for_gpu(module, binder, parameters)
        report.fused_norms, report.unfused_norms = lowered.norms, lowered.unfused
        module.graph.lint()
    for note in report.notes:
        warn_once(note)
    log.info("%s", report.summary())
    log.debug("%s", report)
    _warn_if_nothing_rewritten(report)
    compiled = _compile(module, example_inputs, binder.slots, config, patches)
    return functools.partial(_with_lifted, compiled, lifted) if lifted else compiled


def lift_attributes(module: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that a Dynamo graph holds; it holds the model's where Inductor is to freeze them.

    Returns:
        What the new placeholders, behind the others, are given at every call.
    """
    if not inductor_config.freezing:
        return []
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    graph, lifted = module.graph, []
    for node in graph.find_nodes(op="get_attr"):
        if (tensor := tensors.get(str(node.target))) is None:
            continue
        placeholder = stored_placeholder(graph, node.name)
        placeholder.meta = node.meta | placeholder.meta
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        lifted.append(tensor)
    return lifted


def _with_lifted(compiled: Compiled, lifted: Sequence[Tensor], *args: Any) -> Any:
    return compiled(*args, *lifted)


@contextlib.contextmanager
def errors_unwrapped() -> Iterator[None]:
    """Lets our errors through Dynamo as they are: it wraps what backends raise, but not a `ShortenTraceback`."""
    try:
        yield
    except Int8CompileError as error:
        kind = type(error)
        shown = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__})
        raised: Int8CompileError = shown(*error.args, first_useful_frame=None)
        raise raised from error.__cause__


def copy_graph(gm: GraphModule) -> GraphModule:
    """Copy a Dynamo graph for rewriting: the nodes are new; their meta and the module's attributes are shared.

    `GraphModule` takes from its root only what nodes name. AOTAutograd and Inductor ask the module for more: without
    `_param_name_to_source` no input is static, and CUDA graphs copy every weight at every replay; without the hooks on
    saved tensors their cache does not tell two graphs apart.
    """
    copied = GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta.update(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(copied):
            setattr(copied, name, value)
    for name, child in gm.named_children():
        if name not in copied._modules:
            copied.add_module(name, child)
    for node, original in zip(copied.graph.nodes, gm.graph.nodes, strict=True):
        if hasattr(original, "_dynamo_source"):  # AOTAutograd asks the placeholders for it.
            node._dynamo_source = original._dynamo_source
    return copied


def rewrite_captured(
    module: GraphModule, example_inputs: Sequence[Any], config: Int8Config, **options: Any
) -> tuple[PlaceholderBinder, Report]:
    """Runs the passes on a copied Dynamo graph, whose placeholders stand for `example_inputs` in order."""
    parameters = captured_parameters(module, example_inputs)
    binder = PlaceholderBinder(module)
    return binder, rewrite_graph(module, parameters, config, binder, **options)


def captured_parameters(module: GraphModule, example_inputs: Sequence[Any]) -> dict[Node, Tensor]:
    """The parameters of a Dynamo graph by their placeholders, which are the first of a rewritten one.

    The int8 weights of modules that `quantize_` made are among them.
    """
    placeholders = module.graph.find_nodes(op="placeholder")[: len(example_inputs)]
    held = int8_tensors(module.graph)
    return {
        node: value
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, nn.Parameter) or node in held
    }


def _any_on(kind: str, parameters: Mapping[Node, Tensor]) -> bool:
    return any(parameter.device.type == kind for parameter in parameters.values())


def _gpu_kernels(parameters: Mapping[Node, Tensor]) -> bool:
    """Whether there are kernels for the GPUs of a graph; where there are none, a warning says why."""
    devices = {parameter.device for parameter in parameters.values() if parameter.device.type == "cuda"}
    missing = [device for device in devices if not hardware.kernel_family(hardware.of(device).isa)]
    loaded = triton_kernels.load()
    if (missing or not loaded) and not triton_kernels.switched_off():
        why = triton_kernels.failure() or f"Triton has none for {', '.join(map(str, missing))}"
        warn_once(
            f"the int8 GPU kernels cannot be used: {why}. The int8 operators run through PyTorch instead: slower than "
            "float, with the same results. INT8COMPILE_TRITON=0 leaves the kernels out without this warning"
        )
    return loaded


@dataclasses.dataclass(frozen=True)
class _Part:
    """A member of a slot, by positions among the arguments of a graph.

    Attributes:
        position: Of the parameter.
        key: What it is quantized for.
        path: Module path, for messages.
        scale: Of the scales, where it is int8 already.
        d: Of what such a one is rotated with.
        group: Positions and views of what is rotated alike.
        among: Of what a d is made of where there is none.
        each: Whether each matrix is rotated by a d of its own.
    """

    position: int
    key: Key
    path: str
    scale: int | None
    d: int | None
    group: tuple[tuple[int, WeightView], ...]
    among: tuple[tuple[int, WeightView], ...]
    each: bool

    @property
    def given(self) -> tuple[int, ...]:
        """Positions of what belongs to a parameter that is int8 already."""
        return tuple(position for position in (self.scale, self.d) if position is not None)

    def get(self, args: Sequence[Any]) -> QuantizedWeight:
        """Return its int8 weight, quantized now where it has to be."""
        return STORE.get(
            args[self.position],
            self.key.view,
            self.path,
            packed=self.key.packed,
            scale=None if self.scale is None else args[self.scale],
            d=None if self.d is None else args[self.d],
            group=self._at(self.group, args),
            among=self._at(self.among, args),
            each=self.each,
        )

    def share(self, args: Sequence[Any]) -> None:
        """Have those that read one x rotated by one d, for which some may have to be quantized anew."""
        if self.group:
            STORE.share(self._at(self.group, args), self._at(self.among, args), each=self.each)

    @staticmethod
    def _at(places: Sequence[tuple[int, WeightView]], args: Sequence[Any]) -> list[tuple[Tensor, WeightView]]:
        return [(args[position], view) for position, view in places]


def _parts(slot: WeightSlot, positions: Mapping[Node, int]) -> list[_Part]:
    """Return the members of a slot by positions."""

    def position(node: Node | None) -> int | None:
        return None if node is None else positions[node]

    whole = slot.sharing
    members = (whole.members, whole.among) if whole is not None else ((), ())
    group, among = (tuple((positions[each.source], each.view) for each in part) for part in members)
    each = whole is not None and whole.each
    return [
        _Part(
            positions[source],
            Key(view, slot.packed, bool(group)),
            path,
            position(scale),
            position(d),
            group,
            among,
            each,
        )
        for source, view, path, scale, d in slot.members
    ]


def _compile(
    module: GraphModule,
    example_inputs: Sequence[Any],
    slots: Sequence[WeightSlot],
    config: Int8Config,
    patches: Mapping[str, Any],
) -> Compiled:
    """Compiles a rewritten graph with Inductor.

    Returns:
        A callable over the arguments of the graph as captured.
    """
    captured = module.graph.find_nodes(op="placeholder")[: len(example_inputs)]
    positions = {node: position for position, node in enumerate(captured)}
    # Not the slots, whose nodes would keep the graph.
    parts: list[_Part] = []
    joined: list[tuple[int, int, bool]] = []
    groups: dict[Node, list[int]] = {}
    for slot in slots:
        begin, members = len(parts), _parts(slot, positions)
        parts += members
        joined.append((begin, len(parts), slot.interleaved))
        if slot.group is not None:
            groups.setdefault(slot.group.node, []).extend(range(begin, len(parts)))
    lookups = [(part.position, part.key, part.given, part) for part in parts]
    # What each of them found last; weakly, since a weight goes when its parameter goes.
    recent: list[Callable[[], QuantizedWeight | None]] = [lambda: None] * len(lookups)
    firsts = [numbers[0] for numbers in groups.values()]
    # Those that must have the d of another.
    alike = [(number, numbers[0]) for numbers in groups.values() for number in numbers[1:]]
    # What the store gives, by the placeholders that take it, in their order.
    given = [node for slot in slots for node in slot.nodes[:2]] + list(groups)
    added = {node: order for order, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    order = sorted(range(len(given)), key=lambda each: added[given[each]])
    # A weight that nothing reads any more is no argument of the compiled graph, nor are its scales; but those stay with
    # the module, where other graphs ask for them.
    sources = {member.source for slot in slots for member in slot.members}
    scales = {
        node for slot in slots for member in slot.members for node in (member.scale, member.d) if node is not None
    }
    freed = sorted(positions[source] for source in sources if not source.users)
    unread = sorted([*freed, *(positions[scale] for scale in scales if not scale.users)])
    for position in unread:
        module.graph.erase_node(captured[position])
    module.recompile()
    kept = [position for position in range(len(captured)) if position not in unread]
    for position in kept:
        if isinstance(example_inputs[position], FREED):
            form = "in float" if isinstance(example_inputs[position], FreedWeight) else "unpacked"
            raise FreedWeightError(
                f"{parameter_name(captured[position])} is needed {form} here, but free_weights=True has given its "
                "memory back. Compile every use of it to int8, or compile without free_weights"
            )

    def arguments(args: Sequence[Any]) -> list[Any]:
        fresh = STORE.fresh
        while True:
            found = []
            for number, (position, key, given, part) in enumerate(lookups):
                parameter, weight = args[position], recent[number]()
                # Most calls bring the parameters of the last one, unchanged. The store knows of those that were freed,
                # which are slow to ask.
                if weight is None or given or type(parameter) in FREED or not weight.made_of.holds(parameter):
                    weight = fresh(parameter, key, [args[each] for each in given]) or part.get(args)
                    recent[number] = weakref.ref(weight)
                found.append(weight)
            if all(found[number].d is found[first].d for number, first in alike):
                break
            # Other graphs group them otherwise and have rotated some of them by another d, or another thread does.
            for part in parts:
                part.share(args)
        tensors: list[Any] = []
        for begin, end, interleaved in joined:
            if end == begin + 1:
                one: Any = STORE.alone(found[begin])
            else:
                one = STORE.fused(found[begin:end], interleaved=interleaved)
            tensors += (one.qweight, one.scale)
        tensors += [found[first].d for first in firsts]
        return [*[args[position] for position in kept], *[tensors[each] for each in order]]

    # Takes seconds to import, and explain() does without.
    from torch._inductor.compile_fx import compile_fx

    for part in parts:
        STORE.compare(example_inputs[part.position], [example_inputs[each] for each in part.given])
    fakes = _static_fakes(arguments(example_inputs))
    compiled: Any = compile_fx(module, fakes, config_patches=dict(patches))
    for node in captured:
        # Dynamo does so with its own graph. It holds a weak reference to the parameter, which could not be swapped
        # (`torch.utils.swap_tensors`) while that is there.
        node.meta.pop("grapharg", None)

    def run(*args: Any) -> Any:
        chosen = arguments(args)
        if config.free_weights:
            # Not before: Dynamo's guards, made after the backend returns, must hold for the modules still to come.
            for position in freed:
                free(args[position])
        return compiled(*chosen)

    return run


def _static_fakes(inputs: Sequence[Any]) -> list[Any]:
    """Replaces real tensors that Dynamo has not seen, the int8 weights, by fake ones of fixed sizes.

    AOTAutograd would take their sizes for symbols: then kernels are compiled for weights of any size, and guards are
    asked for symbols that Dynamo does not know.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(inputs)
    return [
        context.fake_mode.from_tensor(value, static_shapes=True)
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value not in context.tensor_to_context
        else value
        for value in inputs
    ]


def _warn_if_nothing_rewritten(report: Report) -> None:
    if report.sites and not report.rewritten:
        warnings.warn(
            f"backend 'int8' rewrote none of the {len(report.sites)} linears of this graph, it runs in float. "
            f"{report.first_reasons()}. int8compile.explain(model, *inputs) lists all of them",
            Int8Warning,
            stacklevel=2,
        )
