"""advise(): the config keeps the goal, measured on the model itself, and is not dearer than skipping whole blocks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8compile
from benchmarks.advice import followed, measure
from int8compile import Advice, ConfigError, InputError, Int8Config, Int8Linear, ModelError, advise, evaluate, quantize_
from int8compile.timing import Times
from int8compile.tuning import advice, costs
from int8compile.tuning.calibration import Calibration
from int8compile.tuning.candidates import Candidate
from int8compile.tuning.evaluation import Result
from int8compile.tuning.trial import Trial
from tests.helpers.architectures import CASES
from tests.helpers.models import Stack


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Have the linears of a size take 4 ms in float and 1 ms in int8, because measured times differ from run to run."""
    if request.node.get_closest_marker("slow"):
        return

    def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> Times:
        for call in calls.values():
            call()
        return Times({"float": [4e-3], "int8": [1e-3]}, None)

    monkeypatch.setattr(costs, "take_turns", take_turns)


def inputs(count: int = 4) -> list[Tensor]:
    """Return batches whose columns have very different sizes, so that a calibration helps."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 32, generator=generator) * torch.logspace(-1, 1, 32) for _ in range(count)]


def stack(depth: int = 4) -> Stack:
    torch.manual_seed(0)
    return Stack(depth)


def evaluated(model: nn.Module, found: Advice, batches: Any) -> Result:
    """Return what `evaluate` reports for an advice, of a model that is not calibrated."""

    def make(copied: nn.Module, batches: Any) -> nn.Module:
        return followed(copied, found)

    spec = found.config if found.calibration is None else Candidate(make)
    return evaluate(model, batches, {"x": spec}, layers=False, progress=False).results["x"]


def test_a_config_that_is_near_enough_is_kept() -> None:
    model = stack()
    found = advise(model, inputs(), error=0.5, config={"threshold": 8.0}, progress=False)
    assert found.config == Int8Config(threshold=8.0)
    assert (found.calibration, found.kl, found.positions) == (None, None, 128)
    assert [step.what for step in found.steps] == ["as given"]
    assert found.chosen.seconds == pytest.approx(2e-3), "up and down, which differ in size, 1 ms each"
    assert found.error == evaluated(model, found, inputs()).error
    # The model is as it was.
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert not any(vars(parameter) for parameter in model.parameters())


def test_a_calibration_costs_nothing() -> None:
    model = stack()
    given = advise(model, inputs(), error=0.5, progress=False).chosen
    found = advise(model, inputs(), error=0.9 * given.distance, progress=False)
    assert found.chosen.what == "calibrated"
    assert found.calibration is not None
    assert (found.config, found.chosen.seconds) == (Int8Config(), given.seconds)
    assert found.error == evaluated(model, found, inputs()).error
    assert not any(vars(parameter) for parameter in model.parameters()), "the model is not calibrated"
    # If the caller calibrates the model, the config as given is the calibrated one.
    found.calibration.apply(model)
    again = advise(model, inputs(), error=0.9 * given.distance, progress=False)
    assert [step.distance for step in again.steps] == [found.error]


def test_a_calibration_that_is_no_nearer_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config that is returned is measured without it, or with the caller's."""

    def badly(model: nn.Module, batches: Any) -> Calibration:
        return int8compile.calibrate(model, [torch.randn(64, 32) * torch.logspace(4, -4, 32)], progress=False)

    model = stack()
    good = int8compile.calibrate(copy.deepcopy(model), inputs(), progress=False)
    given = advise(model, inputs(), error=0.5, progress=False).chosen.distance
    monkeypatch.setattr(advice, "calibrate_on_tokens", badly)
    found = advise(model, inputs(), error=0.6 * given, progress=False)
    assert found.steps[1].what == "calibrated"
    assert found.steps[1].distance > found.steps[0].distance
    assert found.calibration is None
    assert found.chosen.skipped > 0
    assert found.error == evaluated(model, found, inputs()).error
    assert advice.CALIBRATED_BEFORE not in found.notes
    good.apply(model)
    found = advise(model, inputs(), error=0.5 * given, progress=False)
    assert found.calibration is None
    assert advice.CALIBRATED_BEFORE in found.notes
    with_it = dataclasses.replace(found, calibration=good)
    assert found.error == evaluated(model, with_it, inputs()).error


