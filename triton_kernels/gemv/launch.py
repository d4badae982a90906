"""Calls of `gemv`."""

from __future__ import annotations

import math

from int8compile.triton_kernels.gemv.kernel import gemv
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config


def launch(product: Product, config: Config) -> Launch:
    """Multiply one row."""
    m, n, k = product.sizes
    return Launch(
        gemv,
        m,
        (Programs(math.ceil(n / config.bn)),),
        {**product.pointers(), "N": n, "K": k, **product.strides()},
        {**product.constants(config), "BN": config.bn, "BK": config.bk},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
