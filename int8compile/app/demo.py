"""The demo: SmolLM2-135M-Instruct in float32 and in int8, side by side on the CPU.

The model is compiled layer by layer (regional compilation): its 30 layers run the same code, so one graph per input
shape serves all of them, and compiling takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from tqdm import tqdm

from int8compile.app import loading
from int8compile.errors import ModelError
from int8compile.explaining import explain
from int8compile.report import Report, percent, readable
from int8compile.stored.convert import dequantize_, memory_footprint
from int8compile.stored.modules import Int8Module
from int8compile.tuning.calibration import calibrate
from int8compile.weights import STORE

Logits = Callable[[Tensor], Tensor]
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
TOPICS = ("objects", "execmodel", "import")
# Names of what is compared.
FLOAT, STORED, DEFAULT, CALIBRATED = "float32", "as stored", "int8", "int8, calibrated"
COLUMN = 'outliers="column"'
# How often the prompt is read for the median of its time.
PREFILLS = 5


class LayerCache:
    """Keys and values of one layer, in tensors of a fixed size; it has the interface of a transformers cache.

    transformers' own caches hold all layers and are asked for one by its number, which the compiled code of a layer
    would then depend on: 30 layers would be compiled 30 times.

    Attributes:
        keys: [1, heads, length, head_dim].
        values: Same.
        positions: [T] int64, where the next call to `update` writes.
    """

    def __init__(self, heads: int, length: int, head_dim: int, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(1, heads, length, head_dim, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.zeros(0, dtype=torch.int64)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of new positions.

        Returns:
            The keys and values of all positions; those not written yet must be masked.

        Shapes:
            keys, values: [1, heads, T, head_dim]; results: [1, heads, length, head_dim].
        """
        return (
            self.keys.index_copy_(2, self.positions, keys),
            self.values.index_copy_(2, self.positions, values),
        )


