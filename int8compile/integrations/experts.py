"""Mixtures of experts of transformers with int8 weights: an implementation for its experts interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# The value of `config._experts_implementation`.
NAME = "int8"


def int8_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the result of a module of experts whose weights are `Int8Experts`.

    Tokens are sorted by expert, so that each weight is read once.

    Args:
        self: The module of experts.
        hidden_states: [T, K].
        top_k_index: [T, top_k], the experts of each token; numbers of E and above stand for no expert (expert
            parallelism).
        top_k_weights: [T, top_k], the weight of each expert's result.

    Returns:
        [T, K] of the dtype of `hidden_states`.
    """
    top_k = top_k_index.shape[-1]
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(
        experts, torch.arange(self.num_experts, device=experts.device), right=True, out_int32=True
    )
    x = hidden_states[order // top_k]
    # Rows of no expert come last and are zero; the index of their bias must still be valid.
    bias_of = experts.clamp(max=self.num_experts - 1)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    x = getattr(self, name)(x, ends)
    if self.has_bias:
        x = x + getattr(self, f"{name}_bias")[bias_of]
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = self.down_proj(x, ends)
    if self.has_bias:
        x = x + self.down_proj_bias[bias_of]
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    weights = top_k_weights.reshape(-1)[order].masked_fill(experts >= self.num_experts, 0)
    # A gather restores the order: adding in place at repeated indices is not deterministic on GPUs.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    parts = (x * weights.unsqueeze(-1))[back].unflatten(0, (-1, top_k))
    result: Tensor = parts.sum(dim=1).to(hidden_states.dtype)
    return result


ALL_EXPERTS_FUNCTIONS.register(NAME, int8_experts_forward)
