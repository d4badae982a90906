"""Architectures of transformers at toy size, with the number of linears that are rewritten in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64}

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

IDS = torch.arange(14).view(2, 7)


@dataclasses.dataclass
class Case:
    """A model, its inputs, the number of rewritten linears, and the reason for each that stays in float."""

    build: Callable[[], torch.nn.Module]
    inputs: dict[str, Any]
    rewritten: int
    float_: dict[str, str]


def llama(**options: Any) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **options))


CASES = {
    "llama": Case(llama, {"input_ids": IDS, "use_cache": False}, 7, {"lm_head": "lm_head"}),
    "llama, eager attention": Case(
        lambda: llama(attn_implementation="eager"), {"input_ids": IDS, "use_cache": False}, 7, {"lm_head": "lm_head"}
    ),
    "llama, tied": Case(
        lambda: llama(tie_word_embeddings=True), {"input_ids": IDS, "use_cache": False}, 7, {"lm_head": "tied"}
    ),
    # Four Conv1D in each layer.
    "gpt2": Case(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        ),
        {"input_ids": IDS, "use_cache": False},
        4,
        {"lm_head": "tied"},
    ),
    # Encoder layers have six linears, decoder layers ten.
    "t5": Case(
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=4, d_kv=16, vocab_size=128)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False},
        16,
        {"lm_head": "tied"},
    ),
    "bert": Case(lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), {"input_ids": IDS}, 7, {}),
    "vit": Case(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
        6,
        {"classifier": "small"},
    ),
    "mixtral": Case(
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)),
        {"input_ids": IDS, "use_cache": False},
        4,
        {
            "model.layers.0.mlp.gate": "small",
            "model.layers.0.mlp.experts.gate_up_proj": "custom_op",
            "model.layers.0.mlp.experts.down_proj": "custom_op",
            "lm_head": "lm_head",
        },
    ),
    # Fused experts, which are a bmm over a 3-D parameter, and a shared expert.
    "llama4": Case(
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(**DECODER, intermediate_size_mlp=128, head_dim=16, num_local_experts=4)
        ),
        {"input_ids": IDS, "use_cache": False},
        9,
        {"model.layers.0.feed_forward.router": "small", "lm_head": "lm_head"},
    ),
    # The head is called proj_out and is recognized by its tie to the embedding.
    "whisper": Case(
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                vocab_size=128,
                num_mel_bins=16,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=128,
                decoder_ffn_dim=128,
                max_source_positions=32,
                max_target_positions=32,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        {
            "input_features": torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 64),
            "decoder_input_ids": IDS,
            "use_cache": False,
        },
        16,
        {"proj_out": "tied"},
    ),
    "clip": Case(
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)
        ),
        {"input_ids": IDS, "pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
        14,
        {},
    ),
}

# The most used architectures; tests of the others are slow.
FIRST = {"llama", "llama, tied", "gpt2", "bert", "mixtral"}
