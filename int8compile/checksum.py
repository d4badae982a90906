"""SHA-256 of tensors, which checkpoints store and which loading compares."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

# Hashing releases Python's lock; more threads than this would wait for memory.
THREADS = min(4, os.cpu_count() or 1)


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values in row order, in hexadecimal.

    Args:
        tensor: A dense tensor on any device, with data.
    """
    tensor = tensor.detach().cpu().contiguous()
    data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
    return hashlib.sha256(data).hexdigest()


def sha256_of_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of several tensors by their names, computed in threads; a shared tensor is read once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        found = dict(zip(distinct, pool.map(sha256, distinct.values()), strict=True))
    return {name: found[id(tensor)] for name, tensor in tensors.items()}
