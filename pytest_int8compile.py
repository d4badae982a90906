"""pytest fixtures that fail when a model in int8 becomes slower or less exact: see docs/pytest.md.

pytest loads this module in every run of everybody who has int8compile installed. So it imports neither torch nor
int8compile before a test uses a fixture.

PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from int8compile import Int8Config
    from int8compile.app.regression import Baseline, Speed

GROUP = "int8 relative to float"
# pytest-benchmark shows "time in {UNIT}s".
UNIT = "float run"
# A property of tests that were not timed. It comes from xdist's workers, too.
_UNTIMED = ("int8_benchmark", "not timed")
_NEEDED = 'int8_benchmark needs pytest-benchmark: pip install "int8compile[pytest]"'


class _Clock:
    """A clock that pytest-benchmark reads instead of seconds: the unit is the time of the float model."""

    def __init__(self) -> None:
        self.now = 0.0

    def timer(self) -> float:
        """Return the current time."""
        return self.now


_CLOCK = pytest.StashKey[_Clock]()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's trace out of the report of a failed test: hundreds of lines without a message."""

    def has_message(record: logging.LogRecord) -> bool:
        return record.name != "torch.__trace"

    handlers = logging.getLogger().handlers[:]
    for handler in handlers:
        handler.addFilter(has_message)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(has_message)


def pytest_configure(config: pytest.Config) -> None:
    """Add the fixture `int8_benchmark`: with pytest-benchmark, or one that says that it is missing."""
    # By the name of its entry point, or of its module where `-p` loads it.
    present = any(config.pluginmanager.hasplugin(name) for name in ("benchmark", "pytest_benchmark.plugin"))
    name = "int8compile-benchmark"
    if not config.pluginmanager.hasplugin(name):
        config.pluginmanager.register(_Benchmarks() if present else _NoBenchmarks(), name)


