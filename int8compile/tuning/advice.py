"""`advise()`: find the cheapest config of a model that keeps a stated divergence from float.

The search goes from cheap to dear, and stops at the first that is near enough:

1. the config as given;
2. the same, calibrated, which costs nothing when the model runs;
3. other settings for the linears whose own output gets nearer to float with them;
4. linears that stay in float: the effect of each group of linears that read one x is measured alone, and groups are
   taken by effect per time that they cost; then what is not needed goes back to int8. Skipping whole blocks is tried as
   well, so the result is never dearer.

Words:
    distance: What is to be kept small: the mean KL divergence in nats, or the relative error of the outputs.
    energy: The distance, or the square of a relative error: approximately the sum of what the linears contribute.
    unit: Linears that read one x, which stay in float together: else x is quantized for the rest alone.
    cost: Estimated seconds of the linears for one step; where these are equal, the bytes of their weights.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import itertools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from int8compile.config import Int8Config, matches
from int8compile.errors import CheckpointError, ConfigError, InputError, Int8Warning, first_line, listed
from int8compile.groups import group_of
from int8compile.observation import plain
from int8compile.progress import progress_bar
from int8compile.rendering import readable
from int8compile.stored.targets import Target
from int8compile.tuning.calibration import NO_BATCH, Calibration, as_batches, calibrate_on_tokens, check_in_float
from int8compile.tuning.costs import PER_BYTE, Cost, Costs, measured
from int8compile.tuning.evaluation import (
    FEW,
    HIDDEN,
    Call,
    Expected,
    Result,
    check_module,
    few_positions,
    in_float_note,
)
from int8compile.tuning.layers import block_of, kind_of
from int8compile.tuning.trial import Trial

# The effect of single units is measured on so many positions at least.
SCREENED = 512
# Settings that are tried for a unit, and how much smaller its own error must get: smaller gains do not survive a
# change of the text.
SETTINGS: tuple[Mapping[str, Any], ...] = ({"rotate": False}, {"threshold": 8.0}, {"threshold": 4.0, "rotate": False})
GAIN = 0.8
# The most attempts at putting units back to int8, each of which reads all batches.
ATTEMPTS = 6
CALIBRATED_BEFORE = (
    "The model was calibrated before, and the result is with that calibration, which is not part of it: apply it again "
    "wherever the config is used."
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A config that was tried.

    Attributes:
        what: The config in words.
        distance: Its distance from float.
        standard_error: The standard error of a KL divergence over the batches; None for a single batch, and for a
            relative error.
        bytes: Bytes of the weights of all linears that may be int8.
        seconds: Estimated seconds that these linears take for one step.
        skipped: The number of these linears that stay in float.
    """

    what: str
    distance: float
    standard_error: float | None
    bytes: int
    seconds: float
    skipped: int


