"""Render a report as text: the table of linears, the reasons below it, and numbers with their units."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from int8compile.sites import NotFused, Site

_HEADER = (
    *("module", "op", "source", "M x K x N", "runs in", "rotated", "outliers", "before", "after"),
    "can be faster",
)


def table(sites: Iterable[Site]) -> str:
    """Return a table with a row for each site, without columns that are empty in all rows."""
    from tabulate import tabulate

    rows = [
        (
            site.path,
            site.op,
            site.source,
            " x ".join(site.shape),
            site.runs_in,
            site.rotated(),
            percent(site.outliers),
            readable(site.bytes_before),
            readable(site.bytes_after),
            site.pays,
        )
        for site in sites
    ]
    shown = [i for i in range(len(_HEADER)) if not rows or any(row[i] for row in rows)]
    cells = [[row[i] for i in shown] for row in (_HEADER, *rows)]
    return tabulate(cells, headers="firstrow", tablefmt="simple", disable_numparse=True)


def reasons(skipped: Iterable[Site], unfused: Iterable[NotFused]) -> list[str]:
    """Return a line for each reason, with the first of the paths that it holds for."""
    paths: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for site in skipped:
        paths["float", site.why()].append(site.path)
    for fusion in unfused:
        paths[f"{fusion.kind} not fused", fusion.why()].append(fusion.path)
    return [f"- {what}: {_some(named)}: {why}" for (what, why), named in paths.items()]


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def readable(size: int) -> str:
    """Return a number of bytes as "12.3 KiB" or "4.5 MiB"."""
    return f"{size / 2**10:.1f} KiB" if size < 2**20 else f"{size / 2**20:.1f} MiB"


def percent(share: float | None) -> str:
    """Return a share as "1.9 %" or "0.00021 %", "" for None."""
    return "" if share is None else f"{100 * share:.2g} %"
