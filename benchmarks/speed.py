"""Speed of whole models on this CPU: `python -m benchmarks.speed [smollm2 llama-3.2-1b] [--out DIR]`.

The result files are those of `int8compile bench`, with llama.cpp as a further variant. Each model takes about ten
minutes on two quiet cores. SmolLM2 is the real model. The Llama has the shape of Llama-3.2-1B with random weights, and
fewer layers, so that all variants fit into the memory at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import llamacpp
from int8compile.app import loading, speed
from int8compile.app.variants import VARIANTS

LAYERS = 8


class Source(NamedTuple):
    """A model to measure.

    Attributes:
        name: Its name in the result file.
        folder: Maps an empty folder to the name of the model for `loading.load`.
        gguf: Maps that folder to a GGUF file of the model.
    """

    name: str
    folder: Callable[[Path], str]
    gguf: Callable[[Path], Path]


def smollm2(folder: Path) -> str:
    """Save the real model as a folder, which loads as models usually do."""
    model: Any = loading.load(loading.SMOLLM2)
    model.save_pretrained(folder)
    return str(folder)


def llama(folder: Path) -> str:
    """Save a random model in bfloat16, which both dtypes hold exactly, and write it as GGUF."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        num_hidden_layers=LAYERS,
        vocab_size=128256,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )
    model: Any = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    llamacpp.write(model, folder / "model.gguf")
    return str(folder)


SOURCES = {
    "smollm2": Source("SmolLM2-135M", smollm2, lambda _: loading.smollm2_file()),
    "llama-3.2-1b": Source(
        f"Llama-3.2-1B, {LAYERS} of 16 layers, random weights", llama, lambda folder: folder / "model.gguf"
    ),
}


def measure(
    source: Source,
    *,
    batches: list[int] | None = None,
    prompt: int = speed.PROMPT,
    rounds: int = speed.ROUNDS,
    variants: list[str] | None = None,
) -> dict[str, Any]:
    """Return the result of a model, as `int8compile.app.speed.measure` does."""
    names = speed.select(variants or [], known=[*VARIANTS, llamacpp.NAME])
    with tempfile.TemporaryDirectory(prefix="int8compile-") as made:
        folder = Path(made)
        model = source.folder(folder)
        command = [sys.executable, "-m", "benchmarks.llamacpp", str(source.gguf(folder))]
        found = speed.measure(
            model,
            batches=batches or speed.BATCHES,
            prompt=prompt,
            rounds=rounds,
            names=names,
            commands={llamacpp.NAME: command},
        )
    return {**found, "model": source.name}


def main() -> None:
    """Measure, write a JSON file and a plot for each model, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SOURCES)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("results"), help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=speed.ROUNDS)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="as for `int8compile bench`")
    args = parser.parse_args()
    if unknown := [name for name in args.models if name not in SOURCES]:
        parser.error(f"unknown model {unknown[0]!r}; known: {', '.join(SOURCES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models or SOURCES:
        found = measure(SOURCES[name], batches=args.batch, rounds=args.rounds, variants=args.variants)
        (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        speed.plot(found, args.out / f"{name}.png")
        print(f"{found['model']}\n\n{speed.render(found)}\n")


if __name__ == "__main__":
    main()
