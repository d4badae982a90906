"""Predicted times of the Triton kernels on an H100 or an H200, from their compiled code.

    python -m benchmarks.predicted                  # for an H100
    python -m benchmarks.predicted --gpu H200
    python -m benchmarks.predicted --out benchmarks/results/gpu/predicted.md   # both, and the .json beside it

Nothing here is measured: `benchmarks.model` computes times from the instructions that `benchmarks.compiled` counted. To
check the model, its predictions for the previous kernels and for bfloat16 are compared with measurements on an H200.
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
# A GPU day of the previous kernels, and their compiled code.
MEASURED, COMPILED = (RESULTS / "gpu" / "h200-1" / name for name in ("gpu-day.json", "kernels.json"))
MARK = "Prediction, not measured"
# Largest error of the model for any measured kernel; a test checks it.
ERROR = 0.15


class Shape(NamedTuple):
    """A linear of Llama-3.1-8B.

    Attributes:
        n: Outputs; of linears that read the same activations, all together.
        k: Inputs.
        norm: Whether a norm with a residual add comes before, in bfloat16 too.
        gated: Whether silu-times-up comes after.
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
# Layers of the model, and of the shortened model that the GPU day decodes with.
LAYERS, DAY_LAYERS = 32, 8
# Least ratio to bfloat16 in a layer, by rows. A row with a single bar has it for gate_up: for o with 8192 rows, the
# bytes of quantize alone keep the ratio below it.
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
    """The kernels of sm_90, compiled at first use. It needs Triton."""

    def __init__(self) -> None:
        from benchmarks import compiled
        from int8compile.triton_kernels import tables

        self._compiled, self._tables, self._arch = compiled, tables, tables.ARCHITECTURES["sm_90"]
        self._found: dict[tuple[object, ...], Any] = {}

    def product(self, m: int, n: int, k: int, gated: bool = False) -> Kernel:
        """Return the kernel that the table chooses for a product."""
        configs = self._tables.candidates(self._arch, m, k)
        return self.of(m, self._tables.choose(configs, m, n, k, MULTIPROCESSORS), gated)

    def of(self, m: int, config: Any, gated: bool = False) -> Kernel:
        """Return the kernel of a configuration."""
        from int8compile.ops.quantized import NONE, SILU_MUL

        key = (min(m, 2), config, gated)
        if key not in self._found:
            call = self._compiled.launch(m, config, SILU_MUL if gated else NONE)
            self._found[key] = self._compiled.examine(call.compile(self._compiled.target_of(self._arch)))
        return kernel_of(config, self._found[key])

    def quantize(self, gpu: Gpu, m: int, k: int, norm: bool) -> Time:
        """Predict the time of quantize, alone or fused with a residual add and a norm."""
        key = (k, norm)
        if key not in self._found:
            self._found[key] = self._compiled.compile_quantize(self._arch, k, "rms_norm rounded" if norm else None)
        found = self._found[key]
        # Two bytes of x, one of q and, with a norm, four of the residual and the sum. All rows share d and the norm's
        # weight.
        nbytes = m * k * (2 + 1 + (4 if norm else 0))
        return rows(
            gpu, found.usual.instructions, found.usual.barriers, found.warps, found.resident("sm_90"), m, nbytes
        )


@dataclasses.dataclass(frozen=True)
class Linear:
    """The predicted times of a linear.

    Attributes:
        kernel: The product's configuration.
        quantize: Seconds of the kernel before the product.
        product: Seconds of the product.
        baseline: Seconds of the same in bfloat16.
        limit: The part that takes most of the product's time.
    """

    kernel: str
    quantize: float
    product: float
    baseline: float
    limit: str

    @property
    def ratio(self) -> float:
        """Return how many times faster than bfloat16 the linear is."""
        return self.baseline / (self.quantize + self.product)


def linear(gpu: Gpu, kernels: Kernels, m: int, shape: Shape, *, in_layer: bool) -> Linear:
    """Predict the times of a linear.

    Args:
        gpu: The GPU.
        kernels: The kernels that the table chooses from.
        m: Rows.
        shape: The weight.
        in_layer: Whether to include the norm before and silu-times-up after the linear, on both sides. Otherwise the
            prediction is for the GPU day's comparison: `quantize_rows` and `quantized_linear` against `F.linear`.
    """
    shape = shape if in_layer else Shape(shape.n, shape.k)
    n, k, norm, gated = shape
    kernel = kernels.product(m, n, k, gated)
    quantized = kernels.quantize(gpu, m, k, norm)
    found = product(gpu, kernel, m, n, k, m * n if gated else 2 * m * n)
    return Linear(kernel.name, quantized.seconds, found.seconds, _bfloat16(gpu, m, shape), found.limit)


def _bfloat16(gpu: Gpu, m: int, shape: Shape) -> float:
    """Return the seconds of a linear in bfloat16, with the norm before and silu-times-up after it."""
    norm = pointwise(gpu, 8 * m * shape.k) if shape.norm else 0.0
    return baseline(gpu, m, shape.n, shape.k) + norm + (pointwise(gpu, 3 * m * shape.n) if shape.gated else 0.0)


