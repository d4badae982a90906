"""Shared by every test: a fixed seed, the hypothesis profile, and GPU tests skipped by name where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

import int8compile  # noqa: F401 - registers the backend where the package is not installed
from tests.helpers.lowered import seen  # noqa: F401 - a fixture

try:
    import hypothesis
except ImportError:  # where nothing can be installed; the files that need it skip themselves
    pass
else:
    # derandomize: the same examples on every machine. No deadline: the first call of an operator is slow.
    hypothesis.settings.register_profile("int8compile", deadline=None, derandomize=True, max_examples=25)
    hypothesis.settings.load_profile("int8compile")


# Triton reads it when it is imported: in a process that interprets kernels none is compiled or runs on a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this process cannot run; where there is no GPU, its tests are skipped by name."""
    left_out = [item for item in items if item.get_closest_marker("gpu" if INTERPRETED else "interpreted")]
    config.hook.pytest_deselected(items=left_out)
    apart = set(left_out)
    items[:] = [item for item in items if item not in apart]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            # The name is part of the reason: pytest's summary folds equal reasons into one line.
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs a CUDA GPU"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """End a worker whose GPU was broken by a test: every test after it would fail, and none of them names the one.

    pytest-xdist reports the test that a worker ended at, and starts another.
    """
    yield
    if item.get_closest_marker("gpu") and torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid} broke the GPU's context: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    # Tests share code objects (a model's forward), and each compiles them again: without this they run into Dynamo's
    # recompile limit.
    torch._dynamo.reset()
