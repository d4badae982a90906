r"""A GPU of compute capability 9.0 that compiles what it is given and runs nothing: the CPU is taken for one.

As a plugin of pytest it has the tests that need a GPU start their kernels without one, which compiles them. What such
a kernel should have written is never there, so asserts must be switched off:

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
# What makes tensors, and may be asked to make them on a GPU.
FACTORIES = ("arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")


class Launcher:
    """Starts nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        """Takes a compiled kernel, as Triton gives it to a launcher."""

    def __call__(self, *given: Any) -> None:
        """See the class."""


class Driver:
    """Triton's driver of that GPU.

    Args:
        launcher: Takes the place of `Launcher`.
    """

    def __init__(self, launcher: Callable[[Any, Any], Any] = Launcher) -> None:
        self.launcher_cls = launcher
        self.utils = self

    def get_current_target(self) -> Any:
        """The target that Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        """Its only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Its only stream."""
        return 0

    def load_binary(self, *_: Any) -> tuple[str, int, int, int, int]:
        """Module, function, registers, spills, threads: nothing is loaded."""
        return "module", 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """The limits that Triton compares a kernel's needs with."""
        return {"max_shared_mem": SHARED_BYTES}


def take_over() -> None:
    """Have this process take the CPU for the GPU, until it ends."""
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
    # Graphs are lowered for it, and so are packages.
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
    testing.assert_close = lambda *_, **__: None  # There are no results. (Asserts are switched off.)
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
    """Have `tests/conftest.py` keep the tests that need a GPU; later, PyTorch itself must not look for one."""
    found, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        return (yield)
    finally:
        torch.cuda.is_available = found


_KEPT: list[Any] = []


class _Graph:
    def replay(self) -> None:
        """Runs nothing."""


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_place, args), **{name: _place(value) for name, value in kwargs.items()})

    return call


def _place(value: Any) -> Any:
    return "cpu" if value == "cuda" or (isinstance(value, torch.device) and value.type == "cuda") else value
