"""Whole language models at batch 1: reading a prompt of 512 tokens, and generating one token after it.

Compiling a variant takes up to a minute. `--variants` selects variants by a regular expression; float32 and bfloat16
are always included. The default variants (`DEFAULT`) take more than ten minutes.

    python -m pytest benchmarks/bench_models.py --benchmark-only -s
    python -m pytest benchmarks/bench_models.py --benchmark-only -s -k SmolLM2 --variants '^int8|torchao'

torchao and llama-cpp-python are not installed by default; without them, their variants are left out. For llama.cpp,
`--llama-cpp 900,80` takes the tokens per second that `llama-bench -p 512 -n 64` printed on this machine instead.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import interleaved, llamacpp, variants
from benchmarks.conftest import is_smoke
from int8compile import cpu
from int8compile.app import loading
from int8compile.errors import ModelError

BASELINES = ("float32", "bfloat16")
CPP_BASELINES = tuple(f"{name}, cpp_wrapper" for name in BASELINES)
SMOLLM2 = "SmolLM2-135M"
LLAMA = "Llama-3.2-1B, 4 layers"
SMOKE = "smoke"
_INT8, _OTHERS = [f"int8 {name}" for name in BASELINES], ["bitsandbytes bfloat16", "bitsandbytes bfloat16, compiled"]
_OTHERS += ["torchao weight-only bfloat16", "torchao dynamic bfloat16", llamacpp.NAME]
DEFAULT = {
    SMOLLM2: [*BASELINES, *CPP_BASELINES, *_INT8, *(f"{name}, lm_head, cpp_wrapper" for name in _INT8), *_OTHERS],
    LLAMA: [*BASELINES, *CPP_BASELINES, *_INT8, *(f"{name}, cpp_wrapper" for name in _INT8)],
    SMOKE: [*BASELINES, "int8 bfloat16, lm_head, cpp_wrapper", "bitsandbytes bfloat16"],
}
PROMPT = {SMOLLM2: 512, LLAMA: 512, SMOKE: 8}
# Tokens that the cache has room for after the prompt, as in real use.
ROOM = 64

# Other packages emit warnings while they quantize and compile, and pytest turns warnings into errors.
pytestmark = pytest.mark.filterwarnings("ignore")


def load(name: str) -> Any:
    """Return a model in float32."""
    if name == SMOLLM2:
        return loading.load(loading.SMOLLM2)
    import transformers

    # A small vocabulary is enough: the embedding costs little at any size, and the output projection is left out.
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 4}
    sizes |= {"num_key_value_heads": 8, "head_dim": 64}
    if name == SMOKE:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    config: Any = transformers.LlamaConfig
    model: Any = transformers.LlamaForCausalLM(config(**sizes, vocab_size=256))
    return model.eval()


class Runs:
    """The compiled variants of a model.

    Attributes:
        model: Name of the model.
        prompt: Number of tokens in the prompt.
        similarity: By variant, the cosine between the last token's output and float32's. It shows fast but wrong
            variants.
        notes: Variants that were left out, and why.
    """

    def __init__(self, model: str, names: list[str]) -> None:
        assert cpu.available()
        self.model = model
        self.prompt = PROMPT[model]
        self.similarity: dict[str, float] = {}
        self.notes: list[str] = []
        self._steps: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        weights = load(model)
        by_dtype = {"float32": weights, "bfloat16": copy.deepcopy(weights).bfloat16()}
        self._ids = torch.randint(0, weights.config.vocab_size, (1, self.prompt + 1))
        self._positions = torch.arange(self.prompt + 1)
        for name in (bar := tqdm(names, leave=False)):
            bar.set_description(f"Compiling {name}")
            if why := llamacpp.missing() if name == llamacpp.NAME else variants.missing(name):
                self.notes.append(f"{name}: {why}")
                continue
            if name == llamacpp.NAME:
                self._steps[name] = llamacpp.Step(loading.smollm2_file(), self.prompt + ROOM)
            else:
                self._steps[name] = variants.make(name, by_dtype, self.prompt + ROOM, head=model != LLAMA)
            try:
                self.prefill(name)
                self._compare(name, self.decode(name))
            except Exception as error:
                if name.startswith("int8") or name in BASELINES:
                    raise
                self.notes.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                del self._steps[name]

    @property
    def names(self) -> list[str]:
        """Return the names of the variants that run."""
        return list(self._steps)

    def prefill(self, name: str) -> Tensor:
        """Read the prompt."""
        return self._steps[name](self._ids[:, :-1], self._positions[:-1])

    def decode(self, name: str) -> Tensor:
        """Generate the token after the prompt; the same token every time."""
        return self._steps[name](self._ids[:, -1:], self._positions[-1:])

    def _compare(self, name: str, output: Tensor) -> None:
        output = output.flatten().float()
        if not self.similarity:
            self._expected = output.clone()
        self.similarity[name] = round(float(torch.cosine_similarity(output, self._expected, dim=0)), 4)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Runs:
    """Return the selected variants of a model."""
    name = request.param
    pattern = request.config.getoption("variants")
    known = [*variants.COMPILERS, *([llamacpp.NAME] if name == SMOLLM2 else [])]
    chosen = [one for one in known if re.search(pattern, one)] if pattern else DEFAULT[name]
    torch._dynamo.reset()
    with torch.inference_mode():
        try:
            return Runs(name, list(dict.fromkeys([*BASELINES, *chosen])))
        except ModelError as error:
            pytest.skip(str(error))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by model; under --smoke, by a tiny model only."""
    names = [SMOKE] if is_smoke(metafunc.config) else [SMOLLM2, LLAMA]
    metafunc.parametrize("runs", names, indirect=True, ids=lambda name: name.split(",")[0])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_model(benchmark: Any, pytestconfig: pytest.Config, smoke: bool, runs: Runs, phase: str) -> None:
    """Time all variants in turns. pytest-benchmark's table shows the last int8 variant, the result file all."""
    call = getattr(runs, phase)
    candidate = [name for name in runs.names if name.startswith("int8")] or runs.names
    calls = {name: lambda name=name: call(name) for name in runs.names}
    benchmark.group = f"{phase} {runs.model}"
    rounds = 2 if smoke else {"prefill": 9, "decode": 61}[phase]
    times = interleaved.measure(benchmark, calls, candidate[-1], rounds)
    tokens = runs.prompt if phase == "prefill" else 1
    data = times.to_dict(BASELINES)
    given = pytestconfig.getoption("llama_cpp")
    if given and runs.model == SMOLLM2 and llamacpp.NAME not in runs.names:
        prefill, decode = (float(rate) for rate in given.split(","))
        data["medians"][llamacpp.NAME] = tokens / (prefill if phase == "prefill" else decode)
        runs.notes.append(f"{llamacpp.NAME}: not timed in turns with the others, but given by --llama-cpp")
    benchmark.extra_info.update(
        kind="model",
        model=runs.model,
        phase=phase,
        tokens=tokens,
        similarity=runs.similarity,
        notes=list(dict.fromkeys(runs.notes)),
        packages=variants.packages(),
        **data,
    )
    for name, seconds in data["medians"].items():
        print(f"\n{phase:8} {name:40} {tokens / seconds:8.1f} tokens/s", end="")
