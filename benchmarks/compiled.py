"""The Triton kernels' code: registers, spills, shared memory and main loops, compiled without a GPU.

    python -m benchmarks.compiled                 # the table of every kernel and configuration of every architecture
    python -m benchmarks.compiled --arch sm_90
    python -m benchmarks.compiled --out benchmarks/results/triton-compiled.md

It needs Triton, whose wheel brings NVIDIA's assembler and disassembler.
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
from int8compile.triton_kernels.quantize.launch import launch as quantize_launch
from int8compile.triton_kernels.quantize.launch import launch_norm
from int8compile.triton_kernels.tables import Architecture, Config

# A matrix of Llama-3.1-8B; what is compiled depends on K and N only in whether 16 divides them.
N, K = 4096, 4096
# Inputs of what is quantized there: in front of the down projection, and everywhere else.
QUANTIZED = (4096, 14336)
THRESHOLD, EPSILON = 12.0, 1e-5
# Norms by what the table calls them.
NORMS = {
    "rms_norm": quantized.RMS,
    "rms_norm rounded": quantized.RMS_ROUNDED,
    "rms_norm plus one": quantized.RMS_PLUS_ONE,
    "layer_norm": quantized.LAYER,
}
# Matrix instructions by how they are called in PTX and AMD's assembly.
_MATRIX = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*|v_mfma_\w+)")
_ABOUT = """# The Triton kernels, compiled

bfloat16 activations with second digits, weight 4096 x 4096, Triton {version}; made by `python -m benchmarks.compiled`
without a GPU. Registers are a thread's; "spilled" are the bytes of a thread that do not fit into them, "in loops" the
instructions of innermost loops that move them; "warps" of how many a multiprocessor holds at once.

What follows is of a step of the main loop (of quantize kernels, which have none, of what a warp executes for a row
without second digits): "matrix" instructions (of gemv: dp4a), what it "waits" for (gsb0 1: until one group of matrix
instructions is left under way, which is asynchronous; gsb0 0: until none is; SB0 n: n groups of copies; "mbarrier":
barriers that the copy engine counts on), "barriers" of all warps, loads from memory (times bytes of a thread; TMA: the
copy engine's), from and to shared memory, and "conversions" of types and permutations of bytes.
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The resources that a multiprocessor has for the programs that are on it at once.

    Attributes:
        warps: It holds at most.
        registers: Of 32 bits, for all threads.
        shared: Bytes of shared memory.
        programs: It holds at most.
        reserved: Bytes of shared memory that each program costs besides its own.
        warp: Threads of a warp.
    """

    warps: int
    registers: int
    shared: int
    programs: int
    reserved: int = 1024
    warp: int = 32

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Return how many programs fit.

        Args:
            warps: Of a program.
            registers: Of a thread; they are given out by eights.
            shared: Bytes of a program.
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
    """A kernel, compiled.

    Attributes:
        instructions: The matrix instructions in it.
        registers: Of a thread.
        spilled: Bytes of a thread that do not fit into registers.
        spills_in_loops: Instructions of innermost loops that move them.
        shared: Bytes of shared memory.
        widest_load: Bytes of the widest load from global memory.
        warps: Of a program.
        loop: A step of its main loop; None where it has none, and on AMD's GPUs, whose code is not counted.
        outside: Instructions in no loop but one around that; 0 on AMD's GPUs.
        whole: All of its code; None on AMD's GPUs.
        usual: What is executed where nothing is unusual (`sass.usual`); None on AMD's GPUs.
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
        """Return how many programs a multiprocessor holds at once."""
        return LIMITS[arch].resident(self.warps, self.registers, self.shared)


def cases(arch: Architecture) -> Iterator[tuple[int, Config]]:
    """Yield the buckets of an architecture with each of their configurations, those of earlier buckets left out."""
    seen = set()
    for bucket in arch.rows:
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
    """Return the call of a product of bfloat16 activations, with tensors that have no data."""
    made = empty_rows(torch.empty(bucket, K, dtype=torch.bfloat16, device="meta"), THRESHOLD)
    qweight = torch.empty(N, K, dtype=torch.int8, device="meta")
    scale = torch.empty(N, device="meta")
    y = empty_result(made[0], qweight, activation, 0, torch.bfloat16)
    return launch_of(Product(*made, qweight, scale, scale, y, activation, 0, 0), config)


def quantize(k: int, norm: str | None = None) -> Launch:
    """Return the call that quantizes rows of K bfloat16 inputs, rotated; after a residual add and a norm, if named."""
    x = torch.empty(2048, k, dtype=torch.bfloat16, device="meta")
    d = torch.empty(k, device="meta")
    made = empty_rows(x, THRESHOLD)
    if norm is None:
        return quantize_launch(x, d, THRESHOLD, *made)
    weight = torch.empty(k, dtype=torch.bfloat16, device="meta")
    bias = weight if norm == "layer_norm" else None
    return launch_norm(x, x, weight, bias, d, NORMS[norm], EPSILON, THRESHOLD, empty_sum(x, x), *made)


def compiled(arch: Architecture, bucket: int, config: Config) -> Compiled:
    """Compile a configuration.

    Raises:
        Exception: Triton's own, where it cannot.
    """
    return examine(launch(bucket, config).compile(target_of(arch)))


def compiled_quantize(arch: Architecture, k: int, norm: str | None = None) -> Compiled:
    """Compile what `quantize` calls."""
    # Quantize asks PyTorch whether a warp has 64 threads.
    with unittest.mock.patch.object(torch.version, "hip", "7" if arch.name.startswith("gfx") else None):
        return examine(quantize(k, norm).compile(target_of(arch)))


def examine(kernel: Any) -> Compiled:
    """Take apart what Triton compiled."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    instructions = tuple(sorted(set(_MATRIX.findall(text))))
    shared = int(kernel.metadata.shared)
    if "amdgcn" in kernel.asm:
        loads = [4 * int(width or 1) for width in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        registers, warps = _number(r"\.vgpr_count:\s*(\d+)", text), int(kernel.metadata.num_warps)
        # What is not spilled at all is not spilled in a loop.
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
        # With the warps that only copy.
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
    return compiled_quantize(arch, *what) if bucket is None else compiled(arch, bucket, what)


def _tasks(name: str) -> Iterator[tuple[str, int | None, Any]]:
    """Yield what an architecture has: its name; the bucket and the configuration, or None, K and the norm."""
    arch = tables.ARCHITECTURES[name]
    for bucket, config in cases(arch):
        yield name, bucket, config
    for k in QUANTIZED:
        for norm in (None, *NORMS):
            yield name, None, (k, norm)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    known = [name for name, arch in tables.ARCHITECTURES.items() if arch.instruction]
    parser.add_argument("--arch", action="append", choices=known, help="only this one; may be given again")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the table, instead of printing it")
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
