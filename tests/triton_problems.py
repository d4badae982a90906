"""Problems for the Triton kernels, their definition, and by how much a kernel may differ from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from int8compile.ops import OUTLIER_POLICIES, digits, quantize_weight, reference
from int8compile.ops.digits import Activations
from int8compile.ops.quantized import empty_result
from int8compile.triton_kernels.policy import Policy
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import Architecture, Config

UNIT_ROUNDOFF = 2.0**-24


@dataclasses.dataclass
class Problem:
    """One linear: x [M, K], weight [N, K] in int8, bias [N] or None, and how it is computed."""

    x: Tensor
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    threshold: float = 6.0
    by_column: bool = False

    @staticmethod
    def random(
        m: int, n: int, k: int, dtype: torch.dtype, *, bias: bool = True, device: str = "cpu", **policy: Any
    ) -> Problem:
        """Normal activations, some columns with outliers in every third row, and single outliers elsewhere."""
        x = torch.randn(m, k)
        x[::3, ::17] *= 30
        x = torch.where(torch.rand(m, k) < 0.01, 25 * x, x).to(dtype)
        qweight, scale = quantize_weight(torch.randn(n, k))
        made = Problem(x, qweight, scale, torch.randn(n) if bias else None, **policy)
        return made.to(device)

    def to(self, device: str) -> Problem:
        tensors = (self.x, self.qweight, self.scale, self.bias)
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return dataclasses.replace(self, **dict(zip(("x", "qweight", "scale", "bias"), moved, strict=True)))

    @property
    def outliers(self) -> str:
        return OUTLIER_POLICIES[self.by_column]

    def policy(self, arch: Architecture) -> Policy:
        m, k = self.x.shape
        count = digits.count(self.x.dtype, self.by_column)
        return Policy.of(m, k, count, self.threshold, self.by_column, arch)

    def quantized(self, arch: Architecture) -> Activations:
        """By the kernels."""
        from int8compile.triton_kernels.quantize.launch import launches

        into = Activations.empty(self.x, self.threshold, self.by_column)
        for tensor in into:  # What is not written must not be read.
            tensor.view(torch.int8).fill_(85)
        for call in launches(self.x, into, self.policy(arch)):
            call.run()
        return into

    def quantized_by_definition(self, arch: Architecture) -> Activations:
        """In PyTorch, with lists of outliers where the kernels make lists."""
        planes = digits.quantize_rows(self.x, self.threshold, self.outliers)
        policy = self.policy(arch)
        if not policy.lists:
            return planes
        outlier = reference.quantize_rows(self.x.float(), self.threshold, self.outliers).outlier
        into = Activations.empty(self.x, self.threshold, self.by_column)
        into.info.copy_(planes.info)
        into.q.copy_(planes.q)
        together = policy.list_rows or len(outlier)
        for tile, begin in enumerate(range(0, len(outlier), together)):
            rows = slice(begin, begin + together)
            columns = outlier[rows].any(dim=0).nonzero().flatten()
            into.lists[tile, 0] = len(columns)
            into.lists[tile, 1 : 1 + len(columns)] = columns
            into.digits[:, rows, : len(columns)] = planes.digits[:, rows, columns]
        return into

    def product(
        self,
        config: Config,
        arch: Architecture,
        *,
        x: Activations | None = None,
        activation: int = digits.NONE,
        parts: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """By the kernels: the result in float32, before the last rounding, unless another dtype is asked for."""
        from int8compile.triton_kernels.operators import launch_of

        x = self.quantized(arch) if x is None else x
        y = empty_result(x.planes, self.qweight, activation, parts[0], dtype)
        y.view(torch.int8).fill_(85)
        policy = self.policy(arch)
        product = Product(x, self.qweight, self.scale, self.bias, y, activation, *parts, policy)
        launch_of(product, config).run()
        return y

    def expected(self, activation: int = digits.NONE) -> Tensor:
        """By the definition, on the CPU."""
        here = self.to("cpu")
        x = digits.quantize_rows(here.x, here.threshold, here.outliers)
        return digits.linear(x, here.qweight, here.scale, here.bias, activation)

    def bound(self) -> Tensor:
        """By how much a kernel that rounds each digit's sum may differ from the definition, which rounds once.

        Each of the digits' sums is rounded to float32 and added, which is rounded: at most 2 roundings a digit, 4 for
        the definition's own and the scales, each of at most u times the largest intermediate. That is at most
        S = |acc| s_x + 3 sum |d| |w| unit, since balanced digits add up to less than three times what they stand for.
        """
        here = self.to("cpu")
        x = digits.quantize_rows(here.x, here.threshold, here.outliers)
        weight = here.qweight.to(torch.float64).mT
        size = (x.q.to(torch.float64) @ weight).abs() * x.rows[digits.SCALE, :, None]
        if x.digits.numel():
            powers = 256.0 ** torch.arange(len(x.digits), dtype=torch.float64)
            d = (x.digits * powers[:, None, None]).sum(dim=0)
            size = size + 3 * (d.abs() @ weight.abs()) * x.rows[digits.UNIT, :, None]
        largest = size * here.scale
        if here.bias is not None:
            largest = largest + here.bias.abs()
        return (2 * len(x.digits) + 4) * 1.01 * UNIT_ROUNDOFF * largest


def assert_product(problem: Problem, actual: Tensor, arch: Architecture) -> None:
    """Equal to the definition, or within the bound where digits are rounded one by one."""
    expected, actual = problem.expected(), actual.cpu()
    special = ~expected.isfinite()
    assert torch.equal(actual[special].nan_to_num(nan=12345.0), expected[special].nan_to_num(nan=12345.0))
    difference = (actual - expected).masked_fill(special, 0).abs()
    if problem.policy(arch).join or problem.threshold == 0:
        assert difference.max() == 0
    else:
        assert bool((difference <= problem.bound().masked_fill(special, 0)).all()), difference.max()
