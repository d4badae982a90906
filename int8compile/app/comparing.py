"""Compare models: the accuracy of their predictions on text, and the speed of their generation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from int8compile.app.decoding import Decoder, generate
from int8compile.progress import progress_bar

Logits = Callable[[Tensor], Tensor]
TOPICS = ("objects", "execmodel", "import")
# The number of times that the prompt is read, for the median.
PREFILLS = 5


class Accuracy(NamedTuple):
    """The distance between the next-token distributions of two models.

    Attributes:
        kl: Mean over positions of KL(reference || candidate), in nats.
        top1: Share of positions whose most likely token is the same.
        perplexity: The perplexity of the candidate.
        positions: The number of positions.
    """

    kl: float
    top1: float
    perplexity: float
    positions: int


def evaluate(
    reference: Logits, candidates: Mapping[str, Logits], chunks: Sequence[Tensor], progress: bool = False
) -> dict[str, Accuracy]:
    """Compare models with a reference on text.

    Args:
        reference: Returns the logits [1, T, vocabulary] of tokens [1, T].
        candidates: The same for each model to compare, by name.
        chunks: Texts as tokens, [1, T] each.
        progress: Whether to show a progress bar.
    """
    kl, surprise = (dict.fromkeys(candidates, 0.0) for _ in range(2))
    agreed = dict.fromkeys(candidates, 0)
    bar = progress_bar(total=len(chunks) * (1 + len(candidates)), desc="Comparing", shown=progress)
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
    """Return KL(reference || candidate) at each position, in nats.

    Shapes:
        reference, candidate: [1, T, vocabulary] logits; result: [T] float64.
    """
    rows = []
    # In parts: a thousand positions of 49152 tokens take 400 MB in float64.
    for p, q in zip(reference[0].split(128), candidate[0].split(128), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(rows)


def text_chunks(tokenizer: Any, count: int = 2, length: int = 1024) -> list[Tensor]:
    """Return English text that comes with Python, as tokens: `prose` of the language reference.

    Args:
        tokenizer: A transformers tokenizer.
        count: The number of chunks.
        length: Tokens in each.

    Returns:
        Tokens, [1, length] each.
    """
    ids = tokenizer(prose(TOPICS), return_tensors="pt").input_ids
    return [ids[:, begin : begin + length] for begin in range(0, count * length, length)]


def prose(chapters: Sequence[str]) -> str:
    """Return the running text of chapters of the language reference, as `help("objects")` shows them."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in chapters for part in topics[name].split("\n\n")]
    # Indented paragraphs are code and lists; short ones are headings.
    return "\n\n".join(" ".join(part.split()) for part in paragraphs if len(part) >= 200 and not part[0].isspace())


@dataclasses.dataclass
class Timing:
    """The tokens that a decoder generated, and the time it took.

    Attributes:
        compiling: Seconds for the first prompt and the first step, which include compilation.
        graphs: The number of compiled graphs.
        prefill: Seconds for the prompt up to the first token, measured several times.
        steps: Seconds for each further token.
        tokens: The generated tokens.
    """

    compiling: float
    graphs: int
    prefill: list[float] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def compare_speed(
    decoders: Mapping[str, Decoder], prompt: Tensor, count: int, end: int | None = None, progress: bool = False
) -> dict[str, Timing]:
    """Compile decoders and have them generate in turns, step by step, so that other load slows all of them alike.

    Args:
        decoders: Decoders by name, with room for `count` tokens after the prompt.
        prompt: [1, T] tokens.
        count: The most tokens to generate.
        end: The token that ends the text.
        progress: Whether to show a progress bar.
    """
    timings = {}
    with progress_bar(total=len(decoders) * (1 + PREFILLS + count), shown=progress) as bar:
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
    """Return the number of graphs that Dynamo has given to a backend in this process."""
    return int(counters["stats"]["unique_graphs"])
