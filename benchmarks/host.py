"""Host time of a call in microseconds: Python and PyTorch up to the launch of a kernel, without the launch.

    python -m benchmarks.host
    python -m benchmarks.host --out benchmarks/results/host.md

It needs Triton but no GPU: kernels are compiled for an sm_90 stand-in (`benchmarks.gpu.standin`). Without CUDA graphs,
a GPU waits for the host wherever its kernels take less than this. In the last line of the table, every call has another
number of rows.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks import tables
from benchmarks.gpu import standin
from benchmarks.gpu.clock import HostClock, host_seconds
from int8compile.ops import norm_quantize_rows, quantize_rows, quantized, quantized_linear

N, K, THRESHOLD = 4096, 4096, 12.0
ROWS, NEW_ROWS = (1, 16, 64, 256, 2048), range(257, 2048)
CALLS, ROUNDS = 20, 101
# Options of the C library's allocator, as numbered by mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def report(_: Path, rounds: int) -> str:
    """Measure, and return the table."""
    standin.take_over()
    # Keep freed memory, as PyTorch does on a GPU.
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        ctypes.CDLL(None).mallopt(option, value)
    columns = _columns(max(ROWS))
    lines: list[list[Any]] = [
        [m, *(_microseconds(call, [given(m)], CALLS, rounds) for call, given in columns.values())] for m in ROWS
    ]
    lines.append([f"{NEW_ROWS[0]} to {NEW_ROWS[-1]}"])
    for i, (call, given) in enumerate(columns.values()):
        each = [given(m) for m in NEW_ROWS[i :: len(columns)]]
        lines[-1].append(_microseconds(call, each, (len(each) - 1) // rounds, rounds))
    table = tabulate(lines, headers=("rows", *columns), tablefmt="github", floatfmt=".1f")
    return f"Microseconds per call, medians of {rounds}; weight {N} x {K}, bfloat16 activations.\n\n{table}"


def _columns(most: int) -> dict[str, tuple[Callable[[Any], object], Callable[[int], Any]]]:
    """Return each call by name, with a function from the number of rows, `most` at most, to its argument."""
    x = torch.zeros(most, K, dtype=torch.bfloat16)
    d, norm_weight = torch.ones(K), torch.ones(K, dtype=torch.bfloat16)
    qweight, scale = torch.zeros(N, K, dtype=torch.int8), torch.ones(N)
    q, rows, counters = quantized.empty_rows(x, THRESHOLD)

    def quantize(x: Tensor) -> Sequence[Tensor]:
        made: Sequence[Tensor] = quantize_rows.default(x, d, THRESHOLD)
        return made

    def normalize(x: Tensor) -> object:
        return norm_quantize_rows.default(x, x, norm_weight, None, d, quantized.RMS_ROUNDED, 1e-6, THRESHOLD)

    def multiply(made: Sequence[Tensor]) -> object:
        return quantized_linear.default(*made, qweight, scale, None, quantized.NONE, 0, 0, torch.bfloat16)

    def digits(m: int) -> Sequence[Tensor]:
        """Return the result of `quantize_rows` for M rows, as views of one buffer."""
        words = len(rows)
        return q.view(-1)[: 2 * m * K].view(2, m, K), rows.view(-1)[: words * m].view(words, m), counters

    return {
        "quantize_rows": (quantize, lambda m: x[:m]),
        "norm_quantize_rows": (normalize, lambda m: x[:m]),
        "quantized_linear": (multiply, digits),
        "quantize_rows, quantized_linear": (lambda x: multiply(quantize(x)), lambda m: x[:m]),
    }


def _microseconds(call: Callable[[Any], object], each: Sequence[Any], count: int, rounds: int) -> float:
    turns = itertools.cycle(each)
    with torch.no_grad():
        return 1e6 * statistics.median(host_seconds(lambda: call(next(turns)), HostClock(), count, rounds))


if __name__ == "__main__":
    tables.run(__doc__, ROUNDS, report)
