"""evaluate(): the distances, what counts, the layers, the candidates, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import int8compile
from int8compile import ConfigError, InputError, Int8Config, ModelError, calibrate, evaluate, explain, quantize_
from int8compile.stored.convert import plan
from int8compile.tuning import candidates, evaluation, peers, pictures
from int8compile.tuning.candidates import Candidate
from int8compile.weights import rotation_of_view
from tests.helpers.configs import SMALL
from tests.helpers.models import Stack

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=128))
    for parameter in made.parameters():  # Larger logits than those of a new model, so that predictions differ.
        parameter.data.mul_(3)
    return made.eval()


@pytest.fixture
def ids():
    return torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


class Ops(TorchDispatchMode):
    """Counts the operators of int8compile."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("int8compile.") and "linear" in str(func)
        return func(*args, **(kwargs or {}))


def counted(make):
    """Return a candidate whose model counts the int8 operators that it calls, and the counter."""
    ops = Ops()

    def wrapped(model, batches):
        made = make(model, batches)

        def call(*args, **kwargs):
            with ops:
                return made(*args, **kwargs)

        return call

    return Candidate(wrapped), ops


def test_a_model_agrees_with_itself(model, ids):
    found = evaluate(model, [ids, ids[:1]], {"same": model}).results["same"]
    assert (found.kl, found.kl_error, found.top1, found.error, found.layers) == (0.0, 0.0, 1.0, 0.0, ())
    assert found.positions == 72
    both = [
        F.cross_entropy(logits(model, each)[:, :-1].flatten(0, 1), each[:, 1:].flatten()) for each in (ids, ids[:1])
    ]
    # 46 predictions and 23.
    assert found.perplexity == pytest.approx(float(((2 * both[0] + both[1]) / 3).exp()), rel=1e-5)


def test_divergence_is_that_of_the_distributions():
    # Two tokens with probabilities 3/4 and 1/4 against 1/2 and 1/2; adding a constant to logits changes nothing.
    expected, found = torch.tensor([[[3.0, 1.0]]]).log() + 5, torch.zeros(1, 1, 2)
    value = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(evaluation.divergence(expected, found), torch.tensor([[value]], dtype=torch.float64))
    # A token that is impossible in both adds nothing.
    impossible = torch.tensor([[[-math.inf]]])
    masked = [torch.cat([each, impossible], dim=-1) for each in (expected, found)]
    assert float(evaluation.divergence(*masked)) == pytest.approx(value)


def test_divergence_in_parts_is_the_same(monkeypatch):
    expected, found = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    whole = evaluation.divergence(expected, found)
    monkeypatch.setattr(evaluation, "_AT_ONCE", 24)
    torch.testing.assert_close(evaluation.divergence(expected, found), whole, rtol=1e-12, atol=0)


def test_the_values_are_those_of_the_candidates_logits(model, ids):
    int8 = copy.deepcopy(model)
    quantize_(int8, progress=False)
    expected, found = logits(model, ids), logits(int8, ids)
    result = evaluate(model, [ids], ["default"]).results["default"]
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
    assert result.kl > 0
    assert result.kl_error is None, "one batch has no spread"
    assert result.top1 == pytest.approx(float((expected.argmax(-1) == found.argmax(-1)).double().mean()))
    assert result.error == pytest.approx(float((found - expected).double().norm() / expected.double().norm()))
    assert result.bytes == int8compile.memory_footprint(int8) < int8compile.memory_footprint(model)


def test_the_error_of_the_mean_is_that_of_the_batches(model, ids):
    found = evaluate(model, [ids[:1], ids[1:], ids.flip(1)[:1]], ["default"], layers=False).results["default"]
    values = torch.tensor(found.kl_by_batch, dtype=torch.float64)
    assert found.kl == pytest.approx(float(values.mean()))
    assert found.kl_error == pytest.approx(float(values.std()) / math.sqrt(3))
    assert found.layers == ()
    # Batches of other sizes count by their positions.
    batches = [ids[:1, :4], ids, ids.flip(1)[:1]]
    found = evaluate(model, batches, ["default"], layers=False).results["default"]
    counts, means = torch.tensor([4.0, 48, 24], dtype=torch.float64), torch.tensor(found.kl_by_batch).double()
    assert found.kl == pytest.approx(float((counts * means).sum() / 76))
    deviations = counts * (means - found.kl)
    assert found.kl_error == pytest.approx(float((deviations.square().sum() * 3 / 2).sqrt()) / 76)


