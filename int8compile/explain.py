"""`explain()`: which linears of a model `torch.compile(backend="int8")` rewrites, which not, and why."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame
from torch._inductor import config as inductor_config
from torch.fx import GraphModule

from int8compile import cpu, hardware, roofline, triton_kernels
from int8compile.backend import copy_graph, errors_unwrapped, rewrite_captured
from int8compile.config import Int8Config
from int8compile.errors import FreedWeightError
from int8compile.passes import RULES, finite, matches
from int8compile.passes.names import parameter_name
from int8compile.report import Report, Site, SkipReason
from int8compile.weights import FreedWeight


def explain(
    model: Callable[..., Any], *args: Any, config: Int8Config | Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Lists every linear site of a model with what `torch.compile(model, backend="int8")` would do with it.

    The model runs once, in float, under `torch.no_grad()`: explain() describes inference. (With grad mode on, weights
    that require grad stay in float, and the backend warns.) Nothing is compiled. Buffers that the run changes, the
    state of the random number generators and Dynamo's caches are restored afterwards; what `forward` writes to
    parameters or to plain Python attributes stays.

    Args:
        model: A module or a function; a compiled one is explained as what it was made from.
        *args: Its inputs.
        config: The options, as an `Int8Config` or as the dictionary given to `torch.compile(options=...)`.
        **kwargs: Its keyword inputs.

    Returns:
        A report: `print(report)` shows a table, `report.to_dict()` is data.

    Raises:
        ConfigError: An option is unknown or has a value that is not allowed.
        FreedWeightError: The model's float weights were freed, so it cannot run in float.
        InputError: A linear is given integers.
    """
    if not isinstance(config, Int8Config):
        config = Int8Config.from_options(config)
    model = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    parameters = dict(modules[""].named_parameters()) if modules else {}
    for name, parameter in parameters.items():
        if isinstance(parameter, FreedWeight):
            raise FreedWeightError(
                f"{name} has no float weight any more (free_weights=True), so the model cannot run in float. "
                "Call explain() before compiling"
            )
    qualified = {id(parameter): name for name, parameter in parameters.items()}
    report = Report()
    used: set[int] = set()
    matched: set[str] = set()
    devices: set[torch.device] = set()

    def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with errors_unwrapped():
            found = rewrite_captured(copy_graph(gm), example_inputs, config, rules=(*RULES, finite))[1]
        # Of the paths that the rules saw, which begin at the graph's own module.
        matched.update(
            pattern for pattern in config.skip_modules if any(matches(pattern, site.path) for site in found.sites)
        )
        # Read now: Dynamo erases the sources afterwards.
        names = [parameter_name(node) for node in gm.graph.find_nodes(op="placeholder")]
        seen: set[str] = set()
        report.graphs += 1

        def run(*inputs: Any) -> Any:
            # One graph serves all modules of the same code, so where in the model it stands shows only at the call.
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            prefix = _prefix(zip(names, inputs, strict=True), qualified)
            if prefix not in seen:
                seen.add(prefix)
                report.activation_matmuls += found.activation_matmuls
                report.notes += found.notes
                report.sites += [
                    dataclasses.replace(site, path=prefix + site.path, weight=prefix + site.weight)
                    for site in found.sites
                ]
                used.update(map(id, tensors))
                devices.update(value.device for value in tensors)
            return gm.forward(*inputs)

        return run

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Only what is marked dynamic is a symbol. Dynamo would make one of each size that an earlier call had otherwise.
    static: Any = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    # Parameters that Inductor is to freeze would be no inputs.
    thawed: Any = inductor_config.patch(freezing=False)
    with (
        torch.no_grad(),
        static,
        thawed,
        torch.random.fork_rng(),
        _buffers_restored(model),
        _dynamo_caches_dropped(),
    ):
        torch.compile(_with_code_of_its_own(call), backend=record)(*args, **kwargs)
    report.sites += [
        _not_captured(name, owner, parameter)
        for name, parameter in parameters.items()
        if id(parameter) not in used and multiplies(owner := modules[name.rpartition(".")[0]], parameter)
    ]
    report.unused_patterns = tuple(pattern for pattern in config.skip_modules if pattern not in matched)
    for device in sorted(devices, key=str):
        facts = hardware.of(device)
        report.sites = [_with_speed(site, facts) for site in report.sites]
        report.notes += (f"{facts.name}: {kernel_of(facts)}",)
    return report


def kernel_of(facts: hardware.Hardware) -> str:
    """What multiplies on a device, for the report."""
    missing = "the PyTorch reference runs: it saves memory but is slower than float"
    if facts.kind == "cpu" and cpu.available():
        return f"C++ kernel, variant {cpu.variant()}"
    if facts.kind != "cuda":
        return f"no int8 kernel; {missing}"
    if why := triton_kernels.failure():
        return f"no Triton kernels ({why}); {missing}"
    if hardware.weight_only(facts.isa):
        return f"weights in int8, activations in 16 bit: Triton has no int8 matrix instructions for {facts.isa}"
    family = hardware.kernel_family(facts.isa)
    return f"Triton kernels, table of {family}" if family else f"no Triton kernels for {facts.isa}; {missing}"


def _with_speed(site: Site, facts: hardware.Hardware) -> Site:
    if not site.rewritten:
        return site
    *_, rows, k, n = site.shape
    return dataclasses.replace(site, pays=roofline.describe(int(k), int(n), rows, 2, facts))


def _prefix(given: Iterable[tuple[str, Any]], qualified: Mapping[int, str]) -> str:
    """Where in the model a graph lies: after a graph break in a submodule, its names begin at that submodule."""
    for name, value in given:
        whole = qualified.get(id(value), "")
        if whole.endswith(f".{name}"):
            return whole.removesuffix(name)
    return ""


def multiplies(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is a matmul's weight for certain: a matrix of a PyTorch layer, or a kernel of size 1."""
    layers = nn.Linear | nn.Bilinear | nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention | nn.modules.conv._ConvNd
    return isinstance(owner, layers) and parameter.dim() > 1 and all(size == 1 for size in parameter.shape[2:])


def _not_captured(name: str, owner: nn.Module, parameter: Tensor) -> Site:
    return Site(
        path=name.removesuffix(".weight"),
        op=type(owner).__name__.lower(),
        source="",
        shape=("?", str(parameter.shape[1]), str(parameter.shape[0])) if parameter.dim() == 2 else (),
        weight=name,
        weight_bytes=parameter.nbytes,
        bytes_before=parameter.nbytes,
        bytes_after=parameter.nbytes,
        reason=SkipReason.NOT_CAPTURED,
    )


def _with_code_of_its_own(function: Any) -> FunctionType:
    """A copy whose code Dynamo has never seen: it gives up on code that was compiled 256 times."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


@contextlib.contextmanager
def _buffers_restored(model: Any) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # The tensors, which forward may replace, and their values, which it may change.
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
    """Drops the cache entries that Dynamo makes meanwhile: they would count against the model's own recompile limit.

    After a graph break the model's own functions get some. Where they had entries before, which are the user's, theirs
    are kept and so ours stay.
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
