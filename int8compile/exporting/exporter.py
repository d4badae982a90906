"""Export a model to one .pt2 file that runs where this package is not installed.

torch.export captures the model, `int8compile.passes` rewrite its graph by the rules of torch.compile, and AOTInductor
compiles it. The library in the file has the C++ kernels for CPUs (csrc/package.cpp), or starts the compiled Triton
kernels for a GPU beside it (csrc/launcher.cpp). The generated code calls them as C functions, without the dispatcher.
A stub library checks the file and the CPU before that library is opened (stub.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from int8compile import cpu, hardware, triton_kernels
from int8compile.atomic import remove_leftovers, temporary_folder
from int8compile.config import Int8Config
from int8compile.errors import ExportError, listed
from int8compile.exporting import package
from int8compile.exporting.aot import Target, bounds, compile_graph, failing
from int8compile.ops import pack_weight
from int8compile.passes import AttributeBinder, int8_tensors, lower, rewrite_graph
from int8compile.passes.binding import WeightSlot
from int8compile.passes.lower_gpu import has_int8_kernels
from int8compile.passes.names import module_path
from int8compile.passes.static import BUFFER, QUANTIZED
from int8compile.progress import progress_bar
from int8compile.report import Report, SkipReason
from int8compile.version import __version__
from int8compile.weights import FREED, STORE, joined, quantize_checked, view_of_int8

if TYPE_CHECKING:
    from int8compile.triton_kernels.plan import Gpu

log = logging.getLogger(__name__)

ISAS = ("native", "avx512", "avx2")
FORMS = ("fast", "portable")

# Reasons that the options ask for. A linear that stays in float for another reason is refused.
_ASKED_FOR = {SkipReason.NAME, SkipReason.LM_HEAD, SkipReason.TIED, SkipReason.SMALL}

# The key in a node's meta for tensors of modules that hold their weight in int8.
_HELD = "int8compile_held"

# Inductor's settings are global in a process.
_lock = threading.Lock()


def export(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: Int8Config | Mapping[str, Any] | None = None,
    allow_partial: bool = False,
    isa: str = "native",
    form: str | None = None,
) -> Report:
    """Compile a model to int8 and write it to a file that runs without this package, in Python and in C++.

    `int8compile.load_exported(path)` checks and loads the file. `torch._inductor.aoti_load_package(path)` loads it with
    PyTorch alone; no compiler is needed.

    Args:
        model: A model in evaluation mode, in float or made by `quantize_`, on one device. It is not changed.
        args: Example inputs.
        path: The file, "....pt2". An existing file is replaced.
        kwargs: Example keyword inputs.
        dynamic_shapes: The sizes that may change from call to call, as for `torch.export.export`. The examples must
            have sizes of 2 or more there; calls may have sizes of 1 if the `torch.export.Dim` includes 1.
        config: The options, as an `Int8Config` or as the dictionary given to `torch.compile(options=...)`.
        allow_partial: Whether linears may stay in float that no option keeps in float.
        isa: The CPUs that the file is compiled for: "native" for CPUs with all features of this one, "avx512"
            (x86-64-v4 with VNNI) or "avx2" (x86-64-v3). The file has int8compile's kernels for all instruction sets,
            and the best one is chosen at loading.
        form: "fast", with int8compile's kernels, or "portable", with PyTorch's operators alone, which Inductor
            compiles. The default is fast, but portable on GPUs for which a package can have no kernels: AMD's, and
            NVIDIA's before Ampere. On a GPU the file has the kernels for GPUs of its compute capability.

    Returns:
        A report of the linears in int8, and of those in float with their reasons.

    Raises:
        ConfigError: An option is unknown or has a value that is not allowed.
        BadWeightError: A weight has NaN or Inf, or no data.
        ExportError: The model cannot be captured or compiled, or a part of it would stay in float.
    """
    config = Int8Config.from_options(config)
    model = getattr(model, "_orig_mod", model)
    path = Path(path)
    device = _check_arguments(model, path, isa)
    gpu, why_not = _gpu_of(device)
    notes: tuple[str, ...] = ()
    if form is None:
        form = "portable" if why_not else "fast"
        notes = (f"The package is in the portable form: {why_not}.",) if why_not else ()
    if form not in FORMS:
        raise ExportError(f"form={form!r}; allowed are {', '.join(map(repr, FORMS))}")
    if form == "fast" and why_not:
        raise ExportError(f"form='fast': {why_not}; use form='portable'")
    gpu = gpu if form == "fast" else None
    if gpu:
        notes += ("PyTorch's loader crashed with such a file on the one GPU that was tried: see docs/limits.md.",)
    baked = [
        repr(leaf) for leaf in tree_leaves((tuple(args), dict(kwargs or {}))) if not isinstance(leaf, Tensor | None)
    ]
    if baked:
        raise ExportError(
            f"the inputs {listed(baked)} are not tensors, and every call would use these values; give tensors, or "
            "wrap the model in a module that sets them"
        )
    library = cpu.load()
    if library is None:
        raise ExportError(
            f"there is no CPU kernel to put into {path.name}: {cpu.failure() or 'INT8COMPILE_CPU_KERNEL=0'}; "
            "`int8compile doctor` says more"
        )
    # The graph is also for sizes of 1, such as a single token; by default it is for sizes of 2 and more only.
    sizes: Any = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with _steps() as step, _lock, torch.no_grad(), sizes, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # torch warns of its own code
        step("Capturing")
        with failing(f"torch.export cannot capture {type(model).__name__}"):
            program = torch.export.export(
                model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
        step("Quantizing")
        module = program.module(check_guards=False)
        assert isinstance(module, GraphModule)
        report = rewrite(module, config, form, for_gpu=gpu is not None)
        _check_report(report, allow_partial)
        target = Target.of(isa, device, form, config, library, gpu)
        report.notes += (*notes, *_check_operators(module, target))
        _drop_unread(module)
        metadata = _metadata(program, module, config, report, target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            # Inductor does not quote compilers' arguments, and the user's path may have spaces.
            with (
                temporary_folder(path.absolute()) as beside,
                tempfile.TemporaryDirectory(prefix="int8compile-") as made,
            ):
                step("Compiling")
                files = compile_graph(module, program, Path(made), metadata, target)
                step("Writing")
                package.write(path, files, beside)
        except OSError as error:
            raise ExportError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    return report


def _check_arguments(model: Any, path: Path, isa: str) -> torch.device:
    """Check the arguments of `export`, and return the model's device."""
    if not isinstance(model, nn.Module):
        raise ExportError(f"the model is a {type(model).__name__}; give an nn.Module, as torch.export requires")
    if model.training:
        raise ExportError("the model is in training mode, which would be exported (dropout, ...); call model.eval()")
    package.check_name(path)
    if isa not in ISAS:
        raise ExportError(f"isa={isa!r}; allowed are {', '.join(map(repr, ISAS))}")
    devices: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, FREED):
            raise ExportError(
                f"{name} has no values any more (free_weights=True freed its memory); load the model again"
            )
        devices.setdefault(tensor.device, name)
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ExportError(f"the model is on {listed(map(str, devices))} ({places}); move it to one CPU or GPU first")
    return next(iter(devices), torch.device("cpu"))