def test_candidates_run_in_int8(model, ids):
    counts = {}
    for name in ("default", "calibrated", "column", "no outliers", "bfloat16"):
        candidate, ops = counted(candidates.CANDIDATES[name].make)
        evaluate(model, [ids, ids], {name: candidate}, layers=False)
        counts[name] = ops.count
    assert counts == dict.fromkeys(counts, 2 * 14) | {"bfloat16": 0}


def test_the_model_is_not_changed(ids):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=128))
    model.train()
    model.model.layers[0].eval()
    calibrated = calibrate(copy.deepcopy(model).eval(), progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate(model, ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    targets = [target for target in plan(model, Int8Config()) if target.reason is None]
    assert targets
    assert all(rotation_of_view(target.weight, target.view) is None for target in targets)
    # A calibration that the user's model has stays.
    calibrated.apply(model)
    evaluate(model, ids, ["default"])
    assert all(rotation_of_view(target.weight, target.view).calibrated for target in targets)


def test_padding_does_not_count(model, ids):
    plain = evaluate(model, [ids], ["default"], layers=False).results
    for side in ("right", "left"):
        pad = (0, 5) if side == "right" else (5, 0)
        padded = {
            "input_ids": F.pad(ids, pad, value=7),
            "attention_mask": F.pad(torch.ones_like(ids), pad),
            "position_ids": F.pad(torch.arange(24).expand(2, 24), pad),
        }
        for name, found in evaluate(model, [padded], ["default"], layers=False).results.items():
            assert found.positions == 48
            # Attention over more keys sums in another order.
            assert found.kl == pytest.approx(plain[name].kl, rel=0.05)
            assert found.top1 == plain[name].top1
            assert found.perplexity == pytest.approx(plain[name].perplexity, rel=1e-3)


def test_errors_at_padded_positions_do_not_count():
    """An encoder's features and logits that are wrong there only."""

    class Encoder(nn.Module):
        def __init__(self, broken):
            super().__init__()
            self.linear, self.broken = nn.Linear(8, 8), broken

        def forward(self, x, attention_mask, as_logits):
            y = x.masked_fill(attention_mask[..., None] == 0, 1e6) if self.broken else x
            return {"logits": y} if as_logits else (y, [y[:, 0]])

    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    for as_logits in (False, True):
        batch = {"x": x, "attention_mask": mask, "as_logits": as_logits}
        found = evaluate(Encoder(False), batch, {"broken": Encoder(True)}, layers=False).results["broken"]
        assert found.error == 0
        assert found.kl == (0 if as_logits else None)
        batch["attention_mask"] = torch.ones_like(mask)
        assert evaluate(Encoder(False), batch, {"broken": Encoder(True)}, layers=False).results["broken"].error == 0


def test_the_layer_with_the_largest_error_is_named(model, ids):
    bad = copy.deepcopy(model)
    weight = bad.model.layers[1].mlp.up_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data.add_(0.1 * weight.std() * noise)
    found = evaluate(model, [ids], {"bad": bad}).results["bad"]
    assert [layer.path for layer in found.layers] == ["model.layers.1.mlp.up_proj"], "the others are exact"
    assert found.worst == found.layers[0]
    assert found.worst.kind == "model.layers.*.mlp.up_proj"
    assert found.worst.sqnr_db == pytest.approx(20, abs=0.5), "noise of a tenth of the weight"

    def damaged(model, batches):
        quantize_(model, progress=False)
        model.model.layers[0].self_attn.o_proj.qweight[::2] = 0
        return model

    found = evaluate(model, [ids], {"damaged": Candidate(damaged)})
    result = found.results["damaged"]
    assert len(result.layers) == 14
    assert result.worst.path == "model.layers.0.self_attn.o_proj"
    assert min(layer.sqnr_db for layer in result.layers if layer != result.worst) > 30
    assert f"{result.worst.sqnr_db:.1f} dB, model.layers.0.self_attn.o_proj" in str(found)


def test_outliers_are_those_that_explain_counts(model, ids):
    for config in ({"threshold": 1.5}, {"outliers": "column", "threshold": 0.5}, {"skip_modules": ["*"]}):
        sites = explain(model, ids, use_cache=False, config=config).rewritten
        if not sites:
            with pytest.warns(int8compile.Int8Warning, match="left all 15 linears in float"):
                assert evaluate(model, [ids], {"any": config}).results["any"].outliers is None
            continue
        expected = sum(site.outliers * int(site.shape[1]) for site in sites) / sum(int(site.shape[1]) for site in sites)
        found = evaluate(model, [ids], {"any": config}).results["any"]
        assert expected > 0
        assert found.outliers == pytest.approx(expected, rel=0.02)


def test_the_rotation_spreads_a_large_activation():
    model = Stack()
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))
    x[..., 3] = 100
    spreads = {spread.path: spread for spread in evaluate(model, [x], ["default"]).spreads}
    assert list(spreads) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert spreads["layers.0.up"].plain > 15
    assert spreads["layers.0.up"].rotated < 3


