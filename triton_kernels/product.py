"""The arguments that every kernel for a product with quantized activations has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from int8compile.ops.digits import SILU_MUL, Activations
from int8compile.triton_kernels.policy import Policy


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of quantized activations with a weight.

    Attributes:
        x: The activations.
        qweight: [N, K] int8, its rows contiguous.
        scale: [N] float32.
        bias: [N], any float dtype, or None.
        y: [M, N], or [M, N / 2] for silu_mul, contiguous.
        activation: One of `int8compile.ops.digits.ACTIVATIONS`.
        policy: How it is computed.
    """

    x: Activations
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    y: Tensor
    activation: int
    policy: Policy

    @staticmethod
    def of(
        x: Activations,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: int,
        policy: Policy,
    ) -> Product:
        """Allocates the result."""
        n = qweight.shape[0] // 2 if activation == SILU_MUL else qweight.shape[0]
        y = torch.empty(x.q.shape[0], n, dtype=dtype, device=qweight.device)
        return Product(x, qweight, scale, bias, y, activation, policy)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N and K."""
        return self.x.q.shape[0], self.qweight.shape[0], self.qweight.shape[1]

    def pointers(self, *, lists: bool) -> dict[str, Any]:
        """The tensors by the names of the kernels' arguments."""
        listed = {"columns_ptr": self.x.columns, "counts_ptr": self.x.counts} if lists else {}
        return {
            "q_ptr": self.x.q,
            "digits_ptr": self.x.digits,
            "rows_ptr": self.x.rows,
            **listed,
            "weight_ptr": self.qweight,
            "scale_ptr": self.scale,
            "bias_ptr": self.bias,
            "y_ptr": self.y,
        }

    def constants(self) -> dict[str, Any]:
        """The compile-time constants that do not depend on tiles."""
        return {
            "HAS_BIAS": self.bias is not None,
            "ACTIVATION": self.activation,
            "SPLIT": self.policy.split,
            "DIGITS": self.policy.digits,
            "JOIN": self.policy.join,
        }
