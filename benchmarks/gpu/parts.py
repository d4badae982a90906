"""The cost of outliers and of quantization relative to a product, and the host's time for a call."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks.gpu import bars, inputs
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, described_times, host_seconds
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import THRESHOLD, int8_call, product_call
from benchmarks.gpu.sizes import Shape
from benchmarks.interleaved import Times, rounded
from int8compile.ops import norm_quantize_rows, quantize_rows
from int8compile.ops.quantized import RMS

OUTLIERS, LAUNCH = "outliers", "launch"
WITH, WITHOUT, QUANTIZE = "product, outliers", "product", "quantize"
# With the residual add and the norm before, as in a layer.
NORMED, EPSILON = "norm and quantize", 1e-5
OURS = "quantize_rows, quantized_linear"


def outliers_stage(bench: Bench) -> Stage:
    """Return the stage: the product with and without outliers, and the quantization before it."""
    return Stage(
        OUTLIERS,
        "activations with an outlier in every row: quantized_linear with threshold 12 against threshold 0, and "
        "the times of quantize_rows and norm_quantize_rows (with the residual add) relative to it",
        seconds=40,
        expected=4,
        cases=bench.cases(bench.sizes.outlier_rows, functools.partial(outliers_case, bench)),
    )


def outliers_case(bench: Bench, shape: Shape, m: int) -> CaseResult:
    """Measure a shape with a number of rows."""
    x = inputs.with_outliers(m, shape.k, bench.device)
    qweight, scale, d = inputs.quantized(inputs.weight(shape.k, shape.n, bench.device))
    qweights = inputs.copies(qweight, bench.l2_bytes)
    norm_weight = torch.ones(shape.k, dtype=x.dtype, device=bench.device)
    split, plain = quantize_rows(x, d, THRESHOLD), quantize_rows(x, d, 0.0)
    calls: dict[str, list[Call]] = {
        WITH: [product_call(split, one, scale) for one in qweights],
        WITHOUT: [product_call(plain, one, scale) for one in qweights],
        QUANTIZE: [lambda: quantize_rows(x, d, THRESHOLD)] * len(qweights),
        NORMED: [lambda: norm_quantize_rows(x, x, norm_weight, None, d, RMS, EPSILON, THRESHOLD)] * len(qweights),
    }
    measured = bench.clock.times(calls, bench.sizes.rounds)
    bars_of = outlier_bars(measured.needed(*calls), m, shape.n)
    return {**shape.facts(m), **described_times(measured, [WITHOUT]), "bars": bars_of}


def outlier_bars(times: Times, m: int, n: int) -> dict[str, dict[str, object]]:
    """Judge the share of time that outliers add to a product of N outputs, and that of quantization."""
    judged = {"outlier part": bars.at_most(times.median(WITH) / times.median(WITHOUT) - 1, bars.OUTLIER_PART)}
    if m >= bars.QUANTIZE_ROWS:
        judged["quantize to product"] = bars.at_most(times.median(QUANTIZE) / times.median(WITHOUT), bars.quantize(n))
    return judged


def launch_stage(bench: Bench) -> Stage:
    """Return the stage: a decode call without CUDA graphs."""
    shape = next(shape for shape in bench.sizes.shapes if shape.name == "o")
    return Stage(
        LAUNCH,
        "host seconds of a call with M=1, without CUDA graphs",
        seconds=10,
        expected=4,
        cases=bench.cases((1,), functools.partial(launch_case, bench), (shape,)),
    )


def launch_case(bench: Bench, shape: Shape, m: int) -> CaseResult:
    """Measure the host's time of each call; nothing waits for the device."""
    x = inputs.activations(m, shape.k, bench.device)
    weight = inputs.weight(shape.k, shape.n, bench.device)
    qweight, scale, d = inputs.quantized(weight)
    quantized = quantize_rows(x, d, THRESHOLD)
    calls: dict[str, Call] = {
        OURS: int8_call(x, qweight, scale, d),
        "quantize_rows": lambda: quantize_rows(x, d, THRESHOLD),
        "quantized_linear": product_call(quantized, qweight, scale),
        "linear": lambda: torch.ops.int8compile.linear(x, qweight, scale, d, None, THRESHOLD),
        "bf16 F.linear": lambda: F.linear(x, weight),
    }
    count, rounds = bench.sizes.launches, bench.sizes.rounds
    times = Times({name: host_seconds(call, bench.clock, count, rounds) for name, call in calls.items()}, None)
    return {
        "medians": {name: rounded(times.median(name), 4) for name in calls},
        "bars": {"host seconds": bars.at_most(times.median(OURS), bars.LAUNCH)},
    }
