"""The arguments that every kernel for a product with quantized activations has."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from int8compile.triton_kernels.numerics import SCATTERED, TILED, WHOLE
from int8compile.triton_kernels.tables import Config


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of quantized activations with a weight.

    Attributes:
        q: [2, M, K] int8, or [1, M, K] without outliers.
        rows: [2, M] float32.
        qweight: [N, K] int8, its rows contiguous.
        scale: [N] float32.
        bias: [N], any float dtype, or None.
        y: As `int8compile.ops.quantized.empty_result` makes it.
        activation: One of `int8compile.ops.quantized.ACTIVATIONS`.
        n0: Outputs of the first of several parts, 0 if there is one.
        n1: Outputs of the second of three parts.
    """

    q: Tensor
    rows: Tensor
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    y: Tensor
    activation: int
    n0: int
    n1: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N and K."""
        return self.q.shape[1], *self.qweight.shape

    def pointers(self) -> dict[str, Any]:
        """The tensors by the names of the kernels' arguments."""
        return {
            "q_ptr": self.q,
            "rows_ptr": self.rows,
            "weight_ptr": self.qweight,
            "scale_ptr": self.scale,
            "bias_ptr": self.bias,
            "y_ptr": self.y,
        }

    def strides(self) -> dict[str, int]:
        """The numbers, besides sizes, that say where things lie."""
        return {"stride_n": self.qweight.stride(0), "n0": self.n0, "n1": self.n1}

    def constants(self, config: Config) -> dict[str, Any]:
        """The compile-time constants besides the tile's sizes."""
        whole_tiles = all(begin % config.bn == 0 for begin in (self.n0, self.n0 + self.n1))
        parts = WHOLE if not self.n0 else TILED if whole_tiles else SCATTERED
        return {
            "HAS_BIAS": self.bias is not None,
            "ACTIVATION": self.activation,
            "PARTS": parts.value,
            "OUTLIERS": self.q.shape[0] > 1,
        }
