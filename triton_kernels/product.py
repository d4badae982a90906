"""A product with quantized activations, and the kernel arguments that follow from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.numerics import SCATTERED, TILED, WHOLE
from int8compile.triton_kernels.tables import Config


@dataclasses.dataclass(frozen=True)
class Product:
    """Quantized activations times a weight, or groups of their rows times one weight per group.

    Attributes:
        q: [2, M, K] int8, or [1, M, K] without outliers.
        rows: [1 + W, M] int32, the rows' scales and the bits of their blocks with second digits.
        counters: [512] int32 zeros.
        qweight: [N, K] int8, or [E, N, K] for groups; rows are contiguous.
        scale: [N] float32, or [E, N].
        bias: [N] or [E, N], any float dtype, or None.
        y: The result, allocated by `int8compile.ops.quantized.empty_result`.
        activation: One of `int8compile.ops.quantized.ACTIVATIONS`.
        n0: Number of outputs in the first of several parts; 0 for a single part.
        n1: Number of outputs in the second of three parts.
    """

    q: Tensor
    rows: Tensor
    counters: Tensor
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    y: Tensor
    activation: int = 0
    n0: int = 0
    n1: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return M, N and K."""
        return self.q.shape[1], self.qweight.shape[-2], self.qweight.shape[-1]

    def launch(
        self,
        kernel: Any,
        config: Config,
        programs: tuple[Programs, ...],
        args: dict[str, Any] | None = None,
        constants: dict[str, Any] | None = None,
    ) -> Launch:
        """Return a call of a kernel, with the arguments of `numerics` that the kernel has.

        Args:
            kernel: The function made by `triton.jit`.
            config: The tile.
            programs: Number of programs in each dimension of the grid.
            args: Further arguments.
            constants: Further compile-time constants; they override those of the configuration.
        """
        m, n, k = self.sizes
        whole_tiles = all(begin % config.bn == 0 for begin in (self.n0, self.n0 + self.n1))
        parts = WHOLE if not self.n0 else TILED if whole_tiles else SCATTERED
        splits = config.splits
        values = {
            "q_ptr": self.q,
            "rows_ptr": self.rows,
            "counters_ptr": self.counters,
            "weight_ptr": self.qweight,
            "scale_ptr": self.scale,
            "bias_ptr": self.bias,
            "y_ptr": self.y,
            "partials_ptr": self.q.new_empty((splits, m, n), dtype=torch.int32) if splits > 1 else None,
            "M": m,
            "N": n,
            "K": k,
            "stride_n": self.qweight.stride(-2),
            "n0": self.n0,
            "n1": self.n1,
            **(args or {}),
        }
        fixed = {
            "ACTIVATION": self.activation,
            "PARTS": parts.value,
            "OUTLIERS": len(self.q) > 1,
            "WORDS": triton.next_power_of_2(len(self.rows) - 1),
            "BM": config.bm,
            "BN": config.bn,
            "BK": config.bk,
            "STAGES": config.num_stages,
            "GROUP_M": config.group_m,
            **(constants or {}),
        }
        names = kernel.arg_names
        return Launch(
            kernel,
            m,
            programs,
            {name: values[name] for name in names if name in values},
            {name: fixed[name] for name in names if name in fixed},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
