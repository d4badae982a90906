"""Offline export: a model in, one .pt2 file out that runs where this package is not installed.

torch.export captures the model, `int8compile.passes` rewrite its graph by the rules that torch.compile follows, and
AOTInductor compiles it. The file's own library has the C++ kernels for CPUs (csrc/package.cpp), or starts the compiled
Triton kernels for a GPU that lie beside it (csrc/launcher.cpp). The generated code calls them as C functions, without
the dispatcher. That library checks the file, the CPU and the GPU when it is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.value_ranges import bound_sympy
from tqdm import tqdm

from int8compile import cpu, hardware, ops, package, triton_kernels
from int8compile.atomic import remove_leftovers, temporary_folder
from int8compile.config import Int8Config
from int8compile.errors import ExportError, Int8CompileError, first_line, listed
from int8compile.ops import digits, pack_weight
from int8compile.passes import (
    EXACT_DIVISION,
    AttributeBinder,
    holds_int8,
    lower_for_cpu,
    lower_for_gpu,
    lower_portable,
    rewrite_graph,
)
from int8compile.passes.binding import WeightSlot
from int8compile.passes.lower_gpu import has_int8_kernels
from int8compile.passes.names import module_path
from int8compile.passes.static import BUFFER, attribute, is_written, meta_tensor, traced
from int8compile.report import Report, SkipReason
from int8compile.weights import FREED, joined, quantize_checked

if TYPE_CHECKING:
    from int8compile.triton_kernels.plan import Gpu, Planner

log = logging.getLogger(__name__)

ISAS = ("native", "avx512", "avx2")
FORMS = ("fast", "portable")
# As GCC and Clang name the levels of x86-64, and the bits of their registers.
_LEVELS = {"avx512": ("x86-64-v4", 512), "avx2": ("x86-64-v3", 256)}

# What the options ask for; all else that stays in float is refused.
_ASKED_FOR = {SkipReason.NAME, SkipReason.LM_HEAD, SkipReason.TIED, SkipReason.SMALL}

# The operators that a package has, with the parameters of the C functions: for CPUs,
_WEIGHT = "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale, AtenTensorHandle* bias"
_POLICY = "double threshold, int32_t by_column"
_FUNCTIONS: dict[Any, str] = {
    ops.packed_linear_no_grad.default: f"{_WEIGHT}, {_POLICY}, AtenTensorHandle* y",
    ops.packed_linear_pair_no_grad.default: f"{_WEIGHT}, int64_t n0, {_POLICY}, AtenTensorHandle* y0, "
    "AtenTensorHandle* y1",
    ops.packed_linear_triple_no_grad.default: f"{_WEIGHT}, int64_t n0, int64_t n1, {_POLICY}, AtenTensorHandle* y0, "
    "AtenTensorHandle* y1, AtenTensorHandle* y2",
    ops.packed_batched_linear.default: f"{_WEIGHT}, double threshold, const char* outliers, AtenTensorHandle* y",
    ops.packed_weight_only_linear_no_grad.default: f"{_WEIGHT}, AtenTensorHandle* y",
    ops.linear_no_grad.default: f"{_WEIGHT}, {_POLICY}, AtenTensorHandle* y",
    ops.weight_only_linear_no_grad.default: f"{_WEIGHT}, AtenTensorHandle* y",
    ops.grouped_linear.default: "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale, "
    "AtenTensorHandle ends, double threshold, const char* outliers, AtenTensorHandle* y",
}
# and for GPUs.
_GPU_FUNCTIONS: dict[Any, str] = {
    ops.quantize_rows.default: f"AtenTensorHandle x, {_POLICY}, AtenTensorHandle* planes, AtenTensorHandle* info",
    ops.quantized_linear.default: "AtenTensorHandle planes, AtenTensorHandle info, AtenTensorHandle qweight, "
    f"AtenTensorHandle scale, AtenTensorHandle* bias, {_POLICY}, int64_t activation, int64_t n0, int64_t n1, "
    "int32_t dtype, AtenTensorHandle* y",
    ops.weight_only_linear.default: f"{_WEIGHT}, AtenTensorHandle* y",
}

# Inductor's settings are of the process.
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
    """Compiles a model to int8 and writes it to a file that runs without this package, in Python and in C++.

    `torch._inductor.aoti_load_package(path)` loads it; it needs PyTorch and nothing else, not even a compiler.

    Args:
        model: In evaluation mode, in float or made by `quantize_`, on one device. It is not changed.
        args: Example inputs.
        path: The file, "....pt2"; what is there is replaced.
        kwargs: Example keyword inputs.
        dynamic_shapes: Which sizes may change from call to call, as `torch.export.export` takes them. Sizes of 1 are
            allowed later if the `torch.export.Dim` says so, but the examples must have sizes of 2 or more there.
        config: The options, as an `Int8Config` or as the dictionary given to `torch.compile(options=...)`.
        allow_partial: Whether linears may stay in float that no option keeps in float.
        isa: The CPUs that it is compiled for: "native", those that have all that this one has, or "avx512"
            (x86-64-v4 with VNNI) or "avx2" (x86-64-v3). Of our kernels the file has one for each instruction set,
            and the best is chosen when it is loaded.
        form: "fast", with our kernels, or "portable", with operators of PyTorch alone, which Inductor compiles. By
            default fast, but portable on GPUs for which a package can have no kernels: AMD's, and NVIDIA's before
            Ampere. On a GPU the file has the kernels for GPUs of its compute capability.

    Returns:
        What is int8 in it, and what is not and why.

    Raises:
        ConfigError: An option is unknown or has a value that is not allowed.
        BadWeightError: A weight has NaN or Inf, or no data.
        ExportError: The model cannot be captured or compiled, or a part of it would stay in float.
    """
    if not isinstance(config, Int8Config):
        config = Int8Config.from_options(config)
    model = getattr(model, "_orig_mod", model)
    path = Path(path)
    device = _check_arguments(model, path, isa)
    gpu, why_not = _gpu_of(device)
    form = form or ("portable" if why_not else "fast")
    if form not in FORMS:
        raise ExportError(f"form={form!r}; allowed are {', '.join(map(repr, FORMS))}")
    if form == "fast" and why_not:
        raise ExportError(f"form='fast': {why_not}; use form='portable'")
    gpu = gpu if form == "fast" else None
    baked = [
        repr(leaf) for leaf in tree_leaves((tuple(args), dict(kwargs or {}))) if not isinstance(leaf, Tensor | None)
    ]
    if baked:
        raise ExportError(
            f"the inputs {listed(baked)} are no tensors, and would be what every call computes with; give tensors, or "
            "wrap the model in a module that sets them"
        )
    library = cpu.load()
    if library is None:
        raise ExportError(
            f"there is no CPU kernel to put into {path.name}: {cpu.failure() or 'INT8COMPILE_CPU_KERNEL=0'}; "
            "`int8compile doctor` says more"
        )
    # Sizes of 1, a single token for example, are sizes like others: by default the graph is made for 2 and more only.
    sizes: Any = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with _steps() as step, _lock, torch.no_grad(), sizes, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # torch's own, about itself
        step("Capturing")
        with _failing(f"torch.export cannot capture {type(model).__name__}"):
            program = torch.export.export(
                model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
        step("Quantizing")
        module = program.module(check_guards=False)
        assert isinstance(module, GraphModule)
        report = rewrite(module, config, form, for_gpu=gpu is not None)
        _check_report(report, allow_partial)
        target = _Target.of(isa, device, form, config, library, gpu)
        report.notes += _check_operators(module, target)
        _drop_unread(module)
        metadata = _metadata(program, module, config, report, target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            # Inductor does not quote what it gives to compilers, and the user's path may have spaces.
            with (
                temporary_folder(path.absolute()) as beside,
                tempfile.TemporaryDirectory(prefix="int8compile-") as made,
            ):
                step("Compiling")
                files = _compile(module, program, Path(made), metadata, target)
                step("Writing")
                package.write(path, files, beside)
        except OSError as error:
            raise ExportError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    return report


def _check_arguments(model: Any, path: Path, isa: str) -> torch.device:
    """Returns the device that the model is on."""
    if not isinstance(model, nn.Module):
        raise ExportError(f"the model is a {type(model).__name__}; give an nn.Module, as torch.export asks for")
    if model.training:
        raise ExportError("the model is in training mode, which would be exported (dropout, ...); call model.eval()")
    package.check_name(path)
    if isa not in ISAS:
        raise ExportError(f"isa={isa!r}; allowed are {', '.join(map(repr, ISAS))}")
    devices: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, FREED):
            raise ExportError(
                f"{name} has no values any more (free_weights=True gave its memory back); load the model again"
            )
        devices.setdefault(tensor.device, name)
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ExportError(f"the model is on {listed(map(str, devices))} ({places}); move it to one CPU or GPU first")
    return next(iter(devices), torch.device("cpu"))


def _gpu_of(device: torch.device) -> tuple[Gpu | None, str]:
    """What Triton kernels for a device are compiled for, if it is a GPU; and why a package can have none for it."""
    if device.type != "cuda":
        return None, ""
    isa = hardware.of(device).isa
    if why := triton_kernels.failure():
        return None, f"there are no kernels for GPUs: {why}"
    if not isa.startswith("sm_") or not has_int8_kernels(device):
        return None, f"there are no kernels that a package can hold for {isa}, only for NVIDIA's GPUs from Ampere on"
    # Triton is imported where there are kernels, and not before.
    from int8compile.triton_kernels import plan, tables

    arch = tables.ARCHITECTURES[hardware.kernel_family(isa)]
    return plan.Gpu(isa, arch, torch.cuda.get_device_properties(device).multi_processor_count), ""


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Tells what PyTorch could not do, in an `ExportError`."""
    try:
        yield
    except Int8CompileError:
        raise
    except Exception as error:
        raise ExportError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error of PyTorch's says, in a few lines, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Set TORCH", "You can suppress", "For more info"))]
    return f"{type(error).__name__}: {' '.join(told[:4])[:600]}"


