"""Every benchmark runs in a small size, and docs/benchmarks.md shows the committed result files."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytest.importorskip("transformers")

from benchmarks import report  # noqa: E402


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of a smoke run of all benchmarks."""
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--smoke", "-q", "-p"]
    command += ["no:cacheprovider", f"--benchmark-json={path}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    # pytest-benchmark measures nothing where it believes it is one of several workers.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(path.read_text())


def test_every_benchmark_runs(smoke: dict[str, Any]) -> None:
    kinds = [row.get("kind") for row in smoke["benchmarks"]]
    assert (kinds.count("linear"), kinds.count("sweep"), kinds.count("model")) == (4, 1, 2)
    assert kinds.count(None) == 2  # The benchmarks in bench_compile.
    for row in smoke["benchmarks"]:
        if row.get("kind") == "model":
            assert set(row["medians"]) == set(row["similarity"]) == {*row["ratios"], "float32", "bfloat16"}
            assert all(similarity > 0.9 for similarity in row["similarity"].values()), row["similarity"]
            assert row["notes"] == []


def test_the_result_names_the_machine_and_nothing_private(smoke: dict[str, Any]) -> None:
    machine = smoke["machine"]
    assert machine["kernel"] in machine["kernels"]
    assert machine["cpu"]
    assert machine["threads"] >= 1
    assert set(smoke["commit"]) == {"id", "changed_since"}
    assert str(ROOT) not in json.dumps(smoke)


def test_the_report_shows_what_was_measured(smoke: dict[str, Any]) -> None:
    text = report.render([smoke])
    assert smoke["machine"]["cpu"] in text
    row = next(row for row in smoke["benchmarks"] if row.get("kind") == "linear" and row["m"] == 4)
    ratio = row["ratios"][f"int8 {row['dtype']}"]["ratio"]
    assert f"{ratio:.2f}" in text
    assert "Of 4 cases with 2 values of M from 1 to 4" in text


def test_the_report_marks_what_misses_its_bar(smoke: dict[str, Any]) -> None:
    def judged(ratio: float) -> str:
        row = {
            "kind": "linear",
            "k": 8,
            "n": 8,
            "m": 1,
            "dtype": "float32",
            "ratios": {"int8 float32": {"ratio": ratio}},
        }
        return report.render([{**smoke, "benchmarks": [row]}])

    assert "2.40 |" in judged(2.4)
    assert "2.30 ✗ |" in judged(2.3)


def test_wrong_results_are_not_compared_with(smoke: dict[str, Any]) -> None:
    row = {
        "kind": "model",
        "model": report.SMOLLM2,
        "phase": "decode",
        "tokens": 1,
        "notes": [],
        "packages": {},
        "medians": {"float32": 4.0, "bfloat16": 3.0, "int8 float32": 2.0, "torchao a": 1.0, "torchao b": 3.5},
        "similarity": {"float32": 1.0, "bfloat16": 1.0, "int8 float32": 1.0, "torchao a": 0.1, "torchao b": 1.0},
    }
    text = report.render([{**smoke, "benchmarks": [row]}])
    line = next(line for line in text.splitlines() if "against torchao" in line)
    assert "1.75" in line
    assert "torchao b" in line
    assert "not measured" in next(line for line in text.splitlines() if "against bitsandbytes" in line)


def test_a_plot_is_drawn(smoke: dict[str, Any], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.plot(smoke, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert not report.plot({**smoke, "benchmarks": []}, tmp_path / "none.png")


def test_the_page_shows_the_committed_results(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "benchmarks.md"
    shown = report.PAGE.read_text()
    page.write_text(shown)
    report.write(page)
    assert page.read_text() == shown, "run: python -m benchmarks.report --write"
    assert {block[2] for block in report.BLOCK.finditer(shown)} == set(report.SECTIONS)


def test_a_page_without_generated_parts_is_refused(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    for text in ("# Benchmarks\n", f"{report.MARKER.format('begin nothing')}\n{report.MARKER.format('end')}\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match="begin NAME"):
            report.write(page)
