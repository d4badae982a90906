"""Time the cases of `benchmarks.check` in a process of its own: `python benchmarks/cases.py FOLDER SHARES [--real]`.

SHARES is an object in JSON: the kinds of cases to time, with the share by which `slowed` prolongs each call. `--only`
names the cases to compile and time.

The process imports int8compile from FOLDER, a checkout of any commit, so this file uses only what every commit has and
imports nothing of this checkout. It is started by its path.

Times are of the thread's CPU clock, with one thread: waiting for a core that other processes use does not count.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

KERNELS, MODELS = "kernels", "models"
# K x N of linears: SmolLM2's, and one that is not in a core's own cache.
SIZES = ((576, 1536), (2048, 2048))
ROWS = (1, 16, 256)
DTYPES = ("float32", "bfloat16")
# `dispatch`: linears whose products take no time: guards, the lookup of weights, operators.
LINEARS, WIDTH = 70, 64
# SmolLM2's decoder layers, fewer of them. The output projection stays in float and is not what is tested: with a
# vocabulary of 3072, its time differs by a tenth between processes.
LAYERS, VOCABULARY, PROMPT, CACHE = 2, 512, 64, 128
# A turn takes the fastest of as many calls as fit into this many seconds, but at least two.
SECONDS = {KERNELS: 0.015, MODELS: 0.05}

Call = Callable[[], object]


def main() -> None:
    """Answer each line on stdin with an object: the seconds of the case that it names.

    The first object, without a question, lists the cases by kind, and says how many weights are int8.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("shares", type=json.loads)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--only", action="append", metavar="NAME")
    options = parser.parse_args()
    import torch

    import int8compile

    if not str(int8compile.__file__).startswith(options.folder):
        raise SystemExit(f"int8compile was imported from {int8compile.__file__}, not from {options.folder}")
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Each size and dtype of a linear recompiles the same function.
    torch._dynamo.config.recompile_limit = 100
    made: dict[str, Callable[[], dict[str, Call]]] = {KERNELS: kernels, MODELS: lambda: models(options.real)}
    kinds = {
        kind: {name: call for name, call in made[kind]().items() if options.only is None or name in options.only}
        for kind in options.shares
    }
    turns = {
        name: functools.partial(fastest, slowed(call, options.shares[kind]), SECONDS[kind])
        for kind, named in kinds.items()
        for name, call in named.items()
    }
    with torch.no_grad():
        for turn in turns.values():  # Compiles, and fills caches.
            turn()
        made_int8 = importlib.import_module("int8compile.weights").STORE.quantized
        named_cases = {kind: list(named) for kind, named in kinds.items()}
        print(json.dumps({"kinds": named_cases, "int8": made_int8}), flush=True)
        for line in sys.stdin:
            print(json.dumps({"seconds": turns[line.strip()]()}), flush=True)


def kernels() -> dict[str, Call]:
    """Return calls of compiled linears, and of a model of many small ones."""
    import torch
    from torch import nn

    calls: dict[str, Call] = {}
    for dtype in DTYPES:
        for k, n in SIZES:
            layer = nn.Linear(k, n, bias=False, dtype=getattr(torch, dtype)).requires_grad_(False)
            run = torch.compile(layer, backend="int8", dynamic=True, fullgraph=True)
            # As in models, the norm's weights scale the channels, and a few channels are far larger than the others.
            channels = torch.empty(k).log_normal_(0, 0.5)
            channels[torch.randperm(k)[: max(1, k // 200)]] *= 20
            for rows in ROWS:
                x = (torch.randn(rows, k) * channels).to(layer.weight.dtype)
                calls[f"{k} x {n}, {rows} rows, {dtype}"] = functools.partial(run, x)
    many = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LINEARS))).eval().requires_grad_(False)
    calls[f"{LINEARS} linears {WIDTH} x {WIDTH}, 1 row"] = functools.partial(
        torch.compile(many, backend="int8"), torch.randn(1, WIDTH)
    )
    return calls


def models(real: bool) -> dict[str, Call]:
    """Return a call that reads a prompt, and one that computes a token with a static cache."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    if real:
        model = loading().load("smollm2")
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=LAYERS,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config).eval()
    model.requires_grad_(False)
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE)
    run: Any = torch.compile(model, backend="int8")
    prompt = torch.randint(0, VOCABULARY, (1, PROMPT))
    token = {"input_ids": prompt[:, :1], "position_ids": torch.tensor([[PROMPT]])}

    with torch.no_grad():  # The first call allocates the cache, and a graph from before would be compiled again.
        model(**token, past_key_values=cache, use_cache=True)

    def decode() -> object:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)  # Each call is of the same token.
        return run(**token, past_key_values=cache, use_cache=True)

    name = "SmolLM2" if real else f"{LAYERS} layers"
    return {
        f"{name}, prompt of {PROMPT}": functools.partial(run, input_ids=prompt, use_cache=False),
        f"{name}, one token": decode,
    }


def loading() -> Any:
    """Return the module that loads SmolLM2."""
    try:
        return importlib.import_module("int8compile.app.loading")
    except ModuleNotFoundError:  # in older commits
        return importlib.import_module("int8compile.models")


def slowed(call: Call, share: float) -> Call:
    """Prolong a call by a share of its own time, for trials of the gate."""
    if not share:
        return call

    def longer() -> None:
        began = time.thread_time_ns()
        call()
        until = time.thread_time_ns()
        until += round(share * (until - began))
        while time.thread_time_ns() < until:
            pass

    return longer


def fastest(call: Call, limit: float) -> float:
    """Return the fewest seconds of some calls: what interrupts a call only prolongs it."""
    call()  # The caches hold another process's data.
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < limit:
        began = time.thread_time_ns()
        call()
        seconds.append((time.thread_time_ns() - began) / 1e9)
    return min(seconds)


def keep_freed_memory() -> None:
    """Make the allocator reuse memory, since pages that are new to a process are cleared by the system at their use."""
    # Options of the C library's allocator, as numbered by mallopt.
    for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)


if __name__ == "__main__":
    main()
