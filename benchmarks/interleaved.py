"""Times callables in turns, in one process: whatever else the machine does meets all of them.

A number alone says little here. A virtual machine's clock rate, its neighbours and the pages that a process was given
move every time by tens of percents, but they move the times of one round together, so ratios are compared.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from int8compile import cpu, hardware

# What makes PyTorch's own kernels use less than the machine has: a baseline is worth what these leave of it.
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
    """What callables took.

    Attributes:
        seconds: Of each callable by its name, one for each round.
        others: Share of all cores' time that other processes, or other virtual machines, had meanwhile; None where
            the system does not tell. At more than some percents, times are no longer this machine's.
    """

    seconds: Mapping[str, list[float]]
    others: float | None

    def median(self, name: str) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds[name])

    def fastest(self, names: Iterable[str]) -> str:
        """The name with the least median."""
        return min(names, key=self.median)

    def ratio(self, name: str, baseline: str) -> float:
        """How many times faster it is than a baseline: the ratio of the medians."""
        return self.median(baseline) / self.median(name)

    def quartiles(self, name: str, baseline: str) -> tuple[float, float]:
        """The first and third quartile of the rounds' ratios: how far `ratio` is to be trusted."""
        ratios = [slow / fast for slow, fast in zip(self.seconds[baseline], self.seconds[name], strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        first, _, third = statistics.quantiles(ratios, method="inclusive")
        return first, third

    def to_dict(self, baselines: Iterable[str]) -> dict[str, Any]:
        """As data: the medians in seconds, and how the others compare with the fastest of the baselines."""
        baselines = [name for name in baselines if name in self.seconds]
        best = self.fastest(baselines)
        return {
            "rounds": len(self.seconds[best]),
            "others": self.others and round(self.others, 4),
            "medians": {name: _rounded(self.median(name)) for name in self.seconds},
            "fastest_baseline": best,
            "ratios": {
                name: {
                    "ratio": _rounded(self.ratio(name, best)),
                    "quartiles": [_rounded(ratio) for ratio in self.quartiles(name, best)],
                }
                for name in self.seconds
                if name not in baselines
            },
        }


def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Times each callable once a round, after a call that is not timed: the one before has evicted its weights."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    others = _Others()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            seconds[name].append(_timed(call))
    return Times(seconds, others.share())


def measure(benchmark: Any, calls: Mapping[str, Callable[[], object]], candidate: str, rounds: int) -> Times:
    """Like `take_turns`, with one of the callables as what the fixture of pytest-benchmark measures.

    Args:
        benchmark: The fixture.
        calls: By name.
        candidate: The one that pytest-benchmark's own table shows. It takes the last turn of each round.
        rounds: How often each is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def rest() -> None:
        for name, call in calls.items():
            if name != candidate:
                call()
                seconds[name].append(_timed(call))
        calls[candidate]()

    others = _Others()
    # Timed here once more, as pytest-benchmark times nothing when it is disabled.
    benchmark.pedantic(lambda: seconds[candidate].append(_timed(calls[candidate])), setup=rest, rounds=rounds)
    return Times(seconds, others.share())


def machine() -> dict[str, Any]:
    """The facts without which a time means nothing."""
    facts = hardware.of(torch.device("cpu"))
    return {
        "cpu": facts.name + _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernel": cpu.variant(),
        "kernels": list(cpu.variants()),
        "torch": torch.__version__,
        "torch_isa": facts.isa,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "environment": {name: os.environ[name] for name in RESTRICTIONS if name in os.environ},
    }


class _Others:
    """Counts from now on what this process does not use of the machine."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), self._busy()

    def share(self) -> float | None:
        """Of all cores' time since then."""
        began, before = self._began
        busy = self._busy()
        if busy is None or before is None:
            return None
        return max(0.0, busy - before) / ((time.perf_counter() - began) * (os.cpu_count() or 1))

    @staticmethod
    def _busy() -> float | None:
        """Seconds of all cores that others had."""
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


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _cpu_model() -> str:
    # The names that virtual machines give ("Intel(R) Xeon(R) Processor") do not tell one generation from the next.
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = [re.search(rf"^{key}\s*: (\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")]
    return " (family {}, model {})".format(*(match[1] for match in found if match)) if all(found) else ""
