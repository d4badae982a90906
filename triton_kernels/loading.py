"""Checks whether the kernels can be used, which import Triton only when somebody needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

from int8compile.errors import ConfigError

# Below it, descriptors of tensors and int8 matrix products are not what the kernels need.
MIN_VERSION = (3, 6)

# The versions whose Gluon the kernel for Hopper is known to be right with: Gluon is experimental, and its functions
# change. Another one belongs here when, added for a try, it passes tests/triton_kernels/test_gluon_gemm.py, and on a
# Hopper GPU `python -m pytest tests/triton_kernels/test_triton_contract.py -m gpu -k gluon_gemm`.
GLUON_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))


def switched_off() -> bool:
    """Return whether the environment says that no Triton kernel is to be used.

    Raises:
        ConfigError: It says something that is not allowed.
    """
    value = os.environ.get("INT8COMPILE_TRITON", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"INT8COMPILE_TRITON={value!r}: allowed are 1 (the default) and 0, for no Triton kernels")
    return value == "0"


def failure() -> str:
    """Return why there are no Triton kernels on this machine; "" if there are.

    Raises:
        ConfigError: See `switched_off`.
    """
    return "INT8COMPILE_TRITON=0 turns them off" if switched_off() else _missing()


def available() -> bool:
    """Return whether the kernels can be used."""
    return not failure()


def gluon_failure() -> str:
    """Return why kernels in Gluon are not used, the one for Hopper; "" if they are."""
    return failure() or _gluon_missing()


def load() -> bool:
    """Have the operators use the kernels for tensors on GPUs, from now on.

    Returns:
        Whether there are kernels.
    """
    if not available():
        return False
    importlib.import_module("int8compile.triton_kernels.operators").register()
    return True


@functools.cache
def _gluon_missing() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and Gluon cannot be interpreted"
    version = importlib.import_module("triton").__version__
    if _numbers(version) not in GLUON_VERSIONS:
        known = " and ".join(".".join(map(str, each)) for each in GLUON_VERSIONS)
        return f"Triton is {version}, and its Gluon is known to be right in {known}"
    return ""


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # A broken installation may raise anything.
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    if _numbers(triton.__version__) < MIN_VERSION:
        return f"Triton is {triton.__version__}, and {'.'.join(map(str, MIN_VERSION))} is the oldest that will do"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])
