"""Compile a rewritten graph to the files of a package, by AOTInductor.

A `Target` says which machine the code is for. `compile_graph` compiles, makes the generated code check its inputs, and
checks that the int8 linears are in it. For a GPU it adds the Triton kernels that the graph needs
(`triton_kernels.plan`). The stub library of `stub.py`, which checks the package before it is opened, is added last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import bound_sympy

from int8compile import cpu, ops
from int8compile.config import Int8Config
from int8compile.errors import ExportError, Int8CompileError, first_line, listed
from int8compile.exporting import package
from int8compile.exporting.stub import add_stub
from int8compile.ops import signatures
from int8compile.passes import AttributeBinder
from int8compile.passes.static import attribute, is_written, meta_tensor, traced
from int8compile.progress import progress_bar

if TYPE_CHECKING:
    from int8compile.triton_kernels.plan import Gpu, Planner

# Quantization is defined with correctly rounded division. Inductor's on GPUs is at times off by one unit.
_EXACT_DIVISION = {"eager_numerics.division_rounding": True}
# The levels of x86-64, by GCC's and Clang's names, and the bits of their registers.
_LEVELS = {"avx512": ("x86-64-v4", 512), "avx2": ("x86-64-v3", 256)}


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of generated code.

    Attributes:
        isa: The CPU, as in the option of `export`.
        device: "cpu" or "cuda".
        form: "fast" or "portable".
        gpu: The GPU of the Triton kernels, if there are any.
        patches: Settings of Inductor.
        needs: Compiler macros of the CPU features that the code may use.
        library: The kernels for CPUs, with the object file to link.
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
    ) -> Target:
        """Return a target that this machine compiles for.

        Args:
            isa: "native", "avx512" or "avx2".
            device: The model's device.
            form: "fast" or "portable".
            options: The user's options.
            library: The kernels for CPUs.
            gpu: The GPU of the Triton kernels, if there are any.

        Raises:
            ExportError: This machine cannot compile for the target.
        """
        from torch._inductor import config, cpp_builder, cpu_vec_isa

        patches = (_EXACT_DIVISION if device.type == "cuda" else {}) | options.inductor_patches()
        if isa in _LEVELS:
            if not hasattr(config.cpp, "march") or platform.machine() not in ("x86_64", "AMD64"):
                raise ExportError(f"isa={isa!r} needs torch 2.13 or later and an x86-64 machine; use isa='native'")
            patches["cpp.march"], patches["cpp.simdlen"] = _LEVELS[isa]
        with config.patch(patches), failing("Inductor cannot tell what it compiles for"):
            vector = cpu_vec_isa.pick_vec_isa()
            if isa in _LEVELS and not vector:
                raise ExportError(f"isa={isa!r}: Inductor compiles for {isa} only on a machine that has it")
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
        return Target(isa, device.type, form, gpu, patches, needs, library)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of the CPU kernel in the package."""
        return self.library.built.variants if self.form == "fast" and not self.gpu else ()

    @functools.cached_property
    def functions(self) -> dict[Any, list[str]]:
        """The declarations of C functions, by the operators that they compute."""
        operators = () if self.form == "portable" else signatures.PACKAGED["cuda" if self.gpu else "cpu"]
        return {op: [signatures.c_function(self.device, op)] for op in operators}


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn errors of PyTorch into an `ExportError` that says what failed."""
    try:
        yield
    except Int8CompileError:
        raise
    except Exception as error:
        raise ExportError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first lines of an error of PyTorch's, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Set TORCH", "You can suppress", "For more info"))]
    return f"{type(error).__name__}: {' '.join(told[:4])[:600]}"


def compile_graph(
    module: GraphModule,
    program: ExportedProgram,
    folder: Path,
    metadata: Mapping[str, Any],
    target: Target,
) -> list[str]:
    """Compile a rewritten module by AOTInductor.

    Args:
        module: The module.
        program: The program it was made of, with the example inputs and the sizes that may change.
        folder: The folder for the files.
        metadata: The package's description of itself.
        target: The target to compile for.

    Returns:
        The files that make a package.

    Raises:
        ExportError: The module cannot be compiled, or its int8 linears are not in the generated code.
    """
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
        "aot_inductor.custom_op_libs": [f":{target.library.built.linkable.name}"],  # ":" for a file's full name
    }
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):  # torch 2.13 and later
        options["aot_inductor.enable_line_tables"] = False  # They are half of a small file.
    if is_written(module.graph.find_nodes(op="get_attr")):
        # The folding takes a buffer of zeros for a constant even if the graph writes to it: a cache would stay empty.
        options["joint_graph_constant_folding"] = False
    generate: Any = CppWrapperCpu.generate
    guards = _guards(program)
    with failing("Triton cannot compile the kernels"):
        planner = _planned(module, program, target.gpu) if target.gpu else None
    plan = planner.source() if planner else ""

    def generate_checked(wrapper: Any, is_inference: bool) -> Any:
        # Inductor has narrowed some ranges since the export, for example to exclude a single row, where it chose
        # strides; such a dimension may have any stride. The model's own conditions on sizes are in the export.
        V.graph.sizevars.shape_env.var_to_range.update(program.range_constraints)
        source, *rest = generate(wrapper, is_inference)
        return dataclasses.replace(source, value=_with_checks(source.value, guards, plan)), *rest

    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    # Compilers look for libraries in these folders too.
    paths = os.pathsep.join(filter(None, (str(target.library.built.linkable.parent), os.environ.get("LIBRARY_PATH"))))
    with (
        failing("AOTInductor cannot compile the model"),
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
    return add_stub(files, folder, target.needs, target.isa)


def _guards(program: ExportedProgram) -> list[sympy.Basic]:
    """Return the model's conditions on sizes, found at its capture: that one is a multiple of 4, for example."""
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    shapes = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if shapes is None:
        return []
    asked = [guard.expr for guard in shapes.guards]
    for node in program.graph.nodes:
        # torch.export assumes that a size that changes is never 1, which squeeze would remove.
        if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket is torch.ops.aten.squeeze:
            given = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(given))
            squeezed = [given[dim] for dim in ([dims] if isinstance(dims, int) else dims)]
            asked += [sympy.Ne(size.node.expr, 1) for size in squeezed if isinstance(size, torch.SymInt)]
    return [
        guard for guard in dict.fromkeys(each.xreplace(shapes.replacements) for each in asked) if guard.free_symbols
    ]


