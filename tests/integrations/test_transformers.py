"""Real architectures at toy size: whole in one graph, every linear accounted for, close to float.

One layer each, since Inductor takes seconds for each more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import int8compile
from tests.helpers.models import CountingBackend

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
    """A model, its inputs, how many linears are rewritten, and which stay in float for which reason."""

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
        lambda: llama(tie_word_embeddings=True), {"input_ids": IDS, "use_cache": False}, 7, {"lm_head": "lm_head"}
    ),
    # Conv1D: four in each layer.
    "gpt2": Case(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        ),
        {"input_ids": IDS, "use_cache": False},
        4,
        {"lm_head": "lm_head"},
    ),
    # Encoder layers have six linears, decoder layers ten.
    "t5": Case(
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=4, d_kv=16, vocab_size=128)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False},
        16,
        {"lm_head": "lm_head"},
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
    # Fused experts that are a bmm over a 3-D parameter, and a shared expert.
    "llama4": Case(
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(**DECODER, intermediate_size_mlp=128, head_dim=16, num_local_experts=4)
        ),
        {"input_ids": IDS, "use_cache": False},
        9,
        {"model.layers.0.feed_forward.router": "small", "lm_head": "lm_head"},
    ),
    # Its head is called proj_out and is found by its tie to the embedding.
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


# What most people run; the others are slow tests.
FIRST = {"llama", "llama, tied", "gpt2", "bert", "mixtral"}


# Llama 4 rotates with complex numbers, which Inductor leaves to eager.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[] if name in FIRST else pytest.mark.slow) for name, case in CASES.items()],
)
def test_architecture(case: Case) -> None:
    model = case.build().eval()
    report = int8compile.explain(model, **case.inputs)
    assert report.graphs == 1
    assert len(report.rewritten) == case.rewritten, str(report)
    assert {site.path: site.reason.name.lower() for site in report.skipped} == case.float_
    assert report.activation_matmuls > 0
    with torch.no_grad():
        expected = model(**case.inputs)[0]
        actual = torch.compile(model, backend="int8", fullgraph=True)(**case.inputs)[0]
    assert actual.shape == expected.shape
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_generate(cache: str) -> None:
    """model.generate() with the forward pass in int8 and a KV cache gives what the compiled model gives without one."""
    model = llama().eval()
    expected = IDS
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for _ in range(5):
            logits = compiled(expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    torch._dynamo.reset()
    graphs = CountingBackend()
    # In place: `torch.compile(model).generate` is the float model's.
    model.compile(backend=graphs, fullgraph=cache == "static")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    actual = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
    )
    assert torch.equal(actual, expected)
    assert graphs.graphs
