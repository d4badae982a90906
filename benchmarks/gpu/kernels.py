"""The first stage, which fills Triton's cache with kernels compiled beforehand; and a count of the cache's hits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import bundle
from benchmarks.gpu.day import CaseResult, Result, Stage
from int8compile import cpu

NAME = "kernels"
# Relative to the checkout.
BUNDLE = Path("build/gpu-bundle.tar.xz")
# In the folder of results. The list of requested kernels lies inside the cache's folder, so that it is not copied.
CACHE = "triton-cache"
LOG = f"{CACHE}/asked-for.txt"


def environment(folder: Path) -> dict[str, str]:
    """Return environment variables that make processes use the cache in a folder of results, and record its hits."""
    return {"TRITON_CACHE_DIR": str(folder / CACHE), bundle.WATCH: str(folder / LOG)}


def stage(file: Path | None) -> Stage:
    """Return the stage: unpack the bundle, if any, and compile the CPU kernel."""
    cases: dict[str, Callable[[], CaseResult]] = {"CPU kernel": cpu_kernel}
    if file is not None:
        cases = {"unpack": functools.partial(fill, file), **cases}
    return Stage(
        NAME,
        "kernels compiled beforehand are unpacked; the CPU kernel, which exported models need, is compiled",
        seconds=20,
        cases=cases,
        always=True,
        measures=False,
        notes=[] if len(cases) > 1 else ["there is no bundle: all kernels are compiled here"],
    )


def fill(file: Path) -> CaseResult:
    """Unpack a bundle into Triton's cache."""
    from triton import knobs

    return {"unpacked": bundle.unpack(file, Path(knobs.cache.dir))}


def cpu_kernel() -> CaseResult:
    """Compile the CPU kernel now; otherwise many processes would wait for it later."""
    return {"summary": ", ".join(cpu.variants()) or cpu.failure() or "switched off"}


def count(result: Result) -> None:
    """Enter the origin of all processes' kernels into the result."""
    counts = bundle.counted(result.path.parent / LOG)
    compiled = {name: counts.compiled.count(name) for name in sorted(set(counts.compiled))}
    result.data["kernels"] = {"hits": counts.hits, "compiled": compiled}
    result.write()
