"""Notice that a tensor has changed: cheaply at every call, and reliably whenever something is compiled.

PyTorch counts writes to a tensor (`_version`), but not `p.data.copy_()`, PEFT's merges, averages of weights and fused
optimizers. Therefore a few words of its memory are compared at every call, and all of it when something is compiled.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

# Words of 8 bytes compared at every call: 8 take 0.1 us on a CPU, a few hundred times per decoded token.
SAMPLES = 8
# Words that `fingerprint` reads together: 1 MB on a CPU, which fits its cache.
BLOCK = 2**17
BLOCKS_ON_A_GPU = 128
_MODULUS = 2**64

is_non_overlapping_and_dense = torch.ops.aten.is_non_overlapping_and_dense.default


class Snapshot:
    """The state of a tensor when it was read.

    On a CPU, 8 words spread over the memory are part of the state. They show any update of the whole tensor; an update
    of a few elements is seen only if PyTorch counts it. Memory on a GPU is not read: the host would wait for it.

    Attributes:
        fingerprint: The fingerprint of all bytes.
    """

    __slots__ = ("_address", "_counted", "_sample", "_storage", "_version", "_words", "fingerprint")

    def __init__(self, tensor: Tensor) -> None:
        """Take the state before the tensor is used, so that a later change is seen. It keeps no memory alive."""
        storage = tensor.untyped_storage()
        self._storage = weakref.ref(storage)
        # PyTorch does not count writes to inference tensors.
        self._counted = not tensor.is_inference()
        self._version = tensor._version if self._counted else 0
        self._address = tensor.data_ptr()
        self._words = _words(tensor)
        self._sample: bytes | None = self._words.tobytes()
        self.fingerprint = fingerprint(tensor)

    def outdate(self) -> None:
        """Make the state match no tensor any more; its place in memory stays known."""
        self._sample = None

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in this state, as far as a call can tell."""
        # This reference keeps the memory while it is read: another thread may replace `.data`.
        storage = tensor.untyped_storage()
        return (
            storage is self._storage()
            and tensor.data_ptr() == self._address
            and (not self._counted or tensor._version == self._version)
            and self._words.tobytes() == self._sample
        )

    def same_memory(self, other: Snapshot) -> bool:
        """Return whether two states are of the same place in memory, whatever its values."""
        return self._storage() is other._storage() and self._address == other._address


def fingerprint(tensor: Tensor) -> int:
    """Return 64 bits that depend on the value and the place of every byte of a tensor.

    They are sums of words times odd random numbers, modulo 2**64. One changed word always changes the result, several
    changed words with a probability of 1 - 2**-64. It takes one pass over memory; on a GPU the host waits for it.
    """
    with torch.inference_mode(False), torch.no_grad():
        words, rest = _integers(tensor.detach())
        sums = list(_sums(words))
        found = torch.cat([*sums, rest.to(torch.int64)]).tolist() if sums or len(rest) else []
    result = 0
    for value in found:
        result = (result * 0x9E3779B97F4A7C15 + value) % _MODULUS
    return result


def _words(tensor: Tensor) -> memoryview:
    """Return words spread over a tensor's memory, without a copy; none where it may not be read."""
    if tensor.device.type != "cpu" or not is_non_overlapping_and_dense(tensor) or tensor.nbytes < 8:
        return memoryview(b"")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        return memoryview(b"")  # Its memory was released.
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    words = memoryview(memory).cast("B")[: tensor.nbytes // 8 * 8].cast("Q")
    # An odd step does not stay in one column of a matrix.
    step = max(1, len(words) // SAMPLES) | 1
    return words[step // 2 :: step]


def _integers(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor's bytes in the order of memory, as int64, and the bytes behind the last whole int64."""
    if not is_non_overlapping_and_dense(tensor):
        tensor = tensor.contiguous()
    raw = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole]
    if words.storage_offset() % 8:
        words = words.clone()
    return words.view(torch.int64), raw[whole:]


def _sums(words: Tensor) -> Iterator[Tensor]:
    factors = _factors(words.device)
    whole = len(words) // BLOCK
    step = BLOCKS_ON_A_GPU if words.device.type != "cpu" else 1
    for begin in range(0, whole, step):
        blocks = words[begin * BLOCK : min(begin + step, whole) * BLOCK].view(-1, BLOCK)
        yield (blocks * factors).sum(dim=1)
    if len(words) % BLOCK:
        left = words[whole * BLOCK :]
        yield (left * factors[: len(left)]).sum(dim=0, keepdim=True)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Return odd random numbers, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (BLOCK,), generator=generator, dtype=torch.int64)
    return (numbers | 1).to(device)