def decode(gpu: Gpu, kernels: Kernels, layers: int = LAYERS) -> tuple[float, float]:
    """Predict a decode step of Llama-3.1-8B with batch 1 under CUDA graphs; attention and lm_head in 16 bit.

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
        kernel: Configuration of the kernel; "" for bfloat16.
        predicted: Seconds.
        measured: Seconds on the H200.
    """

    what: str
    case: str
    kernel: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Return the relative error of the prediction."""
        return self.predicted / self.measured - 1


def check(day: Mapping[str, Any]) -> list[Checked]:
    """Compare the model with a GPU day of the previous kernels.

    Args:
        day: Content of its result file.
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
    """Return the choice of the previous table: the first kernel with at least one tile for every multiprocessor."""
    bucket = max(int(bucket) for bucket in kernels if int(bucket) <= m)
    found = [Kernel(**{**each, "loop": counts_of(each["loop"])}) for each in kernels[str(bucket)]]
    return next((k for k in found if math.ceil(m / k.bm) * math.ceil(n / k.bn) >= MULTIPROCESSORS), found[-1])


def summarized(checked: Iterable[Checked]) -> dict[str, dict[str, float]]:
    """Return the number of comparisons of each kind, with their largest and their mean error."""
    errors: dict[str, list[float]] = {}
    for each in checked:
        errors.setdefault(each.what, []).append(each.error)
    return {
        what: {"cases": len(found), "largest": max(found, key=abs), "mean": sum(found) / len(found)}
        for what, found in errors.items()
    }


def predictions(gpu: Gpu, kernels: Kernels) -> dict[str, Any]:
    """Return all predictions for a GPU as data.

    "linear" has linears as the GPU day measures them, "layer" linears in a layer, and "decode" a decode step. Cases
    have the GPU day's names, such as "M=16 o 4096x4096".
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
    """Return the predictions for a GPU as Markdown."""
    from tabulate import tabulate

    rows = [
        (
            *(case["m"], case["shape"], case["kernel"], _us(case["quantize"]), _us(case["product"])),
            *(_us(case["baseline"]), f"{case['ratio']:.2f}", case["limit"]),
        )
        for case in found["layer"].values()
    ]
    head = ("M", "linear", "kernel", "quantize us", "product us", "bfloat16 us", "times", "limited by")
    return f"""## {gpu}: {MARK}

{in_layers(found)}

Times faster as the GPU day measures it: quantize_rows and quantized_linear against F.linear.

{_ratios(found["linear"])}

In a layer, in detail:

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}
"""


def in_layers(found: Mapping[str, Any]) -> str:
    """Return the predicted ratios in a layer and of a decode step as Markdown."""
    step = found["decode"][str(LAYERS)]
    bars = [case for case in found["layer"].values() if "bar" in case] + [step]
    return f"""Times faster than bfloat16 in a layer. Both sides include the norm and the residual add before qkv and
gate_up, and silu-times-up after gate_up. Before o and down, quantize is a launch that bfloat16 does not have. Behind a
slash, the bar; {sum(case["ratio"] >= case["bar"] for case in bars)} of {len(bars)} bars are met.

{_ratios(found["layer"])}

A decode step of Llama-3.1-8B under CUDA graphs, batch 1, attention and lm_head in 16 bit: {1e3 * step["int8"]:.2f} ms
against {1e3 * step["bfloat16"]:.2f} ms, {_cell(step)} times."""


def _ratios(cases: Mapping[str, Any]) -> str:
    from tabulate import tabulate

    lines = []
    for m in ROWS:
        by_shape = {case["shape"]: case for case in cases.values() if case["m"] == m}
        ours = sum(case["quantize"] + case["product"] for case in by_shape.values())
        together = sum(case["baseline"] for case in by_shape.values()) / ours
        lines.append([m, *(_cell(by_shape[name]) for name in SHAPES), f"{together:.2f}"])
    return tabulate(lines, ["M", *SHAPES, "all four"], tablefmt="github", disable_numparse=True)


def _cell(case: Mapping[str, Any]) -> str:
    bar = case.get("bar")
    if bar is None:
        return f"{case['ratio']:.2f}"
    return f"{case['ratio']:.2f} / {bar:g}{'' if case['ratio'] >= bar else ' MISSED'}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def rendered_check(checked: Sequence[Checked]) -> str:
    """Return the errors of the model for the previous kernels as Markdown."""
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

The previous kernels and cuBLAS on an H200 ([measured](h200-1/gpu-day.json)), predicted by the same model. Some of its
constants come from these measurements (see `benchmarks/model.py`). So the errors show how well the model describes
kernels of several kinds and sizes; they are no test on unseen kernels. No error may exceed {ERROR:.0%}. {errors}.

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}
"""


def document(found: Mapping[str, Any], checked: Sequence[Checked], version: str) -> str:
    """Return the predictions by GPU and the check of the model as Markdown; `version` is that of Triton."""
    return f"""# Int8 on Hopper: {MARK}

Made without a GPU by `python -m benchmarks.predicted` from the compiled code of the kernels (Triton {version}) and a
few constants, for activations without second digits.

{"".join(f"{render(each, name)}{chr(10)}" for name, each in found.items())}{rendered_check(checked)}"""


def main(arguments: Sequence[str] | None = None) -> int:

    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, action="append", help="GPU (default: H100; both with --out)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write Markdown to FILE, and numbers to a .json file beside it"
    )
    given = parser.parse_args(arguments)
    names = given.gpu or (list(GPUS) if given.out else ["H100"])
    kernels = Kernels()
    found = {name: _rounded(predictions(GPUS[name], kernels)) for name in names}
    checked = check(json.loads(MEASURED.read_text()))
    import triton

    text = document(found, checked, triton.__version__)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)
        data = {"about": MARK, "errors": _rounded(summarized(checked)), "gpus": found}
        given.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
