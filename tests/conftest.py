"""Shared by all tests: a fixed seed, the hypothesis profile, and a skip by name for GPU tests where there is no GPU."""

from __future__ import annotations

import os

import pytest

# Threads of several test processes share the cores: a thread that waits must not spin. libgomp reads this when torch is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import int8compile  # noqa: F401 - registers the backend where the package is not installed

# Failed comparisons in helpers are explained like those in tests.
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.broken_gpu import pytest_runtest_teardown  # noqa: E402, F401 - a hook
from tests.helpers.interpreter import INTERPRETED  # noqa: E402
from tests.helpers.lowered import seen  # noqa: E402, F401 - a fixture

try:
    import hypothesis
except ImportError:  # Hypothesis may be missing; the files that need it skip themselves.
    pass
else:
    # derandomize: the same examples on every machine. No deadline: the first call of an operator is slow.
    hypothesis.settings.register_profile("int8compile", deadline=None, derandomize=True, max_examples=25)
    hypothesis.settings.load_profile("int8compile")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that this process cannot run; skip GPU tests by name where there is no GPU."""
    left_out = [item for item in items if item.get_closest_marker("gpu" if INTERPRETED else "interpreted")]
    config.hook.pytest_deselected(items=left_out)
    apart = set(left_out)
    items[:] = [item for item in items if item not in apart]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            # The reason includes the name, because pytest's summary folds equal reasons into one line.
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    # Tests share code objects (a model's forward), and each compiles them again. Without the reset they would reach
    # Dynamo's recompile limit.
    torch._dynamo.reset()
