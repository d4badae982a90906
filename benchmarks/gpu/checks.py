"""Tests that need a GPU (tier 4), and correctness gates: results on the device must equal the CPU reference."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import bundle, inputs
from benchmarks.gpu.day import GATES, CaseResult, Result, Stage
from benchmarks.gpu.sizes import Gate, Sizes, for_gpu
from benchmarks.gpu.supervisor import run_logged
from benchmarks.interleaved import rounded
from int8compile import triton_kernels
from int8compile.ops import reference

TESTS, LOG = "tier4", "tests.txt"
EXPORT_TESTS, EXPORT_LOG = "tier4_export", "tests-export.txt"
FAILED, FAILED_LOG = "failed", "sanitizer.txt"
SANITIZER = "compute-sanitizer"
# Seconds after which pytest prints the stack of a test. No test compiles for longer.
STUCK = 60
NO_TESTS = 5  # pytest's exit status where nothing was selected.
# Number of failed tests that run again.
RERUN = 3
# Warnings are not errors here, unlike in other test runs: a GPU machine has its own plugins and versions.
PYTEST = (sys.executable, "-u", "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", "-W", "default")
UNWELL = ("FAILED", "ERROR")
_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# "[gw3] [ 10%] FAILED tests/test_x.py::test_y" of several processes, "tests/test_x.py::test_y FAILED [ 10%]" of one.
_ENDED = re.compile(
    rf"^(?:\[gw\d+\]\s*(?:\[\s*\d+%\])?\s*({_OUTCOMES}) (\S+::.*?)|(\S+::.*?) ({_OUTCOMES})(?:\s.*)?)\s*$"
)
_BEGUN = re.compile(r"^(\S+\.py::.*?)\s*$")


def tests_stage(sizes: Sizes, result: Result, *, export: bool, say: Callable[[str], object]) -> Stage:
    """Return the stage that runs `pytest -m gpu` in its own processes, with its output in a file beside the results.

    Args:
        sizes: Has the test files and the number of processes.
        result: Results, whose folder gets the output.
        export: Whether to run the files that export models.
        say: Called with the name of each test that fails.
    """
    files = sizes.export_tests if export else sizes.tests
    seconds = 45 if export else 90
    log = result.path.parent / (EXPORT_LOG if export else LOG)
    missing = importlib.util.find_spec("pytest") is None

    def run() -> CaseResult:
        return run_tests(files, log, result.left, workers=sizes.workers, none_is_fine=sizes.dry_run, say=say)

    return Stage(
        EXPORT_TESTS if export else TESTS,
        f"python -m pytest {' '.join(files)} -m gpu",
        seconds=seconds,
        cases={} if missing else {"pytest -m gpu": run},
        expected=seconds / 2,
        measures=False,
        notes=["pytest is not installed: no test ran"] if missing else [],
    )


def run_tests(
    files: Sequence[str], log: Path, seconds: float, *, workers: int, none_is_fine: bool, say: Callable[[str], object]
) -> CaseResult:
    """Run pytest with a time limit.

    Args:
        files: Files with tests.
        log: File for pytest's output, line by line.
        seconds: Time limit.
        workers: Number of processes that run tests, if pytest-xdist is installed.
        none_is_fine: Whether finding no test counts as passed.
        say: Called with the name of each test that fails.

    Returns:
        Whether the tests passed; pytest's exit status, or None if the time was over; its last line; and the names of
        failed tests and of unfinished ones.
    """
    command = [*PYTEST, *files, "-m", "gpu", "-v", "-o", f"faulthandler_timeout={STUCK}"]
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    if bundle.WATCH in os.environ:
        command += ["-p", "benchmarks.gpu.bundle"]
    begun: dict[str, None] = {}
    ended: dict[str, str] = {}

    def read(line: str) -> None:
        if found := _ENDED.match(line):
            outcome, name = (found[1], found[2]) if found[1] else (found[4], found[3])
            if outcome in UNWELL and ended.get(name) not in UNWELL:
                say(f"{outcome} {name}")
            ended[name] = outcome
        elif found := _BEGUN.match(line):
            begun[found[1]] = None

    # Otherwise each process would use all cores for the reference.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status, text = run_logged(command, log, seconds, each=read, env=environment)
    unfinished = [name for name in begun if name not in ended]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    stopped = f"stopped after {seconds:.0f} s, at {', '.join(unfinished) or 'no test'}"
    return {
        "passed": status == 0 or (none_is_fine and status == NO_TESTS),
        "status": status,
        "summary": stopped if status is None else lines[-1] if lines else "no output",
        "failed": [name for name, outcome in ended.items() if outcome in UNWELL],
        "unfinished": unfinished,
    }


def failed_stage(result: Result) -> Stage:
    """Return the stage that runs failed or unfinished tests and gates again, under compute-sanitizer."""
    cases = result.stage(TESTS)["cases"].values()
    tests = [name for kind in ("failed", "unfinished") for case in cases for name in case.get(kind, [])]
    gates = result.failed_gates
    again: dict[str, list[str]] = {name: [*PYTEST, name] for name in tests[:RERUN]}
    again |= {name: [sys.executable, "-m", "benchmarks.gpu.checks", name] for name in gates[:RERUN]}
    notes = [f"of {len(each)} that failed, {RERUN} ran again" for each in (tests, gates) if len(each) > RERUN]
    if not again:
        notes = ["nothing failed"]
    elif shutil.which(SANITIZER) is None:
        again, notes = {}, [f"{SANITIZER} is not installed"]
    return Stage(
        FAILED,
        f"failed tests and gates again, under {SANITIZER}; its output is in {FAILED_LOG}",
        seconds=30,
        cases={name: functools.partial(sanitized, command, result) for name, command in again.items()},
        expected=12,
        measures=False,
        notes=notes,
    )


def sanitized(command: Sequence[str], result: Result) -> CaseResult:
    """Run a command under compute-sanitizer, with its output in a file beside the results.

    Returns:
        Its exit status, or None if the time was over; and the errors found.
    """
    tool = [SANITIZER, "--tool", "memcheck", "--target-processes", "all", "--print-limit", "5"]
    status, text = run_logged([*tool, *command], result.path.parent / FAILED_LOG, result.left)
    # Exactly nine: pytest prints longer lines of "=".
    found = re.findall(r"^={9} (?!COMPUTE-SANITIZER)(\S.*)$", text, re.MULTILINE)
    return {"status": status, "found": found[:20], "summary": found[-1] if found else text.strip()[-200:]}


def gates_stage(sizes: Sizes, device: torch.device) -> Stage:
    """Return the stage of the correctness gates."""
    return Stage(
        GATES,
        "int8compile::linear on the device against int8compile.ops.reference.linear on the CPU",
        seconds=30,
        cases={str(gate): functools.partial(check, gate, device) for gate in sizes.gates},
        measures=False,
    )


def check(gate: Gate, device: torch.device) -> CaseResult:
    """Compare a product, with a bias and with outliers in every third row, bit for bit."""
    x = inputs.activations(gate.m, gate.k, torch.device("cpu"))
    x[::3, gate.k // 2] = 1000
    if gate.special:
        # One row with +Inf, one with +Inf and -Inf, and one with NaN.
        x[0, 0] = torch.inf
        x[1, 1], x[1, 2] = torch.inf, -torch.inf
        x[-1, 3] = torch.nan
    weight = inputs.quantized(inputs.weight(gate.k, gate.n, torch.device("cpu")))
    given = (x, *weight, torch.randn(gate.n, dtype=torch.bfloat16))
    expected = reference.linear(*given, gate.threshold)
    with _poisoned():
        moved = [None if each is None else each.to(device) for each in given]
        found = torch.ops.int8compile.linear(*moved, gate.threshold).cpu()
    distance = ulps(found, expected)
    return {
        "passed": bool((distance == 0).all()),
        "max_ulp": int(distance.max()),
        "differing": rounded((distance > 0).double().mean().item(), 3),
    }


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances of bfloat16 values in ulps. NaN is 0 from NaN, and 65536 from all other values."""

    def ordered(t: Tensor) -> Tensor:
        bits = t.view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    distance = (ordered(a) - ordered(b)).abs()
    return torch.where(a.isnan() | b.isnan(), torch.where(a.isnan() & b.isnan(), 0, 65536), distance)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, or with the largest integer, so that reading unwritten memory shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> int:
    """Check the gates named on the command line, by the text of `sizes.Gate`."""
    assert triton_kernels.load()
    with torch.no_grad():
        results = {
            str(gate): check(gate, torch.device("cuda", 0)) for gate in for_gpu(1).gates if str(gate) in sys.argv[1:]
        }
    for name, found in results.items():
        print(f"{name}: {found}")
    return 0 if results and all(found["passed"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