def rewrite(module: GraphModule, config: Int8Config, form: str = "fast", *, for_gpu: bool = False) -> Report:
    """Rewrites an exported graph, in place, with its int8 weights as buffers of the module.

    Args:
        module: What `torch.export.ExportedProgram.module` returns.
        config: What to rewrite and how.
        form: "fast" or "portable".
        for_gpu: Whether the fast form is that of GPUs.

    Returns:
        A row for each linear, int8 or not.

    Raises:
        BadWeightError: A weight has NaN or Inf, or no data.
    """
    tensors = _stored(module)
    held = {node for call in module.graph.nodes if holds_int8(call) for node in call.args[1:3]}
    parameters = {node: value for node, value in tensors.items() if isinstance(value, nn.Parameter) or node in held}
    for node in module.graph.find_nodes(op="get_attr"):
        # What `forward` makes of numbers is a constant.
        made = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        if node not in parameters and not made:
            node.meta[BUFFER] = True
    taken = [name for name, _ in module.named_buffers() if name.startswith(AttributeBinder.PREFIX)]
    if taken:
        raise ExportError(f"the model's buffers {listed(taken)} have names of ours; rename them")
    binder = AttributeBinder(module)
    # The weights of modules that `quantize_` made are stored too: a package has no modules to share them with.
    report = rewrite_graph(module, parameters, dataclasses.replace(config, free_weights=True), binder)
    if form == "portable":
        lower_portable(module)
    elif for_gpu:
        lower_for_gpu(module, binder, parameters, lambda device: True)
    else:
        lower_for_cpu(module, binder, parameters)
    module.graph.lint()

    def quantized(slot: WeightSlot) -> tuple[Tensor, Tensor]:
        weights, scales = [], []
        for source, view, path, scale in slot.members:
            if scale is None:
                weight, rows = quantize_checked(parameters[source], view, path)
            else:
                weight, rows = view.of(parameters[source]), parameters[scale].detach()
            weights.append(pack_weight(weight) if slot.packed else weight)
            scales.append(rows)
        return joined(weights, interleaved=slot.interleaved), joined(scales, interleaved=slot.interleaved)

    binder.fill(quantized)
    module.recompile()
    return report


