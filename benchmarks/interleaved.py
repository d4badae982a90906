"""Time callables in turns under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from int8compile.timing import Others, Times, quartiles, rounded, take_turns, timed

__all__ = ["Times", "measure", "quartiles", "rounded", "take_turns"]


def measure(benchmark: Any, calls: Mapping[str, Callable[[], object]], candidate: str, rounds: int) -> Times:
    """Time callables like `take_turns`, with one of them under pytest-benchmark.

    Args:
        benchmark: The fixture of pytest-benchmark.
        calls: Callables by name.
        candidate: Name of the callable in pytest-benchmark's table. It takes the last turn of each round.
        rounds: How often each callable is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def rest() -> None:
        for name, call in calls.items():
            if name != candidate:
                call()
                seconds[name].append(timed(call))
        calls[candidate]()

    others = Others()
    # Timed here too, since a disabled pytest-benchmark times nothing.
    benchmark.pedantic(lambda: seconds[candidate].append(timed(calls[candidate])), setup=rest, rounds=rounds)
    return Times(seconds, others.share())