@dataclasses.dataclass(frozen=True, eq=False)
class Advice:
    """The result of `advise`. `print(advice)` shows what was tried, and the config.

    Attributes:
        config: The cheapest config that was found to keep the distance.
        calibration: The calibration that belongs to it; None if it needs none.
        measure: "KL" (nats, mean over positions) or "error" (relative error of the outputs).
        goal: The largest distance that was allowed.
        chosen: The config's own step: measured, on all batches.
        steps: What was tried on all batches, in this order.
        in_float: What all linears cost in float; its distance is 0.
        positions: The positions that the distance was measured on.
        rows: The rows at a time that the seconds are estimated for.
        notes: Remarks, for example on linears that could not be measured.
    """

    config: Int8Config
    calibration: Calibration | None
    measure: str
    goal: float
    chosen: Step
    steps: tuple[Step, ...]
    in_float: Step
    positions: int
    rows: int
    notes: tuple[str, ...] = ()

    @property
    def kl(self) -> float | None:
        """The mean KL divergence from float in nats; None if the relative error was asked for."""
        return self.chosen.distance if self.measure == "KL" else None

    @property
    def error(self) -> float | None:
        """The relative error of the outputs; None if the KL divergence was asked for."""
        return self.chosen.distance if self.measure == "error" else None

    def options(self) -> dict[str, Any]:
        """Return the config's fields that differ from the defaults, as plain data."""
        default = Int8Config()
        fields = {name: value for name, value in vars(self.config).items() if value != getattr(default, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the calibration itself as plain data."""
        return {
            "config": self.options(),
            "calibrated": self.calibration is not None,
            "measure": self.measure,
            "goal": self.goal,
            "chosen": dataclasses.asdict(self.chosen),
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "in_float": dataclasses.asdict(self.in_float),
            "positions": self.positions,
            "rows": self.rows,
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the config as JSON, for `int8compile quantize --config`, and the calibration beside it, if it has one.

        The JSON names the file of the calibration as `calibration`; `Int8CompileConfig(**json)` takes both.

        Raises:
            CheckpointError: A file cannot be written.
        """
        path = Path(path)
        options = self.options()
        if self.calibration is not None:
            beside = path.with_suffix(".calibration.safetensors")
            self.calibration.save(beside)
            options["calibration"] = beside.name
        try:
            path.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} cannot be written: {first_line(error)}") from error

    def __str__(self) -> str:
        from tabulate import tabulate

        least = min(self.steps, key=lambda step: step.bytes)
        rows = [
            (
                ">" if step is self.chosen else "",
                step.what,
                f"{step.distance:.3g}",
                "" if step.standard_error is None else f"{step.standard_error:.1g}",
                readable(step.bytes),
                f"{step.seconds * 1e3:.3g}",
            )
            for step in (self.in_float, *self.steps)
        ]
        headers = ("", "tried", self.measure, "standard error", "weights", f"ms per step of {self.rows}, estimated")
        table = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
        chosen, unit = self.chosen, " nats" if self.measure == "KL" else ""
        size, seconds = chosen.bytes - least.bytes, chosen.seconds - least.seconds
        found = (
            f"{chosen.what}: {self.measure} {chosen.distance:.3g}{unit} on {self.positions} positions, asked for at "
            f"most {self.goal:g}. {chosen.skipped} linears that could be int8 stay in float: {readable(size)} and an "
            f"estimated {seconds * 1e3:.2g} ms per step more than the smallest."
        )
        lines = [table, "", found, *(f"- {note}" for note in self.notes), "", json.dumps(self.options(), indent=2)]
        return "\n".join([*lines, *(["and the calibration"] if self.calibration is not None else [])])


def advise(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    kl: float | None = None,
    error: float | None = None,
    config: Int8Config | Mapping[str, Any] | None = None,
    rows: int = 1,
    progress: bool = True,
) -> Advice:
    """Find the cheapest config whose outputs are at most so far from the float model's.

    The distance of the result is measured, on all batches, as `evaluate` measures it: from the model in float32.
    Distances measured on few tokens are uncertain themselves, by 5 to 20 %: give some thousand tokens of the kind that
    the model will read, and a goal with a reserve. Times are estimates, from single linears outside of the model.

    Args:
        model: A float model. A copy in evaluation mode, with the same weights, is run. Linears that `quantize_`
            converts are considered.
        batches: Inputs, as `calibrate` takes them. The outputs of the float model for all of them are kept in a
            temporary folder.
        kl: The largest KL divergence from float, in nats, as a mean over positions: for models with logits.
        error: The largest relative error of the outputs, for other models. Give one of the two.
        config: What to begin with. Its `skip_modules` stay skipped.
        rows: The rows at a time, such as the texts that are generated at once, that times are estimated for.
        progress: Whether to show a progress bar.

    Returns:
        The config, with the calibration that belongs to it: `advice.calibration.apply(model)` before
        `quantize_(model, advice.config)`, or before compiling with `options=vars(advice.config)`.

    Raises:
        ConfigError: An option is unknown or not allowed; not exactly one of `kl` and `error` is given, or it is not
            above 0. Only float itself has the distance 0.
        InputError: The model is no module, or does not run; there is no batch, or the outputs have no logits,
            or the float model gives another output each time.
        ModelError: The model has int8 modules, or no data, or its float32 outputs have NaN.
    """
    config = Int8Config.from_options(config)
    goal = checked_goal(kl, error)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"rows={rows!r}: give a whole number of at least 1")
    model = plain(model)
    check_module(model)
    check_in_float(model, "run", "Give advise() the float model")
    if batches is None:
        raise InputError(
            "advise() needs batches of inputs, e.g. [tokenizer(text, return_tensors='pt')] for a language model; "
            "`int8compile advise` has a text of its own"
        )
    given = list(as_batches(batches))
    if not given:
        raise InputError(NO_BATCH)
    with (
        tempfile.TemporaryDirectory(prefix="int8compile-") as folder,
        torch.no_grad(),
        torch.random.fork_rng(),
        progress_bar(desc="Reference", shown=progress) as bar,
    ):
        trial = Trial(model)
        expected = Expected(
            trial.model, [Call.of(model, batch) for batch in given], Path(folder), layers=True, done=bar.update
        )
        if not expected.compare("the model", trial.model, count=1, layers=False).error < 1e-7:
            raise InputError("the model gives different outputs for the same inputs: nothing can be compared with them")
        if error is None and expected.own.kl is None:
            raise InputError("the model's output has no logits; give error= instead of kl=")
        return _Search(trial, expected, "KL" if error is None else "error", goal, config, rows, given, bar).run()


