"""transformers with int8 weights: all architectures, loading and saving."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import int8compile
from int8compile import ConfigError, Int8Config, Int8Linear, memory_footprint, quantize_
from int8compile.stored.modules import Int8Module
from tests.helpers.architectures import CASES, FIRST, IDS

transformers = pytest.importorskip("transformers")

safetensors = pytest.importorskip("safetensors.torch")


from int8compile.integrations.transformers import Int8CompileConfig  # noqa: E402
from tests.helpers.configs import saved_config  # noqa: E402
from tests.helpers.int8_transformers import assert_same_bits, cosine, int8_paths, llama, load, logits, reloads, saved  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


# Counts that differ from compiling: experts with transformers' interface become int8; Llama 4's do not have it.
COVERAGE = {"mixtral": 6, "llama4": 7}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "lm_head"),
    [
        pytest.param(name, lm_head, marks=[] if name in FIRST and lm_head in heads else pytest.mark.slow)
        for name in CASES
        for heads in [("native", "int8_weight") if "tied" in name else ("native",)]
        for lm_head in ("native", "int8_weight")
    ],
)
def test_architecture(name: str, lm_head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    original = case.build().eval()
    expected = original(**case.inputs)[0]
    folder = saved(original, tmp_path / "float")

    kind, attention = type(original), {"attn_implementation": original.config._attn_implementation}
    model = kind.from_pretrained(folder, quantization_config=Int8CompileConfig(lm_head=lm_head), **attention)
    actual = model(**case.inputs)[0]
    assert cosine(actual, expected) > 0.999
    assert model.get_memory_footprint() < original.get_memory_footprint()
    heads = {"lm_head", "proj_out"} & {path for path, _ in original.named_modules()} if lm_head != "native" else set()
    assert len(int8_paths(model)) == COVERAGE.get(name, case.rewritten) + len(heads)

    # explain() sees the same sites in int8, and the same sites in float.
    report = int8compile.explain(model, **case.inputs, config={"skip_modules": sorted(case.float_.keys() - heads)})
    rewritten = {site.path for site in report.rewritten}
    # Compiling also rewrites experts without the interface.
    assert rewritten - int8_paths(model) == {path for path in rewritten if ".experts." in path and name == "llama4"}
    assert int8_paths(model) <= rewritten
    assert not {site.path for site in report.skipped} & int8_paths(model)

    # quantize_ gives the same model.
    own = case.build().eval()
    own.load_state_dict(original.state_dict())
    quantize_(own, {"lm_head": lm_head}, progress=False)
    assert torch.equal(own(**case.inputs)[0], actual)
    assert_same_bits(own, model)

    # Both are saved and loaded.
    for number, source in enumerate((model, own)):
        again = kind.from_pretrained(saved(source, tmp_path / f"int8 {number}"), **attention)
        assert torch.equal(again(**case.inputs)[0], actual)
        assert again.get_memory_footprint() == model.get_memory_footprint() == memory_footprint(model)

    floats = again.dequantize()
    assert not any(isinstance(module, Int8Module) for module in floats.modules())
    assert cosine(floats(**case.inputs)[0], expected) > 0.999
    assert floats.get_memory_footprint() == original.get_memory_footprint()
    reloaded = kind.from_pretrained(saved(floats, tmp_path / "dequantized"), **attention)
    assert torch.equal(reloaded(**case.inputs)[0], floats(**case.inputs)[0])


# Loading and saving


def test_a_new_process_gives_the_same_bits(tmp_path: Path, float_folder: str) -> None:
    """A process that neither imports the integration nor loads it by itself gets an error, not random weights."""
    model = load(float_folder, quantization_config=Int8CompileConfig(lm_head="int8_weight"))
    folder = saved(model, tmp_path / "int8")
    script = f"""
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({folder!r})
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error)
else:
    raise AssertionError("random weights")
import int8compile.integrations.transformers
model = AutoModelForCausalLM.from_pretrained({folder!r})
with torch.no_grad():
    torch.save(model(torch.arange(14).view(2, 7), use_cache=False).logits, {str(tmp_path / "logits.pt")!r})
