"""Time callables in turns, in one process, so that other load on the machine affects all of them.

On a virtual machine, the clock rate, other guests and the memory pages of the process change times by tens of percents.
They change the times of a round together, so benchmarks compare ratios.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from int8compile import cpu, hardware

# Variables that can make PyTorch's own kernels, the baselines, use less than the machine has.
RESTRICTIONS = (
    "ATEN_CPU_CAPABILITY",
    "CXX",
    "GOMP_CPU_AFFINITY",
    "INT8COMPILE_CPU_KERNEL",
    "INT8COMPILE_ISA",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCHINDUCTOR_FREEZING",
)


@dataclasses.dataclass(frozen=True)
class Times:
    """Measured times of callables.

    Attributes:
        seconds: Seconds of each round, by name of the callable.
        others: Share of all cores' time that other processes or virtual machines used meanwhile; None if unknown.
            Above a few percent, the times say little about this machine.
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

    def quartiles(self, name: str, baseline: str) -> tuple[float, float]:
        """Return the quartiles of the rounds' ratios, which show how reliable `ratio` is."""
        return quartiles([slow / fast for slow, fast in zip(self.seconds[baseline], self.seconds[name], strict=True)])

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
    others = _Others()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            seconds[name].append(_timed(call))
    return Times(seconds, others.share())


def measure(benchmark: Any, calls: Mapping[str, Callable[[], object]], candidate: str, rounds: int) -> Times:
    """Time callables like `take_turns`, with one of them under pytest-benchmark.

    Args:
        benchmark: The fixture of pytest-benchmark.
        calls: Callables by name.
        candidate: Name of the callable in pytest-benchmark's table. It takes the last turn of each round.
        rounds: How often each callable is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def rest() -> None:
        for name, call in calls.items():
            if name != candidate:
                call()
                seconds[name].append(_timed(call))
        calls[candidate]()

    others = _Others()
    # Timed here too, since a disabled pytest-benchmark times nothing.
    benchmark.pedantic(lambda: seconds[candidate].append(_timed(calls[candidate])), setup=rest, rounds=rounds)
    return Times(seconds, others.share())


def machine() -> dict[str, Any]:
    """Return the facts about the machine that a time depends on."""
    facts = hardware.of(torch.device("cpu"))
    return {
        "cpu": facts.name + _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernel": cpu.variant(),
        "kernels": list(cpu.variants()),
        "torch_isa": facts.isa,
        **software(),
        "environment": {name: os.environ[name] for name in RESTRICTIONS if name in os.environ},
    }


def software() -> dict[str, str]:
    """Return the versions of PyTorch, Python and the system, and the date."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


class _Others:
    """A count, from now on, of CPU time that this process does not use itself."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), self._busy()

    def share(self) -> float | None:
        """Return the share of all cores' time that others used since then."""
        began, before = self._began
        busy = self._busy()
        if busy is None or before is None:
            return None
        return max(0.0, busy - before) / ((time.perf_counter() - began) * (os.cpu_count() or 1))

    @staticmethod
    def _busy() -> float | None:
        """Return the seconds that others have used, summed over all cores."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        own = os.times()
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _timed(call: Callable[[], object]) -> float:
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


def _cpu_model() -> str:
    # The CPU names of virtual machines ("Intel(R) Xeon(R) Processor") do not distinguish generations.
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = [re.search(rf"^{key}\s*: (\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")]
    return " (family {}, model {})".format(*(match[1] for match in found if match)) if all(found) else ""
