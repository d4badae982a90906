"""int8 linears of other packages, if they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import bars, inputs
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import compiled_linear, each, int8_call
from benchmarks.gpu.sizes import Shape

NAME = "peers"
OURS, OURS_EAGER = "int8", "int8, eager"
# bitsandbytes reads the outliers on the host, so no CUDA graph can capture it. Both sides are timed without graphs.
EAGER = "bitsandbytes"


def stage(bench: Bench) -> Stage:
    """Return the stage. As in language models, outliers lie in columns; bitsandbytes computes those in float."""
    sizes = bench.sizes
    makers: dict[str, Callable[..., list[Call]]] = {
        "bitsandbytes": _bitsandbytes,
        "torchao": functools.partial(_torchao, sizes.peer_compiler),
    }
    missing = [name for name in makers if importlib.util.find_spec(name) is None]
    cases = {
        f"{name} M={m} {shape}": functools.partial(case, bench, name, makers[name], shape, m)
        for m in sizes.peer_rows
        for shape in sizes.shapes
        for name in makers
        if name not in missing
    }
    return Stage(
        NAME,
        f"int8 linears of other packages; activations with {sizes.outlier_columns} outlier columns. bitsandbytes (its "
        "float16, threshold 6) waits for the device at every call, so both sides are timed without CUDA graphs",
        seconds=10,
        cases=cases,
        expected=8,
        notes=[f"{name} is not installed" for name in missing],
    )


def case(bench: Bench, name: str, make: Callable[..., list[Call]], shape: Shape, m: int) -> CaseResult:
    """Measure a package with a shape and a number of rows."""
    x = inputs.with_outlier_columns(m, shape.k, bench.sizes.outlier_columns, bench.device)
    weight = inputs.weight(shape.k, shape.n, bench.device)
    qweight, scale, d = inputs.quantized(weight)
    qweights = inputs.copies(qweight, bench.l2_bytes)
    with warnings.catch_warnings():
        # The packages emit warnings that do not matter here.
        warnings.simplefilter("ignore")
        calls = {name: make(x, weight, len(qweights))}
        calls |= {ours: [int8_call(x, one, scale, d) for one in qweights] for ours in (OURS, OURS_EAGER)}
        measured = bench.clock.times(calls, bench.sizes.rounds, eager=[OURS_EAGER, EAGER])
    torch._dynamo.reset()
    ours = OURS_EAGER if name == EAGER else OURS
    times = measured.needed(name, ours)
    bar = bars.peer(name, m)
    return {
        "peer": name,
        **shape.facts(m),
        "compared": ours,
        **described_times(measured, [name]),
        "bars": {} if bar is None else {"times faster": bars.at_least(times.ratio(ours, name), bar)},
    }


def _bitsandbytes(x: Tensor, weight: Tensor, count: int) -> list[Call]:
    bnb: Any = importlib.import_module("bitsandbytes")
    # It logs at every call that inputs are cast to float16, also if they are float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    x = x.to(torch.float16)
    (n, k), half = weight.shape, weight.to("cpu", torch.float16)
    layers = []
    for _ in range(count):
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, threshold=6.0, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(half, requires_grad=False, has_fp16_weights=False)
        # The move to a device quantizes it.
        layers.append(layer.to(weight.device).eval())
    return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]


def _torchao(how: Mapping[str, Any], x: Tensor, weight: Tensor, count: int) -> list[Call]:
    quantization: Any = importlib.import_module("torchao.quantization")
    # torchao's settings of Inductor are global and would affect the other measurements.
    config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    (n, k), quantized = weight.shape, []
    for _ in range(count):
        layer = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantization.quantize_(nn.Sequential(layer), config)
        quantized.append(layer.weight)
    return each(compiled_linear(how), x, quantized)
