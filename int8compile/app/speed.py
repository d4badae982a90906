"""The speed of a model in float and in int8, with compile time, load time and memory: `int8compile bench`.

Every variant runs in a process of its own (`app.variants`), so that its memory and its compile time are its own. The
processes take turns, round by round, and the ratios are those of the rounds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from int8compile import cpu
from int8compile.app import machine
from int8compile.app.variants import DECODE, PREFILL, VARIANTS, Job, Variant
from int8compile.app.workers import Worker, WorkerError
from int8compile.errors import ConfigError, ModelError, did_you_mean
from int8compile.progress import progress_bar
from int8compile.timing import BUSY, Others, Times, rounded
from int8compile.tuning import peers
from int8compile.tuning.evaluation import divergence

BATCHES, PROMPT, ROUNDS = (1, 8, 32), 128, 9
BASELINES = ("float32", "bfloat16")
# A variant whose output has a smaller cosine to the reference's is wrong: its speed is shown, but not compared.
SAME = 0.9
# Seconds after a turn: the threads of a process spin for some milliseconds after its last parallel region.
PAUSE = 0.02
# A process is started if this many times the memory of the largest process of its dtype so far is available.
MARGIN = 1.25
MEMORY = Path("/proc/meminfo")
MADE_UP = "The inputs are random; the command `eval` measures the distance from float on text."


def select(words: Sequence[str] = (), dtype: str | None = None, known: Sequence[str] = tuple(VARIANTS)) -> list[str]:
    """Return the names of the baselines, and of the variants that begin with one of some words.

    Args:
        words: Beginnings of names; none for all variants.
        dtype: The dtype of the float parts; None for any.
        known: The names to choose from.

    Raises:
        ConfigError: No name begins with a word.
    """
    beginnings = [name[:end] for name in known for end in range(1, len(name) + 1) if name[end : end + 1] in ("", " ")]
    for word in words:
        if not any(name.startswith(word) for name in known):
            meant = did_you_mean(word, beginnings)
            raise ConfigError(f"no variant begins with {word!r}{meant}; known: {'; '.join(known)}")
    chosen = [name for name in known if name in BASELINES or not words or name.startswith(tuple(words))]
    return [name for name in chosen if dtype is None or name not in VARIANTS or VARIANTS[name].dtype == dtype]


def measure(
    model: str,
    *,
    batches: Sequence[int] = BATCHES,
    prompt: int = PROMPT,
    rounds: int = ROUNDS,
    names: Sequence[str] | None = None,
    commands: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Measure the variants of a model.

    Args:
        model: Its name, as for `loading.load`.
        batches: The numbers of texts at a time, or of other inputs.
        prompt: The number of tokens of a text.
        rounds: How often each variant is timed in each case.
        names: The variants, as from `select`; None for all.
        commands: Programs for further names, which take a `Job` as their last argument and answer as `app.variants`.

    Returns:
        Plain data: what was measured (`model`, `kind`, `batches`, `prompt`, `rounds`), where (`machine`), by case the
        seconds of a call and the ratios to the faster float variant (`cases`), by variant load seconds, compile
        seconds, bytes and distance from float (`variants`), and what went wrong (`notes`).

    Raises:
        ModelError: The model cannot be loaded or is int8 already, or no float variant runs to the end with the right
            output.
    """
    cpu.available()  # Compiles the kernel where that is needed, which is not compile time of a model.
    names = select() if names is None else names
    steps = len(names) + 1 + rounds
    with (
        # A process that was killed may leave a compiler that still writes.
        tempfile.TemporaryDirectory(prefix="int8compile-", ignore_cleanup_errors=True) as folder,
        progress_bar(total=steps) as bar,
        _Race(model, sorted(set(batches)), prompt, Path(folder), commands or {}) as race,
    ):
        for name in names:
            bar.set_description(f"Compiling {name}")
            race.add(name)
            bar.update()
        race.compare()
        bar.set_description("Warming up")
        race.round()
        bar.update()
        others = Others()
        used, seconds = race.cpu(), []
        for _ in range(rounds):
            bar.set_description("Taking turns")
            seconds.append(race.round())
            bar.update()
        share = others.share(race.cpu() - used)
        return _result(race, seconds, share)


