"""Tier 4, the tests that need a GPU; and the gates: results on the device are those of the reference on the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import inputs
from benchmarks.gpu.day import GATES, CaseResult, Stage
from benchmarks.gpu.facts import ROOT, scrubbed
from benchmarks.gpu.sizes import Gate, Sizes
from benchmarks.gpu.supervisor import kill_group
from int8compile.ops import quantize_weight, reference

TESTS, LOG = "tier4", "tier4.txt"
# Differences in units of the last place of bfloat16. A sum is rounded to float32 a few times and then to bfloat16,
# which at a tie takes the neighbour.
MAX_ULP = 1
# No test compiles for longer; after it, pytest says where it stands.
STUCK = 120
NO_TESTS = 5  # pytest's exit status where nothing was selected.


def tests_stage(sizes: Sizes, folder: Path, seconds: float) -> Stage:
    """`pytest -m gpu` in a process of its own; its output goes to a file beside the results."""
    missing = importlib.util.find_spec("pytest") is None
    return Stage(
        TESTS,
        f"python -m pytest {' '.join(sizes.tests)} -m gpu",
        share=5,
        cases={} if missing else {"pytest -m gpu": functools.partial(run_tests, sizes, folder, seconds)},
        limit=seconds + 30,
        measures=False,
        notes=["pytest is not installed: tier 4 did not run"] if missing else [],
    )


def run_tests(sizes: Sizes, folder: Path, seconds: float) -> CaseResult:
    """Runs pytest, for a time at most.

    Returns:
        "passed", pytest's exit status or None where the time was over, and its last line.
    """
    command = [sys.executable, "-m", "pytest", *sizes.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    log = folder / LOG
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "-o", f"faulthandler_timeout={STUCK}"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_group(process)
    text = scrubbed(log.read_text(errors="replace"))
    log.write_text(text)
    lines = [line for line in text.splitlines() if line.strip()]
    return {
        "passed": status == 0 or (sizes.dry_run and status == NO_TESTS),
        "status": status,
        "summary": f"stopped after {seconds:.0f} s" if status is None else lines[-1] if lines else "no output",
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE),
    }


def gates_stage(sizes: Sizes, device: torch.device) -> Stage:
    """A handful of products."""
    return Stage(
        GATES,
        "int8compile::linear on the device against int8compile.ops.reference.linear on the CPU",
        share=1,
        cases={str(gate): functools.partial(check, gate, device) for gate in sizes.gates},
        measures=False,
    )


def check(gate: Gate, device: torch.device) -> CaseResult:
    """Compares one product, with a bias."""
    x = inputs.activations(gate.m, gate.k, torch.device("cpu"))
    if gate.special:
        # Rows of each kind: +Inf, both, and NaN; the others as they were.
        x[0, 0] = torch.inf
        x[1, 1], x[1, 2] = torch.inf, -torch.inf
        x[-1, 3] = torch.nan
    qweight, scale = quantize_weight(inputs.weight(gate.k, gate.n, torch.device("cpu")))
    bias = torch.randn(gate.n, dtype=torch.bfloat16)
    expected = reference.linear(x, qweight, scale, bias, gate.threshold, gate.outliers)
    with _poisoned():
        found = torch.ops.int8compile.linear(
            *(each.to(device) for each in (x, qweight, scale, bias)), gate.threshold, gate.outliers
        ).cpu()
    distance = ulps(found, expected)
    return {
        "passed": bool((distance <= MAX_ULP).all()),
        "max_ulp": int(distance.max()),
        "differing": float(f"{(distance > 0).double().mean().item():.3g}"),
    }


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 values lie between two; NaN is 0 from NaN, and 65536 from everything else."""

    def ordered(t: Tensor) -> Tensor:
        bits = t.view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    distance = (ordered(a) - ordered(b)).abs()
    return torch.where(a.isnan() | b.isnan(), torch.where(a.isnan() & b.isnan(), 0, 65536), distance)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Tensors that nobody has written hold NaN, and integers their largest value: what reads them shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
