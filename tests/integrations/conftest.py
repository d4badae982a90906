"""Fixtures of the tests of integrations."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def float_folder(tmp_path: Path) -> str:
    """Return the folder of a saved float model."""
    from tests.helpers.int8_transformers import llama, saved

    return saved(llama(), tmp_path / "float")
