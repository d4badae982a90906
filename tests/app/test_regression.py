"""Sentences of the pytest plugin on a result, and on the difference to a stored one."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8compile import ConfigError, InputError, Int8Config, ModelError
from int8compile.app import regression
from int8compile.timing import Interval, Times
from int8compile.tuning.evaluation import Result
from tests.helpers.models import Stack


def data(low: float, ratio: float, high: float, **changed: Any) -> dict[str, Any]:
    return {
        "baseline": "float32",
        "asked": "best",
        "kernel": "C++ kernel, variant avx2",
        "sites": [{"path": "up", "op": "linear", "runs_in": "int8", "reason": None}],
        "torch": "2.13",
        "threads": 2,
        "low": low,
        "ratio": ratio,
        "high": high,
        "rounds": 20,
        "others": 0.01,
        **changed,
    }


def test_below_means_that_the_whole_interval_is() -> None:
    assert regression.below(data(1.5, 1.6, 1.7), 1.5) == (False, "")
    fails, text = regression.below(data(1.5, 1.6, 1.7), 1.65)
    assert not fails
    assert text.startswith("cannot tell whether int8 reaches min_speedup=1.65: int8 is 1.60 times as fast as float32")
    fails, text = regression.below(data(1.5, 1.6, 1.7), 2)
    assert fails
    assert "(95 % interval 1.50 to 1.70, 20 rounds), and min_speedup=2: the whole interval is below." in text


def test_a_failure_names_what_changed_since_the_stored_run() -> None:
    float_site = {"path": "up", "op": "linear", "runs_in": "float", "reason": "it is too small"}
    new = {"path": "gate", "op": "linear", "runs_in": "float", "reason": "it is smaller"}
    now = data(0.5, 0.6, 0.7, sites=[float_site, new], kernel="C++ kernel, variant portable", others=0.4)
    fails, text = regression.below(now, 1, [("0001_x", data(1.5, 1.6, 1.7))])
    assert fails
    assert "In the stored run 0001_x, int8 is 1.60 times as fast" in text
    assert "- up ran in int8 and now runs in float: it is too small" in text
    assert "- gate is new and runs in float: it is smaller" in text
    assert "- kernel: was C++ kernel, variant avx2, is C++ kernel, variant portable" in text
    assert "- other processes used 40 % of the CPU" in text


def test_a_regression_says_how_much_and_whether_it_may_be_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INT8COMPILE_ISA", raising=False)
    text = regression.regressed(data(0.7, 0.8, 0.9), "0001_x", data(1.5, 1.6, 1.7))
    assert "relative to float, int8 takes 2.00 times as long as then." in text
    assert "no layer and no kernel changed" in text
    assert "noise" not in text
    assert "The intervals overlap" in regression.regressed(data(1.4, 1.5, 1.6), "0001_x", data(1.5, 1.6, 1.7))
    monkeypatch.setenv("INT8COMPILE_ISA", "avx2")
    assert regression.remedy(data(1, 1, 1)) == "To do: unset INT8COMPILE_ISA=avx2, or store a run with it."


def test_one_call_in_float_makes_a_path_float() -> None:
    sites = [{"path": "up", "runs_in": name, "reason": name} for name in ("int8", "float", "int8")]
    assert regression.changes(data(1, 1, 1, sites=sites), data(1, 1, 1)) == [
        "up ran in int8 and now runs in float: float"
    ]


def test_best_is_the_faster_float_model() -> None:
    comparison = regression.Comparison(Stack(), torch.ones(2, 32))
    assert list(comparison._calls) == ["float32", "bfloat16", "int8"]
    assert comparison.asked == "best"
    times = Times({"float32": [3.0, 3.0], "bfloat16": [2.0, 4.0], "int8": [1.0, 1.0]}, None)
    speed = regression.Speed("float32", "best", Interval(2, 3, 4), times, comparison.report, comparison.kernel)
    assert speed.relative() == [1 / 3, 1 / 3]
    assert speed.to_dict()["medians"] == {"float32": 3.0, "bfloat16": 3.0, "int8": 1.0}


def test_the_model_of_the_caller_stays_as_it_is() -> None:
    model = Stack(1).to(torch.float64)
    comparison = regression.Comparison(model, torch.ones(2, 32, dtype=torch.float64), baseline="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert regression.in_float(comparison.report, []).startswith("2 of 2 linears run in float")
    freed = nn.Linear(32, 32).requires_grad_(False)
    comparison = regression.Comparison(freed, torch.ones(2, 32), Int8Config(free_weights=True), baseline="eager")
    comparison.output()
    assert torch.isfinite(freed(torch.ones(2, 32))).all()


class Trained(nn.Module):
    """A model that behaves differently in training: a batch norm that counts, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.dropout = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.5)
        self.runs: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.runs.append(self.training)
        return self.dropout(self.norm(self.up(x)))


@pytest.mark.parametrize("baseline", ["eager", "float32", "module"])
def test_models_are_timed_in_evaluation_mode(baseline: str) -> None:
    torch.manual_seed(0)
    model, other, x = Trained().requires_grad_(False), Trained().requires_grad_(False), torch.randn(8, 32)
    model.norm.eval()  # Each module gets its own mode back.
    expected = copy.deepcopy(model).eval()(x)
    before = [{name: value.clone() for name, value in each.state_dict().items()} for each in (model, other)]
    comparison = regression.Comparison(model, x, baseline=other if baseline == "module" else baseline)
    comparison.rounds(6)
    comparison.measure(6)
    # Without dropout, the output is the float model's, but for the error of int8.
    torch.testing.assert_close(comparison.output(), expected, rtol=0.05, atol=0.05)
    assert not any(model.runs + other.runs)
    assert bool(other.runs) is (baseline == "module")
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
    assert other.norm.training
    for each, state in zip((model, other), before, strict=True):
        torch.testing.assert_close(dict(each.state_dict()), state, rtol=0, atol=0)


