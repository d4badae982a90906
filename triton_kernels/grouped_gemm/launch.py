"""Calls of `grouped_gemm`."""

from __future__ import annotations

import math

import triton
from torch import Tensor

from int8compile.triton_kernels.grouped_gemm.kernel import grouped_gemm
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config

# They fit every architecture.
_TILES = tuple(
    Config("grouped_gemm", *tile)
    for tile in ((16, 128, 128, 4, 4), (32, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4))
)
# CUDA has no more in the second direction.
_MOST_PROGRAMS = 65535


def config_of(m: int, groups: int) -> Config:
    """Return the configuration for M rows: its tile has as many rows as a group has on average."""
    return next((config for config in _TILES if config.bm >= m / groups), _TILES[-1])


def launch(product: Product, ends: Tensor | None, rows_per_group: int) -> Launch:
    """Multiply rows of each group with its weight.

    Args:
        product: Its weight is [E, N, K]; it has no activation function and no parts.
        ends: [E] int32 or int64, the number of the row behind each group, or None for groups of `rows_per_group`.
        rows_per_group: Rows of each group, where there are no ends.
    """
    experts = len(product.qweight)
    config = config_of(product.sizes[0], experts)
    # Few rows are at most as many tiles; of more, most tiles are half full. There may be more tiles than programs.
    tiles = Programs(rows=1 if config.bm == 16 else config.bm // 4, most=_MOST_PROGRAMS)
    args = {"ends_ptr": ends, "E": experts, "stride_e": product.qweight.stride(0), "rows_per_group": rows_per_group}
    programs = (Programs(math.ceil(product.sizes[1] / config.bn)), tiles)
    return product.launch(grouped_gemm, config, programs, args, {"GROUPS": triton.next_power_of_2(experts + 1)})
