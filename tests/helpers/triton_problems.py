"""Problems for the Triton kernels, and their results by the definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from int8compile.ops import input_scales, quantize_weight, quantized, rotation_of, rotation_size
from int8compile.ops.quantized import empty_result, empty_rows
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Config


@dataclasses.dataclass
class Problem:
    """A linear: x [M, K], int8 weight [N, K], d [K] or None, bias [N] or None, and a threshold."""

    x: Tensor
    qweight: Tensor
    scale: Tensor
    d: Tensor | None
    bias: Tensor | None
    threshold: float = 6.0

    @staticmethod
    def random(
        m: int, n: int, k: int, dtype: torch.dtype, *, bias: bool = True, device: str = "cpu", **policy: Any
    ) -> Problem:
        """Return normal activations; every third row has elements so large that rotation leaves outliers."""
        x = torch.randn(m, k)
        x[::3] = torch.where(torch.rand(x[::3].shape) < 0.01, 1000 * x[::3], x[::3])
        x[::3, k // 2] = 1000
        weight = torch.randn(n, k)
        d = rotation_of(input_scales([weight])) if rotation_size(k) > 1 else None
        qweight, scale = quantize_weight(weight, d)
        return Problem(x.to(dtype), qweight, scale, d, torch.randn(n) if bias else None, **policy).to(device)

    def to(self, device: str) -> Problem:
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def quantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the kernel's result."""
        from int8compile.triton_kernels.quantize.launch import quantize_launch

        made = empty_rows(self.x, self.threshold)
        for tensor in made:  # The kernel must not read memory that nobody wrote.
            tensor.view(torch.int8).fill_(85)
        quantize_launch(self.x, self.d, self.threshold, *made).run()
        return made

    def quantize_by_definition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the definition's result, computed in PyTorch on the CPU."""
        here = self.to("cpu")
        return quantized.quantize(here.x, here.d, here.threshold)

    def digits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the definition's result; q[1] holds arbitrary values where it is not used."""
        q, rows, counters = self.quantize_by_definition()
        if len(q) == 2:
            counts = quantized.counted(torch.ones_like(q), rows)
            q[1] = torch.where(counts == 1, q[1], 85)
        return q.to(self.x.device), rows.to(self.x.device), counters.to(self.x.device)

    def product(
        self,
        config: Config,
        *,
        x: tuple[Tensor, Tensor, Tensor] | None = None,
        activation: int = quantized.NONE,
        parts: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the kernel's result, in float32 before the last rounding unless another dtype is given."""
        from int8compile.triton_kernels.operators import launch_of

        q, rows, counters = self.digits() if x is None else x
        y = empty_result(q, self.qweight, activation, parts[0], dtype)
        y.view(torch.int8).fill_(85)
        call = launch_of(Product(q, rows, counters, self.qweight, self.scale, self.bias, y, activation, *parts), config)
        call.run()
        assert not counters.any()
        return y

    def expected(self, activation: int = quantized.NONE) -> Tensor:
        """Return the definition's result in float32, computed on the CPU."""
        here = self.to("cpu")
        y = quantized.product(*self.quantize_by_definition(), here.qweight, here.scale, here.bias)
        return quantized.ACTIVATIONS[activation](y)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Compare bit by bit; any NaN equals any NaN."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)
