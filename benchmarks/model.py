"""A model of how long kernels take on an H100 or an H200, from what they were compiled to: of `benchmarks.predicted`.

The time of a kernel is made of its launch, the latency of memory and, for each wave of programs, the slowest of its
parts: bytes from memory and from the L2 cache, matrix instructions, instructions that are issued, and the chain of
waits in a program's step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from benchmarks.sass import Counts


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU of compute capability 9.0.

    Attributes:
        name: As PyTorch's device name has it.
        bandwidth: Bytes a second from memory, by its data sheet.
    """

    name: str
    bandwidth: float


# Constants are marked by where they come from: [sheet], NVIDIA's data sheets of SXM modules; [day], the GPU day on an
# H200 (benchmarks/results/gpu/h200-1); [public], with the source; [chosen], of a plausible size, so that the previous
# kernels' measurements are described. None was changed for the sake of today's kernels.
GPUS = {"H100": Gpu("H100", 3.35e12), "H200": Gpu("H200", 4.8e12)}  # [sheet]
MULTIPROCESSORS, SCHEDULERS = 132, 4  # [sheet]
# [day] Share of the bandwidth that a kernel reaches at most: 4.47 TB/s, where cuBLAS reads lm_head (1.05 GB, far more
# than the L2 cache) in 235 us. An H100 is taken to reach the same share.
BANDWIDTH_SHARE = 0.93
# Hz. [day] What ncu saw for kernels without matrix instructions; [chosen] what is left under matrix instructions, with
# more than a few rows: ncu saw 1.78 with matrix units busy for 42 % of the time, and cuBLAS's 786e12 operations a
# second in bfloat16 (M = N = K = 8192; [public] 700e12 to 750e12 on an H100) are 0.94 of the matrix units' rate at it.
CLOCK, MATRIX_CLOCK, FEW_ROWS = 1.95e9, 1.55e9, 128
# [sheet] Operations of a multiprocessor in a cycle: 1979e12 int8 and 989e12 bfloat16 operations a second at 1.83 GHz on
# 132 of them. [public] The instructions of a single warp (mma.sync) reach about 62 % of it (arXiv 2402.13499).
INT8, BF16 = 8192, 4096
MMA_SHARE = 0.62
# [day] The best that a loop which never waits is taken to reach of it: cuBLAS's share. It gives 1.56e15 int8 operations
# a second; [public] fp8, whose rate is the same, reaches up to 1.55e15 in DeepGEMM on an H800.
ASYNCHRONOUS = 786.27e12 / (MULTIPROCESSORS * BF16 * MATRIX_CLOCK)
# Seconds. [chosen] Between the starts of two kernels of a CUDA graph of which one waits for the other, and neither does
# anything; ncu gives an almost empty one 1.7 us, [day], of which the graph hides some, and adds some between them.
LAUNCH = 2.0e-6
# [chosen] Until the first bytes from memory are there. Copies that are waited for by barriers, with others in front of
# them, take longer than loads into registers.
LATENCY, COPY_LATENCY = 0.5e-6, 0.75e-6
# [chosen] Split sums: a store that others must see, and their atomic addition, which are two trips to the L2 cache and
# a fence. The previous kernels had none.
ARRIVAL = 0.5e-6
# [chosen] Which blocks of a tile's rows have second digits is read before its first step: a load that hits the L2
# cache, and an OR over the rows. The previous kernels were measured without.
FLAGS = 0.3e-6
# [chosen] Cycles: a barrier of all warps; matrix instructions of a warp group that are waited for until none is left; a
# matrix instruction of one warp, which the next one adds to; a load from shared memory.
BARRIER, DRAIN, MMA_LATENCY, SHARED_LATENCY = 25, 128, 35, 30
# Bytes a second from the L2 cache: [day] to all multiprocessors, what programs that run together and read the same
# bytes got at least (the previous tma_gemm of 128 x 128, 512 rows of qkv); [chosen] to one, of 64 bytes a cycle.
L2_BANDWIDTH, L2_PORT = 10.4e12, 100e9
# [chosen] Cycles of a scheduler for an instruction where no matrix instruction or memory is waited for: of integer and
# byte operations a multiprocessor starts 64 threads a cycle, half of what it can issue.
ISSUE = 1.2
# [chosen] Times of parts that overlap, but not perfectly, are combined by this norm; infinity would be the largest.
NORM = 2.5
# [day] cuBLAS in bfloat16, from the measurements of 20 products of 1 to 2048 rows: seconds besides bytes and
# operations, the launch included; the highest rate of any of them; and how nearly bytes and operations overlap.
# The mean of its predicted times is below that of the measured ones, and an H100 is taken to be as fast: to bfloat16's
# advantage.
BASELINE, BASELINE_RATE, BASELINE_NORM = 4.5e-6, 811e12, 4.0
# [day] What a decoder's step does besides linears and norms, in bfloat16 and int8 alike: in 8 layers, attention over a
# cache of 256, rotary embeddings and the cache took 112.6 us, in five kernels a layer.
ATTENTION = 112.6e-6 / 8 + 5 * 1e-6


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A product's kernel, as far as the model looks at it.

    Attributes:
        name: Its configuration.
        bm: Rows of a tile.
        bn: Outputs of a tile.
        bk: Inputs of a step.
        stages: Steps that are in flight; 1 where a step loads what it needs itself.
        warps: Of a program.
        resident: Programs that a multiprocessor holds at once.
        loop: A step.
        outside: Instructions besides loops.
        splits: Programs that share a tile's inputs.
        persistent: Whether a program computes one tile after the other, loading ahead.
        multicast: Programs that share what they copy.
        flags: Whether it looks for second digits.
    """

    name: str
    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    resident: int
    loop: Counts
    outside: int
    splits: int = 1
    persistent: bool = False
    multicast: int = 1
    flags: bool = False


@dataclasses.dataclass(frozen=True)
class Time:
    """Predicted seconds.

    Attributes:
        seconds: In all, from the end of the kernel before it.
        limit: What takes most of them.
    """

    seconds: float
    limit: str

    def __add__(self, other: Time) -> Time:
        """Return the time of one after the other; the longer one says what limits."""
        longer = max(self, other, key=lambda time: time.seconds)
        return Time(self.seconds + other.seconds, longer.limit)


def product(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int, written: int | None = None) -> Time:
    """Predict a product of quantized activations in which no row has a second digit.

    Args:
        gpu: The GPU.
        kernel: Its kernel.
        m: Rows.
        n: Outputs.
        k: Inputs.
        written: Bytes of the result; two for each row and output unless given.
    """
    loop, tiles = kernel.loop, math.ceil(m / kernel.bm) * math.ceil(n / kernel.bn)
    programs = tiles * kernel.splits
    k_program = math.ceil(k / kernel.splits)
    clock = MATRIX_CLOCK if m > 128 else CLOCK
    issue = loop.instructions * kernel.warps / SCHEDULERS
    grouped = any(wait.startswith("gsb0") for wait in loop.waits)
    chain: float = BARRIER * loop.barriers + SHARED_LATENCY * bool(loop.shared_loads)
    if loop.matrix:
        steps, nbytes = math.ceil(k_program / kernel.bk), (kernel.bm / kernel.multicast + kernel.bn) * kernel.bk
        operations = 2 * max(kernel.bm, 64 if grouped else 16) * kernel.bn * kernel.bk
        matrix = operations / (INT8 if grouped else INT8 * MMA_SHARE)
        latency = COPY_LATENCY
        if not grouped:
            chain += MMA_LATENCY * kernel.bk / 32 + issue
        elif "gsb0 0" in loop.waits:
            # Copies are issued by the warps that multiply, partly while they do; the copy engine needs none of that.
            copying = any(kind.startswith("LDGSTS") for kind, _ in loop.copies)
            chain += matrix + DRAIN + (issue / 2 if copying else 0)
        else:
            # Nothing is waited for: the next instructions are queued, and others copy.
            matrix, chain = matrix / ASYNCHRONOUS, 0.0
    else:
        nbytes = loop.loaded * 32 * kernel.warps
        steps = math.ceil(kernel.bn * k_program / nbytes)
        matrix, latency = 0.0, LATENCY
        chain += issue + (latency * clock if kernel.stages == 1 else 0)
    total = LAUNCH
    spent: dict[str, float] = {"launch": LAUNCH}
    moved = n * k + m * k + (2 * m * n if written is None else written)
    full, rest = divmod(programs, kernel.resident * MULTIPROCESSORS)
    waves = [kernel.resident * MULTIPROCESSORS] * full + ([rest] if rest else [])
    for wave in waves:
        shared = math.ceil(wave / MULTIPROCESSORS)
        parts = {
            "waits": steps * chain / clock,
            "instructions": steps * shared * issue / clock,
            "matrix units": steps * shared * matrix / clock,
            "L2": steps * max(wave * nbytes / L2_BANDWIDTH, shared * nbytes / L2_PORT),
            "latency": steps * (latency + chain / clock) / (kernel.stages - 1) if kernel.stages > 1 else 0.0,
        }
        step = max(parts, key=lambda name: parts[name])
        memory = moved * wave / programs / (gpu.bandwidth * BANDWIDTH_SHARE)
        total += _together(parts[step], memory)
        limit = step if parts[step] > memory else "memory"
        spent[limit] = spent.get(limit, 0.0) + max(parts[step], memory)
    # The beginning and the end of a wave are hidden by other programs of the multiprocessor, if it has any.
    ends = kernel.outside * kernel.warps / SCHEDULERS / clock
    flags = FLAGS if kernel.flags and loop.matrix else 0.0
    begins = flags + (0.0 if kernel.persistent else latency)
    hidden = min(kernel.resident, math.ceil(programs / MULTIPROCESSORS))
    total += latency + flags + ends + (len(waves) - 1) * (begins + ends) / hidden
    spent["ends"] = len(waves) * ends
    if kernel.splits > 1:
        partials = kernel.splits * min(kernel.bm, m) * kernel.bn * 4
        spent["partial sums"] = ARRIVAL + latency + partials / L2_PORT + 2 * tiles * partials / L2_BANDWIDTH
        total += spent["partial sums"]
    return Time(total, max(spent, key=lambda name: spent[name]))


def rows(gpu: Gpu, instructions: float, barriers: int, warps: int, resident: int, m: int, nbytes: float) -> Time:
    """Predict a kernel with a program for each row: a norm, or quantize.

    Args:
        gpu: The GPU.
        instructions: That a warp executes.
        barriers: Of all warps of a program.
        warps: Of a program.
        resident: Programs that a multiprocessor holds at once.
        m: Rows.
        nbytes: That it reads and writes.
    """
    issue = instructions * ISSUE * warps / SCHEDULERS / CLOCK
    alone = LATENCY + issue + barriers * BARRIER / CLOCK
    here = min(resident, math.ceil(m / MULTIPROCESSORS))
    # Programs follow each other; the last ones end together.
    waves = max(1.0, m / (here * MULTIPROCESSORS))
    parts = {
        "instructions": waves * here * issue,
        "waits": waves * alone,
        "memory": nbytes / (gpu.bandwidth * BANDWIDTH_SHARE),
    }
    limit = max(parts, key=lambda name: parts[name])
    total = LAUNCH + _together(max(parts["instructions"], parts["waits"]), parts["memory"])
    return Time(total, limit if parts[limit] > LAUNCH else "launch")


def baseline(gpu: Gpu, m: int, n: int, k: int) -> float:
    """Predict seconds of the product in bfloat16, by cuBLAS: its roofline, as the H200's measurements have it."""
    memory = 2 * (n * k + m * k + m * n) / (gpu.bandwidth * BANDWIDTH_SHARE)
    operations = 2 * m * n * k / BASELINE_RATE
    return BASELINE + _together(memory, operations, BASELINE_NORM)


