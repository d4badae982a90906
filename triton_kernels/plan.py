"""The GPU kernels of an exported package: cubins, and a plan of their calls as C++ for exporting/csrc/launcher.cpp.

A package has no Python to choose a kernel, and its number of rows may change from call to call. So `Planner` asks for
each number of rows which kernels the operators would start, joins neighbouring numbers with the same answer, and
compiles the kernels. It asks the table; measurements by `INT8COMPILE_AUTOTUNE` are not used.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from int8compile.errors import ExportError
from int8compile.ops.quantized import empty_result, empty_rows, empty_sum
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.grouped_gemm.launch import config_of, grouped_gemm_launch
from int8compile.triton_kernels.launch import DESCRIPTORS, MATRICES, TENSORS, Launch, Programs
from int8compile.triton_kernels.operators import launch_of
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import MANY_ROWS, in_chunks, norm_launch, quantize_launch
from int8compile.triton_kernels.tables import Architecture, Config
from int8compile.triton_kernels.weight_only.launch import tile_rows, weight_only_launches

# Arguments that are computed from the number of rows.
_ROWS = ("M", "rows_per_group")
# c10::ScalarType.
_SCALAR_TYPES = {
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
    None: -1,
}
# Bytes of a parameter by the bits in its PTX type.
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_MAP_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that kernels are compiled for.

    Attributes:
        isa: Such as "sm_90".
        arch: The tables of its architecture.
        multiprocessors: Their number.
    """

    isa: str
    arch: Architecture
    multiprocessors: int

    @property
    def capability(self) -> int:
        """Return the compute capability in Triton's form, such as 90."""
        return int(self.isa.removeprefix("sm_"))


