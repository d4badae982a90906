"""Compiled code of the Triton kernels, made without a GPU: registers, spills, shared memory, main loops.

    python -m benchmarks.compiled                 # every kernel and configuration of every architecture
    python -m benchmarks.compiled --arch sm_90
    python -m benchmarks.compiled --out benchmarks/results/triton-compiled.md

It needs Triton, whose wheel contains NVIDIA's assembler and disassembler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks import sass
from benchmarks.sass import Counts
from int8compile.ops import quantized
from int8compile.ops.quantized import NONE, empty_result, empty_rows, empty_sum
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.launch import Launch
from int8compile.triton_kernels.operators import launch_of
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import norm_launch, quantize_launch
from int8compile.triton_kernels.tables import Architecture, Config

# A weight of Llama-3.1-8B. The compiled code depends only on whether 16 divides K and N.
N, K = 4096, 4096
# Sizes of quantized activations in that model: before all linears but the down projection, and before it.
QUANTIZED = (4096, 14336)
THRESHOLD, EPSILON = 12.0, 1e-5
# Norms by their names in the table.
NORMS = {
    "rms_norm": quantized.RMS,
    "rms_norm rounded": quantized.RMS_ROUNDED,
    "rms_norm plus one": quantized.RMS_PLUS_ONE,
    "layer_norm": quantized.LAYER,
}
# Names of matrix instructions in PTX and in AMD's assembly.
_MATRIX = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*|v_mfma_\w+)")
_ABOUT = """# The Triton kernels, compiled

bfloat16 activations with second digits, weight 4096 x 4096, Triton {version}; made by `python -m benchmarks.compiled`
without a GPU. "Registers" are those of a thread, "spilled" its bytes that do not fit into registers, "in loops" the
number of instructions in innermost loops that move spilled bytes, and "warps" the number that a multiprocessor holds.

The other columns count the instructions in a step of the main loop. Quantize kernels have no main loop: for them, the
columns count the instructions that a warp executes for a row without second digits.

- "matrix": matrix instructions; for gemv, dp4a.
- "waits": gsb0 1 waits until one group of matrix instructions is left in flight (asynchronous), gsb0 0 until none is,
  SB0 n until n groups of copies are, and mbarrier for the copy engine.