def _gpu_of(device: torch.device) -> tuple[Gpu | None, str]:
    """Return the target of Triton kernels for a device, or None and why a package can have none for it."""
    if device.type != "cuda":
        return None, ""
    isa = hardware.of(device).isa
    if why := triton_kernels.failure():
        return None, f"there are no kernels for GPUs: {why}"
    if not isa.startswith("sm_") or not has_int8_kernels(device):
        return None, f"packages have kernels only for NVIDIA's GPUs from Ampere on, and not for {isa}"
    # Triton is imported only if there are kernels.
    from int8compile.triton_kernels import plan, tables

    arch = tables.ARCHITECTURES[hardware.kernel_family(isa)]
    return plan.Gpu(isa, arch, torch.cuda.get_device_properties(device).multi_processor_count), ""


def rewrite(module: GraphModule, config: Int8Config, form: str = "fast", *, for_gpu: bool = False) -> Report:
    """Rewrite an exported graph in place. Its int8 weights become buffers of the module.

    Args:
        module: The result of `torch.export.ExportedProgram.module`.
        config: The options.
        form: "fast" or "portable".
        for_gpu: Whether the fast form is for a GPU.

    Returns:
        A row for each linear, int8 or not.

    Raises:
        BadWeightError: A weight has NaN or Inf, or no data.
    """
    tensors = _stored(module)
    held = int8_tensors(module.graph)
    for node in held:
        node.meta[_HELD] = True
    parameters = {node: value for node, value in tensors.items() if isinstance(value, nn.Parameter) or node in held}
    for node in module.graph.find_nodes(op="get_attr"):
        # A tensor that `forward` makes of numbers is a constant.
        made = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        if node not in parameters and not made:
            node.meta[BUFFER] = True
    taken = [name for name, _ in module.named_buffers() if name.startswith(AttributeBinder.PREFIX)]
    if taken:
        raise ExportError(f"the model's buffers {listed(taken)} have names that int8compile uses; rename them")
    binder = AttributeBinder(module)
    # Weights of modules that `quantize_` made are stored too: a package has no modules to share them with.
    report = rewrite_graph(module, parameters, dataclasses.replace(config, free_weights=True), binder)
    lower(
        module,
        ["portable" if form == "portable" else "cuda" if for_gpu else "cpu"],
        binder,
        parameters,
        report,
        packaged=True,
    )

    def quantized(slot: WeightSlot) -> tuple[Tensor, Tensor, Tensor | None]:
        group, d = slot.sharing, None
        if group is not None:
            members, among = (
                [(parameters[each.source], each.view) for each in part] for part in (group.members, group.among)
            )
            d = STORE.share(members, among, each=group.each)
        weights, scales = [], []
        for source, view, path, scale, its_d in slot.members:
            if scale is None:
                weight, rows = quantize_checked(parameters[source], view, path, d)
            else:
                given_d = None if its_d is None else parameters[its_d]
                weight, rows, d = view_of_int8(parameters[source], parameters[scale], given_d, view)
            weights.append(pack_weight(weight) if slot.packed else weight)
            scales.append(rows)
        return joined(weights, interleaved=slot.interleaved), joined(scales, interleaved=slot.interleaved), d

    binder.fill(quantized)
    module.recompile()
    return report


