"""The kernels and tiles of `quantized_linear`, by the GPU's architecture, M and the weight's shape.

M rows of activations, K inputs, N outputs. `operators.py`, `autotune.py`, `plan.py`, the tests and the benchmarks read
these tables; launchers are given one `Config`. `grouped_gemm`, `weight_only` and `quantize` have their sizes in their
own `launch.py`.

The tables follow published measurements, the GPUs' memory sizes, and the registers, spills and shared memory of code
compiled without a GPU. `python -m benchmarks.gpu_day` measures them.
"""

from __future__ import annotations

import dataclasses
import math

from int8compile.ops.quantized import BLOCK, COUNTERS
from int8compile.triton_kernels import loading

# The lower ends of the ranges of M. Each range has its own tiles in `Architecture.by_bucket`; 65 and 129 have the same
# ones, but the autotuner measures and stores each range on its own, and the GPU day's results name these ranges.
BUCKETS = (1, 2, 17, 33, 65, 129, 256, 512)

# The cost of splitting K, in bytes of traffic: once per program, and for each byte of a tile's partial sums. Fitted to
# an H200's times for M = 16, 64 and 128 in linears of Llama-3.1-8B: the choice is within 9 % of the best one tried.
_SPLIT, _SPLIT_BYTE = 96 * 1024, 4.5


