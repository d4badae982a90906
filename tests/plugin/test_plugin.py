"""The pytest plugin in the project of a user: `project`, copied to a folder and tested by a pytest of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pytest_int8compile
from int8compile import cpu
from tests.helpers import installed

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = Path(__file__).with_name("project")
RESTRICTIONS = ("INT8COMPILE_ISA", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "WITH_GATE")


def run(folder: Path, *arguments: str, code: str | None = None, expect: int = 0, **environment: str) -> str:
    """Run pytest, or Python code, in a folder; return what it prints. It finds int8compile in this checkout."""
    env = {name: value for name, value in os.environ.items() if name not in RESTRICTIONS}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", **environment}
    # Where the plugin is installed, pytest finds it by its entry point, too.
    how = ["-c", code] if code else ["-m", "pytest", "-p", "pytest_int8compile", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(printed: str) -> dict[str, int]:
    """Return the counts of pytest's last line."""
    (line,) = re.findall(r"^=* ?(\d+ \w+.*) in [\d.]+s", printed, re.MULTILINE)
    return {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", line)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with a stored run, its JSON file and the text it printed."""
    folder = tmp_path_factory.mktemp("user") / "project"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--benchmark-autosave", "--benchmark-json=out.json", "--junit-xml=out.xml"]
    (folder / "printed.txt").write_text(run(folder, *options))
    return folder


@pytest.fixture(scope="module")
def stored(project: Path) -> dict[str, Any]:
    """The stored benchmarks, by the name of their test."""
    return {bench["name"]: bench for bench in json.loads((project / "out.json").read_text())["benchmarks"]}


def test_a_project_is_green_and_stores_ratios(project: Path, stored: dict[str, Any]) -> None:
    speed = stored["test_speed"]["extra_info"]["int8"]
    assert {site["path"]: site["runs_in"] for site in speed["sites"]} == {"up": "int8", "down": "int8"}
    assert (speed["asked"], speed["baseline"], speed["rounds"]) == ("float32", "float32", 21)
    assert set(speed["medians"]) == {"float32", "int8"}
    assert speed["low"] <= speed["ratio"] <= speed["high"]
    assert speed["kernel"] == f"C++ kernel, variant {cpu.variants()[0]}"
    assert (speed["torch"], speed["threads"]) == (__import__("torch").__version__, 1)
    # An odd number of rounds: the median of the reciprocals is the reciprocal of the median.
    assert stored["test_speed"]["stats"]["median"] == pytest.approx(1 / speed["ratio"], rel=1e-4)
    assert stored["test_speed"]["stats"]["rounds"] == 21


def test_accuracy_is_recorded(project: Path) -> None:
    text = (project / "out.xml").read_text()
    errors = re.findall(r'name="int8_error" value="([^"]+)"', text)
    assert len(errors) == 2  # The second one is of the call that fails.
    assert all(0 < float(error) < 0.05 for error in errors)


def test_seconds_stay_seconds(project: Path, stored: dict[str, Any]) -> None:
    printed = (project / "printed.txt").read_text()
    # By the hook in conftest.py of the project, and by that of the plugin.
    assert "Name (time in us)" in printed
    assert "Name (time in float runs)" in printed
    assert stored["test_seconds"]["group"] is None
    assert stored["test_speed"]["group"] == "int8 relative to float"
    assert json.loads((project / "out.json").read_text())["mine"] is True


def test_a_layer_that_stays_in_float_is_named(project: Path) -> None:
    printed = run(project, "-k", "speed", "--benchmark-disable", expect=1, WITH_GATE="1")
    assert results(printed)["failed"] == 1
    assert "1 of 3 linears runs in float, which expect_float=['lm_head'] does not allow" in printed
    assert "gate stays in float: it has fewer features than min_features" in printed
    assert "add to expect_float: 'gate'" in printed
    assert "torch.__trace" not in printed


@pytest.mark.skipif(len(cpu.variants()) < 2, reason="no slower kernel")
def test_a_slower_kernel_is_a_regression(project: Path) -> None:
    # Five times and more: no load of the machine hides it.
    options = ["--benchmark-compare=0001", "--benchmark-compare-fail=median:100%"]
    printed = run(project, "-k", "speed or seconds", *options, expect=1, INT8COMPILE_ISA=cpu.variants()[-1])
    assert results(printed)["passed"] == 2
    assert "test_speed has regressed: int8 is " in printed
    assert "In the stored run 0001_" in printed
    assert f"kernel: was C++ kernel, variant {cpu.variants()[0]}, is C++ kernel, variant portable" in printed
    assert "To do: unset INT8COMPILE_ISA=portable" in printed
    assert "Traceback" not in printed


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a test file and returns its folder."""

    def write(text: str) -> Path:
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        (tmp_path / "test_it.py").write_text(text)
        return tmp_path

    return write


UNUSED = "def test_a(int8_benchmark): 1 / 0\ndef test_b(): pass\n"


def test_a_run_without_its_fixtures_imports_nothing(small: Callable[[str], Path]) -> None:
    code = """
import sys, pytest
assert pytest.main(["-q", "-p", "pytest_int8compile", "-k", "test_b"]) == 0
assert "pytest_int8compile" in sys.modules
print("heavy:", sorted({"torch", "int8compile", "numpy"} & set(sys.modules)))
"""
    assert "heavy: []" in run(small(UNUSED), code=code)


def test_a_wrong_bound_is_refused_before_the_measurement(small: Callable[[str], Path]) -> None:
    text = """
import pytest
import torch
from int8compile.app import regression
from int8compile.errors import ConfigError

class Model(torch.nn.Module):
    def forward(self, x):
        raise AssertionError("it ran")

@pytest.mark.parametrize("bound", [{"min_speedup": "2"}, {"rounds": 5}, {"rounds": 7.0}])
def test_speed(int8_benchmark, bound):
    with pytest.raises(ConfigError, match=next(iter(bound)) + "=.*: give a"):
        int8_benchmark(Model(), torch.ones(1), **bound)

@pytest.mark.parametrize("bound", ["max_kl", "max_error", "min_top1"])
def test_accuracy(int8_accuracy, bound):
    with pytest.raises(ConfigError, match=bound + "='2': give a"):
        int8_accuracy(Model(), torch.ones(1), **{bound: "2"})
"""
    assert results(run(small(text))) == {"passed": 6}


def test_it_is_loaded_once_with_an_entry_point_beside_and_skips(small: Callable[[str], Path]) -> None:
    folder = small(UNUSED)
    paths = installed.environment(folder)["PYTHONPATH"]
    assert results(run(folder, "--benchmark-skip", PYTHONPATH=paths)) == {"passed": 1, "skipped": 1}


def test_without_pytest_benchmark_it_says_what_to_install(small: Callable[[str], Path]) -> None:
    printed = run(small(UNUSED), "-p", "no:benchmark", expect=1)
    assert results(printed)["passed"] == 1
    assert 'int8_benchmark needs pytest-benchmark: pip install "int8compile[pytest]"' in printed


def test_only(small: Callable[[str], Path]) -> None:
    printed = run(small(UNUSED), "--benchmark-only", expect=1)
    assert "ZeroDivisionError" in printed
    assert results(printed)["skipped"] == 1


def test_with_xdist_layers_are_checked_and_nothing_is_timed(project: Path) -> None:
    pytest.importorskip("xdist")
    printed = run(project, "-n1", "-k", "speed")
    assert results(printed)["passed"] == 1
    assert "1 of the passed tests used int8_benchmark, which ran int8 once and timed nothing" in printed


def relative(asked: str = "best") -> dict[str, Any]:
    return {"extra_info": {"int8": {"asked": asked}}}


SECONDS: dict[str, Any] = {"extra_info": {"int8": True}}  # Extra information of the user's own.


class Outcome:
    """The outcome that pluggy gives to a wrapper."""

    def __init__(self, result: Any) -> None:
        self.get_result = lambda: result
        self.forced: Any = None

    def force_result(self, result: Any) -> None:
        self.forced = result


def test_relative_times_and_seconds_are_never_in_one_group() -> None:
    plugin = pytest_int8compile._Benchmarks()
    wrapper = plugin.pytest_benchmark_group_stats()
    next(wrapper)
    outcome = Outcome([("a", [SECONDS, relative()]), (None, [relative(), SECONDS]), ("b", [relative()])])
    with pytest.raises(StopIteration):
        wrapper.send(outcome)
    assert outcome.forced == [
        ("a", [SECONDS]),
        ("a int8 relative to float", [relative()]),
        (None, [SECONDS]),
        ("int8 relative to float", [relative()]),
        ("b", [relative()]),
    ]
    assert plugin.pytest_benchmark_scale_unit("seconds", [relative()]) == ("float run", 1.0)
    assert plugin.pytest_benchmark_scale_unit("operations", [relative()]) == ("", 1.0)
    assert plugin.pytest_benchmark_scale_unit("seconds", [SECONDS]) is None


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (relative(), relative(), True),
        (SECONDS, SECONDS, True),
        (SECONDS, relative(), False),
        (relative(), SECONDS, False),
        (relative("eager"), relative("best"), False),
    ],
)
def test_only_the_same_measurement_is_compared(before: Any, now: Any, kept: bool) -> None:
    warned: list[str] = []
    bench = SimpleNamespace(fullname="test_it", **now)
    stored = {"0001.json": {"test_it": before}}
    session = SimpleNamespace(
        compared_mapping=stored, benchmarks=[bench], logger=SimpleNamespace(warning=warned.append)
    )
    config = SimpleNamespace(_benchmarksession=session)
    wrapper = pytest_int8compile._Benchmarks().pytest_sessionfinish(SimpleNamespace(config=config))  # type: ignore[arg-type]
    next(wrapper)
    assert ("test_it" in stored["0001.json"]) is kept
    assert len(warned) == (not kept)


def test_the_workflow_of_the_page_names_known_options_and_one_cache(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "pytest.md").read_text(), re.MULTILINE | re.DOTALL)
    steps = yaml.safe_load(text)["jobs"]["int8"]["steps"]
    options = set(re.findall(r"--[a-z-]+", " ".join(step.get("run", "") for step in steps)))
    shown = run(tmp_path, "--help")
    assert {"--benchmark-compare", "--benchmark-compare-fail", "--benchmark-autosave"} <= options
    assert not [option for option in options if option not in shown]
    restored, saved = (step["with"] for step in steps if "cache" in step.get("uses", ""))
    assert (restored["path"], restored["key"]) == (saved["path"], saved["key"])
    assert saved["key"].startswith(restored["restore-keys"])
    (command,) = [step["run"] for step in steps if step.get("id") == "cpu"]
    assert "print(cpu.variant())" in command
