"""Fixtures of `tests.helpers.cpu_build`."""

from tests.helpers.cpu_build import compiler, sources  # noqa: F401