@dataclasses.dataclass(frozen=True)
class Config:
    """A kernel and its tile.

    Attributes:
        kernel: The folder's name: "gemv", "gemm" or "gluon_gemm".
        bm: A tile's part of M.
        bn: A tile's part of N.
        bk: The part of K in a step of the main loop.
        num_warps: Warps per program.
        num_stages: Steps of the main loop in flight.
        group_m: Number of tiles along M whose programs run together.
        splits: Number of parts of K; each part of a tile is one program. `choose` sets it.
        instruction: The instruction of "gemv" that multiplies four int8 with four others: "dp4a", "v_dot4", or "" for
            none.
        programs: Most programs per split, each of which computes several tiles (a persistent kernel, in Gluon); 0 for
            one program per tile. `choose` sets it for Gluon.
    """

    kernel: str
    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    splits: int = 1
    instruction: str = ""
    programs: int = 0

    def tiles(self, m: int, n: int) -> int:
        """Return the number of tiles of a product."""
        return math.ceil(m / self.bm) * math.ceil(n / self.bn)

    def __str__(self) -> str:
        splits = f" /{self.splits}" if self.splits > 1 else ""
        return f"{self.kernel} {self.bm}x{self.bn}x{self.bk} {self.num_warps}w {self.num_stages}s{splits}"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The properties of a family of GPUs that kernels depend on.

    Attributes:
        name: The oldest member's, such as "sm_80".
        shared_memory: Bytes available to one program.
        matrix_instruction: The int8 matrix instruction in compiled code where bm >= 64; "" if Triton has none.
        by_bucket: Candidate configurations by bucket, from large to small tiles.
    """

    name: str
    shared_memory: int
    matrix_instruction: str
    by_bucket: dict[int, tuple[Config, ...]]


def _gemv(instruction: str, *shapes: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(Config("gemv", 1, bn, bk, warps, 1, instruction=instruction) for bn, bk, warps in shapes)


def _tiles(kernel: str, *shapes: tuple[int, int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(kernel, *shape) for shape in shapes)


# Each program has 8 to 16 KB of weight in flight; a multiprocessor holds eight or more programs.
_GEMV_SHAPES = ((8, 2048, 4), (4, 2048, 4), (2, 4096, 4))
_GEMV = _gemv("dp4a", *_GEMV_SHAPES)

# 163 KB of shared memory. Matrix instructions take 16 rows of a tile. With BM = 128, a larger BK would not fit with
# enough stages.
_SM_80 = Architecture(
    "sm_80",
    163 * 1024,
    "mma.sync",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 128, 128, 4, 4), (16, 64, 128, 4, 4), (16, 32, 256, 4, 4)),
        17: _tiles("gemm", (32, 128, 128, 8, 4), (32, 64, 128, 4, 4), (32, 32, 256, 4, 4)),
        33: _tiles("gemm", (64, 128, 128, 8, 4), (64, 64, 128, 4, 4), (64, 32, 128, 4, 4)),
        **dict.fromkeys((65, 129), _tiles("gemm", (128, 128, 128, 8, 3), (64, 128, 128, 8, 4), (64, 64, 128, 4, 4))),
        **dict.fromkeys((256, 512), _tiles("gemm", (128, 128, 128, 8, 3), (64, 128, 128, 8, 4))),
    },
)

# 99 KB of shared memory.
_SM_86 = Architecture(
    "sm_86",
    99 * 1024,
    "mma.sync",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 128, 128, 4, 4), (16, 64, 128, 4, 4), (16, 32, 256, 4, 4)),
        17: _tiles("gemm", (32, 128, 128, 8, 4), (32, 64, 128, 4, 4), (32, 32, 256, 4, 4)),
        33: _tiles("gemm", (64, 128, 128, 8, 4), (64, 64, 128, 8, 4), (64, 32, 128, 4, 4)),
        **dict.fromkeys((65, 129), _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 64, 8, 4), (64, 64, 128, 8, 4))),
        **dict.fromkeys((256, 512), _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 64, 8, 4))),
    },
)

# num_warps does not count the producer's warp.
_GLUON = _tiles("gluon_gemm", (128, 256, 128, 8, 4), (128, 128, 128, 8, 6))

# 227 KB of shared memory. wgmma needs BM >= 64, and 4 warps per 64; for smaller tiles Triton takes mma.sync.
_SM_90 = Architecture(
    "sm_90",
    227 * 1024,
    "wgmma",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 128, 128, 4, 5), (16, 64, 256, 4, 5), (16, 32, 512, 4, 4)),
        17: _tiles("gemm", (32, 128, 128, 4, 5), (32, 64, 256, 4, 5), (32, 32, 512, 4, 4)),
        33: _tiles("gemm", (64, 128, 128, 4, 4), (64, 64, 256, 4, 4), (64, 32, 256, 4, 4)),
        # Gluon's first: its matrix products stay in flight. The others are taken where Gluon cannot be used.
        **dict.fromkeys(
            (65, 129), _GLUON + _tiles("gemm", (128, 128, 128, 8, 5), (128, 64, 128, 8, 5), (64, 64, 128, 4, 5))
        ),
        256: _GLUON + _tiles("gemm", (128, 128, 128, 8, 5), (128, 64, 128, 8, 5)),
        512: _GLUON + _tiles("gemm", (128, 128, 128, 8, 5)),
    },
)

# 227 KB of shared memory. Where BM >= 64, newer versions of Triton take tcgen05.mma, older ones mma.sync.
_SM_100 = Architecture(
    "sm_100",
    227 * 1024,
    "mma.sync",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 128, 128, 4, 5), (16, 64, 256, 4, 4), (16, 32, 512, 4, 4)),
        17: _tiles("gemm", (32, 128, 128, 4, 5), (32, 64, 256, 4, 4), (32, 32, 512, 4, 4)),
        33: _tiles("gemm", (64, 128, 128, 4, 4), (64, 64, 128, 4, 5)),
        **dict.fromkeys((65, 129), _tiles("gemm", (128, 128, 128, 8, 4), (64, 128, 128, 8, 4))),
        256: _tiles("gemm", (128, 128, 128, 8, 4), (64, 128, 128, 8, 4)),
        512: _tiles("gemm", (128, 128, 128, 8, 4)),
    },
)

# 64 KB of shared memory, warps of 64 threads.
_GFX942 = Architecture(
    "gfx942",
    64 * 1024,
    "v_mfma_i32",
    {
        1: _gemv("v_dot4", *_GEMV_SHAPES),
        2: _tiles("gemm", (16, 128, 128, 4, 2), (16, 64, 128, 4, 2), (16, 32, 128, 4, 2)),
        17: _tiles("gemm", (32, 128, 128, 4, 2), (32, 64, 128, 4, 2), (32, 32, 128, 4, 2)),
        33: _tiles("gemm", (64, 128, 128, 8, 2), (64, 64, 128, 4, 2), (64, 32, 128, 4, 2)),
        **dict.fromkeys((65, 129), _tiles("gemm", (128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 64, 128, 4, 2))),
        **dict.fromkeys((256, 512), _tiles("gemm", (128, 128, 64, 8, 2), (64, 128, 64, 4, 2))),
    },
)

# Triton does not use its int8 matrix instructions, so it has no tiles, and `candidates` must not be called: PyTorch
# multiplies activations of 23 bits with int8 weights.
_SM_75 = Architecture("sm_75", 64 * 1024, "", {})

ARCHITECTURES = {arch.name: arch for arch in (_SM_75, _SM_80, _SM_86, _SM_90, _SM_100, _GFX942)}


def bucket_of(m: int) -> int:
    """Return the lower end of the range that contains M."""
    return max(bucket for bucket in BUCKETS if bucket <= m)


def candidates(arch: Architecture, m: int, k: int, *, aligned: bool = True) -> tuple[Config, ...]:
    """Return the configurations that can compute a product, from large to small tiles.

    Args:
        arch: The GPU's tables; not those of sm_75, which are empty.
        m: M, at least 1.
        k: K.
        aligned: Whether q and the rows of the weight begin at multiples of 16 bytes. The copy engine, which Gluon's
            kernel uses, needs this, and K to be a multiple of 16.
    """
    gluon = aligned and k % 16 == 0 and not loading.gluon_failure()
    return tuple(config for config in arch.by_bucket[bucket_of(m)] if config.kernel != "gluon_gemm" or gluon)


def choose(configs: tuple[Config, ...], m: int, n: int, k: int, multiprocessors: int) -> Config:
    """Return one of the configurations, with its splits set, and for Gluon its programs.

    - M = 1: the first with two tiles per multiprocessor, otherwise the last.
    - M >= 256: the first, which has the largest tiles, if it has a tile for every multiprocessor.
    - Otherwise: the one with the lowest cost, with the splits of this cost.
    """
    splits = 1
    if m == 1:
        chosen = next((config for config in configs if config.tiles(m, n) >= 2 * multiprocessors), configs[-1])
    elif m >= 256 and configs[0].tiles(m, n) >= multiprocessors:
        chosen = configs[0]
    else:
        costs = [(*_cost(config, m, n, k, multiprocessors), config) for config in configs]
        _, splits, chosen = min(costs, key=lambda cost: cost[0])
    programs = multiprocessors if chosen.kernel == "gluon_gemm" else chosen.programs
    return dataclasses.replace(chosen, splits=splits, programs=programs)


def _cost(config: Config, m: int, n: int, k: int, multiprocessors: int) -> tuple[float, int]:
    """Return the bytes that a multiprocessor moves with the best number of splits, and this number.

    Bytes from the L2 cache count like those from memory: a multiprocessor of an H200 reads about 58 KB/us of either.
    This was fitted to products of 64 rows, where few multiprocessors wait on memory at once, so it is not the whole
    GPU's bandwidth divided by its multiprocessors.
    """
    tiles, tile_rows = config.tiles(m, n), min(m, config.bm)
    # Splits get whole numbers of these steps.
    step = max(config.bk, BLOCK)
    total_steps = -(-k // step)
    # Gluon's larger tile has no registers left for adding up partial sums.
    splittable = config.kernel in ("gemm", "gluon_gemm") and config.bn <= 128 and tiles <= COUNTERS
    costs = []
    for splits in range(1, min(total_steps, 16) + 1 if splittable else 2):
        inputs = -(-total_steps // splits) * step
        per_program = float(inputs * (config.bn + tile_rows))
        if splits > 1:
            per_program += _SPLIT_BYTE * 4 * tile_rows * config.bn * splits + _SPLIT
        # Several small tiles share a multiprocessor; a large tile fills one.
        waves = tiles * splits / multiprocessors
        costs.append((per_program * (max(waves, 1) if config.bm <= 64 else math.ceil(waves)), splits))
    return min(costs)
