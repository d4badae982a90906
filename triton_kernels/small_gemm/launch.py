"""Calls of `small_gemm`."""

from __future__ import annotations

import math

from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.small_gemm.kernel import small_gemm
from int8compile.triton_kernels.tables import Config


def launch(product: Product, config: Config) -> Launch:
    """A product of a few rows, whose outliers are planes of digits."""
    m, n, k = product.sizes
    return Launch(
        small_gemm,
        m,
        (Programs(math.ceil(n / config.bn)), Programs(rows=config.bm)),
        {**product.pointers(), "M": m, "N": n, "K": k, **product.strides()},
        {**product.constants(config), "BM": config.bm, "BN": config.bn, "BK": config.bk},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
