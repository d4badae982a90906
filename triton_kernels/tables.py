"""Which kernel with which tiles, from the GPU's architecture, the rows and the weight's shape.

The launchers, the autotuner, the compile-only tests and the benchmarks all read this table. It was made from what
others published, from the sizes of the parts and from code that was compiled without a GPU (registers, spills, shared
memory). `python -m benchmarks.gpu_day` measures it.
"""

from __future__ import annotations

import dataclasses
import math

# The lower ends of the ranges of M that have a row of the table each.
BUCKETS = (1, 2, 17, 33, 65, 129, 256, 512)


@dataclasses.dataclass(frozen=True)
class Config:
    """A kernel and its tile.

    Attributes:
        kernel: The folder's name: "gemv", "gemm" or "tma_gemm".
        bm: Rows of a tile.
        bn: Outputs of a tile.
        bk: Inputs a step of the main loop.
        num_warps: Warps of a program.
        num_stages: Steps of the main loop that are in flight.
        group_m: Row tiles whose programs run together.
    """

    kernel: str
    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def tiles(self, m: int, n: int) -> int:
        """How many tiles a product has."""
        return math.ceil(m / self.bm) * math.ceil(n / self.bn)

    def __str__(self) -> str:
        return f"{self.kernel} {self.bm}x{self.bn}x{self.bk} {self.num_warps}w {self.num_stages}s"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the kernels need to know of a family of GPUs.

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


def _gemv(*shapes: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(Config("gemv", 1, bn, bk, warps, 1) for bn, bk, warps in shapes)


def _tiles(kernel: str, *shapes: tuple[int, int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(kernel, *shape) for shape in shapes)


_GEMV = _gemv((8, 512, 4), (4, 1024, 4), (2, 1024, 4))

# 163 KB of shared memory. Instructions take 16 rows; larger BK do not fit with enough stages.
_SM_80 = Architecture(
    "sm_80",
    163 * 1024,
    "mma.sync",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 64, 128, 4, 4), (16, 32, 256, 4, 4), (16, 16, 256, 4, 4)),
        17: _tiles("gemm", (32, 64, 128, 4, 4), (32, 32, 128, 4, 4)),
        33: _tiles("gemm", (64, 64, 128, 4, 4), (64, 32, 128, 4, 4)),
        65: _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 128, 8, 4), (64, 64, 128, 4, 4)),
        129: _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 128, 8, 4), (64, 64, 128, 4, 4)),
        256: _tiles("gemm", (128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 8, 4)),
        512: _tiles("gemm", (128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 8, 4)),
    },
)

# 99 KB.
_SM_86 = Architecture(
    "sm_86",
    99 * 1024,
    "mma.sync",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 64, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 256, 4, 3)),
        17: _tiles("gemm", (32, 64, 128, 4, 3), (32, 32, 128, 4, 4)),
        33: _tiles("gemm", (64, 64, 128, 8, 4), (64, 32, 128, 4, 4)),
        65: _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 128, 8, 4)),
        129: _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 128, 8, 4)),
        256: _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 64, 4, 4)),
        512: _tiles("gemm", (128, 128, 64, 8, 4), (64, 128, 64, 4, 4)),
    },
)

# 227 KB. wgmma needs 64 rows and 4 warps for each 64 of them, below that Triton takes mma.sync.
_SM_90 = Architecture(
    "sm_90",
    227 * 1024,
    "wgmma",
    {
        1: _GEMV,
        # 16 outputs a tile are slower on an H200 (1.2 to 1.9 times), though they fill more multiprocessors.
        2: _tiles("gemm", (16, 64, 256, 4, 4), (16, 32, 256, 4, 5)),
        17: _tiles("gemm", (32, 64, 256, 4, 4), (32, 32, 256, 4, 5)),
        33: _tiles("gemm", (64, 64, 128, 4, 4), (64, 32, 256, 4, 3)),
        65: _tiles("gemm", (128, 128, 128, 8, 5), (64, 128, 256, 4, 3), (64, 64, 256, 4, 5)),
        129: _tiles("gemm", (128, 128, 128, 8, 5), (64, 128, 256, 4, 3), (64, 64, 256, 4, 5)),
        256: (
            *_tiles("tma_gemm", (128, 256, 128, 8, 3), (128, 128, 128, 8, 5)),
            *_tiles("gemm", (128, 128, 128, 8, 5), (64, 128, 128, 4, 5)),
        ),
        512: (
            *_tiles("tma_gemm", (128, 256, 128, 8, 3), (128, 128, 128, 8, 5)),
            *_tiles("gemm", (128, 128, 128, 8, 5)),
        ),
    },
)