@pytest.fixture
def int8_accuracy(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return a function that compares the outputs of a model in int8 with float, and fails above a bound.

    Call it with `(model, inputs, config=None, *, max_kl=None, max_error=None, min_top1=None)`:

    - `model`: the float model; it is not changed.
    - `inputs`: a tensor, a tuple of arguments or a dictionary of keyword arguments, or a list of these.
    - `config`: the options of int8, an `Int8Config` or a dictionary.
    - `max_kl`: largest mean KL divergence of the next-token distributions from float32, in nats.
    - `max_error`: largest relative error of the outputs.
    - `min_top1`: smallest share of positions with the same most likely token.

    It returns the `Result` of `int8compile.evaluate`, and records it as properties of the test (`--junit-xml`).
    """

    def check(
        model: nn.Module,
        inputs: Any,
        config: Int8Config | Mapping[str, Any] | None = None,
        *,
        max_kl: float | None = None,
        max_error: float | None = None,
        min_top1: float | None = None,
    ) -> Any:
        from int8compile.app import regression

        regression.check_bounds(max_kl=max_kl, max_error=max_error, min_top1=min_top1)
        with _quiet():
            result = regression.accuracy(model, inputs, config)
        # Not by record_property, which warns of the default format of --junit-xml.
        numbers = regression.accuracy_data(result)
        request.node.user_properties += [(f"int8_{name}", value) for name, value in numbers.items()]
        if failure := regression.inexact(result, max_kl=max_kl, max_error=max_error, min_top1=min_top1):
            pytest.fail(failure, pytrace=False)
        return result

    return check


class _NoBenchmarks:
    """The plugin where pytest-benchmark is not loaded."""

    @pytest.fixture
    def int8_benchmark(self) -> None:
        """Fail: pytest-benchmark is needed."""
        pytest.fail(_NEEDED, pytrace=False)


class _Benchmarks:
    """The plugin beside pytest-benchmark."""

    def __init__(self) -> None:
        self._session: pytest.Session | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Give pytest-benchmark another clock, through its marker, before its fixture is made."""
        if "int8_benchmark" in getattr(item, "fixturenames", ()):
            marker = item.get_closest_marker("benchmark")
            clock = item.stash[_CLOCK] = _Clock()
            options = {"group": GROUP, **(marker.kwargs if marker else {}), "timer": clock.timer}
            # The closest marker counts alone.
            item.add_marker(pytest.mark.benchmark(**options), append=False)

    @pytest.fixture
    def int8_benchmark(self, request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Speed]:
        """Return a function that times a model in int8 and in float, in turns. It can be called once in a test.

        Call it with `(model, inputs, config=None, baseline="best", *, min_speedup=None, rounds=None,
        expect_float=None)`:

        - `model`: the model, in the dtype in which int8 is measured. It is not changed, and runs in evaluation mode.
        - `inputs`: a tensor, a tuple of arguments or a dictionary of keyword arguments.
        - `config`: the options of int8, an `Int8Config` or a dictionary.
        - `baseline`: "float32" or "bfloat16", both compiled by Inductor; "best", the faster of the two; "eager", not
          compiled; or a callable that takes the same inputs.
        - `min_speedup`: the test fails if int8 is less than so many times as fast as the baseline.
        - `rounds`: the number of rounds; by default as many as take about three seconds, at least 15;
          at least 6.
        - `expect_float`: patterns, as in `skip_modules`, of the linears that may run in float. The test fails if any
          other linear does. By default all may.

        It returns a `Speed`, which is in `extra_info["int8"]` of pytest-benchmark's JSON, too. What pytest-benchmark
        records as the times of the test are int8's times divided by the baseline's.
        """

        def compare(
            model: nn.Module,
            inputs: Any,
            config: Int8Config | Mapping[str, Any] | None = None,
            baseline: Baseline = "best",
            *,
            min_speedup: float | None = None,
            rounds: int | None = None,
            expect_float: Iterable[str] | None = None,
        ) -> Speed:
            from int8compile.app import regression
            from int8compile.errors import Int8Warning

            with _quiet():
                try:
                    regression.check_bounds(min_speedup=min_speedup)
                    regression.check_rounds(rounds)
                    models = regression.Comparison(model, inputs, config, baseline)
                    if expect_float is not None and (failure := regression.in_float(models.report, expect_float)):
                        pytest.fail(failure, pytrace=False)
                    planned = 0 if benchmark.disabled else models.rounds(rounds)
                except BaseException:
                    # Otherwise pytest-benchmark warns that its fixture was not used.
                    benchmark.disabled = True
                    benchmark.pedantic(lambda: None)
                    raise
                if benchmark.disabled:
                    benchmark.pedantic(models.output)
                    request.node.user_properties.append(_UNTIMED)
                    return models.unmeasured()
                speed = _record(request.node, benchmark, models, planned)
            data = benchmark.extra_info["int8"] = speed.to_dict()
            if min_speedup is not None:
                fails, text = regression.below(data, min_speedup, list(_stored(request.config, benchmark.fullname)))
                if fails:
                    pytest.fail(text, pytrace=False)
                if text:
                    warnings.warn(text, Int8Warning, stacklevel=2)
            return speed

        return compare

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_benchmark_scale_unit(self, unit: str, benchmarks: list[Any]) -> tuple[str, float] | None:
        """Name the unit of relative times. Seconds are left to pytest-benchmark and other plugins."""
        if not all(_is_relative(bench) for bench in benchmarks):
            return None
        if unit != "seconds":
            return "", 1.0
        from pytest_benchmark import utils

        utils.TIME_UNITS.setdefault(UNIT, f"{UNIT}s")  # For histograms.
        return UNIT, 1.0

    @pytest.hookimpl(hookwrapper=True, optionalhook=True)
    def pytest_benchmark_group_stats(self) -> Generator[None, Any, None]:
        """Keep relative times out of groups of seconds."""
        outcome = yield
        groups = []
        for name, members in outcome.get_result():
            relative = [bench for bench in members if _is_relative(bench)]
            seconds = [bench for bench in members if not _is_relative(bench)]
            if relative and seconds:
                groups += [(name, seconds), (f"{name} {GROUP}" if name else GROUP, relative)]
            else:
                groups.append((name, members))
        outcome.force_result(groups)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, None]:
        """Before pytest-benchmark compares, leave out stored runs that measured something else."""
        self._session = session
        benchmarks = session.config._benchmarksession  # type: ignore[attr-defined]
        for path, stored in (benchmarks.compared_mapping or {}).items():
            for bench in benchmarks.benchmarks:
                before = stored.get(bench.fullname)
                if before and _asked(before["extra_info"]) != _asked(bench.extra_info):
                    del stored[bench.fullname]
                    was, now = _asked(before["extra_info"]), _asked(bench.extra_info)
                    text = f"{bench.fullname} measured {was} in {path}, and {now} now: not compared. Store a new run"
                    benchmarks.logger.warning(text)
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None, Any, None]:
        """Below pytest-benchmark's table, say what was measured and why it differs from stored runs."""
        outcome = yield
        ours = [bench for bench in terminalreporter.config._benchmarksession.benchmarks if _is_relative(bench)]
        passed = terminalreporter.stats.get("passed", [])
        untimed = sum(_UNTIMED in getattr(report, "user_properties", ()) for report in passed)
        if ours or untimed:
            terminalreporter.section("int8compile")
        if untimed:
            terminalreporter.write_line(
                f"{untimed} of the passed tests used int8_benchmark, which ran int8 once and timed nothing: "
                "pytest-benchmark is disabled (by --benchmark-disable or xdist)"
            )
        regressed = [_report(terminalreporter, bench) for bench in ours]
        if any(regressed) and self._session is not None:
            from pytest_benchmark.session import PerformanceRegression

            if isinstance(outcome.exception, PerformanceRegression):
                # The sentences are above. The exception would put its traceback, and pytest's summary nowhere.
                self._session.exitstatus = pytest.ExitCode.TESTS_FAILED
                outcome.force_result(None)


