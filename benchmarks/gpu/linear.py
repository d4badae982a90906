"""A linear layer in int8 against the fastest in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import bars, ceilings, inputs
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, Measured, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.sizes import Shape
from benchmarks.interleaved import rounded
from int8compile.ops import quantize_rows, quantized_linear
from int8compile.ops.quantized import NONE

FIRST, REST, AUTOTUNED = "linear", "linear_rest", "linear_autotuned"
OURS, EAGER = "int8", "bf16 eager"
THRESHOLD = 12.0
Ceilings = Callable[[], Mapping[str, Any]]
# Arguments of `torch.compile` by name of the baseline.
How = Mapping[str, Mapping[str, Any]]


def stages(bench: Bench, measured: Ceilings) -> tuple[Stage, Stage, Stage]:
    """Return three stages: the most important rows; the other rows; two shapes against a slow-to-compile baseline."""
    sizes = bench.sizes

    def of(name: str, seconds: float, expected: float, rows: Sequence[int], shapes: Sequence[Shape], how: How) -> Stage:
        cases = bench.cases(rows, functools.partial(case, bench, measured, how), shapes)
        about = (
            "quantize_rows and quantized_linear (rotated, threshold 12; 0.3 % of the activations 20 times as large) "
            f"against the fastest bf16 F.linear (eager, {', '.join(how)})"
        )
        return Stage(name, about, seconds, cases, expected)

    rest = [m for m in sizes.rows if m not in sizes.first_rows]
    searched = [shape for shape in sizes.shapes if shape.name in sizes.autotuned_shapes]
    return (
        of(FIRST, 90, 6, sizes.first_rows, sizes.shapes, sizes.compilers),
        of(REST, 15, 6, rest, sizes.shapes, sizes.compilers),
        of(AUTOTUNED, 30, 14, sizes.first_rows[:1], searched, sizes.autotune),
    )


def case(bench: Bench, measured: Ceilings, compilers: How, shape: Shape, m: int) -> CaseResult:
    """Measure a shape with a number of rows."""
    x = inputs.activations(m, shape.k, bench.device)
    weight = inputs.weight(shape.k, shape.n, bench.device)
    weights = inputs.copies(weight, bench.l2_bytes)
    qweight, scale, d = inputs.quantized(weight)
    qweights = inputs.copies(qweight, bench.l2_bytes)
    calls: dict[str, list[Call]] = {EAGER: each(F.linear, x, weights)}
    for name, how in compilers.items():
        calls[f"bf16 {name}"] = each(compiled_linear(how), x, weights)
    calls[OURS] = [int8_call(x, one, scale, d) for one in qweights]
    found = bench.clock.times(calls, bench.sizes.rounds)
    # All cases compile the same function, and Dynamo limits the number of its versions.
    torch._dynamo.reset()
    return result(found, shape, m, measured()) | {"copies": {"bf16": len(weights), "int8": len(qweights)}}


def result(measured: Measured, shape: Shape, m: int, ceiling: Mapping[str, Any]) -> CaseResult:
    """Return the times of a case with their bars, and the share of the roofline that each side reaches."""
    times = measured.needed(OURS, EAGER)
    baselines = [name for name in times.seconds if name != OURS]
    best = times.fastest(baselines)
    operations, (_, k, n) = 2 * m * shape.k * shape.n, shape
    # x is read and the result written. int8 also writes and reads the quantized x, which the L2 cache may hold.
    moved = {"bf16": 2 * (n * k + m * k + m * n), "int8": n * k + 4 * n + 2 * (m * k + m * n)}
    roofline = {}
    for name, kind in ((best, "bf16"), (OURS, "int8")):
        least = ceilings.floor(ceiling, moved[kind], operations, kind)
        if least is not None:
            roofline[name] = rounded(least / times.median(name), 3)
    return {
        **shape.facts(m),
        **described_times(measured, baselines),
        "roofline_share": roofline,
        "bars": {"times faster": bars.at_least(times.ratio(OURS, best), bars.linear(m))},
    }


def int8_call(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, threshold: float = THRESHOLD) -> Call:
    """Return a call that quantizes x and multiplies it, as a compiled model does."""
    quantize = quantize_rows.default
    return lambda: _product(quantize(x, d, threshold), qweight, scale)


def product_call(activations: Sequence[Tensor], qweight: Tensor, scale: Tensor) -> Call:
    """Return a call that multiplies the result of `quantize_rows`."""
    return functools.partial(_product, activations, qweight, scale)


def _product(activations: Sequence[Tensor], qweight: Tensor, scale: Tensor) -> object:
    return quantized_linear.default(*activations, qweight, scale, None, NONE, 0, 0, torch.bfloat16)


def each(function: Callable[..., object], x: Tensor, weights: Sequence[Tensor]) -> list[Call]:
    """Return a call for each copy of a weight."""
    return [lambda weight=weight: function(x, weight) for weight in weights]  # type: ignore[misc]


def compiled_linear(how: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `F.linear`, compiled."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    result: Callable[[Tensor, Tensor], Tensor] = torch.compile(product, fullgraph=True, dynamic=False, **how)
    return result
