"""Whether the kernels can be used, without importing Triton before somebody needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

from int8compile.errors import ConfigError

# Below it, descriptors of tensors and int8 matrix products are not what the kernels need.
MIN_VERSION = (3, 6)


def switched_off() -> bool:
    """Whether the environment says that no Triton kernel is to be used.

    Raises:
        ConfigError: It says something that is not allowed.
    """
    value = os.environ.get("INT8COMPILE_TRITON", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"INT8COMPILE_TRITON={value!r}: allowed are 1 (the default) and 0, for no Triton kernels")
    return value == "0"


def failure() -> str:
    """Why there are no Triton kernels on this machine; "" if there are.

    Raises:
        ConfigError: See `switched_off`.
    """
    return "INT8COMPILE_TRITON=0 turns them off" if switched_off() else _missing()


def available() -> bool:
    """Whether the kernels can be used."""
    return not failure()


def load() -> bool:
    """Has the operators use the kernels for tensors on GPUs, from now on.

    Returns:
        Whether there are kernels.
    """
    if not available():
        return False
    importlib.import_module("int8compile.triton_kernels.operators").register()
    return True


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # A broken installation may raise anything.
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_VERSION:
        return f"Triton is {triton.__version__}, and {'.'.join(map(str, MIN_VERSION))} is the oldest that will do"
    return ""
