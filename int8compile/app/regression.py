"""Compare the speed of a model in int8 with float, and with a stored comparison: the work of `pytest_int8compile`.

Seconds of two runs are never compared, because they may be of two machines. Both runs measure how many times faster
int8 is than float, in one process and in turns, and these ratios are compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from int8compile.config import Int8Config, matches
from int8compile.errors import ConfigError, InputError, ModelError, did_you_mean, listed
from int8compile.explaining import explain, kernel_of
from int8compile.hardware import of
from int8compile.observation import args_in, model_in, plain
from int8compile.rendering import percent
from int8compile.report import Report
from int8compile.stored.convert import report
from int8compile.timing import BUSY, Interval, Times, rounded, take_turns, timed
from int8compile.tuning.calibration import arguments
from int8compile.tuning.evaluation import Result, evaluate, none_in_int8, unchanged
from int8compile.tuning.layers import Layer

Baseline = str | Callable[..., object]
INT8 = "int8"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINES = ("best", *DTYPES, "eager")
# By default, as many rounds as take about so many seconds.
SECONDS, LEAST, MOST = 3.0, 15, 200
# Fewer have no interval with 95 % (`int8compile.timing.interval`).
FEWEST = 6
# The number of layers that a sentence on accuracy names.
WORST = 3


def check_bounds(**bounds: object) -> None:
    """Check the bounds of a test, by name, before it measures anything.

    Raises:
        ConfigError: A bound is neither None nor a number of at least 0.
    """
    for name, value in bounds.items():
        # Written so that NaN is refused.
        if value is not None and not (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0):
            raise ConfigError(f"{name}={value!r}: give a number of at least 0")


def check_rounds(rounds: object) -> None:
    """Check the number of rounds that is asked for; None leaves it open.

    Raises:
        ConfigError: It is no whole number, or so few rounds have no interval.
    """
    if rounds is not None and (not isinstance(rounds, int) or rounds < FEWEST):
        raise ConfigError(
            f"rounds={rounds!r}: give a whole number of at least {FEWEST}; fewer have no interval with 95 % confidence"
        )


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of a model in int8, compared with float. `print(speed)` shows a sentence.

    Attributes:
        baseline: The name of the float model that is compared with; of the fastest for `baseline="best"`.
        asked: The baseline as it was asked for.
        interval: How many times faster int8 is than the baseline, with 95 % confidence; None if it was not measured.
        times: The seconds of each round; None if they were not measured.
        report: The report of `explain`.
        kernel: The kernels that multiply.
    """

    baseline: str
    asked: str
    interval: Interval | None
    times: Times | None
    report: Report
    kernel: str

    @property
    def ratio(self) -> float | None:
        """How many times faster int8 is than the baseline; None if it was not measured."""
        return self.interval and self.interval.median

    def relative(self) -> list[float]:
        """Return the time of int8 in each round, divided by the baseline's time in the same round."""
        return [] if self.times is None else self.times.ratios(self.baseline, INT8)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as data: what pytest-benchmark stores as `extra_info["int8"]`."""
        keys = ("path", "op", "runs_in", "reason")
        data: dict[str, Any] = {
            "baseline": self.baseline,
            "asked": self.asked,
            "kernel": self.kernel,
            "sites": [{key: site.to_dict()[key] for key in keys} for site in self.report.sites],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if self.interval is not None and self.times is not None:
            low, ratio, high = (rounded(value) for value in self.interval)
            data |= {"ratio": ratio, "low": low, "high": high, "rounds": len(self.times.seconds[INT8])}
            data["medians"] = {name: rounded(self.times.median(name)) for name in self.times.seconds}
            data["others"] = self.times.others and rounded(self.times.others)
        return data

    def __str__(self) -> str:
        return sentence(self.to_dict())


class Comparison:
    """A model in int8 and in float, compiled and ready to be timed.

    All of them run in evaluation mode: dropout would be timed, too, and batch norms would count the rounds.

    Args:
        model: The model, in the dtype in which int8 is measured. It is not changed; its buffers are restored.
        inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.
        config: The options of int8.
        baseline: "float32", "bfloat16" (both compiled by Inductor), "best" (the faster of both), "eager" (not
            compiled), or a callable that takes the same inputs.

    Raises:
        ConfigError: The baseline or an option is unknown.
        InputError: The inputs are of no known form, or the model is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        config: Int8Config | Mapping[str, Any] | None = None,
        baseline: Baseline = "best",
    ) -> None:
        model = plain(model)
        if not isinstance(model, nn.Module):
            raise InputError(f"model is {type(model).__name__}; give an nn.Module")
        if isinstance(baseline, str) and baseline not in BASELINES:
            near = did_you_mean(baseline, BASELINES)
            raise ConfigError(f"baseline={baseline!r}: give {', '.join(map(repr, BASELINES))} or a callable{near}")
        config = Int8Config.from_options(config)
        args, kwargs = arguments(inputs)
        self._modules = [each for each in (model, baseline) if isinstance(each, nn.Module)]
        with self._unchanged():
            self.report = explain(model, *args, config=config, **kwargs)
        self.asked = baseline if isinstance(baseline, str) else getattr(baseline, "__name__", type(baseline).__name__)
        # Variants share the code of `forward`. Beside those of other tests they would reach Dynamo's recompile limit,
        # from which on everything runs uncompiled.
        torch._dynamo.reset()
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        devices = {tensor.device for tensor in (*model.parameters(), *tensors)}
        self.kernel = "; ".join(sorted({kernel_of(of(device)) for device in devices}))
        self._on_gpu = any(device.type == "cuda" for device in devices)
        self._calls: dict[str, Callable[[], object]] = {}
        names = list(DTYPES) if baseline == "best" else [self.asked]
        for name in names:
            if name in DTYPES and isinstance(baseline, str):
                with self._unchanged():  # A copy keeps the evaluation mode.
                    compiled = torch.compile(model_in(model, DTYPES[name]))
                self._add(name, compiled, *args_in((args, kwargs), DTYPES[name]))
            else:
                self._add(name, model if isinstance(baseline, str) else baseline, args, kwargs)
        # Freeing weights would change the model of the caller.
        with self._unchanged():
            original = copy.deepcopy(model) if config.free_weights else model
        self._add(INT8, torch.compile(original, backend="int8", options=vars(config)), args, kwargs)
        self._float = names

    def _add(self, name: str, call: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        def run() -> object:
            result = call(*args, **kwargs)
            if self._on_gpu:
                torch.cuda.synchronize()
            return result

        self._calls[name] = run

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Have the modules of the caller in evaluation mode inside the context; restore their modes and buffers."""
        with contextlib.ExitStack() as stack:
            for each in self._modules:
                stack.enter_context(unchanged(each))
            yield

    @torch.no_grad()
    def output(self) -> object:
        """Return the outputs of the int8 model."""
        with self._unchanged():
            return self._calls[INT8]()

    @torch.no_grad()
    def rounds(self, asked: int | None = None) -> int:
        """Compile everything, and return the number of rounds: as asked, or as many as take about three seconds.

        Raises:
            ConfigError: So few rounds have no interval.
        """
        check_rounds(asked)
        with self._unchanged():
            for call in self._calls.values():
                call()
            if asked is not None:
                return asked
            # In a round, each is called twice.
            seconds = 2 * sum(min(timed(call) for _ in range(2)) for call in self._calls.values())
        return min(max(round(SECONDS / seconds), LEAST), MOST)

    def unmeasured(self) -> Speed:
        """Return the result without times."""
        return Speed(self._float[0], self.asked, None, None, self.report, self.kernel)

    @torch.no_grad()
    def measure(self, rounds: int) -> Speed:
        """Time the models in turns."""
        with self._unchanged():
            times = take_turns(self._calls, rounds)
        best = times.fastest(self._float)
        return Speed(best, self.asked, times.interval(INT8, best), times, self.report, self.kernel)


def in_float(report: Report, expected: Iterable[str]) -> str:
    """Return a sentence on the linears that run in float against expectation, "" if there are none.

    Args:
        report: The report of `explain`.
        expected: Patterns of the paths that may run in float, as in `skip_modules`.

    Raises:
        ConfigError: `expected` is a string.
    """
    if isinstance(expected, str):
        raise ConfigError(f"expect_float={expected!r}: give a list of patterns, e.g. [{expected!r}]")
    patterns = list(expected)
    found = [site for site in report.skipped if not any(matches(pattern, site.path) for pattern in patterns)]
    if not found:
        return ""
    count = f"{len(found)} of {len(report.sites)} linears run{'s' if len(found) == 1 else ''} in float"
    lines = [f"{count}, which expect_float={patterns!r} does not allow:"]
    lines += [f"- {site.path} stays in float: {site.why()}" for site in found]
    names = listed(repr(site.path) for site in found)
    lines.append(f"Do what the reason says, or, if float is intended, add to expect_float: {names}")
    return "\n".join(lines)


def sentence(data: Mapping[str, Any]) -> str:
    """Return `Speed.to_dict()` as a sentence."""
    if "ratio" not in data:
        return f"int8 was not timed against {data['baseline']}"
    return (
        f"int8 is {data['ratio']:.2f} times as fast as {data['baseline']} "
        f"(95 % interval {data['low']:.2f} to {data['high']:.2f}, {data['rounds']} rounds)"
    )


def below(
    data: Mapping[str, Any], bar: float, stored: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> tuple[bool, str]:
    """Compare a measured ratio with the least that is allowed.

    Args:
        data: `Speed.to_dict()`.
        bar: The least number of times that int8 has to be faster.
        stored: Names and data of stored runs of the same test.

    Returns:
        Whether the whole interval is below the bar, and a sentence: "" if the whole interval is above the bar. If the
        bar is inside the interval, the sentence says that the rounds do not decide it.
    """
    if "ratio" not in data or data["low"] >= bar:
        return False, ""
    if data["high"] >= bar:
        text = (
            f"cannot tell whether int8 reaches min_speedup={bar:g}: {sentence(data)}. Give more rounds, or run it on a "
        )
        return False, f"{text}machine without other load{_load(data)}"
    lines = [f"{sentence(data)}, and min_speedup={bar:g}: the whole interval is below."]
    for name, before in stored:
        lines += [f"In the stored run {name}, {sentence(before)}.", *(f"- {line}" for line in changes(data, before))]
    if not stored:
        lines.append(f"Kernel: {data['kernel']}.")
        lines += [_stays(site) for site in data["sites"] if site["runs_in"] == "float"]
    lines.append(remedy(data))
    return True, "\n".join(lines)


def regressed(data: Mapping[str, Any], name: str, before: Mapping[str, Any]) -> str:
    """Return the sentences on a test that is slower than in a stored run: how much, what changed, what to do.

    Args:
        data: `Speed.to_dict()` of this run.
        name: The name of the stored run.
        before: `Speed.to_dict()` of the stored run.
    """
    slower = f"{sentence(data)}.\nIn the stored run {name}, {sentence(before)}: "
    slower += f"relative to float, int8 takes {before['ratio'] / data['ratio']:.2f} times as long as then"
    if data["high"] >= before["low"]:
        slower += ". The intervals overlap, so this may be noise: give more rounds"
    found = changes(data, before)
    if not found:
        found = ["no layer and no kernel changed, so the code between the linears or the kernel itself did"]
    return "\n".join([f"{slower}.", *(f"- {line}" for line in found), remedy(data)])


def changes(data: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return what may explain another ratio than in a stored run: layers, kernels, versions, load."""
    now, then = _by_path(data["sites"]), _by_path(before["sites"])
    found = []
    for path, site in now.items():
        old = then.get(path)
        why = f": {site['reason']}" if site["reason"] else ""
        if old is None:
            found.append(f"{path} is new and runs in {site['runs_in']}{why}")
        elif old["runs_in"] != site["runs_in"]:
            found.append(f"{path} ran in {old['runs_in']} and now runs in {site['runs_in']}{why}")
    found += [f"{path} is gone; it ran in {site['runs_in']}" for path, site in then.items() if path not in now]
    for key in ("kernel", "baseline", "torch", "threads"):
        if before[key] != data[key]:
            found.append(f"{key}: was {before[key]}, is {data[key]}")
    if (data.get("others") or 0) > BUSY:
        found.append(f"other processes used {100 * data['others']:.0f} % of the CPU")
    return found


def _by_path(sites: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return sites by path. Of several calls of a module, one that runs in float stands for all."""
    found: dict[str, Mapping[str, Any]] = {}
    for site in sites:
        if site["path"] not in found or site["runs_in"] == "float":
            found[site["path"]] = site
    return found


def _stays(site: Mapping[str, Any]) -> str:
    return f"- {site['path']} stays in float: {site['reason']}"


def _load(data: Mapping[str, Any]) -> str:
    share = data.get("others")
    return "" if share is None else f" (other processes used {100 * share:.0f} % of the CPU)"


def remedy(data: Mapping[str, Any]) -> str:
    """Return what to do about a model that became slower."""
    if isa := os.environ.get("INT8COMPILE_ISA"):
        return f"To do: unset INT8COMPILE_ISA={isa}, or store a run with it."
    return (
        "To do: undo the change that is named above; if it is intended, or if this is another kind of machine, store a "
        f"new run (--benchmark-autosave). `int8compile doctor` checks the kernels{_load(data)}."
    )


def accuracy(model: nn.Module, inputs: Any, config: Int8Config | Mapping[str, Any] | None) -> Result:
    """Return the result of `evaluate` for a model in int8.

    Args:
        model: The float model.
        inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments; or a list of these.
        config: The options of int8.

    Raises:
        ModelError: Nothing of the model is int8 in such a comparison.
    """
    batches = [inputs] if isinstance(inputs, tuple) else inputs
    config = Int8Config.from_options(config)
    model = plain(model)
    if isinstance(model, nn.Module) and (why := none_in_int8(report(model, config))):
        raise ModelError(f"the accuracy of {type(model).__name__} cannot be measured, because {why}")
    return evaluate(model, batches, {INT8: config}, progress=False).results[INT8]


def accuracy_data(result: Result) -> dict[str, float]:
    """Return the numbers of a result that exist for its model."""
    numbers = {name: getattr(result, name) for name in ("kl", "kl_error", "top1", "perplexity", "error", "positions")}
    return {name: value for name, value in numbers.items() if value is not None}


def inexact(
    result: Result, *, max_kl: float | None = None, max_error: float | None = None, min_top1: float | None = None
) -> str:
    """Return the sentences on a result that is outside of its bounds, "" if it is inside.

    Raises:
        InputError: The model has no logits, which a bound needs.
    """
    found = []
    # Written so that NaN is outside.
    if max_kl is not None and not _logits(result.kl, f"max_kl={max_kl:g}") <= max_kl:
        spread = f" (standard error {result.kl_error:.2g})" if result.kl_error is not None else ""
        found.append(f"its KL divergence from float32 is {result.kl:.4g} nats{spread}, and max_kl={max_kl:g}")
    if max_error is not None and not result.error <= max_error:
        found.append(f"the relative error of its outputs is {result.error:.4g}, and max_error={max_error:g}")
    if min_top1 is not None and not (top1 := _logits(result.top1, f"min_top1={min_top1:g}")) >= min_top1:
        found.append(
            f"its most likely class or token is float32's at {top1:.2%} of positions, and min_top1={min_top1:g}"
        )
    if not found:
        return ""
    worst = sorted(result.layers, key=lambda layer: layer.sqnr_db)[:WORST]
    lines = [f"int8 is less exact than allowed: {'; '.join(found)}."]
    lines += [
        f"- {layer.path}: its own output is {layer.sqnr_db:.1f} dB above its error{_outliers(layer)}" for layer in worst
    ]
    lines.append(
        "To do: calibrate the model (int8compile.calibrate), or keep the worst layers, listed first, in float: "
        f"skip_modules={[layer.path for layer in worst[:1]]!r}"
    )
    return "\n".join(lines)


def _logits(value: float | None, bound: str) -> float:
    """Return a number that only models with logits have."""
    if value is None:
        raise InputError(f"{bound}: the model returns no logits; give max_error")
    return value


def _outliers(layer: Layer) -> str:
    return f", outliers {percent(layer.outliers)}" if layer.outliers else ""
