"""A transformers language model with a static KV cache as a function of tensors, for export.

One graph reads prompts and generates: the number of tokens may change from call to call. Every call is given the cache
and writes to it. The exported file holds no state, so one copy of it serves any number of texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import StaticLayer

from int8compile.errors import ModelError, first_line
from int8compile.stored.modules import Int8Module

_ATTENTION = "int8compile_static_cache"
_INSTEAD = "wrap the model in a module of your own and export that"


class StaticCacheDecoder(nn.Module):
    """Computes the logits of the next token.

    Args:
        model: A decoder-only language model (`...ForCausalLM`) of transformers.
        length: The number of tokens that the cache has room for. Every call reads the whole cache, so do not make it
            larger than needed.
        check: Whether to compare its results with the model's own. They differ for other libraries' int8 models, in
            which the rows of a call affect each other; leave it out where the float model was compared.

    Raises:
        ModelError: The model's cache holds more than keys and values, its attention window is shorter than `length`, or
            its results with this cache differ from its own.

    Attributes:
        sizes: [heads, length, head_dim] of each tensor of the cache: keys and values of the first layer, and so on.
    """

    def __init__(self, model: Any, length: int, *, check: bool = True) -> None:
        super().__init__()
        self.model = model
        self.length = length
        self.sizes = _cache_sizes(model, length)
        self.train(model.training)
        if check:
            self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Read a few tokens in two calls, and compare the logits with the model's own.

        Some models have an attention of their own that takes other masks, and some attend to later tokens.
        """
        name = type(self.model).__name__
        ids = torch.arange(min(4, self.length), device=self.model.device)[None]
        cache = self.new_cache()
        try:
            self(ids[:, :-1], torch.tensor(0, device=ids.device), cache)
            logits = self(ids[:, -1:], torch.tensor(ids.shape[1] - 1, device=ids.device), cache)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{name} cannot be run with a static cache: {first_line(error)}; {_INSTEAD}") from error
        expected = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        # The rows of a batch affect rounding in 16 bit, and int8 with column outliers.
        exact = self.model.dtype == torch.float32 and not any(isinstance(each, Int8Module) for each in self.modules())
        if (logits - expected).abs().max() > (5e-5 if exact else 0.05) * expected.abs().max():
            raise ModelError(f"{name} gives other results with a static cache and a causal mask; {_INSTEAD}")

    def forward(self, ids: Tensor, start: Tensor, cache: list[Tensor]) -> Tensor:
        """Read tokens, and write their keys and values to the cache.

        Args:
            ids: The tokens.
            start: The number of tokens that the cache already holds, the same for all rows; 0 or more.
            cache: A cache of `new_cache`; it is changed.

        Returns:
            The logits of the token that follows the last one.

        Shapes:
            ids: [B, S] int64; start: [] int64; cache: [B, heads, length, head_dim] each; result: [B, vocabulary].
        """
        positions = start + torch.arange(ids.shape[1], device=ids.device)
        mask = (torch.arange(self.length, device=ids.device) <= positions[:, None])[
            None, None
        ]  # True where a position is attended to.
        past = StaticCache(config=self.model.config, max_cache_len=self.length)
        past.layers = [_Layer(*pair, start) for pair in zip(cache[::2], cache[1::2], strict=True)]
        with _attention(self.model):
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions[None],
                past_key_values=past,
                use_cache=True,
                # Not 1, which would make a slice, whose size torch.export would compare with one token.
                logits_to_keep=torch.tensor([-1], device=ids.device),
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def new_cache(self, batch: int = 1) -> list[Tensor]:
        """Return an empty cache for `batch` texts, tensors [batch, heads, length, head_dim]."""
        return [torch.zeros(batch, *size, dtype=self.model.dtype, device=self.model.device) for size in self.sizes]

    def example(self, batch: int = 1) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return example inputs for `int8compile.export`, and its `dynamic_shapes` for 1 to `length` tokens.

        Args:
            batch: The number of texts at a time.
        """
        cache = self.new_cache(batch)
        ids = torch.zeros(batch, min(8, self.length), dtype=torch.int64, device=self.model.device)
        sequence = {1: Dim("sequence", min=1, max=self.length)}
        return (ids, torch.tensor(0, device=ids.device), cache), (sequence, None, [None] * len(cache))


class _Layer(StaticLayer):  # type: ignore[no-untyped-call]
    """The keys and values of a layer, in tensors that the caller owns."""

    def __init__(self, keys: Tensor, values: Tensor, start: Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.cumulative_length = start.clone()  # `update` increments it in place.
        self.is_initialized = True


@torch.no_grad()
def _cache_sizes(model: Any, length: int) -> list[tuple[int, int, int]]:
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length and getattr(config, "use_sliding_window", True):
        raise ModelError(f"{type(model).__name__} looks back {window} tokens; a cache of {length} is longer than that")
    # The model fills a cache itself, because the number and size of heads may differ from layer to layer.
    past = StaticCache(config=model.config, max_cache_len=length)
    kinds = {type(layer).__name__ for layer in past.layers if not isinstance(layer, StaticLayer)}
    if kinds:
        raise ModelError(f"{type(model).__name__} keeps more than keys and values: {', '.join(sorted(kinds))}")
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), past_key_values=past, use_cache=True)
    layers: list[Any] = past.layers
    states = [state for layer in layers for state in (layer.keys, layer.values)]
    return [(state.shape[1], length, state.shape[3]) for state in states]


@contextlib.contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Have the model call `_attend`; the function of transformers branches on whether there is one token."""
    before = model.config._attn_implementation
    try:
        model.config._attn_implementation = _ATTENTION
        yield
    finally:
        model.config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention with a mask, without copies of keys: query heads that share a key head are rows of one product.

    Shapes:
        query: [B, H, S, D]; key, value: [B, heads, T, D]; attention_mask: [1, 1, S, T]; result: [B, S, H, D].
    """
    asked = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    if asked or attention_mask is None:
        raise ModelError(
            f"{type(module).__name__} asks for {asked[0] if asked else 'attention without a mask'}, "
            f"which this decoder does not have; {_INSTEAD}"
        )
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    # Not reshape(), which needs no copy for a single token, and so would branch on the number of tokens.
    grouped = query.clone(memory_format=torch.contiguous_format).view(batch, key.shape[1], groups * length, size)
    mask = attention_mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    out = out.view(batch, heads, length, value.shape[3]).transpose(1, 2)
    return out.clone(memory_format=torch.contiguous_format), None


AttentionInterface.register(_ATTENTION, _attend)
