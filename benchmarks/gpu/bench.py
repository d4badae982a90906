"""The device under test, and the cases of a measurement by rows and shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.day import CaseResult
from benchmarks.gpu.sizes import Shape, Sizes


class Bench(NamedTuple):
    """The device and the sizes that all measurements share.

    Attributes:
        sizes: Sizes of all stages.
        clock: Times calls on the device.
        device: The device.
        l2_bytes: Size of its L2 cache.
    """

    sizes: Sizes
    clock: Clock
    device: torch.device
    l2_bytes: int

    def cases(
        self, rows: Sequence[int], run: Callable[[Shape, int], CaseResult], shapes: Sequence[Shape] | None = None
    ) -> dict[str, Callable[[], CaseResult]]:
        """Return a case for each number of rows and each shape (default: all), named like "M=16 o 4096x4096"."""
        chosen = self.sizes.shapes if shapes is None else shapes
        return {f"M={m} {shape}": functools.partial(run, shape, m) for m in rows for shape in chosen}
