"""Checks whether the kernels can be used; they import Triton only when called."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

from int8compile.environment import is_on

# Older versions lack the tensor descriptors and the int8 matrix products that the kernels use.
MIN_VERSION = (3, 6)

# Versions of Triton with whose Gluon the Hopper kernel is known to be correct: Gluon is experimental and its functions
# change. To add a version, check that it passes tests/triton_kernels/test_gluon_gemm.py, and on a Hopper GPU
# `python -m pytest tests/triton_kernels/test_triton_contract.py -m gpu -k gluon_gemm`.
GLUON_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))


def switched_off() -> bool:
    """Return whether the environment variable INT8COMPILE_TRITON turns the Triton kernels off.

    Raises:
        ConfigError: Its value is neither 0 nor 1.
    """
    return not is_on("INT8COMPILE_TRITON", default=True, off="no Triton kernels")


def failure() -> str:
    """Return why the Triton kernels cannot be used on this machine; "" if they can.

    Raises:
        ConfigError: See `switched_off`.
    """
    return "INT8COMPILE_TRITON=0 turns them off" if switched_off() else _missing()


def available() -> bool:
    """Return whether the kernels can be used."""
    return not failure()


def gluon_failure() -> str:
    """Return why the Hopper kernel, written in Gluon, cannot be used; "" if it can."""
    return failure() or _gluon_missing()


def load() -> bool:
    """Register the kernels as the operators' implementations on GPUs, if they can be used.

    Returns:
        Whether they can.
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
    except Exception as error:  # A broken installation can raise any exception.
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    if _numbers(triton.__version__) < MIN_VERSION:
        return f"Triton is {triton.__version__}, and {'.'.join(map(str, MIN_VERSION))} is the oldest that will do"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])
