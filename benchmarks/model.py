"""A model of kernel times on an H100 or an H200 from their compiled code, for `benchmarks.predicted`.

The time of a kernel is its launch, the latency of memory and, for each wave of programs, the slowest of: bytes from
memory, bytes from the L2 cache, matrix instructions, issued instructions, and the chain of waits in a program's step.
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
        name: Part of PyTorch's device name.
        bandwidth: Memory bandwidth in bytes per second, from the data sheet.
    """

    name: str
    bandwidth: float


# Each constant is marked with its origin. [sheet]: NVIDIA's data sheets of SXM modules. [day]: the GPU day on an H200
# (benchmarks/results/gpu/h200-1). [public]: a publication, named there. [chosen]: a plausible value that fits the
# measurements of the previous kernels. None was changed to favour today's kernels.
GPUS = {"H100": Gpu("H100", 3.35e12), "H200": Gpu("H200", 4.8e12)}  # [sheet]
MULTIPROCESSORS, SCHEDULERS = 132, 4  # [sheet]
# [day] Largest share of the bandwidth that a kernel reaches: 4.47 TB/s, from cuBLAS reading lm_head (1.05 GB, far more
# than the L2 cache) in 235 us. An H100 is assumed to reach the same share.
BANDWIDTH_SHARE = 0.93
# Clock rates in Hz. [day] CLOCK: from ncu, for kernels without matrix instructions. [chosen] MATRIX_CLOCK: under matrix
# instructions with more than FEW_ROWS rows. ncu showed 1.78 GHz with matrix units busy for 42 % of the time, and
# cuBLAS's 786e12 bfloat16 operations per second (M = N = K = 8192; [public] 700e12 to 750e12 on an H100) are 0.94 of
# the matrix units' rate at MATRIX_CLOCK.
CLOCK, MATRIX_CLOCK, FEW_ROWS = 1.95e9, 1.55e9, 128
# [sheet] Operations of a multiprocessor per cycle: 1979e12 int8 and 989e12 bfloat16 operations per second at 1.83 GHz
# on 132 multiprocessors. [public] Instructions of a single warp (mma.sync) reach about 62 % of that (arXiv 2402.13499).
INT8, BF16 = 8192, 4096
MMA_SHARE = 0.62
# [day] Share that a loop without waits reaches: cuBLAS's share. It gives 1.56e15 int8 operations per second; [public]
# fp8, which has the same rate, reaches up to 1.55e15 in DeepGEMM on an H800.
ASYNCHRONOUS = 786.27e12 / (MULTIPROCESSORS * BF16 * MATRIX_CLOCK)
# [chosen] Seconds between the starts of two dependent empty kernels of a CUDA graph. [day] ncu gives an almost empty
# kernel 1.7 us; the graph hides a part of that and adds time between kernels.
LAUNCH = 2.0e-6
# [chosen] Seconds until the first bytes arrive from memory. Copies that barriers wait for, behind other copies, take
# longer than loads into registers.
LATENCY, COPY_LATENCY = 0.5e-6, 0.75e-6
# [chosen] Seconds for split sums: a store visible to other programs and an atomic addition, which are two round trips
# to the L2 cache and a fence. The previous kernels had no split sums.
ARRIVAL = 0.5e-6
# [chosen] Seconds before the first step of a tile, to find which blocks of its rows have second digits: a load from the
# L2 cache, and an OR over the rows. The previous kernels did not do this.
FLAGS = 0.3e-6
# [chosen] Latencies in cycles: a barrier of all warps; waiting until no matrix instruction of a warp group is left; a
# matrix instruction of one warp whose result the next one needs; a load from shared memory.
BARRIER, DRAIN, MMA_LATENCY, SHARED_LATENCY = 25, 128, 35, 30
# Bytes per second from the L2 cache. [day] To all multiprocessors: the least rate of concurrent programs that read the
# same bytes (the previous tma_gemm of 128 x 128, 512 rows of qkv). [chosen] To one multiprocessor: 64 bytes a cycle.
L2_BANDWIDTH, L2_PORT = 10.4e12, 100e9
# [chosen] Scheduler cycles for an instruction in code that waits for neither matrix instructions nor memory. A
# multiprocessor starts integer and byte operations for 64 threads a cycle, half of its issue rate.
ISSUE = 1.2
# [chosen] Exponent of the norm that combines the times of parts which overlap imperfectly; infinity is their maximum.
NORM = 2.5
# [day] cuBLAS in bfloat16, fitted to 20 products of 1 to 2048 rows: fixed seconds including the launch; the highest
# rate in operations per second; and the norm that combines bytes and operations. Predicted times are on average below
# measured ones, and an H100 is assumed to be as fast as an H200: both favour bfloat16.
BASELINE, BASELINE_RATE, BASELINE_NORM = 4.5e-6, 811e12, 4.0
# [day] Seconds of a layer's decode step besides linears and norms, the same in bfloat16 and int8. In 8 layers,
# attention over a cache of 256, rotary embeddings and the cache update took 112.6 us, in five kernels a layer.
ATTENTION = 112.6e-6 / 8 + 5 * 1e-6


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The properties of a product's kernel that the model uses.

    Attributes:
        name: Its configuration.
        bm: Rows of a tile.
        bn: Outputs of a tile.
        bk: Inputs of a step.
        stages: Steps in flight; 1 if a step loads its own inputs.
        warps: Warps of a program.
        resident: Programs that a multiprocessor holds.
        loop: Instructions of a step.
        outside: Number of instructions outside of loops.
        splits: Programs that share a tile's inputs.
        persistent: Whether a program computes several tiles in turn and loads ahead.
        multicast: Programs that share a copy.
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
        seconds: Time from the end of the kernel before.
        limit: The part that takes most of it.
    """

    seconds: float
    limit: str

    def __add__(self, other: Time) -> Time:
        """Return the time of both in sequence, with the limit of the longer one."""
        longer = max(self, other, key=lambda time: time.seconds)
        return Time(self.seconds + other.seconds, longer.limit)


def product(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int, written: int | None = None) -> Time:
    """Predict the time of a product of quantized activations without second digits.

    Args:
        gpu: The GPU.
        kernel: The kernel.
        m: Rows.
        n: Outputs.
        k: Inputs.
        written: Bytes of the result; by default two for each row and output.
    """
    loop, tiles = kernel.loop, math.ceil(m / kernel.bm) * math.ceil(n / kernel.bn)
    programs = tiles * kernel.splits
    k_program = math.ceil(k / kernel.splits)
    clock = MATRIX_CLOCK if m > FEW_ROWS else CLOCK
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
            # The warps that multiply issue the copies, partly while they multiply; the copy engine needs no warps.
            copying = any(kind.startswith("LDGSTS") for kind, _ in loop.copies)
            chain += matrix + DRAIN + (issue / 2 if copying else 0)
        else:
            # No waits: the next instructions are queued, and other warps copy.
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
    # Other programs on the multiprocessor hide the beginning and the end of a wave.
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
    """Predict the time of a kernel with a program for each row: a norm, or quantize.

    Args:
        gpu: The GPU.
        instructions: Number of instructions that a warp executes.
        barriers: Number of barriers of all warps of a program.
        warps: Warps of a program.
        resident: Programs that a multiprocessor holds.
        m: Rows.
        nbytes: Bytes that it reads and writes.
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
    """Predict the seconds of cuBLAS's product in bfloat16: a roofline fitted to measurements on an H200."""
    memory = 2 * (n * k + m * k + m * n) / (gpu.bandwidth * BANDWIDTH_SHARE)
    operations = 2 * m * n * k / BASELINE_RATE
    return BASELINE + _together(memory, operations, BASELINE_NORM)


def pointwise(gpu: Gpu, nbytes: int) -> float:
    """Predict the seconds of a kernel that only moves bytes.

    It stands for bfloat16's norms and silu-times-up, which favours bfloat16.
    """
    return LAUNCH + nbytes / (gpu.bandwidth * BANDWIDTH_SHARE)


def kernel_of(config: Any, found: Any, *, flags: bool = True) -> Kernel:
    """Return the properties of a configuration and its compiled code that the model uses.

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
        # Kernels without matrix instructions do not copy ahead.
        stages=config.num_stages if found.loop.matrix else 1,
        splits=config.splits,
        # Warps that multiply, without those that copy.
        warps=config.num_warps,
        resident=found.resident("sm_90"),
        loop=found.loop,
        outside=found.outside,
        persistent=config.kernel == "gluon_gemm",
        flags=flags,
    )


def _together(first: float, second: float, norm: float = NORM) -> float:
    return float((first**norm + second**norm) ** (1 / norm))
