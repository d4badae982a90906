"""A linear layer in int8 against `F.linear`, for the numbers of rows M of decode and prefill.

The times include the quantization of the activations and the outliers. The baseline of a case is the faster of float32
and bfloat16, for int8 layers with float32 and with bfloat16 activations.

    python -m pytest benchmarks/bench_linear.py --benchmark-only -k test_linear    # the table
    python -m pytest benchmarks/bench_linear.py --benchmark-only -k test_sweep -s  # is any M slower than the baseline?

The sweep takes every M up to 40 and some larger ones; with `--every-row`, every M up to 600.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import interleaved
from benchmarks.conftest import is_smoke
from benchmarks.gpu import inputs
from int8compile import cpu as cpu_kernels
from int8compile.config import default_threshold
from int8compile.groups import make_d
from int8compile.ops import pack_weight, quantize_weight

SHAPES = [(2048, 2048), (4096, 4096), (4096, 11008)]  # K, N
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600]
SWEPT = [
    *range(1, 41),
    *[41, 47, 48, 49, 53, 61, 63, 64, 65, 71, 79, 80, 81, 89, 95, 96, 97, 101, 111, 113, 127, 128, 129, 144, 151],
    *[160, 161, 176, 191, 192, 193, 211, 224, 239, 255, 256, 257, 288, 307, 320, 353, 383, 384, 385, 416, 449, 480],
    *[511, 512, 513, 544, 577, 599, 600],
]
SMOKE_SHAPES, SMOKE_ROWS = [(64, 48)], [1, 4]
BASELINES = ("float32", "bfloat16")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Calls = dict[str, Callable[[], object]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test by the names of its arguments; with few cases under --smoke."""
    few = is_smoke(metafunc.config)
    # The shape comes first: cases of a shape share its layer, so they have to follow each other.
    metafunc.parametrize("shape", SMOKE_SHAPES if few else SHAPES, ids=lambda shape: "{}x{}".format(*shape))
    if "m" in metafunc.fixturenames:
        metafunc.parametrize("m", SMOKE_ROWS if few else ROWS)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", list(DTYPES))


class Layer:
    """A random linear layer in float32, in bfloat16 and in int8."""

    def __init__(self, k: int, n: int) -> None:
        weight = torch.randn(n, k) / k**0.5
        self.d = make_d([weight])
        qweight, self.scale = quantize_weight(weight, self.d)
        self.k = k
        self.weights = {name: weight.to(dtype) for name, dtype in DTYPES.items()}
        self.packed = pack_weight(qweight)
        # Without the CPU kernel, the operator would run its PyTorch definition.
        assert cpu_kernels.available()

    def calls(self, m: int, dtypes: tuple[str, ...]) -> Calls:
        """Return the calls of the two baselines, and of int8 with activations of the given dtypes."""
        cpu = torch.device("cpu")
        xs = {name: inputs.activations(m, self.k, cpu, torch.float32).to(dtype) for name, dtype in DTYPES.items()}
        calls: Calls = {name: self._float(xs[name], weight) for name, weight in self.weights.items()}
        return calls | {f"int8 {name}": self._int8(xs[name]) for name in dtypes}

    def _float(self, x: Tensor, weight: Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, weight)

    def _int8(self, x: Tensor) -> Callable[[], object]:
        op = torch.ops.int8compile.packed_linear_no_grad.default
        return lambda: op(x, self.packed, self.scale, self.d, None, default_threshold(rotated=True))


_layers: dict[tuple[int, int], Layer] = {}


def layer_of(k: int, n: int) -> Layer:
    """Return the layer of a shape. Only the last layer is kept: the largest takes 300 MB."""
    if (k, n) not in _layers:
        _layers.clear()
        _layers[k, n] = Layer(k, n)
    return _layers[k, n]


def rounds_for(k: int, n: int, m: int) -> int:
    """Return how often to time a case: often for short calls, whose times scatter most."""
    return max(9, min(101, 4 * 10**10 // (m * k * n)))


def test_linear(benchmark: Any, smoke: bool, shape: tuple[int, int], m: int, dtype: str) -> None:
    """Time one shape, M and dtype. `group` shows both dtypes side by side; `extra_info` holds the baselines."""
    k, n = shape
    benchmark.group = f"linear M={m} K={k} N={n}"
    calls = layer_of(k, n).calls(m, (dtype,))
    times = interleaved.measure(benchmark, calls, f"int8 {dtype}", 2 if smoke else rounds_for(k, n, m))
    benchmark.extra_info.update(kind="linear", k=k, n=n, m=m, dtype=dtype, **times.to_dict(BASELINES))


def test_sweep(benchmark: Any, smoke: bool, pytestconfig: pytest.Config, shape: tuple[int, int]) -> None:
    """Look for an M at which a float layer is faster. Cases close to that are timed again, for longer."""
    k, n = shape
    rows = SMOKE_ROWS if smoke else list(range(1, 601)) if pytestconfig.getoption("every_row") else SWEPT
    layer = layer_of(k, n)
    ratios: dict[str, dict[int, float]] = {name: {} for name in DTYPES}

    def sweep() -> None:
        for m in tqdm(rows, desc=f"{k}x{n}", leave=False):
            calls = layer.calls(m, tuple(DTYPES))
            times = interleaved.take_turns(calls, 5)
            if any(times.ratio(f"int8 {name}", times.fastest(BASELINES)) < 1.1 for name in DTYPES):
                times = interleaved.take_turns(calls, 25)
            for name in DTYPES:
                ratios[name][m] = round(times.ratio(f"int8 {name}", times.fastest(BASELINES)), 3)

    benchmark.group = f"sweep K={k} N={n}"
    benchmark.pedantic(sweep)
    benchmark.extra_info.update(kind="sweep", k=k, n=n, ratios=ratios)
    for name, found in ratios.items():
        listed = ", ".join(f"M={m}: {found[m]:.2f}x" for m in sorted(found, key=found.__getitem__)[:3])
        print(f"\n{k}x{n}, {name} activations, {len(found)} values of M: smallest ratios {listed}")
