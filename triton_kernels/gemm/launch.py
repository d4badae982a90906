"""The call of the kernel `gemm`."""

from __future__ import annotations

import math

from int8compile.triton_kernels.gemm.kernel import gemm
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config


def gemm_launch(product: Product, config: Config) -> Launch:
    """Return the call that multiplies any number of rows with a weight."""
    tiles = Programs(math.ceil(product.sizes[1] / config.bn), config.bm)
    return product.launch(gemm, config, (tiles, Programs(config.splits)))
