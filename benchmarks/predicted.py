"""Predictions of how long the Triton kernels take on an H100 or an H200, from what they compile to.

    python -m benchmarks.predicted                  # for an H100
    python -m benchmarks.predicted --gpu H200
    python -m benchmarks.predicted --out benchmarks/results/gpu/predicted.md   # both, and the .json beside it

Nothing here is measured: `benchmarks.model` makes times of what `benchmarks.compiled` counted in the compiled code. The
same model of the previous kernels is compared with their measurements on an H200, and bfloat16 with its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.model import (
    ATTENTION,
    GPUS,
    MULTIPROCESSORS,
    Gpu,
    Kernel,
    Time,
    baseline,
    kernel_of,
    pointwise,
    product,
    rows,
)
from benchmarks.sass import counts_of

RESULTS = Path(__file__).parent / "results"
PREDICTED = RESULTS / "gpu" / "predicted.json"
# A GPU day of the previous kernels, and what those were compiled to.
MEASURED, COMPILED = (RESULTS / "gpu" / "h200-1" / name for name in ("gpu-day.json", "kernels.json"))
MARK = "Prediction, not measured"
# What the model may be off by for any kernel that was measured; a test holds it.
ERROR = 0.15


class Shape(NamedTuple):
    """A linear of Llama-3.1-8B.

    Attributes:
        n: Outputs; those that read the same activations together.
        k: Inputs.
        norm: Whether a norm with a residual add comes before it, in bfloat16 too.
        gated: Whether silu-times-up comes after it.
    """

    n: int
    k: int
    norm: bool = False
    gated: bool = False


SHAPES = {
    "qkv": Shape(6144, 4096, norm=True),
    "o": Shape(4096, 4096),
    "gate_up": Shape(28672, 4096, norm=True, gated=True),
    "down": Shape(4096, 14336),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
HEAD = Shape(128256, 4096, norm=True)
# Layers of the model, and of the part of it that the GPU day decodes with.
LAYERS, DAY_LAYERS = 32, 8
# What is asked for: times bfloat16 in a layer, by rows. Where a single figure is asked for, it is gate_up's: for o with
# 8192 rows, the bytes of quantize alone would keep it below that.
BARS: Mapping[int, Mapping[str, float]] = {
    1: {"gate_up": 1.6, "o": 1.3},
    16: {"gate_up": 1.5, "o": 1.2},
    64: {"gate_up": 1.5, "o": 1.0},
    256: {"gate_up": 1.2},
    2048: {"gate_up": 1.5, "o": 1.3},
    8192: {"gate_up": 1.6},
}
DECODE_BAR = 1.5


class Kernels:
    """The kernels of sm_90, compiled when they are needed first. It needs Triton."""

    def __init__(self) -> None:
        from benchmarks import compiled
        from int8compile.triton_kernels import tables

        self._compiled, self._tables, self._arch = compiled, tables, tables.ARCHITECTURES["sm_90"]
        self._found: dict[tuple[object, ...], Any] = {}

    def product(self, m: int, n: int, k: int, gated: bool = False) -> Kernel:
        """Return the kernel that the table chooses."""
        configs = self._tables.candidates(self._arch, m, k)
        return self.of(m, self._tables.choose(configs, m, n, k, MULTIPROCESSORS), gated)

    def of(self, m: int, config: Any, gated: bool = False) -> Kernel:
        """Return a configuration's kernel."""
        from int8compile.ops.quantized import NONE, SILU_MUL

        key = (min(m, 2), config, gated)
        if key not in self._found:
            call = self._compiled.launch(m, config, SILU_MUL if gated else NONE)
            self._found[key] = self._compiled.examine(call.compile(self._compiled.target_of(self._arch)))
        return kernel_of(config, self._found[key])

    def quantize(self, gpu: Gpu, m: int, k: int, norm: bool) -> Time:
        """Predict quantize, or the norm with a residual add that quantizes."""
        key = (k, norm)
        if key not in self._found:
            self._found[key] = self._compiled.compiled_quantize(self._arch, k, "rms_norm rounded" if norm else None)
        found = self._found[key]
        # x, and what it is added to and the sum; q. d, and the norm's weight, are shared by all rows.
        nbytes = m * k * (2 + 1 + (4 if norm else 0))
        return rows(
            gpu, found.usual.instructions, found.usual.barriers, found.warps, found.resident("sm_90"), m, nbytes
        )


