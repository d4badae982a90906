"""Kernel calls as data: `Launch` can run on a GPU, or be compiled for a GPU that is not there.

So the compile-only checks compile exactly the kernels that run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from int8compile.triton_kernels import loading

# Tensor descriptors for the copy engine, and the arguments whose memory they describe.
MATRICES = {"x_desc": "q_ptr", "weight_desc": "weight_ptr"}
# The kernel arguments that are an operator's tensors, in the order in which `Prepared.run` and launcher.cpp get them.
_QUANTIZED = ("q_ptr", "rows_ptr", "counters_ptr")
_PRODUCT = ("weight_ptr", "scale_ptr", "bias_ptr", "y_ptr")
TENSORS = {
    "quantize_rows": ("x_ptr", "d_ptr", *_QUANTIZED),
    "norm_quantize_rows": ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "d_ptr", "sum_ptr", *_QUANTIZED),
    "quantized_linear": (*_QUANTIZED, *_PRODUCT),
    "grouped_linear": ("x_ptr", "d_ptr", "ends_ptr", *_QUANTIZED, *_PRODUCT),
    "batched_linear": ("x_ptr", "d_ptr", "ends_ptr", *_QUANTIZED, *_PRODUCT),
    "weight_only_linear": ("x_ptr", "d_ptr", "X_ptr", "unit_ptr", *_PRODUCT),
}
# Triton's names of dtypes.
_TYPES = {
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
# Classes of tensor descriptors: Triton's, and Gluon's, which also holds the layout in shared memory.
DESCRIPTORS: tuple[Any, ...] = (TensorDescriptor,)
if not loading.gluon_failure():
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    DESCRIPTORS += (GluonDescriptor,)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The size of a grid in one dimension as a function of M: `ceil(M / rows) * times`.

    Attributes:
        times: Programs per group of rows, or in total where `rows` is 0.
        rows: Rows per group; 0 for a size that does not depend on M.
        most: Upper limit; 0 for none.
    """

    times: int = 1
    rows: int = 0
    most: int = 0

    def of(self, m: int) -> int:
        """Return the number of programs for M rows."""
        programs = -(-m // self.rows) * self.times if self.rows else self.times
        return min(programs, self.most) if self.most else programs


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: The function made by `triton.jit`.
        m: Number of rows.
        programs: Number of programs in each dimension of the grid.
        args: Arguments by name, in order, without the constants.
        constants: Compile-time constants by name.
        num_warps: Warps per program.
        num_stages: Steps of the main loop in flight.
        overlap: Whether the kernel may start while the one before it ends, on GPUs that support this. The kernel then
            needs the constant OVERLAP (`numerics.wait_for_inputs`).
    """

    kernel: Any
    m: int
    programs: tuple[Programs, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    overlap: bool = False

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """Return the number of programs in each dimension, for `m` rows."""
        return tuple(direction.of(self.m) for direction in self.programs)

    def run(self) -> Any:
        """Start the kernel on the current stream, unless the grid is empty.

        Returns:
            Triton's compiled kernel; None in Triton's interpreter or for an empty grid.
        """
        if 0 in self.grid:
            return None
        settle(self.kernel)
        constants, options = self._for(overlaps())
        return self.kernel[self.grid](**self.args, **constants, **options)

    def _for(self, able: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the constants and compiler options, for a GPU that can overlap kernels (`able`) or cannot."""
        # Without fusion into fma, each multiplication and addition is rounded, as in the reference.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        if "OVERLAP" not in self.kernel.arg_names:  # It never waits.
            return self.constants, options
        overlap = able and self.overlap
        if overlap:
            options["launch_pdl"] = True
        return {"OVERLAP": overlap, **self.constants}, options

    def prepare(self, tensors: Sequence[str]) -> Prepared | None:
        """Run, and return a call that can be repeated with other tensors and another number of rows.

        Args:
            tensors: The names of the tensor arguments, without scratch memory, in the order of `Prepared.run`.

        Returns:
            None if nothing was compiled: in Triton's interpreter, or for an empty grid.
        """
        compiled = self.run()
        return None if compiled is None else Prepared(self, compiled, tensors)

    def compile(self, target: GPUTarget, *, overlap: bool = True) -> Any:
        """Compile the kernel for a GPU that need not be there; tensors may be on the meta device.

        Args:
            target: The GPU.
            overlap: Whether the kernel may start before the previous one has ended, if the GPU supports this.

        Returns:
            Triton's compiled kernel: `asm["ptx"]` or `asm["amdgcn"]`, `metadata.shared`.
        """
        settle(self.kernel)
        names = self.kernel.arg_names
        constants, options = self._for(overlap and target.backend == "cuda" and target.arch >= 90)
        constants = constants | {name: value for name, value in self.args.items() if value is None}
        signature = {name: "constexpr" if name in constants else _type(self.args[name]) for name in names}
        # Triton specializes on multiples of 16 when it launches, except in sizes that change from call to call.
        fixed = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        attrs = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in fixed and _is_aligned(self.args.get(name))
        }
        source = _source(self.kernel)(self.kernel, signature, constants, attrs)
        return triton.compile(source, target=target, options=options)


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def overlaps() -> bool:
    """Return whether the current device can start a kernel while the one before it ends."""
    if not torch.cuda.is_available() or torch.version.hip:
        return False
    return _capability(torch.cuda.current_device()) >= (9, 0)


