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
from int8compile.ops import quantize_rows, quantized_linear
from int8compile.ops.quantized import NONE

FIRST, REST, AUTOTUNED = "linear", "linear_rest", "linear_autotuned"
OURS, EAGER = "int8", "bf16 eager"
THRESHOLD = 12.0
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
    qweight, scale, d = inputs.quantized(weight)
    qweights = inputs.copies(qweight, l2_bytes)
    calls: dict[str, list[Call]] = {EAGER: each(F.linear, x, weights)}
    for name, how in compilers.items():
        calls[f"bf16 {name}"] = each(compiled(how), x, weights)
    calls[OURS] = [int8_call(x, one, scale, d) for one in qweights]
    found = clock.times(calls, sizes.rounds)
    # The code of the compiled product is the same for all cases, and Dynamo keeps only so many versions.
    torch._dynamo.reset()
    return result(found, shape, m, measured()) | {"copies": {"bf16": len(weights), "int8": len(qweights)}}


def result(measured: Measured, shape: Shape, m: int, ceiling: Mapping[str, Any]) -> CaseResult:
    """The times of a case with their bars, and how near to the roofline both sides come."""
    times = measured.needed(OURS, EAGER)
    baselines = [name for name in times.seconds if name != OURS]
    best = times.fastest(baselines)
    operations, (_, k, n) = 2 * m * shape.k * shape.n, shape
    # x is read, and the result written. Ours also writes and reads what it quantized; a GPU's L2 may hold that.
    moved = {"bf16": 2 * (n * k + m * k + m * n), "int8": n * k + 4 * n + 2 * (m * k + m * n)}
    roofline = {}
    for name, kind in ((best, "bf16"), (OURS, "int8")):
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
        "bars": {"times faster": bars.at_least(times.ratio(OURS, best), bars.linear(m))},
    }


def int8_call(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, threshold: float = THRESHOLD) -> Call:
    """Quantizes x and multiplies it, as a compiled model does."""
    quantize = quantize_rows.default
    return lambda: _product(quantize(x, d, threshold), qweight, scale)


def product_call(activations: Sequence[Tensor], qweight: Tensor, scale: Tensor) -> Call:
    """Multiplies what `quantize_rows` made."""
    return lambda: _product(activations, qweight, scale)


def _product(activations: Sequence[Tensor], qweight: Tensor, scale: Tensor) -> object:
    return quantized_linear.default(*activations, qweight, scale, None, NONE, 0, 0, torch.bfloat16)


def each(function: Callable[..., object], x: Tensor, weights: Sequence[Tensor]) -> list[Call]:
    """A call for each copy of a weight."""
    return [lambda weight=weight: function(x, weight) for weight in weights]  # type: ignore[misc]


def compiled(how: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """`F.linear`, compiled."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    result: Callable[[Tensor, Tensor], Tensor] = torch.compile(product, fullgraph=True, dynamic=False, **how)
    return result
