"""The kernels in packages for GPUs, and how they are launched. Without a GPU, the CPU stands in for it.

The export then gives a package for the CPU that calls the operators for GPUs, with a driver (cuda_driver.cpp) that
hands kernels to the test. In Triton's interpreter kernels and whole models run; otherwise kernels are compiled and
inspected.

    TRITON_INTERPRET=1 python -m pytest tests/exporting/test_export_gpu.py
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch.export import Dim

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import int8compile
from int8compile import ExportError, Int8Config, cpu, hardware
from int8compile.cpu.compiler import find_compiler
from int8compile.exporting import exporter
from int8compile.triton_kernels import loading, plan, tables
from int8compile.triton_kernels.launch import Launch
from int8compile.triton_kernels.plan import Gpu, Planner
from tests.helpers.gpu_packages import SM_90, Block, Driver, activations, by_definition, by_launches, metadata_of
from tests.helpers.int8_modules import int8_experts
from tests.helpers.interpreter import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="needs the CPU kernel's library"),
    # The interpreter computes with NumPy, which warns about operations on NaN and Inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

compiled_only = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 interprets, nothing is compiled")


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
    """Each kernel gets the same numbers, for few rows and for many."""
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
        # q, k and v; gate and up; down. The head is in float, or weight-only.
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
    """The kernel's programs compute several tiles each."""
    model, path = nn.Linear(96, 32).eval(), tmp_path / "many.pt2"
    int8compile.export(model, (activations(300),), path, dynamic_shapes=({0: Dim("rows", min=250, max=400)},))
    loaded = aoti_load_package(str(path))
    x = activations(257)
    y = loaded(x)
    assert driver.started == ["quantize_rows", "gluon_gemm"]
    assert torch.equal(y, by_definition(model, x)(x))


@pytest.mark.interpreted
def test_threads_devices_and_cuda_graphs(driver: Driver, tmp_path: Path) -> None:
    """Kernels run on their model's GPU, and the thread afterwards uses the same GPU as before.

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
    """Weight-only products work for any number of rows."""
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
    """A linear that reads a part of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., 1:])


@pytest.mark.interpreted
def test_activations_that_begin_anywhere(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for tensors at multiples of 16 bytes, and for rows without gaps.

    Split sums have memory of their own where the table splits them; here for two rows and more.
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
    """Experts with a d each and with one d for all, and batches with a weight each."""

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
    """Each product runs two kernels, which find the rows of each expert themselves."""
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
    """A norm with a residual add before it and one without, each with a linear."""

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


# Kernels that are compiled but do not run


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

    def kept(self: Launch, target: Any, *, overlap: bool = True) -> Any:
        made.append(compile_one(self, target, overlap=overlap))
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
    # Gluon's kernel has more warps than it is compiled with; the driver expects the number of threads in the PTX.
    declared = {int(re.search(r"\.reqntid (\d+)", each.asm["ptx"])[1]) for each in made}  # type: ignore[index]
    assert declared == {32 * each.metadata.num_warps for each in made}
    assert compiled(planner, tmp_path) == 3


@compiled_only
def test_what_triton_compiles_for_norms_and_experts(tmp_path: Path) -> None:
    planner = Planner(SM_90)
    planner.norm_quantize_rows(512, torch.float16, True, torch.float32, None, True, 3, 1e-5, 12.0, 1, None)
    planner.expert_linear("grouped_linear", 3, 64, 512, torch.float32, 2, torch.int64, None, 6.0, 1, 1)
    planner.expert_linear("batched_linear", 3, 64, 512, torch.float32, 1, None, torch.float16, 0.0, 3, 3)
    assert len(planner.cubins) == 5  # Two quantizations, two products of experts, one norm.
    assert compiled(planner, tmp_path) == 3


def compiled(planner: Planner, folder: Path) -> int:
    """Return the number of calls in a plan, counted by a compiled program."""
    (folder / "plan.cpp").write_text(planner.source() + "int main() { return int(int8compile_plan().calls.size()); }\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command = [*find_compiler().command, *flags, str(folder / "plan.cpp"), "-o", str(folder / "plan")]
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
    metadata = metadata_of("gemv", hash="0" * 64, num_warps=4, shared=0)
    made = types.SimpleNamespace(
        asm={"cubin": b"", "ptx": ".entry gemv(.param .u64 gemv_param_0) {"}, metadata=metadata
    )
    monkeypatch.setattr(Launch, "compile", lambda self, target, **given: made)
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
    first = {name: value for name, value in about.metadata.items() if name != "gpu"}  # As in the first packages.
    assert "sm_90" not in str(dataclasses.replace(about, metadata=first))
    with zipfile.ZipFile(path) as archive:
        names = [Path(name).name for name in archive.namelist()]
        (wrapper,) = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        source = archive.read(wrapper).decode()
    cubins = {name.rpartition("-")[0] for name in names if name.endswith(".cubin")}
    assert cubins == {"quantize_rows", "gemm"}
    assert source.count("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_quantized_linear(") == 3
    # Without a driver, or on another GPU, the package refuses to run.
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
    assert why == f"packages have kernels only for NVIDIA's GPUs from Ampere on, and not for {isa}"


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
