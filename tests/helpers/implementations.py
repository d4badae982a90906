"""Implementations of the operators: the definition in PyTorch, and each variant of the CPU kernel."""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from int8compile import cpu


def _variants() -> tuple[str, ...]:
    with warnings.catch_warnings():
        # Tests are skipped where the kernel cannot be compiled; a warning here would stop pytest from collecting.
        warnings.simplefilter("ignore")
        return cpu.variants()


VARIANTS = _variants()
DEFINITION = "definition"
IMPLEMENTATIONS = (DEFINITION, *VARIANTS)

needs_kernel = pytest.mark.skipif(not VARIANTS, reason=f"no CPU kernel: {cpu.failure() or 'it is switched off'}")
every_implementation = pytest.mark.parametrize("by", IMPLEMENTATIONS)
every_variant = pytest.mark.parametrize("by", VARIANTS or [pytest.param("", marks=needs_kernel)])

# A dispatch key without our kernels: the definition runs there, whatever device the tensors are on.
_NO_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


@contextlib.contextmanager
def using(variant: str) -> Iterator[None]:
    """Run a variant of the kernel inside the context."""
    before = cpu.variant()
    cpu.use_variant(variant)
    try:
        yield
    finally:
        cpu.use_variant(before)


def operator(name: str, by: str) -> Callable[..., Any]:
    """Return an operator of the library `int8compile`, run by one of `IMPLEMENTATIONS`."""
    op = getattr(torch.ops.int8compile, name).default

    def run(*args: Any, **kwargs: Any) -> Any:
        if by == DEFINITION:
            return op.redispatch(_NO_KERNEL, *args, **kwargs)
        with using(by):
            return op(*args, **kwargs)

    return run


def profiled(call: Callable[[], object]) -> collections.Counter[str]:
    """Count the calls of each operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return collections.Counter(event.name for event in profile.events())
