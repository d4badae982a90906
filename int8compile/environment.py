"""Environment variables that switch a part of the package on or off."""

from __future__ import annotations

import os

from int8compile.errors import ConfigError


def is_on(name: str, *, default: bool, off: str = "") -> bool:
    """Return whether a variable is 1, or its default where it is not set.

    Args:
        name: The variable.
        default: Its value where it is not set.
        off: The effect of 0, for the message.

    Raises:
        ConfigError: Its value is neither 0 nor 1.
    """
    value = os.environ.get(name, str(int(default)))
    if value not in ("0", "1"):
        allowed = f"1 (the default) and 0{off and f', for {off}'}" if default else "0 (the default) and 1"
        raise ConfigError(f"{name}={value!r}: allowed are {allowed}")
    return value == "1"
