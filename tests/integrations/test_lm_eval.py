"""The command of EleutherAI's lm-evaluation-harness on float and int8 folders, and the tasks of benchmarks.harness."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from int8compile.app import loading
from int8compile.config import Int8Config
from tests.helpers.installed import environment
from tests.helpers.letters import byte_tokenizer

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from benchmarks import harness  # noqa: E402

Evaluate = Callable[..., dict]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Return a function that runs `lm_eval` on a folder, in a process that finds this package as an installed one."""
    env = environment(tmp_path / "installed")

    def run(folder: Path, docs: int, **variables: str) -> dict:
        tasks, out = tmp_path / f"tasks-{docs}", tmp_path / f"out-{folder.name}-{docs}"
        for made in (tasks, out):
            made.mkdir(exist_ok=True)
        harness.write_tasks(tasks, docs)
        return harness.evaluate(folder, tasks, out, **env | variables)

    return run


def tiny(folder: Path) -> Path:
    """Write the folder of a random float model, with a tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder)
    return folder


def test_the_tasks(tmp_path: Path) -> None:
    harness.write_tasks(tmp_path, 30)
    (tmp_path / "again").mkdir()
    harness.write_tasks(tmp_path / "again", 30)
    text = " ".join("\n".join(topics.values()).split())
    for name in (harness.LAST_WORD, harness.CONTINUATION):
        written = (tmp_path / f"{name}.jsonl").read_text()
        assert written == (tmp_path / "again" / f"{name}.jsonl").read_text()
        docs = [json.loads(line) for line in written.splitlines()]
        assert len(docs) == 30
        for doc in docs:
            answers = [doc["word"]] if name == harness.LAST_WORD else doc["choices"]
            right = doc.get("label", 0)
            assert [f"{doc['text']} {answer}" in text for answer in answers] == [
                i == right for i in range(len(answers))
            ]
    # The place of the right answer is no hint.
    assert {doc["label"] for doc in docs} == {0, 1, 2, 3}


def test_differences_are_in_combined_standard_errors() -> None:
    assert harness.errors_apart(harness.Figure(10.0, 3.0), harness.Figure(12.5, 4.0)) == 0.5
    assert harness.errors_apart(harness.Figure(0.5, 0.0), harness.Figure(0.5, 0.0)) == 0.0
    found = {
        name: {key: harness.Figure(value, 0.3) for key in harness.FIGURES}
        for name, value in {harness.FLOAT: 0.5, "int8": 0.2}.items()
    }
    rows = harness.table(found).splitlines()
    assert rows[2].count("0.500 ± 0.300") == rows[3].count("0.200 ± 0.300 (-0.71)") == len(harness.FIGURES)


def test_the_benchmark_writes_a_table_of_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    source, methods, out = tiny(tmp_path / "tiny"), [], tmp_path / "table.md"
    write_models = harness.write_models

    def evaluated(folder: Path, tasks: Path, out: Path, dtype: str) -> dict:
        said = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
        methods.append((said.get("quant_method"), dtype))
        figures = {f"{metric}{end},none": 0.5 for _, metric in harness.FIGURES for end in ("", "_stderr")}
        return {"results": {path.stem: figures for path in tasks.glob("*.yaml")}}

    monkeypatch.setattr(harness, "write_models", lambda folder: write_models(folder, str(source)))
    monkeypatch.setattr(harness, "evaluate", evaluated)
    harness.main(["--docs", "2", "--out", str(out)])
    assert methods == [
        (None, "float32"),
        (None, "bfloat16"),
        ("int8compile", "float32"),
        ("int8compile", "float32"),
        ("bitsandbytes", "float32"),
    ]
    rows = [line.split("|")[1].strip() for line in out.read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == [harness.FLOAT, *harness.KINDS]


def test_the_command_runs_an_int8_folder(tmp_path: Path, evaluate: Evaluate) -> None:
    source, folder = tiny(tmp_path / "float"), tmp_path / "int8"
    loading.quantize(str(source), folder, Int8Config())
    results = evaluate(folder, 2)
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    # int8 weights are no parameters: these are the embedding, the lm_head and the norms.
    left = [p for name, p in model.named_parameters() if "_proj" not in name]
    assert results["config"]["model_num_parameters"] == sum(p.numel() for p in left) < model.num_parameters()
    assert all(figure.error >= 0 for figure in harness.figures(results).values())


@pytest.mark.slow
def test_where_torch_loads_no_entry_points_it_says_so(tmp_path: Path, evaluate: Evaluate) -> None:
    folder = tmp_path / "int8"
    loading.quantize(str(tiny(tmp_path / "float")), folder, Int8Config())
    with pytest.raises(subprocess.CalledProcessError) as raised:
        evaluate(folder, 2, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "Unknown quantization type, got int8compile" in raised.value.stderr


@pytest.mark.slow
def test_smollm2_is_as_good_in_int8(tmp_path: Path, evaluate: Evaluate) -> None:
    """No figure differs by more than the chance of the questions, as in the article on LLM.int8()."""
    models = harness.write_models(tmp_path, kinds=("int8",))
    found = {name: evaluate(folder, 60) for name, (folder, _) in models.items()}
    expected = harness.figures(found[harness.FLOAT])
    assert expected[harness.LAST_WORD, "perplexity"].value < 100
    assert expected[harness.CONTINUATION, "acc"].value > 0.5
    counts = {name: results["config"]["model_num_parameters"] for name, results in found.items()}
    assert counts["int8"] < counts[harness.FLOAT]
    given = harness.figures(found["int8"])
    apart = {key: harness.errors_apart(expected[key], given[key]) for key in harness.FIGURES}
    assert max(map(abs, apart.values())) < 1, apart
