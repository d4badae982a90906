"""The demo: SmolLM2-135M-Instruct in float32 and in int8, side by side on the CPU.

The model is compiled layer by layer (regional compilation). Its 30 layers run the same code, so one graph per input
shape serves all of them, and compiling takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from int8compile.app import loading
from int8compile.app.decoding import Decoder, Timing, compare_speed
from int8compile.errors import ModelError
from int8compile.explaining import explain
from int8compile.report import Report, percent, readable
from int8compile.stored.convert import dequantize_, memory_footprint
from int8compile.stored.modules import Int8Module
from int8compile.tuning.candidates import FLOAT, STORED
from int8compile.tuning.evaluation import Result, evaluate
from int8compile.tuning.texts import TOPICS, text_chunks
from int8compile.weights import STORE

Write = Callable[[str], object]
QUESTION = (
    "Large language models spend most of their time reading weights from memory. Stored as 16 bit numbers, the weights "
    "of a model with seven billion parameters take fourteen gigabytes, and every one of those bytes is read once for "
    "each token that is generated. Stored as 8 bit integers they take half of that, so half the bytes are read. The "
    "price is rounding: each weight becomes the nearest of 255 levels, and the inputs of a layer are rounded in the "
    "same way. A few of those inputs are a hundred times larger than all the others, and if they set the scale, "
    "everything else is rounded to zero. So they are all mixed with each other first, after which few are large, and "
    "those few get a second digit.\n\n"
    "In your own words: why does a language model run faster with 8 bit weights?"
)
# The names of the models in the tables, besides FLOAT and STORED.
DEFAULT, CALIBRATED = "int8", "int8, calibrated"
COLUMN = 'outliers="column"'


# Each decoder compiles the code of a layer as two graphs. The limit of Dynamo is 8.
@torch._dynamo.config.patch(recompile_limit=32)  # type: ignore[untyped-decorator]
def run(
    write: Write, name: str = loading.SMOLLM2, *, tokens: int = 32, prompt: str | None = None, accuracy: bool = True
) -> None:
    """Run the whole demo.

    Args:
        write: Takes each piece of the output, as `print` does.
        name: The model, see `loading.load`. An int8 checkpoint is compared with its own dequantized weights.
        tokens: The number of tokens to generate.
        prompt: The question to the model; None is the built-in question.
        accuracy: Whether to compare with the float model on text.

    Raises:
        ModelError: The model cannot be loaded or is not like Llama, or a package is not installed.
    """
    loading.gguf_file(name)  # Raises an error before any output if the model is not installed.
    clock = _Clock(write)
    with clock.part(f"Loading {'SmolLM2-135M-Instruct' if name == loading.SMOLLM2 else name}"):
        model: Any = loading.load(name)
        tokenizer = loading.load_processor(name)
        _check_like_llama(name, model, tokenizer)
        stored = any(isinstance(module, Int8Module) for module in model.modules())
        full = copy.deepcopy(model) if stored else model
        dequantize_(full)
        parameters = sum(parameter.numel() for parameter in full.parameters())
        kept = f"{readable(memory_footprint(model))} in memory with its linears in int8" if stored else "float32"
        write(f"{parameters / 1e6:.0f} million parameters, {kept}; CPU with {torch.get_num_threads()} threads.")
    with clock.part('What torch.compile(model, backend="int8") rewrites'):
        report = explain(model, **loading.example_inputs(model))
        write(describe(report))
        if not stored:
            write("")
            write(sizes(model, report))
    with clock.part("Compiling layer by layer, and generating"):
        ids = _tokens(tokenizer, QUESTION if prompt is None else prompt)
        _generate(write, full, model, tokenizer, ids, tokens, notes=report.notes, stored=stored)
    if accuracy:
        with clock.part("Accuracy"):
            write(compare_accuracy(model, text_chunks(tokenizer), stored=stored))
    clock.summary()


def _generate(
    write: Write,
    full: Any,
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    count: int,
    *,
    notes: Sequence[str],
    stored: bool,
) -> None:
    """Generate text with the float and the int8 models, and write their speeds and their texts."""
    length = ids.shape[1] + count
    half = copy.deepcopy(full).to(torch.bfloat16)
    int8_half = copy.deepcopy(model).to(torch.bfloat16) if stored else half
    decoders = {
        "float32": Decoder(full, length, {}),
        "bfloat16": Decoder(half, length, {}),
        "int8": Decoder(model, length, {"backend": "int8"}),
        "int8, rest in bfloat16": Decoder(int8_half, length, {"backend": "int8"}),
    }
    quantized = STORE.quantized
    timings = compare_speed(decoders, ids, count, tokenizer.eos_token_id, progress=True)
    write(speeds(timings, ids.shape[1]))
    for note in notes:
        write(_wrapped(f"{note}."))
    made = f"; {STORE.quantized - quantized} weights were quantized, once each for each of the two int8 models"
    write(
        _wrapped(
            f"One graph for the prompt and one for a single token serve all {len(model.model.layers)} layers"
            f"{'' if stored else made}."
        )
    )
    texts = {name: timings[name] for name in ("float32", "int8")}
    for name, timing in texts.items():
        write(f"\n{name} wrote:")
        write(_wrapped(tokenizer.decode(timing.tokens), indent="  "))
    write("\n" + agreement(texts))


def _check_like_llama(name: str, model: Any, tokenizer: Any) -> None:
    parts = ("layers", "embed_tokens", "norm", "rotary_emb")
    inner = getattr(model, "model", None)
    if tokenizer is None or not hasattr(model, "lm_head") or not all(hasattr(inner, part) for part in parts):
        found = type(model).__name__ + (" without a tokenizer" if tokenizer is None else "")
        raise ModelError(f"{name!r} is {found}; the demo needs a Llama-like language model that has its tokenizer")


def _tokens(tokenizer: Any, text: str) -> Tensor:
    ids: Tensor
    if getattr(tokenizer, "chat_template", "") is None:
        ids = tokenizer(text, return_tensors="pt").input_ids
    else:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
    return ids


def describe(report: Report) -> str:
    """Return a table of the linears, one row for all layers, and the reasons why some stay in float."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for site in report.sites:
        name = re.sub(r"\.\d+\.", ".*.", site.path)
        group = groups.setdefault((name, " x ".join(site.shape[-2:]), "int8" if site.rewritten else "float"), [0, 0, 0])
        for i, value in enumerate((1, site.bytes_before, site.bytes_after)):
            group[i] += value
    rows = [
        (name, count, shape, kind, readable(before), readable(after))
        for (name, shape, kind), (count, before, after) in groups.items()
    ]
    headers = ("module", "count", "K x N", "runs in", "before", "after")
    table = tabulate(rows, headers=headers, colalign=("left", "right", "left", "left", "right", "right"))
    reasons = dict.fromkeys(f"{site.path} stays in float: {site.why()}." for site in report.skipped)
    return "\n".join([table, "", f"{report.summary()}.", *reasons])


