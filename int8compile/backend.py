"""The backend of `torch.compile(model, backend="int8")`: a Dynamo graph in, a callable out.

The graph is copied, rewritten and lowered by `int8compile.passes`, and compiled by Inductor. The callable takes the
arguments that Dynamo passes, float weights among them. It replaces the weights of rewritten linears by int8 weights of
the store; other arguments pass through.

Words used here:
    d: The rotation of a weight: a factor for each of its K inputs, applied before the Hadamard matrix.
    slot: A weight that the rewritten graph takes as an input. Several parameters may be joined in it (q, k and v).
    part: One parameter of a slot.
    group: Weights that share one d, because they read the same x.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from int8compile.passes import RULES, PlaceholderBinder, Target, int8_tensors, lower, rewrite_graph
from int8compile.passes.binding import Member, WeightSlot, stored_placeholder
from int8compile.passes.names import parameter_name
from int8compile.passes.rules import Rule
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
    """Compile a captured graph. `torch.compile(model, backend="int8", options={...})` calls it, not the user.

    Args:
        gm: The captured graph; parameters are placeholders. It is not changed: Dynamo reads it again later.
        example_inputs: The values that the placeholders were captured with, the real parameters among them.
        mode: Inductor's mode.
        options: Fields of `Int8Config`.

    Raises:
        ConfigError: An option is unknown or has a value that is not allowed.
        BadWeightError: A weight to be rewritten has NaN or Inf, or no data.
        FreedWeightError: The graph needs a float weight whose memory was released.
    """
    with errors_unwrapped():
        return _int8(gm, example_inputs, Int8Config.from_options(options, mode=mode))


def register() -> None:
    """Make torch find the backend by its name, and watch for code that Dynamo gives up on. The package calls it.

    An installed package has an entry point, through which torch finds the backend without an import. Only a bare
    checkout has none, and is registered here.
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
    binder = PlaceholderBinder(module)
    report = rewrite_graph(module, parameters, config, binder)
    lower_captured(module, parameters, binder, report)
    patches = config.inductor_patches()
    if inductor_config.freezing:  # Its freezing needs constants, and weights are inputs here.
        patches = {"freezing": False} | patches
    for note in report.notes:
        warn_once(note)
    log.info("%s", report.summary())
    log.debug("%s", report)
    _warn_if_nothing_rewritten(report)
    compiled = _compile(module, example_inputs, binder.slots, config, patches)
    return functools.partial(_with_lifted, compiled, lifted) if lifted else compiled


def lift_attributes(module: GraphModule) -> list[Tensor]:
    """Turn the tensors that a Dynamo graph holds into inputs.

    With Inductor's freezing, Dynamo puts the parameters into the graph instead of passing them; here they become inputs
    again.

    Returns:
        The values of the new placeholders, which stand behind the others.
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
    """Pass errors of int8compile through Dynamo unchanged: it wraps every error but a `ShortenTraceback`."""
    try:
        yield
    except Int8CompileError as error:
        kind = type(error)
        shown = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__})
        raised: Int8CompileError = shown(*error.args, first_useful_frame=None)
        raise raised from error.__cause__


def copy_graph(gm: GraphModule) -> GraphModule:
    """Copy a Dynamo graph for rewriting: the nodes are new; their meta and the module's attributes are shared.

    `GraphModule` copies only the attributes that nodes name. AOTAutograd and Inductor read more of them: without
    `_param_name_to_source` no input is static, and CUDA graphs copy every weight at every replay; without the hooks on
    saved tensors their cache does not distinguish two graphs.
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
        if hasattr(original, "_dynamo_source"):  # AOTAutograd reads it of placeholders.
            node._dynamo_source = original._dynamo_source
    return copied


def rewrite_captured(
    module: GraphModule, example_inputs: Sequence[Any], config: Int8Config, *, rules: tuple[Rule, ...] = RULES
) -> tuple[PlaceholderBinder, Report]:
    """Rewrite a copied Dynamo graph, whose placeholders stand for `example_inputs` in order."""
    binder = PlaceholderBinder(module)
    return binder, rewrite_graph(module, captured_parameters(module, example_inputs), config, binder, rules=rules)


def lower_captured(
    module: GraphModule,
    parameters: Mapping[Node, Tensor],
    binder: PlaceholderBinder,
    report: Report,
    *,
    warn: bool = True,
) -> None:
    """Lower a rewritten Dynamo graph to the kernels that this machine has for it.

    Args:
        module: The graph.
        parameters: Its parameters, as they were captured.
        binder: The int8 weights of the graph.
        report: The report of the rewriting, which gets the fusions that are not made.
        warn: Whether to warn if a GPU has no kernels.
    """
    targets: list[Target] = []
    if report.rewritten and _any_on("cpu", parameters) and cpu.available():
        targets.append("cpu")
    if report.rewritten and _any_on("cuda", parameters) and _gpu_kernels(parameters, warn=warn):
        targets.append("cuda")
    lower(module, targets, binder, parameters, report)


