"""Tools that the day on a GPU measures with: bars, inputs, gates, clocks."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import bars, ceilings, checks, clock, facts, inputs, linear, parts, sizes
from benchmarks.gpu.llama import Attention, LlamaConfig, rotated
from benchmarks.interleaved import Times
from tests.helpers.gpu_day import H100_L2, fail

# Other packages give warnings while they quantize and compile, which would be errors here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("m", "slow", "bar", "met"),
    [
        (1, 1.8, 1.75, True),
        (64, 1.7, 1.75, False),
        (65, 0.99, 1.0, False),
        (2047, 1.01, 1.0, True),
        (2048, 1.59, 1.6, False),
    ],
)
def test_a_linear_layer_is_judged_by_the_fastest_baseline(m: int, slow: float, bar: float, met: bool) -> None:
    times = Times({"bf16 eager": [2.0, 2.0], "bf16 Inductor": [slow, slow], "int8": [1.0, 1.0]}, None)
    measured = clock.Measured(times, {"bf16 max-autotune": "RuntimeError: no"})
    result = linear.result(measured, sizes.Shape("o", 64, 64), m, {})
    assert result["fastest_baseline"] == ("bf16 Inductor" if slow < 2 else "bf16 eager")
    assert result["bars"] == {"times faster": {"value": slow, "at_least": bar, "met": met}}
    assert result["errors"] == {"bf16 max-autotune": "RuntimeError: no"}
    assert result["roofline_share"] == {}


def test_a_linear_layer_without_our_time_is_an_error() -> None:
    measured = clock.Measured(Times({"bf16 eager": [1.0]}, None), {"int8": "RuntimeError: illegal access"})
    with pytest.raises(RuntimeError, match="int8: RuntimeError: illegal access"):
        linear.result(measured, sizes.Shape("o", 64, 64), 1, {})


def test_the_parts_of_a_product_are_judged() -> None:
    times = Times({parts.WITH: [1.04], parts.WITHOUT: [1.0], parts.QUANTIZE: [0.2]}, None)
    few, many = parts.outlier_bars(times, 16, 4096), parts.outlier_bars(times, 2048, 4096)
    assert list(few) == ["outlier part"]
    assert few["outlier part"] == {"value": 0.04, "at_most": 0.05, "met": True}
    # 1.5 times the least time for reading x, a smaller share of the time of a wider product.
    assert many["quantize to product"] == {"value": 0.2, "at_most": 1050 / 4096, "met": True}
    wide = parts.outlier_bars(times, 2048, 28672)["quantize to product"]
    assert wide == {"value": 0.2, "at_most": 1050 / 28672, "met": False}


def test_bars_of_other_packages() -> None:
    assert [bars.peer("bitsandbytes", m) for m in (1, 32, 33, 512, 2048, 4096)] == [4.0, 4.0, None, 2.0, 2.0, None]
    assert [bars.peer("torchao", m) for m in (1, 64, 65, 511, 512, 8192)] == [3.0, 3.0, None, None, 1.2, 1.2]
    with pytest.raises(ValueError, match="quanto"):
        bars.peer("quanto", 1)


@pytest.mark.parametrize("shape", sizes.for_gpu(32).shapes, ids=str)
def test_copies_of_a_weight_do_not_fit_into_the_l2_cache(shape: sizes.Shape) -> None:
    for itemsize in (1, 2):
        nbytes = itemsize * shape.k * shape.n
        count = inputs.copies_needed(nbytes, H100_L2)
        assert count >= 2
        assert count * nbytes > 3 * H100_L2
    weight = torch.zeros(10, 10)
    assert len({copy.data_ptr() for copy in inputs.copies(weight, 1000)}) == inputs.copies_needed(400, 1000) == 8


def test_rows_with_outliers_keep_them_when_they_are_rotated() -> None:
    from int8compile.ops import quantize_rows

    for k in (64, 4096, 14336):
        *_, d = inputs.quantized(inputs.weight(k, 16, torch.device("cpu")))
        has = [
            quantize_rows(make(50, k, torch.device("cpu")), d, linear.THRESHOLD)[1][1]
            for make in (inputs.with_outliers, inputs.activations)
        ]
        assert has[0].all() or k == 64
        assert not has[1].any()


def test_the_rows_of_a_gpu_reach_every_part_of_the_table() -> None:
    from int8compile.triton_kernels import tables

    real = sizes.for_gpu(32)
    assert {tables.bucket_of(m) for m in real.candidate_rows} == set(tables.BUCKETS)
    assert set(real.first_rows) < set(real.rows)
    assert {str(shape): shape.k * shape.n for shape in real.shapes}["gate_up 4096x28672"] == 4096 * 28672


def test_ulps() -> None:
    a = torch.tensor([1.0, -0.0, 1.0, torch.nan, torch.nan, torch.inf, -1.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0078125, 0.0, -1.0, torch.nan, 1.0, torch.inf, -1.015625], dtype=torch.bfloat16)
    assert checks.ulps(a, b).tolist() == [1, 0, 2 * 0x3F80, 0, 65536, 0, 2]


def test_a_gate_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = sizes.Gate(2, 64, 48)
    assert checks.check(gate, torch.device("cpu"))["passed"]
    right = torch.ops.int8compile.linear

    def wrong(*args: Any) -> torch.Tensor:
        y: torch.Tensor = right(*args)
        y[1, 7] = torch.nan
        return y

    monkeypatch.setattr(torch.ops.int8compile, "linear", wrong)
    result = checks.check(gate, torch.device("cpu"))
    assert (result["passed"], result["max_ulp"]) == (False, 65536)


def test_gates_poison_memory_that_nobody_wrote() -> None:
    with checks._poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_roofline_is_the_longer_of_bytes_and_operations() -> None:
    cases = {"copy": {"bytes_per_second": 10.0}, "bf16 matmul": {"operations_per_second": 100.0}}
    assert ceilings.floor(cases, 20, 100, "bf16") == 2.0
    assert ceilings.floor(cases, 20, 400, "bf16") == 4.0
    assert ceilings.floor(cases, 20, 400, "int8") is None


def test_texts_lose_folders_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    host = platform.node()
    # `make test` uses this environment.
    monkeypatch.setattr(sys, "prefix", str(facts.ROOT / ".venv"))
    text = f'File "/opt/venv/lib/python3.12/x.py", line 3: {Path.home()} -I{sys.prefix}/include 4096/6144, tests/a.py'
    found = facts.scrubbed(f"{text} {host}")
    assert found.startswith('File "x.py", line 3: ~ -Ipython/include 4096/6144, tests/a.py')
    assert not host or host not in found.split()
    long = facts.described(ValueError("begin " + "x" * 5000 + " end"))
    assert len(long) < 1600
    assert long.startswith("ValueError: begin")
    assert long.endswith(" end")


def test_short_calls_are_repeated() -> None:
    assert clock.passes_for(2.0) == 1
    assert clock.passes_for(1e-4) * 1e-4 >= clock.LEAST_SECONDS
    assert clock.passes_for(0.0) == clock.MOST_PASSES


def test_one_candidate_that_fails_does_not_stop_the_others() -> None:
    measured = clock.HostClock().times({"bad": [fail], "good": [time.perf_counter, time.perf_counter]}, 2)
    assert "out of memory" in measured.errors["bad"]
    assert len(measured.times.seconds["good"]) == 2
    with pytest.raises(RuntimeError, match="bad"):
        measured.needed("good", "bad")


class FakeCuda:
    """The parts of torch.cuda that the clock uses; a replay takes 0.25 ms, and nothing else advances the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.capturing: list[Any] | None = None
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.now += 0.25

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        @contextlib.contextmanager
        def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
            yield

        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": Stream,
            "graph": capture,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_are_timed_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    calls: list[int] = []
    copies = [lambda i=i: calls.append(i) for i in range(3)]
    measured = clock.GraphClock().times({"graph": copies, "bad": [fail], "eager": [dict]}, 5, eager=["eager"])
    assert list(measured.errors) == ["bad"]
    # Warmed up, captured once, and captured again with as many passes as fit into a millisecond.
    passes = clock.passes_for(0.25e-3)
    assert len(calls) == 3 * (clock.WARM_UPS + 1 + passes)
    assert calls[:6] == [0, 1, 2, 0, 1, 2]
    assert measured.times.seconds["graph"] == pytest.approx([0.25e-3 / (3 * passes)] * 5)
    assert len(measured.times.seconds["eager"]) == 5


def test_attention_is_what_repeated_heads_make() -> None:
    config = LlamaConfig(layers=1, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=16, length=8)
    attention = Attention(config, torch.device("cpu"), torch.float32).requires_grad_(False)
    x, positions = torch.randn(1, 3, 32), torch.tensor([2, 3, 4])
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    mask = torch.arange(8) <= positions[:, None]
    found = attention(x, cos, sin, mask, positions)

    def heads(projection: torch.nn.Linear) -> torch.Tensor:
        return projection(x).view(1, 3, -1, 8).transpose(1, 2)

    q, k = rotated(heads(attention.q_proj), cos, sin), rotated(heads(attention.k_proj), cos, sin)
    assert torch.equal(attention.keys[:, :, positions], k)
    assert torch.equal(attention.values[:, :, positions], heads(attention.v_proj))
    expected = F.scaled_dot_product_attention(q, attention.keys, attention.values, attn_mask=mask, enable_gqa=True)
    expected = attention.o_proj(expected.transpose(1, 2).reshape(1, 3, 32))
    torch.testing.assert_close(found, expected)
