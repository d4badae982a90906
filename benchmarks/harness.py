"""Accuracy in EleutherAI's lm-evaluation-harness: `python -m benchmarks.harness [--docs N] [--out FILE]`.

SmolLM2-135M is evaluated in float32, bfloat16, int8 and bitsandbytes by the harness's own command, `lm_eval`, which
knows nothing of int8compile. As in the article on LLM.int8() (https://huggingface.co/blog/hf-bitsandbytes-integration),
each difference from float32 is compared with the combined standard error of both figures.

Nothing is downloaded: the two tasks are made from the language reference that comes with Python. In `last_word`, like
LAMBADA, the model predicts the last word of a passage. In `continuation`, like HellaSwag, it chooses the words that
follow the beginning of a passage among four.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import tables
from int8compile.app import loading
from int8compile.config import Int8Config
from int8compile.tuning.texts import prose

LAST_WORD, CONTINUATION = "last_word", "continuation"
DOCS = 100
CHOICES = 4
# Words of a passage: that precede the last one; of a beginning; of a continuation.
PASSAGE, BEGINNING, FOLLOWING = 40, 12, 8
FLOAT = "float32"
KINDS = ("bfloat16", "int8", "int8-calibrated", "bitsandbytes")
# The figures to compare, as task and metric, with the names to print.
FIGURES = {
    (LAST_WORD, "perplexity"): "last word, perplexity",
    (LAST_WORD, "acc"): "last word, accuracy",
    (CONTINUATION, "acc"): "continuation, accuracy",
    (CONTINUATION, "acc_norm"): "continuation, accuracy by length",
}
# The harness has settings for this too, but only libraries' own variables keep all of them off the network.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

_LAST_WORD = """
doc_to_text: "{{text}}"
doc_to_target: " {{word}}"
output_type: loglikelihood
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_CONTINUATION = """
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
output_type: multiple_choice
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


class Figure(NamedTuple):
    """A figure of the harness.

    Attributes:
        value: The figure; an accuracy is a share.
        error: Its standard error, as the harness estimates it.
    """

    value: float
    error: float


Figures = Mapping[tuple[str, str], Figure]


def write_tasks(folder: Path, docs: int = DOCS) -> None:
    """Write the tasks, each as a YAML file and its documents.

    Args:
        folder: An existing folder, for `--include_path`.
        docs: The most documents of a task; there are about 380 passages.
    """
    passages = _passages()
    for name, task, made in (
        (LAST_WORD, _LAST_WORD, _last_words(passages)),
        (CONTINUATION, _CONTINUATION, _continuations(passages)),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in made[:docs]))
        files = json.dumps({"data_files": {"test": str(file)}})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + task)


def _passages() -> list[list[str]]:
    """Return paragraphs of the language reference as words, each once, in a fixed random order."""
    from pydoc_data.topics import topics

    made = dict.fromkeys(prose(sorted(topics)).split("\n\n"))
    passages = [words for text in made if len(words := text.split()) > BEGINNING + FOLLOWING]
    random.Random(0).shuffle(passages)
    return passages


def _last_words(passages: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the beginnings of passages up to a word of letters only, and that word."""
    docs = []
    for words in passages:
        end = next(
            (at for at in reversed(range(len(words[:PASSAGE]))) if words[at].isalpha() and len(words[at]) > 3), 0
        )
        if end > BEGINNING:
            docs.append({"text": " ".join(words[:end]), "word": words[end]})
    return docs