def bounds(sizes: Any) -> tuple[int, int | None]:
    """Return the least and the largest value of a size; None where there is no largest."""
    return int(sizes.lower), int(sizes.upper) if isinstance(sizes.upper, sympy.Integer) else None


def _planned(module: GraphModule, program: ExportedProgram, gpu: Gpu) -> Planner:
    """Compile the Triton kernels that a lowered graph needs."""
    from int8compile.triton_kernels.plan import Planner

    # Calls that differ in the number of rows only share kernels.
    wanted: dict[tuple[Any, ...], list[tuple[int, int | None]]] = {}

    def want(x: Node, *call: Any) -> None:
        wanted.setdefault(call, []).append(_rows(x, program))

    planner = Planner(gpu)
    for node in module.graph.nodes:
        if node.target is ops.quantized_linear.default:
            given = _arguments(node)
            n, k = attribute(module, given["qweight"]).shape
            quantize = given["q"].args[0]
            of_x = _arguments(quantize)
            x, rotated, threshold = of_x["x"], of_x["d"] is not None, of_x["threshold"]
            if quantize.target is ops.norm_quantize_rows.default:
                dtypes = (_dtype(module, of_x["weight"]), _dtype(module, of_x["bias"]))
                norm = (of_x["residual"] is not None, *dtypes, rotated, of_x["kind"], of_x["eps"])
                want(x, planner.norm_quantize_rows, k, traced(x).dtype, *norm, threshold)
            else:
                want(x, planner.quantize_rows, k, traced(x).dtype, rotated, threshold)
            parts = (given["activation"], given["n0"], given["n1"], given["dtype"])
            want(x, planner.quantized_linear, n, k, 2 if threshold else 1, _dtype(module, given["bias"]), *parts)
        elif node.target in (ops.grouped_linear.default, ops.batched_linear.default):
            given = _arguments(node)
            d, ends = given["d"], given.get("ends")
            d_dims = 0 if d is None else attribute(module, d).dim()
            dtypes = (None if ends is None else traced(ends).dtype, _dtype(module, given.get("bias")))
            sizes = attribute(module, given["qweight"]).shape
            call = (node.target._opname, *sizes, traced(node).dtype, d_dims, *dtypes, given["threshold"])
            want(given["x"], planner.expert_linear, *call)
        elif node.target is ops.weight_only_linear.default:
            given = _arguments(node)
            n, k = attribute(module, given["qweight"]).shape
            how = (traced(node).dtype, given["d"] is not None, _dtype(module, given["bias"]))
            want(given["x"], planner.weight_only_linear, n, k, *how)
    with progress_bar(wanted.items(), "Compiling Triton kernels", delay=1) as bar:
        for (add, *arguments), rows in bar:
            most = [most for _, most in rows if most is not None]
            add(*arguments, min(least for least, _ in rows), max(most) if len(most) == len(rows) else None)
    return planner


def _arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of an operator's call by their names."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return {each.name: value for each, value in zip(node.target._schema.arguments, node.args, strict=True)}


