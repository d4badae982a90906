"""The first stage: fills Triton's cache with kernels that were compiled beforehand; at the end, what came from it."""

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
# In the folder of the results; the list of what was asked for lies inside, so that it is not copied.
CACHE = "triton-cache"
LOG = f"{CACHE}/asked-for.txt"


def environment(folder: Path) -> dict[str, str]:
    """The variables of processes that use the cache, and note where their kernels came from.

    Args:
        folder: Of the results.
    """
    return {"TRITON_CACHE_DIR": str(folder / CACHE), bundle.WATCH: str(folder / LOG)}


def stage(file: Path | None) -> Stage:
    """Unpack the bundle; this process asks for kernels after it.

    Args:
        file: The bundle; None for none.
    """
    cases: dict[str, Callable[[], CaseResult]] = {"CPU kernel": cpu_kernel}
    if file is not None:
        cases = {"unpack": functools.partial(fill, file), **cases}
    return Stage(
        NAME,
        "kernels that were compiled beforehand are unpacked; the CPU's, which exported models need, are compiled",
        seconds=20,
        cases=cases,
        always=True,
        measures=False,
        notes=[] if len(cases) > 1 else ["there is no bundle: all kernels are compiled here"],
    )


def fill(file: Path) -> CaseResult:
    """Unpack a bundle into the cache that the environment names."""
    from triton import knobs

    return {"unpacked": bundle.unpack(file, Path(knobs.cache.dir))}


def cpu_kernel() -> CaseResult:
    """Compile the CPU kernel now: many processes would wait for it later."""
    return {"summary": ", ".join(cpu.variants()) or cpu.failure() or "switched off"}


def count(result: Result) -> None:
    """Enter where the kernels of all processes came from."""
    counts = bundle.counted(result.path.parent / LOG)
    compiled = {name: counts.compiled.count(name) for name in sorted(set(counts.compiled))}
    result.data["kernels"] = {"hits": counts.hits, "compiled": compiled}
    result.write()
