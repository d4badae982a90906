"""What the Triton kernels become: registers, spills, shared memory and instructions, compiled without a GPU.

    python -m benchmarks.compiled                 # the table of every configuration of every architecture
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from int8compile.ops.quantized import NONE, empty_result, empty_rows
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.launch import Launch
from int8compile.triton_kernels.operators import launch_of
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Architecture, Config

# A matrix of Llama-3.1-8B; what is compiled depends on K and N only in whether 16 divides them.
N, K = 4096, 4096
# Matrix instructions by how they are called in PTX, SASS and AMD's assembly.
_MATRIX = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*|v_mfma_\w+)")
_SASS_MATRIX = re.compile(r"\b(IGMMA|IMMA|UTCIMMA)\b")
_ABOUT = """# The Triton kernels, compiled

bfloat16 activations with outliers, weight 4096 x 4096, Triton {version}; made by `python -m benchmarks.compiled`
without a GPU. Registers are a thread's; "spilled" are the bytes of a thread that do not fit into them, "in loops" the
instructions of the innermost loops with matrix instructions that move them; "load" is the widest load from memory.
"""
_SASS_SPILL = re.compile(r"\b(STL|LDL)\b")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel, compiled.

    Attributes:
        arch: "sm_90", "gfx942".
        bucket: Lower end of the rows it is for.
        config: Its tile, as text.
        instructions: The matrix instructions in it.
        registers: Of a thread.
        spilled: Bytes of a thread that do not fit into registers.
        spills_in_loops: Instructions of innermost loops with matrix instructions that move them.
        shared: Bytes of shared memory.
        widest_load: Bytes of the widest load of weights from global memory.
    """

    arch: str
    bucket: int
    config: str
    instructions: tuple[str, ...]
    registers: int
    spilled: int
    spills_in_loops: int
    shared: int
    widest_load: int


def cases(arch: Architecture) -> Iterator[tuple[int, Config]]:
    """The buckets of an architecture with each of their configurations, those of earlier buckets left out."""
    seen = set()
    for bucket in arch.rows:
        for config in tables.candidates(arch, bucket, K):
            if config not in seen:
                seen.add(config)
                yield bucket, config


def target_of(arch: Architecture) -> GPUTarget:
    """What Triton calls an architecture."""
    if arch.name.startswith("gfx"):
        return GPUTarget("hip", arch.name, 64)
    return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), 32)


def launch(arch: Architecture, bucket: int, config: Config, activation: int = NONE) -> Launch:
    """The call of a product of bfloat16 activations, with tensors that have no data."""
    q, rows = empty_rows(torch.empty(bucket, K, dtype=torch.bfloat16, device="meta"), 12.0)
    qweight = torch.empty(N, K, dtype=torch.int8, device="meta")
    scale = torch.empty(N, device="meta")
    y = empty_result(q, qweight, activation, 0, torch.bfloat16)
    return launch_of(Product(q, rows, qweight, scale, scale, y, activation, 0, 0), config)


def compiled(arch: Architecture, bucket: int, config: Config) -> Compiled:
    """Compiles a configuration.

    Raises:
        Exception: Triton's own, where it cannot.
    """
    found = examine(launch(arch, bucket, config).compile(target_of(arch)))
    return Compiled(arch.name, bucket, str(config), **found)


def examine(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel is made of: the last six fields of `Compiled`."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    found: dict[str, Any] = {
        "instructions": tuple(sorted(set(_MATRIX.findall(text)))),
        "shared": int(kernel.metadata.shared),
    }
    if "amdgcn" in kernel.asm:
        loads = [4 * int(width or 1) for width in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
        return found | {
            "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
            "spilled": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
            # What is not spilled at all is not spilled in a loop.
            "spills_in_loops": _number(r"\.vgpr_spill_count:\s*(\d+)", text),
            "widest_load": max(loads, default=0),
        }
    loads = [int(many or 1) * int(bits) // 8 for many, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", text)]
    loads += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* .*?\], (\w+)[,;]", text)]
    loads += [16 for _ in re.findall(r"cp\.async\.bulk\.tensor", text)]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", cubin.name), _tool("nvdisasm", "-c", cubin.name)
    return found | {
        "registers": _number(r"REG:(\d+)", usage),
        "spilled": _number(r"STACK:(\d+)", usage),
        "spills_in_loops": spills_in_loops(sass),
        "widest_load": max(loads, default=0),
    }


def spills_in_loops(sass: str) -> int:
    """How many instructions of innermost loops with matrix instructions read or write spilled registers."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
    loops = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?`\((\.L\w+)\)", instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            begin = labels[jump[1]]
            if any(_SASS_MATRIX.search(each) for each in instructions[begin : end + 1]):
                loops.append((begin, end))
    inner = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    return sum(
        bool(_SASS_SPILL.search(instruction)) for begin, end in inner for instruction in instructions[begin : end + 1]
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


def _compiled(task: tuple[str, int, Config]) -> Compiled:
    name, bucket, config = task
    return compiled(tables.ARCHITECTURES[name], bucket, config)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    known = [name for name, arch in tables.ARCHITECTURES.items() if arch.instruction]
    parser.add_argument("--arch", action="append", choices=known, help="only this one; may be given again")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the table, instead of printing it")
    given = parser.parse_args(arguments)
    tasks = [
        (name, bucket, config) for name in given.arch or known for bucket, config in cases(tables.ARCHITECTURES[name])
    ]
    from tabulate import tabulate

    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(_compiled, tasks), total=len(tasks), unit="kernel", file=sys.stderr))
    shown = [
        (
            row.arch, row.bucket, row.config, ", ".join(_short(each) for each in row.instructions), row.registers,
            row.spilled, row.spills_in_loops, f"{row.shared / 1024:.0f} KiB", row.widest_load,
        )
        for row in rows
    ]  # fmt: skip
    head = ("arch", "M from", "kernel and tile", "instruction", "registers", "spilled", "in loops", "shared", "load")
    table = tabulate(shown, head, tablefmt="github")
    if given.out is None:
        print(table)
    else:
        given.out.write_text(f"{_ABOUT.format(version=triton.__version__)}\n{table}\n")
    return 0


def _short(instruction: str) -> str:
    return re.sub(r"\.(sync|aligned|row|col|satfinite|mma_async)", "", instruction)


if __name__ == "__main__":
    sys.exit(main())
