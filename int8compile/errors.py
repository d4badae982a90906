"""The exceptions and warnings of int8compile. A message says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """Return the first three of some names, and how many there are, for messages."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)} in all)" if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside another; the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str], form: str = " ({})") -> str:
    """Return a question for messages that names the known name nearest to an unknown one; "" if none is near.

    Args:
        name: The unknown name.
        known: The names that are allowed.
        form: The text around the question.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return form.format(f"did you mean {near[0]!r}?") if near else ""


class Int8CompileError(Exception):
    """The base class: `except int8compile.Int8CompileError` catches every error that this package raises itself."""


class ConfigError(Int8CompileError, ValueError):
    """An option has an unknown name or a value outside what is allowed."""


class BadWeightError(Int8CompileError, ValueError):
    """A weight cannot be quantized: it holds NaN or Inf, or has no data (meta device)."""


class FreedWeightError(Int8CompileError, RuntimeError):
    """A float weight was used after `free_weights=True` gave its memory back."""


class CheckpointError(Int8CompileError, ValueError):
    """A checkpoint is damaged, is of another version, or does not fit the model."""


class Int8WeightError(Int8CompileError, RuntimeError):
    """The float weight of an int8 module was used, which does not exist."""


class ExportError(Int8CompileError, RuntimeError):
    """A model cannot be exported, or a part of it would stay in float."""


class PackageError(Int8CompileError, ValueError):
    """A file is not an exported model, is damaged, edited or too new, or cannot run on this machine."""


class InputError(Int8CompileError, ValueError):
    """An operator was called with a dtype, shape or argument it does not take."""


class ModelError(Int8CompileError, ValueError):
    """A model cannot be found, loaded or converted, or no example inputs can be made for it."""


class KernelBuildError(Int8CompileError, RuntimeError):
    """The CPU kernel cannot be compiled or loaded: no compiler, a compiler that fails, or no writable folder."""


class Int8Warning(UserWarning):
    """A linear runs in float that the user probably expected in int8."""


@functools.cache
def warn_once(message: str) -> None:
    """Warn with `Int8Warning`, once for each message."""
    warnings.warn(message, Int8Warning, stacklevel=2)