class Planner:
    """Collects the kernels that a graph's operators start, for `least` to `most` rows (None: no upper limit).

    Attributes:
        cubins: The compiled kernels by file name.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.cubins: dict[str, bytes] = {}
        self._gpu = gpu
        self._kernels: dict[str, str] = {}  # C++ by file
        self._calls: dict[tuple[str, tuple[int, ...]], str] = {}

    def quantize_rows(
        self, k: int, dtype: torch.dtype, rotated: bool, threshold: float, least: int, most: int | None
    ) -> None:
        """Add the kernels of `int8compile::quantize_rows` for x [M, K] of a dtype."""

        def started(m: int) -> list[Launch]:
            x = _empty(m, k, dtype=dtype)
            return [quantize_launch(x, _empty(k) if rotated else None, threshold, *empty_rows(x, threshold))]

        key = (k, _SCALAR_TYPES[dtype], int(rotated), _bits(threshold))
        self._add("quantize_rows", key, (least, most), started, lambda m: in_chunks(m, k), MANY_ROWS)

    def norm_quantize_rows(
        self,
        k: int,
        dtype: torch.dtype,
        residual: bool,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        rotated: bool,
        kind: int,
        eps: float,
        threshold: float,
        least: int,
        most: int | None,
    ) -> None:
        """Add the kernels of `int8compile::norm_quantize_rows` for x [M, K] of a dtype."""

        def started(m: int) -> list[Launch]:
            x = _empty(m, k, dtype=dtype)
            total = x if residual else None
            weight, bias = (_empty(k, dtype=each) for each in (weight_dtype, bias_dtype))
            made = (empty_sum(x, total), *empty_rows(x, threshold))
            return [norm_launch(x, total, weight, bias, _empty(k) if rotated else None, kind, eps, threshold, *made)]

        dtypes = (_SCALAR_TYPES[each] for each in (weight_dtype, bias_dtype))
        key = (k, _SCALAR_TYPES[dtype], int(residual), *dtypes, int(rotated), kind, _bits(eps), _bits(threshold))
        self._add("norm_quantize_rows", key, (least, most), started)

    def quantized_linear(
        self,
        n: int,
        k: int,
        planes: int,
        bias_dtype: torch.dtype | None,
        activation: int,
        n0: int,
        n1: int,
        dtype: torch.dtype,
        least: int,
        most: int | None,
    ) -> None:
        """Add the kernels of `int8compile::quantized_linear` for a weight [N, K] and q [planes, M, K]."""
        arch, sms = self._gpu.arch, self._gpu.multiprocessors

        def chosen(m: int) -> Config:
            return tables.choose(tables.candidates(arch, m, k), m, n, k, sms)

        def started(m: int) -> list[Launch]:
            quantized = empty_rows(_empty(m, k), float(planes - 1))
            qweight = _empty(n, k, dtype=torch.int8)
            y = empty_result(quantized[0], qweight, activation, n0, dtype)
            product = Product(*quantized, qweight, _empty(n), _empty(n, dtype=bias_dtype), y, activation, n0, n1)
            return [launch_of(product, chosen(m))]

        # From this number of rows on, there are enough of the largest tiles for all multiprocessors.
        settled = max(*(config.bm * sms for config in arch.by_bucket[tables.BUCKETS[-1]]), tables.BUCKETS[-1])
        key = (n, k, planes, activation, n0, n1, _SCALAR_TYPES[dtype], _SCALAR_TYPES[bias_dtype])
        self._add("quantized_linear", key, (least, most), started, chosen, settled)

    def weight_only_linear(
        self,
        n: int,
        k: int,
        dtype: torch.dtype,
        rotated: bool,
        bias_dtype: torch.dtype | None,
        least: int,
        most: int | None,
    ) -> None:
        """Add the kernels of `int8compile::weight_only_linear` for x [M, K]."""

        def started(m: int) -> list[Launch]:
            x, y = (_empty(m, size, dtype=dtype) for size in (k, n))
            d, bias = _empty(k) if rotated else None, _empty(n, dtype=bias_dtype)
            return weight_only_launches(x, d, _empty(n, k, dtype=torch.int8), _empty(n), bias, y)

        key = (n, k, _SCALAR_TYPES[dtype], int(rotated), _SCALAR_TYPES[bias_dtype])
        self._add("weight_only_linear", key, (least, most), started, tile_rows, 17)

    def expert_linear(
        self,
        op: str,
        experts: int,
        n: int,
        k: int,
        dtype: torch.dtype,
        d_dims: int,
        ends_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        threshold: float,
        least: int,
        most: int | None,
    ) -> None:
        """Add the kernels of `int8compile::grouped_linear` or `batched_linear` for weights [E, N, K].

        M counts the rows of all experts. In batched_linear, which has no `ends`, all experts have equally many.
        """

        def started(m: int) -> list[Launch]:
            each = 0 if ends_dtype else -(-m // experts)
            x, y = (_empty(each * experts or m, size, dtype=dtype) for size in (k, n))
            d = _empty(*(experts, k)[2 - d_dims :]) if d_dims else None
            ends = _empty(experts, dtype=ends_dtype)
            made = empty_rows(x, threshold)
            qweight, scale = _empty(experts, n, k, dtype=torch.int8), _empty(experts, n)
            product = Product(*made, qweight, scale, _empty(experts, n, dtype=bias_dtype), y)
            return [quantize_launch(x, d, threshold, *made, ends, each), grouped_gemm_launch(product, ends, each)]

        dtypes = (_SCALAR_TYPES[each] for each in (ends_dtype, bias_dtype))
        key = (experts, n, k, _SCALAR_TYPES[dtype], d_dims, *dtypes, _bits(threshold))
        self._add(
            op,
            key,
            (least, most),
            started,
            lambda m: (config_of(m, experts), in_chunks(m, k)),
            max(64 * experts + 1, MANY_ROWS),
        )

    def source(self) -> str:
        """Return the plan as C++: the declaration of `int8compile::Plan` and a function that returns an instance."""
        header = (importlib.resources.files("int8compile.cpu") / "csrc" / "plan.h").read_text()
        capability = divmod(self._gpu.capability, 10)
        kernels = ",\n".join(self._kernels.values())
        calls = ",\n".join(
            f'  {{"{op}", {{{_numbers(key)}}}, {{\n{ranges}}}}}' for (op, key), ranges in self._calls.items()
        )
        return (
            f"{header}\nnamespace {{\nconst int8compile::Plan& int8compile_plan() {{\n  using namespace int8compile;\n"
            f'  static const Plan plan{{"{self._gpu.isa}", {_numbers(capability)}, {{\n{kernels}}}, {{\n{calls}}}}};\n'
            "  return plan;\n}\n}  // namespace\n"
        )

    def _add(
        self,
        op: str,
        key: tuple[int, ...],
        rows: tuple[int, int | None],
        started: Callable[[int], list[Launch]],
        decided: Callable[[int], Any] = lambda m: None,
        settled: int = 1,
    ) -> None:
        """Add a call of an operator.

        Args:
            op: The operator's name.
            key: The numbers by which launcher.cpp finds the call.
            rows: The smallest and the largest number of rows; None for no upper limit.
            started: Returns the kernels' calls for a number of rows.
            decided: Returns all that the choice of kernels depends on, for a number of rows.
            settled: The number of rows from which on the choice stays the same.
        """
        ranges = []
        for first in _changes(rows, decided, settled):
            made = ",\n      ".join(self._launch(op, launch) for launch in started(first))
            ranges.append(f"    {{{first}, {{{made}}}}}")
        self._calls[op, key] = ",\n".join(ranges)

    def _launch(self, op: str, launch: Launch) -> str:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # It would be two thirds of a file.
            compiled = launch.compile(GPUTarget("cuda", self._gpu.capability, 32), overlap=False)
        about = compiled.metadata
        used = (about.num_ctas, about.global_scratch_size, about.profile_scratch_size)
        if used != (1, 0, 0) or about.launch_cooperative_grid or about.launch_pdl:
            raise ExportError(f"Triton compiled {launch.kernel.__name__} in a way that a package cannot start: {about}")
        file = f"{about.name}-{about.hash[:16]}.cubin"
        if file not in self._kernels:
            self.cubins[file] = compiled.asm["cubin"]
            self._kernels[file] = f'  {{"{file}", "{about.name}", {32 * about.num_warps}, {about.shared}}}'
        arguments, maps = _arguments(op, launch, getattr(about, "tensordesc_meta", None) or [])
        sizes = [size for size, _, _ in arguments]
        declared = parameters(compiled.asm["ptx"])
        # Triton appends its own pointers, to scratch memory that none of these kernels use.
        extra = declared[len(sizes) :]
        if declared[: len(sizes)] != sizes or set(extra) - {8}:
            raise ExportError(
                f"Triton's {launch.kernel.__name__} takes arguments of {declared} bytes, and {sizes} were expected: "
                "this version of Triton passes them in another way. form='portable' needs no Triton kernels"
            )
        arguments += [(8, "number", 0)] * len(extra)
        handed = ", ".join(f"{{Argument::{kind}, {value}}}" for _, kind, value in arguments)
        programs = (*launch.programs, Programs(), Programs())[:3]
        grid = ", ".join(f"{{{_numbers(dataclasses.astuple(each))}}}" for each in programs)
        number = list(self._kernels).index(file)
        partials = launch.args.get("partials_ptr")
        scratch = 0 if partials is None else partials.nbytes // launch.m
        return f"{{{number}, {{{grid}}}, {{{handed}}}, {{{', '.join(maps)}}}, {scratch}}}"


def parameters(ptx: str) -> list[int]:
    """Return the size in bytes of each parameter of the kernel in a PTX text."""
    (entry,) = re.findall(r"\.entry[^(]*\(([^)]*)\)", ptx)
    found = re.findall(r"\.param (?:\.align \d+ )?\.(?:[usfb](\d+))[^,\[]*(?:\[(\d+)\])?", entry)
    return [_SIZES[bits] * int(length or 1) for bits, length in found]


def _changes(rows: tuple[int, int | None], decided: Callable[[int], Any], settled: int) -> Iterator[int]:
    """Yield the numbers of rows at which the value of `decided` changes, the first one included."""
    least = max(rows[0], 1)  # Zero rows start no kernel.
    last = max(settled, least)
    most = last if rows[1] is None else min(rows[1], last)
    before = object()  # Equal to nothing.
    for m in range(least, most + 1):
        now = decided(m)
        if now != before:
            yield m
        before = now


def _arguments(
    op: str, launch: Launch, described: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[int, str, int]], list[str]]:
    """Return size, kind and value of each kernel argument, and the tensor descriptors for the copy engine as C++."""
    tensors = TENSORS[op]
    arguments: list[tuple[int, str, int]] = []
    maps: list[str] = []
    for name, value in launch.args.items():
        if value is None:
            continue
        if isinstance(value, DESCRIPTORS):
            about = described[len(maps)]
            of_x = MATRICES[name] == "q_ptr"
            sizes = (-1 if of_x else value.shape[0], value.shape[1], *about["block_size"])
            number = tensors.index(MATRICES[name])
            arguments.append((_MAP_BYTES, "map", len(maps)))
            maps.append(f"{{{number}, {', '.join(map(str, sizes))}, {about['swizzle']}}}")
            arguments.append((4, "rows", 1) if of_x else (4, "number", value.shape[0]))
            arguments.append((4, "number", value.shape[1]))
            arguments += [(8, "number", stride) for stride in value.strides]
        elif name == "partials_ptr":
            arguments.append((8, "scratch", 0))
        elif isinstance(value, Tensor):
            arguments.append((8, "tensor", tensors.index(name)))
        elif name in _ROWS and value:
            arguments.append((4, "rows", launch.m // value))
        elif isinstance(value, float):
            arguments.append((4, "number", struct.unpack("<I", struct.pack("<f", value))[0]))
        else:
            arguments.append((4 if -(2**31) <= value < 2**31 else 8, "number", value))
    return arguments, maps


def _empty(*size: int, dtype: torch.dtype | None = torch.float32) -> Any:
    """Return a tensor on the meta device, or None if the dtype is None."""
    return None if dtype is None else torch.empty(size, dtype=dtype, device="meta")


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
