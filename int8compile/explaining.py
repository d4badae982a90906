"""Explain which linears of a model `torch.compile(backend="int8")` rewrites, which not, and why."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from int8compile import cpu, hardware, ops, roofline, triton_kernels
from int8compile.config import Int8Config, matches
from int8compile.groups import make_d
from int8compile.observation import Given, Linear, captured, check_not_freed, lowered_report, observed, plain, some_rows
from int8compile.ops import column, reference
from int8compile.passes import RULES, finite
from int8compile.passes.names import parameter_name
from int8compile.report import Report
from int8compile.sites import Site, SkipReason
from int8compile.weights import rotation_of_view


def explain(
    model: Callable[..., Any], *args: Any, config: Int8Config | Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Report what `torch.compile(model, backend="int8")` would do with every linear of a model.

    The model runs once, in float, under `torch.no_grad()`: explain() describes inference. (With grad mode on, weights
    that require grad stay in float, and the backend warns.) Nothing is compiled. Buffers that the run changes, the
    state of the random number generators and Dynamo's caches are restored afterwards. Changes that `forward` makes to
    parameters or to plain Python attributes stay.

    Args:
        model: A module or a function. For a compiled one, its original is explained.
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
    config = Int8Config.from_options(config)
    model = plain(model)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    parameters = dict(modules[""].named_parameters()) if modules else {}
    check_not_freed(parameters, "Call explain() before compiling")
    record = _Recorder(config, {id(parameter): name for name, parameter in parameters.items()})
    # Only sizes marked dynamic are symbols. By default, sizes that differ from an earlier call are symbols, too.
    static: Any = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with static, captured(model, record) as call:
        call(*args, **kwargs)
    report = record.report
    for position, count in record.counts.items():
        report.sites[position] = count.added_to(report.sites[position])
    report.sites += [
        _not_captured(name, owner, parameter)
        for name, parameter in parameters.items()
        if id(parameter) not in record.used and multiplies(owner := modules[name.rpartition(".")[0]], parameter)
    ]
    report.unused_patterns = tuple(pattern for pattern in config.patterns if pattern not in record.matched)
    for device in sorted(record.devices, key=str):
        facts = hardware.of(device)
        report.sites = [_with_speed(site, facts) for site in report.sites]
        report.notes += (f"{facts.name}: {kernel_of(facts)}",)
    return report


class _Recorder:
    """Collects the report on a model while it runs, as a Dynamo backend.

    Attributes:
        report: The report on the calls so far.
        counts: The outliers of sites, by their positions in the report.
        used: The ids of the tensors that graphs take.
        matched: The patterns of `skip_modules` and `modules` that matched.
        devices: The devices of these tensors.
    """

    def __init__(self, config: Int8Config, qualified: Mapping[int, str]) -> None:
        self.report = Report()
        self.counts: dict[int, _Outliers] = collections.defaultdict(_Outliers)
        self.used: set[int] = set()
        self.matched: set[str] = set()
        self.devices: set[torch.device] = set()
        self._config, self._qualified = config, qualified
        self._rotations = _Rotations()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return a function that runs a captured graph and adds it to the report."""
        begin = 0  # The position in the report of the first site of the current call.

        def see(linear: Linear, given: Given) -> None:
            if linear.site is not None:
                self.counts[begin + order[id(linear.site)]].add(linear, given, self._rotations)

        rules = (*RULES, finite)
        observing, found = observed(gm, example_inputs, self._config, rules, see)
        lowered = lowered_report(gm, example_inputs, self._config, rules)
        order = {id(site): position for position, site in enumerate(found.sites)}
        # The rules saw paths that begin at the graph's own module.
        paths = [site.path for site in found.sites]
        patterns = self._config.patterns
        self.matched.update(pattern for pattern in patterns if any(matches(pattern, path) for path in paths))
        # Read now: Dynamo erases the sources afterwards.
        names = [parameter_name(node) for node in gm.graph.find_nodes(op="placeholder")]
        places: dict[str, int] = {}
        self.report.graphs += 1

        def run(*inputs: Any) -> Any:
            # One graph serves all modules of the same code, so its place in the model is known only at the call.
            nonlocal begin
            prefix = _prefix(zip(names, inputs, strict=True), self._qualified)
            if prefix not in places:
                places[prefix] = len(self.report.sites)
                self._add(found, lowered, prefix)
                tensors = [value for value in inputs if isinstance(value, Tensor)]
                self.used.update(map(id, tensors))
                self.devices.update(value.device for value in tensors)
            begin = places[prefix]
            return observing(*inputs)

        return run

    def _add(self, found: Report, lowered: Report, prefix: str) -> None:
        """Add the report on a graph, with the fusions of its lowered form, at a place in the model."""
        report = self.report
        report.activation_matmuls += found.activation_matmuls
        report.notes += found.notes
        report.fused_norms += lowered.fused_norms
        report.unfused += [dataclasses.replace(fusion, path=prefix + fusion.path) for fusion in lowered.unfused]
        report.sites += [
            dataclasses.replace(site, path=prefix + site.path, weight=prefix + site.weight) for site in found.sites
        ]


