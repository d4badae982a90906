"""Collect statistics of the inputs of linears while a model runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from int8compile.config import Int8Config
from int8compile.explaining import looks_fused, multiplies
from int8compile.observation import Given, Linear, observed
from int8compile.ops import rotation_size
from int8compile.passes import RULES, WeightView, finite
from int8compile.tuning.groups import Group, Weight, column_rms

# A parameter by identity, since comparing tensors compares elements, and the weight as a view of it.
Key = tuple[int, WeightView]
# An expert with fewer rows is rotated by its weights alone.
FEW = 16
# The number of rows that are counted together.
_PART = 1024
# The configuration under which every weight that can be int8 is int8.
_EVERYTHING = Int8Config(lm_head="int8", min_features=1)


@dataclasses.dataclass(eq=False)
class Statistics:
    """Sums over the rows of an x that some linears read.

    Attributes:
        members: The parameters and weights of the linears, by identity.
        seen: The number of rows seen; an average per matrix where experts read rows of their own.
        rows: The number of rows counted, [] or [B] int64.
        total: [K] or [B, K] float64: sums of the squares of x, each row divided by its mean square.
    """

    members: dict[Key, tuple[Tensor, WeightView]]
    seen: int = 0
    rows: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(0))
    total: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, given: Given, limit: int, *, each: bool) -> None:
        """Count rows of an x until `limit` are seen; separately for each matrix where each reads its own rows."""
        rows, left = given.x.detach(), limit - self.seen
        if left <= 0:
            return
        if each and given.ends is not None:
            self._add_grouped(rows.reshape(-1, rows.shape[-1]), given.ends)
            return
        rows = rows if each else rows.reshape(-1, rows.shape[-1])
        rows = rows[..., :: max(1, math.ceil(rows.shape[-2] / left)), :]
        counted, usable = _normalized(rows)
        self.seen += rows.shape[-2]
        self.total = self.total + counted.sum(dim=-2)
        self.rows = self.rows + usable.sum(dim=-1)

    def _add_grouped(self, rows: Tensor, ends: Tensor) -> None:
        """Count all rows of experts, which are sorted by expert."""
        ends = ends.cpu()
        experts = len(ends)
        # Rows behind the last end belong to no expert.
        rows = rows[: int(ends[-1])] if experts else rows[:0]
        total = torch.zeros(experts, rows.shape[-1], dtype=torch.float64)
        count = torch.zeros(experts, dtype=torch.int64)
        owner = torch.searchsorted(ends.long(), torch.arange(len(rows)), right=True)
        for part, of in zip(rows.split(_PART), owner.split(_PART), strict=True):
            counted, usable = _normalized(part)
            total.index_add_(0, of, counted)
            count.index_add_(0, of, usable.to(torch.int64))
        self.seen += math.ceil(len(rows) / max(1, experts))
        self.total, self.rows = self.total + total, self.rows + count

    def join(self, other: Statistics) -> None:
        """Add the sums and members of another."""
        self.members |= other.members
        self.seen += other.seen
        self.rows, self.total = self.rows + other.rows, self.total + other.total

    def activations(self) -> Tensor:
        """Return `a`, see `Group`."""
        a = (self.total / self.rows.clamp_min(1).unsqueeze(-1)).sqrt()
        # Few rows of an expert are worth less than its weights.
        return a if not self.rows.dim() else a * (self.rows >= FEW).unsqueeze(-1)


def _normalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of rows, each row divided by its mean square, and which rows are usable.

    Rows that are zero or not finite are not usable; their results are 0.

    Shapes:
        rows: [..., M, K]; results: [..., M, K] float64, and [..., M] bool.
    """
    squares = rows.to("cpu", torch.float64).square()
    size = squares.mean(dim=-1, keepdim=True)
    usable = size.isfinite() & (size > 0)
    # NaN times 0 is NaN.
    return torch.where(usable, squares / size, 0), usable.squeeze(-1)


class Found:
    """Statistics of all linears of a model, collected while it runs.

    Args:
        parameters: The model's parameters by name.
        tables: Ids of the parameters that are embedding tables, which are never rotated.
        limit: The number of rows to see of each linear.
    """

    def __init__(self, parameters: Mapping[str, Tensor], tables: set[int], limit: int) -> None:
        # The first name of a parameter that has several.
        self._names = {id(parameter): name for name, parameter in reversed(list(parameters.items()))}
        self._tables = tables
        self._limit = limit
        self._of: dict[Key, Statistics] = {}

    def record(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Count the inputs of the linears of a graph whenever it runs; a Dynamo backend."""
        return observed(gm, example_inputs, _EVERYTHING, (*RULES, finite), self._see)[0]

    @property
    def complete(self) -> bool:
        """True if every linear has seen enough."""
        return bool(self._of) and all(statistics.seen >= self._limit for statistics in self._of.values())

    def _see(self, linear: Linear, given: Given) -> None:
        members: dict[Key, tuple[Tensor, WeightView]] = {
            (id(parameter), view): (parameter, view)
            for parameter, view in given.group
            if id(parameter) in self._names and id(parameter) not in self._tables
        }
        if not linear.first or not members:
            return
        # Linears seen apart, in another graph or with another x, may share an x here.
        known = list(dict.fromkeys(self._of[key] for key in members if key in self._of))
        statistics = known[0] if known else Statistics({})
        for other in known[1:]:
            statistics.join(other)
        statistics.members |= members
        self._of.update(dict.fromkeys(statistics.members, statistics))
        statistics.add(given, self._limit, each=linear.each)

    def result(self, model: nn.Module) -> tuple[list[Group], dict[str, str]]:
        """Return the groups, and the weights that are not calibrated with the reasons."""
        groups, missing = list[Group](), dict[str, str]()
        for statistics in dict.fromkeys(self._of.values()):
            each = statistics.rows.dim() > 0
            weights = tuple(self._weight(parameter, view, each=each) for parameter, view in statistics.members.values())
            activations = statistics.activations()
            if activations.any():
                groups.append(Group(weights, int(statistics.rows.sum()), activations))
            else:
                missing |= {weight.name: "no row of its input was usable (all zero, NaN or Inf)" for weight in weights}
        seen = {identity for identity, _ in self._of}
        for owner in model.modules():
            for parameter in owner._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                if multiplies(owner, parameter) or looks_fused(owner, parameter):
                    missing[self._names[id(parameter)]] = self._why_not(parameter)
        return groups, missing

    def _weight(self, parameter: Tensor, view: WeightView, *, each: bool) -> Weight:
        rms = column_rms(view.of(parameter), each=each)
        return Weight(self._names[id(parameter)], tuple(parameter.shape), view, rms)

    def _why_not(self, parameter: Tensor) -> str:
        if id(parameter) in self._tables:
            return "it is also the embedding table, which is not rotated"
        if parameter.dim() == 2 and rotation_size(parameter.shape[1]) == 1:
            return "its inputs are not rotated, their number is not a multiple of 16"
        return "it was not used, or its use stays in float (see int8compile.explain)"