@dataclasses.dataclass(frozen=True)
class Linear:
    """A predicted linear.

    Attributes:
        kernel: The product's configuration.
        quantize: Seconds of what comes before the product.
        product: Its seconds.
        baseline: Seconds of the same in bfloat16.
        limit: What takes most of the product's time.
    """

    kernel: str
    quantize: float
    product: float
    baseline: float
    limit: str

    @property
    def ratio(self) -> float:
        """Return how many times faster than bfloat16 it is."""
        return self.baseline / (self.quantize + self.product)


def linear(gpu: Gpu, kernels: Kernels, m: int, shape: Shape, *, in_layer: bool) -> Linear:
    """Predict a linear.

    Args:
        gpu: The GPU.
        kernels: What the table chooses from.
        m: Rows.
        shape: The weight.
        in_layer: Whether with the norm before it and silu-times-up after it, on both sides; else it is what the GPU day
            measures: `quantize_rows` and `quantized_linear` against `F.linear`.
    """
    shape = shape if in_layer else Shape(shape.n, shape.k)
    n, k, norm, gated = shape
    kernel = kernels.product(m, n, k, gated)
    quantized = kernels.quantize(gpu, m, k, norm)
    found = product(gpu, kernel, m, n, k, m * n if gated else 2 * m * n)
    return Linear(kernel.name, quantized.seconds, found.seconds, _bfloat16(gpu, m, shape), found.limit)


def _bfloat16(gpu: Gpu, m: int, shape: Shape) -> float:
    """Return seconds of a linear in bfloat16, with the norm before it and silu-times-up after it."""
    norm = pointwise(gpu, 8 * m * shape.k) if shape.norm else 0.0
    return baseline(gpu, m, shape.n, shape.k) + norm + (pointwise(gpu, 3 * m * shape.n) if shape.gated else 0.0)


def decode(gpu: Gpu, kernels: Kernels, layers: int = LAYERS) -> tuple[float, float]:
    """Predict a step of Llama-3.1-8B with batch 1 under CUDA graphs; attention and lm_head in 16 bit.

    Returns:
        Seconds in int8 and in bfloat16.
    """
    linears = [linear(gpu, kernels, 1, shape, in_layer=True) for shape in SHAPES.values()]
    head = _bfloat16(gpu, 1, HEAD)
    ours = layers * (ATTENTION + sum(each.quantize + each.product for each in linears)) + head
    return ours, layers * (ATTENTION + sum(each.baseline for each in linears)) + head


