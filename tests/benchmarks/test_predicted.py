"""The model of kernel times against measured kernels, and its mark as a prediction."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import predicted
from benchmarks.model import (
    BASELINE,
    GPUS,
    LAUNCH,
    Gpu,
    Kernel,
    Time,
    baseline,
    product,
    rows,
)
from benchmarks.predicted import ERROR, SHAPES, Kernels, Linear
from benchmarks.sass import Counts

H100, H200 = GPUS["H100"], GPUS["H200"]
COPYING = Counts(instructions=100, matrix=4, waits=("SB0 6", "gsb0 0"), barriers=2, copies=(("LDGSTS 16", 8),))
TILES = Kernel("gemm", 128, 128, 128, stages=5, warps=8, resident=1, loop=COPYING, outside=1000)


class Stored(Kernels):
    """Kernels with known figures, without Triton."""

    def __init__(self) -> None:
        self.made: list[tuple[int, bool]] = []

    def product(self, m: int, n: int, k: int, gated: bool = False) -> Kernel:
        return TILES

    def quantize(self, gpu: Gpu, m: int, k: int, norm: bool) -> Time:
        self.made.append((m, norm))
        return Time(5e-6 if norm else 4e-6, "launch")


def test_the_model_describes_what_was_measured() -> None:
    checked = predicted.check(json.loads(predicted.MEASURED.read_text()))
    found = predicted.summarized(checked)
    assert {what: each["cases"] for what, each in found.items()} == {
        "product": 24,
        "quantize": 6,
        "bfloat16": 20,
        "decode, bfloat16": 1,
    }
    assert all(abs(each.error) <= ERROR for each in checked)
    assert abs(found["product"]["mean"]) < 0.02  # Errors on both sides.
    assert found["bfloat16"]["mean"] < 0  # In bfloat16's favour.
    assert found["decode, bfloat16"]["mean"] < 0


def test_bfloat16_has_its_known_rate() -> None:
    """cuBLAS with 8192 rows, inputs and outputs: 700 to 750 TFLOP/s are published, an H200 reached 786."""
    rate = 2 * 8192**3 / baseline(H100, 8192, 8192, 8192)
    assert 700e12 < rate < 811e12


def test_a_product_is_as_slow_as_its_slowest_part() -> None:
    large = product(H100, TILES, 8192, 4096, 4096)
    assert large.limit == "waits"
    asynchronous = Counts(instructions=50, matrix=4, waits=("gsb0 1",), barriers=2, phases=2)
    faster = product(H100, Kernel(*("gluon", 128, 256, 128, 4, 8, 1, asynchronous, 1000)), 8192, 4096, 4096)
    assert faster.limit == "matrix units"
    assert faster.seconds < large.seconds
    row = Counts(instructions=100, loads=((16, 9),), dots=64)
    few = [product(gpu, Kernel("gemv", 1, 8, 2048, 1, 4, 8, row, 100), 1, 28672, 4096) for gpu in (H100, H200)]
    assert [each.limit for each in few] == ["memory", "memory"]
    assert few[0].seconds - LAUNCH > 1.2 * (few[1].seconds - LAUNCH)


def test_splits_fill_multiprocessors_and_cost_their_sums() -> None:
    def seconds(m: int, splits: int) -> float:
        return product(
            H100, Kernel(*("gemm", 128, 128, 128, 5, 8, 1, COPYING, 1000), splits=splits), m, 4096, 14336
        ).seconds

    assert seconds(128, 4) < seconds(128, 1)  # 32 tiles for 132 multiprocessors.
    assert seconds(2048, 4) > seconds(2048, 1)


def test_rows_are_limited_by_what_is_slowest() -> None:
    assert rows(H100, 500, 10, 8, 6, 1, 3 * 4096).limit == "launch"
    assert rows(H100, 800, 10, 8, 6, 8192, 3 * 8192 * 4096).limit == "instructions"
    assert rows(H100, 100, 10, 8, 6, 8192, 3 * 8192 * 4096).limit == "memory"


def test_a_linear_counts_the_launches_of_both_sides() -> None:
    kernels = Stored()
    alone = predicted.linear(H100, kernels, 16, SHAPES["gate_up"], in_layer=False)
    inside = predicted.linear(H100, kernels, 16, SHAPES["gate_up"], in_layer=True)
    assert kernels.made == [(16, False), (16, True)]
    assert alone.baseline == baseline(H100, 16, 28672, 4096) > BASELINE
    assert inside.baseline > alone.baseline + 2 * LAUNCH  # The norm, and silu times up.
    assert Linear("", 1.0, 2.0, 6.0, "").ratio == 2


def test_everything_shown_is_marked_as_a_prediction() -> None:
    found = predicted.predictions(H100, Stored())
    text = predicted.render(found, "H100")
    assert text.startswith("## H100: Prediction, not measured")
    assert len(found["linear"]) == len(found["layer"]) == len(predicted.ROWS) * len(SHAPES)
    assert found["layer"]["M=16 o 4096x4096"]["bar"] == 1.2
    assert text.count("MISSED") == sum(
        case["ratio"] < case["bar"] for case in (*found["layer"].values(), *found["decode"].values()) if "bar" in case
    )
    for file in (predicted.PREDICTED, predicted.PREDICTED.with_suffix(".md")):
        assert predicted.MARK in file.read_text()


def test_the_committed_predictions_are_of_the_tables_kernels() -> None:
    """On failure: python -m benchmarks.predicted --out benchmarks/results/gpu/predicted.md."""
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    from int8compile.triton_kernels import tables

    committed: dict[str, Any] = json.loads(predicted.PREDICTED.read_text())
    arch = tables.ARCHITECTURES["sm_90"]
    assert set(committed["gpus"]) == set(GPUS)
    for found in committed["gpus"].values():
        for case in found["linear"].values():
            shape = SHAPES[case["shape"]]
            configs = tables.candidates(arch, case["m"], shape.k)
            chosen = tables.choose(configs, case["m"], shape.n, shape.k, 132)
            assert case["kernel"] == str(chosen)


def test_kernels_are_compiled() -> None:
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    kernels = Kernels()
    found = predicted.linear(H100, kernels, 1, SHAPES["o"], in_layer=True)
    assert found.kernel.startswith("gemv ")
    assert found.limit == "memory"
    # Never faster than reading the bytes.
    assert found.product > 4096 * 4096 / H100.bandwidth + LAUNCH
    assert found.quantize > LAUNCH