class Sparse(nn.Module):
    """A linear of rows with one element other than 0, and one of dense rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_settings_where_they_are_nearer() -> None:
    """Rows of one element are exact where they are not rotated."""
    torch.manual_seed(0)
    model, x = Sparse(), torch.eye(64) * torch.rand(64)
    _, _, step, *_ = advise(model, x, error=1e-9, progress=False).steps
    found = advise(model, x, error=step.distance, progress=False)
    assert found.chosen.what.startswith("other settings for")
    assert found.chosen.skipped == 0
    assert not found.config.of("first").rotate
    assert found.error == evaluated(model, found, [x]).error


def test_costs_of_settings_can_be_compared_on_a_machine_that_becomes_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = itertools.accumulate(itertools.repeat(10.0), operator.mul)

    def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> Times:
        now = next(slow)
        return Times({"float": [4e-3 * now], "int8": [1e-3 * now]}, None)

    torch.manual_seed(0)
    model, x = Sparse(), torch.eye(64) * torch.rand(64)
    monkeypatch.setattr(costs, "take_turns", take_turns)
    found = advise(model, x, error=1e-9, progress=False)
    given, _, settings, *_ = found.steps
    assert settings.what.startswith("other settings for")
    assert settings.seconds == pytest.approx(given.seconds) == pytest.approx(found.in_float.seconds / 4)
    assert next(slow) == pytest.approx(1e3), "what is not rotated was timed, and nothing twice"


def test_linears_are_made_as_before_after_a_calibration_that_is_no_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mapping[str, Any]] = []

    def quantized(self: Trial, config: Int8Config) -> dict[str, nn.Module]:
        made.append(original(self, config))
        return dict(made[-1])

    def badly(model: nn.Module, batches: Any) -> Calibration:
        return int8compile.calibrate(model, [torch.randn(64, 32) * torch.logspace(4, -4, 32)], progress=False)

    original = Trial.quantized
    monkeypatch.setattr(Trial, "quantized", quantized)
    monkeypatch.setattr(advice, "calibrate_on_tokens", badly)
    advise(stack(), inputs(), error=1e-9, progress=False)
    # As given, calibrated, and then a lower threshold, which has the same weights.
    given, calibrated, _, lower, *_ = made
    for path, module in given.items():
        assert torch.equal(lower[path].d, module.d)
        assert not torch.equal(calibrated[path].d, module.d)


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_linears_in_float(share: float) -> None:
    model = stack()
    batches = inputs()
    best = min(step.distance for step in advise(model, batches, error=1e-9, progress=False).steps[:2])
    found = advise(model, batches, error=share * best, progress=False)
    made = followed(model, found)
    assert found.error == evaluated(model, found, batches).error
    assert found.error <= share * best
    int8 = sum(isinstance(module, Int8Linear) for module in made.modules())
    assert 0 < found.chosen.skipped == 8 - int8 < 8
    # Linears of one size take 4 ms together in float.
    assert found.chosen.seconds == pytest.approx(2e-3 + 3e-3 / 4 * found.chosen.skipped)
    # Every step that keeps the goal costs as much, or more.
    costs = [(step.seconds, step.bytes) for step in found.steps if step.distance <= share * best]
    assert min(costs) == (found.chosen.seconds, found.chosen.bytes)
    assert "blocks" in "".join(step.what for step in found.steps)


def test_blocks_are_ordered_by_what_they_do_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of what their linears do alone give another order, and so results dearer than blocks by hand."""
    screened: list[set[str]] = []

    def spy(self: Any, skipped: Iterable[str], count: int) -> float:
        paths = tuple(skipped)
        screened.append(set(paths))
        return original(self, paths, count)

    original = advice._Search._screened
    monkeypatch.setattr(advice._Search, "_screened", spy)
    advise(stack(), inputs(), error=1e-9, progress=False)
    assert all({f"layers.{i}.up", f"layers.{i}.down"} in screened for i in range(4))


