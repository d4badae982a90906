"""Memory and time of loading SmolLM2-135M in int8: `python -m benchmarks.loading --out FILE`.

Each case loads in its own process. Memory is the peak of the resident set minus its size after loading torch,
transformers and the kernels; pages of mapped files count. transformers maps files and reads them at first use, so the
time to the first token is compared. Cases take turns, and ratios are taken within a round.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import tables
from int8compile.config import LmHead

SHARD = "50MB"
ROUNDS = 7
HEADS: tuple[LmHead, ...] = ("native", "int8_weight")
# Bars: bytes as a share of float32's and bfloat16's, and time as a multiple of loading the float model.
LINEARS, WHOLE, TIED, TIME = (0.26, 0.51), (0.42, 0.62), 0.27, 1.5


def report(folder: Path, rounds: int) -> str:
    """Measure, and return the tables."""
    cases = prepare(folder)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    with tqdm(total=2 * rounds * len(cases), desc="Loading") as bar:
        for cached, name in itertools.product((True, False), list(cases) * rounds):
            case = cases[name]
            if not cached:
                _forget_files(case.source)
            code = f"from benchmarks import loading; loading.{case.function}({str(case.source)!r})"
            output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
            found[name].append({"cached": cached, **json.loads(output.splitlines()[-1])})
            bar.update()
    heading = f"SmolLM2-135M on {tables.machine('transformers')}; medians of {rounds} loads of each kind."
    return "\n\n".join([f"{heading} ✗: misses its bar.", sizes(folder), memory(cases, found), times(cases, found)])


def _forget_files(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next read comes from the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Case(NamedTuple):
    """A way to load the model.

    Attributes:
        function: Name of a function in this module, which takes the folder.
        source: The folder.
        baseline: Function that loads the float model to compare with; "" for a baseline.
    """

    function: str
    source: Path
    baseline: str = ""

    @property
    def largest_shard(self) -> int:
        """Return the size of the largest shard in bytes."""
        return max(file.stat().st_size for file in self.source.glob("*.safetensors"))


def prepare(folder: Path) -> dict[str, Case]:
    """Save the model in float32 and in int8, and return the cases by name."""
    import torch

    import int8compile
    from int8compile.app import loading

    for name in ("float32", "bfloat16"):
        dtype, source = getattr(torch, name), folder / name
        model: Any = loading.load(loading.SMOLLM2, dtype)
        model.save_pretrained(source, max_shard_size=SHARD)
        for head in HEADS:
            quantized: Any = loading.load(str(source), dtype, int8compile.Int8Config(lm_head=head))
            quantized.save_pretrained(folder / f"int8 {head} {name}", max_shard_size=SHARD)
            if head == "native" and name == "float32":
                int8compile.save(quantized, folder / "own", max_shard_bytes=50 * 10**6, progress=False)
    return {
        "float32, from_pretrained": Case("load_float", folder / "float32"),
        "float32, quantized by from_pretrained": Case("load_and_quantize", folder / "float32", "load_float"),
        "int8, from_pretrained": Case("load_int8", folder / "int8 native float32", "load_float"),
        "float32, load_state_dict": Case("load_state_dict", folder / "float32"),
        "int8, int8compile.load": Case("load_own", folder / "own", "load_state_dict"),
    }


def load_float(source: str) -> None:
    """Load the float model."""
    _measure(lambda transformers: transformers.LlamaForCausalLM.from_pretrained(source))


def load_and_quantize(source: str) -> None:
    """Load the float model, and quantize each weight as it is read."""
    from int8compile.integrations.transformers import Int8CompileConfig

    options = {"quantization_config": Int8CompileConfig()}
    _measure(lambda transformers: transformers.LlamaForCausalLM.from_pretrained(source, **options))


def load_int8(source: str) -> None:
    """Load the int8 model that `save_pretrained` wrote."""
    import int8compile.integrations.transformers  # noqa: F401  its config.json names this module's quantizer

    _measure(lambda transformers: transformers.LlamaForCausalLM.from_pretrained(source))


def load_state_dict(source: str) -> None:
    """Make the float model and load its tensors, without transformers' loader."""
    import torch
    from safetensors.torch import load_file

    def load(transformers: Any) -> Any:
        config = transformers.LlamaConfig.from_json_file(Path(source) / "config.json")
        model = transformers.LlamaForCausalLM(config)
        state: dict[str, torch.Tensor] = {}
        for file in sorted(Path(source).glob("*.safetensors")):
            state |= load_file(file)
        model.load_state_dict(state, strict=False)  # A tied tensor is stored once.
        return model

    _measure(load)


