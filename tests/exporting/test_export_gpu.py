"""Packages for GPUs: which kernels they hold and how these are started. Without a GPU, the CPU is taken for one.

What is exported then is a package for the CPU whose operators are those for GPUs, with a driver (cuda_driver.cpp) that
hands kernels to the test. In Triton's interpreter they run, and whole models do; elsewhere they are compiled and looked
at.

    TRITON_INTERPRET=1 python -m pytest tests/exporting/test_export_gpu.py
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys
import threading
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch.export import Dim
from torch.fx import Interpreter

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import int8compile
from int8compile import ExportError, Int8Config, cpu, hardware, ops
from int8compile.cpu import build
from int8compile.exporting import exporter
from int8compile.ops.quantized import ACTIVATIONS, product, quantize
from int8compile.triton_kernels import loading, operators, plan, tables
from int8compile.triton_kernels.launch import DESCRIPTORS, Launch
from int8compile.triton_kernels.plan import Gpu, Planner
from tests.conftest import INTERPRETED
from tests.stored.test_modules import int8_experts

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="needs the CPU kernel's library"),
    # NumPy, which the interpreter computes with, warns of what it does with NaN and Inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
compiled_only = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 interprets, nothing is compiled")

HERE = Path(__file__).parent
# So few multiprocessors that a few rows take the tiles of many.
SM_90 = Gpu("sm_90", tables.ARCHITECTURES["sm_90"], 2)


class Block(nn.Module):
    """Linears that are joined, with a bias and without, one that ends in its activation function, and a head.

    A bias is a part of a tensor, which begins anywhere. What is between the linears rounds nothing, so that compiled
    and interpreted graphs give the same.
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
    """Some of [..., 96], with outliers and a row of zeros."""
    x = torch.randn(*size, 96)
    x[..., 5] *= 40
    x[..., -1, :] = 0
    return x.to(dtype)


# Kernels that run in the interpreter