def sizes(model: nn.Module, report: Report) -> str:
    """Return a table of bytes, of the rewritten linears and of the whole model."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    before = sum({site.weight: site.bytes_before for site in report.rewritten}.values())
    after = sum({(site.weight, site.layout): site.bytes_after for site in report.rewritten}.values())
    rows = [
        ("rewritten linears", before, after),
        ("everything else (embedding, norms, layers in float)", total - before, total - before),
        ("whole model", total, total - before + after),
    ]
    table = tabulate(
        [(name, readable(old), readable(new), f"{old / new:.2f}x") for name, old, new in rows],
        headers=("weights", "float32", "int8", "smaller"),
        colalign=("left", "right", "right", "right"),
    )
    return (
        f"{table}\nThe model keeps its float weights beside the int8 ones, so that it can still be used without "
        'compiling;\noptions={"free_weights": True} gives their memory back.'
    )


def speeds(timings: Mapping[str, Timing], prompt: int) -> str:
    """Return a table of compile times and tokens per second, and the ratio of int8 to the faster float model.

    Args:
        timings: Timings by name; the names of int8 models begin with "int8".
        prompt: The number of tokens in the prompt.
    """
    reading = {name: prompt / statistics.median(timing.prefill) for name, timing in timings.items()}
    writing = {name: 1 / statistics.median(timing.steps or [math.nan]) for name, timing in timings.items()}
    rows = [
        (name, f"{timing.compiling:.1f} s", timing.graphs, f"{reading[name]:.0f}", f"{writing[name]:.1f}")
        for name, timing in timings.items()
    ]
    headers = ("", "compiling", "graphs", f"prompt of {prompt} [tokens/s]", "generating [tokens/s]")
    lines = [tabulate(rows, headers=headers, disable_numparse=True, stralign="right")]
    floats = [name for name in timings if not name.startswith("int8")]
    for name in timings:
        if name not in floats:
            read, wrote = (_times(rate[name] / max(rate[each] for each in floats)) for rate in (reading, writing))
            lines.append(
                f"Here {name} is {read} than the faster of {' and '.join(floats)} at reading the prompt and {wrote} "
                "at generating."
            )
    lines.append(f"{next(iter(timings))} is compiled first, so the start of the compiler counts as part of its time.")
    return "\n".join(_wrapped(line) if line.startswith("Here") else line for line in lines)


def agreement(timings: Mapping[str, Timing]) -> str:
    """Return a sentence on how many tokens two models wrote before they differ."""
    (first, one), (second, other) = ((name, timing.tokens) for name, timing in timings.items())
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if same == len(one) == len(other):
        return f"Both wrote the same {same} tokens."
    return f"The first {same} tokens are the same; {first} wrote {len(one)} and {second} {len(other)}."


def compare_accuracy(model: nn.Module, chunks: Sequence[Tensor], *, stored: bool) -> str:
    """Compare a model in int8 with its floats on text, in a table and a picture.

    Args:
        model: The model.
        chunks: The text as tokens, [1, T] each.
        stored: Whether `model` is already int8, with a policy of its own.
    """
    configs = {} if stored else {DEFAULT: "default", CALIBRATED: "calibrated", COLUMN: "column"}
    return accuracies(evaluate(model, list(chunks), configs).results)


def accuracies(found: Mapping[str, Result]) -> str:
    """Return a table of accuracies by name with an explanation, and a picture of the divergences."""
    rows = [
        (name, f"{result.kl:.4f}", f"{result.top1:.1%}", f"{result.perplexity:.3f}", percent(result.outliers))
        for name, result in found.items()
    ]
    headers = ("", "KL divergence [nats]", "same most likely token", "perplexity", "outliers")
    if STORED in found:
        note = "float32 has the dequantized weights of the stored model, so only the activations differ."
    else:
        note = (
            f"{CALIBRATED}: after int8compile.calibrate(model), which gives the model random tokens.\n"
            f"{COLUMN}: LLM.int8() as bitsandbytes computes it. Its outliers are columns in float; elsewhere they are "
            "elements with a second digit."
        )
    measured = (
        f"int8 against float32 on {next(iter(found.values())).positions} tokens of English, the running text of the "
        f"chapters {', '.join(TOPICS)} of the language reference that comes with Python:"
    )
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4))
    picture = bars({name: result.kl or 0.0 for name, result in found.items() if name != FLOAT})
    return "\n".join([_wrapped(measured), "", table, _wrapped(note), "", "KL divergence:", picture])


def bars(values: Mapping[str, float], width: int = 60) -> str:
    """Draw numbers as bars of text, the largest of them `width` letters long."""
    longest = max(values.values(), default=0.0) or 1.0
    rows = [(name, "█" * max(1, round(width * value / longest)), f"{value:.4f}") for name, value in values.items()]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


class _Clock:
    """Writes the titles of the parts of the demo, and measures the time of each."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._parts: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        title = f"{len(self._parts) + 1}. {name}"
        self._write(f"{title}\n{'=' * len(title)}")
        began = time.perf_counter()
        yield
        self._parts.append((name, time.perf_counter() - began))
        self._write("")

    def summary(self) -> None:
        rows = [*self._parts, ("Total", sum(seconds for _, seconds in self._parts))]
        self._write(tabulate([(name, f"{seconds:.0f} s") for name, seconds in rows], tablefmt="plain"))


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def _wrapped(text: str, indent: str = "") -> str:
    lines = text.splitlines()
    return "\n".join(textwrap.fill(line, 110, initial_indent=indent, subsequent_indent=indent) for line in lines)
