"""Models of transformers inside other models: a loaded model equals the saved one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8compile
from int8compile import Int8Embedding, Int8Linear, SkipReason, dequantize_, quantize_
from int8compile.stored.modules import Int8Module
from tests.helpers.architectures import CASES, DECODER, IDS, TEXT, VISION
from tests.helpers.configs import saved_config

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


class Wrapper(nn.Module):
    """A parent that is not a model of transformers."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.head = nn.Linear(32, 32)


class InDict(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"encoder": Wrapper(model)})


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TEXT)).eval()


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **options)).eval()


def int8_modules(model: nn.Module) -> int:
    return sum(isinstance(module, Int8Module) for module in model.modules())


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(IDS)[0]


def assert_comes_back(model: Any, folder: Path, count: int) -> Any:
    """Save a model, load it, and compare outputs and the number of int8 modules."""
    expected = run(model)
    model.save_pretrained(folder)
    assert len(saved_config(folder)["quantization_config"]["modules"]) == count
    again = type(model).from_pretrained(folder).eval()
    assert int8_modules(again) == int8_modules(model) == count
    assert torch.equal(run(again), expected)
    return again


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, lambda model: Wrapper(Wrapper(model)), InDict, lambda model: nn.Sequential(model, nn.Linear(32, 32))],
)
def test_a_model_inside_a_wrapper(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = bert()
    quantize_(wrap(model), progress=False)
    assert model.hf_quantizer.quantization_config.int8_modules
    again = assert_comes_back(model, tmp_path / "int8", 7)
    assert_comes_back(again, tmp_path / "again", 7)


def test_two_models_that_share_a_part(tmp_path: Path) -> None:
    first, second = bert(), bert()
    second.encoder = first.encoder
    quantize_(Wrapper(first, second), progress=False)
    assert_comes_back(first, tmp_path / "first", 7)
    assert_comes_back(second, tmp_path / "second", 7)


def test_patterns_of_modules_to_skip_are_those_of_the_whole(tmp_path: Path) -> None:
    first, second = bert(), bert()
    quantize_(Wrapper(first, second), {"skip_modules": ["models.0.encoder.layer.0"]}, progress=False)
    assert isinstance(second.encoder.layer[0].intermediate.dense, Int8Linear)
    assert_comes_back(first, tmp_path / "first", 1)
    assert_comes_back(second, tmp_path / "second", 7)


def test_the_whole_after_a_part(tmp_path: Path) -> None:
    """The inner model of a transformers model is quantized first, then the whole."""
    model = llama()
    quantize_(model.model.layers[0].mlp, progress=False)
    quantize_(model, progress=False)
    assert_comes_back(model, tmp_path / "int8", 7)


@pytest.mark.parametrize(
    ("part", "count"), [("model", 7), ("model.layers", 7), ("model.layers.0", 7), ("model.layers.0.mlp", 3)]
)
def test_a_part_alone(part: str, count: int, tmp_path: Path) -> None:
    """A part does not know its parent; saving the whole finds the part."""
    model = llama()
    quantize_(model.get_submodule(part), progress=False)
    again = assert_comes_back(model, tmp_path / "int8", count)
    assert_comes_back(again.model, tmp_path / "inner", count)
    assert_comes_back(again, tmp_path / "again", count)


@pytest.mark.parametrize("lm_head", ["native", "int8_weight"])
def test_an_inner_model_of_a_loaded_one(lm_head: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    quantize_(model, {"lm_head": lm_head}, progress=False)
    model.save_pretrained(tmp_path / "int8")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "int8")
    for number, source in enumerate((model, again)):
        inner = assert_comes_back(source.model, tmp_path / f"inner {number}", 7 + (lm_head != "native"))
        assert isinstance(inner.embed_tokens, Int8Embedding if lm_head != "native" else nn.Embedding)
        # The inner model's entry in the shared config must not stay with the outer model.
        assert_comes_back(source, tmp_path / f"outer {number}", 7 + 2 * (lm_head != "native"))


def test_dequantizing_a_wrapper(tmp_path: Path) -> None:
    first, second = bert(), llama()
    wrapper = Wrapper(first, second)
    quantize_(wrapper, progress=False)
    dequantize_(wrapper)
    for number, model in enumerate((first, second, second.model)):
        assert getattr(model, "hf_quantizer", None) is None
        folder = tmp_path / f"float {number}"
        model.save_pretrained(folder)
        assert "quantization_config" not in saved_config(folder)
        assert torch.equal(run(type(model).from_pretrained(folder)), run(model))


def test_dequantizing_a_part(tmp_path: Path) -> None:
    model = llama()
    quantize_(model, progress=False)
    dequantize_(model.model.layers[0].mlp)
    assert_comes_back(model, tmp_path / "less", 4)
    dequantize_(model.model)
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in saved_config(tmp_path / "float")
    assert torch.equal(run(llama().from_pretrained(tmp_path / "float")), run(model))


def llava() -> Any:
    """Return a language model and an image encoder, each with its own config inside."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**DECODER)
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=64)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=100, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "lm_head"),
    [*((name, "native") for name in ("t5", "clip", "whisper", "llava", "mixtral")), ("t5", "int8"), ("gpt2", "int8")],
)
def test_composite_models(name: str, lm_head: str, tmp_path: Path) -> None:
    """Models whose config contains other configs."""
    build, inputs = (llava, {"input_ids": IDS}) if name == "llava" else (CASES[name].build, CASES[name].inputs)
    model = build().eval()
    quantize_(model, {"lm_head": lm_head}, progress=False)
    expected = model(**inputs)[0]
    inner = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel) and int8_modules(part)]
    assert len(inner) > 1
    for number, part in enumerate(inner):
        part.save_pretrained(tmp_path / str(number))
        said = saved_config(tmp_path / str(number))
        assert len(said["quantization_config"]["modules"]) == int8_modules(part)
        assert json.dumps(said).count('"quantization_config"') == 1
        again = type(part).from_pretrained(tmp_path / str(number))
        assert int8_modules(again) == int8_modules(part)
        theirs, ours = part.state_dict(), again.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
        if part is model:
            assert torch.equal(again.eval()(**inputs)[0], expected)


def test_a_part_of_a_composite_model(tmp_path: Path) -> None:
    """The part's config would declare int8 inside the config of a model that is saved as float."""
    model = llava().eval()
    quantize_(model.model.language_model, progress=False)
    again = assert_comes_back(model, tmp_path / "int8", 7)
    assert json.dumps(saved_config(tmp_path / "int8")).count('"quantization_config"') == 1
    assert_comes_back(again.model.language_model, tmp_path / "inner", 7)


def test_a_float_model_of_the_same_config(tmp_path: Path) -> None:
    """The shared config says that another model is int8; this one is float."""
    model = llama()
    quantize_(model, progress=False)
    floats = type(model)(model.config).eval()
    floats.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in saved_config(tmp_path / "float")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "float")), run(floats))
    assert_comes_back(model, tmp_path / "int8", 7)