class Driver:
    """Runs what packages start. Knows kernels by what the planner would start for as many rows.

    Attributes:
        started: The names of the kernels that ran, since the test emptied it.
        given: The names of the arguments that they had.
        failed: What went wrong in one.
    """

    def __init__(self, path: Path) -> None:
        self.started: list[str]
        self.given: set[str]
        self.failed: str
        # By the text that stands for the compiled kernel: what was compiled, and what is started for so many rows.
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
        """Forgets all it knew, and is another GPU's."""
        self.started, self.given, self.failed, self._known = [], set(), "", {}
        self._library.test_set(self._start, capability)

    def capture(self, on: bool) -> None:
        """Whether a CUDA graph is captured."""
        self._library.test_capture(ctypes.c_bool(on))

    @contextlib.contextmanager
    def using(self, device: int | None) -> Iterator[None]:
        """Have this thread use a device's context, or none, and check that it does so afterwards."""
        number = -1 if device is None else device
        self._library.test_use(number)
        try:
            yield
            assert self._library.test_used() == number
        finally:
            self._library.test_use(-1)

    def load(self, path: Path, device: int) -> Any:
        """Load a package as a GPU's."""
        self._library.test_device(device)
        try:
            return aoti_load_package(str(path), run_single_threaded=True)
        finally:
            self._library.test_device(0)

    def planning(self, started: Callable[[int], list[Launch]]) -> None:
        """What is compiled next is for that."""
        self._current = started

    def compile(self, launch: Launch, target: object) -> Any:
        """Instead of `Launch.compile`."""
        assert self._current is not None
        image = identity(launch)
        self._known.setdefault(image, []).append((launch, self._current))
        sizes = [size for value in launch.args.values() for size in bytes_of(value)]
        metadata = types.SimpleNamespace(
            name=launch.kernel.__name__,
            hash=hashlib.sha256(image.encode()).hexdigest(),
            num_ctas=1,
            num_warps=launch.num_warps,
            shared=100 * 1024,
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
            tensordesc_meta=[
                {"block_size": value.block_shape, "swizzle": 3}
                for value in launch.args.values()
                if isinstance(value, DESCRIPTORS)
            ],
        )
        # Two pointers of Triton's own come last.
        return types.SimpleNamespace(asm={"cubin": image.encode(), "ptx": [*sizes, 8, 8]}, metadata=metadata)

    def _started(self, image: bytes, name: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> int:
        try:
            with self._lock:  # The interpreter is for one thread at a time.
                self._run(image.decode(), name.decode(), tuple(grid[:3]), threads, arguments)
        except BaseException:
            self.failed = traceback.format_exc()
            return 1
        return 0

    def _run(self, image: str, name: str, grid: tuple[int, ...], threads: int, arguments: Any) -> None:
        for template, started in self._known[image]:
            # The number of rows is an argument of all kernels but that for one row.
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
    """Compute what the kernel quantize_rows does."""
    x, threshold = args["x_ptr"], args["c2"] * 127 * args["x_ptr"].shape[1]
    for name, made in zip(("q_ptr", "rows_ptr", "counters_ptr"), quantize(x, args["d_ptr"], threshold), strict=True):
        args[name].copy_(made)


def multiply_by_definition(args: dict[str, Any], constants: dict[str, Any]) -> None:
    """Compute what the kernel gluon_gemm does."""
    q, rows = args["q_ptr"], args["rows_ptr"]
    assert args["x_desc"].data_ptr() == q.data_ptr()
    y = product(q, rows, rows, args["weight_desc"], args["scale_ptr"], args["bias_ptr"])
    args["y_ptr"].copy_(ACTIVATIONS[constants["ACTIVATION"]](y))


# Gluon's kernel cannot be interpreted.
DEFINITIONS = {"quantize_rows": quantize_by_definition, "gluon_gemm": multiply_by_definition}


def identity(launch: Launch) -> str:
    """A text for all that a kernel is compiled for."""
    types_of = {name: (bytes_of(value), getattr(value, "dtype", None)) for name, value in launch.args.items()}
    tiles = [value.block_shape for value in launch.args.values() if isinstance(value, DESCRIPTORS)]
    how = (launch.kernel.__name__, launch.constants, types_of, tiles, launch.num_warps, launch.num_stages)
    return repr(how)


def bytes_of(value: Any) -> list[int]:
    """The sizes of what an argument is handed over as."""
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
    """Where each argument begins."""
    sizes = [len(bytes_of(value)) for value in launch.args.values()]
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def read(arguments: Any, position: int, kind: Any) -> Any:
    found = ctypes.cast(arguments[position], ctypes.POINTER(kind))[0]
    return list(found) if isinstance(found, ctypes.Array) else found


def fits(launch: Launch, arguments: Any) -> bool:
    """Whether the numbers are those that the launch has."""
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
    """Memory as a tensor; it is not copied."""
    assert address % 16 == 0
    held = (ctypes.c_char * (like.numel() * like.element_size())).from_address(address)
    return torch.frombuffer(held, dtype=like.dtype).view(like.shape)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The driver, and what is linked into packages."""
    folder = tmp_path_factory.mktemp("driver")
    compiler = build.find_compiler().command
    driver, forwards, joined = (folder / name for name in ("libcuda.so.1", "cuda_as_cpu.o", "joined.o"))
    library = cpu.load()
    assert library is not None
    for command in (
        ["-shared", "-Wl,-soname,libcuda.so.1", str(HERE / "cuda_driver.cpp"), "-o", str(driver)],
        ["-c", str(HERE / "cuda_as_cpu.cpp"), "-o", str(forwards)],
        # The first definition counts: an operator may be both a CPU's and a GPU's.
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
    """Has `export` take the CPU for a GPU."""
    library = copy.copy(cpu.load())
    assert library is not None
    library.built = dataclasses.replace(library.built, linkable=libraries[1])
    monkeypatch.setattr(cpu, "load", lambda: library)
    monkeypatch.setattr(exporter, "_gpu_of", lambda device: (SM_90, ""))


@pytest.fixture
def driver(gpu: None, loaded_driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver that interprets."""
    add = Planner._add

    def watched(self: Planner, op: str, key: Any, rows: Any, started: Any, *changes: Any) -> None:
        loaded_driver.planning(started)
        add(self, op, key, rows, started, *changes)

    def interpreted(self: Launch, target: object) -> Any:
        return loaded_driver.compile(self, target)

    monkeypatch.setattr(Planner, "_add", watched)
    monkeypatch.setattr(Launch, "compile", interpreted)
    monkeypatch.setattr(plan, "parameters", lambda ptx: ptx)
    loaded_driver.be(90)
    return loaded_driver


class ByLaunches(Interpreter):
    """Runs a rewritten graph with the operators that torch.compile's graphs call on a GPU."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        taken = {
            ops.quantize_rows.default: operators._quantize_rows,
            ops.norm_quantize_rows.default: operators._norm_quantize_rows,
            ops.quantized_linear.default: operators._quantized_linear,
            ops.weight_only_linear.default: operators._weight_only_linear,
        }
        return super().call_function(taken.get(target, target), args, kwargs)


def by_launches(model: nn.Module, config: Int8Config, monkeypatch: pytest.MonkeyPatch, *inputs: Tensor) -> Any:
    """What torch.compile's graph gives on a GPU."""
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
    """Return the graph of packages, with the operators' definitions."""
    with torch.no_grad():
        module = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes).module(check_guards=False)
        exporter.rewrite(module, Int8Config(), for_gpu=True)
    return module


