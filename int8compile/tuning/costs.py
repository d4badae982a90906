"""Estimate the seconds and bytes of linears in float and in int8, for `advise`."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from int8compile.timing import take_turns
from int8compile.tuning.layers import Observed
from int8compile.tuning.trial import Trial

# Rounds of `take_turns`.
ROUNDS = 5
# Seconds to read a byte, for weights whose linears cannot be timed alone.
PER_BYTE = 1e-10


class Cost(NamedTuple):
    """The cost of linears for one step; costs are compared by seconds, then by bytes."""

    seconds: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of all linears that may be int8.

    Attributes:
        by_path: The cost of each in float and in int8.
        slower: The linears that int8 is slower for; both costs have the seconds of int8.
        seconds: The seconds of a float linear by its size, and of an int8 linear by its size, rotation and policy.
    """

    by_path: Mapping[str, tuple[Cost, Cost]]
    slower: Sequence[str]
    seconds: Mapping[Hashable, float]

    def extra(self, paths: Iterable[str]) -> Cost:
        """Return the additional cost of some linears in float instead of int8."""
        pairs = [self.by_path[path] for path in paths]
        return Cost(sum(x.seconds - y.seconds for x, y in pairs), sum(x.bytes - y.bytes for x, y in pairs))

    def total(self, skipped: Iterable[str]) -> Cost:
        """Return the cost of all linears with some of them in float."""
        skipped = set(skipped)
        costs = [as_float if path in skipped else as_int8 for path, (as_float, as_int8) in self.by_path.items()]
        # Rounded, so that the order of the sum makes no difference.
        return Cost(round(sum(cost.seconds for cost in costs), 9), sum(cost.bytes for cost in costs))


def measured(
    trial: Trial, int8: Mapping[str, nn.Module], observed: Observed, rows: int, known: Mapping[Hashable, float]
) -> Costs:
    """Time the linears in the dtype of the model.

    Linears of one size and kind are timed together, one after the other, so that their weights come from memory, as in
    the model. Both forms take turns, and the seconds in int8 are those in float times the ratio of the two: so kinds
    that are timed at different times can be compared, even if the machine has become slower meanwhile. Linears that
    read no rows of their own, such as experts, count as the others do by byte.

    Args:
        trial: The model.
        int8: Its int8 modules by path.
        observed: The activations of its linears.
        rows: The rows at a time.
        known: The `seconds` of earlier costs, which are not measured again.
    """
    kinds: dict[tuple[Hashable, ...], list[str]] = collections.defaultdict(list)
    inputs: dict[str, Tensor] = {}
    for path, module in int8.items():
        given = observed.given(path)
        if given and len(given[0]):
            inputs[path] = given[0][torch.arange(rows) % len(given[0])].to(trial.dtype(path))
            made: Any = module
            kinds[tuple(made.qweight.shape), trial.dtype(path), made.rotation, getattr(made, "policy", "")].append(path)
    once = dict(known)
    for kind, paths in kinds.items():
        if kind in once:
            continue
        dtype = trial.dtype(paths[0])
        calls = {
            name: _running([(_in_dtype(module_of(path), dtype), inputs[path]) for path in paths])
            for name, module_of in (("float", trial.float_module), ("int8", int8.get))
        }
        times = take_turns(calls, ROUNDS)
        size = kind[:2]
        once.setdefault(size, times.median("float") / len(paths))
        once[kind] = once[size] / times.interval("int8", "float").median
    seconds = {path: (once[kind[:2]], once[kind]) for kind, paths in kinds.items() for path in paths}
    weights: set[int] = set()
    costs = {}
    sizes = {path: trial.sizes(path, module, weights) for path, module in int8.items()}
    timed = [path for path in seconds if sizes[path][0]]
    for path, size in sizes.items():
        rates = [
            sum(seconds[other][form] for other in timed) / sum(sizes[other][form] for other in timed)
            if timed
            else PER_BYTE
            for form in (0, 1)
        ]
        taken = seconds.get(path, (size[0] * rates[0], size[1] * rates[1]))
        # No linear is to stay in float because int8 is slow for it.
        costs[path] = Cost(max(taken), size[0]), Cost(taken[1], size[1])
    return Costs(costs, [path for path, (as_float, as_int8) in seconds.items() if as_float < as_int8], once)


def _in_dtype(module: nn.Module | None, dtype: torch.dtype) -> nn.Module:
    """Return a float32 module in the dtype that it is to be timed in."""
    assert module is not None, "experts have no activations of their own"
    return module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)


def _running(pairs: Sequence[tuple[nn.Module, Tensor]]) -> Callable[[], object]:
    """Return a function that calls modules, each with its input, and waits for the results."""

    def run() -> None:
        for module, x in pairs:
            module(x)
        if pairs[0][1].device.type != "cpu":
            torch.accelerator.synchronize()

    return run
