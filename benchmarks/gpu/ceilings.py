"""What the device can do at most: the roofline that times are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.clock import Call, Clock, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.sizes import Sizes

NAME = "ceilings"


def stage(sizes: Sizes, clock: Clock, device: torch.device) -> Stage:
    """A large copy, and large square products by the library that PyTorch takes."""

    def copy() -> CaseResult:
        source = torch.randint(-128, 128, (sizes.copied // 4,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        # Bytes read and bytes written. A kernel: in a graph, `copy_` is a node of the copy engines', which on an H200
        # gave 2.7 TB/s where the kernels of a decoded token read 2.9.
        return _rate(sizes, clock, lambda: torch.neg(source, out=target), 2 * sizes.copied, "bytes_per_second")

    def product(dtype: torch.dtype) -> CaseResult:
        size = (sizes.square, sizes.square)
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, size, dtype=dtype, device=device) for _ in range(2))
            call: Call = lambda: torch._int_mm(a, b.mT)  # noqa: E731
        else:
            a, b = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
            call = lambda: a @ b.mT  # noqa: E731
        return _rate(sizes, clock, call, 2 * sizes.square**3, "operations_per_second")

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
    """The least seconds of something by the roofline; None where the ceilings were not measured.

    Args:
        cases: Results of the stage.
        nbytes: That it has to move.
        operations: Multiplications and additions.
        kind: Of the matrix product that does them: "bf16" or "int8".
    """
    bandwidth = cases.get("copy", {}).get("bytes_per_second")
    peak = cases.get(f"{kind} matmul", {}).get("operations_per_second")
    if not bandwidth or not peak:
        return None
    return float(max(nbytes / bandwidth, operations / peak))


def _rate(sizes: Sizes, clock: Clock, call: Call, amount: int, unit: str) -> CaseResult:
    measured = clock.times({"it": [call]}, sizes.rounds)
    seconds = measured.needed("it").median("it")
    return {unit: float(f"{amount / seconds:.5g}"), **described_times(measured, ["it"])}