def kernel_of(facts: hardware.Hardware) -> str:
    """Return which kernels multiply on a device, for the report."""
    missing = "the PyTorch reference runs: it saves memory but is slower than float"
    if facts.kind == "cpu" and cpu.available():
        return f"C++ kernel, variant {cpu.variant()}"
    if facts.kind != "cuda":
        return f"no int8 kernel; {missing}"
    if why := triton_kernels.failure():
        return f"no Triton kernels ({why}); {missing}"
    if hardware.weight_only(facts.isa):
        why = f"Triton has no int8 matrix instructions for {facts.isa}"
        return f"weights in int8, activations in 23 bits, by PyTorch: {why}"
    family = hardware.kernel_family(facts.isa)
    return f"Triton kernels, table of {family}" if family else f"no Triton kernels for {facts.isa}; {missing}"


def _with_speed(site: Site, facts: hardware.Hardware) -> Site:
    if not site.rewritten:
        return site
    *_, rows, k, n = site.shape
    return dataclasses.replace(site, pays=roofline.describe(int(k), int(n), rows, 2, facts))


# Outliers are counted in so many rows of a linear.
_ROWS = 512


class _Rotations:
    """The rotations that linears would get. They are kept here, because explain() does not change the model."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def of(self, given: Given, *, each: bool) -> tuple[Tensor, bool]:
        """Return the d of a group, and whether it is calibrated."""
        known = [rotation for member in given.group if (rotation := rotation_of_view(*member)) is not None]
        if known:
            first = min(known, key=lambda rotation: (not rotation.calibrated, rotation.number))
            return first.d, first.calibrated
        key = tuple((id(parameter), view) for parameter, view in given.among)
        if key not in self._made:
            self._made[key] = make_d([view.of(parameter) for parameter, view in given.among], each=each)
        return self._made[key], False


@dataclasses.dataclass
class _Outliers:
    """The count of elements of a linear's activations that do not fit in 8 bits."""

    found: int = 0
    elements: int = 0
    calibrated: bool = False

    def add(self, linear: Linear, given: Given, rotations: _Rotations) -> None:
        """Count the outliers of a call."""
        if given.x.is_meta:
            return
        d = given.d
        if given.group:
            d, self.calibrated = rotations.of(given, each=linear.each)
        if linear.op is ops.column_linear.default:
            columns = column.outliers(given.x.detach().flatten(0, -2), linear.threshold).any(dim=0)
            self.found += int(columns.count_nonzero())
            self.elements += columns.numel()
        elif linear.op in _ON_A_GRID and (d is None or d.dim() == 1):
            x = some_rows(given.x, _ROWS)
            _, q1 = reference.digits(reference.quantize_rows(x, d, linear.threshold).Q)
            self.found += int(q1.count_nonzero())
            self.elements += q1.numel()

    def added_to(self, site: Site) -> Site:
        """Return a site with its share of outliers."""
        share = self.found / self.elements if self.elements else None
        return dataclasses.replace(site, outliers=share, calibrated=self.calibrated)


# Operators whose activations have 8 bits, with a second digit for outliers.
_ON_A_GRID = (ops.linear.default, ops.batched_linear.default, ops.grouped_linear.default)


def _prefix(given: Iterable[tuple[str, Any]], qualified: Mapping[int, str]) -> str:
    """Return the path of a graph in the model. After a graph break in a submodule, its names begin there."""
    for name, value in given:
        whole = qualified.get(id(value), "")
        if whole.endswith(f".{name}"):
            return whole.removesuffix(name)
    return ""


def multiplies(owner: nn.Module, parameter: Tensor) -> bool:
    """Return whether a parameter certainly is a matmul's weight: a matrix of a PyTorch layer, or a kernel of size 1."""
    layers = nn.Linear | nn.Bilinear | nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention | nn.modules.conv._ConvNd
    return isinstance(owner, layers) and parameter.dim() > 1 and all(size == 1 for size in parameter.shape[2:])


def looks_fused(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a parameter may be several matrices, as experts of modules without a known interface are."""
    return parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd)


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