def _rows(x: Node, program: ExportedProgram) -> tuple[int, int | None]:
    """Return the least and the largest number of rows of an activation; None where there is no largest."""
    m: Any = math.prod(traced(x).shape[:-1])
    if isinstance(m, int):
        return m, m
    return bounds(bound_sympy(m.node.expr, program.range_constraints))


def _dtype(module: GraphModule, bias: Node | None) -> torch.dtype | None:
    """Return the dtype of a bias, which may be made of several tensors."""
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
# Generated code checks inputs only if an environment variable is set: dtypes, sizes, and strides that are numbers;
_UNCHECKED = re.compile(r"if \(!_check_aoti_runtime_check_inputs_env\(\)\) ?\{\s*return;\s*\}")
# strides that follow from sizes that change are checked in another place.
_STRIDES = re.compile(r'if \(_check_aoti_runtime_check_inputs_env\(\)\) (\{ assert_size_stride\(.*"input"\); \})')
# The check of a stride. A dimension of size 1 may have any stride.
_STRIDE = re.compile(r"if \((\d+) != (\w+)_stride\[(\d+)\]\)")
# The line after the definitions of sizes that change.
_SIZES_KNOWN = "    inputs.clear();\n"


def _with_checks(source: str, guards: Sequence[sympy.Basic] = (), plan: str = "") -> str:
    """Return generated code with checks: of its inputs at every call, and with a plan of the device at loading."""
    from torch._inductor.codegen.cpp_utils import cexpr

    begin = (
        "void int8compile_use_plan(const ::int8compile::Plan&, int, ::int8compile::CurrentStream);\n"
        "int8compile_use_plan(::int8compile_plan(), this->device_idx_, &::aoti_torch_get_current_cuda_stream);\n"
    )
    source, constructors = _CONSTRUCTOR.subn(lambda found: found[0] + begin * bool(plan), source)
    source, unchecked = _UNCHECKED.subn("", source)
    if (constructors, unchecked, source.count(_SIZES_KNOWN)) != (1, 1, 1):
        raise ExportError(
            f"torch {torch.__version__} generates code that this version of int8compile does not know, so that the "
            "package could not check its inputs; use torch 2.11 to 2.13, or a newer int8compile"
        )
    source = _STRIDES.sub(r"\1", source)
    source = _STRIDE.sub(r"if (\2_size[\3] != 1 && \1 != \2_stride[\3])", source)
    defined = set(re.findall(r"int64_t (\w+) = \w+_size\[\d+\];", source))
    asked = ""
    for guard in guards:
        if unknown := {str(symbol) for symbol in guard.free_symbols} - defined:
            raise ExportError(
                f"the model requires {guard}, and {listed(sorted(unknown))} is not the size of an input that the "
                "compiled code reads, so the package could not check it; give the sizes as a Dim"
            )
        asked += (
            f'    if (!({cexpr(guard)})) throw std::runtime_error("int8compile: the model was exported for sizes of '
            f'inputs with {guard}, and these inputs have other sizes");\n'
        )
    return plan + source.replace(_SIZES_KNOWN, _SIZES_KNOWN + asked)


def _check_generated(source: str, module: GraphModule, target: Target) -> None:
    """Check in the generated code that rewritten linears run in int8, and that no float copy of a weight is stored."""
    constants = dict(
        re.findall(r'constants_info_\[(?:\d+)\]\.name = "([^"]*)";\s*constants_info_\[\d+\]\.dtype = (\w+);', source)
    )
    names = set(re.findall(r'constants_info_\[\d+\]\.original_fqn = "([^"]*)"', source))
    added = names - {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    calls_of_ours = [node for node in module.graph.nodes if node.target in target.functions]
    read = {each for call in calls_of_ours for each in call.all_input_nodes if each.op == "get_attr"}
    int8 = [each for each in read if attribute(module, each).dtype in (torch.int8, torch.uint8)]
    read_by_kernels = {re.sub(r"\W", "_", str(each.target)) for each in int8}  # the names in generated code
    ours = re.compile(rf"{AttributeBinder.PREFIX}\d+_qweight")
    weights = [name for name in constants if name in read_by_kernels or ours.fullmatch(name)]
    names_of = "|".join(op._opname for op in target.functions)
    call = rf"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_{target.device}_(?:{names_of})\(.*"
    calls = "\n".join(re.findall(call, source))
    lost = [name for name in weights if name in read_by_kernels and not re.search(rf"\b{re.escape(name)}\b", calls)]
    lost += [name for name in weights if not re.search(r"int8$", constants[name])]
    if not weights or lost or added:
        raise ExportError(
            "Inductor did not keep the int8 linears as they were rewritten "
            f"({listed([*lost, *added]) or 'it has none'}); please report this with the model"
        )
