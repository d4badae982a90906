"""Mapped files of a checkpoint: release the memory of the parts that have been read."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Iterable, Iterator


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class MappedFiles:
    """The mapped files of a checkpoint, whose memory can be released after it has been read.

    transformers keeps all files mapped until everything is loaded, so the parts that were read would stay in memory.

    Args:
        files: Their paths.
    """

    # Bytes read between two releases: often enough for memory, seldom enough for time.
    STEP = 32 * 2**20

    def __init__(self, files: Iterable[str]) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int]] | None = None
        self._read = 0

    def was_read(self, size: int) -> None:
        """Count bytes that were read and, every `STEP` bytes, release the memory of all that was read.

        The files can still be read. Writes to a private mapping would be lost, but nothing writes while a model is
        loaded. Freed memory that the C library keeps (of casts, for example) is released too.
        """
        self._read += size
        if self._read < self.STEP:
            return
        self._read = 0
        if self._ranges is None:
            self._ranges = list(self._mapped())
        for low, high in self._ranges:
            _libc().madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)
        trim = getattr(_libc(), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))

    def _mapped(self) -> Iterator[tuple[int, int]]:
        """Yield the address ranges of the files; none on systems without /proc."""
        with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                addresses, _, _, _, _, *path = line.split(maxsplit=5)
                if path and path[0].strip() in self._files:
                    low, high = addresses.split("-")
                    yield int(low, 16), int(high, 16)
