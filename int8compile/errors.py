"""Every exception and warning of int8compile. Each message names the thing, what is allowed and what to do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """A few of some names, and how many there are, for messages."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)} in all)" if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for messages that go on; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


class Int8CompileError(Exception):
    """Base class: `except int8compile.Int8CompileError` catches everything this package raises on purpose."""


class ConfigError(Int8CompileError, ValueError):
    """An option has an unknown name or a value outside what is allowed."""


class BadWeightError(Int8CompileError, ValueError):
    """A weight cannot be quantized: it holds NaN or Inf, or has no data (meta device)."""


class FreedWeightError(Int8CompileError, RuntimeError):
    """A float weight was used after `free_weights=True` gave its memory back."""


class CheckpointError(Int8CompileError, ValueError):
    """A checkpoint is damaged, of another version, or does not fit the model."""


class Int8WeightError(Int8CompileError, RuntimeError):
    """The float weight of an int8 module was used, which is not there."""


class ExportError(Int8CompileError, RuntimeError):
    """A model cannot be exported, or not all of it to int8."""


class PackageError(Int8CompileError, ValueError):
    """A file is not an exported model, is damaged or edited, too new, or cannot run on this machine."""


class InputError(Int8CompileError, ValueError):
    """An operator was called with a dtype, shape or argument it does not take."""


class ModelError(Int8CompileError, ValueError):
    """A model cannot be found, loaded or converted, or no inputs can be made up for it."""


class KernelBuildError(Int8CompileError, RuntimeError):
    """The CPU kernel cannot be compiled or loaded: no compiler, one that fails, or no folder to write to."""


class Int8Warning(UserWarning):
    """Something runs in float that the user probably expected in int8."""


@functools.cache
def warn_once(message: str) -> None:
    """Warn with `Int8Warning`, unless the same was said before."""
    warnings.warn(message, Int8Warning, stacklevel=2)
