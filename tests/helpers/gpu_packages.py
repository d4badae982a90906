"""A CUDA driver in Python: it runs what GPU packages launch, in Triton's interpreter or by the definition."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import itertools
import subprocess
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch.fx import Interpreter

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from int8compile import Int8Config, cpu, ops
from int8compile.cpu import build
from int8compile.cpu.compiler import find_compiler
from int8compile.exporting import exporter
from int8compile.ops import signatures
from int8compile.ops.quantized import ACTIVATIONS, product, quantize
from int8compile.triton_kernels import operators, plan, tables
from int8compile.triton_kernels.launch import DESCRIPTORS, Launch
from int8compile.triton_kernels.plan import Gpu, Planner
from tests.helpers.interpreter import INTERPRETED

HERE = Path(__file__).parent

# With two multiprocessors, few rows take the tiles of many.
SM_90 = Gpu("sm_90", tables.ARCHITECTURES["sm_90"], 2)


class Block(nn.Module):
    """Joined linears with and without bias, one followed by its activation function, and a head.

    The bias is a slice of a tensor, so its address is not aligned. The operations between the linears do not round, so
    compiled and interpreted graphs agree.
    """

    def __init__(self, size: int = 96, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, n) for n in (size, 32, 32))
        self.gate, self.up = (nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * size, size, bias=False)
        self.biases = nn.Parameter(torch.randn(size + 1))
        self.lm_head = nn.Linear(size, 40, bias=False)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        parts = torch.cat([k, self.v(x), k.abs()], dim=-1)
        mixed = torch.maximum(self.q(x), parts)
        mixed = F.silu(self.gate(mixed)) * self.up(mixed)
        return self.lm_head(F.relu(F.linear(mixed, self.down.weight, self.biases[1:])))


def activations(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return activations [..., 96] with outliers and a row of zeros."""
    x = torch.randn(*size, 96)
    x[..., 5] *= 40
    x[..., -1, :] = 0
    return x.to(dtype)


