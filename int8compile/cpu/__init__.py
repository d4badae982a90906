"""The CPU kernel: C++ that is compiled at its first use, and loaded once per process.

It implements the operators `int8compile::packed_*` for the CPU. Without it they run their PyTorch definition.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import warnings
from pathlib import Path

import torch

# Defines the operators that the library implements.
import int8compile.ops  # noqa: F401
from int8compile.cpu import build
from int8compile.errors import ConfigError, Int8Warning, KernelBuildError

log = logging.getLogger(__name__)


class Library:
    """The kernel library, loaded.

    Attributes:
        built: Where it is and how it was made.
        variants: The kernel variants that this machine can run, fastest first.
    """

    def __init__(self, built: build.Built) -> None:
        """Loads it, which registers its operators.

        Raises:
            OSError: It cannot be loaded.
        """
        torch.ops.load_library(built.path)
        self.built = built
        self._functions = ctypes.CDLL(str(built.path))
        for name in ("int8compile_variants", "int8compile_variant", "int8compile_features"):
            getattr(self._functions, name).restype = ctypes.c_char_p
        self._functions.int8compile_use_variant.argtypes = [ctypes.c_char_p]
        self.variants = tuple(self._functions.int8compile_variants().decode().split())

    @property
    def path(self) -> Path:
        """The library's file."""
        return self.built.path

    @property
    def features(self) -> tuple[str, ...]:
        """The compiler macros of what code may use of a CPU and a package checks; whether this one has it or not."""
        return tuple(self._functions.int8compile_features().decode().split())

    @property
    def variant(self) -> str:
        """The variant that runs."""
        return str(self._functions.int8compile_variant().decode())

    def use_variant(self, name: str) -> None:
        """Has a variant run from now on, in all threads. The results are the same, bit for bit.

        Raises:
            ConfigError: It is unknown, or this machine cannot run it.
        """
        if not self._functions.int8compile_use_variant(name.encode()):
            raise ConfigError(
                f"kernel variant {name!r} cannot be used; this machine and this build have {', '.join(self.variants)}"
            )


_lock = threading.Lock()
_library: Library | None = None
_failure = ""
_isa_read = False


def load() -> Library | None:
    """The library, compiled if it is not in the cache yet, and loaded at the first call.

    Returns:
        None where there is no kernel: `INT8COMPILE_CPU_KERNEL=0` says so, or it cannot be compiled or loaded, which
        gives one `Int8Warning` per process.

    Raises:
        ConfigError: An environment variable has a value that is not allowed.
    """
    if switched_off():
        return None
    library = _library
    if library is None and not _failure:
        library = _load_once()
    if library is not None and not _isa_read:
        _read_isa(library)
    return library


def failure() -> str:
    """Why `load` found no kernel; "" if it found one, or was not called."""
    return _failure


def switched_off() -> bool:
    """Whether the environment says that no kernel is to be used.

    Raises:
        ConfigError: It says something that is not allowed.
    """
    value = os.environ.get("INT8COMPILE_CPU_KERNEL", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"INT8COMPILE_CPU_KERNEL={value!r}: allowed are 1 (the default) and 0, for no CPU kernel")
    return value == "0"


def available() -> bool:
    """Whether the kernel is there; loads it if need be."""
    return load() is not None


def variants() -> tuple[str, ...]:
    """The kernel variants that this machine can run, fastest first; none if there is no kernel."""
    library = load()
    return library.variants if library else ()


def variant() -> str:
    """The kernel variant that runs; "" if there is no kernel."""
    library = load()
    return library.variant if library else ""


def use_variant(name: str) -> None:
    """Has a kernel variant run from now on, in all threads. The results are the same, bit for bit.

    Raises:
        ConfigError: It is unknown, this machine cannot run it, or there is no kernel.
    """
    library = load()
    if library is None:
        why = _failure or "INT8COMPILE_CPU_KERNEL=0 turns it off"
        raise ConfigError(f"kernel variant {name!r} cannot be used: there is no CPU kernel ({why})")
    library.use_variant(name)


def _load_once() -> Library | None:
    global _library, _failure
    with _lock:
        if _library is not None or _failure:
            return _library
        try:
            _library = _build_and_load()
        except KernelBuildError as error:
            _failure = str(error)
            message = (
                f"the int8 CPU kernel cannot be used: {error}. The int8 operators run through PyTorch instead: slower, "
                "with the same results. `int8compile doctor` tries again and says more; INT8COMPILE_CPU_KERNEL=0 "
                "leaves the kernel out without this warning"
            )
            warnings.warn(message, Int8Warning, stacklevel=4)
        return _library


def _build_and_load() -> Library:
    """Compiles again, once, what an earlier process compiled and this one cannot load."""
    built = build.library()
    while True:
        try:
            return Library(built)
        except (OSError, AttributeError) as error:
            why = f"{built.path} does not load: {error.__cause__ or error}"  # torch hides the loader's words
            if not built.cached:
                raise KernelBuildError(why) from error
            log.warning("%s; it will be compiled again", why)
        built = build.library(again=True)


def _read_isa(library: Library) -> None:
    global _isa_read
    if name := os.environ.get("INT8COMPILE_ISA"):
        try:
            library.use_variant(name)
        except ConfigError as error:
            raise ConfigError(f"INT8COMPILE_ISA: {error}") from None
    _isa_read = True
