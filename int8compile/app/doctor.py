"""`int8compile doctor`: this machine and whether the CPU kernel works on it, for a bug report."""

from __future__ import annotations

import os
import platform
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import int8compile
from int8compile import cpu, hardware, ops, triton_kernels
from int8compile.app import machine
from int8compile.cache import cache_folder
from int8compile.cpu import build, compiler
from int8compile.errors import Int8CompileError, Int8Warning
from int8compile.explaining import kernel_of
from int8compile.ops import reference
from int8compile.report import readable

# Variables to show besides those of int8compile.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TORCH_LOGS",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_CACHE_DIR",
    "XDG_CACHE_HOME",
)


def examine() -> dict[str, Any]:
    """Return a description of this machine, as plain data. The kernel is compiled if it is not in the cache.

    Returns:
        Sections of named values; `kernel["problem"]` says why the kernel cannot be used, and is "" if it can.
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "kernel": _kernel(),
        "cache": _cache(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ENVIRONMENT or name.startswith("INT8COMPILE_")
        },
    }


def render(found: dict[str, Any]) -> str:
    """Return the description as text: two columns, and a last line that says whether the kernel can be used."""
    from tabulate import tabulate

    lines = []
    for section, values in found.items():
        rows = [
            (name if section == "environment" else name.replace("_", " "), _text(value))
            for name, value in values.items()
            if name != "problem"
        ]
        table = tabulate(rows or [("none set", "")], tablefmt="plain", disable_numparse=True)
        lines += [section, textwrap.indent(table, "  "), ""]
    problem = found["kernel"]["problem"]
    lines.append(f"The CPU kernel cannot be used: {problem}." if problem else "The CPU kernel works.")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    return {
        "int8compile": int8compile.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: machine.version(name) or "not installed" for name in ("triton", "transformers")},
    }


def _machine() -> dict[str, Any]:
    this = hardware.of(torch.device("cpu"))
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": this.name,
        "architecture": f"{build.architecture()}, {this.isa} as torch sees it",
        "cores": f"{os.cpu_count()}, {machine.cores()} for this process",
        "torch_threads": torch.get_num_threads(),
    }
    for index in range(torch.cuda.device_count()):
        device = hardware.of(torch.device("cuda", index))
        memory = readable(torch.cuda.mem_get_info(index)[1])
        found[f"cuda_{index}"] = f"{device.name}, {device.isa}, {memory}; {kernel_of(device)}"
    found["on_hopper_gpus"] = _on_hopper()
    return found


def _on_hopper() -> str:
    """Return the name of the kernel for many rows on Hopper GPUs, and why it is not the faster one."""
    try:
        if none := triton_kernels.failure():
            return f"no Triton kernels: {none}"
        why = triton_kernels.gluon_failure()
    except Int8CompileError as error:
        return str(error)
    return f"gemm, not the faster gluon_gemm: {why}" if why else "gluon_gemm for many rows"


def _kernel() -> dict[str, Any]:
    """Return the compiler, the library, and whether its results are right."""
    found: dict[str, Any] = {"problem": ""}
    try:
        found["compiler"] = compiler.find_compiler().name
        if cpu.switched_off():
            found["problem"] = "INT8COMPILE_CPU_KERNEL=0 turns it off"
            return found
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Int8Warning)  # `problem` has the same text.
            library = cpu.load()
        if library is None:
            found["problem"] = cpu.failure()
            return found
        found["library"] = str(library.path)
        seconds = time.perf_counter() - began
        found["loading"] = f"{seconds:.3f} s, {'from the cache' if library.built.cached else 'compiled now'}"
        found["compiling"] = f"{library.built.seconds:.1f} s, by {library.built.compiler}"
        found["variants_compiled"] = library.built.variants
        found["variants_left_out"] = library.built.left_out
        found["variants_that_run_here"] = library.variants
        found["variant_used"] = library.variant
        found["problem"] = _self_check(library)
        found["self_check"] = "failed" if found["problem"] else "every variant equals the reference, bit for bit"
    except Int8CompileError as error:
        found["problem"] = str(error)
    return found


def _self_check(library: cpu.Library) -> str:
    """Compare every variant with the reference on a small problem; return which differ, "" if none does."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("int8compile::packed_linear", "CPU"):
        return f"{library.path} does not implement int8compile::packed_linear"
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(19, 320, generator=generator), torch.randn(70, 320, generator=generator)
    bias = torch.randn(70, generator=generator)
    d = ops.rotation_of(ops.input_scales([weight]))
    qweight, scale = ops.quantize_weight(weight, d)
    # With this threshold a tenth of the elements are outliers.
    expected = reference.linear(x, qweight, scale, d, bias, 2.0)
    packed = ops.pack_weight(qweight)
    used = library.variant
    wrong = []
    try:
        for name in library.variants:
            library.use_variant(name)
            if not torch.equal(torch.ops.int8compile.packed_linear(x, packed, scale, d, bias, 2.0), expected):
                wrong.append(name)
    finally:
        library.use_variant(used)
    return f"these variants differ from the reference: {', '.join(wrong)}; please report that" if wrong else ""


def _cache() -> dict[str, Any]:
    folder = cache_folder()
    libraries = list(folder.glob("*/library.so"))
    size = sum(_size(path) for path in folder.rglob("*"))
    return {"folder": str(folder), "libraries": len(libraries), "size": readable(size)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # Another process has just removed it.
        return 0


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({why})" for key, why in value.items()) or "none"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