def settle(function: Any) -> None:
    """Compute Triton's cache keys of the functions that a kernel calls, then the kernel's own.

    Up to Triton 3.6 a kernel's key depends on whether its functions had keys already
    (`DependenciesFinder._update_hash`), and so on which kernels the process had started before. A kernel in the cache
    was then not found and was compiled again.
    """
    # The interpreter compiles nothing. (functools.cache would not do: hashing a function computes its key too early.)
    if not isinstance(function, triton.JITFunction) or function.hash is not None:
        return
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if called is not function:  # co_names also lists attributes.
            settle(called)
    _ = function.cache_key


class Prepared:
    """A compiled call that runs again with other tensors and another number of rows.

    To find a compiled kernel, Triton inspects every argument of every call, which takes as long as a small kernel. Here
    the caller guarantees that only tensors and the number of rows have changed. Kernels are not compiled for a number
    of rows: M is an argument that Triton does not specialize on, and it sets the grid and the sizes of scratch memory
    and tensor descriptors. Threads may share an instance.
    """

    def __init__(self, launch: Launch, compiled: Any, tensors: Sequence[str]) -> None:
        """Store a call, the compiled kernel that it ran, and the names of the tensors in the order of `run`."""
        # Compiled kernels take constants too.
        values = {**launch.args, **launch._for(overlaps())[0]}
        place = {name: i for i, name in enumerate(launch.kernel.arg_names)}
        self._compiled = compiled
        self._grid = [*launch.grid, 1, 1][:3]
        self._programs = [(i, programs) for i, programs in enumerate(launch.programs) if programs.rows]
        self._tensors = [(place[name], i) for i, name in enumerate(tensors) if values.get(name) is not None]
        self._rows = place.get("M")
        # The first size of q is the number of rows.
        self._matrices = [
            (place[name], tensors.index(of), None if of == "q_ptr" else values[name].shape, type(values[name]),
             {**vars(values[name]), "base": None})
            for name, of in MATRICES.items()
            if name in values
        ]  # fmt: skip
        partials = values.get("partials_ptr")
        self._partials = None if partials is None else (place["partials_ptr"], partials.shape[0], partials.shape[2])
        # A stored tensor would keep its memory alive.
        given = {*tensors, *MATRICES, "partials_ptr"}
        self._values = [None if name in given else values[name] for name in place]

    def run(self, m: int, tensors: Sequence[Any]) -> None:
        """Start the kernel for M rows, at least 1, on the current stream."""
        values = self._values.copy()
        for i, tensor in self._tensors:
            values[i] = tensors[tensor]
        if self._rows is not None:
            values[self._rows] = m
        for i, tensor, sizes, kind, about in self._matrices:
            # Without its constructor, whose checks take longer than the rest of this call.
            values[i] = matrix = object.__new__(kind)
            matrix.__dict__ = {**about, "base": tensors[tensor], "shape": sizes or [m, *about["shape"][1:]]}
        if self._partials:
            i, splits, n = self._partials
            values[i] = tensors[self._tensors[0][1]].new_empty(splits, m, n, dtype=torch.int32)
        grid = self._grid.copy()
        for i, programs in self._programs:
            grid[i] = programs.of(m)
        told = triton.knobs.runtime
        if getattr(told.launch_enter_hook, "calls", True) or getattr(told.launch_exit_hook, "calls", True):
            self._compiled[grid](*values)
            return
        # The same without building the metadata for profilers.
        driver, kernel = triton.runtime.driver.active, self._compiled
        stream = driver.get_current_stream(driver.get_current_device())
        kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)


def _source(kernel: Any) -> Any:
    """Return the class of Triton sources that a kernel needs: Gluon has its own compiler front end."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _type(value: Any) -> str:
    if isinstance(value, DESCRIPTORS):
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
