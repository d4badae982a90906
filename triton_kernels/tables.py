"""Which kernel with which tiles, from the GPU's architecture, the rows and the weight's shape.

The launchers, the autotuner, the compile-only tests and the benchmarks all read this table. It was made from what
others published, from the sizes of the parts and from code that was compiled without a GPU (registers, spills, shared
memory). `python -m benchmarks.gpu_day` measures it.
"""

from __future__ import annotations

import dataclasses
import math

from int8compile.ops.quantized import BLOCK, COUNTERS
from int8compile.triton_kernels import loading

# The lower ends of the ranges of M that have a row of the table each.
BUCKETS = (1, 2, 17, 33, 65, 129, 256, 512)

# What a multiprocessor could move while the sums of a tile are counted, and what a byte of them costs. Fitted to the
# times of an H200 for 16, 64 and 128 rows of Llama-3.1-8B linears: the choice is within 9 % of the best of those tried.
_SPLIT, _SPLIT_BYTE = 96 * 1024, 4.5


@dataclasses.dataclass(frozen=True)
class Config:
    """A kernel and its tile.

    Attributes:
        kernel: The folder's name: "gemv", "gemm" or "gluon_gemm".
        bm: Rows of a tile.
        bn: Outputs of a tile.
        bk: Inputs a step of the main loop.
        num_warps: Warps of a program.
        num_stages: Steps of the main loop that are in flight.
        group_m: Row tiles whose programs run together.
        splits: Programs that share a tile, each with its part of the inputs; `choose` sets it.
        instruction: What multiplies four int8 with four others, for "gemv": "dp4a", "v_dot4", or "" for none.
        programs: Programs that share the tiles; one for each tile where it is 0. `choose` sets it.
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
        """Return how many tiles a product has."""
        return math.ceil(m / self.bm) * math.ceil(n / self.bn)

    def __str__(self) -> str:
        splits = f" /{self.splits}" if self.splits > 1 else ""
        return f"{self.kernel} {self.bm}x{self.bn}x{self.bk} {self.num_warps}w {self.num_stages}s{splits}"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of GPUs, as far as the kernels need to know it.

    Attributes:
        name: Of the oldest member: "sm_80".
        shared_memory: Bytes that one program can have.
        instruction: The int8 matrix instruction from 64 rows on, as compiled code has it; "" where Triton has none.
        rows: Candidates by bucket, from large to small tiles.
    """

    name: str
    shared_memory: int
    instruction: str
    rows: dict[int, tuple[Config, ...]]


def _gemv(instruction: str, *shapes: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(Config("gemv", 1, bn, bk, warps, 1, instruction=instruction) for bn, bk, warps in shapes)


def _tiles(kernel: str, *shapes: tuple[int, int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(kernel, *shape) for shape in shapes)


# Programs of 8 to 16 KB of weight in flight, eight or more of which fit a multiprocessor.
_GEMV_SHAPES = ((8, 2048, 4), (4, 2048, 4), (2, 4096, 4))
_GEMV = _gemv("dp4a", *_GEMV_SHAPES)

# 163 KB of shared memory. Instructions take 16 rows; larger BK do not fit with enough stages.
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

# 99 KB.
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

# Warps without the producer's.
_GLUON = _tiles("gluon_gemm", (128, 256, 128, 8, 4), (128, 128, 128, 8, 6))

# 227 KB. wgmma needs 64 rows and 4 warps for each 64 of them, below that Triton takes mma.sync.
_SM_90 = Architecture(
    "sm_90",
    227 * 1024,
    "wgmma",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 128, 128, 4, 5), (16, 64, 256, 4, 5), (16, 32, 512, 4, 4)),
        17: _tiles("gemm", (32, 128, 128, 4, 5), (32, 64, 256, 4, 5), (32, 32, 512, 4, 4)),
        33: _tiles("gemm", (64, 128, 128, 4, 4), (64, 64, 256, 4, 4), (64, 32, 256, 4, 4)),
        # Gluon's, whose matrix products stay in flight; behind it what is taken where Gluon cannot be.
        **dict.fromkeys(
            (65, 129), _GLUON + _tiles("gemm", (128, 128, 128, 8, 5), (128, 64, 128, 8, 5), (64, 64, 128, 4, 5))
        ),
        256: _GLUON + _tiles("gemm", (128, 128, 128, 8, 5), (128, 64, 128, 8, 5)),
        512: _GLUON + _tiles("gemm", (128, 128, 128, 8, 5)),
    },
)

# 227 KB. From 64 rows on newer versions of Triton take its own matrix instruction, older ones mma.sync.
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

# 64 KB, warps of 64 threads.
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

# Triton has no matrix instructions at all for it: weights in int8, activations in 23 bits, by PyTorch.
_SM_75 = Architecture("sm_75", 64 * 1024, "", {})

ARCHITECTURES = {arch.name: arch for arch in (_SM_75, _SM_80, _SM_86, _SM_90, _SM_100, _GFX942)}


def bucket_of(m: int) -> int:
    """Return the lower end of the range that M belongs to."""
    return max(bucket for bucket in BUCKETS if bucket <= m)


def candidates(arch: Architecture, m: int, k: int, *, aligned: bool = True) -> tuple[Config, ...]:
    """Return the configurations that can compute a product, from large to small tiles.

    Args:
        arch: The GPU's.
        m: Rows, at least 1.
        k: Inputs.
        aligned: Whether q and the rows of the weight begin at multiples of 16 bytes. The copy engine, which Gluon's
            kernel uses, wants that, and K a multiple of 16.
    """
    gluon = aligned and k % 16 == 0 and not loading.gluon_failure()
    return tuple(config for config in arch.rows[bucket_of(m)] if config.kernel != "gluon_gemm" or gluon)


def choose(configs: tuple[Config, ...], m: int, n: int, k: int, multiprocessors: int) -> Config:
    """Return one of the configurations, with its splits: the one whose multiprocessors have the least to move.

    From 256 rows on it is the first, which has the largest tiles, where there is a tile for every multiprocessor.
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
    """Return what a multiprocessor moves, in bytes, with the best splits, and these.

    Bytes from the L2 cache count like those from memory: a multiprocessor of an H200 takes in about 58 KB/us of either.
    """
    tiles, rows, step = config.tiles(m, n), min(m, config.bm), max(config.bk, BLOCK)
    steps = -(-k // step)
    # Gluon's larger tile has no registers for others' sums beside its own.
    splittable = config.kernel in ("gemm", "gluon_gemm") and config.bn <= 128 and tiles <= COUNTERS
    costs = []
    for splits in range(1, min(steps, 16) + 1 if splittable else 2):
        inputs = -(-steps // splits) * step
        each = float(inputs * (config.bn + rows))
        if splits > 1:
            each += _SPLIT_BYTE * 4 * rows * config.bn * splits + _SPLIT
        # Several small tiles share a multiprocessor; a large one has it alone.
        waves = tiles * splits / multiprocessors
        costs.append((each * (max(waves, 1) if config.bm <= 64 else math.ceil(waves)), splits))
    return min(costs)
