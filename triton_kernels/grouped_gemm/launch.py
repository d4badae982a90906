"""The call of the kernel `grouped_gemm`."""

from __future__ import annotations

import math

import triton
from torch import Tensor

from int8compile.triton_kernels.grouped_gemm.kernel import grouped_gemm
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config

# Tiles that fit every architecture.
_TILES = tuple(
    Config("grouped_gemm", *tile)
    for tile in ((16, 128, 128, 4, 4), (32, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4))
)
# CUDA's limit in the second dimension of a grid.
_MOST_PROGRAMS = 65535


def config_of(m: int, groups: int) -> Config:
    """Return the smallest tile with at least the average number of rows of a group, or else the largest."""
    return next((config for config in _TILES if config.bm >= m / groups), _TILES[-1])


def grouped_gemm_launch(product: Product, ends: Tensor | None, rows_per_group: int) -> Launch:
    """Return the call that multiplies each group of rows with its weight.

    Args:
        product: Its weight is [E, N, K]; it has no activation function and no parts.
        ends: [E] int32 or int64, the end of each group's rows; None for groups of `rows_per_group`.
        rows_per_group: Rows of each group if `ends` is None.
    """
    experts = len(product.qweight)
    config = config_of(product.sizes[0], experts)
    # Small tiles: at most one per row. Large ones: four times as many as if all were full. A program can take several.
    tiles = Programs(rows=1 if config.bm == 16 else config.bm // 4, most=_MOST_PROGRAMS)
    args = {"ends_ptr": ends, "E": experts, "stride_e": product.qweight.stride(0), "rows_per_group": rows_per_group}
    programs = (Programs(math.ceil(product.sizes[1] / config.bn)), tiles)
    return product.launch(grouped_gemm, config, programs, args, {"GROUPS": triton.next_power_of_2(experts + 1)})