def pointwise(gpu: Gpu, nbytes: int) -> float:
    """Predict seconds of a kernel that only moves bytes: bfloat16's norms and silu-times-up, to its advantage."""
    return LAUNCH + nbytes / (gpu.bandwidth * BANDWIDTH_SHARE)


def kernel_of(config: Any, found: Any, *, flags: bool = True) -> Kernel:
    """Return what the model looks at of a configuration and what it compiled to.

    Args:
        config: `tables.Config`.
        found: `compiled.Compiled`.
        flags: Whether the kernel looks for second digits.

    Raises:
        ValueError: The kernel has no main loop.
    """
    if found.loop is None:
        raise ValueError(f"no main loop was found in the code of {config}")
    return Kernel(
        *(str(config), config.bm, config.bn, config.bk),
        # A kernel without matrix instructions copies nothing ahead.
        stages=config.num_stages if found.loop.matrix else 1,
        splits=config.splits,
        # Those that multiply, without the one that copies.
        warps=config.num_warps,
        resident=found.resident("sm_90"),
        loop=found.loop,
        outside=found.outside,
        persistent=config.kernel == "gluon_gemm",
        flags=flags,
    )


def _together(first: float, second: float, norm: float = NORM) -> float:
    return float((first**norm + second**norm) ** (1 / norm))
