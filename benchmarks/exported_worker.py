"""A process that runs an exported language model and knows nothing of int8compile, for `benchmarks.exported`.

`python -S exported_worker.py STARTED SITE_PACKAGES PACKAGE PROMPT STEPS`: loads the package and reads the prompt; then,
for each line on stdin, reads the prompt, generates, and prints how long each took.
"""

import json
import sys
import time

if __name__ == "__main__":
    started, packages, path, prompt, steps = float(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
    sys.path = [folder for folder in sys.path if "site-packages" in folder or "python3" in folder] + [packages]

import torch


def run(model, ids, steps):
    """Reads a prompt and generates greedily; seconds for the prompt and for each step, tokens, and logits.

    `model` maps ids [1, S], start [] and the cache to logits [1, vocabulary]; `new_cache` makes a cache.
    """
    call, new_cache = model
    cache, start, seconds, tokens, logits = new_cache(), 0, [], [], []
    with torch.no_grad():
        for _ in range(1 + steps):
            position = torch.tensor(start)
            began = time.perf_counter()
            result = call(ids, position, cache)
            seconds.append(time.perf_counter() - began)
            logits.append(result.clone())
            tokens.append(int(result.argmax()))
            start, ids = start + ids.shape[1], result.argmax(-1, keepdim=True)
    return {"prefill": seconds[0], "steps": seconds[1:], "tokens": tokens}, torch.stack(logits)


def serve(model, ids, steps, times, started, logits_file):
    """Says when the first token was there, and answers each line on stdin with a round."""
    _, logits = run(model, ids, 0)
    times["first token"] = time.time() - started
    print(json.dumps(times), flush=True)
    for line in sys.stdin:
        found, logits = run(model, ids, steps)
        if line.strip() == "logits":
            torch.save(logits, logits_file)
        print(json.dumps(found), flush=True)


def load(path):
    """The exported model and what makes its cache, whose sizes its metadata tells."""
    model = torch._inductor.aoti_load_package(path)
    words = model.get_metadata()["int8compile.inputs"].split()
    inputs = []
    while words:
        dtype, count = words[0], int(words[1])
        inputs.append((getattr(torch, dtype), [int(size) for size in words[2 : 2 + count]]))
        words = words[2 + count :]
    return model, lambda: [torch.zeros(sizes, dtype=dtype) for dtype, sizes in inputs[2:]]


if __name__ == "__main__":
    times = {"imports": time.time() - started}
    loaded = load(path)
    times["loading"] = time.time() - started
    if any(name.partition(".")[0] in ("int8compile", "transformers") for name in sys.modules):
        raise SystemExit("int8compile or transformers was imported")
    tokens = torch.tensor([json.loads(prompt)])
    serve(loaded, tokens, steps, times, started, f"{path}.logits")
