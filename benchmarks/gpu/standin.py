r"""A stand-in for a GPU of compute capability 9.0: it compiles kernels and runs nothing. The CPU takes its place.

As a pytest plugin, it makes the tests that need a GPU compile their kernels without a GPU. The kernels write no
results, so asserts must be switched off:

    PYTHONOPTIMIZE=1 python -m pytest tests/triton_kernels/test_triton_contract.py -m gpu -p benchmarks.gpu.standin \
        --assert=plain -W ignore
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

CAPABILITY, MULTIPROCESSORS, SHARED_BYTES = (9, 0), 132, 227 * 1024
# Functions that make tensors, also on a GPU.
FACTORIES = ("arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")


class Launcher:
    """A launcher that starts nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        """Take a compiled kernel, as Triton passes it to a launcher."""

    def __call__(self, *given: Any) -> None:
        """Do nothing."""


class Driver:
    """Triton's driver of the stand-in, with a class of launchers."""

    def __init__(self, launcher: Callable[[Any, Any], Any] = Launcher) -> None:
        self.launcher_cls = launcher
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def load_binary(self, *_: Any) -> tuple[str, int, int, int, int]:
        """Return a module, a function, registers, spills and threads, without loading anything."""
        return "module", 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:

        return {"max_shared_mem": SHARED_BYTES}


def take_over() -> None:
    """Make this process treat the CPU as the GPU until it ends."""
    import triton

    from int8compile import backend
    from int8compile.exporting import exporter
    from int8compile.triton_kernels import operators, plan, tables

    triton.runtime.driver.set_active(Driver())
    sm_90: Any = operators
    sm_90._index = lambda tensor: 0
    sm_90._on = lambda device: operators._HERE
    sm_90.architecture = lambda index: tables.ARCHITECTURES["sm_90"]
    sm_90.multiprocessors = lambda index: MULTIPROCESSORS
    library = torch.library.Library("int8compile", "IMPL")
    for name, function in operators._OPERATORS.items():
        library.impl(name, function, "CPU", allow_override=True)
    _KEPT.append(library)
    # Graphs and packages are lowered for it, too.
    backend._any_on = lambda kind, parameters: kind == "cuda"
    gpu = plan.Gpu("sm_90", tables.ARCHITECTURES["sm_90"], MULTIPROCESSORS)
    exports: Any = exporter
    exports._gpu_of = lambda device: (gpu, "")
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensors: Any = Tensor
    tensors.to = _on_cpu(Tensor.to)
    tensors.cuda = lambda self, *_, **__: self
    testing: Any = torch.testing
    testing.assert_close = lambda *_, **__: None  # There are no results to compare.
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.is_current_stream_capturing = lambda: False
    cuda.synchronize = lambda device=None: None
    cuda.CUDAGraph = _Graph
    cuda.graph = lambda graph, **_: contextlib.nullcontext()


def pytest_configure(config: pytest.Config) -> None:
    """Take over before test modules are imported."""
    take_over()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems() -> Iterator[None]:
    """Pretend that there is a GPU while `tests/conftest.py` selects tests, but not later, when PyTorch would use it."""
    found, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        return (yield)
    finally:
        torch.cuda.is_available = found


_KEPT: list[Any] = []


class _Graph:
    def replay(self) -> None:
        """Do nothing."""


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_place, args), **{name: _place(value) for name, value in kwargs.items()})

    return call


def _place(value: Any) -> Any:
    return "cpu" if value == "cuda" or (isinstance(value, torch.device) and value.type == "cuda") else value
