"""Libraries whose models save and load themselves; they are told when a model becomes int8 or float again.

`int8compile.integrations` registers the libraries here, so that this folder imports none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from int8compile.config import Int8Config


class Integration(Protocol):
    """A module that connects a library with int8compile, with these functions."""

    def attach(self, model: Any, config: Int8Config, *, nested: bool = False) -> None:
        """Have a model that now has int8 modules save and load as int8."""

    def detach(self, model: Any) -> None:
        """Have a model that is float again save and load as before."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A library.

    Attributes:
        base: The module and the name of its base class for models that save themselves.
        integration: Imports its integration. Called only where the library is imported.
        experts: Registers int8 experts with the library, and returns their value of `config._experts_implementation`.
            None where it has no such interface.
    """

    base: tuple[str, str]
    integration: Callable[[], Integration]
    experts: Callable[[], str] | None = None


# Libraries by name.
LIBRARIES: dict[str, Library] = {}


def experts_implementation() -> str:
    """Register int8 experts with their library, and return the name of their implementation in a model's config."""
    (prepare,) = (library.experts for library in LIBRARIES.values() if library.experts is not None)
    return prepare()
