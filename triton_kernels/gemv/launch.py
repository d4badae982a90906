"""The call of the kernel `gemv`."""

from __future__ import annotations

import dataclasses
import math

import triton

from int8compile.triton_kernels.gemv.kernel import gemv
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import CHUNK_ELEMENTS
from int8compile.triton_kernels.tables import Config


def gemv_launch(product: Product, config: Config) -> Launch:
    """Return the call that multiplies one row with a weight."""
    _, n, k = product.sizes
    places = (k, product.qweight.stride(0), product.q.data_ptr(), product.qweight.data_ptr())
    word = 1 if any(place % 16 for place in places) else 4
    # Triton's interpreter cannot run assembly.
    instruction = config.instruction if isinstance(gemv, triton.JITFunction) else ""
    constants = {"WORD": word, "INSTRUCTION": instruction, "BK": config.bk * word // 4}
    call = product.launch(gemv, config, (Programs(math.ceil(n / config.bn)),), constants=constants)
    # A single program takes several microseconds to quantize a long row, and memory is idle meanwhile. For shorter rows
    # an H200 gained nothing: not all programs fit at once, and each prefetches before it reads.
    return dataclasses.replace(call, overlap=k > CHUNK_ELEMENTS)
