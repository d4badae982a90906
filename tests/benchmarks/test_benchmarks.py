"""Every benchmark runs in a small size, and docs/benchmarks.md shows the committed result files."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

transformers = pytest.importorskip("transformers")

from benchmarks import llamacpp, report, speed  # noqa: E402
from int8compile.app import loading, machine  # noqa: E402
from tests.helpers.configs import SMALL  # noqa: E402


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
    assert (kinds.count("linear"), kinds.count("sweep")) == (4, 1)
    assert kinds.count(None) == 2  # The benchmarks in bench_compile.


def test_the_result_names_the_machine_and_nothing_private(smoke: dict[str, Any]) -> None:
    facts = smoke["machine"]
    assert facts["kernel"] in facts["kernels"]
    assert facts["cpu"]
    assert facts["threads"] >= 1
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


def test_a_plot_is_drawn(smoke: dict[str, Any], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.plot(smoke, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert not report.plot({**smoke, "benchmarks": []}, tmp_path / "none.png")


def test_whole_models_are_measured_with_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    asked: dict[str, Any] = {}

    def measure(model: str, **options: Any) -> dict[str, Any]:
        asked.update(options, exists=pathlib.Path(model, "model.gguf").exists())
        case = {"tokens": 8, "baseline": "float32", "seconds": {"float32": 0.02}, "ratios": {"float32": [1.0] * 3}}
        costs = dict.fromkeys(("load", "compile", "overhead", "peak", "weights", "cosine", "kl"), 1.0)
        return {
            "model": model,
            "kind": "decode",
            "prompt": 128,
            "rounds": 2,
            "others": 0.04,
            "machine": machine.facts() | {"packages": {"torchao": "1"}},
            "cases": {"batch 8": case},
            "variants": {"float32": costs},
            "notes": ["a note"],
        }

    def save(folder: pathlib.Path) -> str:
        (folder / "model.gguf").touch()
        return str(folder)

    monkeypatch.setattr(speed.speed, "measure", measure)
    source = speed.Source("A model", save, lambda folder: folder / "model.gguf")
    found = speed.measure(source, variants=["llama"])
    assert asked["names"] == ["float32", "bfloat16", llamacpp.NAME]
    assert asked["commands"][llamacpp.NAME][1:3] == ["-m", "benchmarks.llamacpp"]
    assert asked["exists"]
    text = report.render([found])
    assert text.startswith(f"**A model** on {found['machine']['cpu']}")
    for part in (
        "torchao 1",
        "other processes had 4% of the CPU's time",
        "| float32 ",
        " 2.5 (baseline) |",
        "- a note",
    ):
        assert part in text


def test_a_random_llama_is_written_as_gguf(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=128, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    llamacpp.write(model, tmp_path / "model.gguf")
    llamacpp.convert(tmp_path / "model.gguf", tmp_path / "q8_0.gguf")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for name, error in (("model.gguf", 1e-3), ("q8_0.gguf", 2e-2)):  # float16, and 8 bits
            found = loading.load(str(tmp_path / name))(ids).logits
            assert (found - expected).norm() < error * expected.norm()


def test_the_pages_show_the_committed_results(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    parts = set()
    for of in report.PAGES:
        shown = of.read_text()
        page.write_text(shown)
        report.write(page)
        assert page.read_text() == shown, "run: python -m benchmarks.report --write"
        parts |= {block[2] for block in report.BLOCK.finditer(shown)}
    assert parts == set(report.SECTIONS)


def test_a_page_without_generated_parts_is_refused(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    for text in ("# Benchmarks\n", f"{report.MARKER.format('begin nothing')}\n{report.MARKER.format('end')}\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match="begin NAME"):
            report.write(page)
