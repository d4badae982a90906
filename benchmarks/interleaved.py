"""Time callables in turns under pytest-benchmark, and describe the machine that they ran on."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from int8compile import cpu, hardware
from int8compile.timing import Others, Times, quartiles, rounded, take_turns, timed

__all__ = ["Times", "machine", "measure", "quartiles", "rounded", "software", "take_turns"]

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
                seconds[name].append(timed(call))
        calls[candidate]()

    others = Others()
    # Timed here too, since a disabled pytest-benchmark times nothing.
    benchmark.pedantic(lambda: seconds[candidate].append(timed(calls[candidate])), setup=rest, rounds=rounds)
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


def _cpu_model() -> str:
    # The CPU names of virtual machines ("Intel(R) Xeon(R) Processor") do not distinguish generations.
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = [re.search(rf"^{key}\s*: (\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")]
    return " (family {}, model {})".format(*(match[1] for match in found if match)) if all(found) else ""