class _Race:
    """The processes of a model's variants.

    Attributes:
        facts: What each process reported about its start, by variant.
        notes: What went wrong.
    """

    def __init__(
        self, model: str, batches: Sequence[int], prompt: int, folder: Path, commands: Mapping[str, Sequence[str]]
    ) -> None:
        self.model, self.batches, self.prompt = model, batches, prompt
        self.kind = ""
        self.facts: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._folder, self._commands = folder, commands
        self._workers: dict[str, Worker] = {}
        self._used: dict[str, float] = {}

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stop()

    def references(self) -> list[str]:
        """Return the float variants that run.

        Raises:
            ModelError: None runs, so there is nothing to compare with.
        """
        found = [name for name in BASELINES if name in self.facts]
        if not found:
            raise ModelError(f"no float variant of {self.model!r} runs: {' '.join(self.notes)}")
        return found

    def compared(self) -> list[str]:
        """Return the variants with the right output.

        Raises:
            ModelError: No float variant is among them.
        """
        found = [name for name, facts in self.facts.items() if facts["cosine"] >= SAME]
        if not set(found) & set(self.references()):
            raise ModelError(f"no float variant of {self.model!r} has the right output: {' '.join(self.notes)}")
        return found

    def add(self, name: str) -> None:
        """Start the process of a variant; if that fails, note why."""
        if why := _missing(VARIANTS.get(name)) or self._crowded(name):
            self.notes.append(f"{name}: {why}.")
            return
        file = self._folder / str(len(list(self._folder.iterdir())))
        package = f"{file}.pt2" if name in VARIANTS and VARIANTS[name].exported else ""
        job = Job(self.model, name, self.batches, self.prompt, self.kind, f"{file}.outputs", package)
        try:
            exported = self._start(job, file) if package else None
            if exported:
                exported[0].stop()
            worker, answer = self._start(job, file)
        except (WorkerError, _FailedError) as error:
            self.notes.append(f"{name}: {error}.")
            return
        if exported:
            answer["compile"] = exported[1]["compile"]
        if answer["note"]:
            self.notes.append(f"{name}: {answer['note']}.")
        self.kind = answer["kind"]
        self.facts[name] = answer | {"outputs": job.outputs}
        self._workers[name] = worker
        self.notes += [f"{name}: {text}" for text in answer["warnings"]]

    def _start(self, job: Job, file: Path) -> tuple[Worker, dict[str, Any]]:
        command = self._commands.get(job.variant, [sys.executable, "-m", "int8compile.app.variants"])
        # Compiled code is cached in a new folder, so that compile time is that of a first run.
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": f"{file}.inductor",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        worker = Worker([*command, json.dumps(job._asdict())], Path(f"{file}.log"), **environment)
        try:
            answer = worker.answer()
        except BaseException:
            worker.stop()
            raise
        if "error" in answer:
            worker.stop()
            # A model that cannot be loaded is the caller's mistake, and the same for all variants.
            raise (ModelError if answer["model"] and not self.facts else _FailedError)(answer["error"])
        return worker, answer

    def _crowded(self, name: str) -> str:
        """Return why the process of a variant may not fit into the memory; "" if it fits."""
        peaks: dict[str, int] = {}
        for other, facts in self.facts.items():
            peaks[_dtype(other)] = max(peaks.get(_dtype(other), 0), facts["peak"] or 0)
        needed = MARGIN * peaks.get(_dtype(name), max(peaks.values(), default=0))
        free = machine.read_bytes(MEMORY, "MemAvailable")
        if free is None or free > needed:
            return ""
        return (
            f"not measured, since {needed / 2**30:.1f} GiB may be needed beside the other variants and "
            f"{free / 2**30:.1f} GiB of memory are left; choose fewer variants"
        )

    def compare(self) -> None:
        """Compare the outputs of the first calls with those of the first float variant, and note wrong ones."""
        reference = self.references()[0]
        expected = torch.load(self.facts[reference]["outputs"])
        for name, facts in self.facts.items():
            found = torch.load(facts["outputs"])
            facts["cosine"] = min(cosine(expected[case], output) for case, output in found.items() if case in expected)
            facts["kl"] = None
            if self.kind == DECODE:
                pairs = [(expected[case], output) for case, output in found.items() if case in expected]
                distances = torch.cat([divergence(one, other) for one, other in pairs])
                facts["kl"] = float(distances.mean()) if distances.isfinite().all() else None
            if not facts["cosine"] >= SAME:  # Also if it is not a number.
                self.notes.append(
                    f"{name}: its output is wrong (cosine {facts['cosine']:.2f} to that of {reference}), so its speed "
                    "is not compared."
                )

    def round(self) -> dict[str, dict[str, float]]:
        """Give each process a turn in each case, and return the seconds of a call, by case and variant.

        Raises:
            ModelError: No float variant is left to compare with.
        """
        found: dict[str, dict[str, float]] = {}
        for case in next(iter(self.facts.values()))["cases"]:
            found[case] = {}
            for name, worker in list(self._workers.items()):
                if case not in self.facts[name]["cases"]:
                    continue
                try:
                    answer = worker.ask(case)
                except WorkerError as error:
                    self.notes.append(f"{name}: {error}.")
                    del self._workers[name], self.facts[name]
                    worker.stop()
                    continue
                found[case][name], self._used[name] = answer["seconds"], answer["cpu"]
                time.sleep(PAUSE)
        self.compared()
        return found

    def cpu(self) -> float:
        """Return the CPU seconds that the processes had used at the end of their last turns."""
        return sum(self._used[name] for name in self._workers)


