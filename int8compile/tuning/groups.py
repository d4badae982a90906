"""The parts of a calibration: linears that read the same x, with statistics of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from int8compile.errors import CheckpointError
from int8compile.ops import input_scales, rotation_of
from int8compile.passes import WeightView

# The relative distance of column rms beyond which a weight is another one; bfloat16 changes an rms by less than 0.2 %.
_SAME = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight that was calibrated.

    Attributes:
        name: The parameter's name.
        shape: The parameter's shape.
        view: The weight as a view of it.
        rms: [K] or [B, K] float64, the rms of each column, to notice that the weight has become another one.
    """

    name: str
    shape: tuple[int, ...]
    view: WeightView
    rms: Tensor = dataclasses.field(repr=False)

    def check(self, weight: Tensor) -> None:
        """Raise `CheckpointError` where a weight is not the calibrated one, up to the rounding of its dtype.

        Shapes:
            weight: [N, K] or [B, N, K]; on the meta device only its shape is compared.
        """
        if tuple(weight.shape) != self.view.shape:
            raise self._misfit(f"is {list(weight.shape)}, not {list(self.view.shape)}")
        if weight.is_meta:
            return
        found = column_rms(weight, each=self.rms.dim() > 1)
        # `not ... <=`, so that NaN is a misfit.
        if not float((found - self.rms).norm()) <= _SAME * float(self.rms.norm()):
            raise self._misfit("has other values")

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter that the weight is a view of, after `check`."""
        parameter = parameters.get(self.name)
        if parameter is None:
            raise self._misfit("is not in the model")
        if tuple(parameter.shape) != self.shape:
            raise self._misfit(f"is {list(parameter.shape)}, not {list(self.shape)}")
        last = self.view.offset + sum((n - 1) * step for n, step in zip(self.view.size, self.view.stride, strict=True))
        if parameter.storage_offset() + last >= parameter.untyped_storage().nbytes() // parameter.itemsize:
            raise self._misfit("lies otherwise in memory")
        self.check(self.view.of(parameter))
        return parameter

    def _misfit(self, how: str) -> CheckpointError:
        return CheckpointError(f"the calibration does not fit the model: {self.name} {how}. Calibrate this model again")


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Linears that read the same x.

    Attributes:
        weights: Their weights.
        rows: The number of rows of x that were counted.
        activations: `a`, [K] float64: the root mean square over rows of x, where each row is first divided by its rms.
            [B, K] for weights [B, N, K] of experts that read rows of their own; zero for experts with few rows.
    """

    weights: tuple[Weight, ...]
    rows: int
    activations: Tensor = dataclasses.field(repr=False)

    @functools.cached_property
    @torch.inference_mode(False)  # Backward passes could not save an inference tensor.
    def d(self) -> Tensor:
        """The factors of x before it is rotated, [K] or [B, K] float32; one tensor for all weights."""
        # Made from the rms of the columns alone, so that it is the same for a part of the model as for all of it.
        counts = [math.prod(weight.view.shape[:-1]) for weight in self.weights]
        squares = [weight.rms.square() * count for weight, count in zip(self.weights, counts, strict=True)]
        columns = (torch.stack(squares).sum(dim=0) / sum(counts)).sqrt()
        if self.activations.dim() == 1:
            return rotation_of(input_scales([columns[None]], self.activations))
        each = zip(columns, self.activations, strict=True)
        return torch.stack([rotation_of(input_scales([w[None]], a if a.any() else None)) for w, a in each])


def column_rms(weight: Tensor, *, each: bool) -> Tensor:
    """Return the root mean square of each column of a weight, on the CPU.

    Args:
        weight: The weight.
        each: Whether the columns of each matrix are taken by themselves.

    Shapes:
        weight: [N, K] or [B, N, K]; result: [K], or [B, K] for `each`, float64.
    """
    if each:
        return torch.stack([column_rms(matrix, each=False) for matrix in weight])
    rows = weight.detach().reshape(-1, weight.shape[-1])
    # In parts: a float64 copy of the whole weight may not fit in memory.
    squares = [part.to(torch.float64).square().sum(dim=0) for part in rows.split(1024)]
    return (torch.stack(squares).sum(dim=0) / len(rows)).sqrt().cpu()