def _stored(module: GraphModule) -> dict[Node, Tensor]:
    """The tensors of an exported module by their nodes: one node for each tensor, however many names it has."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    first: dict[Any, Node] = {}
    tensors: dict[Node, Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = named.get(str(node.target))
        if tensor is None:
            continue
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        kind = isinstance(tensor, nn.Parameter)  # A buffer stays one where it is a parameter's memory.
        if (kind, place) in first:
            node.replace_all_uses_with(first[kind, place])
            module.graph.erase_node(node)
        else:
            first[kind, place] = node
            tensors[node] = tensor
    return tensors


def _drop_unread(module: GraphModule) -> None:
    """Removes what the graph does not read any more: the float weights."""
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


def _check_operators(module: GraphModule, target: _Target) -> tuple[str, ...]:
    """Notes on operators that are not PyTorch's; refuses those of ours that a package has not."""
    foreign: dict[str, None] = {}
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target in target.functions:
            continue
        if node.target.namespace == "int8compile":
            portable = "form='portable' has it in operators of PyTorch. " * (node.target is ops.batched_linear.default)
            raise ExportError(
                f"{module_path(node)} calls int8compile::{node.target._opname}, for which there is no kernel that a "
                f"package can hold. {portable}torch.compile(model, backend='int8') runs it"
            )
        if node.target.namespace not in ("aten", "prims", "prim", "higher_order"):
            foreign[str(node.target)] = None
    if not foreign:
        return ()
    return (f"The package calls {listed(foreign)}; what loads it must register these operators first.",)


