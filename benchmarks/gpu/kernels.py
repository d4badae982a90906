"""The first stage: fills Triton's cache with kernels that were compiled beforehand; at the end, what came from it."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.gpu import bundle
from benchmarks.gpu.checks import NO_CPU_KERNEL
from benchmarks.gpu.day import CaseResult, Result, Stage
from benchmarks.gpu.facts import ROOT

NAME = "kernels"
BUNDLE = Path("build/gpu-bundle.tar.xz")
# In the folder of the results; the list of what was asked for lies inside, so that it is not copied.
CACHE = "triton-cache"
LOG = f"{CACHE}/asked-for.txt"


def environment(folder: Path) -> dict[str, str]:
    """The variables of processes that use the cache, and note where their kernels came from.

    The CPU kernel is left out: the definition is what results are compared with, and compiling it would take a minute.

    Args:
        folder: Of the results.
    """
    return {
        "TRITON_CACHE_DIR": str(folder / CACHE),
        bundle.WATCH: str(folder / LOG),
        NO_CPU_KERNEL: "0",
    }


def stage(file: Path | None) -> Stage:
    """Unpack the bundle; this process asks for kernels after it.

    Args:
        file: The bundle, relative to the checkout; None for none.
    """
    there = file is not None and (ROOT / file).exists()
    return Stage(
        NAME,
        "kernels that were compiled beforehand",
        seconds=15,
        cases={"unpack": functools.partial(fill, ROOT / file)} if file is not None and there else {},
        measures=False,
        notes=[] if there else ["there is no bundle: all kernels are compiled here"],
    )


def fill(file: Path) -> CaseResult:
    """Unpack a bundle into the cache that the environment names."""
    from triton import knobs

    return {"unpacked": bundle.unpack(file, Path(knobs.cache.dir))}


def count(result: Result) -> None:
    """Enter where the kernels of all processes came from."""
    counts = bundle.counted(result.path.parent / LOG)
    compiled = {name: counts.compiled.count(name) for name in sorted(set(counts.compiled))}
    result.data["kernels"] = {"hits": counts.hits, "compiled": compiled}
    result.write()
