"""Generate with a language model that `int8compile export` wrote. Needs PyTorch and nothing else.

    python generate.py model.pt2 COUNT TOKEN...

reads the token numbers of a prompt and prints those of the next COUNT tokens, the likeliest at every step.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch._inductor import aoti_load_package


def layouts_of(line: str) -> list[tuple[torch.dtype, list[int]]]:
    """Return the dtypes and sizes of inputs or outputs that words such as "int64 2 1 -1 int64 0 ..." describe."""
    words = iter(line.split())
    # The dtype, the number of dimensions, and the sizes; -1 where a size changes from call to call.
    return [(getattr(torch, dtype), [int(next(words)) for _ in range(int(next(words)))]) for dtype in words]


@torch.inference_mode()
def generate(path: str, count: int, tokens: list[int]) -> list[int]:
    """Return the `count` tokens that follow a prompt."""
    model = aoti_load_package(path)
    # Inputs: the tokens to read, the number of tokens read before, and the cache, which the model writes to.
    _, _, *cache_inputs = layouts_of(model.get_metadata()["int8compile.inputs"])
    length = cache_inputs[0][1][2]  # [1, heads, length, head_dim]
    if len(tokens) + count > length:
        sys.exit(f"{path}: the cache has room for {length} tokens, not for {len(tokens)} and {count} more")
    vocabulary = layouts_of(model.get_metadata()["int8compile.outputs"])[0][1][1]
    if not all(0 <= token < vocabulary for token in tokens):
        sys.exit(f"{path}: there are tokens from 0 to {vocabulary - 1}, not all of {tokens}")
    cache = [torch.zeros(sizes, dtype=dtype) for dtype, sizes in cache_inputs]

    generated: list[int] = []
    start = 0
    while len(generated) < count:
        logits = model(torch.tensor([tokens]), torch.tensor(start), cache)  # [1, vocabulary]
        start += len(tokens)
        tokens = [int(logits.argmax())]  # From now on, one at a time.
        generated += tokens
    return generated


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="model.pt2")
    parser.add_argument("count", metavar="COUNT", type=int)
    parser.add_argument("tokens", metavar="TOKEN", type=int, nargs="+")
    options = parser.parse_args()
    if not os.path.isfile(options.path):
        sys.exit(f"{options.path}: no such file")
    print(*generate(options.path, options.count, options.tokens))


if __name__ == "__main__":
    main()
