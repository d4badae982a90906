"""A model exported to a package, against the same model under torch.compile. Both have the same kernels and outputs."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu import bars, inputs
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.llama import MLP

NAME = "export"
PACKAGE, COMPILED = "package", "torch.compile"
MOST_ROWS = 4096


def stage(bench: Bench) -> Stage:
    """Return the stage: a gated MLP. It runs only int8compile's kernels, so Inductor cannot round differently."""
    return Stage(
        NAME,
        "a Llama's MLP as a package and under torch.compile, by rows: outputs, and times including the host",
        seconds=45,
        cases={"MLP": functools.partial(case, bench)},
        expected=40,
    )


def case(bench: Bench) -> CaseResult:
    """Export the MLP, load the package, and compare.

    Raises:
        RuntimeError: An output differs.
    """
    from torch._inductor import aoti_load_package
    from torch.export import Dim

    import int8compile

    sizes = bench.sizes
    model: nn.Module = MLP(sizes.llama, bench.device, torch.bfloat16).eval()

    def rows(m: int) -> Tensor:
        return inputs.activations(m, sizes.llama.hidden, bench.device)[None]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        began = time.perf_counter()
        shapes = ({1: Dim("rows", min=1, max=MOST_ROWS)},)
        int8compile.export(model, (rows(9),), path, dynamic_shapes=shapes)
        exported = time.perf_counter() - began
        about = int8compile.inspect(path).metadata
        began = time.perf_counter()
        package = aoti_load_package(str(path))
        loaded = time.perf_counter() - began
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=True)
    result: CaseResult = {
        "form": about["form"],
        "seconds": {"export": round(exported, 1), "load": round(loaded, 2)},
        "rows": {},
    }
    differing = []
    for m in sizes.exported_rows:
        x = rows(m)
        if not torch.equal(package(x), compiled(x)):
            differing.append(m)
        calls: dict[str, list[Call]] = {
            PACKAGE: [functools.partial(package, x)],
            COMPILED: [functools.partial(compiled, x)],
        }
        measured = bench.clock.times(calls, sizes.rounds, eager=(PACKAGE, COMPILED))
        measured.needed(PACKAGE, COMPILED)
        result["rows"][str(m)] = described_times(measured, [COMPILED])
    if differing:
        raise RuntimeError(f"the package's outputs differ from torch.compile's at M = {differing}: {result}")
    few = result["rows"][str(sizes.exported_rows[0])]["ratios"][PACKAGE]["ratio"]
    return result | {"bars": {f"times faster, M={sizes.exported_rows[0]}": bars.at_least(few, 1.0)}}