"""
    alone = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", script], env=alone, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_copies(float_folder: str) -> None:
    """Copies include the state that transformers keeps from loading."""
    model = load(float_folder, quantization_config=Int8CompileConfig())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
        assert copied.hf_quantizer.quantization_config.to_dict() == model.hf_quantizer.quantization_config.to_dict()


def test_a_weight_is_quantized_once_and_never_all_are_float(float_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from int8compile.stored import convert

    seen = []
    quantized = convert.quantized

    def counting(target: Any) -> Any:
        if not target.weight.is_meta:
            seen.append(target.path)
        return quantized(target)

    monkeypatch.setattr(convert, "quantized", counting)
    model = load(float_folder, quantization_config=Int8CompileConfig())
    assert sorted(seen) == sorted(int8_paths(model))


def test_the_folder_says_how_it_is_loaded(tmp_path: Path, float_folder: str) -> None:
    config = Int8CompileConfig(threshold=5.0, outliers="column", skip_modules=["o_proj"], min_features=8)
    folder = tmp_path / "int8"
    saved(load(float_folder, quantization_config=config), folder)
    said = saved_config(folder)["quantization_config"]
    assert said.keys() == {"quant_method", "checkpoint_format", "modules", "checksums", "checksum"}
    assert (said["quant_method"], said["checkpoint_format"]) == ("int8compile", "int8compile")
    one = {"source": "linear", "threshold": 5.0, "outliers": "column", "weight_only": False, "rotation": 1}
    assert said["modules"] == dict.fromkeys(int8_paths(load(str(folder))), one)
    assert len(said["modules"]) == 6
    assert said["checksums"].keys() == {f"{path}.{name}" for path in said["modules"] for name in ("qweight", "scale")}
    state = safetensors.load_file(folder / "model.safetensors")
    assert state["model.layers.0.mlp.up_proj.qweight"].dtype == torch.int8
    assert state["model.layers.0.mlp.up_proj.scale"].dtype == torch.float32
    assert state["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32
    assert not state["model.layers.0.mlp.up_proj.weight"].numel()  # See `get_state_dict_and_metadata`.
    assert {name for name, tensor in state.items() if not tensor.numel()} == {
        f"{path}.weight" for path in said["modules"]
    }
    model = load(str(folder))
    assert model.model.layers[0].mlp.up_proj.outliers == "column"
    assert model.is_quantized
    assert model.quantization_method == "int8compile"


def test_the_folder_has_the_rotations(tmp_path: Path, float_folder: str) -> None:
    """The file has a copy for each weight; in the model, linears that read one x share one tensor."""
    folder = tmp_path / "int8"
    model = load(float_folder, quantization_config=Int8CompileConfig())
    saved(model, folder)
    said = saved_config(folder)["quantization_config"]
    rotations = {path.rpartition(".")[2]: options["rotation"] for path, options in said["modules"].items()}
    assert rotations == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 64) | {
        "down_proj": 128
    }
    assert {options["threshold"] for options in said["modules"].values()} == {12.0}
    assert {f"{path}.d" for path in said["modules"]} <= said["checksums"].keys()
    state = safetensors.load_file(folder / "model.safetensors")
    assert state["model.layers.0.mlp.up_proj.d"].dtype == torch.float32
    again = load(str(folder))
    assert_same_bits(again, model)
    for attention, mlp in ((each.model.layers[0].self_attn, each.model.layers[0].mlp) for each in (model, again)):
        assert attention.q_proj.d is attention.k_proj.d is attention.v_proj.d is not attention.o_proj.d
        assert mlp.gate_proj.d is mlp.up_proj.d
    # The model itself still shares them.
    assert len({id(module.d) for module in model.modules() if isinstance(module, Int8Linear)}) == 4


def test_not_rotated(tmp_path: Path, float_folder: str) -> None:
    model = load(float_folder, quantization_config=Int8CompileConfig(rotate=False))
    own = llama()
    quantize_(own, {"rotate": False}, progress=False)
    assert_same_bits(model, own)
    linears = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert {(module.d, module.threshold) for module in linears} == {(None, 6.0)}
    assert reloads(model, tmp_path / "int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, float_folder: str, dtype: torch.dtype) -> None:
    """Other tensors may have 16 bits, scales never do."""
    model = load(float_folder, quantization_config=Int8CompileConfig(), dtype=dtype)
    up = model.model.layers[0].mlp.up_proj
    assert (up.qweight.dtype, up.scale.dtype, up.weight.dtype) == (torch.int8, torch.float32, dtype)
    assert model.model.norm.weight.dtype == model.dtype == dtype
    full = load(float_folder, quantization_config=Int8CompileConfig())
    # Quantized after the cast, like a model of that dtype.
    assert cosine(logits(model), logits(full)) > 0.999
    again = load(saved(model, tmp_path / "int8"), dtype=dtype)
    assert torch.equal(logits(again), logits(model))


def test_modules_that_are_kept_in_float32(tmp_path: Path) -> None:
    """T5 keeps one of its linears in float32, because float16 overflows in it."""
    original = CASES["t5"].build()
    folder, kind = saved(original, tmp_path / "float"), type(original)
    options = {"quantization_config": Int8CompileConfig()}
    half = kind.from_pretrained(folder, dtype=torch.float16, **options)
    again = kind.from_pretrained(saved(half, tmp_path / "int8"), dtype=torch.float16)
    for model in (half, again):
        kept = [module for path, module in model.named_modules() if path.endswith(".wo")]
        assert [type(module) for module in kept] == [nn.Linear, nn.Linear]
        assert {module.weight.dtype for module in kept} == {torch.float32}
        assert len(int8_paths(model)) == CASES["t5"].rewritten - 2
    assert options["quantization_config"].skip_modules == [], "the user's own"
    full = kind.from_pretrained(folder, quantization_config=Int8CompileConfig())
    assert len(int8_paths(full)) == CASES["t5"].rewritten


def test_a_base_model_and_a_model_with_another_head(tmp_path: Path, float_folder: str) -> None:
    model = load(float_folder, quantization_config=Int8CompileConfig())
    folder = saved(model, tmp_path / "int8")
    base = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
        assert torch.equal(hidden, model.model(IDS).last_hidden_state)
        headed = transformers.LlamaForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert torch.equal(headed.model(IDS).last_hidden_state, hidden)


def test_options_of_bitsandbytes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "int8compile"):
        config = Int8CompileConfig(load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["o_proj"])
    assert (config.threshold, config.skip_modules) == (5.0, ["o_proj"])
    assert "load_in_8bit" not in config.to_dict()
    notes = [record.getMessage() for record in caplog.records]
    assert "llm_int8_threshold of bitsandbytes is taken as threshold; with outliers='column' it means what" in notes[1]
    assert "llm_int8_skip_modules of bitsandbytes is taken as skip_modules" in notes[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=True has no counterpart"),
        ({"load_in_8bit": False}, "load_in_8bit=False has no counterpart"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True has no counterpart"),
        ({"treshold": 5.0}, "unknown option 'treshold' of Int8CompileConfig .did you mean 'threshold'"),
        ({"outliers": "rows"}, "outliers='rows': allowed are 'row', 'column'"),
        ({"checkpoint_format": "gguf"}, "checkpoint_format='gguf': allowed are"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Int8CompileConfig(**options)


def test_settings_of_some_modules(tmp_path: Path) -> None:
    modules = {"o_proj": {"rotate": False}, "mlp": {"threshold": 5.0}}
    config = Int8CompileConfig(modules=modules)
    assert config.to_dict()["modules"] == modules, "as a model in float stores it"
    assert Int8CompileConfig.from_dict(config.to_dict()).config() == Int8Config(modules=modules)
    model = load(saved(llama(), tmp_path / "float"), quantization_config=config)
    loaded = load(saved(model, tmp_path / "int8"))
    for each in (model, loaded):
        layer = each.model.layers[0]
        assert (layer.self_attn.o_proj.rotation, layer.self_attn.o_proj.threshold) == (1, 6.0)
        assert (layer.mlp.up_proj.rotation, layer.mlp.up_proj.threshold) == (64, 5.0)
        assert layer.self_attn.q_proj.threshold == 12.0
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        Int8CompileConfig(modules={"mlp": {"treshold": 5.0}})
