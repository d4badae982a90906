"""The roofline of the device, which times are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.interleaved import rounded

NAME = "ceilings"


def stage(bench: Bench) -> Stage:
    """Return the stage: a large copy, and large square products by the library that PyTorch chooses."""
    sizes, device = bench.sizes, bench.device

    def copy() -> CaseResult:
        source = torch.randint(-128, 128, (sizes.copied // 4,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        # A kernel instead of `copy_`: in a graph, the copy engine does `copy_`. On an H200 it reached 2.7 TB/s, while
        # the kernels of a decoded token read 2.9. Both reads and writes count.
        return _rate(bench, lambda: torch.neg(source, out=target), 2 * sizes.copied, "bytes_per_second")

    def product(dtype: torch.dtype) -> CaseResult:
        size = (sizes.square, sizes.square)
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, size, dtype=dtype, device=device) for _ in range(2))
            call: Call = lambda: torch._int_mm(a, b.mT)  # noqa: E731
        else:
            a, b = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
            call = lambda: a @ b.mT  # noqa: E731
        return _rate(bench, call, 2 * sizes.square**3, "operations_per_second")

    return Stage(
        NAME,
        "bandwidth of a kernel (bytes read and written), and the rates of square matrix products",
        seconds=15,
        expected=3,
        cases={
            "copy": copy,
            "bf16 matmul": lambda: product(torch.bfloat16),
            "int8 matmul": lambda: product(torch.int8),
        },
        measures=False,
    )


def floor(cases: Mapping[str, Any], nbytes: int, operations: int, kind: str) -> float | None:
    """Return the least seconds by the roofline; None if the ceilings were not measured.

    Args:
        cases: Results of the stage.
        nbytes: Bytes to move.
        operations: Multiplications and additions.
        kind: Matrix product that does them: "bf16" or "int8".
    """
    bandwidth = cases.get("copy", {}).get("bytes_per_second")
    peak = cases.get(f"{kind} matmul", {}).get("operations_per_second")
    if not bandwidth or not peak:
        return None
    return float(max(nbytes / bandwidth, operations / peak))


def _rate(bench: Bench, call: Call, amount: int, unit: str) -> CaseResult:
    measured = bench.clock.times({"it": [call]}, bench.sizes.rounds)
    seconds = measured.needed("it").median("it")
    return {unit: rounded(amount / seconds), **described_times(measured, ["it"])}
