"""How kernels are started, with a driver that keeps what it is given instead of a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import triton

from benchmarks.gpu.standin import Driver
from int8compile.ops import quantize_weight, quantized, rotation_of
from int8compile.triton_kernels import operators
from int8compile.triton_kernels.launch import settle
from int8compile.triton_kernels.tables import ARCHITECTURES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets, nothing is started"
)


# The kernels that were started: name, grid and arguments. One list, since Triton keeps what it has compiled, launchers
# and all, for as long as the process lives.
STARTED: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []


class Launcher:
    """Notes what it is to start."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *given: Any) -> None:
        # Three sizes of the grid, six things about the launch, the arguments.
        STARTED.append((self.name, given[:3], given[9:]))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    driver = Driver(Launcher)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    monkeypatch.setattr(operators, "_index", lambda tensor: 0)
    monkeypatch.setattr(operators, "_on", lambda device: operators._HERE)
    monkeypatch.setattr(operators, "architecture", lambda device: ARCHITECTURES["sm_90"])
    monkeypatch.setattr(operators, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(operators, "_prepared", {})
    yield
    triton.runtime.driver._active = before


def called(m: int, *, bias: bool = True, threshold: float = 6.0, rotated: bool = True) -> list[Any]:
    """What one linear starts, and with which tensors."""
    STARTED.clear()
    d = rotation_of(torch.ones(128)) if rotated else None
    qweight, scale = quantize_weight(torch.randn(64, 128), d)
    x = torch.randn(m, 128, dtype=torch.bfloat16)
    q, rows = operators._quantize_rows(x, d, threshold)
    addend = torch.randn(64) if bias else None
    y = operators._quantized_linear(q, rows, qweight, scale, addend, quantized.NONE, 0, 0, torch.bfloat16)
    assert y.shape == (m, 64)
    tensors = [each for each in (x, q, rows, qweight, scale, y, d, addend) if each is not None]
    places = {tensor.data_ptr(): i for i, tensor in enumerate(tensors)}
    return [
        (name, grid, [places.get(each.data_ptr(), each.shape) if isinstance(each, Tensor) else each for each in given])
        for name, grid, given in STARTED
    ]


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "kernel"), [(1, "gemv"), (2, "gemm"), (20, "gemm"), (64, "gemm")])
def test_a_prepared_call_is_what_triton_starts(m: int, kernel: str, bias: bool, threshold: float, driver: None) -> None:
    """The first call goes through Triton, the others past its look at every argument, with the same arguments."""
    first = called(m, bias=bias, threshold=threshold)
    assert [name for name, _, _ in first] == ["quantize_rows", kernel]
    assert len(operators._prepared) == 2
    assert called(m, bias=bias, threshold=threshold) == first
    assert len(operators._prepared) == 2


def test_what_a_call_depends_on_is_prepared_apart(driver: None) -> None:
    kinds = [{"m": 1}, {"m": 2}, {"m": 1, "bias": False}, {"m": 1, "threshold": 5.0}, {"m": 1, "rotated": False}]
    # The quantization does not depend on the bias, nor the product on what was quantized.
    for made, kind in zip((2, 4, 5, 6, 7), kinds, strict=True):
        called(**kind)  # type: ignore[arg-type]
        assert len(operators._prepared) == made


def test_many_rows_are_not_prepared(driver: None) -> None:
    """There are too many sizes, and the host has time."""
    names = [name for name, _, _ in called(300)]
    assert names == ["quantize_rows", "gemm"]
    assert not operators._prepared


def test_tensors_that_begin_anywhere_are_not_prepared(driver: None) -> None:
    """Kernels are compiled for tensors that begin at multiples of 16 bytes."""
    x = torch.randn(129, dtype=torch.bfloat16)[1:].view(1, 128)
    assert x.data_ptr() % 16
    for _ in range(2):
        operators._quantize_rows(x, None, 6.0)
    assert not operators._prepared
    # And not mistaken for one that was prepared with another beginning.
    operators._quantize_rows(torch.randn(1, 128, dtype=torch.bfloat16), None, 6.0)
    assert len(operators._prepared) == 1
    operators._quantize_rows(x, None, 6.0)
    assert len(operators._prepared) == 1


def test_a_prepared_call_keeps_no_tensor(driver: None) -> None:
    called(1)
    kept = [value for prepared in operators._prepared.values() for value in prepared._values]
    assert not [value for value in kept if isinstance(value, Tensor)]


@triton.jit
def innermost(x):
    return x * 2


@triton.jit
def inner(x):
    return innermost(x) + 1


@triton.jit
def outer(x):
    return inner(x) + innermost(x)


def test_a_kernels_key_is_made_after_those_of_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Triton 3.6 it depended on that, so on what a process had started before."""
    made: list[str] = []
    key = triton.JITFunction.cache_key

    def watched(self: Any) -> str:
        if self.hash is None:
            made.append(self.fn.__name__)
        return str(key.fget(self))

    monkeypatch.setattr(triton.JITFunction, "cache_key", property(watched))
    settle(outer)
    assert made == ["innermost", "inner", "outer"]
    settle(outer)
    assert len(made) == 3
    settle(print)  # Anything else that a kernel names.
