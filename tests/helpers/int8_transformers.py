"""Build, save, load and compare models of transformers with int8 weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8compile import Int8Experts, Int8Linear
from tests.helpers.architectures import DECODER, IDS

transformers = pytest.importorskip("transformers")

safetensors = pytest.importorskip("safetensors.torch")


def cosine(actual: Tensor, expected: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(actual.flatten().double(), expected.flatten().double(), dim=0).item()


def int8_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, Int8Linear | Int8Experts)}


def llama(layers: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": layers}, **options)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def saved(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str, **options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, **options)


def assert_same_bits(actual: nn.Module, expected: nn.Module) -> None:
    """Require the same tensors, and the same sharing among them."""
    ours, theirs = (dict(model.state_dict(keep_vars=True)) for model in (actual, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name

    def first_names(state: dict[str, Tensor]) -> dict[str, str]:
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}

    assert first_names(ours) == first_names(theirs)


def edit_config(folder: str, change: Callable[[dict[str, Any]], Any]) -> str:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    change(config)
    # With its checksum, an edited config is refused: test_options_that_were_edited_are_refused.
    config.get("quantization_config", {}).pop("checksum", None)
    path.write_text(json.dumps(config))
    return folder


def reloads(model: nn.Module, folder: Path) -> bool:
    """Return whether a model gives the same bits after it was saved and loaded."""
    return torch.equal(logits(load(saved(model, folder))), logits(model))


PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
