"""diffusers with int8 weights: a loaded model equals the saved one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8compile import CheckpointError, ConfigError, Int8Linear, ModelError, dequantize_, quantize_
from int8compile.stored.modules import Int8Module

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
from int8compile.integrations.diffusers import Int8CompileConfig, Int8CompileDiffusersQuantizer  # noqa: E402
from tests.helpers.configs import saved_config  # noqa: E402


def flux() -> Any:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    dims = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **dims).eval()


def unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8}
    return diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=8, **sizes, **blocks).eval()


def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4).eval()


def dit() -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    norm = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False}
    return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, **sizes, **norm).eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    torch.manual_seed(1)
    if isinstance(model, diffusers.FluxTransformer2DModel):
        inputs = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 8, 32)}
        inputs |= {"pooled_projections": torch.randn(1, 32), "timestep": torch.ones(1)}
        return model(**inputs, img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3)).sample
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 32)).sample
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return model(torch.randn(1, 4, 8, 8), timestep=torch.ones(1), class_labels=torch.ones(1).long()).sample
    return model(torch.randn(1, 3, 16, 16)).sample


def load(folder: Path, kind: Any = None, **options: Any) -> Any:
    """Load a model with its own copy of the float tensors.

    diffusers leaves tensors in the mapped file, where they are not aligned. PyTorch's float operators round differently
    there, also in models without int8.
    """
    model = (kind or diffusers.FluxTransformer2DModel).from_pretrained(folder, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def int8_modules(model: nn.Module) -> int:
    return sum(isinstance(module, Int8Module) for module in model.modules())


MODELS = {"flux": (flux, 26), "unet": (unet, 50), "vae": (vae, 8), "dit": (dit, 11)}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    build, count = MODELS[name]
    model = build()
    report = quantize_(model, progress=False)
    assert len(report.rewritten) == int8_modules(model) == count
    expected = run(model)
    model.save_pretrained(tmp_path / "int8")
    said = saved_config(tmp_path / "int8")["quantization_config"]
    assert said["quant_method"] == "int8compile"
    assert len(said["modules"]) == count
    again = load(tmp_path / "int8", type(model))
    assert int8_modules(again) == count
    assert torch.equal(run(again), expected)
    # The loaded model is saved again, in shards.
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(run(load(tmp_path / "again", type(model))), expected)


def test_a_model_in_a_wrapper_and_a_part_alone(tmp_path: Path) -> None:
    for number, quantized in enumerate((nn.Sequential, lambda model: model.transformer_blocks)):
        model = flux()
        quantize_(quantized(model), progress=False)
        expected = run(model)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = load(folder)
        assert int8_modules(again) == int8_modules(model) > 0
        assert torch.equal(run(again), expected)


def test_pipeline(tmp_path: Path) -> None:
    """A pipeline saves each of its models separately."""
    pipeline = diffusers.DiTPipeline(dit(), vae(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae):
        quantize_(part, progress=False)

    def image(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline([1], generator=generator, num_inference_steps=2, output_type="np").images

    expected = image(pipeline)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (int8_modules(again.transformer), int8_modules(again.vae)) == (11, 8)
    assert (image(again) == expected).all()


SCRIPT = """
import sys
from diffusers import FluxTransformer2DModel
try:
    FluxTransformer2DModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error)[:47])
import int8compile.integrations.transformers  # With diffusers there already, it is told, too.
model = FluxTransformer2DModel.from_pretrained(sys.argv[1])
print(type(model.transformer_blocks[0].attn.to_q).__name__)
"""


def test_a_new_process(tmp_path: Path) -> None:
    """Without the integration, and where torch does not load it, diffusers raises an error and loads nothing."""
    model = flux()
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    alone = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    output = subprocess.run(command, env=alone, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["Unknown quantization type, got int8compile - su", "Int8Linear"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """diffusers casts loaded weights but not scales. int8 models can be cast afterwards, too."""
    model = flux()
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8", torch_dtype=dtype)
    to_q = again.transformer_blocks[0].attn.to_q
    assert (to_q.qweight.dtype, to_q.scale.dtype, to_q.dtype) == (torch.int8, torch.float32, dtype)
    assert torch.equal(to_q.scale, model.transformer_blocks[0].attn.to_q.scale)
    assert again.dtype == dtype
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    again.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again", torch_dtype=dtype).dtype == dtype


def assert_same_bits(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("files", ["one", "several", "several at once"])
def test_float_weights_are_quantized_while_they_are_loaded(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a group wait for each other, also across files."""
    model = flux()
    model.save_pretrained(tmp_path / "float", max_shard_size="100GB" if files == "one" else "4KB")
    shards = len(list((tmp_path / "float").glob("*.safetensors")))
    assert (shards == 1) if files == "one" else (shards > 20)
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_ENABLE_PARALLEL_LOADING", files == "several at once")
    options = {"skip_modules": ["proj_out"], "modules": {"to_v": {"threshold": 5.0}}}
    config = Int8CompileConfig(**options)
    loaded = load(tmp_path / "float", quantization_config=config)
    quantize_(model, options, progress=False)
    assert int8_modules(loaded) == int8_modules(model) == 25
    assert_same_bits(loaded, model)
    attention = loaded.transformer_blocks[0].attn
    assert attention.to_q.d is attention.to_k.d is attention.to_v.d is not None
    assert (attention.to_q.threshold, attention.to_v.threshold) == (12.0, 5.0)
    assert torch.equal(run(loaded), run(model))
    loaded.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert again.transformer_blocks[0].attn.to_q.d is again.transformer_blocks[0].attn.to_k.d
    assert torch.equal(run(again), run(model))


