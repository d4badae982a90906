"""Shared by every test: a fixed seed, the hypothesis profile, and GPU tests skipped by name where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import int8compile  # noqa: F401 - registers the backend where the package is not installed

try:
    import hypothesis
except ImportError:  # where nothing can be installed; the files that need it skip themselves
    pass
else:
    # derandomize: the same examples on every machine. No deadline: the first call of an operator is slow.
    hypothesis.settings.register_profile("int8compile", deadline=None, derandomize=True, max_examples=25)
    hypothesis.settings.load_profile("int8compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            # The name is part of the reason: pytest's summary folds equal reasons into one line.
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    # Tests share code objects (a model's forward), and each compiles them again: without this they run into Dynamo's
    # recompile limit.
    torch._dynamo.reset()