def load_own(source: str) -> None:
    """Load the int8 model that `int8compile.save` wrote."""
    import int8compile

    config = Path(source).parent / "float32" / "config.json"

    def load(transformers: Any) -> Any:
        factory = transformers.LlamaForCausalLM
        return int8compile.load(
            source, lambda: factory(transformers.LlamaConfig.from_json_file(config)), progress=False
        )

    _measure(load)


def _measure(load: Any) -> None:
    import gc
    import time

    import torch
    import transformers

    from int8compile import cpu, memory_footprint

    # Imports of transformers are lazy; this triggers them.
    transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=64))
    cpu.load()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.
    before = _status("VmRSS")
    began = time.perf_counter()
    model = load(transformers)
    loaded = time.perf_counter() - began
    peak = _status("VmHWM") - before
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    ready = time.perf_counter() - began
    print(json.dumps({"loaded": loaded, "ready": ready, "peak": peak, "footprint": memory_footprint(model)}))


def _status(name: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    from int8compile.app.machine import STATUS, read_bytes

    found = read_bytes(STATUS, name)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {name}: this needs Linux")
    return found


def sizes(folder: Path) -> str:
    """Return a table of int8 bytes as a share of the float bytes."""
    import torch

    from int8compile import memory_footprint
    from int8compile.app import loading
    from int8compile.stored.modules import Int8Linear

    rows = []
    for dtype, linear_bar, whole_bar in zip(("float32", "bfloat16"), LINEARS, WHOLE, strict=True):
        for head in HEADS:
            full = loading.load(str(folder / dtype), getattr(torch, dtype))
            model = loading.load(str(folder / f"int8 {head} {dtype}"), getattr(torch, dtype))
            layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Int8Linear)}
            before = sum(memory_footprint(full.get_submodule(path)) for path in layers)
            linears = sum(map(memory_footprint, layers.values())) / before
            whole = memory_footprint(model) / memory_footprint(full)
            bar = whole_bar if head == "native" else TIED if dtype == "float32" else None
            rows.append((dtype, head, _against(linears, linear_bar), _against(whole, bar)))
    return tables.markdown(rows, ("float parts", "lm_head", "int8 linears", "whole model"), left=2)


def memory(cases: dict[str, Case], found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of memory peaks; their bar is the size of the model and of the largest shard."""
    rows = []
    for name, case in cases.items():
        footprint = found[name][0]["footprint"]
        peak = statistics.median(load["peak"] for load in found[name])
        bar = (footprint + case.largest_shard) / 1e6
        rows.append(
            (name, f"{footprint / 1e6:.0f} MB", _against(peak / 1e6, bar if case.baseline else None, "{:.0f} MB"))
        )
    return tables.markdown(rows, ("loading", "model", "peak (bar: model and largest shard)"))


def times(cases: dict[str, Case], found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of median times, and of ratios to loading the float model in the same way."""
    rows = []
    for cached, (name, case) in itertools.product((True, False), cases.items()):
        loads = [load for load in found[name] if load["cached"] == cached]
        loaded, ready = (statistics.median(load[what] for load in loads) for what in ("loaded", "ready"))
        compared = "1.00"
        if case.baseline:
            plain = next(each for each, other in cases.items() if other.function == case.baseline)
            others = [load for load in found[plain] if load["cached"] == cached]
            ratio = statistics.median(a["ready"] / b["ready"] for a, b in zip(loads, others, strict=True))
            compared = _against(ratio, TIME, "{:.2f}")
        where = "the system's cache" if cached else "the disk"
        rows.append((name, where, f"{loaded:.2f} s", f"{ready:.2f} s", compared))
    headers = ("loading", "from", "loaded after", "first token after", "ratio to float32")
    return tables.markdown(rows, headers, left=2)


def _against(value: float, bar: float | None, form: str = "{:.3f}") -> str:
    text = form.format(value)
    if bar is None:
        return text
    return tables.judged(f"{text} (bar {form.format(bar)})", value <= bar)


if __name__ == "__main__":
    tables.run(__doc__, ROUNDS, report)