def test_rows_of_all_batches_are_kept_for_layers(model, ids):
    found = evaluate(model, [ids, ids, ids.flip(0)], ["default"])
    alone = evaluate(model, [ids], ["default"])
    for one, other in zip(found.results["default"].layers, alone.results["default"].layers, strict=True):
        assert one.path == other.path
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=1)


def test_experts_are_one_layer(ids):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, vocab_size=128)
    found = evaluate(transformers.MixtralForCausalLM(config).eval(), [ids, ids], ["default"])
    layers = {layer.kind: layer for layer in found.results["default"].layers}
    assert layers["model.layers.*.mlp.experts"].sqnr_db > 25
    assert layers["model.layers.*.mlp.experts"].outliers is None


def test_conv1d_is_a_layer(ids):
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128)).eval()
    found = evaluate(gpt2, [ids], ["default", "calibrated"]).results
    assert {layer.kind.rpartition(".")[2] for layer in found["calibrated"].layers} == {"c_attn", "c_proj", "c_fc"}


def test_an_image_classifier_has_logits_but_no_perplexity():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=20)
    vit = transformers.ViTForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(3, 3, 32, 32)}
    for found in evaluate(vit, batch, ["bfloat16", "default", "calibrated"]).results.values():
        assert found.kl is not None
        assert found.perplexity is None
        assert found.positions == 3
    # A regression has a single value, which is no distribution.
    config.num_labels = 1
    found = evaluate(transformers.ViTForImageClassification(config).eval(), batch, ["default"])
    assert found.results["default"].kl is None
    assert found.results["default"].error > 0
    assert found.notes == ("The model returns no logits, so only the error of its outputs is compared.",)
    assert "KL" not in str(found)


def test_outputs_of_any_structure_are_compared():
    @dataclasses.dataclass
    class Output:
        sample: torch.Tensor
        steps: int = 3

    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.linear, self.kind = nn.Linear(32, 32), kind

        def forward(self, x):
            y = self.linear(x)
            return {"tensor": y, "tuple": (y, None), "nested": {"a": [y]}, "dataclass": Output(y)}[self.kind]

    for kind in ("tensor", "tuple", "nested", "dataclass"):
        torch.manual_seed(0)
        found = evaluate(Model(kind), [(torch.randn(4, 32),)], ["default"]).results["default"]
        assert 0 < found.error < 0.02
        assert found.positions == 1


