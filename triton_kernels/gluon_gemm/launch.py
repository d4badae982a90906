"""The call of the kernel `gluon_gemm`."""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from int8compile.triton_kernels.gluon_gemm.kernel import gluon_gemm
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config


def gluon_gemm_launch(product: Product, config: Config) -> Launch:
    """Return the call that multiplies many rows with a weight.

    K is a multiple of 16, and rows of q and of the weight begin at multiples of 16 bytes.

    Raises:
        ValueError: There are more splits than steps.
    """
    _, n, k = product.sizes
    splits = config.splits
    if splits > math.ceil(k / config.bk):
        raise ValueError(f"{splits} programs cannot share {k} inputs: each needs a step of {config.bk}")
    programs = (Programs(math.ceil(n / config.bn), config.bm, config.programs), Programs(splits))
    x, weight = _blocks(product.q[0], config.bm, config.bk), _blocks(product.qweight, config.bn, config.bk)
    return product.launch(gluon_gemm, config, programs, {"x_desc": x, "weight_desc": weight})


def _blocks(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
