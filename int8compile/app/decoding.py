"""Run a Llama-like model of transformers layer by layer, so that one compiled graph serves all layers, and time it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from int8compile.progress import progress_bar

# The number of times that the prompt is read, for the median.
PREFILLS = 5


class LayerCache:
    """Keys and values of one layer in tensors of a fixed size, with the interface of a transformers cache.

    The caches of transformers hold all layers and look one up by its number. The compiled code of a layer would depend
    on that number, so 30 layers would be compiled 30 times.

    Attributes:
        keys: [1, heads, length, head_dim].
        values: The same shape.
        positions: [T] int64, the positions that the next call to `update` writes.
    """

    def __init__(self, heads: int, length: int, head_dim: int, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(1, heads, length, head_dim, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.zeros(0, dtype=torch.int64)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new positions.

        Returns:
            The keys and values of all positions; positions not written yet must be masked.

        Shapes:
            keys, values: [1, heads, T, head_dim]; results: [1, heads, length, head_dim].
        """
        return (
            self.keys.index_copy_(2, self.positions, keys),
            self.values.index_copy_(2, self.positions, values),
        )


def layer_caches(model: Any, length: int) -> list[LayerCache]:
    """Return a cache with room for `length` tokens for each layer of a Llama-like transformers model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [LayerCache(config.num_key_value_heads, length, head_dim, model.dtype) for _ in model.model.layers]


def run_layers(
    model: Any, layers: Sequence[Any], caches: Sequence[LayerCache], slots: Tensor, ids: Tensor, positions: Tensor
) -> Tensor:
    """Return the hidden states after a Llama-like model's layers, before its last norm.

    Shapes:
        slots: [length], all positions of the cache; ids: [1, T]; positions: [T]; result: [1, T, hidden_size].
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

    Several decoders of one model share its weights.

    Args:
        model: A `LlamaForCausalLM`, or a model of the same structure.
        length: The number of tokens that the cache has room for.
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
        """Return the logits of the next tokens, after `start` tokens of earlier calls.

        Shapes:
            ids: [1, T]; result: [1, T, vocabulary], or only the `last` positions of it if that is not 0.
        """
        positions = self.slots[start : start + ids.shape[1]]
        hidden = run_layers(self.model, self.layers, self.caches, self.slots, ids, positions)
        result: Tensor = self.model.lm_head(self.model.model.norm(hidden[:, -last:]))
        return result


def generate(decoder: Decoder, prompt: Tensor, count: int, end: int | None = None) -> Iterator[int]:
    """Yield greedily generated tokens.

    Args:
        decoder: The model; its cache is overwritten.
        prompt: [1, T] tokens.
        count: The most tokens to generate.
        end: The token that ends the text; it is not yielded.
    """
    ids, start = prompt, 0
    for _ in range(count):
        token = int(decoder(ids, start, last=1).argmax())
        if token == end:
            return
        yield token
        ids, start = torch.tensor([[token]]), start + ids.shape[1]


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