@dataclasses.dataclass(frozen=True)
class Checked:
    """A prediction beside a measurement.

    Attributes:
        what: "product", "quantize", "bfloat16" or "decode, bfloat16".
        case: Rows and shape.
        kernel: Its configuration; "" for bfloat16.
        predicted: Seconds.
        measured: Seconds, on the H200.
    """

    what: str
    case: str
    kernel: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Return by how much the prediction is larger, as a share."""
        return self.predicted / self.measured - 1


def check(day: Mapping[str, Any]) -> list[Checked]:
    """Compare the model with a GPU day of the previous kernels.

    Args:
        day: Its result file: products of threshold 0, quantize, bfloat16.
    """
    kernels = json.loads(COMPILED.read_text())
    gpu = next(gpu for name, gpu in GPUS.items() if name in day["machine"]["device"])
    found = []
    for case, result in day["stages"]["outliers"]["cases"].items():
        m, n, k = result["m"], result["n"], result["k"]
        kernel = previous(kernels["products"], m, n)
        seconds = product(gpu, kernel, m, n, k).seconds
        found.append(Checked("product", case, kernel.name, seconds, result["medians"]["product"]))
        if m <= 64 and result["shape"] in ("o", "down"):
            seconds = rows(gpu, **kernels["quantize"][str(k)], m=m, nbytes=5 * m * k).seconds
            found.append(Checked("quantize", case, "quantize_rows", seconds, result["medians"]["quantize"]))
    for case, result in day["stages"]["linear"]["cases"].items():
        seconds = baseline(gpu, result["m"], result["n"], result["k"])
        found.append(Checked("bfloat16", case, "", seconds, result["medians"]["bf16 eager"]))
    for result in day["stages"]["decode"]["cases"].values():
        step = sum(_bfloat16(gpu, 1, shape) for shape in SHAPES.values())
        layers, name = result["sizes"]["layers"], "bf16 reduce-overhead"
        seconds = layers * (step + ATTENTION) + _bfloat16(gpu, 1, HEAD)
        found.append(Checked("decode, bfloat16", f"{layers} layers", "", seconds, result["medians"][name]))
    return sorted(found, key=lambda each: each.what)


def previous(kernels: Mapping[str, Any], m: int, n: int) -> Kernel:
    """Return the kernel that the previous table chose: the first with a tile for every multiprocessor."""
    bucket = max(int(bucket) for bucket in kernels if int(bucket) <= m)
    found = [Kernel(**{**each, "loop": counts_of(each["loop"])}) for each in kernels[str(bucket)]]
    return next((k for k in found if math.ceil(m / k.bm) * math.ceil(n / k.bn) >= MULTIPROCESSORS), found[-1])


def summarized(checked: Iterable[Checked]) -> dict[str, dict[str, float]]:
    """Return the largest and the mean error of each kind, and how many there are."""
    errors: dict[str, list[float]] = {}
    for each in checked:
        errors.setdefault(each.what, []).append(each.error)
    return {
        what: {"cases": len(found), "largest": max(found, key=abs), "mean": sum(found) / len(found)}
        for what, found in errors.items()
    }


def predictions(gpu: Gpu, kernels: Kernels) -> dict[str, Any]:
    """Return all predictions for a GPU as data: "linear" as the GPU day measures it, "layer", and "decode".

    Each case is named as the GPU day names it: "M=16 o 4096x4096".
    """

    def cases(in_layer: bool) -> dict[str, dict[str, Any]]:
        found = {}
        for m in ROWS:
            for name, shape in SHAPES.items():
                one = linear(gpu, kernels, m, shape, in_layer=in_layer)
                case = {"m": m, "shape": name, **dataclasses.asdict(one), "ratio": one.ratio}
                bar = BARS.get(m, {}).get(name) if in_layer else None
                found[f"M={m} {name} {shape.k}x{shape.n}"] = case | ({} if bar is None else {"bar": bar})
        return found

    steps: dict[str, dict[str, float]] = {}
    for layers in (DAY_LAYERS, LAYERS):
        ours, theirs = decode(gpu, kernels, layers)
        steps[str(layers)] = {"int8": ours, "bfloat16": theirs, "ratio": theirs / ours}
    steps[str(LAYERS)]["bar"] = DECODE_BAR
    return {"linear": cases(False), "layer": cases(True), "decode": steps}


def render(found: Mapping[str, Any], gpu: str) -> str:
    """Show the predictions for a GPU as Markdown."""
    from tabulate import tabulate

    def table(cases: Mapping[str, Any]) -> str:
        lines = []
        for m in ROWS:
            by_shape = {case["shape"]: case for case in cases.values() if case["m"] == m}
            ours = sum(case["quantize"] + case["product"] for case in by_shape.values())
            together = sum(case["baseline"] for case in by_shape.values()) / ours
            lines.append([m, *(_cell(by_shape[name]) for name in SHAPES), f"{together:.2f}"])
        return str(tabulate(lines, ["M", *SHAPES, "all four"], tablefmt="github", disable_numparse=True))

    def details(cases: Mapping[str, Any]) -> str:
        rows = [
            (
                *(case["m"], case["shape"], case["kernel"], _us(case["quantize"]), _us(case["product"])),
                *(_us(case["baseline"]), f"{case['ratio']:.2f}", case["limit"]),
            )
            for case in cases.values()
        ]
        head = ("M", "linear", "kernel", "quantize us", "product us", "bfloat16 us", "times", "limited by")
        return str(tabulate(rows, head, tablefmt="github", disable_numparse=True))

    step = found["decode"][str(LAYERS)]
    bars = [case for case in found["layer"].values() if "bar" in case] + [step]
    return f"""## {gpu}: {MARK}