@torch.no_grad()
def test_an_encoder_and_a_decoder_that_were_saved_alone(tmp_path: Path) -> None:
    """Each part brings a config that declares int8; the whole keeps one declaration."""
    decoder = transformers.BertLMHeadModel(
        transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    ).eval()
    for name, part in {"encoder": bert(), "decoder": decoder}.items():
        quantize_(part, progress=False)
        part.save_pretrained(tmp_path / name)
    kind = transformers.EncoderDecoderModel
    model = kind.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder").eval()
    assert int8_modules(model) > 7
    expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    model.save_pretrained(tmp_path / "both")
    assert json.dumps(saved_config(tmp_path / "both")).count('"quantization_config"') == 1
    again = kind.from_pretrained(tmp_path / "both").eval()
    assert int8_modules(again) == int8_modules(model)
    assert torch.equal(again(input_ids=IDS, decoder_input_ids=IDS).logits, expected)


def test_int8compile_load_of_a_wrapper(tmp_path: Path) -> None:
    """A model loaded from int8compile's format can be saved in transformers' format."""
    wrapper = Wrapper(bert())
    quantize_(wrapper, progress=False)
    int8compile.save(wrapper, tmp_path / "ours", progress=False)
    again: Any = int8compile.load(tmp_path / "ours", lambda: Wrapper(bert()), progress=False)
    assert torch.equal(run(again.models[0]), run(wrapper.models[0]))
    assert_comes_back(again.models[0], tmp_path / "theirs", 7)


# Libraries around transformers


SCRIPT = """
import sys, torch, int8compile.integrations.transformers
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
torch.save(model.encode(["a small cat", "sat"], convert_to_tensor=True), sys.argv[2])
"""


@pytest.mark.parametrize("dense", [False, True])
def test_sentence_transformer(dense: bool, tmp_path: Path) -> None:
    """Modules beside the transformers model stay in float, because the library loads them as float."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "cat", "sat", "here"]
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    bert().save_pretrained(tmp_path / "bert")
    parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(64)]
    parts += [modules.Dense(64, 32)] if dense else []
    model = library.SentenceTransformer(modules=parts, device="cpu")
    report = quantize_(model, progress=False)
    assert [(site.path, site.reason, site.detail) for site in report.skipped] == (
        [("2.linear", SkipReason.SAVED_IN_FLOAT, "sentence-transformers")] if dense else []
    )
    texts = ["a small cat", "sat"]
    expected = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    model.save_pretrained(str(tmp_path / "int8"))
    again = library.SentenceTransformer(str(tmp_path / "int8"), device="cpu")
    assert int8_modules(again) == int8_modules(model) == 7
    assert torch.equal(again.encode(texts, convert_to_tensor=True, show_progress_bar=False), expected)
    if dense:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "int8"), str(tmp_path / "result.pt")]
        subprocess.run(command, check=True, capture_output=True)
        assert torch.equal(torch.load(tmp_path / "result.pt"), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it.
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_adapters(way: str, tmp_path: Path) -> None:
    """Layers around an adapter become int8; the adapter and trained copies of layers do not."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    config = peft.LoraConfig(r=16, modules_to_save=["down_proj"] if way == "get_peft_model" else None, **options)
    model = llama()
    if way == "get_peft_model":
        outer = peft.get_peft_model(model, config).eval()
    else:
        model.add_adapter(config)
        outer = model.eval()
    report = quantize_(outer, progress=False)
    kept = [site for site in report.skipped if site.reason is SkipReason.SAVED_IN_FLOAT]
    assert len(kept) == 4 + (way == "get_peft_model")
    assert {site.detail for site in kept} == {"PEFT"}
    assert int8_modules(outer) == 7
    expected = run(outer)
    outer.save_pretrained(tmp_path / "adapter")
    if way == "get_peft_model":
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    else:
        again = llama()
        again.load_adapter(str(tmp_path / "adapter"))
    quantize_(again, progress=False)
    assert torch.equal(run(again), expected)
