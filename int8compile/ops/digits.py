"""Outliers as integers, which GPU kernels multiply like everything else: `x = unit * (d0 + 256 * d1 [+ 65536 * d2])`.

A float32 sum over a tile's outliers would depend on which columns the tile's other rows add to its list, so a row's
result on the batch. Integers do not: `unit` is a power of two that depends on the row alone, and the sum is exact.

| digits | for | d is rounded to | exact for |
|---|---|---|---|
| 2 | float16, bfloat16 | 2**-14 of the power of two above the row's largest | bfloat16, while `fits_int32` |
| 3 | float32, and the residuals of the column policy | 2**-22 of it | |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from int8compile.ops import reference

# Indices of the four numbers of a row, see `Activations`.
SCALE, UNIT, SPECIAL, CUTOFF = range(4)
# No sum of signs is that, nor the opposite of one.
HAS_NAN = -0.5
# The least exponent of `unit`'s power of two: smaller outliers are rounded to multiples of 2**-122.
MIN_EXPONENT = -100
# Rows that share a list of outlier columns, in the row policy. Tiles of rows divide it.
LIST_ROWS = 128


class Activations(NamedTuple):
    """Activations that were quantized once, for every linear that reads them; two tensors, which is quickly made.

    Shapes:
        planes: [1 + digits, M, K] int8: q, and the digits of outliers. In planes, entry k of a digit belongs to column
            k; in lists, entry f to the f-th column of the row's list, and the rest is not written.
        info: [4 * M + lists * (1 + K)] int32: the bits of the float32 numbers of rows, and the lists.

    With threshold 0 there are no digits and no lists: outliers are NaN and Inf, of which the rows tell.
    """

    planes: Tensor
    info: Tensor

    @staticmethod
    def empty(x: Tensor, threshold: float, by_column: bool) -> Activations:
        """Allocates them for x [M, K]; their sizes follow from its size alone, in symbols too."""
        m, k = x.shape
        if threshold == 0:
            return Activations(x.new_empty((1, m, k), dtype=torch.int8), x.new_empty(4 * m, dtype=torch.int32))
        return Activations(
            x.new_empty((1 + count(x.dtype, by_column), m, k), dtype=torch.int8),
            x.new_empty(4 * m + lists_of(m) * (1 + k), dtype=torch.int32),
        )

    @property
    def q(self) -> Tensor:
        """[M, K] int8."""
        return self.planes[0]

    @property
    def digits(self) -> Tensor:
        """[digits, M, K] int8."""
        return self.planes[1:]

    @property
    def rows(self) -> Tensor:
        """[4, M] float32, see `quantize_rows`."""
        m = self.planes.shape[1]
        return self.info[: 4 * m].view(torch.float32).view(4, m)

    @property
    def lists(self) -> Tensor:
        """[lists, 1 + K] int32: how many columns hold outliers of LIST_ROWS rows (column policy: of all), and which."""
        _, m, k = self.planes.shape
        return self.info[4 * m :].view(-1, 1 + k)


def lists_of(m: int) -> int:
    """How many lists M rows have in the row policy."""
    return (m + LIST_ROWS - 1) // LIST_ROWS


def count(dtype: torch.dtype, by_column: bool) -> int:
    """How many digits an outlier has."""
    return 3 if by_column or dtype == torch.float32 else 2


def bits(digits: int) -> int:
    """How many bits `d` has at most, without its sign: `|d| <= 2**bits`, so that the highest digit is below 128."""
    return 8 * digits - 2


def fits_int32(k: int, threshold: float, digits: int) -> bool:
    """Whether the sum of a row's outliers, `sum(d * qweight)`, fits int32 and so is rounded to float32 only once.

    A row has at most K / threshold**2 outliers (their squares sum up to at most K * rms**2), weights are at most 127,
    and `|256 * d1| + |d0|` is at most 2**14 + 2**7: with 1024 outliers every partial sum, too, is below 2**31.
    Elsewhere each digit's sum is rounded by itself.
    """
    return digits == 2 and k <= 1024 * threshold * threshold


def quantize_rows(x: Tensor, threshold: float, outliers: str) -> Activations:
    """Quantizes activations, with outliers as planes of digits: the definition of what kernels make.

    `rows` are s_x, `unit`, what is special about the row (the number of its Infs, or HAS_NAN), and from which
    magnitude on its elements are outliers (row policy: the least magnitude of one, Inf if there is none). `q` of a
    special row holds the signs of its Infs and nothing else, its digits are 0.

    Shapes:
        x: [M, K], float32, float16 or bfloat16.
    """
    by_column = outliers == "column"
    by_column = outliers == "column"
    made = Activations.empty(x, threshold, by_column)
    made.info.zero_()
    x = x.to(torch.float32)
    q, scale, outlier = reference.quantize_rows(x, threshold, outliers)
    special = x.isinf().sum(dim=-1).to(torch.float32).masked_fill(x.isnan().any(dim=-1), HAS_NAN)
    signs = x.isposinf().to(torch.int8) - x.isneginf().to(torch.int8)
    q = torch.where((special != 0)[:, None], signs, q)
    if threshold == 0 or x.numel() == 0:
        never = torch.full_like(scale, torch.inf)
        rows = torch.stack([scale, torch.ones_like(scale), special, never])
        return _assembled(made, [q, *made.planes[1:]], rows)

    value = x.masked_fill(~outlier, 0)
    if by_column:
        value = (x - scale[:, None] * q).masked_fill(~outlier.any(dim=0), 0)
    value = value.masked_fill((special != 0)[:, None], 0)
    magnitude = x.abs().masked_fill(~(outlier & x.isfinite()), 0)
    largest = magnitude.amax(dim=-1)
    # All that digits hold is below it: outliers, or else the residuals of the column policy.
    bound = torch.where(largest > 0, largest, scale)
    exponent = torch.frexp(bound).exponent.masked_fill(bound == 0, MIN_EXPONENT).clamp(min=MIN_EXPONENT)
    digits = len(made.planes) - 1
    unit = ((127 - bits(digits) + exponent) << 23).to(torch.int32).view(torch.float32)
    d = (value.to(torch.float64) / unit[:, None].to(torch.float64)).round().to(torch.int32)
    planes = [q]
    for _ in range(digits):
        planes.append((((d + 128) & 255) - 128).to(torch.int8))
        d = (d + 128) >> 8
    cutoff = magnitude.masked_fill(magnitude == 0, torch.inf).amin(dim=-1)
    if by_column:
        # Inf where float32 cannot hold it.
        cutoff = torch.full_like(cutoff, threshold, dtype=torch.float64).to(torch.float32)
    return _assembled(made, planes, torch.stack([scale, unit, special, cutoff]))


def _assembled(made: Activations, planes: Sequence[Tensor], rows: Tensor) -> Activations:
    lists = made.info[rows.numel() :]
    return Activations(torch.stack(list(planes)), torch.cat([rows.flatten().view(torch.int32), lists]))


def linear(x: Activations, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """The rest of `reference.linear`, up to its last rounding, of activations whose digits lie in planes.

    Shapes:
        qweight: [N, K] int8; scale: [N] float32; bias: [N]; result: [M, N] float32, or [M, N / 2] for SILU_MUL.
    """
    weight = qweight.to(torch.float64)
    q, digits, rows = x.q, x.digits, x.rows
    y = reference.int_matmul(q, qweight) * rows[SCALE, :, None]
    if digits.numel():
        powers = 256.0 ** torch.arange(len(digits), dtype=torch.float64, device=q.device)
        d = (digits * powers[:, None, None]).sum(dim=0)
        # Exact in float64, rounded once.
        y = y + (d @ weight.mT * rows[UNIT, :, None]).to(torch.float32)
    special = rows[SPECIAL, :, None]
    signs = (q.to(torch.float64) @ weight.sign().mT).to(torch.float32)
    infinite = torch.where(signs == special, torch.inf, torch.where(signs == -special, -torch.inf, torch.nan))
    y = torch.where(special == 0, y, infinite) * scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return ACTIVATIONS[activation](y)


def _silu_mul(y: Tensor) -> Tensor:
    return torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]


# What can be done to the float32 result before it is rounded, by number: C++ can call schemas without strings.
# silu_mul takes gate and up from even and odd outputs.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y,
    torch.relu,
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    _silu_mul,
)
NONE, RELU, SILU, GELU, GELU_TANH, SILU_MUL = range(6)
