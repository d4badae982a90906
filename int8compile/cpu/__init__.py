"""The CPU kernel: C++ that is compiled at its first use, and loaded once per process.

The kernel implements operators for the CPU (`ops.signatures.REGISTERED`). Without it they run their PyTorch definition.
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
from int8compile.environment import is_on
from int8compile.errors import ConfigError, Int8Warning, KernelBuildError

log = logging.getLogger(__name__)


class Library:
    """The kernel library, loaded.

    Attributes:
        built: Its files, and how they were made.
        variants: The kernel variants that this machine can run, fastest first.
    """

    def __init__(self, built: build.Built) -> None:
        """Load the library, which registers its operators.

        Raises:
            OSError: The library cannot be loaded.
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
        """The compiler macros of all CPU features that packages check, whether this CPU has them or not."""
        return tuple(self._functions.int8compile_features().decode().split())

    @property
    def variant(self) -> str:
        """The name of the variant that runs."""
        return str(self._functions.int8compile_variant().decode())

    def use_variant(self, name: str) -> None:
        """Run a variant from now on, in all threads. The results are the same, bit for bit.

        Raises:
            ConfigError: The variant is unknown, or this machine cannot run it.
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
    """Return the library. The first call loads it, and compiles it if the cache has none.

    Returns:
        None if there is no kernel: `INT8COMPILE_CPU_KERNEL=0` is set, or the library cannot be compiled or loaded,
        which gives one `Int8Warning` per process.

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
    """Return why `load` found no kernel; "" if it found one, or was not called."""
    return _failure


def switched_off() -> bool:
    """Return whether the environment turns the kernel off.

    Raises:
        ConfigError: The environment variable has a value that is not allowed.
    """
    return not is_on("INT8COMPILE_CPU_KERNEL", default=True, off="no CPU kernel")


def available() -> bool:
    """Return whether there is a kernel; load it if that has not been tried."""
    return load() is not None


def variants() -> tuple[str, ...]:
    """Return the kernel variants that this machine can run, fastest first; none if there is no kernel."""
    library = load()
    return library.variants if library else ()


def variant() -> str:
    """Return the name of the kernel variant that runs; "" if there is no kernel."""
    library = load()
    return library.variant if library else ""


def use_variant(name: str) -> None:
    """Run a kernel variant from now on, in all threads. The results are the same, bit for bit.

    Raises:
        ConfigError: The variant is unknown, this machine cannot run it, or there is no kernel.
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
    """Load the library. A cached one that does not load is compiled again, once."""
    built = build.library()
    while True:
        try:
            return Library(built)
        except (OSError, AttributeError) as error:
            why = f"{built.path} does not load: {error.__cause__ or error}"  # torch hides the loader's error
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
