"""A Llama with random weights that decodes one sequence in one graph, with a cache of fixed size.

It is plain PyTorch, since transformers may be missing on the GPU machine. Modules have the names of transformers.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Share of channels that the norms make twenty times as large, as in language models.
OUTLIERS = 0.003


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; by default those of Llama-3.1-8B.

    Attributes:
        layers: Number of layers.
        hidden: Channels between layers.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        intermediate: Channels inside an MLP.
        vocabulary: Number of tokens.
        length: Positions in the cache.
        theta: Base of the rotary embedding's wavelengths.
    """

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocabulary: int = 128256
    length: int = 256
    theta: float = 500000.0

    @property
    def head_dim(self) -> int:
        """Return the channels of a head."""
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """Normalization of rows by their root mean square."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.ones(size, device=device, dtype=dtype)
        weight[torch.rand(size, device=device) < OUTLIERS] = 20.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize. Shapes: x and the result [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Attention(nn.Module):
    """Attention with grouped queries over a cache in buffers."""

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.kv_heads, config.head_dim
        self.group = config.heads // config.kv_heads
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = _linear(config.hidden, queries, device, dtype)
        self.k_proj = _linear(config.hidden, keys, device, dtype)
        self.v_proj = _linear(config.hidden, keys, device, dtype)
        self.o_proj = _linear(queries, config.hidden, device, dtype)
        # Random, as if a prompt had been read.
        shape = (1, config.kv_heads, config.length, config.head_dim)
        self.keys: Tensor
        self.values: Tensor
        self.register_buffer("keys", torch.randn(shape, device=device, dtype=dtype))
        self.register_buffer("values", torch.randn(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Attend to the cache.

        Shapes: x and the result [1, T, hidden]; cos, sin [T, head_dim]; mask [T, length]; positions [T].
        """
        count = x.shape[1]
        q = rotated(self.q_proj(x).view(1, count, -1, self.head_dim).transpose(1, 2), cos, sin)
        k = rotated(self.k_proj(x).view(1, count, -1, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(1, count, -1, self.head_dim).transpose(1, 2)
        keys = self.keys.index_copy_(2, positions, k)
        values = self.values.index_copy_(2, positions, v)
        # The queries of a group count as further tokens: keys and values are not repeated, and any kernel supports it.
        q = q.reshape(1, self.kv_heads, self.group * count, self.head_dim)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(self.group, 1))
        y = y.reshape(1, self.kv_heads * self.group, count, self.head_dim).transpose(1, 2)
        out: Tensor = self.o_proj(y.reshape(1, count, -1))
        return out


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden, config.intermediate, device, dtype)
        self.up_proj = _linear(config.hidden, config.intermediate, device, dtype)
        self.down_proj = _linear(config.intermediate, config.hidden, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the MLP. Shapes: x and the result [1, T, hidden]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """Attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, device, dtype)
        self.self_attn = Attention(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden, device, dtype)
        self.mlp = MLP(config, device, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Compute the layer. Shapes: as in `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, positions)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Llama(nn.Module):
    """The model. Its weights are made on the device.

    Args:
        config: Sizes.
        device: Device of the weights.
        dtype: Dtype of weights and activations.
    """

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Layer(config, device, dtype) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, device, dtype)
        # The backend leaves modules of this name in 16 bit.
        self.lm_head = _linear(config.hidden, config.vocabulary, device, dtype)
        slots = torch.arange(config.length, device=device)
        half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
        angles = torch.outer(slots.to(torch.float32), config.theta**-half).repeat(1, 2)
        self.slots: Tensor
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("slots", slots)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the logits after the last token. Shapes: ids [1, T]; positions [T]; result [1, 1, vocabulary]."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)
        mask = self.slots <= positions[:, None]  # True for visible positions.
        for layer in self.layers:
            x = layer(x, cos, sin, mask, positions)
        logits: Tensor = self.lm_head(self.norm(x[:, -1:]))
        return logits


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding. Shapes: x and the result [1, heads, T, head_dim]; cos, sin [T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _linear(k: int, n: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(k, n, bias=False, device=device, dtype=dtype)