def _continuations(passages: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return beginnings of passages with what follows, and what follows in other passages."""
    order = random.Random(0)
    docs = []
    for i, words in enumerate(passages):
        others = order.sample([other for j, other in enumerate(passages) if j != i], CHOICES - 1)
        label = order.randrange(CHOICES)
        chosen = [*others[:label], words, *others[label:]]
        choices = [" ".join(passage[BEGINNING : BEGINNING + FOLLOWING]) for passage in chosen]
        docs.append({"text": " ".join(words[:BEGINNING]), "choices": choices, "label": label})
    return docs


def evaluate(folder: Path, tasks: Path, out: Path, dtype: str = "auto", **env: str) -> dict[str, Any]:
    """Evaluate a model folder with the command `lm_eval`, and return what it writes to its results file.

    Args:
        folder: The model and its tokenizer, float or int8.
        tasks: The folder of `write_tasks`.
        out: A folder for what the harness writes.
        dtype: The dtype of float weights; "auto" is the folder's.
        **env: More environment variables.

    Raises:
        CalledProcessError: The command failed; its `stderr` says why.
    """
    model = f"pretrained={folder},dtype={dtype}"
    options = {"model": "hf", "model_args": model, "device": "cpu", "batch_size": "16"}
    options |= {"tasks": f"{LAST_WORD},{CONTINUATION}", "include_path": str(tasks), "output_path": str(out)}
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        *(part for item in options.items() for part in (f"--{item[0]}", item[1])),
    ]
    environment = os.environ | OFFLINE | {"HF_DATASETS_CACHE": str(out / "cache")} | env
    subprocess.run(command, env=environment, cwd=out, check=True, capture_output=True, text=True)
    (file,) = out.rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def figures(results: Mapping[str, Any]) -> Figures:
    """Return the figures in a results file of the harness."""
    found = results["results"]
    return {
        (task, metric): Figure(found[task][f"{metric},none"], found[task][f"{metric}_stderr,none"])
        for task, metric in FIGURES
    }


def errors_apart(reference: Figure, candidate: Figure) -> float:
    """Return the difference of two figures in units of their combined standard error, negative where it is lower.

    All models get the same questions, so the differences between models that are equally good are far below 1.
    """
    difference = candidate.value - reference.value
    return difference and difference / math.hypot(reference.error, candidate.error)


def table(found: Mapping[str, Figures]) -> str:
    """Return a table of the figures of models, each with its distance from float32 in combined standard errors."""
    rows = [[name, *(_shown(found[FLOAT][key], given[key], name) for key in FIGURES)] for name, given in found.items()]
    return tables.markdown(rows, ("", *FIGURES.values()))


def _shown(reference: Figure, figure: Figure, name: str) -> str:
    digits = 3 if figure.value < 1 else 2
    apart = "" if name == FLOAT else f" ({errors_apart(reference, figure):+.2f})"
    return f"{figure.value:.{digits}f} ± {figure.error:.{digits}f}{apart}"


def write_models(
    folder: Path, name: str = loading.SMOLLM2, kinds: Sequence[str] = KINDS
) -> dict[str, tuple[Path, str]]:
    """Write folders of a model, and return the folder and the dtype of each candidate by name.

    Args:
        folder: An existing folder.
        name: The model, as `int8compile.app.loading.load` takes it.
        kinds: The candidates besides float32.
    """
    import transformers

    made = {kind: folder / kind for kind in (FLOAT, *kinds)}
    source = str(made[FLOAT])
    model: Any = loading.load(name)
    tokenizer = loading.load_processor(name)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    if "int8" in kinds:
        loading.quantize(source, made["int8"], Int8Config())
    if "int8-calibrated" in kinds:
        calibration = loading.calibrated(source, None)
        loading.quantize(source, made["int8-calibrated"], Int8Config(), calibration=calibration)
    if "bitsandbytes" in kinds:
        theirs = transformers.BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=theirs, dtype="float32")
        model.save_pretrained(made["bitsandbytes"])
        tokenizer.save_pretrained(made["bitsandbytes"])
    if "bfloat16" in kinds:
        made["bfloat16"] = made[FLOAT]
    return {kind: (path, "bfloat16" if kind == "bfloat16" else FLOAT) for kind, path in made.items()}


def measure(folder: Path, docs: int) -> str:
    """Evaluate every candidate, and return the table with a heading."""
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks", docs)
    models = write_models(folder)
    found: dict[str, Figures] = {}
    bar = tqdm(models.items(), desc="Evaluating")
    for name, (source, dtype) in bar:
        bar.set_postfix_str(name)
        out = folder / "out" / name
        out.mkdir(parents=True)
        found[name] = figures(evaluate(source, folder / "tasks", out, dtype))
    heading = f"SmolLM2-135M on {tables.machine('transformers', 'lm-eval', 'bitsandbytes')}; {docs} documents a task."
    note = "Figure ± standard error (difference from float32 in combined standard errors)."
    return f"{heading} {note}\n\n{table(found)}"


def main(arguments: Sequence[str] | None = None) -> None:

    parser = tables.parser(__doc__)
    parser.add_argument("--docs", type=int, default=DOCS, help="documents of each task (default %(default)s)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tables.emit(measure(Path(folder), args.docs), args.out)


if __name__ == "__main__":
    main()
