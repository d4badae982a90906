"""Notice that a test has broken the GPU's context."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """End a worker whose GPU a test has broken.

    Every later test would fail, and none of them would name the cause. pytest-xdist reports the test at which a worker
    ended, and starts another worker.
    """
    yield
    if item.get_closest_marker("gpu") and torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid} broke the GPU's context: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)