def test_a_group_that_is_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that diffusers leaves out is waited for only until the end."""
    model = flux()
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "diffusion_pytorch_model.safetensors", "transformer_blocks.0.attn.to_k.weight"
    state = safetensors.load_file(file)
    del state[name]
    safetensors.save_file(state, file, {"format": "pt"})
    original = Int8CompileDiffusersQuantizer.maybe_update_loaded_keys
    monkeypatch.setattr(
        Int8CompileDiffusersQuantizer,
        "maybe_update_loaded_keys",
        lambda self, keys, files: original(self, [*keys, name], files),
    )
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=Int8CompileConfig())
    attention = loaded.transformer_blocks[0].attn
    assert type(attention.to_k) is nn.Linear
    assert int8_modules(loaded) == 25
    assert attention.to_q.d is attention.to_v.d is not None


def test_a_folder_of_the_version_before(tmp_path: Path) -> None:
    """Version 1 had no rotations: its integers are those of current unrotated weights, and run like them."""
    model = flux()
    quantize_(model, {"rotate": False}, progress=False)
    model.save_pretrained(tmp_path)
    said = saved_config(tmp_path)
    for options in said["quantization_config"]["modules"].values():
        del options["rotation"]
    del said["quantization_config"]["checksum"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    again = load(tmp_path)
    assert_same_bits(again, model)
    int8 = [module for module in again.modules() if isinstance(module, Int8Linear)]
    assert len(int8) == 26
    assert {(module.d, module.threshold) for module in int8} == {(None, 6.0)}
    assert torch.equal(run(again), run(model))


def test_dequantized(tmp_path: Path) -> None:
    model = flux()
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path / "int8")
    wrapper = nn.Sequential(model)
    dequantize_(wrapper)
    loaded = load(tmp_path / "int8").dequantize()
    for number, floats in enumerate((model, loaded)):
        assert int8_modules(floats) == 0
        assert not hasattr(floats, "hf_quantizer")
        floats.save_pretrained(tmp_path / str(number))
        assert "quantization_config" not in saved_config(tmp_path / str(number))
        assert torch.equal(run(load(tmp_path / str(number))), run(model))


@pytest.fixture
def int8_folder(tmp_path: Path) -> Path:
    model = flux()
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["context_embedder.qweight"][0].neg_(), r"context_embedder\.qweight in .* is damaged"),
        (lambda state: state["context_embedder.scale"][3:4].fill_(float("nan")), "scale in .* holds 1 NaN"),
        (lambda state: state.pop("context_embedder.scale"), r"the checkpoint lacks context_embedder\.scale"),
        (
            lambda state: state.update({"context_embedder.scale": state["context_embedder.scale"].half()}),
            r"context_embedder\.scale of the checkpoint is F16; it must be F32",
        ),
        (lambda state: state["context_embedder.d"][3:4].fill_(0), r"context_embedder\.d in .* holds 1 NaN, Inf or 0"),
        (lambda state: state.pop("context_embedder.d"), r"the checkpoint lacks context_embedder\.d"),
        (
            lambda state: state.update({"context_embedder.scale": torch.ones(3)}),
            r"context_embedder\.scale has shape \[3\] in the checkpoint, \[32\] in the model",
        ),
    ],
)
def test_damaged_tensors(change: Any, message: str, int8_folder: Path) -> None:
    file = int8_folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.load_file(file)
    change(state)
    safetensors.save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(int8_folder)


def test_a_layer_that_the_config_has_in_float(int8_folder: Path) -> None:
    said = saved_config(int8_folder)
    del said["quantization_config"]["modules"]["context_embedder"]
    del said["quantization_config"]["checksum"]
    (int8_folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        CheckpointError, match=r"context_embedder\.qweight of the checkpoint is int8, but by its config"
    ):
        load(int8_folder)


def test_what_is_refused(int8_folder: Path, tmp_path: Path) -> None:
    options = {"device_map": {"": "cpu", "transformer_blocks": "disk"}, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ModelError, match="device_map puts parts on the disk"):
        load(int8_folder, **options)
    said = saved_config(int8_folder)
    said["quantization_config"]["checkpoint_format"] = "bitsandbytes"
    (int8_folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="checkpoint_format='bitsandbytes' is for models of transformers"):
        load(int8_folder)


def test_a_device_map(int8_folder: Path) -> None:
    model = flux()
    quantize_(model, progress=False)
    loaded = load(int8_folder, device_map={"": "cpu"})
    assert isinstance(loaded.context_embedder, Int8Linear)
    assert torch.equal(run(loaded), run(model))
