"""A process that runs an exported language model without int8compile, for `benchmarks.exported`.

`python -S exported_worker.py STARTED PACKAGE PROMPT STEPS` loads the package and reads the prompt. For each line on
stdin, it then reads the prompt, generates tokens, and prints the time of each step.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Model(NamedTuple):
    """A language model with a static cache.

    Attributes:
        call: Maps ids [1, S], start [] and the cache to logits [1, vocabulary].
        new_cache: Returns a new cache.
    """

    call: Callable[..., Any]
    new_cache: Callable[[], list[Tensor]]


def main() -> None:

    started, path, prompt, steps = float(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    times = {"imports": time.time() - started}
    model = load(path)
    times["model"] = time.time() - started
    if importlib.util.find_spec("int8compile") or "transformers" in sys.modules:
        raise SystemExit("int8compile can be imported, or transformers was imported")
    serve(model, torch.tensor([json.loads(prompt)]), steps, times, started, f"{path}.logits")


def load(path: str) -> Model:
    """Return the exported model; its metadata holds the sizes of its cache."""
    call = torch._inductor.aoti_load_package(path)
    words = iter(call.get_metadata()["int8compile.inputs"].split())
    inputs = [(getattr(torch, dtype), [int(next(words)) for _ in range(int(next(words)))]) for dtype in words]
    return Model(call, lambda: [torch.zeros(sizes, dtype=dtype) for dtype, sizes in inputs[2:]])


def serve(model: Model, ids: Tensor, steps: int, times: dict[str, float], started: float, logits_file: str) -> None:
    """Print the time until the first token, then run and print one round for each line on stdin."""
    generate(model, ids, 0)
    times["first token"] = time.time() - started
    print(json.dumps(times), flush=True)
    for line in sys.stdin:
        found, logits = generate(model, ids, steps)
        if line.strip() == "logits":
            torch.save(logits, logits_file)
        print(json.dumps(found), flush=True)


def generate(model: Model, ids: Tensor, steps: int) -> tuple[dict[str, Any], Tensor]:
    """Read a prompt and generate greedily; return the seconds of the prompt and of each step, tokens, and logits."""
    cache, start = model.new_cache(), 0
    seconds, tokens, logits = [], [], []
    with torch.no_grad():
        for _ in range(1 + steps):
            position = torch.tensor(start)
            began = time.perf_counter()
            result = model.call(ids, position, cache)
            seconds.append(time.perf_counter() - began)
            logits.append(result.clone())
            tokens.append(int(result.argmax()))
            start, ids = start + ids.shape[1], result.argmax(-1, keepdim=True)
    return {"prefill": seconds[0], "steps": seconds[1:], "tokens": tokens}, torch.stack(logits)


if __name__ == "__main__":
    main()