def test_an_encoder_decoder_predicts_the_decoders_tokens(ids):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=128)
    model = transformers.T5ForConditionalGeneration(config).eval()
    target = ids[:, :10]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": target}
    found = evaluate(model, batch, ["default"], layers=False).results["default"]
    assert found.positions == 20
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()).exp()
    assert found.perplexity == pytest.approx(float(expected), rel=0.05)


def test_a_decoder_that_makes_its_own_tokens_predicts_labels(ids):
    """From labels, or in BART from the encoder's tokens."""
    torch.manual_seed(0)
    options = {"d_model": 64, "vocab_size": 128, "decoder_start_token_id": 0}
    config = transformers.T5Config(d_kv=16, d_ff=96, num_layers=1, num_heads=4, **options)
    model = transformers.T5ForConditionalGeneration(config).eval()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.flip(1)}
    found = evaluate(model, batch, ["default"], layers=False).results["float32"]
    assert found.positions == 48, "the encoder's padding is none of the decoder"
    with torch.no_grad():
        assert found.perplexity == pytest.approx(float(model(**batch).loss.exp()), rel=1e-5)
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **options)).eval()
    found = evaluate(bart, {"input_ids": ids, "attention_mask": mask}, ["default"], layers=False).results["float32"]
    assert (found.positions, found.perplexity) == (48, None)


def test_classes_of_tokens_are_no_next_tokens(ids):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear, self.head = nn.Embedding(128, 32), nn.Linear(32, 32), nn.Linear(32, 5)

        def forward(self, input_ids):
            return {"logits": self.head(self.linear(self.embedding(input_ids)))}

    found = evaluate(Tagger(), [ids], ["default"]).results["default"]
    assert found.kl > 0
    assert (found.positions, found.perplexity) == (48, None)


