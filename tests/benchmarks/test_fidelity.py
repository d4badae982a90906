"""benchmarks.fidelity in a small size, its note on models that are missing, and the results that docs show."""

from __future__ import annotations

import json

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
    fidelity.SMOLLM2: lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE_LAYER)),
    "all-MiniLM-L6-v2": lambda: transformers.BertModel(transformers.BertConfig(**ONE_LAYER)),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the models by small ones, one of which is missing; return their names."""

    def load(name: str) -> torch.nn.Module:
        if name not in MODELS:
            raise ModelError(f"{name} is not installed")
        torch.manual_seed(0)
        return MODELS[name]().eval()

    def texts(tokenizer: Letters) -> dict[str, Tensor]:
        return {name: ids[:, :40] for name, ids in found(tokenizer).items()}

    found = fidelity.texts
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    monkeypatch.setattr(fidelity, "texts", texts)
    monkeypatch.setattr(fidelity, "linears", lambda: {"any": {"the default": 1.0}})
    sources = {name: fidelity.Source((f"package-{name}",), lambda _, name=name: name) for name in (*MODELS, "none")}
    monkeypatch.setattr(fidelity, "SOURCES", sources)
    return list(sources)


def test_texts_have_the_published_number_of_tokens() -> None:
    assert [ids.shape for ids in fidelity.texts(Letters()).values()] == [(1, 512)] * 4
    assert fidelity.other_text(Letters()).shape == (1, 512)
    assert set(fidelity.TWO) < set(fidelity.texts(Letters()))


def test_models_are_compared_in_every_setting(small: list[str], capsys: pytest.CaptureFixture) -> None:
    results = fidelity.measure(small)
    text = fidelity.markdown(json.loads(json.dumps(results)))
    assert "KL divergence from float32 [nats], mean of 4 texts (a licence, the demo's text" in text
    assert "Error of the outputs [%]" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    named = {row[0]: row[1:] for row in rows[2:] if len(row) == 7}
    assert set(named) == set(fidelity.settings(torch.empty(0)))
    kl = {name: fidelity._mean(by) for name, by in results["models"][fidelity.SMOLLM2].items()}
    # Random weights have no outliers, but rounding weights and rounding activations cost accuracy in every setting.
    assert kl["float32"] == 0
    assert all(value > 0 for name, value in kl.items() if name != "float32")
    assert kl["the default's weights alone"] < kl["the default"]
    # The published values are of a real model; the ratio is of the texts that they were measured on.
    two = fidelity._mean(results["models"][fidelity.SMOLLM2]["weights alone, signs only"], fidelity.TWO)
    assert named["weights alone, signs only"][2:4] == ["0.0033", f"{two / 0.0033:.2f} ✗"]
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


def of(**kl: float) -> dict:
    return {name.replace("_", " "): {"kl": {"a": value - 1, "b": value + 1}} for name, value in kl.items()}


def test_what_is_not_within_its_bar_is_named() -> None:
    bars = fidelity.BARS[fidelity.SMOLLM2]
    default, calibrated = bars["the default"], bars["calibrated on random tokens"]
    model = of(the_default=default + 0.0001, calibrated_on_random_tokens=calibrated)
    errors = {"a massive channel, x1, suppressed": {"the default": 5.1}, "any": {"the default": 50.0}}
    assert fidelity.misses({fidelity.SMOLLM2: model, "another": model}, errors) == [
        f"{fidelity.SMOLLM2}, the default: {default + 0.0001:.4f}, bar {default:.4f}",
        "a massive channel, x1, suppressed: 5.1 %, bar 5.0 %",
    ]


def test_the_order_of_two_models_is_compared() -> None:
    one = of(bad=3.0, good=2.0, nearly=2.05)
    assert "no pair of settings the other way round" in fidelity.order({"one": one, "other": one})
    other = of(bad=2.0, good=3.0, nearly=1.0)
    assert "other has the other way round: bad and good," in fidelity.order({"one": one, "other": other})


def test_the_command_writes_only_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, small: list[str], capsys: pytest.CaptureFixture, tmp_path
) -> None:
    asked = []

    def measure(chosen: list[str], picture: object) -> dict:
        asked.append((chosen, picture))
        return {"models": {}, "linears": {"any": {"the default": 1.0}}, "left_out": []}

    monkeypatch.setattr(fidelity, "measure", measure)
    monkeypatch.setattr(fidelity, "RESULTS", tmp_path)
    monkeypatch.setattr(fidelity, "PICTURE", tmp_path / "smollm2.png")
    fidelity.main([fidelity.SMOLLM2, "--out", str(tmp_path / "out.md")])
    assert capsys.readouterr().out == (tmp_path / "out.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out.md"}
    fidelity.main(["--save"])
    assert json.loads((tmp_path / "fidelity.json").read_text())["left_out"] == []
    assert asked == [([fidelity.SMOLLM2], None), (list(fidelity.SOURCES), tmp_path / "smollm2.png")]
