"""One linear layer: int8 against the fastest in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import bars, ceilings, inputs
from benchmarks.gpu.clock import Call, Clock, Measured, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.sizes import Shape, Sizes
from int8compile.ops import quantize_rows, quantize_weight, quantized_linear
from int8compile.ops.digits import NONE

FIRST, REST, AUTOTUNED = "linear", "linear_rest", "linear_autotuned"
OURS, EAGER = "int8", "bf16 eager"
# Anywhere, 0.3 % of the elements are in a third of the columns of 128 rows. A language model's lie in a few columns.
IN_COLUMNS = "int8, outliers in columns"
# Up to this many rows it makes no difference: outliers are not listed by columns.
PLANES = 64
FASTER = {OURS: "times faster", IN_COLUMNS: "times faster, outliers in columns"}
THRESHOLD = 6.0
Ceilings = Callable[[], Mapping[str, Any]]
# Arguments of `torch.compile` by the name of a baseline.
How = Mapping[str, Mapping[str, Any]]


def stages(
    sizes: Sizes, clock: Clock, device: torch.device, l2_bytes: int, measured: Ceilings
) -> tuple[Stage, Stage, Stage]:
    """The rows that matter most; all others; and a baseline that takes long to compile, for two shapes."""

    def of(name: str, seconds: float, expected: float, rows: Sequence[int], shapes: Sequence[Shape], how: How) -> Stage:
        cases = {
            f"M={m} {shape}": functools.partial(case, sizes, clock, device, l2_bytes, measured, how, shape, m)
            for m in rows
            for shape in shapes
        }
        about = (
            "quantize_rows and quantized_linear (threshold 6, row policy; 0.3 % of the activations 20 times as large, "
            f"anywhere / in 0.3 % of the columns) against the fastest bf16 F.linear (eager, {', '.join(how)})"
        )
        return Stage(name, about, seconds, cases, expected)

    rest = [m for m in sizes.rows if m not in sizes.first_rows]
    searched = [shape for shape in sizes.shapes if shape.name in sizes.autotuned_shapes]
    return (
        of(FIRST, 90, 6, sizes.first_rows, sizes.shapes, sizes.compilers),
        of(REST, 15, 6, rest, sizes.shapes, sizes.compilers),
        of(AUTOTUNED, 30, 14, sizes.first_rows[:1], searched, sizes.autotune),
    )


def case(
    sizes: Sizes,
    clock: Clock,
    device: torch.device,
    l2_bytes: int,
    measured: Ceilings,
    compilers: How,
    shape: Shape,
    m: int,
) -> CaseResult:
    """One shape with one number of rows."""
    x = inputs.activations(m, shape.k, device)
    weight = inputs.weight(shape.k, shape.n, device)
    weights = inputs.copies(weight, l2_bytes)
    qweight, scale = quantize_weight(weight)
    qweights = inputs.copies(qweight, l2_bytes)
    calls: dict[str, list[Call]] = {EAGER: each(F.linear, x, weights)}
    for name, how in compilers.items():
        calls[f"bf16 {name}"] = each(compiled(how), x, weights)
    calls[OURS] = [int8_call(x, one, scale) for one in qweights]
    if m > PLANES:
        columns = inputs.with_outlier_columns(m, shape.k, max(1, round(inputs.OUTLIERS * shape.k)), device)
        calls[IN_COLUMNS] = [int8_call(columns, one, scale) for one in qweights]
    found = clock.times(calls, sizes.rounds)
    # The code of the compiled product is the same for all cases, and Dynamo keeps only so many versions.
    torch._dynamo.reset()
    return result(found, shape, m, measured()) | {"copies": {"bf16": len(weights), "int8": len(qweights)}}


def result(measured: Measured, shape: Shape, m: int, ceiling: Mapping[str, Any]) -> CaseResult:
    """The times of a case with their bars, and how near to the roofline both sides come."""
    times = measured.needed(OURS, EAGER)
    ours = [name for name in (OURS, IN_COLUMNS) if name in times.seconds]
    baselines = [name for name in times.seconds if name not in ours]
    best = times.fastest(baselines)
    operations, (_, k, n) = 2 * m * shape.k * shape.n, shape
    # x is read, and the result written. Ours also writes and reads what it quantized; a GPU's L2 may hold that.
    moved = {"bf16": 2 * (n * k + m * k + m * n), "int8": n * k + 4 * n + 2 * (m * k + m * n)}
    roofline = {}
    for name, kind in ((best, "bf16"), *((name, "int8") for name in ours)):
        least = ceilings.floor(ceiling, moved[kind], operations, kind)
        if least is not None:
            roofline[name] = float(f"{least / times.median(name):.3g}")
    return {
        "shape": shape.name,
        "k": k,
        "n": n,
        "m": m,
        **described_times(measured, baselines),
        "roofline_share": roofline,
        "bars": {FASTER[name]: bars.at_least(times.ratio(name, best), bars.linear(m)) for name in ours},
    }


def int8_call(x: Tensor, qweight: Tensor, scale: Tensor, threshold: float = THRESHOLD) -> Call:
    """Quantizes x and multiplies it, as a compiled model does."""
    quantize = quantize_rows.default
    return lambda: _product(quantize(x, threshold, False), qweight, scale, threshold)


def product_call(activations: Sequence[Tensor], qweight: Tensor, scale: Tensor, threshold: float) -> Call:
    """Multiplies what `quantize_rows` made."""
    return lambda: _product(activations, qweight, scale, threshold)


def _product(activations: Sequence[Tensor], qweight: Tensor, scale: Tensor, threshold: float) -> object:
    return quantized_linear.default(*activations, qweight, scale, None, threshold, False, NONE, 0, 0, torch.bfloat16)


def each(function: Callable[..., object], x: Tensor, weights: Sequence[Tensor]) -> list[Call]:
    """A call for each copy of a weight."""
    return [lambda weight=weight: function(x, weight) for weight in weights]  # type: ignore[misc]


def compiled(how: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """`F.linear`, compiled."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    result: Callable[[Tensor, Tensor], Tensor] = torch.compile(product, fullgraph=True, dynamic=False, **how)
    return result