def _dtype(name: str) -> str:
    """Return the dtype of a variant's float parts; other programs' weights have 16 bits at most."""
    return VARIANTS[name].dtype if name in VARIANTS else "bfloat16"


class _FailedError(Exception):
    """A variant cannot run; the message says why."""


def _missing(variant: Variant | None) -> str:
    package = variant.package if variant else ""
    return f"{package} is not installed" if package and not peers.installed(package) else ""


def cosine(expected: Tensor, found: Tensor) -> float:
    """Return the cosine between two tensors, computed in float64."""
    return float(torch.cosine_similarity(expected.flatten().double(), found.flatten().double(), dim=0))


def _result(race: _Race, rounds: Sequence[Mapping[str, Mapping[str, float]]], others: float | None) -> dict[str, Any]:
    kept = list(race.facts)
    compared = race.compared()
    cases = {}
    for case in rounds[0]:
        seconds = {name: [each[case][name] for each in rounds] for name in kept if name in rounds[-1][case]}
        times = Times(seconds, others)
        baseline = times.fastest([name for name in race.references() if name in compared])
        cases[case] = {
            # Per call; the time per token at a batch is that of a step, divided by the batch.
            "tokens": race.prompt if case == PREFILL else int(case.split()[-1]),
            "baseline": baseline,
            "seconds": {name: rounded(times.median(name)) for name in seconds},
            "ratios": {
                name: [rounded(value) for value in times.interval(name, baseline)]
                for name in seconds
                if name in compared
            },
        }
    return {
        "model": race.model,
        "kind": race.kind,
        "batches": list(race.batches),
        "prompt": race.prompt,
        "rounds": len(rounds),
        "others": None if others is None else round(others, 4),
        "machine": machine.facts(),
        "cases": cases,
        "variants": {name: _costs(name, race.facts) for name in kept},
        "notes": list(dict.fromkeys([*race.notes, *_busy(others), MADE_UP])),
    }