def test_copies_in_other_dtypes_are_in_evaluation_mode() -> None:
    model = Trained()
    comparison = regression.Comparison(model, torch.randn(8, 32), baseline="bfloat16")
    first, second = comparison._calls["bfloat16"](), comparison._calls["bfloat16"]()
    assert isinstance(first, Tensor)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert model.dropout.training


@pytest.mark.parametrize("value", ["2", True, float("nan"), -1, [1]])
def test_bounds_are_checked_before_the_measurement(value: Any) -> None:
    regression.check_bounds(min_speedup=None, max_kl=0, max_error=1.5)
    with pytest.raises(ConfigError, match=rf"min_speedup={re.escape(repr(value))}: give a number of at least 0"):
        regression.check_bounds(max_kl=1, min_speedup=value)


def test_expect_float_takes_patterns() -> None:
    comparison = regression.Comparison(Stack(), torch.ones(2, 32), {"skip_modules": ["down"]}, baseline="eager")
    assert regression.in_float(comparison.report, ["*.down"]) == ""
    text = regression.in_float(comparison.report, ["layers.0"])
    assert "- layers.1.down stays in float: its module path matches skip_modules" in text
    assert "layers.0" not in text.partition("allow:")[2]
    with pytest.raises(ConfigError, match=r"give a list of patterns, e.g. \['down'\]"):
        regression.in_float(comparison.report, "down")


def test_few_rounds_have_no_interval() -> None:
    comparison = regression.Comparison(Stack(1), torch.ones(2, 32), baseline="eager")
    with pytest.raises(ConfigError, match=r"rounds=5: give a whole number of at least 6"):
        comparison.rounds(5)
    assert comparison.rounds(6) == 6
    speed = comparison.measure(6)
    assert len(speed.relative()) == 6
    assert "6 rounds" in str(speed)


def test_unknown_baselines_and_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"baseline='float16': give 'best', .* \(did you mean"):
        regression.Comparison(Stack(), torch.ones(2, 32), baseline="float16")
    with pytest.raises(InputError, match=r"model is function; give an nn.Module"):
        regression.Comparison(lambda x: x, torch.ones(2, 32))  # type: ignore[arg-type]


def result(**numbers: Any) -> Result:
    """The result of a model without logits, with other numbers."""
    real = regression.accuracy(Stack(), torch.randn(4, 32), None)
    layers = [
        layer._replace(path=f"layers.{number}.up", sqnr_db=sqnr, outliers=0.01)
        for number, (layer, sqnr) in enumerate(zip(real.layers, [30.0, 12.0, 40.0, 25.0], strict=True))
    ]
    made = {"kl": 0.02, "kl_error": 0.001, "top1": 0.95, "error": 0.1, "layers": tuple(layers)}
    return dataclasses.replace(real, **(made | numbers))


def test_inexact_names_bounds_and_the_worst_layers() -> None:
    assert regression.inexact(result(), max_kl=0.02, max_error=0.1, min_top1=0.95) == ""
    text = regression.inexact(result(), max_kl=0.01, max_error=0.05, min_top1=0.99)
    assert "its KL divergence from float32 is 0.02 nats (standard error 0.001), and max_kl=0.01" in text
    assert "the relative error of its outputs is 0.1, and max_error=0.05" in text
    assert "float32's at 95.00% of positions, and min_top1=0.99" in text
    lines = text.splitlines()
    assert lines[1] == "- layers.1.up: its own output is 12.0 dB above its error, outliers 1 %"
    assert [line[:12] for line in lines[1:4]] == ["- layers.1.u", "- layers.3.u", "- layers.0.u"]
    assert lines[4].endswith("skip_modules=['layers.1.up']")


def test_nan_is_outside_of_any_bound() -> None:
    nan = float("nan")
    broken = result(kl=nan, top1=nan, error=nan, layers=())
    assert regression.inexact(broken, max_kl=1e9)
    assert regression.inexact(broken, max_error=1e9)
    assert regression.inexact(broken, min_top1=0.0)


def test_bounds_of_logits_need_logits() -> None:
    without = result(kl=None, kl_error=None, top1=None)
    assert regression.accuracy_data(without).keys() == {"error", "positions"}
    for bound in ("max_kl", "min_top1"):
        with pytest.raises(InputError, match=rf"{bound}=0.5: the model returns no logits; give max_error"):
            regression.inexact(without, **{bound: 0.5})


def test_the_accuracy_of_a_model_without_int8_is_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    with pytest.raises(ModelError, match="of Functional cannot be measured, because nothing of it is int8"):
        regression.accuracy(Functional(), torch.randn(4, 32), None)
    with pytest.raises(ModelError, match=r"nothing of it is int8: layers.0.up: .*skip_modules"):
        regression.accuracy(Stack(), torch.randn(4, 32), {"skip_modules": ["*"]})


def test_inputs_of_accuracy_are_one_batch_or_several() -> None:
    x = torch.randn(4, 32)
    assert regression.accuracy(Stack(), (x,), None).positions == 1
    assert regression.accuracy(Stack(), {"x": x}, {"skip_modules": ["up"]}).positions == 1
    several = regression.accuracy(Stack(), [x, x], None)
    assert several.positions == 2
    assert {layer.path for layer in several.layers} == {f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")}
