"""A kernel call as data: what runs on a GPU is what the compile-only checks compile without one."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton's names of types.
_TYPES = {
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


@dataclasses.dataclass(frozen=True)
class Programs:
    """How many programs a kernel has in one direction, for any number of rows: `ceil(M / rows) * times`.

    Attributes:
        times: Programs for each group of rows; all of them where `rows` is 0.
        rows: Rows of a group; 0 where M does not matter.
    """

    times: int = 1
    rows: int = 0

    def of(self, m: int) -> int:
        """The number for M rows."""
        return math.ceil(m / self.rows) * self.times if self.rows else self.times


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: The function, as `triton.jit` made it.
        m: Rows.
        programs: Programs in each direction.
        args: Its arguments by name, in order, without the constants.
        constants: Its compile-time constants by name.
        num_warps: Warps of a program.
        num_stages: Steps of the main loop that are in flight.
    """

    kernel: Any
    m: int
    programs: tuple[Programs, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """Programs in each direction for these rows."""
        return tuple(direction.of(self.m) for direction in self.programs)

    def run(self) -> Any:
        """Starts the kernel on the current stream; nothing where the grid is empty.

        Returns:
            Triton's compiled kernel; None in its interpreter.
        """
        if 0 in self.grid:
            return None
        settle(self.kernel)
        # Multiplications and additions are rounded one by one, as the reference does.
        return self.kernel[self.grid](
            **self.args,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=False,
        )

    def prepare(self) -> Prepared | None:
        """Runs, and returns how to run again with other tensors of the same sizes and alignment.

        Returns:
            None where nothing was compiled: in Triton's interpreter.
        """
        compiled = self.run()
        return None if compiled is None else Prepared(self, compiled)

    def compile(self, target: GPUTarget) -> Any:
        """Compiles it for a GPU that need not be there; tensors may be on the meta device.

        Returns:
            Triton's compiled kernel: `asm["ptx"]` or `asm["amdgcn"]`, `metadata.shared`.
        """
        settle(self.kernel)
        names = self.kernel.arg_names
        constants = dict(self.constants) | {name: value for name, value in self.args.items() if value is None}
        signature = {name: "constexpr" if name in constants else _type(self.args[name]) for name in names}
        # What Triton specializes on when it launches: factors of 16, except in sizes that change from call to call.
        fixed = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        attrs = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in fixed and _is_aligned(self.args.get(name))
        }
        source = ASTSource(self.kernel, signature, constants, attrs)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        return triton.compile(source, target=target, options=options)


def settle(function: Any) -> None:
    """Have Triton make the cache keys of the functions that a kernel calls before the kernel's own.

    Up to Triton 3.6 a kernel's key depends on whether these had theirs already (`DependenciesFinder._update_hash`), so
    on which kernels the process had started before: a compiled kernel was not found again, and was compiled anew.
    """
    # In the interpreter nothing is compiled. (Not functools.cache: hashing a function would make its key too early.)
    if not isinstance(function, triton.JITFunction) or function.hash is not None:
        return
    for name in function.fn.__code__.co_names:
        settle(function.fn.__globals__.get(name))
    _ = function.cache_key


class Prepared:
    """A call that was made once: what is left to do is to hand over the tensors.

    Triton looks at every argument of every call to find the compiled kernel for it, which takes as long as a small
    kernel does. Here the caller knows that nothing but the tensors has changed.
    """

    def __init__(self, launch: Launch, compiled: Any) -> None:
        """Takes a call and the compiled kernel that it ran."""
        values = {**launch.args, **launch.constants}
        names = launch.kernel.arg_names
        # Constants are handed over too, as Triton does.
        self._values = [values[name] for name in names]
        self._tensors = [i for i, value in enumerate(self._values) if isinstance(value, Tensor)]
        for i in self._tensors:  # They would be kept in memory.
            self._values[i] = None
        self._compiled = compiled
        self._grid = (*launch.grid, 1, 1)[:3]

    def run(self, *tensors: Tensor) -> None:
        """Starts the kernel on the current stream.

        Args:
            *tensors: In the order of the kernel's arguments.
        """
        values = self._values.copy()
        for i, tensor in zip(self._tensors, tensors, strict=True):
            values[i] = tensor
        self._compiled[self._grid](*values)


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
