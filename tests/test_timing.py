"""Times of callables that take turns, and the confidence of their ratios."""

from __future__ import annotations

import random

import pytest

from int8compile.timing import Times, interval, take_turns


def test_times_are_compared_round_by_round() -> None:
    times = Times({"a": [2.0, 4.0, 6.0], "b": [1.0, 1.0, 2.0]}, 0.0)
    assert times.ratio("b", "a") == 4.0
    assert times.quartiles("b", "a") == (2.5, 3.5)
    assert times.fastest(["a", "b"]) == "b"
    assert times.to_dict(["a"])["ratios"] == {"b": {"ratio": 4.0, "quartiles": [2.5, 3.5]}}


def test_everyone_has_a_turn_that_is_not_timed() -> None:
    calls: list[str] = []
    times = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == [*"aabb", *"aabb"]
    assert {name: len(found) for name, found in times.seconds.items()} == {"a": 2, "b": 2}


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """The share of wrong intervals is at most 5 %, whatever the distribution: here one with a long tail."""
    draw = random.Random(0)
    for count in (6, 7, 20, 61):
        found = [interval([draw.lognormvariate(0, 1) for _ in range(count)]) for _ in range(2000)]
        wrong = sum(not each.low <= 1 <= each.high for each in found) / len(found)
        # Four standard deviations of a share of 5 % in 2000 draws.
        assert wrong < 0.05 + 4 * (0.05 * 0.95 / 2000) ** 0.5
        assert all(each.low < each.median < each.high for each in found)


@pytest.mark.parametrize("values", [[3.0], [3.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_few_values_span_the_whole_interval(values: list[float]) -> None:
    found = interval(values)
    assert (found.low, found.high) == (min(values), max(values))


def test_more_values_make_the_interval_narrower() -> None:
    assert interval(range(100)) == (39, 49.5, 60)  # The interval of the sign test for 100 values.