def layer_caches(model: Any, length: int) -> list[LayerCache]:
    """A cache with room for `length` tokens for each layer of a Llama-like transformers model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [LayerCache(config.num_key_value_heads, length, head_dim, model.dtype) for _ in model.model.layers]


def run_layers(
    model: Any, layers: Sequence[Any], caches: Sequence[LayerCache], slots: Tensor, ids: Tensor, positions: Tensor
) -> Tensor:
    """The hidden states behind a Llama-like model's layers, before its last norm.

    Shapes:
        slots: [length], the positions there is room for; ids: [1, T]; positions: [T]; result: [1, T, hidden_size].
    """
    hidden: Tensor = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, positions[None])
    mask = (slots <= positions[:, None])[None, None]  # True where a position is attended to.
    for layer, cache in zip(layers, caches, strict=True):
        cache.positions = positions
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
    return hidden


class Decoder:
    """Runs a Llama-like transformers model step by step, through layers that may be compiled.

    The layers of several decoders share the model's weights.

    Args:
        model: A `LlamaForCausalLM`, or a model of the same structure.
        length: Tokens that there is room for.
        compiler: Arguments of `torch.compile` for each layer; None runs them as they are.
    """

    def __init__(self, model: Any, length: int, compiler: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.layers = list(model.model.layers)
        if compiler is not None:
            self.layers = [torch.compile(layer, fullgraph=True, dynamic=False, **compiler) for layer in self.layers]
        self.caches = layer_caches(model, length)
        self.slots = torch.arange(length)

    @torch.no_grad()
    def __call__(self, ids: Tensor, start: int = 0, last: int = 0) -> Tensor:
        """The logits of the next tokens; `start` tokens were given before.

        Shapes:
            ids: [1, T]; result: [1, T, vocabulary], or only the `last` positions of it if that is not 0.
        """
        positions = self.slots[start : start + ids.shape[1]]
        hidden = run_layers(self.model, self.layers, self.caches, self.slots, ids, positions)
        result: Tensor = self.model.lm_head(self.model.model.norm(hidden[:, -last:]))
        return result


def generate(decoder: Decoder, prompt: Tensor, count: int, end: int | None = None) -> Iterator[int]:
    """Generates greedily, a token whenever one is asked for.

    Args:
        decoder: The model; its cache is written from the beginning.
        prompt: [1, T] tokens.
        count: The most tokens to generate.
        end: The token that ends the text; it is not returned.
    """
    ids, start = prompt, 0
    for _ in range(count):
        token = int(decoder(ids, start, last=1).argmax())
        if token == end:
            return
        yield token
        ids, start = torch.tensor([[token]]), start + ids.shape[1]


class Accuracy(NamedTuple):
    """How close the next-token distributions of two models are.

    Attributes:
        kl: Mean over positions of KL(reference || candidate), in nats.
        top1: Share of positions whose most likely token is the same.
        perplexity: Of the candidate.
        positions: How many positions were compared.
    """

    kl: float
    top1: float
    perplexity: float
    positions: int


def evaluate(
    reference: Logits, candidates: Mapping[str, Logits], chunks: Sequence[Tensor], progress: bool = False
) -> dict[str, Accuracy]:
    """Compares models with a reference on text.

    Args:
        reference: Makes logits [1, T, vocabulary] of tokens [1, T].
        candidates: The same, for each model to be compared.
        chunks: Texts as tokens, [1, T] each.
        progress: Whether to show a progress bar.
    """
    kl, surprise = (dict.fromkeys(candidates, 0.0) for _ in range(2))
    agreed = dict.fromkeys(candidates, 0)
    bar = tqdm(total=len(chunks) * (1 + len(candidates)), desc="Comparing", disable=not progress, leave=False)
    with bar, torch.no_grad():
        for chunk in chunks:
            expected = reference(chunk)
            bar.update()
            for name, candidate in candidates.items():
                logits = candidate(chunk)
                kl[name] += float(divergence(expected, logits).sum())
                surprise[name] += float(F.cross_entropy(logits[0, :-1].float(), chunk[0, 1:], reduction="sum"))
                agreed[name] += int((expected.argmax(-1) == logits.argmax(-1)).sum())
                bar.update()
    positions = sum(chunk.numel() for chunk in chunks)
    predicted = positions - len(chunks)
    return {
        name: Accuracy(kl[name] / positions, agreed[name] / positions, math.exp(surprise[name] / predicted), positions)
        for name in candidates
    }


def divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) at each position, in nats.

    Shapes:
        reference, candidate: [1, T, vocabulary] logits; result: [T] float64.
    """
    rows = []
    # In pieces: a thousand positions of 49152 tokens take 400 MB in float64.
    for p, q in zip(reference[0].split(128), candidate[0].split(128), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(rows)


def text_chunks(tokenizer: Any, count: int = 2, length: int = 1024) -> list[Tensor]:
    """English that every Python has: the running text of chapters of the language reference (`help("objects")`, ...).

    Args:
        tokenizer: A transformers tokenizer.
        count: How many chunks.
        length: Tokens in each.

    Returns:
        Tokens, [1, length] each.
    """
    ids = tokenizer(prose(TOPICS), return_tensors="pt").input_ids
    return [ids[:, begin : begin + length] for begin in range(0, count * length, length)]


def prose(chapters: Sequence[str]) -> str:
    """Return the running text of chapters of the language reference."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in chapters for part in topics[name].split("\n\n")]
    # Indented paragraphs are code and lists; short ones are headings.
    return "\n\n".join(" ".join(part.split()) for part in paragraphs if len(part) >= 200 and not part[0].isspace())


@dataclasses.dataclass
class Timing:
    """What a decoder wrote, and how long it took.

    Attributes:
        compiling: Seconds for the first prompt and the first step, in which it is compiled.
        graphs: How many graphs were compiled.
        prefill: Seconds for the prompt, up to the first token; several times.
        steps: Seconds for each further token.
        tokens: What it wrote.
    """

    compiling: float
    graphs: int
    prefill: list[float] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def compare_speed(
    decoders: Mapping[str, Decoder], prompt: Tensor, count: int, end: int | None = None, progress: bool = False
) -> dict[str, Timing]:
    """Compiles decoders and has them generate in turns, step by step: what else the machine does meets all of them.

    Args:
        decoders: By name, with room for `count` tokens after the prompt.
        prompt: [1, T] tokens.
        count: The most tokens to generate.
        end: The token that ends the text.
        progress: Whether to show a progress bar.
    """
    timings = {}
    with tqdm(total=len(decoders) * (1 + PREFILLS + count), disable=not progress, leave=False) as bar:
        for name, decoder in decoders.items():
            bar.set_description(f"Compiling {name}")
            before, began = compiled_graphs(), time.perf_counter()
            decoder(prompt, last=1)
            decoder(prompt[:, -1:], prompt.shape[1], last=1)
            timings[name] = Timing(time.perf_counter() - began, compiled_graphs() - before)
            bar.update()
        bar.set_description("Generating")
        for _ in range(PREFILLS):
            for name, decoder in decoders.items():
                began = time.perf_counter()
                decoder(prompt, last=1)
                timings[name].prefill.append(time.perf_counter() - began)
                bar.update()
        streams = {name: generate(decoder, prompt, count, end) for name, decoder in decoders.items()}
        while streams:
            for name, stream in list(streams.items()):
                began = time.perf_counter()
                token = next(stream, None)
                seconds = time.perf_counter() - began
                if token is None:
                    del streams[name]
                    continue
                if timings[name].tokens:  # The first one comes with the prompt.
                    timings[name].steps.append(seconds)
                timings[name].tokens.append(token)
                bar.update()
    return timings


def compiled_graphs() -> int:
    """How many graphs Dynamo has given to a backend in this process."""
    return int(counters["stats"]["unique_graphs"])


# All decoders compile the code of a layer: two graphs each, and two more for accuracy. Dynamo gives up at 8.
@torch._dynamo.config.patch(recompile_limit=32)  # type: ignore[untyped-decorator]
def run(
    write: Write, name: str = loading.SMOLLM2, *, tokens: int = 32, prompt: str | None = None, accuracy: bool = True
) -> None:
    """Runs the whole demo.

    Args:
        write: Takes each piece of the output, as `print` does.
        name: The model, see `loading.load`. One that was saved in int8 is compared with the floats it stands for.
        tokens: How many tokens to generate.
        prompt: What to ask the model; None asks the built-in question.
        accuracy: Whether to compare with the float model on text.

    Raises:
        ModelError: The model cannot be loaded, is not like Llama, or its package or transformers is not installed.
    """
    loading.gguf_file(name)  # Where it is not installed that is said before anything is written.
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
        length = ids.shape[1] + tokens
        half = copy.deepcopy(full).to(torch.bfloat16)
        int8_half = copy.deepcopy(model).to(torch.bfloat16) if stored else half
        decoders = {
            "float32": Decoder(full, length, {}),
            "bfloat16": Decoder(half, length, {}),
            "int8": Decoder(model, length, {"backend": "int8"}),
            "int8, rest in bfloat16": Decoder(int8_half, length, {"backend": "int8"}),
        }
        quantized = STORE.quantized
        timings = compare_speed(decoders, ids, tokens, tokenizer.eos_token_id, progress=True)
        write(speeds(timings, ids.shape[1]))
        for note in report.notes:
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
    if accuracy:
        with clock.part("Accuracy"):
            write(compare_accuracy(full, model, text_chunks(tokenizer), stored=stored))
    clock.summary()


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
    """A table of the linears, those of different layers together, and why some stay in float."""
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
    """A table of bytes: the linears that are rewritten, and the whole model."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    before = sum({site.weight: site.bytes_before for site in report.rewritten}.values())
    after = sum({(site.weight, site.layout): site.bytes_after for site in report.rewritten}.values())
    rows = [
        ("rewritten linears", before, after),
        ("all else (embedding, norms, what stays in float)", total - before, total - before),
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
    """A table of compile times and of tokens per second, and how int8 compares with the faster of the float models.

    Args:
        timings: By name; those of int8 begin with "int8".
        prompt: Tokens of the prompt.
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
    """How many tokens two models wrote before they differ."""
    (first, one), (second, other) = ((name, timing.tokens) for name, timing in timings.items())
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if same == len(one) == len(other):
        return f"Both wrote the same {same} tokens."
    return f"The first {same} tokens are the same; {first} wrote {len(one)} and {second} {len(other)}."


def compare_accuracy(full: Any, model: Any, chunks: Sequence[Tensor], *, stored: bool) -> str:
    """Compare a model in int8 with its floats on text, in a table and a picture.

    Args:
        full: The model in float.
        model: The model that is to run in int8; it is calibrated here, if it is not int8 already.
        chunks: The text as tokens, [1, T] each.
        stored: Whether it is int8 already. Then it brings its policy along.
    """
    shares: dict[str, float | None] = {FLOAT: None}

    @functools.lru_cache(maxsize=1)
    def logits(chunk: Tensor) -> Tensor:
        result: Tensor = full(chunk, use_cache=False).logits
        return result

    def compare(policies: Mapping[str, Mapping[str, Any]], **others: Logits) -> dict[str, Accuracy]:
        decoders = {
            name: Decoder(model, chunks[0].shape[1], {"backend": "int8", "options": options})
            for name, options in policies.items()
        }
        for name, options in policies.items():
            # Some rows are enough to count in.
            shares[name] = outliers(explain(model, chunks[0][:, :256], use_cache=False, config=options))
        return evaluate(logits, {**others, **decoders}, chunks, progress=True)

    # The float model with itself, for its perplexity.
    itself = {FLOAT: logits}
    if stored:
        found = compare({STORED: {}}, **itself)
    else:
        found = compare({DEFAULT: {}, COLUMN: {"outliers": "column"}}, **itself)
        calibrate(model)
        found |= compare({CALIBRATED: {}})
    return accuracies(found, shares)


def outliers(report: Report) -> float | None:
    """Return the share of outliers among the activations of all linears; None where none of them counted any."""
    seen = [(site.outliers, int(site.shape[-2])) for site in report.rewritten if site.outliers is not None]
    return sum(share * k for share, k in seen) / sum(k for _, k in seen) if seen else None


def accuracies(found: Mapping[str, Accuracy], shares: Mapping[str, float | None]) -> str:
    """Return a table of accuracies, by name, with what was measured, and a picture of the divergences.

    Args:
        found: The accuracies.
        shares: Of outliers among activations, by the same names.
    """
    order = [name for name in (FLOAT, STORED, DEFAULT, CALIBRATED, COLUMN) if name in found]
    rows = [
        (
            name,
            f"{found[name].kl:.4f}",
            f"{found[name].top1:.1%}",
            f"{found[name].perplexity:.3f}",
            percent(shares[name]),
        )
        for name in order
    ]
    headers = ("", "KL divergence [nats]", "same most likely token", "perplexity", "outliers")
    if STORED in found:
        note = "float32 has the weights that the stored int8 stands for: compared is how activations are quantized."
    else:
        note = (
            f"{CALIBRATED}: after int8compile.calibrate(model), which gives the model random tokens.\n"
            f"{COLUMN}: LLM.int8() as bitsandbytes computes it. Its outliers are columns in float, those of the others "
            "have a second digit."
        )
    measured = (
        f"int8 against float32 on {next(iter(found.values())).positions} tokens of English, the running text of the "
        f"chapters {', '.join(TOPICS)} of the language reference that comes with Python:"
    )
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4))
    picture = bars({name: found[name].kl for name in order if name != FLOAT})
    return "\n".join([_wrapped(measured), "", table, _wrapped(note), "", "KL divergence:", picture])


def bars(values: Mapping[str, float], width: int = 60) -> str:
    """Draw numbers as bars of text, the largest of them `width` letters long."""
    longest = max(values.values(), default=0.0) or 1.0
    rows = [(name, "█" * max(1, round(width * value / longest)), f"{value:.4f}") for name, value in values.items()]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


class _Clock:
    """Announces the parts of the demo and remembers how long each took."""

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
