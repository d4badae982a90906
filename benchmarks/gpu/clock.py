"""How long calls take: on a GPU each candidate is a CUDA graph, and all are replayed in turns.

Without graphs, short kernels would wait for their launches, and what is timed would be the host.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks import interleaved
from benchmarks.gpu.facts import described
from benchmarks.interleaved import Times

Call = Callable[[], object]
# A graph runs at least this long: events are exact to about half a microsecond, and graphs take some to start.
LEAST_SECONDS = 1e-3
MOST_PASSES = 64
WARM_UPS = 3


class Measured(NamedTuple):
    """What calls took.

    Attributes:
        times: Seconds a call, of those that ran.
        errors: Why the others did not, by name.
    """

    times: Times
    errors: dict[str, str]

    def needed(self, *names: str) -> Times:
        """The times, if all of some names are among them.

        Raises:
            RuntimeError: One is not; with its error.
        """
        for name in names:
            if name in self.errors:
                raise RuntimeError(f"{name}: {self.errors[name]}")
        return self.times


class Clock(Protocol):
    """Times calls."""

    def times(self, calls: Mapping[str, Sequence[Call]], rounds: int, *, eager: Collection[str] = ()) -> Measured:
        """Times candidates in turns.

        Args:
            calls: By name; those of a name do the same with different copies of a weight, and their mean is taken.
            rounds: How often each candidate is timed.
            eager: Names whose calls are timed as they are, the host's part included: they have graphs of their own, or
                wait for the device in between.
        """
        ...

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        ...


class HostClock:
    """The stand-in of a dry run, and good for nothing else on a GPU: it does not wait for it."""

    def times(self, calls: Mapping[str, Sequence[Call]], rounds: int, *, eager: Collection[str] = ()) -> Measured:
        """See `Clock`."""
        ready, errors = _prepared(calls, lambda name: _together(calls[name]))
        times = interleaved.take_turns(ready, rounds) if ready else Times({}, None)
        seconds = {name: [value / len(calls[name]) for value in found] for name, found in times.seconds.items()}
        return Measured(Times(seconds, times.others), errors)

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class GraphClock:
    """Replays CUDA graphs between events."""

    def times(self, calls: Mapping[str, Sequence[Call]], rounds: int, *, eager: Collection[str] = ()) -> Measured:
        """See `Clock`."""
        ready, errors = _prepared(calls, lambda name: _Eager(calls[name]) if name in eager else _Graph(calls[name]))
        # Replays are queued faster than they run, so that only the first ones find an idle device: these are not timed.
        for each in ready.values():
            each.run()
        spans: dict[str, list[Any]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, each in ready.items():
                spans[name].append(each.timed())
        torch.cuda.synchronize()
        seconds = {name: [each() / ready[name].calls for each in found] for name, found in spans.items()}
        return Measured(Times(seconds, None), errors)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        torch.cuda.synchronize()


def host_seconds(call: Call, clock: Clock, count: int, rounds: int) -> list[float]:
    """Seconds of the host for a call that only queues work; of each round, the mean of `count` calls."""
    call()
    found = []
    for _ in range(rounds):
        clock.synchronize()
        began = time.perf_counter_ns()
        for _ in range(count):
            call()
        found.append((time.perf_counter_ns() - began) / 1e9 / count)
    clock.synchronize()
    return found


def spread(seconds: Sequence[float]) -> list[float]:
    """The first and third quartile."""
    if len(seconds) == 1:
        return [seconds[0], seconds[0]]
    first, _, third = statistics.quantiles(seconds, method="inclusive")
    return [float(f"{first:.5g}"), float(f"{third:.5g}")]


def described_times(measured: Measured, baselines: Collection[str]) -> dict[str, Any]:
    """As data: `Times.to_dict`, the quartiles of the seconds, and what failed."""
    return {
        **measured.times.to_dict(baselines),
        "spreads": {name: spread(found) for name, found in measured.times.seconds.items()},
        "errors": measured.errors,
    }


class _Graph:
    """Calls captured as one graph, several times over if they are short."""

    def __init__(self, calls: Sequence[Call]) -> None:
        # Libraries and compilers make what they need at a first call, which a graph must not hold.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                _run(calls)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._capture(calls)
        self.run()
        passes = passes_for(self.timed()())
        if passes > 1:
            self._capture(list(calls) * passes)

    def _capture(self, calls: Sequence[Call]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self.calls = len(calls)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            _run(calls)

    def run(self) -> None:
        self._graph.replay()

    def timed(self) -> Callable[[], float]:
        """Queues a replay; the result tells, after waiting for it, how many seconds it took."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        self._graph.replay()
        ended.record()

        def seconds() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1e3

        return seconds


class _Eager:
    """Calls as they are, from an idle device to an idle device: nothing hides the host's part."""

    def __init__(self, calls: Sequence[Call]) -> None:
        for _ in range(WARM_UPS):
            _run(calls)
        passes = passes_for(self._measure(calls))
        self._calls = list(calls) * passes
        self.calls = len(self._calls)

    def run(self) -> None:
        _run(self._calls)

    def timed(self) -> Callable[[], float]:
        seconds = self._measure(self._calls)
        return lambda: seconds

    @staticmethod
    def _measure(calls: Sequence[Call]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        _run(calls)
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - began) / 1e9


def passes_for(seconds: float) -> int:
    """How often something that takes some seconds is repeated to be timed well."""
    return max(1, min(MOST_PASSES, round(LEAST_SECONDS / max(seconds, 1e-9) + 0.5)))


def _prepared(calls: Mapping[str, Sequence[Call]], make: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Makes what is timed of each candidate; one that fails does not keep the others from being timed."""
    ready, errors = {}, {}
    for name in calls:
        try:
            ready[name] = make(name)
        except Exception as error:
            traceback.print_exc()
            errors[name] = described(error)
    return ready, errors


def _together(calls: Sequence[Call]) -> Call:
    _run(calls)
    return lambda: _run(calls)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