def _stored(module: GraphModule) -> dict[Node, Tensor]:
    """Return the tensors of an exported module by their nodes, one node for each tensor even if it has many names."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    first: dict[Any, Node] = {}
    tensors: dict[Node, Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = named.get(str(node.target))
        if tensor is None:
            continue
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        kind = isinstance(tensor, nn.Parameter)  # A buffer stays a buffer even if it shares a parameter's memory.
        if (kind, place) in first:
            node.replace_all_uses_with(first[kind, place])
            module.graph.erase_node(node)
        else:
            first[kind, place] = node
            tensors[node] = tensor
    return tensors


def _drop_unread(module: GraphModule) -> None:
    """Remove tensors that the graph no longer reads: the float weights."""
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    stored = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name in {name for name, _ in stored} - read:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    module.graph.lint()
    module.recompile()


def _check_report(report: Report, allow_partial: bool) -> None:
    refused = [site for site in report.skipped if site.reason not in _ASKED_FOR]
    if allow_partial and report.rewritten:
        return
    if refused:
        raise ExportError(
            f"{len(refused)} of {len(report.sites)} linears would stay in float: "
            f"{listed([f'{site.path} ({site.op}): {site.why()}' for site in refused])}. "
            "allow_partial=True exports the model with them in float"
        )
    if not report.rewritten:
        why = f": {report.first_reasons()}" if report.sites else ", because it has none with a weight"
        raise ExportError(f"no linear of the model would be int8{why}. torch.export and AOTInductor export it in float")


def _check_operators(module: GraphModule, target: Target) -> tuple[str, ...]:
    """Return notes on other libraries' operators; refuse operators of int8compile that packages do not have."""
    foreign: dict[str, None] = {}
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target in target.functions:
            continue
        if node.target.namespace == "int8compile":
            raise ExportError(
                f"{module_path(node)} calls int8compile::{node.target._opname}, for which packages have no kernel. "
                "torch.compile(model, backend='int8') runs it"
            )
        if node.target.namespace not in ("aten", "prims", "prim", "higher_order"):
            foreign[str(node.target)] = None
    if not foreign:
        return ()
    return (f"The package calls {listed(foreign)}; programs that load it must register these operators first.",)


def _metadata(
    program: ExportedProgram, module: GraphModule, config: Int8Config, report: Report, target: Target
) -> dict[str, Any]:
    stored = {"int8": 0, "float": 0}
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    # Each weight's integers, scales and rotation.
    of_weights = {
        str(node.target) for node in module.graph.find_nodes(op="get_attr") if {_HELD, QUANTIZED} & node.meta.keys()
    }
    for name, each in tensors.items():
        # Weights that no linear reads, such as embedding tables.
        scale_of = tensors.get(f"{name.removesuffix('scale')}qweight") if name.endswith("scale") else None
        of_int8 = each.dtype == torch.int8 or (scale_of is not None and scale_of.dtype == torch.int8)
        stored["int8" if of_int8 or name in of_weights else "float"] += each.nbytes
    return {
        "format": package.FORMAT,
        "int8compile": __version__,
        "torch": torch.__version__,
        "device": target.device,
        "machine": platform.machine(),
        "isa": target.isa,
        "needs": target.needs,
        "gpu": target.gpu and {"isa": target.gpu.isa, "multiprocessors": target.gpu.multiprocessors},
        "form": target.form,
        "variants": target.variants,
        "config": dataclasses.asdict(config),
        "inputs": package.described(_tensors(module.graph.find_nodes(op="placeholder"))),
        "outputs": package.described(_tensors(tree_leaves(module.graph.output_node().args))),
        "sizes": {str(symbol): bounds(sizes) for symbol, sizes in program.range_constraints.items()},
        "bytes": stored,
        "report": report.to_dict(),
        "explain": str(report),
    }


def _tensors(nodes: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Return inputs or outputs as in the runtime, where a number is a tensor."""
    values = [(str(node), node.meta.get("val") if isinstance(node, Node) else node) for node in nodes]
    return [
        (name, value if isinstance(value, Tensor) else torch.empty((), dtype=torch.int64, device="meta"))
        for name, value in values
        if value is not None
    ]


@contextlib.contextmanager
def _steps() -> Iterator[Any]:
    """Show a progress line with the current step, if the export takes longer than a second."""
    with progress_bar(total=4, delay=1, bar_format="{desc} [{n_fmt}/{total_fmt}, {elapsed}]") as bar:

        def step(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield step
