"""Time callables in turns, in one process, so that other load on the machine affects all of them.

On a virtual machine, the clock rate, other guests and the memory pages of the process change times by tens of percents.
They change the times of a round together, so what is compared is ratios, round by round.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Above this share of the CPU's time, other processes change the times.
BUSY = 0.05


class Interval(NamedTuple):
    """A median with its confidence interval.

    Attributes:
        low: The lower end.
        median: The median.
        high: The upper end.
    """

    low: float
    median: float
    high: float


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the median of values, with a confidence interval for the median of what they are drawn from.

    The interval is between two of the values, chosen by the binomial distribution of the number of values below the
    median (the sign test), so it assumes no distribution. With fewer than six values no interval has a confidence of
    95 %, and the ends are the smallest and the largest value.

    Args:
        values: At least one value.
        confidence: Least probability that the interval holds the median.
    """
    ordered, count = sorted(values), len(values)
    tail, below = 0.0, 0
    # `below` values on each side are left out while the probability of missing the median stays small enough.
    while below < count // 2:
        tail += math.comb(count, below) * 0.5**count
        if 2 * tail > 1 - confidence:
            break
        below += 1
    outer = max(below - 1, 0)
    return Interval(ordered[outer], statistics.median(ordered), ordered[count - 1 - outer])


@dataclasses.dataclass(frozen=True)
class Times:
    """Measured times of callables.

    Attributes:
        seconds: Seconds of each round, by name of the callable.
        others: Share of all cores' time that other processes or virtual machines used meanwhile; None if unknown.
            Above `BUSY`, the times say little about this machine.
    """

    seconds: Mapping[str, list[float]]
    others: float | None

    def median(self, name: str) -> float:
        """Return the median seconds of a call."""
        return statistics.median(self.seconds[name])

    def fastest(self, names: Iterable[str]) -> str:
        """Return the name with the smallest median."""
        return min(names, key=self.median)

    def ratio(self, name: str, baseline: str) -> float:
        """Return how many times faster than a baseline a callable is: the ratio of the medians."""
        return self.median(baseline) / self.median(name)

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Return how many times faster than a baseline a callable is in each round."""
        return [slow / fast for slow, fast in zip(self.seconds[baseline], self.seconds[name], strict=True)]

    def interval(self, name: str, baseline: str) -> Interval:
        """Return how many times faster than a baseline a callable is: the median of the rounds' ratios, with 95 %."""
        return interval(self.ratios(name, baseline))

    def quartiles(self, name: str, baseline: str) -> tuple[float, float]:
        """Return the quartiles of the rounds' ratios, which show how reliable `ratio` is."""
        return quartiles(self.ratios(name, baseline))

    def to_dict(self, baselines: Iterable[str]) -> dict[str, Any]:
        """Return the medians in seconds, and the ratios of the other callables to the fastest baseline, as data."""
        baselines = [name for name in baselines if name in self.seconds]
        best = self.fastest(baselines)
        return {
            "rounds": len(self.seconds[best]),
            "others": self.others and round(self.others, 4),
            "medians": {name: rounded(self.median(name)) for name in self.seconds},
            "fastest_baseline": best,
            "ratios": {
                name: {
                    "ratio": rounded(self.ratio(name, best)),
                    "quartiles": [rounded(ratio) for ratio in self.quartiles(name, best)],
                }
                for name in self.seconds
                if name not in baselines
            },
        }


def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Time each callable once a round, after an untimed call: the callable before has evicted its weights."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    others = Others()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            seconds[name].append(timed(call))
    return Times(seconds, others.share())


class Others:
    """A count, from now on, of CPU time that this process does not use itself."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), self._busy()

    def share(self, known: float = 0.0) -> float | None:
        """Return the share of all cores' time that others used since then; None if the system does not tell.

        Args:
            known: CPU seconds of other processes that do not count, since they do this one's work.
        """
        began, before = self._began
        busy = self._busy()
        if busy is None or before is None:
            return None
        return max(0.0, busy - before - known) / ((time.perf_counter() - began) * (os.cpu_count() or 1))

    @staticmethod
    def _busy() -> float | None:
        """Return the seconds that others have used, summed over all cores."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        own = os.times()
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e9


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, method="inclusive")
    return first, third


def rounded(value: float, digits: int = 5) -> float:
    """Round to significant digits."""
    return float(f"{value:.{digits}g}")
