"""Models of timm in int8: they run, and int8compile.load gives back the saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import int8compile
from int8compile.stored.modules import Int8Module
from tests.helpers.timm_models import timm

# Small models, each with the number of its linears in int8.
PLAIN: dict[str, Any] = {"img_size": 32, "num_classes": 10}
BLOCKS: dict[str, Any] = {**PLAIN, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "beit_base_patch16_224": (BLOCKS, 8),
    "cait_xxs24_224": (BLOCKS, 20),
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "num_classes": 10}, 8),
    "deit_tiny_distilled_patch16_224": (BLOCKS, 8),
    "eva02_tiny_patch14_224": (BLOCKS, 8),
    "maxvit_rmlp_pico_rw_256": ({**PLAIN, "img_size": 64}, 88),
    "mixer_s32_224": ({**PLAIN, "img_size": 64}, 16),
    "pit_ti_224": ({"num_classes": 10}, 50),
    "swinv2_tiny_window8_256": (
        {**PLAIN, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)},
        9,
    ),
    "vit_tiny_patch16_224": (BLOCKS, 8),
    "xcit_nano_12_p8_224": (BLOCKS, 20),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    options, count = MODELS[name]

    def build(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return timm().create_model(name, pretrained=False, **options).eval()

    model = build()
    for parameter in model.parameters():
        if not parameter.any():  # timm initializes heads with zeros, so outputs would be zeros.
            parameter.normal_(std=0.02)
    size = options.get("img_size") or model.default_cfg["input_size"][1]
    image = torch.randn(2, 3, size, size)
    floats = model(image)
    int8compile.quantize_(model, progress=False)
    int8compile.save(model, tmp_path / "int8", progress=False)
    # Other random weights reveal tensors that are not loaded.
    again = int8compile.load(tmp_path / "int8", lambda: build(1), progress=False).eval()
    assert [sum(isinstance(module, Int8Module) for module in each.modules()) for each in (model, again)] == [count] * 2
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.items())
    expected = model(image)
    assert expected.isfinite().all()
    assert not torch.equal(expected, floats)
    assert torch.equal(again(image), expected)
