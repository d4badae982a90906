"""Calls of `gemm`."""

from __future__ import annotations

import math
from typing import Any

from int8compile.triton_kernels.gemm.kernel import gemm
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config


def launch(product: Product, config: Config) -> Launch:
    """Multiply any number of rows."""
    m, n, k = product.sizes
    return Launch(
        gemm,
        m,
        (tiles(config, n),),
        {**product.pointers(), "M": m, "N": n, "K": k, **product.strides()},
        constants(product, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def tiles(config: Config, n: int) -> Programs:
    """A program for each tile of the result."""
    return Programs(math.ceil(n / config.bn), config.bm)


def constants(product: Product, config: Config) -> dict[str, Any]:
    """The compile-time constants of a kernel of tiles."""
    sizes = {"BM": config.bm, "BN": config.bn, "BK": config.bk, "GROUP_M": config.group_m}
    return {**product.constants(config), **sizes}