def captured_parameters(module: GraphModule, example_inputs: Sequence[Any]) -> dict[Node, Tensor]:
    """Return the parameters of a Dynamo graph by their placeholders, with the int8 weights of int8 modules.

    In a rewritten graph, further placeholders follow those of the captured graph.
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


def _gpu_kernels(parameters: Mapping[Node, Tensor], *, warn: bool = True) -> bool:
    """Load the Triton kernels and return whether they loaded.

    Warn if a GPU has none; lowering leaves that GPU out.
    """
    devices = {parameter.device for parameter in parameters.values() if parameter.device.type == "cuda"}
    missing = [device for device in devices if not hardware.kernel_family(hardware.of(device).isa)]
    loaded = triton_kernels.load()
    if warn and (missing or not loaded) and not triton_kernels.switched_off():
        why = triton_kernels.failure() or f"Triton has none for {', '.join(map(str, missing))}"
        warn_once(
            f"the int8 GPU kernels cannot be used: {why}. The int8 operators run through PyTorch instead: slower than "
            "float, with the same results. INT8COMPILE_TRITON=0 leaves the kernels out without this warning"
        )
    return loaded


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter of a slot, described by positions among the arguments of a graph.

    Attributes:
        position: Position of the parameter.
        key: The form of its int8 weight.
        path: Module path, for messages.
        scale: Position of the scales, where the parameter is int8 already.
        d: Position of the rotation, where the parameter is int8 already and rotated.
        group: Positions and views of the weights that share its d.
        among: Positions and views of the weights that a new d is computed from.
        d_each: Whether each matrix is rotated by a d of its own.
    """

    position: int
    key: Key
    path: str
    scale: int | None
    d: int | None
    group: tuple[tuple[int, WeightView], ...]
    among: tuple[tuple[int, WeightView], ...]
    d_each: bool

    @property
    def given(self) -> tuple[int, ...]:
        """Positions of the scales and d of a parameter that is int8 already."""
        return tuple(position for position in (self.scale, self.d) if position is not None)

    def get(self, args: Sequence[Any]) -> QuantizedWeight:
        """Return the int8 weight, quantized now if necessary."""
        return STORE.get(
            args[self.position],
            self.key.view,
            self.path,
            packed=self.key.packed,
            scale=None if self.scale is None else args[self.scale],
            d=None if self.d is None else args[self.d],
            group=self._at(self.group, args),
            among=self._at(self.among, args),
            each=self.d_each,
        )

    def share(self, args: Sequence[Any]) -> None:
        """Have the weights of the group share one d, for which some may have to be quantized again."""
        if self.group:
            STORE.share(self._at(self.group, args), self._at(self.among, args), each=self.d_each)

    @staticmethod
    def _at(places: Sequence[tuple[int, WeightView]], args: Sequence[Any]) -> list[tuple[Tensor, WeightView]]:
        return [(args[position], view) for position, view in places]


def _parts(slot: WeightSlot, positions: Mapping[Node, int]) -> list[_Part]:
    """Return the parts of a slot."""

    def position(node: Node | None) -> int | None:
        return None if node is None else positions[node]

    def places(members: Iterable[Member]) -> tuple[tuple[int, WeightView], ...]:
        return tuple((positions[member.source], member.view) for member in members)

    sharing = slot.sharing
    group, among = ((), ()) if sharing is None else (places(sharing.members), places(sharing.among))
    d_each = sharing is not None and sharing.each
    return [
        _Part(
            positions[source],
            Key(view, slot.packed, bool(group)),
            path,
            position(scale),
            position(d),
            group,
            among,
            d_each,
        )
        for source, view, path, scale, d in slot.members
    ]


