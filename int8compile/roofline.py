"""Find the numbers of rows M for which int8 can be faster than 16 bit, by the roofline model.

The time of an operation is the longer of bytes over bandwidth and operations over peak.
"""

from __future__ import annotations

import functools
import itertools

import sympy

from int8compile.hardware import Hardware

M = sympy.Symbol("M", positive=True)


def float_times(k: int, n: int, itemsize: int, hardware: Hardware) -> tuple[sympy.Expr, sympy.Expr]:
    """Return the seconds that `x @ W` takes in float, for its bytes and for its operations, as functions of M.

    The bytes are those of x, W and y; the operations are multiplications and additions.
    """
    moved = itemsize * (n * k + M * k + M * n)
    return moved / _exact(hardware.bandwidth), 2 * M * n * k / _exact(hardware.float_peak)


def int8_times(k: int, n: int, itemsize: int, hardware: Hardware) -> tuple[sympy.Expr, sympy.Expr]:
    """Return the seconds that `x @ W` takes in int8, for its bytes and for its operations, as functions of M.

    Both include the pass that quantizes x, which reads x and writes q and a scale per row. The matmul reads q, W and
    the scales, and writes y.
    """
    quantize = ((itemsize + 1) * M * k + 4 * M) / _exact(hardware.bandwidth)
    moved = n * k + M * k + itemsize * M * n + 4 * n + 4 * M
    return quantize + moved / _exact(hardware.bandwidth), quantize + 2 * M * n * k / _exact(hardware.int8_peak)


@functools.cache
def faster(k: int, n: int, itemsize: int, hardware: Hardware) -> sympy.Set:
    """Return the M >= 1 for which int8 takes less time: an interval, a union of intervals, or the empty set.

    Each time is the larger of two linear functions of M, so their order changes only where two of the four cross.
    """
    floats, ints = float_times(k, n, itemsize, hardware), int8_times(k, n, itemsize, hardware)
    crossings: set[sympy.Expr] = set()
    for a, b in itertools.combinations((*floats, *ints), 2):
        crossings.update(root for root in sympy.solve(a - b, M) if root > 1)
    edges = [sympy.Integer(1), *sorted(crossings), sympy.oo]
    found: sympy.Set = sympy.EmptySet
    for low, high in itertools.pairwise(edges):
        middle = {M: 2 * low if high == sympy.oo else (low + high) / 2}
        if max(time.subs(middle) for time in ints) < max(time.subs(middle) for time in floats):
            found = found.union(sympy.Interval(low, high))
    return found


def describe(k: int, n: int, rows: str, itemsize: int, hardware: Hardware) -> str:
    """Return the M for which int8 can be faster: "M >= 1", "s0*s1 <= 94", "never"; "" for an unknown device.

    Args:
        k: Inputs.
        n: Outputs.
        rows: The name of M: a number, or an expression in the model's symbolic sizes.
        itemsize: Bytes of an activation.
        hardware: The device.
    """
    if hardware.bandwidth is None:
        return ""
    found = faster(k, n, itemsize, hardware)
    if found is sympy.EmptySet:
        return "never"
    intervals = found.args if isinstance(found, sympy.Union) else (found,)
    return " or ".join(_interval(interval, "M" if rows.isdigit() else rows) for interval in intervals)


def _interval(interval: sympy.Set, rows: str) -> str:
    low, high = sympy.ceiling(interval.inf), interval.sup
    if high == sympy.oo:
        return f"{rows} >= {low}"
    bound = f"{rows} <= {sympy.floor(high)}"
    return bound if low == 1 else f"{low} <= {bound}"


def _exact(value: float | None) -> sympy.Rational:
    assert value is not None
    return sympy.Rational(int(value))
