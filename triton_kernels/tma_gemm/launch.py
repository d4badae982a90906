"""Calls of `tma_gemm`."""

from __future__ import annotations

from triton.tools.tensor_descriptor import TensorDescriptor

from int8compile.triton_kernels.gemm.launch import constants, tiles
from int8compile.triton_kernels.launch import Launch
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config
from int8compile.triton_kernels.tma_gemm.kernel import tma_gemm


def launch(product: Product, config: Config) -> Launch:
    """Multiply many rows; K is a multiple of 16."""
    m, n, k = product.sizes
    return Launch(
        tma_gemm,
        m,
        (tiles(config, n),),
        {
            "x_desc": TensorDescriptor.from_tensor(product.q[0], [config.bm, config.bk]),
            "weight_desc": TensorDescriptor.from_tensor(product.qweight, [config.bn, config.bk]),
            **product.pointers(),
            "M": m,
            "N": n,
            "K": k,
            **product.strides(),
        },
        constants(product, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
