"""The cost of a call beside its kernels, against another commit: `python -m benchmarks.dispatch COMMIT`.

The models are 210 linears of 64 features, far smaller than real ones, so that nearly all of the time is what comes
before and after the kernels: guards, the lookup of weights, operators. Each commit runs in a process of its own; they
take turns, and the rounds are compared one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# How many times longer than the other commit's a call may take.
BAR = 1.02
CALLS, LAYERS, WIDTH = 20, 30, 64


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare the working tree with")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    print(report(options.commit, options.rounds))


def report(commit: str, rounds: int) -> str:
    """The table of a comparison."""
    # Only here: workers know nothing of this checkout.
    from tabulate import tabulate
    from tqdm import tqdm

    with checkout(commit) as other:
        workers = [Worker(ROOT), Worker(other)]
        found = [[worker.times() for worker in workers] for _ in tqdm(range(rounds), desc="Calling")]
        for worker in workers:
            worker.stop()
    rows = []
    for name in found[0][0]:
        here, there = ([times[i][name] for times in found] for i in range(2))
        ratios = [now / before for now, before in zip(here, there, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = [f"{1e6 * statistics.median(times):.0f} us" for times in (here, there)]
        rows.append((name, *medians, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", "yes" if middle <= BAR else "NO"))
    headers = ("a call of 210 linears", "here", commit, "ratio", "quartiles", f"at most {BAR}")
    return tabulate(rows, headers=headers, disable_numparse=True)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Another commit's files, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="int8compile-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        yield Path(folder)


class Worker:
    """A process that runs this file with the package of some folder."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def times(self) -> dict[str, float]:
        """Seconds of a call, for each way of calling; the median of some."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended; what it said is above")
        times: dict[str, float] = json.loads(line)
        return times

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def serve(folder: str) -> None:
    """Answers each line on stdin with times."""
    import torch
    from torch import nn

    import int8compile

    if not str(int8compile.__file__).startswith(folder):
        raise SystemExit(f"int8compile is that of {int8compile.__file__}, not that of {folder}")
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(7 * LAYERS))).eval().requires_grad_(False)

    x = torch.randn(1, WIDTH)
    held = model()
    int8compile.quantize_(held, progress=False)
    calls: dict[str, Callable[..., object]] = {
        "compiled": torch.compile(model(), backend="int8"),
        "compiled, quantized": torch.compile(held, backend="int8"),
        "quantized, not compiled": held,
    }
    with torch.inference_mode():
        for call in calls.values():
            call(x)
        for _ in sys.stdin:
            print(json.dumps({name: _median(call, x) for name, call in calls.items()}), flush=True)


def _median(call: Callable[..., object], x: object) -> float:
    call(x)
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter_ns()
        call(x)
        seconds.append((time.perf_counter_ns() - began) / 1e9)
    return statistics.median(seconds)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
