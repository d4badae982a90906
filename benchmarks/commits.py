"""Speed of the working tree against another commit: `python -m benchmarks.commits COMMIT [WHAT]`.

| WHAT | what is timed | at most |
|---|---|---|
| `dispatch` | a call of 210 linears of 64 features: guards, the lookup of weights, operators | 1.02 |
| `linear` | a compiled linear of real sizes, by rows and dtype; x has outliers in some channels, as in models | 1.03 |
| `smollm2` | SmolLM2-135M compiled: a prompt of 512 tokens, and one token | 1.00 |

Each commit runs in its own process with one thread. The two processes take turns, and rounds are compared one by one.
The memory pages of a process change its times by up to a tenth, so `--restarts` uses several processes of each commit.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Largest ratio of a call's time to the other commit's.
BARS = {"dispatch": 1.02, "linear": 1.03, "smollm2": 1.0}
LAYERS, WIDTH = 30, 64
SIZES = ((4096, 4096), (4096, 14336), (576, 1536))  # K x N; the last is SmolLM2's
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 600)
# A median is taken over this many calls, or over as many as fit into this many seconds.
CALLS, SECONDS = 20, 0.2


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit to compare the working tree with")
    parser.add_argument("what", nargs="?", choices=BARS, default="dispatch")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--restarts", type=int, default=1)
    options = parser.parse_args()
    print(report(options.commit, options.what, options.rounds, options.restarts))


def report(commit: str, what: str, rounds: int, restarts: int) -> str:
    """Compare the working tree with a commit, and return a table."""
    # Imported here, since the worker processes run this file without this checkout's packages.
    from tabulate import tabulate
    from tqdm import tqdm

    from benchmarks.workers import Worker

    def start(folder: Path) -> Worker:
        return Worker([sys.executable, __file__, "--serve", str(folder), what], PYTHONPATH=str(folder))

    with checkout(commit) as other:
        found = []
        for _ in range(restarts):
            workers = [start(ROOT), start(other)]
            found += [[worker.ask() for worker in workers] for _ in tqdm(range(rounds), desc="Calling")]
            for worker in workers:
                worker.stop()
    rows = []
    for name in found[0][0]:
        here, there = ([times[i][name] for times in found] for i in range(2))
        ratios = [now / before for now, before in zip(here, there, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = [f"{1e6 * statistics.median(times):.0f} us" for times in (here, there)]
        rows.append(
            (name, *medians, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", "yes" if middle <= BARS[what] else "NO")
        )
    headers = (what, "here", commit, "ratio", "quartiles", f"at most {BARS[what]}")
    return tabulate(rows, headers=headers, disable_numparse=True)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Extract a commit's files into a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="int8compile-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        yield Path(folder)


def serve(folder: str, what: str) -> None:
    """Answer each line on stdin with the median seconds of each call."""
    import torch

    import int8compile

    if not str(int8compile.__file__).startswith(folder):
        raise SystemExit(f"int8compile was imported from {int8compile.__file__}, not from {folder}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Each kind of linear recompiles the same function.
    torch._dynamo.config.recompile_limit = 100
    calls = {"dispatch": _dispatch, "linear": _linear, "smollm2": _smollm2}[what]()
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in sys.stdin:
            print(json.dumps({name: _median(call) for name, call in calls.items()}), flush=True)


Calls = dict[str, Callable[[], object]]


def _dispatch() -> Calls:
    import torch
    from torch import nn

    import int8compile

    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(7 * LAYERS))).eval().requires_grad_(False)

    x = torch.randn(1, WIDTH)
    held = model()
    int8compile.quantize_(held, progress=False)
    models: dict[str, Callable[..., object]] = {
        "compiled": torch.compile(model(), backend="int8"),
        "compiled, quantized": torch.compile(held, backend="int8"),
        "quantized, not compiled": held,
    }
    return {name: functools.partial(model, x) for name, model in models.items()}


def _linear() -> Calls:
    import torch
    from torch import nn

    calls: Calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        for k, n in SIZES:
            layer = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
            run = torch.compile(layer, backend="int8", dynamic=True, fullgraph=True)
            # As in models, the norm's weights scale the channels, and a few channels are far larger than the others.
            channels = torch.empty(k).log_normal_(0, 0.5)
            channels[torch.randperm(k)[: max(1, k // 200)]] *= 20
            for rows in ROWS:
                x = (torch.randn(rows, k) * channels).to(dtype)
                calls[f"{str(dtype).removeprefix('torch.')} {k} x {n}, {rows} rows"] = functools.partial(run, x)
    return calls


def _smollm2() -> Calls:
    import torch

    try:
        loading = importlib.import_module("int8compile.app.loading")
    except ModuleNotFoundError:  # in older commits
        loading = importlib.import_module("int8compile.models")

    model = torch.compile(loading.load("smollm2"), backend="int8")
    tokens = torch.randint(0, 49152, (1, 512))
    return {
        name: functools.partial(model, input_ids=ids, use_cache=False)
        for name, ids in (("512 tokens", tokens), ("one token", tokens[:, :1]))
    }


def _median(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    while not seconds or (len(seconds) <= CALLS and sum(seconds) < SECONDS):
        began = time.perf_counter_ns()
        call()
        seconds.append((time.perf_counter_ns() - began) / 1e9)
    return statistics.median(seconds[1:] or seconds)  # At the first call, caches hold the other process's data.


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
