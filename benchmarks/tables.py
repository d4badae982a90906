"""The command line of benchmarks that print tables."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


def run(about: str | None, rounds: int, report: Callable[[Path, int], str]) -> None:
    """Measures in a temporary folder, prints the tables, and writes them where `--out` says.

    Args:
        about: The docstring of the benchmark.
        rounds: How often each thing is measured, by default.
        report: Measures and makes the tables, of a folder and the number of rounds.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    parser.add_argument("--rounds", type=int, default=rounds, help="of each measurement (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = report(Path(folder), args.rounds)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