class _Arguments:
    """Makes the arguments of a compiled graph from those of the captured graph: int8 weights replace float weights.

    Attributes:
        parts: The parts of all slots.
        kept: Positions of the captured graph's arguments that the compiled graph takes, too.
        unread: Positions of parameters that nothing in the graph reads any more. The option free_weights frees them.
    """

    def __init__(self, module: GraphModule, captured: Sequence[Node], slots: Sequence[WeightSlot]) -> None:
        """Erase the inputs that nothing reads, and note positions of arguments. Nodes would keep the graph alive."""
        positions = {node: position for position, node in enumerate(captured)}
        self.parts: list[_Part] = []
        self._joined: list[tuple[int, int, bool]] = []
        groups: dict[Node, list[int]] = {}
        for slot in slots:
            begin = len(self.parts)
            self.parts += _parts(slot, positions)
            self._joined.append((begin, len(self.parts), slot.interleaved))
            if slot.group is not None:
                groups.setdefault(slot.group.node, []).extend(range(begin, len(self.parts)))
        self._lookups = [(part.position, part.key, part.given, part) for part in self.parts]
        # The weights that each lookup found last; weakly, since a weight goes when its parameter goes.
        self._recent: list[Callable[[], QuantizedWeight | None]] = [lambda: None] * len(self.parts)
        # The first part of each group has the d that all its other parts must have.
        self._firsts = [numbers[0] for numbers in groups.values()]
        self._alike = [(number, numbers[0]) for numbers in groups.values() for number in numbers[1:]]
        # The store's tensors come by slots; the graph takes them in the order of its placeholders.
        made = [node for slot in slots for node in slot.nodes[:2]] + list(groups)
        added = {node: order for order, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        self._order = sorted(range(len(made)), key=lambda place: added[made[place]])
        # The compiled graph does not take weights that nothing reads any more, nor their scales. A module keeps the
        # scales, because other graphs read them.
        members = [member for slot in slots for member in slot.members]
        scales = {node for member in members for node in (member.scale, member.d) if node is not None}
        self.unread = sorted(positions[node] for node in {member.source for member in members} if not node.users)
        erased = {*self.unread, *(positions[node] for node in scales if not node.users)}
        for position in sorted(erased):
            module.graph.erase_node(captured[position])
        self.kept = [position for position in range(len(captured)) if position not in erased]

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """Return the arguments of the compiled graph. Weights are quantized now if necessary."""
        found = self._find(args)
        while not all(found[number].d is found[first].d for number, first in self._alike):
            # Another graph with other groups, or another thread, has rotated some of them by another d. The loop ends:
            # `share` chooses among the d that exist in a fixed order, so a weight never gets a d back that it has lost.
            for part in self.parts:
                part.share(args)
            found = self._find(args)
        tensors: list[Any] = []
        for begin, end, interleaved in self._joined:
            if end == begin + 1:
                one: Any = STORE.alone(found[begin])
            else:
                one = STORE.fused(found[begin:end], interleaved=interleaved)
            tensors += (one.qweight, one.scale)
        tensors += [found[first].d for first in self._firsts]
        return [*[args[position] for position in self.kept], *[tensors[place] for place in self._order]]

    def _find(self, args: Sequence[Any]) -> list[QuantizedWeight]:
        fresh, recent, found = STORE.fresh, self._recent, []
        for number, (position, key, given, part) in enumerate(self._lookups):
            parameter, weight = args[position], recent[number]()
            # Most calls bring the same parameters as the last, unchanged. Only the store knows about freed ones.
            if weight is None or given or type(parameter) in FREED or not weight.made_of.holds(parameter):
                weight = fresh(parameter, key, [args[place] for place in given]) or part.get(args)
                recent[number] = weakref.ref(weight)
            found.append(weight)
        return found


def _compile(
    module: GraphModule,
    example_inputs: Sequence[Any],
    slots: Sequence[WeightSlot],
    config: Int8Config,
    patches: Mapping[str, Any],
) -> Compiled:
    """Compile a rewritten graph with Inductor.

    Returns:
        A callable over the arguments of the graph as captured.
    """
    captured = module.graph.find_nodes(op="placeholder")[: len(example_inputs)]
    arguments = _Arguments(module, captured, slots)
    module.recompile()
    for position in arguments.kept:
        _check_not_freed(captured[position], example_inputs[position])
    # The import takes seconds, and explain() does not need it.
    from torch._inductor.compile_fx import compile_fx

    # Weights that another graph has had quantized may have changed since in ways that calls do not see: on a GPU, or in
    # a few elements. Comparing them reads all of their memory, for which there is time only here.
    for part in arguments.parts:
        STORE.compare(example_inputs[part.position], [example_inputs[place] for place in part.given])
    fakes = _static_fakes(arguments(example_inputs))  # This quantizes all weights of the graph.
    compiled: Any = compile_fx(module, fakes, config_patches=dict(patches))
    for node in captured:
        # Its weak reference to the parameter would prevent `torch.utils.swap_tensors`. Dynamo removes its own, too.
        node.meta.pop("grapharg", None)
    # Memory is not released before the first call: Dynamo's guards, made after the backend returns, must hold for
    # the modules still to come.
    to_free = arguments.unread if config.free_weights else []

    def run(*args: Any) -> Any:
        chosen = arguments(args)
        for position in to_free:
            free(args[position])
        return compiled(*chosen)

    return run


def _check_not_freed(node: Node, tensor: Any) -> None:
    """Raise `FreedWeightError` for an input that a compiled graph reads, but whose memory was released."""
    if isinstance(tensor, FREED):
        form = "in float" if isinstance(tensor, FreedWeight) else "unpacked"
        raise FreedWeightError(
            f"{parameter_name(node)} is needed {form} here, but free_weights=True has given its memory back. Compile "
            "every use of it to int8, or compile without free_weights"
        )


def _static_fakes(inputs: Sequence[Any]) -> list[Any]:
    """Replace the int8 weights, which Dynamo has not seen, by fake tensors of fixed sizes.

    AOTAutograd would make symbols of their sizes: kernels would be compiled for weights of any size, and guards would
    name symbols that Dynamo does not know.
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
