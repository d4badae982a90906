"""Checks of the kernels on the day on a GPU: tests, the sanitizer, the profiler's counters."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu import checks, facts, profile, sizes, supervisor
from benchmarks.gpu.day import FILE, MARGIN, Result

# Other packages give warnings while they quantize and compile, which would be errors here.
pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = """
import time
import warnings

import pytest

pytestmark = pytest.mark.gpu


def test_right() -> None:
    # pytest's summary of warnings names tests as it does when they begin.
    warnings.warn("of something", stacklevel=1)


@pytest.mark.parametrize("name", ["a b"])
def test_wrong(name: str) -> None:
    raise AssertionError(name)


def test_that_hangs() -> None:
    time.sleep({hangs})
"""


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("hangs", [0, 600])
def test_tests_are_named_as_they_fail_and_end_in_time(
    hangs: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: x')\n"
    )
    (tmp_path / "test_x.py").write_text(TESTS.format(hangs=hangs))
    # These tests need no GPU, so they must not use this project's settings.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(supervisor, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(facts.ROOT))
    said: list[str] = []
    began = time.time()
    result = checks.run_tests(
        ["test_x.py"], tmp_path / "log", 20.0 if hangs else 60.0, workers=workers, none_is_fine=False, say=said.append
    )
    assert said == ["FAILED test_x.py::test_wrong[a b]"]
    assert result["failed"] == ["test_x.py::test_wrong[a b]"]
    assert result["passed"] is False
    if hangs:
        assert time.time() - began < 30
        assert result["status"] is None
        assert result["unfinished"] == ["test_x.py::test_that_hangs"]
        assert result["summary"] == "stopped after 20 s, at test_x.py::test_that_hangs"
    else:
        assert result["status"] == 1
        assert result["unfinished"] == []
        assert "1 failed, 2 passed" in result["summary"]
    assert "AssertionError: a b" in (tmp_path / "log").read_text() or hangs


BREAKING = """
import pytest
import torch

pytestmark = pytest.mark.gpu
torch.cuda.is_available = lambda: True
broken = False


def synchronize() -> None:
    if broken:
        raise RuntimeError("an illegal memory access was encountered")


torch.cuda.synchronize = synchronize


@pytest.mark.parametrize("number", range(6))
def test_it(number: int) -> None:
    global broken
    broken = broken or number == 2
    assert not broken or number == 2
"""


def test_a_test_that_breaks_the_gpu_ends_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this test fails: later tests run in a new process."""
    (tmp_path / "conftest.py").write_text("from tests.helpers.broken_gpu import pytest_runtest_teardown\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (tmp_path / "test_x.py").write_text(BREAKING)
    monkeypatch.setattr(supervisor, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(facts.ROOT))
    log = tmp_path / "log"
    result = checks.run_tests(["test_x.py"], log, 100, workers=2, none_is_fine=False, say=lambda line: None)
    assert result["failed"] == ["test_x.py::test_it[2]"]
    assert "1 failed, 6 passed" in result["summary"]  # The body of the test passed before the broken context was found.
    assert "test_it[2] broke the GPU's context: an illegal memory access was encountered" in log.read_text()


def test_a_machine_without_pytest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    result = Result(tmp_path / FILE, {"stages": {}})
    stage = checks.tests_stage(sizes.dry_run(), result, export=False, say=print)
    assert stage.cases == {}
    assert "pytest" in stage.notes[0]


def test_what_failed_runs_again_under_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that reports its arguments stands in for the sanitizer."""
    sanitizer = tmp_path / checks.SANITIZER
    banner = "echo '=================================== FAILURES ==================================='"
    lines = ["#!/bin/sh", "echo '========= COMPUTE-SANITIZER'", 'echo "========= Invalid read by $*"', banner]
    sanitizer.write_text("\n".join([*lines, "case $* in *M=2*) sleep 600;; esac", "exit 7"]))
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    names = [f"tests/test_x.py::test_{i}" for i in range(5)]
    failed = {"passed": False, "failed": names[:2], "unfinished": names[2:]}
    gates = {"M=1": {"passed": True}, "M=2": {"error": "illegal access"}}
    result = Result(
        tmp_path / FILE, {"stages": {checks.TESTS: {"cases": {"pytest": failed}}, "gates": {"cases": gates}}}
    )
    stage = checks.failed_stage(result)
    assert list(stage.cases) == [*names[: checks.RERUN], "M=2"]
    assert stage.notes == [f"of 5 that failed, {checks.RERUN} ran again"]
    for name, case in stage.cases.items():
        result.data["running"] = {"until": time.time() + MARGIN + 1}
        found = case()
        # A hanging run is ended, and its findings so far are kept.
        assert found["status"] == (None if name == "M=2" else 7)
        assert len(found["found"]) == 1
        assert name in found["summary"]
        assert f"{name}\n" in (tmp_path / checks.FAILED_LOG).read_text()


NCU = """
  quantize_rows (2048, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Elapsed Cycles                cycle       40,110
    Duration                         us        26.85
    ----------------------- ----------- ------------
    Registers Per Thread             register/thread             168
    Waves Per SM                                                5.17
  gemv (512, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us        11.71
"""


def test_the_counters_are_read_from_the_profilers_pages() -> None:
    assert profile.parsed(NCU) == {
        "quantize_rows": {
            "Duration": "26.85 us",
            "Registers Per Thread": "168 register/thread",
            "Waves Per SM": "5.17",
        },
        "gemv": {"Duration": "11.71 us"},
    }
