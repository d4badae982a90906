"""Libraries whose models save and load themselves, and what they are told of models that become int8 or float again.

What knows a library registers it here, so that nothing of this folder imports one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from int8compile.config import Int8Config


class Integration(Protocol):
    """What connects a library with int8compile: a module with these functions."""

    def attach(self, model: Any, config: Int8Config, *, nested: bool = False) -> None:
        """Have a model, which has int8 modules now, save and load as int8."""

    def detach(self, model: Any) -> None:
        """Have a model, which is float again, save and load as before."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A library.

    Attributes:
        base: The module and the name of its base class of models that save themselves.
        integration: Imports what connects it. Called only where the library is imported.
        experts: Has its interface for experts run int8 ones; returns the value of `config._experts_implementation` for
            them. None where it has no such interface.
    """

    base: tuple[str, str]
    integration: Callable[[], Integration]
    experts: Callable[[], str] | None = None


# By their names.
LIBRARIES: dict[str, Library] = {}


def experts_implementation() -> str:
    """Have int8 experts run, and return what their implementation is called in a model's config."""
    (prepare,) = (library.experts for library in LIBRARIES.values() if library.experts is not None)
    return prepare()