@pytest.mark.interpreted
@pytest.mark.parametrize("options", [
    {},
    {"rotate": False},
    {"threshold": 0.0},
    {"lm_head": "int8_weight"},
], ids=str)  # fmt: skip
def test_a_package_starts_what_torch_compile_starts(
    options: dict[str, Any], driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernel by kernel, with the same numbers, for few rows and for many."""
    model = Block()
    config = Int8Config.from_options(options)
    path = tmp_path / "block.pt2"
    shapes = ({0: Dim("batch", min=1, max=8), 1: Dim("length", min=1, max=100)},)
    int8compile.export(model, (activations(3, 9),), path, dynamic_shapes=shapes, config=config)
    loaded = aoti_load_package(str(path))
    kernels = set()
    for size in ((1, 1), (2, 3), (1, 33)):
        x = activations(*size)
        driver.started = []
        try:
            y = loaded(x)
        except RuntimeError:
            pytest.fail(driver.failed or "a call fails")
        kernels |= set(driver.started)
        # q, k and v; gate and up; down. The head is in float, or in int8 alone.
        products = [name for name in driver.started if name in ("gemm", "gemv", "weight_only")]
        assert len(products) == 3 + (options.get("lm_head") == "int8_weight")
        assert torch.equal(y, by_launches(model, config, monkeypatch, x))
    assert kernels == {"quantize_rows", "gemv", "gemm"} | (
        {"fixed_point", "weight_only"} if "lm_head" in options else set()
    )


@pytest.mark.interpreted
def test_the_column_policy_needs_no_kernels(driver: Driver, tmp_path: Path) -> None:
    model, x, path = Block(), activations(2, 8), tmp_path / "columns.pt2"
    int8compile.export(model, (x,), path, config={"outliers": "column"})
    with torch.no_grad():
        expected = model(x)
    assert (aoti_load_package(str(path))(x) - expected).norm() <= 0.03 * expected.norm()
    assert driver.started == []


@compiled_only
@pytest.mark.skipif(bool(loading.gluon_failure()), reason="this Triton's Gluon is not known to be right")
def test_the_copy_engine_is_told_of_matrices(driver: Driver, tmp_path: Path) -> None:
    """By a kernel whose programs compute several tiles."""
    model, path = nn.Linear(96, 32).eval(), tmp_path / "many.pt2"
    int8compile.export(model, (activations(300),), path, dynamic_shapes=({0: Dim("rows", min=250, max=400)},))
    loaded = aoti_load_package(str(path))
    x = activations(257)
    y = loaded(x)
    assert driver.started == ["quantize_rows", "gluon_gemm"]
    assert torch.equal(y, by_definition(model, x)(x))


@pytest.mark.interpreted
def test_threads_devices_and_cuda_graphs(driver: Driver, tmp_path: Path) -> None:
    """Kernels run on their model's GPU, whichever a thread used before, and it uses the same one afterwards.

    They are loaded before a graph can be captured.
    """
    model, path = nn.Linear(96, 32).eval(), tmp_path / "threads.pt2"
    int8compile.export(model, (activations(3),), path, dynamic_shapes=({0: Dim("rows", min=1, max=8)},))
    with driver.using(1):
        models = [driver.load(path, device) for device in (0, 1)]
    x, results = activations(2), []

    def call(current: int | None) -> None:
        with driver.using(current):
            results.extend(each(x) for each in models)

    driver.capture(True)
    try:
        for current in (None, 0, 1):
            thread = threading.Thread(target=call, args=(current,))
            thread.start()
            call(1)
            thread.join()
    finally:
        driver.capture(False)
    assert len(results) == 3 * 2 * 2, driver.failed
    assert all(torch.equal(result, results[0]) for result in results)
    assert sorted(driver.started) == ["gemm"] * 12 + ["quantize_rows"] * 12


class Head(nn.Module):
    """An output projection with a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm_head = nn.Linear(96, 40)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


@pytest.mark.interpreted
def test_weights_in_int8_alone(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of rows."""
    dtype, path = torch.bfloat16, tmp_path / "head.pt2"
    model, config = Head(dtype), Int8Config(lm_head="int8_weight")
    shapes = ({0: Dim("rows", min=1, max=1000)},)
    int8compile.export(model, (activations(3, dtype=dtype),), path, dynamic_shapes=shapes, config=config)
    loaded = aoti_load_package(str(path))
    for rows in (1, 17, 40):
        x = activations(rows, dtype=dtype)
        driver.started = []
        assert torch.equal(loaded(x), by_launches(model, config, monkeypatch, x))
        assert driver.started == ["fixed_point", "weight_only"]


class Sliced(nn.Module):
    """A linear of a part of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., 1:])


