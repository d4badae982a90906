"""What outliers and quantization cost of a product, and what a call costs the host."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks.gpu import bars, inputs
from benchmarks.gpu.clock import Call, Clock, described_times, host_seconds
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import THRESHOLD, int8_call, product_call
from benchmarks.gpu.sizes import Shape, Sizes
from benchmarks.interleaved import Times
from int8compile.ops import norm_quantize_rows, quantize_rows
from int8compile.ops.quantized import RMS

OUTLIERS, LAUNCH = "outliers", "launch"
WITH, WITHOUT, QUANTIZE = "product, outliers", "product", "quantize"
# With the residual add and the norm in front, as in a layer.
NORMED, EPSILON = "norm and quantize", 1e-5
OURS = "quantize_rows, quantized_linear"


def outliers_stage(sizes: Sizes, clock: Clock, device: torch.device, l2_bytes: int) -> Stage:
    """The product with and without outliers, and the pass before it."""
    return Stage(
        OUTLIERS,
        "activations with an outlier in every row: quantized_linear with threshold 12 against threshold 0, and "
        "the times of quantize_rows and norm_quantize_rows (with the residual add) relative to it",
        seconds=40,
        expected=4,
        cases={
            f"M={m} {shape}": functools.partial(outliers_case, sizes, clock, device, l2_bytes, shape, m)
            for m in sizes.outlier_rows
            for shape in sizes.shapes
        },
    )


def outliers_case(sizes: Sizes, clock: Clock, device: torch.device, l2_bytes: int, shape: Shape, m: int) -> CaseResult:
    """One shape with one number of rows."""
    x = inputs.with_outliers(m, shape.k, device)
    qweight, scale, d = inputs.quantized(inputs.weight(shape.k, shape.n, device))
    qweights = inputs.copies(qweight, l2_bytes)
    norm_weight = torch.ones(shape.k, dtype=x.dtype, device=device)
    split, plain = quantize_rows(x, d, THRESHOLD), quantize_rows(x, d, 0.0)
    calls: dict[str, list[Call]] = {
        WITH: [product_call(split, one, scale) for one in qweights],
        WITHOUT: [product_call(plain, one, scale) for one in qweights],
        QUANTIZE: [lambda: quantize_rows(x, d, THRESHOLD)] * len(qweights),
        NORMED: [lambda: norm_quantize_rows(x, x, norm_weight, None, d, RMS, EPSILON, THRESHOLD)] * len(qweights),
    }
    measured = clock.times(calls, sizes.rounds)
    times = measured.needed(*calls)
    return {
        "shape": shape.name,
        "k": shape.k,
        "n": shape.n,
        "m": m,
        **described_times(measured, [WITHOUT]),
        "bars": outlier_bars(times, m, shape.n),
    }


def outlier_bars(times: Times, m: int, n: int) -> dict[str, dict[str, object]]:
    """Judge the time that outliers add to a product of N outputs, and that of quantizing beside it."""
    judged = {"outlier part": bars.at_most(times.median(WITH) / times.median(WITHOUT) - 1, bars.OUTLIER_PART)}
    if m >= bars.QUANTIZE_ROWS:
        judged["quantize to product"] = bars.at_most(times.median(QUANTIZE) / times.median(WITHOUT), bars.quantize(n))
    return judged


def launch_stage(sizes: Sizes, clock: Clock, device: torch.device) -> Stage:
    """A decode call outside of CUDA graphs."""
    shape = next(shape for shape in sizes.shapes if shape.name == "o")
    return Stage(
        LAUNCH,
        "host seconds of a call with M=1, outside of CUDA graphs",
        seconds=10,
        expected=4,
        cases={f"M=1 {shape}": functools.partial(launch_case, sizes, clock, device, shape)},
    )


def launch_case(sizes: Sizes, clock: Clock, device: torch.device, shape: Shape) -> CaseResult:
    """The host's part of each call; nothing waits for the device."""
    x = inputs.activations(1, shape.k, device)
    weight = inputs.weight(shape.k, shape.n, device)
    qweight, scale, d = inputs.quantized(weight)
    quantized = quantize_rows(x, d, THRESHOLD)
    calls: dict[str, Call] = {
        OURS: int8_call(x, qweight, scale, d),
        "quantize_rows": lambda: quantize_rows(x, d, THRESHOLD),
        "quantized_linear": product_call(quantized, qweight, scale),
        "linear": lambda: torch.ops.int8compile.linear(x, qweight, scale, d, None, THRESHOLD),
        "bf16 F.linear": lambda: F.linear(x, weight),
    }
    seconds = {name: host_seconds(call, clock, sizes.launches, sizes.rounds) for name, call in calls.items()}
    times = Times(seconds, None)
    return {
        "medians": {name: float(f"{times.median(name):.4g}") for name in calls},
        "bars": {"host seconds": bars.at_most(times.median(OURS), bars.LAUNCH)},
    }
