"""Trials of the speed gate: does it find planted slow-downs, and does it pass the base against itself?

    python -m benchmarks.trial                # ten runs of each, to benchmarks/results/gate/trial.json: 40 minutes
    python -m benchmarks.trial --runs 2 --out FILE

Each run is `benchmarks.check` as a user starts it, with the last commit as the base. In the planted runs, each call of
the head is prolonged by busy waiting: kernels by 10 %, models by 5 %. The working tree must have no changes that cost
time.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.check import ROOT
from int8compile.app import machine
from int8compile.progress import progress_bar

# Not beside the results of `make bench`, all of which benchmarks.report shows.
OUT = ROOT / "benchmarks" / "results" / "gate" / "trial.json"
RUNS = 10
# Arguments of the gate, and the exit status that they must lead to.
TRIALS: Mapping[str, tuple[Sequence[str], int]] = {
    "base against base": ((), 0),
    "kernels 10 % slower": (("--kernels", "--plant", "kernels=0.10"), 1),
    "models 5 % slower": (("--models", "--plant", "models=0.05"), 1),
}
MEANINGS = {0: "passed", 1: "slower", 2: "cannot tell", 3: "not measured"}


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the gate once, and return its result with the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.json"
        command = [sys.executable, "-m", "benchmarks.check", "--base", "HEAD", "--json", str(path), *arguments]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode == 3 or not path.exists():
            raise SystemExit(done.stdout + done.stderr)
        made: dict[str, Any] = json.loads(path.read_text())
    return made | {"seconds": round(seconds)}


def report(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table of the results by trial."""
    rows = []
    for name, runs in found.items():
        _, wanted = TRIALS[name]
        counts = collections.Counter(MEANINGS[each["status"]] for each in runs)
        right = f"{counts[MEANINGS[wanted]]} of {len(runs)}"
        seconds = sorted(each["seconds"] for each in runs)
        rows.append(
            (
                name,
                MEANINGS[wanted],
                tables.judged(right, counts[MEANINGS[wanted]] == len(runs)),
                ", ".join(f"{count} {meaning}" for meaning, count in counts.items()),
                f"{seconds[0]} to {seconds[-1]} s",
            )
        )
    return tables.markdown(rows, ("trial", "expected", "as expected", "all", "a run takes"), left=2)


def main() -> None:
    """Run the trials in turns, write each result at once, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each trial (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="where to write the results")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TRIALS}
    with progress_bar(total=options.runs * len(TRIALS), desc="Running the gate") as bar:
        for _ in range(options.runs):
            for name, (arguments, _) in TRIALS.items():
                found[name].append(run(arguments))
                data = {"machine": machine.facts(), "trials": found}
                options.out.write_text(json.dumps(data, indent=1) + "\n")
                bar.update()
    print(report(found))


if __name__ == "__main__":
    main()