- "barriers": barriers of all warps.
- "loads": loads from memory as count x bytes of a thread; TMA is the copy engine.
- "shared loads" and "stores": loads from and stores to shared memory.
- "conversions": conversions of types, and permutations of bytes.
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resources of a multiprocessor for its resident programs.

    Attributes:
        warps: Largest number of warps.
        registers: Registers of 32 bits, for all threads.
        shared: Bytes of shared memory.
        programs: Largest number of programs.
        reserved: Bytes of shared memory that each program takes in addition to its own.
        warp: Threads of a warp.
    """

    warps: int
    registers: int
    shared: int
    programs: int
    reserved: int = 1024
    warp: int = 32

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Return the number of programs that fit.

        Args:
            warps: Warps of a program.
            registers: Registers of a thread; the hardware allocates them in units of eight.
            shared: Bytes of shared memory of a program.
        """
        each = -(-max(registers, 1) // 8) * 8 * self.warp * warps
        memory = self.shared // (shared + self.reserved) if shared + self.reserved else self.programs
        return min(self.warps // warps, self.registers // each, memory, self.programs)


# By architecture: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA3 guide.
LIMITS = {
    "sm_80": Limits(64, 65536, 164 * 1024, 32),
    "sm_86": Limits(48, 65536, 100 * 1024, 16),
    "sm_89": Limits(48, 65536, 100 * 1024, 24),
    "sm_90": Limits(64, 65536, 228 * 1024, 32),
    "sm_100": Limits(64, 65536, 228 * 1024, 32),
    "gfx942": Limits(32, 131072, 64 * 1024, 32, reserved=0, warp=64),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel. The instructions of AMD's GPUs are not counted.

    Attributes:
        instructions: Names of its matrix instructions.
        registers: Registers of a thread.
        spilled: Bytes of a thread that do not fit into registers.
        spills_in_loops: Number of instructions in innermost loops that move spilled bytes.
        shared: Bytes of shared memory.
        widest_load: Bytes of the widest load from global memory.
        warps: Warps of a program.
        loop: Counts of a step of the main loop; None without a main loop, and on AMD's GPUs.
        outside: Number of instructions outside of loops (`sass.main_loop`); 0 on AMD's GPUs.
        whole: Counts of all code; None on AMD's GPUs.
        usual: Counts of the usual path (`sass.usual`); None on AMD's GPUs.
    """

    instructions: tuple[str, ...]
    registers: int
    spilled: int
    spills_in_loops: int
    shared: int
    widest_load: int
    warps: int
    loop: Counts | None
    outside: int
    whole: Counts | None
    usual: Counts | None

    def resident(self, arch: str) -> int:
        """Return the number of programs that a multiprocessor holds."""
        return LIMITS[arch].resident(self.warps, self.registers, self.shared)


def cases(arch: Architecture) -> Iterator[tuple[int, Config]]:
    """Yield each configuration of an architecture, with the first bucket that has it."""
    seen = set()
    for bucket in arch.by_bucket:
        for config in tables.candidates(arch, bucket, K):
            if config not in seen:
                seen.add(config)
                yield bucket, config


def target_of(arch: Architecture) -> GPUTarget:
    """Return Triton's target for an architecture."""
    if arch.name.startswith("gfx"):
        return GPUTarget("hip", arch.name, 64)
    return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), 32)


def launch(bucket: int, config: Config, activation: int = NONE) -> Launch:
    """Return the launch of a product of bfloat16 activations, with tensors without data."""
    made = empty_rows(torch.empty(bucket, K, dtype=torch.bfloat16, device="meta"), THRESHOLD)
    qweight = torch.empty(N, K, dtype=torch.int8, device="meta")
    scale = torch.empty(N, device="meta")
    y = empty_result(made[0], qweight, activation, 0, torch.bfloat16)
    return launch_of(Product(*made, qweight, scale, scale, y, activation, 0, 0), config)


def quantize(k: int, norm: str | None = None) -> Launch:
    """Return the launch that quantizes rows of K bfloat16 inputs, rotated; after a residual add and a norm, if named.

    Its tensors have no data.
    """
    x = torch.empty(2048, k, dtype=torch.bfloat16, device="meta")
    d = torch.empty(k, device="meta")
    made = empty_rows(x, THRESHOLD)
    if norm is None:
        return quantize_launch(x, d, THRESHOLD, *made)
    weight = torch.empty(k, dtype=torch.bfloat16, device="meta")
    bias = weight if norm == "layer_norm" else None
    return norm_launch(x, x, weight, bias, d, NORMS[norm], EPSILON, THRESHOLD, empty_sum(x, x), *made)


def compile_product(arch: Architecture, bucket: int, config: Config) -> Compiled:
    """Compile a configuration of the product.

    Raises:
        Exception: An error of Triton.
    """
    return examine(launch(bucket, config).compile(target_of(arch)))


def compile_quantize(arch: Architecture, k: int, norm: str | None = None) -> Compiled:
    """Compile the kernel that `quantize` launches."""
    # The launcher asks PyTorch whether a warp has 64 threads.
    with unittest.mock.patch.object(torch.version, "hip", "7" if arch.name.startswith("gfx") else None):
        return examine(quantize(k, norm).compile(target_of(arch)))


def examine(kernel: Any) -> Compiled:
    """Return the properties of a kernel that Triton compiled."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    instructions = tuple(sorted(set(_MATRIX.findall(text))))
    shared = int(kernel.metadata.shared)
    if "amdgcn" in kernel.asm:
        loads = [4 * int(width or 1) for width in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        registers, warps = _number(r"\.vgpr_count:\s*(\d+)", text), int(kernel.metadata.num_warps)
        # The compiler reports no spills in loops: all spills count, so that 0 means none.
        return Compiled(
            instructions, registers, 4 * spills, spills, shared, max(loads, default=0), warps, None, 0, None, None
        )
    loads = [int(many or 1) * int(bits) // 8 for many, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", text)]
    loads += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* .*?\], (\w+)[,;]", text)]
    loads += [16 for _ in re.findall(r"cp\.async\.bulk\.tensor", text)]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, code = _tool("cuobjdump", "-res-usage", cubin.name), _tool("nvdisasm", "-c", cubin.name)
    loop, outside = sass.main_loop(code)
    return Compiled(
        instructions,
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"STACK:(\d+)", usage),
        spills_in_loops=sass.spills_in_loops(code),
        shared=shared,
        widest_load=max(loads, default=0),
        # Includes the warps that only copy.
        warps=_number(r"\.reqntid (\d+)", text) // 32,
        loop=loop,
        outside=outside,
        whole=sass.whole(code),
        usual=sass.usual(code),
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


def _compile(task: tuple[str, int | None, Any]) -> Compiled:
    name, bucket, what = task
    arch = tables.ARCHITECTURES[name]
    return compile_quantize(arch, *what) if bucket is None else compile_product(arch, bucket, what)


def _tasks(name: str) -> Iterator[tuple[str, int | None, Any]]:
    """Yield the kernels of an architecture: its name, and a bucket with a configuration, or None with K and a norm."""
    arch = tables.ARCHITECTURES[name]
    for bucket, config in cases(arch):
        yield name, bucket, config
    for k in QUANTIZED:
        for norm in (None, *NORMS):
            yield name, None, (k, norm)


def main(arguments: Sequence[str] | None = None) -> int:

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    known = [name for name, arch in tables.ARCHITECTURES.items() if arch.matrix_instruction]
    parser.add_argument("--arch", action="append", choices=known, help="only this architecture; may be given again")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to FILE instead of printing it")
    given = parser.parse_args(arguments)
    tasks = [task for name in given.arch or known for task in _tasks(name)]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(_compile, tasks), total=len(tasks), unit="kernel", file=sys.stderr))
    from tabulate import tabulate

    head = (
        *("arch", "M from", "kernel and tile", "instruction", "registers", "spilled", "in loops", "shared", "warps"),
        *("matrix", "waits", "barriers", "loads", "shared loads", "stores", "conversions", "instructions"),
    )
    rows = [_row(*task, result) for task, result in zip(tasks, found, strict=True)]
    table = tabulate(rows, head, tablefmt="github")
    if given.out is None:
        print(table)
    else:
        given.out.write_text(f"{_ABOUT.format(version=triton.__version__)}\n{table}\n")
    return 0


def _row(name: str, bucket: int | None, what: Any, found: Compiled) -> list[object]:
    shown = str(what) if bucket is not None else f"{what[1] or 'quantize'} K={what[0]}"
    row: list[object] = [name, bucket, shown, ", ".join(_short(each) for each in found.instructions), found.registers]
    row += [found.spilled, found.spills_in_loops, f"{found.shared / 1024:.0f} KiB"]
    row.append(found.resident(name) * found.warps)
    counts = found.loop if bucket is not None else found.usual
    if counts is None:
        return row
    loads = [f"{count}x{width}" for width, count in counts.loads]
    loads += [f"{count}x{kind.removeprefix('LDGSTS ')}".replace("UTMALDG", "TMA") for kind, count in counts.copies]
    waits = [*counts.waits, *(["mbarrier"] if counts.phases else [])]
    row += [counts.matrix or counts.dots, ", ".join(waits), counts.barriers, ", ".join(loads), counts.shared_loads]
    return [*row, counts.shared_stores, counts.conversions, counts.instructions]


def _short(instruction: str) -> str:
    return re.sub(r"\.(sync|aligned|row|col|satfinite|mma_async)", "", instruction)


if __name__ == "__main__":
    sys.exit(main())