def test_only_float_is_exact() -> None:
    model = stack(2)
    found = advise(model, inputs(), error=1e-9, progress=False)
    assert (found.error, found.chosen.skipped) == (0.0, 4)
    assert sorted(found.config.skip_modules) == ["layers.*.down", "layers.*.up"]
    assert (found.config.modules, found.calibration) == ({}, None)
    assert "No linear can be int8: only the float model is that near." in str(found)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_experts_and_tied_heads_go_back_to_float(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    batches = [dict(case.inputs)]
    with torch.no_grad():
        before = model(**case.inputs).logits
    found = advise(model, batches, kl=1e-13, config={"lm_head": "int8"}, progress=False)
    assert found.kl is not None
    assert found.kl <= 1e-13
    assert found.chosen.standard_error is None, "a single batch"
    assert found.chosen.skipped > 0
    with torch.no_grad():
        assert torch.equal(model(**case.inputs).logits, before)


def test_what_is_saved(tmp_path: Path) -> None:
    model, config = stack(), {"threshold": 8.0}
    given = advise(model, inputs(), error=0.5, config=config, progress=False)
    assert given.calibration is None
    given.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == given.options() == config
    found = advise(model, inputs(), error=0.9 * given.chosen.distance, config=config, progress=False)
    found.save(tmp_path / "config.json")
    said = json.loads((tmp_path / "config.json").read_text())
    calibration = Calibration.load(tmp_path / said.pop("calibration"))
    assert Int8Config.from_options(said) == found.config
    loaded = dataclasses.replace(found, config=Int8Config.from_options(said), calibration=calibration)
    assert evaluated(model, loaded, inputs()).error == found.error
    assert json.loads(json.dumps(found.to_dict()))["config"] == found.options() == said
    assert "error" in str(found)
    with pytest.raises(int8compile.CheckpointError, match="cannot be written"):
        found.save(tmp_path / "none" / "config.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [2.0, 0.5])
def test_the_divergence_is_what_evaluate_reports(share: float, dtype: torch.dtype) -> None:
    """With padding, batches of several sizes, and a model in another dtype than float32."""
    case = CASES["llama"]
    model = case.build().eval().to(dtype)
    tokens = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    batches = [dict(case.inputs), {"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens[:1]}]
    whole = evaluate(model, batches, ["default", "calibrated"], layers=False, progress=False).results
    goal = share * min(whole[name].kl or 0.0 for name in ("default", "calibrated"))
    found = advise(model, batches, kl=goal, progress=False)
    assert found.steps[0].distance == whole["default"].kl
    assert found.steps[0].standard_error == whole["default"].kl_error
    result = evaluated(model, found, batches)
    assert (found.kl, found.chosen.standard_error) == (result.kl, result.kl_error)
    assert (found.positions, found.chosen.skipped > 0) == (result.positions, share < 1)
    # Bytes are those of the model as it is.
    assert found.in_float.bytes == sum(
        site.weight_bytes for site in int8compile.quantize_(model, progress=False).rewritten
    )


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"kl": 0}, ConfigError, "kl=0: give a finite number > 0. Int8 always differs from float"),
        ({"error": -0.1}, ConfigError, "error=-0.1"),
        ({"kl": float("nan")}, ConfigError, "kl=nan"),
        ({}, ConfigError, "give one of kl="),
        ({"kl": 1, "error": 1}, ConfigError, "give one of kl="),
        ({"error": 1, "rows": 0}, ConfigError, "rows=0"),
        ({"error": 1, "config": {"treshold": 1}}, ConfigError, "did you mean 'threshold'"),
        ({"error": 1, "batches": []}, InputError, "batches is empty"),
        ({"error": 1, "batches": None}, InputError, "advise.. needs batches of inputs"),
        (
            {"error": 1, "batches": torch.full((2, 32), float("nan"))},
            ModelError,
            "float32 outputs of Stack on batch 0 have NaN",
        ),
        ({"error": 1, "batches": torch.randn(2, 33)}, InputError, "Stack does not run on batch 0: RuntimeError"),
    ],
)
def test_refusals(given: dict[str, Any], kind: type[Exception], says: str) -> None:
    batches = given.pop("batches", inputs(1))
    with pytest.raises(kind, match=says):
        advise(stack(1), batches, progress=False, **given)


def test_models_that_are_int8_are_refused() -> None:
    model = stack(1)
    quantize_(model, progress=False)
    with pytest.raises(ModelError, match=r"int8 already. Give advise\(\) the float model"):
        advise(model, inputs(1), error=1.0, progress=False)


def test_outputs_without_logits_are_refused() -> None:
    class Two(Stack):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(InputError, match="no logits; give error= instead of kl="):
        advise(Two(1), inputs(1), kl=1.0, progress=False)
    with pytest.raises(InputError, match="no logits; give error= instead of kl="):
        advise(nn.Sequential(nn.Linear(32, 32)), inputs(1), kl=1.0, progress=False)
    with pytest.raises(InputError, match=r"model is int; give an nn\.Module"):
        advise(3, inputs(1), error=1.0, progress=False)  # type: ignore[arg-type]


def test_notes_on_patterns_and_on_few_positions() -> None:
    case = CASES["llama"]
    found = advise(case.build().eval(), dict(case.inputs), kl=1, config={"skip_modules": ["none"]}, progress=False)
    assert "These patterns match no linear: 'none'." in found.notes
    assert f"Measured on {found.positions} positions only" in "".join(found.notes)


@pytest.mark.slow
def test_smollm2() -> None:
    """On ten of 30 layers, which take a third of the time: `python -m benchmarks.advice` has them all."""
    calibrated, *skipping = measure(layers=10)
    assert calibrated.advice.calibration is not None
    assert calibrated.advice.chosen.skipped == 0
    for found in skipping:
        assert found.advice.chosen.skipped > 0
    for found in (calibrated, *skipping):
        assert found.advice.kl is not None
        assert found.advice.kl <= found.advice.goal
        assert found.again == pytest.approx(found.advice.kl, rel=1e-3)
        assert found.advice.chosen.seconds <= found.by_hand + 1e-8