def _report(terminal: Any, bench: Any) -> bool:
    """Write what was measured and what a stored run had; return whether it is slower than pytest-benchmark allows."""
    from int8compile.app import regression

    data, failed = bench.extra_info["int8"], False
    terminal.write_line(f"{bench.name}: {regression.sentence(data)}")
    for path, before in _compared(terminal.config, bench.fullname):
        was, checks = before["extra_info"]["int8"], terminal.config._benchmarksession.compare_fail or ()
        if any(check.fails(bench, before["stats"]) for check in checks):
            failed = True
            terminal.write_line(f"{bench.name} has regressed: {regression.regressed(data, _name(path), was)}", red=True)
        else:
            lines = [f"in the stored run {_name(path)}, {regression.sentence(was)}", *regression.changes(data, was)]
            for line in lines:
                terminal.write_line(f"- {line}")
    return failed


def _record(node: pytest.Item, benchmark: Any, models: Any, rounds: int) -> Speed:
    """Measure models, and have pytest-benchmark record the relative time of each round."""
    clock = node.stash[_CLOCK]
    measured: list[Speed] = []
    relative: Iterator[float] = iter(())

    def play() -> None:
        """Let the time of a round pass."""
        nonlocal relative
        if not measured:
            # Here, because pytest-benchmark stops tracers (coverage) while it calls.
            measured.append(models.measure(rounds))
            relative = iter(measured[0].relative())
        seconds = next(relative, None)
        if seconds is None:  # --benchmark-cprofile calls once more.
            models.output()
        else:
            clock.now += seconds

    benchmark.has_error = True  # Without it, pytest-benchmark fails to save a test that was interrupted.
    benchmark.pedantic(play, rounds=rounds)
    benchmark.has_error = False
    return measured[0]


def _is_relative(bench: Any) -> bool:
    """Return whether a benchmark's times are int8's divided by float's."""
    return _is_ours(bench["extra_info"])


def _is_ours(extra_info: Mapping[str, Any]) -> bool:
    found = extra_info.get("int8")
    return isinstance(found, Mapping) and "asked" in found


def _asked(extra_info: Mapping[str, Any]) -> str:
    """Return what a benchmark measured, in words."""
    return f"int8 against {extra_info['int8']['asked']}" if _is_ours(extra_info) else "seconds"


def _compared(config: pytest.Config, fullname: str) -> Iterator[tuple[Any, Any]]:
    """Yield the path of each stored run that is compared with, and its entry for a test, if it has relative times."""
    for path, stored in (config._benchmarksession.compared_mapping or {}).items():  # type: ignore[attr-defined]
        if fullname in stored and _is_relative(stored[fullname]):
            yield path, stored[fullname]


def _stored(config: pytest.Config, fullname: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each stored run that is compared with, and its data on a test."""
    for path, before in _compared(config, fullname):
        yield _name(path), before["extra_info"]["int8"]


def _name(path: Any) -> str:
    return str(getattr(path, "stem", path))
