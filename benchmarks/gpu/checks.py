"""Tier 4, the tests that need a GPU; and the gates: results on the device are those of the reference on the CPU."""

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
from benchmarks.gpu.sizes import Gate, Sizes, gpu
from benchmarks.gpu.supervisor import run_logged
from int8compile import triton_kernels
from int8compile.ops import reference

TESTS, LOG = "tier4", "tests.txt"
EXPORT_TESTS, EXPORT_LOG = "tier4_export", "tests-export.txt"
FAILED, FAILED_LOG = "failed", "sanitizer.txt"
SANITIZER = "compute-sanitizer"
# No test compiles for longer; after it, pytest says where it stands.
STUCK = 60
NO_TESTS = 5  # pytest's exit status where nothing was selected.
# How many of the tests that failed run again.
RERUN = 3
# Warnings are errors where the tested set is installed. A GPU machine has plugins and versions of its own.
PYTEST = (sys.executable, "-u", "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", "-W", "default")
UNWELL = ("FAILED", "ERROR")
_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# "[gw3] [ 10%] FAILED tests/test_x.py::test_y" of several processes, "tests/test_x.py::test_y FAILED [ 10%]" of one.
_ENDED = re.compile(
    rf"^(?:\[gw\d+\]\s*(?:\[\s*\d+%\])?\s*({_OUTCOMES}) (\S+::.*?)|(\S+::.*?) ({_OUTCOMES})(?:\s.*)?)\s*$"
)
_BEGUN = re.compile(r"^(\S+\.py::.*?)\s*$")


def tests_stage(sizes: Sizes, result: Result, *, export: bool, say: Callable[[str], object]) -> Stage:
    """`pytest -m gpu` in processes of its own; its output goes to a file beside the results.

    Args:
        sizes: With the files and the number of processes.
        result: Beside whose file the output goes.
        export: Whether it is the files that export models.
        say: Takes the name of a test as it fails.
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
    """Run pytest, for a time at most.

    Args:
        files: With the tests.
        log: Takes pytest's output, line by line.
        seconds: After so many it is ended.
        workers: Processes that run tests, where pytest-xdist is installed.
        none_is_fine: Whether it may find no test.
        say: Takes the name of a test as it fails.

    Returns:
        "passed", pytest's exit status or None where the time was over, its last line, and the names of tests that
        failed and of those that had begun and not ended.
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

    # Each process would take all cores for what it compares with.
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
    """Tests and gates that failed in the call before, or did not end, under compute-sanitizer."""
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
        f"what failed, again under {SANITIZER}; the whole text is in {FAILED_LOG}",
        seconds=30,
        cases={name: functools.partial(sanitized, command, result) for name, command in again.items()},
        expected=12,
        measures=False,
        notes=notes,
    )


def sanitized(command: Sequence[str], result: Result) -> CaseResult:
    """Run a command under compute-sanitizer, with its text in a file beside the results.

    Returns:
        Its exit status, None if the time was over, and what was found.
    """
    tool = [SANITIZER, "--tool", "memcheck", "--target-processes", "all", "--print-limit", "5"]
    status, text = run_logged([*tool, *command], result.path.parent / FAILED_LOG, result.left)
    # pytest draws lines of the same kind, which are longer.
    found = re.findall(r"^={9} (?!COMPUTE-SANITIZER)(\S.*)$", text, re.MULTILINE)
    return {"status": status, "found": found[:20], "summary": found[-1] if found else text.strip()[-200:]}


def gates_stage(sizes: Sizes, device: torch.device) -> Stage:
    """A handful of products."""
    return Stage(
        GATES,
        "int8compile::linear on the device against int8compile.ops.reference.linear on the CPU",
        seconds=30,
        cases={str(gate): functools.partial(check, gate, device) for gate in sizes.gates},
        measures=False,
    )


def check(gate: Gate, device: torch.device) -> CaseResult:
    """Compares one product, with a bias and outliers in every third row: bit for bit."""
    x = inputs.activations(gate.m, gate.k, torch.device("cpu"))
    x[::3, gate.k // 2] = 1000
    if gate.special:
        # Rows of each kind: +Inf, both, and NaN; the others as they were.
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


def main() -> int:
    """Check the gates that are named, as `sizes.Gate` is written."""
    assert triton_kernels.load()
    with torch.no_grad():
        results = {
            str(gate): check(gate, torch.device("cuda", 0)) for gate in gpu(1).gates if str(gate) in sys.argv[1:]
        }
    for name, found in results.items():
        print(f"{name}: {found}")
    return 0 if results and all(found["passed"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