def metadata_of(name: str, **given: Any) -> types.SimpleNamespace:
    """Return the metadata that Triton gives for a compiled kernel."""
    plain = {"num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0}
    return types.SimpleNamespace(name=name, launch_cooperative_grid=False, launch_pdl=False, **plain, **given)


class Driver:
    """Run the launches of packages.

    A kernel is recognized by the launch that the planner makes for the same number of rows.

    Attributes:
        started: The names of the kernels that ran since the test cleared it.
        given: The names of their arguments.
        failed: The traceback of a failed kernel.
    """

    def __init__(self, path: Path) -> None:
        self.started: list[str]
        self.given: set[str]
        self.failed: str
        # Keyed by the text that stands for a compiled kernel: the compiled launch, and the launches for a number of
        # rows.
        self._known: dict[str, list[tuple[Launch, Callable[[int], list[Launch]]]]]
        self._current: Callable[[int], list[Launch]] | None = None
        self._lock = threading.Lock()
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        uints = ctypes.POINTER(ctypes.c_uint32)
        pointers = ctypes.POINTER(ctypes.c_void_p)
        texts = (ctypes.c_char_p, ctypes.c_char_p)
        self._start = ctypes.CFUNCTYPE(ctypes.c_int, *texts, uints, ctypes.c_uint32, ctypes.c_uint32, pointers)(
            self._started
        )
        self.be(90)

    def be(self, capability: int) -> None:
        """Forget all kernels, and act as a GPU of another capability."""
        self.started, self.given, self.failed, self._known = [], set(), "", {}
        self._library.test_set(self._start, capability)

    def capture(self, on: bool) -> None:
        """Set whether a CUDA graph is being captured."""
        self._library.test_capture(ctypes.c_bool(on))

    @contextlib.contextmanager
    def using(self, device: int | None) -> Iterator[None]:
        """Make this thread use a device's context, or none, and check that it still does afterwards."""
        number = -1 if device is None else device
        self._library.test_use(number)
        try:
            yield
            assert self._library.test_used() == number
        finally:
            self._library.test_use(-1)

    def load(self, path: Path, device: int) -> Any:
        """Load a package for a GPU."""
        self._library.test_device(device)
        try:
            return aoti_load_package(str(path), run_single_threaded=True)
        finally:
            self._library.test_device(0)

    def planning(self, started: Callable[[int], list[Launch]]) -> None:
        """Set the launches that the next compiled kernels belong to."""
        self._current = started

    def compile(self, launch: Launch, target: object) -> Any:
        """Stand in for `Launch.compile`."""
        assert self._current is not None
        image = identity(launch)
        self._known.setdefault(image, []).append((launch, self._current))
        sizes = [size for value in launch.args.values() for size in bytes_of(value)]
        metadata = metadata_of(
            launch.kernel.__name__,
            hash=hashlib.sha256(image.encode()).hexdigest(),
            num_warps=launch.num_warps,
            shared=100 * 1024,
            tensordesc_meta=[
                {"block_size": value.block_shape, "swizzle": 3}
                for value in launch.args.values()
                if isinstance(value, DESCRIPTORS)
            ],
        )
        # Triton appends two pointers of its own.
        return types.SimpleNamespace(asm={"cubin": image.encode(), "ptx": [*sizes, 8, 8]}, metadata=metadata)

    def _started(self, image: bytes, name: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> int:
        try:
            with self._lock:  # The interpreter takes one thread at a time.
                self._run(image.decode(), name.decode(), tuple(grid[:3]), threads, arguments)
        except BaseException:
            self.failed = traceback.format_exc()
            return 1
        return 0

    def _run(self, image: str, name: str, grid: tuple[int, ...], threads: int, arguments: Any) -> None:
        for template, started in self._known[image]:
            # Every kernel takes the number of rows, except the kernel for one row.
            m = 1 if "M" not in template.args else read(arguments, list_of(template).index("M"), ctypes.c_int32)
            launch = next((launch for launch in started(m) if identity(launch) == image), None)
            if launch is not None and grid == (*launch.grid, 1, 1)[:3] and fits(launch, arguments):
                break
        else:
            raise AssertionError(f"{name} with {grid} programs is not what would be started: {image}")
        assert name == launch.kernel.__name__
        assert threads == 32 * launch.num_warps
        args = dict(launch.args)
        placed = list(zip(positions(launch), launch.args.items(), strict=True))
        for position, (key, value) in placed:
            if isinstance(value, DESCRIPTORS):
                address, rows, columns, stride, *tile, swizzle = read(arguments, position, ctypes.c_uint64 * 7)
                assert [rows, columns, stride] == [*value.shape, columns]
                assert (tile, swizzle) == (list(value.block_shape), 3)
                args[key] = tensor_at(address, value.base)
            elif isinstance(value, Tensor):
                args[key] = tensor_at(read(arguments, position, ctypes.c_uint64), value)
        self.given |= {key for key, value in args.items() if value is not None}
        if INTERPRETED:
            dataclasses.replace(launch, args=args).run()
        else:
            DEFINITIONS[name](args, launch.constants)
        self.started.append(name)


def quantize_by_definition(args: dict[str, Any], constants: dict[str, Any]) -> None:
    """Compute the result of the kernel quantize_rows."""
    x, threshold = args["x_ptr"], args["c2"] * 127 * args["x_ptr"].shape[1]
    for name, made in zip(("q_ptr", "rows_ptr", "counters_ptr"), quantize(x, args["d_ptr"], threshold), strict=True):
        args[name].copy_(made)


def multiply_by_definition(args: dict[str, Any], constants: dict[str, Any]) -> None:
    """Compute the result of the kernel gluon_gemm."""
    q, rows = args["q_ptr"], args["rows_ptr"]
    assert args["x_desc"].data_ptr() == q.data_ptr()
    y = product(q, rows, rows, args["weight_desc"], args["scale_ptr"], args["bias_ptr"])
    args["y_ptr"].copy_(ACTIVATIONS[constants["ACTIVATION"]](y))


# Gluon's kernel cannot be interpreted.
DEFINITIONS = {"quantize_rows": quantize_by_definition, "gluon_gemm": multiply_by_definition}


def identity(launch: Launch) -> str:
    """Return a text that identifies everything a kernel is compiled for."""
    types_of = {name: (bytes_of(value), getattr(value, "dtype", None)) for name, value in launch.args.items()}
    tiles = [value.block_shape for value in launch.args.values() if isinstance(value, DESCRIPTORS)]
    how = (launch.kernel.__name__, launch.constants, types_of, tiles, launch.num_warps, launch.num_stages)
    return repr(how)


def bytes_of(value: Any) -> list[int]:
    """Return the sizes of the parameters that an argument becomes."""
    if value is None:
        return []
    if isinstance(value, DESCRIPTORS):
        return [128, 4, 4, 8, 8]
    if isinstance(value, Tensor):
        return [8]
    return [4 if isinstance(value, float) or -(2**31) <= value < 2**31 else 8]


def list_of(launch: Launch) -> list[str]:
    return [name for name, value in launch.args.items() for _ in bytes_of(value)]


def positions(launch: Launch) -> list[int]:
    """Return the position of each argument's first parameter."""
    sizes = [len(bytes_of(value)) for value in launch.args.values()]
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def read(arguments: Any, position: int, kind: Any) -> Any:
    found = ctypes.cast(arguments[position], ctypes.POINTER(kind))[0]
    return list(found) if isinstance(found, ctypes.Array) else found


def fits(launch: Launch, arguments: Any) -> bool:
    """Return whether the numbers in the arguments are those of the launch."""
    for position, value in zip(positions(launch), launch.args.values(), strict=True):
        if isinstance(value, float):
            if read(arguments, position, ctypes.c_float) != ctypes.c_float(value).value:
                return False
        elif isinstance(value, int):
            kind = ctypes.c_int32 if bytes_of(value) == [4] else ctypes.c_int64
            if read(arguments, position, kind) != value:
                return False
        elif isinstance(value, DESCRIPTORS):
            shape = [read(arguments, position + 1 + i, ctypes.c_int32) for i in range(2)]
            strides = [read(arguments, position + 3 + i, ctypes.c_int64) for i in range(2)]
            if [shape, strides] != [list(value.shape), list(value.strides)]:
                return False
    return True


def tensor_at(address: int, like: Tensor) -> Tensor:
    """Return memory as a tensor, without a copy."""
    assert address % 16 == 0
    held = (ctypes.c_char * (like.numel() * like.element_size())).from_address(address)
    return torch.frombuffer(held, dtype=like.dtype).view(like.shape)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the driver, and the object file that is linked into packages."""
    folder = tmp_path_factory.mktemp("driver")
    compiler = find_compiler().command
    driver, forwards, joined = (folder / name for name in ("libcuda.so.1", "cuda_as_cpu.o", "joined.o"))
    library = cpu.load()
    assert library is not None
    (folder / build.DECLARED).write_text(signatures.header())
    for command in (
        ["-shared", "-Wl,-soname,libcuda.so.1", str(HERE / "cuda_driver.cpp"), "-o", str(driver)],
        ["-iquote", str(folder), "-c", str(HERE / "cuda_as_cpu.cpp"), "-o", str(forwards)],
        # The first definition wins: an operator may be defined for CPUs and for GPUs.
        ["-r", "-nostdlib", "-Wl,-z,muldefs", str(forwards), str(library.built.linkable), "-o", str(joined)],
    ):
        subprocess.run([*compiler, "-std=c++17", "-fPIC", *command], check=True)
    return driver, joined


@pytest.fixture(scope="session")
def loaded_driver(libraries: tuple[Path, Path]) -> Driver:
    if torch.cuda.is_available():
        pytest.skip("a GPU's own driver is there")
    return Driver(libraries[0])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, libraries: tuple[Path, Path]) -> None:
    """Make `export` take the CPU for a GPU."""
    library = copy.copy(cpu.load())
    assert library is not None
    library.built = dataclasses.replace(library.built, linkable=libraries[1])
    monkeypatch.setattr(cpu, "load", lambda: library)
    monkeypatch.setattr(exporter, "_gpu_of", lambda device: (SM_90, ""))


@pytest.fixture
def driver(gpu: None, loaded_driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Return a driver that interprets kernels."""
    add = Planner._add

    def watched(self: Planner, op: str, key: Any, rows: Any, started: Any, *changes: Any) -> None:
        loaded_driver.planning(started)
        add(self, op, key, rows, started, *changes)

    def interpreted(self: Launch, target: object, *, overlap: bool = True) -> Any:
        return loaded_driver.compile(self, target)

    monkeypatch.setattr(Planner, "_add", watched)
    monkeypatch.setattr(Launch, "compile", interpreted)
    monkeypatch.setattr(plan, "parameters", lambda ptx: ptx)
    loaded_driver.be(90)
    return loaded_driver


class ByLaunches(Interpreter):
    """Run a rewritten graph with the operators that torch.compile's graphs call on a GPU."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        taken = {
            ops.quantize_rows.default: operators._quantize_rows,
            ops.norm_quantize_rows.default: operators._norm_quantize_rows,
            ops.quantized_linear.default: operators._quantized_linear,
            ops.weight_only_linear.default: operators._weight_only_linear,
        }
        return super().call_function(taken.get(target, target), args, kwargs)


def by_launches(model: nn.Module, config: Int8Config, monkeypatch: pytest.MonkeyPatch, *inputs: Tensor) -> Any:
    """Return the result of torch.compile's graph for a GPU."""
    monkeypatch.setattr(operators, "_index", lambda tensor: 0)
    monkeypatch.setattr(operators, "_on", lambda device: operators._HERE)
    monkeypatch.setattr(operators, "architecture", lambda device: SM_90.arch)
    monkeypatch.setattr(operators, "multiprocessors", lambda device: SM_90.multiprocessors)
    for kept in ("_prepared", "_products"):
        monkeypatch.setattr(operators, kept, {})
    with torch.no_grad():
        module = torch.export.export(model, inputs, strict=False).module(check_guards=False)
        exporter.rewrite(module, config, for_gpu=True)
        return ByLaunches(module).run(*inputs)


def by_definition(model: nn.Module, *inputs: Tensor, dynamic_shapes: Any = None) -> Callable[..., Any]:
    """Return the graph of a package, run by the operators' definitions."""
    with torch.no_grad():
        module = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes).module(check_guards=False)
        exporter.rewrite(module, Int8Config(), for_gpu=True)
    return module
