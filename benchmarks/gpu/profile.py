"""Hardware counters of three kernels. `ncu` runs this module, which starts each kernel once:

ncu ... python -m benchmarks.gpu.profile
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import inputs
from benchmarks.gpu.day import CaseResult, Result, Stage
from benchmarks.gpu.linear import THRESHOLD, product_call
from benchmarks.gpu.supervisor import run_logged

NAME, LOG = "profile", "ncu.txt"
SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
)
# The rows and the weight [N, K] of each kernel.
KERNELS = {"quantize": (2048, 4096, 4096), "many rows": (2048, 4096, 4096), "one row": (1, 4096, 4096)}
# Counters that are kept, by ncu's names.
KEPT = (
    *("Duration", "Registers Per Thread", "Achieved Occupancy", "Theoretical Occupancy", "Memory Throughput"),
    *("DRAM Throughput", "L2 Cache Throughput", "Compute (SM) Throughput", "Issue Slots Busy", "Waves Per SM"),
)


def stage(result: Result, dry_run: bool) -> Stage:
    """Return the stage: a single run of ncu."""
    missing = not dry_run and shutil.which("ncu") is None
    run: Callable[[], CaseResult] = functools.partial(dict, counters={}) if dry_run else lambda: run_ncu(result)
    return Stage(
        NAME,
        f"hardware counters of {', '.join(KERNELS)}, by ncu; its output is in {LOG}",
        seconds=40,
        cases={} if missing else {"ncu": run},
        expected=30,
        notes=["ncu is not installed"] if missing else [],
    )


def run_ncu(result: Result) -> CaseResult:
    """Run ncu, keep its output beside the result file, and return the counters."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--target-processes", "application-only"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.gpu.profile"]
    status, text = run_logged(command, result.path.parent / LOG, result.left)
    kernels = parsed(text)
    if status or not kernels:
        why = "ran out of time" if status is None else f"ended with status {status}"
        raise RuntimeError(f"ncu {why}: {text[-1500:]}")
    return {"counters": kernels}


def parsed(text: str) -> dict[str, dict[str, str]]:
    """Return the counters in ncu's output by kernel: `{"gemm": {"Duration": "27.5 us"}}`."""
    found: dict[str, dict[str, str]] = {}
    page: dict[str, str] = {}
    row = re.compile(rf"\s+({'|'.join(map(re.escape, KEPT))})\s+(?:(\S+)\s+)?([\d.,]+)\s*$")
    for line in text.splitlines():
        if title := re.match(r"\s*(\w+) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\), Context", line):
            page = found.setdefault(title[1], {})
        elif cells := row.match(line):
            page.setdefault(cells[1], f"{cells[3]} {cells[2] or ''}".strip())
    return found


def calls() -> Iterator[Callable[[], Any]]:
    """Yield a call of each kernel in `KERNELS`."""
    from int8compile.ops import quantize_rows

    device = torch.device("cuda", 0)
    for name, (m, n, k) in KERNELS.items():
        x = inputs.activations(m, k, device)
        qweight, scale, d = inputs.quantized(inputs.weight(k, n, device))
        if name == "quantize":
            yield functools.partial(quantize_rows, x, d, THRESHOLD)
        else:
            yield product_call(quantize_rows(x, d, THRESHOLD), qweight, scale)


def main() -> None:
    """Run each call once without and once with the profiler."""
    from int8compile import triton_kernels

    assert triton_kernels.load()
    runtime = torch.cuda.cudart()
    with torch.no_grad():
        ready = list(calls())
        for call in ready:
            call()
        torch.cuda.synchronize()
        for call in ready:
            runtime.cudaProfilerStart()
            call()
            torch.cuda.synchronize()
            runtime.cudaProfilerStop()


if __name__ == "__main__":
    main()
