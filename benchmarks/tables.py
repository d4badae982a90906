"""Tables of benchmarks, and the command line of benchmarks that print tables."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

MISSED = " ✗"


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option `--out`, described by the first line of a docstring."""
    made = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    made.add_argument("--out", type=Path, metavar="FILE", help="also write the tables to FILE")
    return made


def emit(text: str, out: Path | None) -> None:
    """Print a text, and write it to a file if one is given."""
    print(text)
    if out:
        out.write_text(text + "\n")


def run(about: str | None, rounds: int, report: Callable[[Path, int], str]) -> None:
    """Run a benchmark as a command: measure in a temporary folder, then print the tables.

    Args:
        about: The benchmark's docstring.
        rounds: Default number of measurements of each case.
        report: Maps the folder and the number of rounds to the tables.
    """
    made = parser(about)
    made.add_argument("--rounds", type=int, default=rounds, help="measurements of each case (default %(default)s)")
    args = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        emit(report(Path(folder), args.rounds), args.out)


def machine(*others: str) -> str:
    """Describe the CPU, its threads and the versions of PyTorch and of other packages."""
    import importlib.metadata

    import torch

    from int8compile import hardware

    versions = [f"torch {torch.__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in others)]
    return f"{hardware.of(torch.device('cpu')).name}, {torch.get_num_threads()} threads; {', '.join(versions)}"


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are aligned to the left, and the others to the right."""

    align = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def judged(text: str, met: bool) -> str:
    """Return a value as text, marked if it misses its bar."""
    return text if met else text + MISSED