@dataclasses.dataclass(frozen=True)
class _Target:
    """What generated code is compiled for.

    Attributes:
        isa: The option, for the CPU.
        device: "cpu" or "cuda".
        form: "fast" or "portable".
        gpu: What Triton kernels are compiled for, if there are any.
        patches: Settings of Inductor.
        needs: Compiler macros of what the code may use.
        library: The kernels for CPUs, with what is linked to the code.
    """

    isa: str
    device: str
    form: str
    gpu: Gpu | None
    patches: dict[str, Any]
    needs: tuple[str, ...]
    library: cpu.Library

    @staticmethod
    def of(
        isa: str, device: torch.device, form: str, options: Int8Config, library: cpu.Library, gpu: Gpu | None
    ) -> _Target:
        from torch._inductor import config, cpp_builder, cpu_vec_isa

        patches = (EXACT_DIVISION if device.type == "cuda" else {}) | options.inductor_patches()
        if isa in _LEVELS:
            if not hasattr(config.cpp, "march") or platform.machine() not in ("x86_64", "AMD64"):
                raise ExportError(f"isa={isa!r} needs torch 2.13 or later and an x86-64 machine; use isa='native'")
            patches["cpp.march"], patches["cpp.simdlen"] = _LEVELS[isa]
        with config.patch(patches), _failing("Inductor cannot tell what it compiles for"):
            vector = cpu_vec_isa.pick_vec_isa()
            if isa in _LEVELS and not vector:
                raise ExportError(f"isa={isa!r}: this machine has no {isa} itself, which Inductor needs to compile for")
            build = cpp_builder.CppTorchDeviceOptions(vec_isa=vector, device_type="cpu", compile_only=True)
            flags = [f"-{flag}" for flag in build.get_cflags()] + " ".join(build.get_passthrough_args()).split()
            command = [*shlex.split(build.get_compiler()), *(flag for flag in flags if flag.startswith("-m"))]
        try:
            done = subprocess.run(
                [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise ExportError(f"`{shlex.join(command)} -dM` fails: {first_line(error)}") from error
        defined = {line.split()[1] for line in done.stdout.splitlines() if line.endswith(" 1")}
        needs = tuple(macro for macro in library.features if macro in defined)
        return _Target(isa, device.type, form, gpu, patches, needs, library)

    @property
    def variants(self) -> tuple[str, ...]:
        """The CPU kernels that are in the package."""
        return self.library.built.variants if self.form == "fast" and not self.gpu else ()

    @functools.cached_property
    def functions(self) -> dict[Any, list[str]]:
        """Declarations of the C functions by the operators that they compute."""
        functions = {} if self.form == "portable" else _GPU_FUNCTIONS if self.gpu else _FUNCTIONS
        return {
            op: [f"AOTITorchError aoti_torch_{self.device}_{op._opname}({parameters})"]
            for op, parameters in functions.items()
        }


def _metadata(
    program: ExportedProgram, module: GraphModule, config: Int8Config, report: Report, target: _Target
) -> dict[str, Any]:
    from int8compile import __version__

    stored = {"int8": 0, "float": 0}
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    for name, each in tensors.items():
        # Those of modules that `quantize_` made are called qweight and scale.
        scale_of = tensors.get(f"{name.removesuffix('scale')}qweight") if name.endswith("scale") else None
        of_int8 = each.dtype == torch.int8 or (scale_of is not None and scale_of.dtype == torch.int8)
        stored["int8" if of_int8 or name.startswith(AttributeBinder.PREFIX) else "float"] += each.nbytes
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
        "sizes": {str(symbol): _bounds(sizes) for symbol, sizes in program.range_constraints.items()},
        "bytes": stored,
        "report": report.to_dict(),
        "explain": str(report),
    }


def _bounds(sizes: Any) -> tuple[int, int | None]:
    """The least and the largest value of a size; None where there is no largest."""
    return int(sizes.lower), int(sizes.upper) if isinstance(sizes.upper, sympy.Integer) else None


def _tensors(nodes: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Inputs or outputs as the runtime counts them: a number becomes a tensor."""
    values = [(str(node), node.meta.get("val") if isinstance(node, Node) else node) for node in nodes]
    return [
        (name, value if isinstance(value, Tensor) else torch.empty((), dtype=torch.int64, device="meta"))
        for name, value in values
        if value is not None
    ]


def _guards(program: ExportedProgram) -> list[sympy.Basic]:
    """What the model asked of sizes while it was captured, beyond their ranges: that one is a multiple of 4, say."""
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    shapes = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if shapes is None:
        return []
    asked = [guard.expr for guard in shapes.guards]
    for node in program.graph.nodes:
        # torch.export takes a size that changes for one that is never 1, which squeeze would remove.
        if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket is torch.ops.aten.squeeze:
            given = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(given))
            squeezed = [given[dim] for dim in ([dims] if isinstance(dims, int) else dims)]
            asked += [sympy.Ne(size.node.expr, 1) for size in squeezed if isinstance(size, torch.SymInt)]
    return [
        guard for guard in dict.fromkeys(each.xreplace(shapes.replacements) for each in asked) if guard.free_symbols
    ]


def _compile(
    module: GraphModule,
    program: ExportedProgram,
    folder: Path,
    metadata: Mapping[str, Any],
    target: _Target,
) -> list[str]:
    """Has AOTInductor compile a rewritten module; the files that make a package."""
    from torch._inductor import aot_compile
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    options = {
        **target.patches,
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder),
        "aot_inductor.metadata": {
            package.METADATA: json.dumps(metadata),
            package.INPUTS: package.line_of(metadata["inputs"]),
            package.OUTPUTS: package.line_of(metadata["outputs"]),
        },
        "aot_inductor.custom_ops_to_c_shims": target.functions,
        "aot_inductor.custom_op_libs": [f":{target.library.built.linkable.name}"],  # a file of this name
    }
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):  # torch 2.13 and later
        options["aot_inductor.enable_line_tables"] = False  # Half of a small file.
    if is_written(module.graph.find_nodes(op="get_attr")):
        # It takes a buffer of zeros for a constant even where the graph writes to it: a cache would stay empty.
        options["joint_graph_constant_folding"] = False
    generate: Any = CppWrapperCpu.generate
    guards = _guards(program)
    planner = _planned(module, program, target.gpu) if target.gpu else None
    plan = planner.source() if planner else ""

    def generate_checked(wrapper: Any, is_inference: bool) -> Any:
        # What Inductor has ruled out since the export, a single row for example, it has when it chose strides: any will
        # do for such a dimension. What the model itself asks of sizes is in the export.
        V.graph.sizevars.shape_env.var_to_range.update(program.range_constraints)
        source, *rest = generate(wrapper, is_inference)
        return dataclasses.replace(source, value=_with_checks(source.value, target, guards, plan)), *rest

    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    # Where compilers look for libraries, besides those they are told of.
    paths = os.pathsep.join(filter(None, (str(target.library.built.linkable.parent), os.environ.get("LIBRARY_PATH"))))
    with (
        _failing("AOTInductor cannot compile the model"),
        mock.patch.object(CppWrapperCpu, "generate", generate_checked),
        mock.patch.dict(os.environ, {"LIBRARY_PATH": paths}),
    ):
        made: Any = aot_compile(module, args, kwargs, options=options)
    files = [file for file in made if isinstance(file, str) and file]
    (source,) = [file for file in files if file.endswith(".wrapper.cpp")]
    _check_generated(Path(source).read_text(), module, target)
    for name, cubin in planner.cubins.items() if planner else ():
        (folder / name).write_bytes(cubin)
        files.append(str(folder / name))
    return files


def _planned(module: GraphModule, program: ExportedProgram, gpu: Gpu) -> Planner:
    """Compiles the Triton kernels that a lowered graph needs."""
    from int8compile.triton_kernels.plan import Planner

    # Calls that differ in nothing but the rows share kernels.
    wanted: dict[tuple[Any, ...], list[tuple[int, int | None]]] = {}

    def want(x: Node, *call: Any) -> None:
        wanted.setdefault(call, []).append(_rows(x, program))

    planner = Planner(gpu)
    for node in module.graph.nodes:
        if node.target is ops.quantized_linear.default:
            planes, _, qweight, _, bias, threshold, by_column, *rest, dtype = node.args
            n, k = attribute(module, qweight).shape
            quantize = planes.args[0]
            x = quantize.args[0]
            if quantize.target is ops.quantize_rows.default:
                want(x, planner.quantize_rows, k, dtype, threshold, by_column)
            count = 1 + (digits.count(dtype, by_column) if threshold else 0)
            want(x, planner.quantized_linear, n, k, count, _dtype(module, bias), threshold, by_column, *rest, dtype)
        elif node.target is ops.weight_only_linear.default:
            x, qweight, _, bias = node.args
            n, k = attribute(module, qweight).shape
            want(x, planner.weight_only_linear, n, k, traced(node).dtype, _dtype(module, bias))
    with tqdm(wanted.items(), "Compiling Triton kernels", delay=1, leave=False) as progress:
        for (add, *arguments), rows in progress:
            most = [most for _, most in rows if most is not None]
            add(*arguments, min(least for least, _ in rows), max(most) if len(most) == len(rows) else None)
    return planner


def _rows(x: Node, program: ExportedProgram) -> tuple[int, int | None]:
    """The least and the largest number of rows that an activation may have; None where there is no largest."""
    m: Any = math.prod(traced(x).shape[:-1])
    if isinstance(m, int):
        return m, m
    return _bounds(bound_sympy(m.node.expr, program.range_constraints))


def _dtype(module: GraphModule, bias: Node | None) -> torch.dtype | None:
    """A bias's dtype, which may be made of several."""
    if bias is None:
        return None
    if bias.op == "get_attr":
        dtype: torch.dtype = attribute(module, bias).dtype
        return dtype
    value = meta_tensor(bias)
    if value is not None:
        return value.dtype
    parts = [_dtype(module, part) for part in bias.all_input_nodes]
    return functools.reduce(torch.promote_types, parts)  # type: ignore[arg-type]


_CONSTRUCTOR = re.compile(r"^ *: AOTInductorModelBase\([^{]*\{\n", re.MULTILINE)
# Inputs are looked at only where an environment variable is set: their dtypes and sizes, and strides that are numbers;
_UNCHECKED = re.compile(r"if \(!_check_aoti_runtime_check_inputs_env\(\)\) ?\{\s*return;\s*\}")
# and strides that follow from sizes that change.
_STRIDES = re.compile(r'if \(_check_aoti_runtime_check_inputs_env\(\)\) (\{ assert_size_stride\(.*"input"\); \})')
# A dimension of size 1 may have any stride.
_STRIDE = re.compile(r"if \((\d+) != (\w+)_stride\[(\d+)\]\)")
# Behind the definitions of sizes that change.
_SIZES_KNOWN = "    inputs.clear();\n"


def _with_checks(source: str, target: _Target, guards: Sequence[sympy.Basic] = (), plan: str = "") -> str:
    """Generated code that checks the package and the device when it is loaded, and its inputs at every call."""
    from torch._inductor.codegen.cpp_utils import cexpr

    check = (
        "void int8compile_check_package(const char* macros, const char* isa);\n"
        f'int8compile_check_package("{" ".join(target.needs)}", "{target.isa}");\n'
    )
    if plan:
        check += (
            "void int8compile_use_plan(const ::int8compile::Plan&, int, ::int8compile::CurrentStream);\n"
            "int8compile_use_plan(::int8compile_plan(), this->device_idx_, &::aoti_torch_get_current_cuda_stream);\n"
        )
    source, constructors = _CONSTRUCTOR.subn(lambda found: found[0] + check, source)
    source, unchecked = _UNCHECKED.subn("", source)
    if (constructors, unchecked, source.count(_SIZES_KNOWN)) != (1, 1, 1):
        raise ExportError(
            f"torch {torch.__version__} generates code that this version of int8compile does not know, so that the "
            "package could not check itself; use torch 2.11 to 2.13, or a newer int8compile"
        )
    source = _STRIDES.sub(r"\1", source)
    source = _STRIDE.sub(r"if (\2_size[\3] != 1 && \1 != \2_stride[\3])", source)
    defined = set(re.findall(r"int64_t (\w+) = \w+_size\[\d+\];", source))
    asked = ""
    for guard in guards:
        if unknown := {str(symbol) for symbol in guard.free_symbols} - defined:
            raise ExportError(
                f"the model asks that {guard}, and {listed(sorted(unknown))} is no size of an input that the compiled "
                "code reads, so the package could not check it; give the sizes as a Dim"
            )
        asked += (
            f'    if (!({cexpr(guard)})) throw std::runtime_error("int8compile: the model was exported for sizes of '
            f'inputs with {guard}, and these are others");\n'
        )
    return plan + source.replace(_SIZES_KNOWN, _SIZES_KNOWN + asked)


def _check_generated(source: str, module: GraphModule, target: _Target) -> None:
    """Reads in the generated code that what was rewritten runs in int8, and that no float copy of it is stored."""
    constants = dict(
        re.findall(r'constants_info_\[(?:\d+)\]\.name = "([^"]*)";\s*constants_info_\[\d+\]\.dtype = (\w+);', source)
    )
    names = set(re.findall(r'constants_info_\[\d+\]\.original_fqn = "([^"]*)"', source))
    added = names - {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    calls_of_ours = [node for node in module.graph.nodes if node.target in target.functions]
    read = {each for call in calls_of_ours for each in call.all_input_nodes if each.op == "get_attr"}
    int8 = [each for each in read if attribute(module, each).dtype == torch.int8]
    held = {re.sub(r"\W", "_", str(each.target)) for each in int8}  # as generated code spells them
    ours = re.compile(rf"{AttributeBinder.PREFIX}\d+_qweight")
    weights = [name for name in constants if name in held or ours.fullmatch(name)]
    names_of = "|".join(op._opname for op in target.functions)
    call = rf"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_{target.device}_(?:{names_of})\(.*"
    calls = "\n".join(re.findall(call, source))
    lost = [name for name in weights if target.functions and not re.search(rf"\b{re.escape(name)}\b", calls)]
    lost += [name for name in weights if not re.search(r"int8$", constants[name])]
    if not weights or lost or added:
        raise ExportError(
            "Inductor did not keep the int8 linears as they were rewritten "
            f"({listed([*lost, *added]) or 'it has none'}); please report this with the model"
        )


@contextlib.contextmanager
def _steps() -> Iterator[Any]:
    """A progress line that names what is being done; it appears only if it takes longer than a second."""
    with tqdm(total=4, delay=1, leave=False, bar_format="{desc} [{n_fmt}/{total_fmt}, {elapsed}]") as bar:

        def step(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield step
