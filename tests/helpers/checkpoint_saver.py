"""Fork children that save two versions of a model in turns, to be killed; test_checkpoint_folders.py runs this.

Importing torch takes seconds, forking takes milliseconds. A line on standard input starts a child. The line holds a
step number and the folder to save to; the child kills itself before that step (opening, renaming or deleting a file),
or never for 0. The answer is the child's process ID. The next line waits for the child to end.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading

import torch
from tqdm import tqdm

import int8compile
from tests.helpers.models import Stack

# The two versions have different numbers of shards.
SHARD_BYTES = (2**12, 2**13)
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def version(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = Stack()
    int8compile.quantize_(model, progress=False)
    return model


def die_before(step: int) -> None:
    steps = itertools.count(1)

    def count(event: str, _: object) -> None:
        if event in STEPS and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def main() -> None:
    torch.set_num_threads(1)  # A forked process has only the thread that forked it.
    versions = [version(0), version(1)]
    for line in sys.stdin:
        step, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            # tqdm's lock is shared by forked processes; a killed process would keep it.
            tqdm.set_lock(threading.RLock())
            if int(step):
                die_before(int(step))
            for number in itertools.count(1):
                which = number % 2
                int8compile.save(versions[which], folder, max_shard_bytes=SHARD_BYTES[which], progress=False)
        print(child, flush=True)
        sys.stdin.readline()
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