@pytest.mark.interpreted
def test_activations_that_begin_anywhere(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for tensors that begin at multiples of 16 bytes, and rows without gaps.

    Sums that are split have memory of their own, where the table says so; here for any but a single row.
    """
    by_table = tables.choose

    def choose(*given: Any) -> tables.Config:
        config = by_table(*given)
        return config if config.kernel == "gemv" else dataclasses.replace(config, bk=128, splits=3)

    monkeypatch.setattr(tables, "choose", choose)
    model, path = Sliced().eval(), tmp_path / "sliced.pt2"
    int8compile.export(model, (torch.randn(5, 513),), path, dynamic_shapes=({0: Dim("rows", min=0, max=8)},))
    loaded = aoti_load_package(str(path))
    for rows in (1, 5, 0):
        x = torch.randn(rows, 513)
        driver.started = []
        y = loaded(x)
        assert driver.started == ["quantize_rows", "gemv" if rows == 1 else "gemm"] * (rows > 0)
        assert ("partials_ptr" in driver.given) == (rows != 1)
        assert y.shape == (rows, 32)
        if rows:
            assert torch.equal(y, by_launches(model, Int8Config(), monkeypatch, x))


class Mixture(nn.Module):
    """Experts, each rotated in its own way and all in one, and batches, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.together = int8_experts("each"), int8_experts("together")
        self.weights, self.bias = nn.Parameter(torch.randn(3, 48, 40)), nn.Parameter(torch.randn(3, 1, 40))
        self.eval()

    def forward(self, x: Tensor, ends: Tensor, batches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.together(x.to(torch.float16), ends.to(torch.int64))
        return self.each(x, ends), y, torch.baddbmm(self.bias, batches, self.weights)


@pytest.mark.interpreted
def test_experts_and_batches(driver: Driver, tmp_path: Path) -> None:
    """Two kernels each, which find the rows of each expert themselves."""
    model, path = Mixture(), tmp_path / "mixture.pt2"

    def inputs(rows: int, each: int, *ends: int) -> tuple[Tensor, Tensor, Tensor]:
        x, batches = torch.randn(rows, 48), torch.randn(3, each, 48)
        x[:, 5] *= 40
        return x, torch.tensor(ends, dtype=torch.int32), batches

    example = inputs(9, 4, 2, 5, 9)
    shapes = ({0: Dim("rows", min=1, max=64)}, {}, {1: Dim("each", min=1, max=64)})
    int8compile.export(model, example, path, dynamic_shapes=shapes)
    loaded = aoti_load_package(str(path))
    definition = by_definition(model, *example, dynamic_shapes=shapes)
    for sizes in ((9, 4, 2, 5, 9), (9, 1, 0, 0, 6), (1, 1, 0, 0, 0), (50, 17, 3, 49, 50)):
        given = inputs(*sizes)
        driver.started = []
        try:
            results = loaded(*given)
        except RuntimeError:
            pytest.fail(driver.failed or "a call fails")
        assert driver.started == ["quantize_rows", "grouped_gemm"] * 3
        for result, expected in zip(results, definition(*given), strict=True):
            assert torch.equal(result, expected)


class Normed(nn.Module):
    """A norm with a residual add before it and one without, and a linear of each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(96), nn.RMSNorm(96)])
        self.linears = nn.ModuleList([nn.Linear(96, 32), nn.Linear(96, 40, bias=False)])
        self.eval()

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = x + residual
        return h, self.linears[0](self.norms[0](h)), self.linears[1](self.norms[1](x))


@pytest.mark.interpreted
def test_norms_are_computed_where_their_results_are_quantized(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path, rows = Normed(), tmp_path / "normed.pt2", Dim("rows", min=1, max=8)
    shapes = ({0: rows}, {0: rows})
    report = int8compile.export(model, (activations(3), activations(3)), path, dynamic_shapes=shapes)
    assert report.fused_norms == 2
    loaded = aoti_load_package(str(path))
    for m in (1, 5):
        x, residual = activations(m), activations(m)
        driver.started = []
        try:
            results = loaded(x, residual)
        except RuntimeError:
            pytest.fail(driver.failed or "a call fails")
        assert driver.started == ["quantize_rows", "gemv" if m == 1 else "gemm"] * 2
        for result, expected in zip(results, by_launches(model, Int8Config(), monkeypatch, x, residual), strict=True):
            assert torch.equal(result, expected)


# Kernels that are compiled, and nothing runs


@compiled_only
@pytest.mark.parametrize(("least", "most", "kernels"), [
    (1, 1, {"gemv"}),
    (4, 8, {"gemm"}),
    (512, None, {"gluon_gemm"}),
    pytest.param(1, None, {"gemv", "gemm", "gluon_gemm"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_triton_compiles_takes_what_the_plan_hands_over(
    least: int, most: int | None, kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, compile_one = [], Launch.compile

    def kept(self: Launch, target: Any) -> Any:
        made.append(compile_one(self, target))
        return made[-1]

    monkeypatch.setattr(Launch, "compile", kept)
    planner = Planner(dataclasses.replace(SM_90, multiprocessors=132))
    planner.quantize_rows(512, torch.bfloat16, True, 12.0, least, most)
    planner.quantized_linear(1536, 512, 2, torch.float32, 0, 512, 512, torch.bfloat16, least, most)
    planner.weight_only_linear(512, 512, torch.bfloat16, True, None, least, most)
    expected = {"quantize_rows", "fixed_point", "weight_only", *kernels}
    assert {name.rpartition("-")[0] for name in planner.cubins} == expected
    for cubin in planner.cubins.values():
        assert cubin[:4] == b"\x7fELF"
    # Gluon's kernel has more warps than it is compiled with: the driver wants as many threads as it says.
    declared = {int(re.search(r"\.reqntid (\d+)", each.asm["ptx"])[1]) for each in made}  # type: ignore[index]
    assert declared == {32 * each.metadata.num_warps for each in made}
    assert compiled(planner, tmp_path) == 3


@compiled_only
def test_what_triton_compiles_for_norms_and_experts(tmp_path: Path) -> None:
    planner = Planner(SM_90)
    planner.norm_quantize_rows(512, torch.float16, True, torch.float32, None, True, 3, 1e-5, 12.0, 1, None)
    planner.expert_linear("grouped_linear", 3, 64, 512, torch.float32, 2, torch.int64, None, 6.0, 1, 1)
    planner.expert_linear("batched_linear", 3, 64, 512, torch.float32, 1, None, torch.float16, 0.0, 3, 3)
    assert len(planner.cubins) == 5  # Of two quantizations and two products of experts, and of a norm.
    assert compiled(planner, tmp_path) == 3


def compiled(planner: Planner, folder: Path) -> int:
    """Return how many calls a plan has, by a program made of it."""
    (folder / "plan.cpp").write_text(planner.source() + "int main() { return int(int8compile_plan().calls.size()); }\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command = [*build.find_compiler().command, *flags, str(folder / "plan.cpp"), "-o", str(folder / "plan")]
    subprocess.run(command, check=True)
    return subprocess.run([folder / "plan"], check=False).returncode


def test_parameters_are_read_in_ptx() -> None:
    text = """
.visible .entry gemm(
	.param .align 64 .b8 gemm_param_0[128],
	.param .u32 gemm_param_1,
	.param .u64 .ptr .global .align 1 gemm_param_2,
	.param .f32 gemm_param_3
)
.reqntid 256
{
	.reg .pred %p<21>;
"""
    assert plan.parameters(text) == [128, 4, 8, 4]


def test_another_way_to_hand_arguments_over_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = types.SimpleNamespace(
        name="gemv",
        hash="0" * 64,
        num_ctas=1,
        num_warps=4,
        shared=0,
        global_scratch_size=0,
        profile_scratch_size=0,
        launch_cooperative_grid=False,
        launch_pdl=False,
    )
    made = types.SimpleNamespace(
        asm={"cubin": b"", "ptx": ".entry gemv(.param .u64 gemv_param_0) {"}, metadata=metadata
    )
    monkeypatch.setattr(Launch, "compile", lambda self, target: made)
    with pytest.raises(ExportError, match=r"gemv takes arguments of \[8\] bytes, and \[8, 8, .* in another way"):
        Planner(SM_90).quantized_linear(64, 64, 2, None, 0, 0, 0, torch.float32, 1, 1)
    metadata.global_scratch_size = 128
    with pytest.raises(ExportError, match="gemv in a way that a package cannot start"):
        Planner(SM_90).quantized_linear(64, 64, 2, None, 0, 0, 0, torch.float32, 1, 1)


def test_every_number_of_rows_is_looked_at() -> None:
    decided = {1: "a", 2: "b", 3: "b", 4: "b", 5: "c", 6: "d"}
    assert list(plan._changes((0, None), decided.__getitem__, 6)) == [1, 2, 5, 6]
    assert list(plan._changes((3, 5), decided.__getitem__, 6)) == [3, 5]
    assert list(plan._changes((6, 6), decided.__getitem__, 4)) == [6]
    assert list(plan._changes((9, None), lambda m: 0, 4)) == [9]


LOAD = """
import sys
import torch
try:
    torch._inductor.aoti_load_package(sys.argv[1])
except RuntimeError as error:
    sys.exit(f"refused: {error}")
"""


@compiled_only
def test_a_package_has_its_kernels_beside_its_library(
    gpu: None, loaded_driver: Driver, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "block.pt2"
    int8compile.export(Block(dtype=torch.bfloat16), (activations(2, 4, dtype=torch.bfloat16),), path)
    about = int8compile.inspect(path)
    assert about.metadata["gpu"] == {"isa": "sm_90", "multiprocessors": 2}
    assert "sm_90" in str(about)
    first = {name: value for name, value in about.metadata.items() if name != "gpu"}  # as packages were at first
    assert "sm_90" not in str(dataclasses.replace(about, metadata=first))
    with zipfile.ZipFile(path) as archive:
        names = [Path(name).name for name in archive.namelist()]
        (wrapper,) = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        source = archive.read(wrapper).decode()
    cubins = {name.rpartition("-")[0] for name in names if name.endswith(".cubin")}
    assert cubins == {"quantize_rows", "gemm"}
    assert source.count("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_quantized_linear(") == 3
    # Where there is no driver, and on another GPU, nothing runs.
    done = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this machine has no NVIDIA driver (libcuda.so.1)" in done.stderr
    loaded_driver.be(86)
    with pytest.raises(RuntimeError):
        aoti_load_package(str(path))
    assert "exported for sm_90, and this GPU is sm_86; export it on a GPU of this kind" in capfd.readouterr().err
    loaded_driver.be(90)
    aoti_load_package(str(path))


@pytest.mark.parametrize("isa", ["sm_75", "gfx942"])
def test_gpus_without_kernels_for_packages(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "of", lambda device: hardware.gpu("a GPU", isa))
    found, why = exporter._gpu_of(torch.device("cuda"))
    assert found is None
    assert why == f"there are no kernels that a package can hold for {isa}, only for NVIDIA's GPUs from Ampere on"


def test_a_gpu_with_kernels_for_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "of", lambda device: hardware.gpu("NVIDIA H100", "sm_90"))
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert exporter._gpu_of(torch.device("cuda")) == (Gpu("sm_90", tables.ARCHITECTURES["sm_90"], 132), "")
    monkeypatch.setenv("INT8COMPILE_TRITON", "0")
    found, why = exporter._gpu_of(torch.device("cuda"))
    assert (found, why) == (None, "there are no kernels for GPUs: INT8COMPILE_TRITON=0 turns them off")


@pytest.mark.parametrize("form", ["fast", None])
def test_the_form_follows_from_what_there_is(form: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_gpu_of", lambda device: (None, "there are none"))
    model = nn.Linear(32, 32).eval()
    path = tmp_path / "linear.pt2"
    if form:
        with pytest.raises(ExportError, match="form='fast': there are none; use form='portable'"):
            int8compile.export(model, (torch.randn(4, 32),), path, form=form)
    else:
        report = int8compile.export(model, (torch.randn(4, 32),), path)
        assert report.notes == ("The package is in the portable form: there are none.",)
        assert int8compile.inspect(path).metadata["form"] == "portable"


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rotate": False}, {"lm_head": "int8_weight"}], ids=str)
def test_a_gpu_runs_the_kernels_of_a_package(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = Block(dtype=dtype).cuda()
    path = tmp_path / "gpu.pt2"
    shapes = ({0: Dim("batch", min=1, max=8), 1: Dim("length", min=1, max=100)},)
    int8compile.export(model, (activations(3, 9, dtype=dtype).cuda(),), path, dynamic_shapes=shapes, config=options)
    about = int8compile.inspect(path).metadata
    assert (about["device"], about["form"]) == ("cuda", "fast")
    loaded = aoti_load_package(str(path))
    compiled = torch.compile(model, backend="int8", options=options)
    for size in ((1, 1), (2, 8), (1, 64), (1, 65), (7, 77)):
        x = activations(*size, dtype=dtype).cuda()
        with torch.no_grad():
            expected = compiled(x)
        assert torch.equal(loaded(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [Normed, Mixture])
def test_a_gpu_runs_norms_and_experts_of_a_package(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, path = make().cuda(), tmp_path / "gpu.pt2"
    inputs = (
        (activations(9), activations(9))
        if make is Normed
        else (torch.randn(9, 48), torch.tensor([2, 5, 8], dtype=torch.int32), torch.randn(3, 4, 48))
    )
    given = [each.cuda() for each in inputs]
    int8compile.export(model, given, path)
    with torch.no_grad():
        expected = torch.compile(model, backend="int8")(*given)
    for result, each in zip(aoti_load_package(str(path))(*given), expected, strict=True):
        assert torch.equal(result, each)