def test_candidates_without_int8_are_named():
    """Linears that only torch.compile finds."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))
            self.attention = nn.MultiheadAttention(32, 4)

        def forward(self, x):
            return F.linear(self.attention(x, x, x)[0], self.weight)

    with pytest.warns(int8compile.Int8Warning, match="in float"):
        found = evaluate(Functional(), [torch.randn(4, 2, 32)], ["default", "bfloat16"])
    text = "\n".join(found.notes)
    assert "default: nothing of it is int8: " in text
    assert "quantize_ does not convert them; torch.compile may: " in text
    assert "attention.out_proj" in text
    assert "bfloat16" not in text
    same = evaluate(Stack(), [torch.randn(4, 32)], {"same": Candidate(lambda model, batches: model)})
    assert "same: its outputs are those of float32 exactly, so it may have converted nothing." in same.notes


def test_notes_on_patterns_and_on_what_was_calibrated(model, ids):
    own = {"skip_modules": ["layer.0", "o_proj"], "modules": {"gate": {"rotate": False}}}
    notes = evaluate(model, [ids], {"own": own, "calibrated": "calibrated"}, layers=False).notes
    assert notes == (
        evaluation.few_positions(48),
        "own: these patterns match no linear: 'layer.0', 'gate'.",
    )
    many = ids.repeat(1, 6)
    assert evaluate(model, [many], ["default"], layers=False).notes == ()
    notes = evaluate(Stack(), [torch.randn(64, 32)], ["default", "calibrated"], layers=False).notes
    assert notes[-1].startswith("calibrated: calibrated on the batches that are compared")


def test_a_dtype_that_is_a_string_and_a_mask_that_bfloat16_does_not_hold():
    class Masked(nn.Module):
        dtype = "float32"

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x, mask):
            return (self.linear(x) + mask).softmax(-1)

    mask = torch.full((4, 32), torch.finfo(torch.float32).min)
    found = evaluate(Masked(), [(torch.randn(4, 32), mask)], ["bfloat16", "default"]).results
    assert not any(math.isnan(result.error) for result in found.values())
    infinite = evaluation.args_in(torch.tensor([-math.inf, 1e38, -3.4028235e38, math.nan]), torch.float16)
    assert infinite.tolist()[:3] == [-math.inf, 65504, -65504]
    assert infinite[3].isnan()


def test_a_masked_language_model_has_no_perplexity(ids):
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, vocab_size=128)).eval()
    found = evaluate(bert, [ids], ["default"], layers=False).results["default"]
    assert found.kl > 0
    assert found.perplexity is None


def test_a_model_in_bfloat16_is_compared_with_its_float32_copy(model, ids):
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = evaluate(half, [ids], {"itself": half, "bfloat16": "bfloat16", "default": "default"}).results
    assert found["itself"].kl == found["bfloat16"].kl > 0
    assert found["float32"].bytes == 2 * found["bfloat16"].bytes
    assert next(half.parameters()).dtype == torch.bfloat16


def test_an_int8_model_is_compared_with_its_dequantized_copy(model, ids):
    stored = copy.deepcopy(model)
    quantize_(stored, {"threshold": 4.0}, progress=False)
    before = {name: value.clone() for name, value in stored.state_dict().items()}
    found = evaluate(stored, [ids])
    assert list(found.results) == ["float32", "as stored", "bfloat16"]
    assert "the loss of quantizing the weights is not in the figures" in found.notes[0]
    full = copy.deepcopy(stored)
    int8compile.dequantize_(full)
    expected = evaluation.divergence(logits(full, ids), logits(stored, ids)).mean()
    assert found.results["as stored"].kl == pytest.approx(float(expected), rel=1e-9)
    assert len(found.results["as stored"].layers) == 14
    assert all(torch.equal(before[name], value) for name, value in stored.state_dict().items())
    # Other candidates are made from the dequantized weights.
    assert list(evaluate(stored, [ids], ["column"]).results) == ["float32", "as stored", "column"]


def test_a_compiled_model_is_a_candidate(model, ids):
    int8 = copy.deepcopy(model)
    quantize_(int8, progress=False)
    found = evaluate(model, [ids], {"compiled": torch.compile(int8, backend="eager"), "default": "default"}).results
    assert found["compiled"].kl == found["default"].kl > 0
    assert found["compiled"].layers == (), "a graph has no modules"


def test_the_table_has_what_was_measured(model, ids):
    found = evaluate(model, [ids], {"own": Int8Config(rotate=False)})
    text = str(found)
    for part in ("KL divergence [nats]", "same most likely", "perplexity", "error of outputs", "MiB", "own"):
        assert part in text
    assert "model.layers.*.mlp.down_proj" in text
    assert f"{found.results['own'].kl:.4f}" in text


def test_results_as_json(model, ids, tmp_path):
    found = evaluate(model, [ids], ["default"])
    found.save(tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved == found.to_dict()
    assert saved["results"]["default"]["kl"] == found.results["default"].kl
    assert saved["results"]["default"]["layers"][0]["path"] == "model.layers.0.self_attn.q_proj"
    assert saved["spreads"][0]["plain"] > 1
    with pytest.raises(InputError, match=r"cannot be written: .* Name a file in a folder that exists"):
        found.save(tmp_path / "none" / "found.json")


def test_a_picture_is_drawn(model, ids, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = evaluate(model, [ids], ["default", "column"])
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no layer was compared"):
        evaluate(model, [ids], ["default"], layers=False).plot(tmp_path / "none.png")
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'run `pip install "int8compile\[plots\]"`'):
        found.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_other_libraries_are_left_out_where_they_are_not_installed(model, ids, monkeypatch):
    monkeypatch.setattr(candidates, "installed", lambda name: False)
    found = evaluate(model, [ids], ["default", "torchao", "bitsandbytes"], layers=False)
    assert list(found.results) == ["float32", "default"]
    assert found.notes[:2] == (
        "torchao is left out: the package torchao is not installed.",
        "bitsandbytes is left out: the package bitsandbytes is not installed.",
    )
    assert found.notes[0] in str(found)


def test_bitsandbytes_is_near_the_column_policy(model, ids):
    pytest.importorskip("bitsandbytes")
    found = evaluate(model, [ids], ["column", "bitsandbytes"]).results
    assert found["bitsandbytes"].kl == pytest.approx(found["column"].kl, rel=0.5)
    # The same layers, each about as near to float.
    for one, other in zip(found["bitsandbytes"].layers, found["column"].layers, strict=True):
        assert one.path == other.path
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=1)


def test_torchao_gets_the_linears_that_int8compile_converts(model, ids, monkeypatch):
    asked = []

    def convert(model, config, filter_fn):
        asked.append((config, [path for path, module in model.named_modules() if filter_fn(module, path)]))

    names = ("Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig")
    configs = {name: lambda name=name, **options: (name, options) for name in names}
    monkeypatch.setitem(sys.modules, "torchao.quantization", types.SimpleNamespace(quantize_=convert, **configs))
    monkeypatch.setattr(candidates, "installed", lambda name: True)
    evaluate(model, [ids], ["torchao"], layers=False)
    peers.with_torchao(model, dynamic=False)
    assert [config for config, _ in asked] == [(name, {"set_inductor_config": False}) for name in names]
    assert all(len(paths) == 14 and "lm_head" not in paths for _, paths in asked)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (["colum"], "unknown candidate 'colum' .did you mean 'column'.*Allowed: float32, bfloat16, default,"),
        ("defalt", "did you mean 'default'"),
        ({"own": {"treshold": 3}}, "unknown option 'treshold'.*did you mean 'threshold'"),
        ({"own": 3}, "'own' is int; give the name of a candidate, an Int8Config"),
        (["as stored"], "the model is not int8, so there is nothing that is stored"),
    ],
)
def test_wrong_candidates_are_refused_before_anything_runs(model, ids, configs, message, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ConfigError, match=message):
        evaluate(model, [ids], configs)


def test_wrong_inputs_are_refused(model, ids):
    with pytest.raises(InputError, match="batches is None; give a list of inputs"):
        evaluate(model)
    with pytest.raises(InputError, match="batches is empty"):
        evaluate(model, [])
    with pytest.raises(InputError, match="batches is int"):
        evaluate(model, 3)
    with pytest.raises(InputError, match=r"model is int; give an nn\.Module"):
        evaluate(3, [ids])
    says = "LlamaForCausalLM does not run on batch 1: ValueError: .*input_ids.* Give it inputs that it takes"
    with pytest.raises(InputError, match=says) as raised:
        evaluate(model, [ids, {"wrong": ids}])
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(InputError, match="a batch is str"):
        evaluate(model, ["text"])
    with pytest.raises(InputError, match="batch 1 has no position to compare"):
        evaluate(model, [ids, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(ModelError, match="on the meta device, without data"):
        evaluate(copy.deepcopy(model).to("meta"), [ids])
    with pytest.raises(ModelError, match="returns no float tensors"):
        evaluate(nn.Identity(), [ids])
    with pytest.raises(ModelError, match=r"other returns other outputs than the model: \[\[48, 5\]\], not \[\[48, 128"):
        evaluate(model, [ids], {"other": lambda ids, **_: {"logits": torch.zeros(2, 24, 5)}})


def test_a_text_of_one_token_has_no_perplexity(model, ids):
    assert evaluate(model, [ids[:, :1]], ["default"], layers=False).results["default"].perplexity is None


def test_nan_is_said(model, ids):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = math.nan
    of = "the float32 outputs of LlamaForCausalLM on batch 0 have NaN, because its model.norm.weight has NaN or Inf"
    with pytest.raises(ModelError, match=of):
        evaluate(broken, [ids])
    found = evaluate(model, [ids, ids], {"broken": broken, "default": "default"}, layers=False)
    result = found.results["broken"]
    assert all(math.isnan(value) for value in (result.kl, result.top1, result.perplexity, result.error))
    assert found.notes[1:] == ("broken: its outputs have NaN, so it cannot be compared.",)
    assert found.results["default"].kl > 0
    assert found.to_dict()["results"]["broken"]["kl"] is None
    assert "nan" in str(found)
