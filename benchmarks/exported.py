"""SmolLM2-135M exported, against torch.compile: `python -m benchmarks.exported --out FILE`.

Both run in processes of their own, which take turns: one reads the prompt and generates, then the other. The process of
the exported model cannot import int8compile. Their logits are compared, and the time from the start of the process to
the first token: of torch.compile with an empty cache of compiled code, and with a full one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from benchmarks import tables

ROUNDS, PROMPT, STEPS = 9, 128, 48
# Times that torch.compile takes of the exported model's.
PREFILL, DECODE = 0.95, 1.15
DTYPES = ("float32", "bfloat16")


class Exported(NamedTuple):
    """A package and what it was made of."""

    path: Path
    source: Path
    dtype: str
    prompt: list[int]
    seconds: float

    @property
    def length(self) -> int:
        """Tokens that the cache has room for."""
        return len(self.prompt) + STEPS + 1


def report(folder: Path, rounds: int) -> str:
    """Measures, and makes tables of it."""
    sizes, speeds, starts = [], [], []
    for dtype in DTYPES:
        made = prepare(folder, dtype)
        sizes.append(size(made))
        cold = run_compiled(made)
        cold.stop()
        package, warm = run_package(made), run_compiled(made)
        speeds.append(compare(made, package, warm, rounds))
        names = ("torch.compile, nothing cached", "torch.compile, compiled code cached", "exported")
        for name, worker in zip(names, (cold, warm, package), strict=True):
            starts.append((dtype, name, *(f"{seconds:.1f} s" for seconds in worker.times.values())))
    parts = (
        (sizes, ("rest in", "export takes", "file", "its int8", "its float")),
        (speeds, ("rest in", "prompt", "step", "prompt, of compiled", "step, of compiled", "logits")),
        (starts, ("rest in", "from the start of the process", "to imports", "to the model", "to the first token")),
    )
    return "\n\n".join([heading(rounds), *(tabulate(rows, headers=headers, **_TABLE) for rows, headers in parts)])


_TABLE: dict[str, Any] = {"tablefmt": "github", "disable_numparse": True}


def heading(rounds: int) -> str:
    """What was measured, and on what."""
    import torch

    from int8compile import hardware

    machine = f"{hardware.of(torch.device('cpu')).name}, {torch.get_num_threads()} threads"
    return (
        f"SmolLM2-135M exported by `int8compile.export`, on {machine}; torch {torch.__version__}; medians of {rounds} "
        f'rounds of a prompt and {STEPS} steps. `x`: times faster than torch.compile(backend="int8"). '
        "✗: not within its bar."
    )


def prepare(folder: Path, dtype: str) -> Exported:
    """Exports the model."""
    import torch

    import int8compile
    from int8compile.app import demo, loading
    from int8compile.integrations.decoder import StaticCacheDecoder

    model: Any = loading.load(loading.SMOLLM2, getattr(torch, dtype))
    tokens = loading.load_processor(loading.SMOLLM2)(demo.QUESTION).input_ids[:PROMPT]
    made = Exported(folder / f"{dtype}.pt2", folder / dtype, dtype, tokens, 0.0)
    model.save_pretrained(made.source)
    decoder = StaticCacheDecoder(model, made.length)
    example, shapes = decoder.example()
    began = time.perf_counter()
    int8compile.export(decoder, example, made.path, dynamic_shapes=shapes)
    return made._replace(seconds=time.perf_counter() - began)


def size(made: Exported) -> tuple[str, ...]:
    """The file against what it holds; the bar is 1.1 times the int8 bytes, and what stays float."""
    from int8compile import inspect

    found = inspect(made.path)
    inside = found.metadata["bytes"]
    bar = (1.1 * inside["int8"] + inside["float"]) / 1e6
    whole = f"{found.size / 1e6:.1f} MB (bar {bar:.1f})" + ("" if found.size / 1e6 <= bar else " ✗")
    return made.dtype, f"{made.seconds:.0f} s", whole, *(f"{inside[kind] / 1e6:.1f} MB" for kind in ("int8", "float"))


class Worker:
    """A process that answers each line with a round.

    Attributes:
        times: Seconds from its start to what it has done until its first token.
    """

    def __init__(self, command: list[str], **environment: str) -> None:
        self._process = subprocess.Popen(
            [word.replace("{now}", repr(time.time())) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.times: dict[str, float] = self._answer()

    def round(self, what: str = "round") -> dict[str, Any]:
        """Has it run once more."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the process ended with {self._process.wait()}")


def run_package(made: Exported) -> Worker:
    """Runs the package where int8compile cannot be imported: without site, which finds editable installations."""
    script = Path(__file__).with_name("exported_worker.py")
    command = [sys.executable, "-S", str(script), "{now}", str(made.path), str(made.prompt), str(STEPS)]
    return Worker(command, PYTHONPATH=sysconfig.get_paths()["purelib"])


def run_compiled(made: Exported) -> Worker:
    """Compiles the same module with torch.compile; compiled code is kept beside the model."""
    given = {"source": str(made.source), "dtype": made.dtype, "prompt": made.prompt, "length": made.length}
    code = f"from benchmarks import exported; exported.compiled({{now}}, {json.dumps(given)!r})"
    return Worker([sys.executable, "-c", code], TORCHINDUCTOR_CACHE_DIR=str(made.source / "compiled"))


def compiled(started: float, arguments: str) -> None:
    """The process of torch.compile."""
    given = json.loads(arguments)
    import torch

    from benchmarks import exported_worker
    from int8compile.app import loading
    from int8compile.integrations.decoder import StaticCacheDecoder

    times = {"imports": time.time() - started}
    llama: Any = loading.load(given["source"], getattr(torch, given["dtype"]))
    times["model"] = time.time() - started
    decoder = StaticCacheDecoder(llama, given["length"])
    call = torch.compile(decoder, backend="int8", fullgraph=True, dynamic=False)
    ids = torch.tensor([given["prompt"]])
    exported_worker.serve(
        exported_worker.Model(call, decoder.new_cache), ids, STEPS, times, started, f"{given['source']}/logits"
    )


def compare(made: Exported, package: Worker, compiled: Worker, rounds: int) -> tuple[str, ...]:
    """Rounds in turns; medians, and medians of the ratios of each pair."""
    import torch

    for worker in (package, compiled):
        worker.round("logits")  # Compiles what is left to compile.
    pairs = [(package.round(), compiled.round()) for _ in tqdm(range(rounds), desc=f"Generating, {made.dtype}")]
    for worker in (package, compiled):
        worker.stop()
    prefill = [(ours["prefill"], theirs["prefill"]) for ours, theirs in pairs]
    steps = [(statistics.median(ours["steps"]), statistics.median(theirs["steps"])) for ours, theirs in pairs]
    ours, theirs = torch.load(f"{made.path}.logits"), torch.load(made.source / "logits")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not a.equal(b)), len(ours))
    tokens = pairs[-1][0]["tokens"] == pairs[-1][1]["tokens"]
    logits = f"equal, all {len(ours)}" if same == len(ours) else f"the first {same} of {len(ours)} equal"
    logits += ", same tokens" if tokens else ", other tokens"
    return (
        made.dtype,
        *(f"{1e3 * statistics.median(each[0] for each in found):.1f} ms" for found in (prefill, steps)),
        _faster(prefill, PREFILL),
        _faster(steps, DECODE),
        logits,
    )


def _faster(pairs: list[tuple[float, float]], bar: float) -> str:
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    return f"{ratio:.2f}x (bar {bar})" + ("" if ratio >= bar else " ✗")


if __name__ == "__main__":
    tables.run(__doc__, ROUNDS, report)