Times faster than bfloat16 in a layer: with the norm and the residual add before qkv and gate_up and silu-times-up
after gate_up on both sides; before o and down, quantize is a launch that bfloat16 does not have. Behind a slash, what
is asked for; {sum(case["ratio"] >= case["bar"] for case in bars)} of {len(bars)} are met.

{table(found["layer"])}

A decode step of Llama-3.1-8B under CUDA graphs, batch 1, attention and lm_head in 16 bit: {1e3 * step["int8"]:.2f} ms
against {1e3 * step["bfloat16"]:.2f} ms, {_cell(step)} times.

Times faster as the GPU day measures it, quantize_rows and quantized_linear against F.linear:

{table(found["linear"])}

In a layer, in detail:

{details(found["layer"])}
"""


def _cell(case: Mapping[str, Any]) -> str:
    bar = case.get("bar")
    if bar is None:
        return f"{case['ratio']:.2f}"
    return f"{case['ratio']:.2f} / {bar:g}{'' if case['ratio'] >= bar else ' MISSED'}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def rendered_check(checked: Sequence[Checked]) -> str:
    """Show how far the model was off for the previous kernels, as Markdown."""
    from tabulate import tabulate

    found = summarized(checked)
    head = ("", "case", "kernel", "predicted us", "measured us", "error")
    rows = [
        (each.what, each.case, each.kernel, _us(each.predicted), _us(each.measured), f"{each.error:+.0%}")
        for each in checked
    ]
    errors = "; ".join(
        f"{what}: {each['largest']:+.0%} at most, {each['mean']:+.1%} on average of {each['cases']}"
        for what, each in found.items()
    )
    return f"""## The model and what was measured

The previous kernels and cuBLAS on an H200 ([measured](gpu/h200-1/gpu-day.json)), predicted by the same model. Some of
its constants are from there (see `benchmarks/model.py`), so this is how well it describes kernels of several kinds and
sizes, not a test on unseen ones; it must be within {ERROR:.0%} everywhere. {errors}.

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, action="append", help="which (default: H100; both with --out)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown; the numbers go to a .json file beside it")
    given = parser.parse_args(arguments)
    names = given.gpu or (list(GPUS) if given.out else ["H100"])
    kernels = Kernels()
    found = {name: predictions(GPUS[name], kernels) for name in names}
    checked = check(json.loads(MEASURED.read_text()))
    import triton

    text = f"""# Int8 on Hopper: {MARK}

Made without a GPU by `python -m benchmarks.predicted` from the compiled code of the kernels (Triton
{triton.__version__}) and a few constants; activations of which no row has a second digit.

{"".join(f"{render(each, name)}{chr(10)}" for name, each in found.items())}{rendered_check(checked)}"""
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)
        data = {"about": MARK, "errors": summarized(checked), "gpus": found}
        given.out.with_suffix(".json").write_text(json.dumps(_rounded(data), indent=1) + "\n")
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