def checked_goal(kl: float | None, error: float | None) -> float:
    """Return the one goal that is given, of `advise`'s `kl` and `error`; raise `ConfigError` if it cannot be one."""
    name, value = ("kl", kl) if error is None else ("error", error)
    if value is None or (kl is not None and error is not None):
        raise ConfigError("give one of kl=, for a model with logits, and error=, the relative error of any outputs")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(
            f"{name}={value!r}: give a finite number > 0. Int8 always differs from float: 0 is the float model itself"
        )
    return float(value)


class _Unit(NamedTuple):
    """Linears that stay in float together.

    Attributes:
        paths: Their paths.
        block: The path of the numbered block they are in, e.g. `model.layers.0`; "" if there is none.
    """

    paths: tuple[str, ...]
    block: str


class _Search:
    """A run of `advise`."""

    def __init__(
        self,
        trial: Trial,
        expected: Expected,
        measure: str,
        goal: float,
        config: Int8Config,
        rows: int,
        batches: Sequence[Any],
        bar: tqdm[Any],
    ) -> None:
        assert expected.observed is not None
        self._trial, self._expected, self._observed = trial, expected, expected.observed
        self._measure, self._goal, self._rows, self._batches, self._bar = measure, goal, rows, batches, bar
        self._given = self._config = config
        self._calibration: Calibration | None = None
        self._int8: dict[str, nn.Module] = {}
        self._costs = Costs({}, (), {})
        self._steps: list[Step] = []

    def run(self) -> Advice:
        """Return the advice."""
        planned = self._trial.targets(self._given)
        self._units = _units(target for target in planned if target.reason is None)
        # And about as many attempts on all batches.
        self._bar.reset(total=len(self._units) + len({unit.block for unit in self._units}) + 20)
        self._int8 = self._trial.quantized(self._given)
        self._time()
        step = self._tried("as given")
        if not self._meets(step):
            step = self._calibrated() or step
        if not self._meets(step):
            step = self._with_settings() or step
        skipped: tuple[str, ...] = ()
        if not self._meets(step):
            step, skipped = self._with_skipped(step)
        notes = self._notes(planned, step)
        config, whole = self._skipping(skipped), self._costs.total(self._int8)
        return Advice(
            config=config,
            calibration=self._calibration if step.skipped < len(self._int8) else None,
            measure=self._measure,
            goal=self._goal,
            chosen=step,
            steps=tuple(self._steps),
            in_float=Step("float", 0.0, None, whole.bytes, whole.seconds, len(self._int8)),
            positions=sum(self._expected.rows),
            rows=self._rows,
            notes=notes,
        )

    def _meets(self, step: Step) -> bool:
        return step.distance <= self._goal

    def _tried(self, what: str, skipped: Iterable[str] = ()) -> Step:
        """Measure the current int8 modules, some of them skipped, on all batches."""
        skipped = set(skipped)
        self._bar.set_description(what)
        result = self._compared(skipped)
        cost = self._costs.total(skipped)
        standard_error = result.kl_error if self._measure == "KL" else None
        step = Step(what, self._distance(result), standard_error, cost.bytes, cost.seconds, len(skipped))
        self._steps.append(step)
        return step

    def _compared(self, skipped: Iterable[str], count: int | None = None) -> Result:
        """Compare the current int8 modules, some of them skipped, with float32 on the first batches; None for all."""
        model = self._trial.put(self._int8, skipped)
        result = self._expected.compare("int8", model, count=count, layers=False)
        self._bar.update()
        return result

    def _distance(self, result: Result) -> float:
        return result.error if self._measure == "error" or result.kl is None else result.kl

    def _energy(self, distance: float) -> float:
        """Return a distance in units that add up."""
        return distance if self._measure == "KL" else distance**2

    def _time(self) -> None:
        self._bar.set_description("Timing linears")
        self._costs = measured(self._trial, self._int8, self._observed, self._rows, self._costs.seconds)

    def _calibrated(self) -> Step | None:
        """Calibrate the float model; return None if that changes nothing."""
        if not self._given.may_rotate:
            return None
        model = self._trial.put({})
        rotations = self._trial.rotations()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Int8Warning)  # Nothing is calibrated.
            calibration = calibrate_on_tokens(model, self._batches)
        if not calibration.groups:
            return None
        before, best = self._int8, min(self._steps, key=lambda step: step.distance)
        self._int8 = self._trial.quantized(self._given)
        step = self._tried("calibrated")
        if step.distance < best.distance:
            self._calibration = calibration
            return step
        # What is tried from here on is not calibrated, as the config that is returned.
        self._trial.put_rotations(rotations)
        self._int8 = before
        return None

    def _with_settings(self) -> Step | None:
        """Give units other settings where their own error gets smaller; return None if the model is no nearer."""
        units = [unit for unit in self._units if not any(map(self._is_set, unit.paths))]
        if self._given.outliers != "row" or not units:
            return None
        own = {unit: self._own_error(unit, self._int8) for unit in units}
        limit, chosen = dict(own), dict[_Unit, Mapping[str, Any]]()
        for settings in SETTINGS:
            made = self._trial.quantized(dataclasses.replace(self._given, modules={"*": settings}))
            for unit in units:
                error = self._own_error(unit, made)
                if error < min(GAIN * own[unit], limit[unit]):
                    limit[unit], chosen[unit] = error, settings
        modules = dict(self._given.modules)
        for settings in SETTINGS:
            paths = [path for unit, said in chosen.items() if said is settings for path in unit.paths]
            modules |= {pattern: dict(settings) for pattern in self._patterns(paths)}
        count = sum(len(unit.paths) for unit in chosen)
        if not count:
            return None
        before = self._config, self._int8, self._costs
        self._config = dataclasses.replace(self._given, modules=modules)
        self._int8 = self._trial.quantized(self._config)
        self._time()
        step = self._tried(f"other settings for {count} of {len(self._int8)} linears")
        if step.distance < min(other.distance for other in self._steps[:-1]):
            return step
        self._config, self._int8, self._costs = before
        return None

    def _is_set(self, path: str) -> bool:
        return any(matches(pattern, path) for pattern in self._given.modules)

    def _with_skipped(self, base: Step) -> tuple[Step, tuple[str, ...]]:
        """Return the cheapest step that keeps the goal with some linears in float, and the paths of these."""
        sums = itertools.accumulate(self._expected.rows)
        count = next((count for count, rows in enumerate(sums, 1) if rows >= SCREENED), len(self._expected.rows))
        self._bar.set_description("Groups, one by one")
        whole = self._screened((), count)

        def alone(units: Iterable[_Unit]) -> dict[_Unit, float]:
            return {unit: max(whole - self._screened(unit.paths, count), 0.0) for unit in units}

        effects = alone(self._units)

        def worth(unit: _Unit) -> float:
            extra = self._costs.extra(unit.paths)
            return effects[unit] / max(extra.seconds, extra.bytes * PER_BYTE / 100, 1e-12)

        order = sorted(self._units, key=worth, reverse=True)
        shortest = self._shortest(base, order, effects, "groups")
        assert shortest is not None  # At last, all are in float.
        found = self._put_back(base, shortest, effects)
        blocks: dict[str, list[_Unit]] = collections.defaultdict(list)
        for unit in self._units:
            if unit.block:
                blocks[unit.block].append(unit)
        if len(blocks) > 1:
            self._bar.set_description("Blocks, one by one")
            # Not the sums of their units' effects, which give another order.
            whole_blocks = alone(map(_together, blocks.values()))
            in_order = list(whole_blocks)
            for units, how in (
                (sorted(in_order, key=whole_blocks.__getitem__, reverse=True), "largest effect first"),
                (in_order, "from the first"),
                (in_order[::-1], "from the last"),
            ):
                cheaper = self._shortest(base, units, whole_blocks, f"blocks, {how},", cheaper_than=found[0])
                found = cheaper or found
        return found

    def _screened(self, skipped: Iterable[str], count: int) -> float:
        """Return the energy on the first batches, where some linears stay in float."""
        return self._energy(self._distance(self._compared(skipped, count)))

    def _shortest(
        self,
        base: Step,
        order: Sequence[_Unit],
        effects: Mapping[_Unit, float],
        what: str,
        cheaper_than: Step | None = None,
    ) -> tuple[Step, tuple[str, ...]] | None:
        """Return the step of the first units that are enough, in float, and their paths; None if they cost too much.

        Energies are predicted by the effects, and the number of units found between the last that was too small and the
        last that was enough.

        Args:
            base: The step without units in float.
            order: The units, in the order in which they are taken.
            effects: The energy that each saves.
            what: Their name.
            cheaper_than: What the result must be cheaper than.
        """
        prefixes = [tuple(path for unit in order[:number] for path in unit.paths) for number in range(len(order) + 1)]
        prefixes = [tuple(dict.fromkeys(paths)) for paths in prefixes]
        total = sum(effects.values()) or 1.0
        saved = [0.0]
        for unit in order:
            saved.append(saved[-1] + effects[unit] / total)
        energy, goal = self._energy(base.distance), self._energy(self._goal)
        predicted = [energy * max(1 - share, 0.0) for share in saved]
        best: tuple[Step, tuple[str, ...]] | None = None

        def step_of(number: int) -> Step:
            return self._tried(f"{number} of {len(order)} {what} in float", prefixes[number])

        low, high, ratio, tries = 0, len(order), 1.0, 0
        if cheaper_than is not None:
            while high and self._costs.total(prefixes[high]) >= _cost_of(cheaper_than):
                high -= 1
            if not high or not self._meets(step := step_of(high)):
                return None
            best = step, prefixes[high]
        while high - low > 1:
            # Where the effects predict badly, halving is faster.
            enough = [number for number, value in enumerate(predicted) if value * ratio <= goal]
            number = (low + high) // 2 if tries > 4 or not enough else enough[0]
            number, tries = min(max(number, low + 1), high - 1), tries + 1
            step = step_of(number)
            if self._meets(step):
                high, best = number, (step, prefixes[number])
            else:
                low = number
            if predicted[number] > 0:
                ratio = self._energy(step.distance) / predicted[number]
        return best or (step_of(high), prefixes[high])

    def _put_back(
        self, base: Step, found: tuple[Step, tuple[str, ...]], effects: Mapping[_Unit, float]
    ) -> tuple[Step, tuple[str, ...]]:
        """Return a step with those units in int8 again that the goal does not need, the most expensive first."""
        scale = self._energy(base.distance) / (sum(effects.values()) or 1.0)
        goal, attempts = self._energy(self._goal), 0
        step, skipped = found
        for unit in sorted(self._units, key=lambda unit: self._costs.extra(unit.paths), reverse=True):
            rest = tuple(path for path in skipped if path not in unit.paths)
            expected = self._energy(step.distance) + scale * effects[unit]
            # Predictions are a little off.
            if rest == skipped or expected > 1.05 * goal or attempts == ATTEMPTS:
                continue
            attempts += 1
            without = self._tried(f"without {listed(unit.paths)}", rest)
            if self._meets(without):
                step, skipped = without, rest
        return step, skipped

    def _own_error(self, unit: _Unit, int8: Mapping[str, nn.Module]) -> float:
        """Return the squared relative error of a unit's outputs, given the inputs of the float model."""
        found = [each for path in unit.paths if (each := self._observed.noise(path, int8[path])) is not None]
        signal = sum(signal for _, signal in found)
        return sum(noise for noise, _ in found) / signal if signal else 0.0

    def _patterns(self, paths: Iterable[str]) -> list[str]:
        """Return few patterns that match some linears, and no other linear that could be int8."""
        left = dict.fromkeys(paths)
        others = [path for path in self._int8 if path not in left]
        shorter = [kind_of(path) for path in left] + [block_of(path) for path in left]
        found = []
        for pattern in filter(None, dict.fromkeys(shorter)):
            covered = [path for path in left if matches(pattern, path)]
            if len(covered) > 1 and not any(matches(pattern, path) for path in others):
                found.append(pattern)
                left = {path: None for path in left if path not in covered}
        return found + [glob.escape(path) for path in left]

    def _skipping(self, skipped: Sequence[str]) -> Int8Config:
        """Return the config with some linears in float, without settings for these alone."""
        patterns = (*self._config.skip_modules, *self._patterns(skipped))
        int8 = [path for path in self._int8 if path not in skipped]
        modules = {
            pattern: settings
            for pattern, settings in self._config.modules.items()
            if pattern in self._given.modules or any(matches(pattern, path) for path in int8)
        }
        return dataclasses.replace(self._config, skip_modules=patterns, modules=modules)

    def _notes(self, planned: Sequence[Target], step: Step) -> tuple[str, ...]:
        notes = []
        if self._int8 and step.skipped == len(self._int8):
            notes.append("No linear can be int8: only the float model is that near.")
        if not self._int8:
            notes.append("The model has no linear that quantize_ converts under this config.")
        if self._trial.calibrated and self._calibration is None:
            notes.append(CALIBRATED_BEFORE)
        patterns = self._given.patterns
        if unused := [each for each in patterns if not any(matches(each, target.path) for target in planned)]:
            notes.append(f"These patterns match no linear: {listed(map(repr, unused))}.")
        if self._expected.own.kl is not None and (positions := self._expected.own.positions) < FEW:
            notes.append(few_positions(positions))
        if step.distance + 2 * (step.standard_error or 0.0) > self._goal >= step.distance:
            notes.append(
                "The goal is within two standard errors of the distance, so on other inputs it may be missed: ask for "
                "less, or give more batches."
            )
        if self._costs.slower and step.skipped:
            notes.append(
                f"Float is not slower than int8 here for {self._rows} rows of {listed(self._costs.slower)}: both count "
                "as equally fast."
            )
        hidden = [target.path for target in planned if target.reason in HIDDEN]
        if hidden:
            notes.append(in_float_note(hidden))
        return tuple(notes)


def _units(targets: Iterable[Target]) -> list[_Unit]:
    """Return the units of the linears that may be int8, in the order of the model."""
    units: dict[Hashable, list[str]] = collections.defaultdict(list)
    key_of_weight: dict[int, Hashable] = {}
    for target in targets:
        # One forward pass reads all weights of a module of experts; an embedding is int8 with the weight it is tied to.
        experts = target.source == "experts"
        key: Hashable = id(target.module) if experts else (group_of(target.path), target.shape[-1])
        units[key_of_weight.setdefault(id(target.weight), key)].append(target.path)
    everything = [path for paths in units.values() for path in paths]
    # A path in `skip_modules` also matches longer paths that contain it.
    return [
        _Unit(
            tuple(path for path in everything if any(matches(glob.escape(part), path) for part in paths)),
            block_of(paths[0]),
        )
        for paths in units.values()
    ]


def _together(units: Sequence[_Unit]) -> _Unit:
    return _Unit(tuple(path for unit in units for path in unit.paths), units[0].block)


def _cost_of(step: Step) -> Cost:
    return Cost(step.seconds, step.bytes)
