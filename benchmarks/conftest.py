"""Options of the benchmarks, and the content of their result file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from int8compile.app import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("int8compile")
    group.addoption("--smoke", action="store_true", help="use tiny sizes, to show in seconds that the benchmarks run")
    group.addoption("--every-row", action="store_true", help="sweep every M from 1 to 600 in bench_linear")


def is_smoke(config: pytest.Config) -> bool:
    """Return whether the benchmarks only have to show that they run."""
    return bool(config.getoption("smoke") or config.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def smoke(pytestconfig: pytest.Config) -> bool:
    """Return `is_smoke` of this run."""
    return is_smoke(pytestconfig)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep only what `benchmarks.report` reads, without the names of machines and folders.

    pytest-benchmark's own files hold every single time and are a thousand times as large.
    """
    commit = output_json["commit_info"]
    kept = [
        {
            "name": one["name"],
            "group": one["group"],
            "rounds": one["stats"]["rounds"],
            "median": one["stats"]["median"],
            **one["extra_info"],
        }
        for one in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json.update(
        machine=machine.facts(),
        commit={"id": commit.get("id"), "changed_since": commit.get("dirty")},
        benchmarks=kept,
    )
