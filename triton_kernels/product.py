"""Products with quantized activations, and the arguments that all of their kernels have."""

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
    """A product of quantized activations with a weight, or of groups of their rows with one weight each.

    Attributes:
        q: [2, M, K] int8, or [1, M, K] without outliers.
        rows: [1 + W, M] int32, the rows' scales and which blocks of theirs have second digits.
        counters: [512] int32 zeros.
        qweight: [N, K] int8, or [E, N, K] for groups; its rows contiguous.
        scale: [N] float32, or [E, N].
        bias: [N] or [E, N], any float dtype, or None.
        y: As `int8compile.ops.quantized.empty_result` makes it.
        activation: One of `int8compile.ops.quantized.ACTIVATIONS`.
        n0: Outputs of the first of several parts, 0 if there is one.
        n1: Outputs of the second of three parts.
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
        """Return the call of a kernel, with those of a product's arguments (see `numerics`) that it has.

        Args:
            kernel: As `triton.jit` made it.
            config: Its tile.
            programs: Programs in each direction.
            args: Its other arguments.
            constants: Its other compile-time constants; they replace those of the configuration.
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
            "HAS_BIAS": self.bias is not None,
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
