"""SmolLM2-135M exported, against torch.compile: `python -m benchmarks.exported --out FILE`.

Each runs in its own process, and the two take turns to read the prompt and to generate. The process of the exported
model cannot import int8compile. Compared are the logits and the time from the start of the process to the first token;
torch.compile starts once with an empty cache of compiled code and once with a full one.
"""

from __future__ import annotations

import json
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import tables
from int8compile.app.workers import Worker

ROUNDS, PROMPT, STEPS = 9, 128, 48
# Least ratios of torch.compile's time to the exported model's.
PREFILL, DECODE = 0.95, 1.15
DTYPES = ("float32", "bfloat16")


class Exported(NamedTuple):
    """A package, its float model (a folder), the dtype of its float parts, a prompt, and the seconds of the export."""

    path: Path
    source: Path
    dtype: str
    prompt: list[int]
    seconds: float

    @property
    def length(self) -> int:
        """Return the number of tokens that fit into the cache."""
        return len(self.prompt) + STEPS + 1


def report(folder: Path, rounds: int) -> str:
    """Measure, and return the tables."""
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
        tables.markdown(sizes, ("float parts", "export takes", "file", "int8 bytes", "float bytes")),
        tables.markdown(speeds, ("float parts", "prompt", "step", "prompt ratio", "step ratio", "logits")),
        tables.markdown(starts, ("float parts", "process", "imports", "model loaded", "first token"), left=2),
    )
    heading = (
        f"SmolLM2-135M exported by `int8compile.export`, on {tables.machine()}; medians of {rounds} rounds of a prompt "
        f'and {STEPS} steps. `x`: times faster than torch.compile(backend="int8"). ✗: misses its bar.'
    )
    return "\n\n".join([heading, *parts])


def prepare(folder: Path, dtype: str) -> Exported:
    """Export the model."""
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
    """Return a row with the file's size; its bar is 1.1 times the int8 bytes plus the float bytes."""
    from int8compile import inspect

    found = inspect(made.path)
    inside = found.metadata["bytes"]
    bar = (1.1 * inside["int8"] + inside["float"]) / 1e6
    whole = tables.judged(f"{found.size / 1e6:.1f} MB (bar {bar:.1f})", found.size / 1e6 <= bar)
    return made.dtype, f"{made.seconds:.0f} s", whole, *(f"{inside[kind] / 1e6:.1f} MB" for kind in ("int8", "float"))


class Runner(Worker):
    """A process that runs the model once for each line.

    Attributes:
        times: Seconds from its start to each step until its first token.
    """

    def __init__(self, command: list[str], **environment: str) -> None:
        super().__init__([word.replace("{now}", repr(time.time())) for word in command], None, **environment)
        self.times: dict[str, float] = self.answer()


def run_package(made: Exported) -> Runner:
    """Run the package where int8compile cannot be imported: without site, which finds editable installations."""
    script = Path(__file__).with_name("exported_worker.py")
    command = [sys.executable, "-S", str(script), "{now}", str(made.path), str(made.prompt), str(STEPS)]
    return Runner(command, PYTHONPATH=sysconfig.get_paths()["purelib"])


def run_compiled(made: Exported) -> Runner:
    """Run the same module with torch.compile, with a cache of compiled code beside the model."""
    given = {"source": str(made.source), "dtype": made.dtype, "prompt": made.prompt, "length": made.length}
    code = f"from benchmarks import exported; exported.serve_compiled({{now}}, {json.dumps(given)!r})"
    return Runner([sys.executable, "-c", code], TORCHINDUCTOR_CACHE_DIR=str(made.source / "compiled"))


def serve_compiled(started: float, arguments: str) -> None:
    """Run the process of torch.compile."""
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


def compare(made: Exported, package: Runner, compiled: Runner, rounds: int) -> tuple[str, ...]:
    """Run both in turns, and return a row with medians and medians of the ratios of each pair."""
    import torch

    for worker in (package, compiled):
        worker.ask("logits")  # This also compiles the rest.
    pairs = [(package.ask(), compiled.ask()) for _ in tqdm(range(rounds), desc=f"Generating, {made.dtype}")]
    for worker in (package, compiled):
        worker.stop()
    prefill = [(ours["prefill"], theirs["prefill"]) for ours, theirs in pairs]
    steps = [(statistics.median(ours["steps"]), statistics.median(theirs["steps"])) for ours, theirs in pairs]
    ours, theirs = torch.load(f"{made.path}.logits"), torch.load(made.source / "logits")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not a.equal(b)), len(ours))
    tokens = pairs[-1][0]["tokens"] == pairs[-1][1]["tokens"]
    logits = f"equal, all {len(ours)}" if same == len(ours) else f"the first {same} of {len(ours)} equal"
    logits += ", same tokens" if tokens else ", different tokens"
    return (
        made.dtype,
        *(f"{1e3 * statistics.median(each[0] for each in found):.1f} ms" for found in (prefill, steps)),
        _faster(prefill, PREFILL),
        _faster(steps, DECODE),
        logits,
    )


def _faster(pairs: list[tuple[float, float]], bar: float) -> str:
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    return tables.judged(f"{ratio:.2f}x (bar {bar})", ratio >= bar)


if __name__ == "__main__":
    tables.run(__doc__, ROUNDS, report)
