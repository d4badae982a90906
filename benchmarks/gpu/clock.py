"""Timing of calls. On a GPU each candidate is a CUDA graph, and all graphs are replayed in turns.

Without graphs, short kernels would wait for their launches, and the times would be those of the host.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks import interleaved
from benchmarks.gpu.facts import described
from benchmarks.interleaved import Times

Call = Callable[[], object]
# Least time of a graph: events are exact to about half a microsecond, and a graph takes some time to start.
LEAST_SECONDS = 1e-3
MOST_PASSES = 64
WARM_UPS = 3


class Measured(NamedTuple):
    """Measured times of calls.

    Attributes:
        times: Seconds of a call, for the candidates that ran.
        errors: Errors of the other candidates, by name.
    """

    times: Times
    errors: dict[str, str]

    def needed(self, *names: str) -> Times:
        """Return the times, which must include some names.

        Raises:
            RuntimeError: A name failed; with its error.
        """
        for name in names:
            if name in self.errors:
                raise RuntimeError(f"{name}: {self.errors[name]}")
        return self.times


class Clock(Protocol):
    """A clock for calls."""

    def times(self, calls: Mapping[str, Sequence[Call]], rounds: int, *, eager: Collection[str] = ()) -> Measured:
        """Time candidates in turns.

        Args:
            calls: Calls by name of the candidate. The calls of a candidate do the same with different copies of a
                weight; the result is their mean.
            rounds: How often each candidate is timed.
            eager: Candidates that are timed without a graph, including the host: they have their own graphs, or wait
                for the device.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        ...


class HostClock:
    """The clock of a dry run. It is wrong for a GPU, since it does not wait for the device."""

    def times(self, calls: Mapping[str, Sequence[Call]], rounds: int, *, eager: Collection[str] = ()) -> Measured:
        ready, errors = _prepared(calls, lambda name: _together(calls[name]))
        times = interleaved.take_turns(ready, rounds) if ready else Times({}, None)
        seconds = {name: [value / len(calls[name]) for value in found] for name, found in times.seconds.items()}
        return Measured(Times(seconds, times.others), errors)

    def synchronize(self) -> None:
        """Return at once: calls on the CPU have ended when they return."""


class GraphClock:
    """The clock of a GPU, which replays CUDA graphs between events."""

    def times(self, calls: Mapping[str, Sequence[Call]], rounds: int, *, eager: Collection[str] = ()) -> Measured:
        ready, errors = _prepared(calls, lambda name: _Eager(calls[name]) if name in eager else _Graph(calls[name]))
        # Replays are queued faster than they run. Only the first ones find an idle device, so they are not timed.
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
        torch.cuda.synchronize()


def host_seconds(call: Call, clock: Clock, count: int, rounds: int) -> list[float]:
    """Return the host's seconds for a call that only queues work: for each round, the mean of `count` calls."""
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


def described_times(measured: Measured, baselines: Collection[str]) -> dict[str, Any]:
    """Return times as data: `Times.to_dict`, the quartiles of the seconds, and errors."""
    seconds = measured.times.seconds
    spreads = {name: [interleaved.rounded(q) for q in interleaved.quartiles(found)] for name, found in seconds.items()}
    return {**measured.times.to_dict(baselines), "spreads": spreads, "errors": measured.errors}


class _Graph:
    """Calls captured as one graph, repeated if they are short."""

    def __init__(self, calls: Sequence[Call]) -> None:
        # At a first call, libraries and compilers do work that must not be in a graph.
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
        """Queue a replay, and return a function that waits for it and returns its seconds."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        self._graph.replay()
        ended.record()

        def seconds() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1e3

        return seconds


class _Eager:
    """Calls without a graph, timed from an idle device to an idle device, so that the host's part is not hidden."""

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
    """Return how often to repeat calls of some seconds, to time them well."""
    return max(1, min(MOST_PASSES, round(LEAST_SECONDS / max(seconds, 1e-9) + 0.5)))


def _prepared(calls: Mapping[str, Sequence[Call]], make: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Prepare each candidate for timing; a candidate that fails does not stop the others."""
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