def _costs(name: str, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    own = facts[name]
    # An export compiles fewer cases than Inductor does here.
    inductor = VARIANTS[name].dtype if name in VARIANTS and not VARIANTS[name].exported else ""
    return {
        "load": rounded(own["load"], 3),
        "compile": None if own["compile"] is None else rounded(own["compile"], 3),
        # Times Inductor's compile time of the float model of the same dtype.
        "overhead": None
        if own["compile"] is None or inductor not in facts
        else rounded(own["compile"] / facts[inductor]["compile"], 3),
        "peak": own["peak"],
        "weights": own["weights"],
        "cosine": rounded(own["cosine"]),
        "kl": None if own["kl"] is None else rounded(own["kl"], 3),
    }


def _busy(others: float | None) -> Iterator[str]:
    if others is not None and others > BUSY:
        yield f"other processes used {others:.0%} of the CPU's time: measure again while they do not run."


def render(found: Mapping[str, Any], form: str = "simple") -> str:
    """Return a result of `measure` as text.

    Args:
        found: The result.
        form: A format of tabulate; "pipe" for Markdown.
    """
    decodes = found["kind"] == DECODE
    unit = "ms per token" if decodes else "ms per input"
    cells = {name: [name] for name in found["variants"]}
    headers = [unit]
    for case, about in found["cases"].items():
        headers.append(f"prompt of {found['prompt']}" if case == PREFILL else case)
        for name, row in cells.items():
            row.append(_cell(about, name))
    costs = [
        [
            name,
            f"{each['load']:.1f} s",
            _text(each["compile"], "{:.0f} s"),
            _text(each["overhead"], "{:.2f}"),
            _text(each["peak"], "{:.0f} MiB", 2**20),
            _text(each["weights"], "{:.0f} MiB", 2**20),
            f"{each['cosine']:.3f}",
            *([_text(each["kl"], "{:.4f}")] if decodes else []),
        ]
        for name, each in found["variants"].items()
    ]
    costs_headers = [
        "",
        "load",
        "compile",
        "x Inductor",
        "peak memory",
        "weights",
        "cosine",
        *(["KL"] if decodes else []),
    ]
    explained = (
        "In brackets, times faster than the baseline of the column, which is the faster of Inductor's float32 and "
        f"bfloat16, with its 95 % confidence interval over {found['rounds']} rounds."
    )
    missing = [name for name in BASELINES if not all(name in about["ratios"] for about in found["cases"].values())]
    if missing:
        (left,) = {about["baseline"] for about in found["cases"].values()}
        explained += (
            f" * {missing[0]} was not measured, or is wrong, so the baseline is {left}; ratios to the faster of "
            "the two may be smaller."
        )
    parts = [explained, _table(list(cells.values()), headers, form), _table(costs, costs_headers, form)]
    parts += ["\n".join(f"- {note}" for note in found["notes"])] if found["notes"] else []
    return "\n\n".join(parts)


def _cell(about: Mapping[str, Any], name: str) -> str:
    if name not in about["seconds"]:
        return ""
    shown = f"{1e3 * about['seconds'][name] / about['tokens']:.3g}"
    if name not in about["ratios"]:
        return f"{shown} (wrong)"
    if name == about["baseline"]:
        return f"{shown} (baseline)"
    low, middle, high = about["ratios"][name]
    mark = "" if all(each in about["ratios"] for each in BASELINES) else "*"
    return f"{shown} ({middle:.2f}{mark}, {low:.2f} to {high:.2f})"


def _text(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], form: str) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=align)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw the tokens, or other inputs, per second of each variant, in a group of bars for each case."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names, cases = list(found["variants"]), found["cases"]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [
            about["tokens"] / about["seconds"][name] if name in about["seconds"] else 0 for about in cases.values()
        ]
        # Wrong variants are hatched.
        wrong = found["variants"][name]["cosine"] < SAME
        axes.bar(
            [group + (i - (len(names) - 1) / 2) * width for group in range(len(cases))],
            heights,
            width,
            label=f"{name} (wrong)" if wrong else name,
            hatch="//" if wrong else None,
            color=colormaps["tab20"](i % 20),
        )
    axes.set_xticks(range(len(cases)), [f"prompt of {found['prompt']}" if name == PREFILL else name for name in cases])
    axes.set_yscale("log")
    axes.set_ylabel("tokens per second" if found["kind"] == DECODE else "inputs per second")
    axes.set_title(f"{found['model']}, {found['machine']['cpu']}, {found['machine']['threads']} threads", fontsize=9)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=100)