# 227 KB. From 64 rows on newer versions of Triton take its own matrix instruction, older ones mma.sync.
_SM_100 = Architecture(
    "sm_100",
    227 * 1024,
    "mma.sync",
    {
        1: _GEMV,
        2: _tiles("gemm", (16, 64, 256, 4, 4), (16, 32, 256, 4, 5), (16, 16, 512, 4, 4)),
        17: _tiles("gemm", (32, 64, 256, 4, 4), (32, 32, 256, 4, 5)),
        33: _tiles("gemm", (64, 64, 128, 4, 5), (64, 32, 256, 4, 4)),
        65: _tiles("gemm", (128, 128, 128, 8, 4), (64, 128, 128, 8, 4), (64, 64, 128, 4, 5)),
        129: _tiles("gemm", (128, 128, 128, 8, 4), (64, 128, 128, 8, 4), (64, 64, 128, 4, 5)),
        256: _tiles("gemm", (128, 128, 128, 8, 4), (64, 128, 128, 8, 4)),
        512: _tiles("gemm", (128, 128, 128, 8, 4), (64, 128, 128, 8, 4)),
    },
)

# 64 KB, warps of 64 threads.
_GFX942 = Architecture(
    "gfx942",
    64 * 1024,
    "v_mfma_i32",
    {
        1: _gemv((4, 1024, 4), (2, 1024, 4)),
        2: _tiles("gemm", (16, 64, 128, 4, 2), (16, 32, 128, 4, 2)),
        17: _tiles("gemm", (32, 64, 128, 4, 2), (32, 32, 128, 4, 2)),
        33: _tiles("gemm", (64, 64, 128, 4, 2), (64, 32, 128, 4, 2)),
        65: _tiles("gemm", (128, 128, 64, 8, 2), (64, 64, 128, 4, 2)),
        129: _tiles("gemm", (128, 128, 64, 8, 2), (64, 64, 128, 4, 2)),
        256: _tiles("gemm", (128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
        512: _tiles("gemm", (128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
    },
)

# Triton has no matrix instructions at all for it: weights in int8, activations in 23 bits, by PyTorch.
_SM_75 = Architecture("sm_75", 64 * 1024, "", {})

ARCHITECTURES = {arch.name: arch for arch in (_SM_75, _SM_80, _SM_86, _SM_90, _SM_100, _GFX942)}


def bucket_of(m: int) -> int:
    """The lower end of the range that M belongs to."""
    return max(bucket for bucket in BUCKETS if bucket <= m)


def candidates(arch: Architecture, m: int, k: int) -> tuple[Config, ...]:
    """Return the configurations that can compute a product, from large to small tiles.

    Args:
        arch: The GPU's.
        m: Rows, at least 1.
        k: Inputs. Tensor descriptors want rows that begin at multiples of 16 bytes.
    """
    return tuple(config for config in arch.rows[bucket_of(m)] if config.kernel != "tma_gemm" or k % 16 == 0)


def choose(configs: tuple[Config, ...], m: int, n: int, multiprocessors: int) -> Config:
    """The first configuration, that is the one of the largest tiles, with a tile for every multiprocessor."""
    return next((config for config in configs if config.tiles(m, n) >= multiprocessors), configs[-1])
