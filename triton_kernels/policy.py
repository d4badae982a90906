"""How a product is computed, as far as it does not depend on tiles; host side of `numerics.py`."""

from __future__ import annotations

import dataclasses

from int8compile.ops import digits
from int8compile.triton_kernels.tables import Architecture


@dataclasses.dataclass(frozen=True)
class Policy:
    """What kernels are specialized for besides tiles.

    Attributes:
        threshold: Of outliers; 0 for none but NaN and Inf.
        by_column: Whether the outlier policy is "column".
        digits: Digits of an outlier.
        join: Whether the sum of a row's outliers fits int32.
        lists: Whether outliers are listed by columns; they lie in planes if not.
    """

    threshold: float
    by_column: bool
    digits: int
    join: bool
    lists: bool

    @property
    def split(self) -> bool:
        """Whether there can be outliers besides NaN and Inf."""
        return self.threshold > 0

    @property
    def list_rows(self) -> int:
        """Rows that share a list; 0: all do."""
        return 0 if self.by_column else digits.LIST_ROWS

    @staticmethod
    def of(m: int, k: int, count: int, threshold: float, by_column: bool, arch: Architecture) -> Policy:
        """The policy for M rows of K columns whose outliers have `count` digits."""
        return Policy(
            threshold,
            by_column,
            count,
            digits.fits_int32(k, threshold, count),
            # A single row's columns are its own, whatever the policy.
            lists=m > (1 if by_column else arch.planes_rows),
        )
