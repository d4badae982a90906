"""`export` and `inspect`: a package's contents, running it without int8compile, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch.export import Dim

import int8compile
from int8compile import BadWeightError, ConfigError, ExportError, Int8Config, cpu
from int8compile.app import cli
from int8compile.app.cli import main
from int8compile.exporting import aot, exporter, package
from tests.helpers.int8_modules import int8_experts
from tests.helpers.models import by_column

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the CPU kernel")


class Block(nn.Module):
    """Joined linears (q, k and v; gate and up) and separate ones."""

    def __init__(self, size: int = 512) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.gate, self.up = (nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x) * self.k(x), dim=-1) * self.v(x)
        return self.down(torch.relu(self.gate(mixed)) * self.up(mixed))


class Several(nn.Module):
    """A batched weight, a weight-only head, and a buffer that changes at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 64, 32) / 4)
        self.lm_head = nn.Linear(32, 96, bias=False)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.lm_head(torch.bmm(x, self.experts)) + self.calls


class Partly(nn.Module):
    """A linear, and a matmul whose weight is computed anew at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.scaled = nn.Parameter(torch.randn(32, 32))
        self.factor = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) @ (self.scaled * self.factor)


def outlying(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*size)
    x[..., 5] *= 40
    return x.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def block(folder: Path) -> tuple[Block, Path, int8compile.Report]:
    torch.manual_seed(1)
    model = Block().eval()
    path = folder / "block.pt2"
    shapes = ({0: Dim("batch", min=1, max=8), 1: Dim("sequence", min=1, max=64)},)
    report = int8compile.export(model, (outlying(2, 5, 512),), path, dynamic_shapes=shapes)
    return model, path, report


def generated(path: Path) -> str:
    """Return the generated C++ that calls the kernels."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        return archive.read(name).decode()


@torch.no_grad()
def compiled(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    torch._dynamo.reset()
    result: Tensor = torch.compile(model, backend="int8", options=options)(x)
    return result


def test_a_package_computes_what_torch_compile_does(block: Any) -> None:
    model, path, report = block
    loaded = aoti_load_package(str(path))
    for size in ((2, 5), (8, 64), (1, 1), (3, 1), (1, 7)):
        x = outlying(*size, 512)
        torch.testing.assert_close(loaded(x), compiled(model, x), rtol=0, atol=0)
    assert [site.path for site in report.rewritten] == ["q", "k", "v", "gate", "up", "down"]


def test_settings_of_some_modules(tmp_path: Path) -> None:
    model, path, x = Block(64).eval(), tmp_path / "model.pt2", outlying(4, 64)
    modules = {"down": {"rotate": False, "threshold": 3.0}, "k": {"threshold": 5.0}}
    report = int8compile.export(model, (x,), path, config={"modules": modules})
    assert [site.rotation for site in report.sites] == [64, 64, 64, 64, 64, 1]
    assert torch.equal(aoti_load_package(str(path))(x), compiled(model, x, modules=modules))
    assert not torch.equal(compiled(model, x), compiled(model, x, modules=modules))
    assert int8compile.inspect(path).metadata["config"]["modules"] == modules


def test_generated_code_calls_the_kernels_and_stores_no_float_weight(block: Any) -> None:
    _, path, _ = block
    source = generated(path)
    for function in ("packed_linear_triple_no_grad", "packed_linear_pair_no_grad", "packed_linear_no_grad"):
        assert f"ERROR_CODE_CHECK(aoti_torch_cpu_{function}(" in source
    assert "proxy_executor->" not in source  # Nothing goes through the dispatcher.
    assert "gate_weight" not in source
    stored = int8compile.inspect(path).metadata["bytes"]
    # Biases of q, k, v and down.
    assert stored["float"] == 4 * 512 * 4
    # Scales; one d for q, k, v, gate and up, which have equally many inputs, and one d for down.
    weights, outputs = 3 * 512 * 512 + 3 * 512 * 1024, 4 * 512 + 2 * 1024
    assert stored["int8"] == weights + 4 * (outputs + 512 + 1024)
    code = 4 * 2**20
    assert path.stat().st_size <= 1.1 * stored["int8"] + stored["float"] + code


def test_runs_where_int8compile_cannot_be_imported(block: Any, tmp_path: Path) -> None:
    model, path, _ = block
    x = outlying(2, 9, 512)
    torch.save(x, tmp_path / "x")
    code = (
        "import sys; sys.path.append(sys.argv[1]); sys.modules['int8compile'] = None\n"
        "import torch\n"
        "x = torch.load('x')\n"
        "torch.save(torch._inductor.aoti_load_package(sys.argv[2])(x), 'y')\n"
        "assert sum(name.partition('.')[0] == 'int8compile' for name in sys.modules) == 1\n"
    )
    # -S leaves out site, which finds editable installations.
    command = [sys.executable, "-S", "-c", code, sysconfig.get_paths()["purelib"], str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # The entry point is installed, its module is not found.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y"), compiled(model, x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(2, 5, 511), "unmatched dim value at 2, expected: 512, but got: 511"),
        (torch.zeros(2, 65, 512), "too large at 1, expected to be <= 64"),
        (torch.zeros(2, 5, 512, dtype=torch.bfloat16), "unmatched dtype"),
        (torch.zeros(2, 512, 5).mT, "unmatched stride value"),
        (torch.zeros(2, 9, 512)[:, :5], "expected size 2==2, stride 4608==2560 at dim=0"),
    ],
    ids=("size", "bound", "dtype", "stride", "a stride of sizes that change"),
)
def test_inputs_that_it_was_not_compiled_for_are_refused(block: Any, x: Tensor, told: str) -> None:
    loaded = aoti_load_package(str(block[1]))
    with pytest.raises(RuntimeError, match=told):
        loaded(x)


def test_inspect_tells_what_is_inside(block: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, path, report = block
    found = int8compile.inspect(path)
    about = found.metadata
    assert (about["format"], about["device"], about["form"]) == (package.FORMAT, "cpu", "fast")
    assert (about["torch"], about["isa"]) == (torch.__version__, "native")
    assert about["config"] == json.loads(json.dumps(dataclasses.asdict(Int8Config())))
    assert about["report"] == json.loads(json.dumps(report.to_dict()))
    (given,) = about["inputs"]
    batch, sequence, size = given["shape"]
    assert (given["dtype"], size) == ("float32", 512)
    assert (about["sizes"][batch], about["sizes"][sequence]) == ([1, 8], [1, 64])
    assert set(about["variants"]) >= set(cpu.variants())
    # Read by C++, which has no JSON parser.
    assert aoti_load_package(str(path)).get_metadata()[package.INPUTS] == "float32 3 -1 -1 512"

    assert main(["inspect", str(path)]) == 0
    assert "6 of 6 linears in int8" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))


# Refusals at loading


def native_target() -> Any:
    """Return the target that `export` compiles for by default."""
    return aot.Target.of("native", torch.device("cpu"), "fast", Int8Config(), cpu.load(), None)


def test_a_cpu_that_lacks_what_the_code_uses_is_told_at_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = native_target()
    lacking = [macro for macro in here.library.features if macro not in here.needs]
    if not lacking:
        pytest.skip("this CPU has all that there is")
    target = dataclasses.replace(here, isa="future", needs=(*here.needs, lacking[0]))
    monkeypatch.setattr(aot.Target, "of", lambda *_: target)
    path = tmp_path / "future.pt2"
    int8compile.export(nn.Linear(32, 32).eval(), (torch.zeros(2, 32),), path)
    with pytest.raises(RuntimeError):
        aoti_load_package(str(path))
    told = f"was exported with isa=future and this CPU has no {lacking[0]}; export it with an isa that this CPU has"
    assert told in capfd.readouterr().err


# Other models and options


def test_a_quantized_model_makes_the_same_package(block: Any, folder: Path) -> None:
    _, path, _ = block
    torch.manual_seed(1)
    quantized = Block().eval()
    int8compile.quantize_(quantized)
    other = folder / "quantized.pt2"
    report = int8compile.export(quantized, (outlying(2, 5, 512),), other)
    assert len(report.rewritten) == 6
    x = outlying(2, 5, 512)
    assert aoti_load_package(str(other))(x).equal(aoti_load_package(str(path))(x))
    found, expected = (int8compile.inspect(each).metadata for each in (other, path))
    assert found["bytes"] == expected["bytes"]
    assert [site["rotation"] for site in found["report"]["sites"]] == [128] * 6
    assert "6 linears by 128" in str(int8compile.inspect(other))


def test_batched_and_weight_only_linears_and_buffers_that_change(folder: Path) -> None:
    model = Several().eval()
    path = folder / "several.pt2"
    config = {"lm_head": "int8_weight"}
    x = outlying(3, 5, 64)
    report = int8compile.export(model, (x,), path, config=config)
    assert {site.op: site.weight_only for site in report.sites} == {"bmm": False, "linear": True}
    loaded = aoti_load_package(str(path))
    # If Inductor took a buffer of zeros for a constant, the second call would count 1 again.
    for call in (1, 2, 3):
        assert loaded(x).equal(compiled(model, x, **config))
        assert model.calls.item() == call  # Counted by `compiled`; the package has its own buffer.


def test_columns_are_compiled_from_their_definition(folder: Path) -> None:
    """A package has no kernel for outlier columns and needs none."""
    model, path = Block(64).eval(), folder / "columns.pt2"
    x = outlying(2, 5, 64)
    shapes = ({0: Dim("batch", min=1, max=8), 1: Dim("sequence", min=1, max=64)},)
    config = {"outliers": "column"}
    report = int8compile.export(model, (x,), path, dynamic_shapes=shapes, config=config)
    assert len(report.rewritten) == 6
    source = generated(path)
    assert not re.search(r"ERROR_CODE_CHECK\(aoti_torch_cpu_\w*_linear|proxy_executor->", source)
    assert "int8_0_qweight" in source
    assert "gate_weight" not in source
    loaded = aoti_load_package(str(path))
    for size in ((2, 5), (1, 1), (8, 64)):
        x = outlying(*size, 64)
        # The outlier column is multiplied in float, by code compiled for other sizes.
        torch.testing.assert_close(loaded(x), compiled(model, x, **config), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded(x), in_columns(model, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def in_columns(model: Block, x: Tensor) -> Tensor:
    """Return the block's result by the operators in eager mode."""
    mixed = torch.softmax(by_column(model.q, x) * by_column(model.k, x), dim=-1) * by_column(model.v, x)
    return by_column(model.down, torch.relu(by_column(model.gate, mixed)) * by_column(model.up, mixed))


@pytest.mark.slow
def test_bfloat16_and_another_isa(folder: Path) -> None:
    if cpu.variant() not in ("avx2", "avxvnni", "avx512vnni", "amx"):
        pytest.skip("needs a CPU with AVX2")
    model = Block(64).to(torch.bfloat16).eval()
    path = folder / "avx2.pt2"
    x = outlying(4, 64, dtype=torch.bfloat16)
    int8compile.export(model, (x,), path, isa="avx2")
    about = int8compile.inspect(path).metadata
    assert about["isa"] == "avx2"
    assert "__AVX2__" in about["needs"]
    assert not [macro for macro in about["needs"] if "AVX512" in macro]
    expected = compiled(model, x)
    # Inductor keeps float32 between fused operators, and what it fuses depends on the registers.
    torch.testing.assert_close(aoti_load_package(str(path))(x), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="row"),
        pytest.param({"outliers": "column"}, id="column", marks=pytest.mark.slow),
        pytest.param({"threshold": 0.0}, id="none", marks=pytest.mark.slow),
    ],
)
def test_the_portable_form_computes_the_same(config: dict[str, Any], folder: Path) -> None:
    model = Block(64).eval()
    x = outlying(7, 64)
    path = folder / "portable.pt2"
    int8compile.export(model, (x,), path, config=config, form="portable")
    assert "ERROR_CODE_CHECK(aoti_torch_cpu_packed" not in generated(path)
    expected = compiled(model, x, **config)
    # Inductor may put softmax and similar operations into other kernels; one bit of an activation can move an integer.
    torch.testing.assert_close(aoti_load_package(str(path))(x), expected, rtol=0, atol=1e-3)
    assert int8compile.inspect(path).metadata["form"] == "portable"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_a_gpu_is_exported_in_the_portable_form(dtype: torch.dtype, folder: Path) -> None:
    model = Block(64).to("cuda", dtype).eval()
    x = outlying(7, 64, dtype=dtype).cuda()
    path = folder / "gpu.pt2"
    shapes = ({0: Dim("rows", min=1, max=64)},)
    int8compile.export(model, (x,), path, dynamic_shapes=shapes, form="portable")
    about = int8compile.inspect(path).metadata
    assert (about["device"], about["form"]) == ("cuda", "portable")
    loaded = aoti_load_package(str(path))
    for rows in (7, 1, 64):
        x = outlying(rows, 64, dtype=dtype).cuda()
        tolerance = 1e-3 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(loaded(x), compiled(model, x), rtol=tolerance, atol=tolerance)


class Particular(nn.Module):
    """A model that requires sizes that are multiples of 4, and squeezes one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.linear(x.view(-1, 4, 32).sum(dim=1))
        return (z * 2 if x.shape[0] > y.shape[0] else z).squeeze(0)


def test_what_the_model_asks_of_sizes_is_checked_at_every_call(tmp_path: Path) -> None:
    model = Particular().eval()
    path = tmp_path / "with spaces" / "particular.pt2"
    sizes = ({0: Dim.AUTO}, {0: Dim.AUTO})
    int8compile.export(model, (torch.zeros(8, 32), torch.zeros(3, 1)), path, dynamic_shapes=sizes)
    loaded = aoti_load_package(str(path))
    x, y = outlying(12, 32), torch.zeros(11, 1)
    with torch.no_grad():
        assert loaded(x, y).equal(torch.compile(model, backend="int8")(x, y))
    # 10 rows are no multiple of 4; 12 is less than 13, which takes another branch; 4 rows are squeezed away.
    for rows, others in ((10, 3), (12, 13), (4, 3)):
        with pytest.raises(RuntimeError, match="the model was exported for sizes of inputs with"):
            loaded(torch.zeros(rows, 32), torch.zeros(others, 1))


def test_a_dimension_of_size_1_may_have_any_stride(block: Any) -> None:
    model, path, _ = block
    x = outlying(1, 9, 512)[:, -1:]
    assert x.stride() == (9 * 512, 512, 1)
    assert aoti_load_package(str(path))(x).equal(compiled(model, x))


# Refusals that compile nothing


def test_a_part_that_would_stay_float_is_named(folder: Path) -> None:
    path = folder / "partly.pt2"
    with pytest.raises(ExportError, match=r"1 of 2 linears would stay in float: .*\(matmul\): its weight is computed"):
        int8compile.export(Partly().eval(), (torch.zeros(3, 32),), path)
    assert not path.exists()
    report = int8compile.export(Partly().eval(), (torch.zeros(3, 32),), path, allow_partial=True)
    assert [site.path for site in report.rewritten] == ["plain"]
    assert len(report.skipped) == 1


def test_what_options_keep_in_float_is_not_refused_unless_nothing_is_left(tmp_path: Path) -> None:
    model = Partly().eval().plain
    with pytest.raises(ExportError, match=r"no linear of the model would be int8: .*min_features"):
        int8compile.export(model, (torch.zeros(3, 32),), tmp_path / "m.pt2", config={"min_features": 64})
    with pytest.raises(ExportError, match="no linear of the model would be int8, because it has none"):
        int8compile.export(nn.ReLU().eval(), (torch.zeros(3),), tmp_path / "m.pt2")


class Uses(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_what_torch_export_cannot_capture_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch.export cannot capture Branching: \w*Guard\w*: .*"):
        int8compile.export(Branching().eval(), (torch.zeros(3, 32),), tmp_path / "m.pt2")


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
class Speller(nn.Module):
    """An embedding whose table is also the output projection's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 64)
        self.linear = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 4096, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.linear(self.embed(ids)))


@pytest.mark.parametrize("lm_head", ["int8_weight", "int8"])
def test_a_tied_table_in_int8_is_stored_once(lm_head: str, folder: Path) -> None:
    model = Speller().eval()
    int8compile.quantize_(model, {"lm_head": lm_head})
    path = folder / "tied.pt2"
    ids = torch.tensor([[3, 0, 4095]])
    int8compile.export(model, (ids,), path)
    assert torch.equal(aoti_load_package(str(path))(ids), model(ids))
    assert int8compile.inspect(path).metadata["bytes"]["int8"] == 4096 * (64 + 4) + 64 * (64 + 4) + 4 * 64


class Mixture(nn.Module):
    """Only experts made by `quantize_`."""

    def __init__(self, rotated: str = "together") -> None:
        super().__init__()
        self.experts = int8_experts(rotated)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        result: Tensor = self.experts(x, ends)
        return result


@pytest.mark.parametrize(
    ("rotated", "dtype", "d"),
    [("together", torch.float32, 48), ("each", torch.bfloat16, 3 * 48), ("not", torch.bfloat16, 0)],
)
def test_experts_in_int8(rotated: str, dtype: torch.dtype, d: int, folder: Path) -> None:
    """Each row goes through its expert; experts may have no rows, and rows without an expert give zeros."""
    model, x = Mixture(rotated).eval(), outlying(9, 48, dtype=dtype)
    path = folder / "mixture.pt2"
    shapes = ({0: Dim("rows", min=1, max=64)}, {})
    ends = torch.tensor([2, 5, 9], dtype=torch.int32)
    report = int8compile.export(model, (x, ends), path, dynamic_shapes=shapes)
    assert [(site.op, site.rotation) for site in report.rewritten] == [("grouped_linear", 16 if d else 1)]
    assert int8compile.inspect(path).metadata["bytes"] == {"int8": 3 * 24 * (48 + 4) + 4 * d, "float": 0}
    loaded = aoti_load_package(str(path))
    for each in ([2, 5, 9], [0, 0, 9], [0, 4, 6], [0, 0, 0]):
        ends = torch.tensor(each, dtype=torch.int32)
        assert torch.equal(loaded(x, ends), model(x, ends))
    assert torch.equal(loaded(x[:4], torch.tensor([1, 1, 3], dtype=torch.int32))[3:], torch.zeros(1, 24, dtype=dtype))
    for bad in ([2, 1, 9], [2, 3, 10]):
        with pytest.raises(RuntimeError, match="ends must ascend and be at most 9, x's rows"):
            loaded(x, torch.tensor(bad, dtype=torch.int32))


def test_an_operator_without_a_kernel_is_named(tmp_path: Path) -> None:
    inputs = torch.randn(9, 48), torch.tensor([2, 5, 9], dtype=torch.int32)
    with pytest.raises(
        ExportError, match=r"^experts calls int8compile::grouped_linear, for which packages have no kernel"
    ):
        int8compile.export(Mixture().eval(), inputs, tmp_path / "m.pt2", form="portable")


def test_bad_arguments_are_told_before_anything_is_done(tmp_path: Path) -> None:
    model, x = nn.Linear(32, 32).eval(), (torch.zeros(2, 32),)
    path = tmp_path / "m.pt2"

    def refuses(told: str, model: Any = model, path: Path = path, **options: Any) -> None:
        with pytest.raises(ExportError, match=told):
            int8compile.export(model, x, path, **options)

    refuses("is a function; give an nn.Module", model=lambda x: x)
    refuses("in training mode", model=nn.Linear(32, 32))
    refuses("must end in .pt2", path=tmp_path / "m.pt")
    refuses("isa='sse'; allowed are 'native', 'avx512', 'avx2'", isa="sse")
    refuses("form='fastest'; allowed are 'fast', 'portable'", form="fastest")
    with pytest.raises(ExportError, match="the inputs 3, True are not tensors, and every call would use these values"):
        int8compile.export(model, (*x, 3), path, {"flag": True})
    refuses("is on cpu, meta", model=nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta")).eval())
    (tmp_path / "folder.pt2").mkdir()
    refuses("is a folder", path=tmp_path / "folder.pt2")
    with pytest.raises(ConfigError, match="treshold"):
        int8compile.export(model, x, path, config={"treshold": 3})
    assert sorted(tmp_path.iterdir()) == [tmp_path / "folder.pt2"]


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(32, 32).eval()
    with torch.no_grad():
        torch.compile(model, backend="int8", options={"free_weights": True})(torch.zeros(2, 32))
    with pytest.raises(ExportError, match="weight has no values any more"):
        int8compile.export(model, (torch.zeros(2, 32),), tmp_path / "m.pt2")
    bad = nn.Linear(32, 32).eval()
    bad.weight.data[3, 4] = torch.nan
    with pytest.raises(BadWeightError, match="1 NaN or Inf of 1024"):
        int8compile.export(bad, (torch.zeros(2, 32),), tmp_path / "m.pt2")


def test_a_compiler_that_inductor_cannot_call_is_told(tmp_path: Path) -> None:
    compiler = torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler"))
    with compiler, pytest.raises(ExportError, match="Inductor cannot tell what it compiles for: InvalidCxxCompiler"):
        int8compile.export(nn.Linear(32, 32).eval(), (torch.zeros(2, 32),), tmp_path / "m.pt2")


def test_a_buffer_with_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(32, 32).eval()
    model.register_buffer("int8_0_scale", torch.ones(32))
    module = torch.export.export(Uses(model).eval(), (torch.zeros(2, 32),), strict=False).module(check_guards=False)
    module.register_buffer("int8_0_scale", torch.ones(32))
    with pytest.raises(ExportError, match=r"buffers int8_0_scale have names that int8compile uses"):
        exporter.rewrite(module, Int8Config())


def test_the_command_line_knows_the_same_choices() -> None:
    assert (cli.ISAS, cli.FORMS) == (exporter.ISAS, exporter.FORMS)


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\ncompilers")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(ExportError, match="AOTInductor cannot compile the model: RuntimeError: out of compilers"):
        int8compile.export(nn.Linear(32, 32).eval(), (torch.zeros(2, 32),), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_generated_code_that_is_not_known_is_refused() -> None:
    target = native_target()
    with pytest.raises(ExportError, match="generates code that this version of int8compile does not know"):
        aot._with_checks("int main() {}")
    with pytest.raises(ExportError, match="did not keep the int8 linears"):
        aot._check_generated("", torch.fx.symbolic_trace(nn.ReLU()), target)


def test_foreign_operators_are_noted(tmp_path: Path) -> None:
    with torch.library._scoped_library("test_export", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(32, 32)

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = torch.ops.test_export.twice(self.linear(x))
                return result

        program = torch.export.export(Twice().eval(), (torch.zeros(2, 32),))
        (note,) = exporter._check_operators(program.module(), native_target())
        assert "test_export.twice.default; programs that load it must register" in note


def test_export_on_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "smollm2", str(tmp_path / "out.onnx")]) == 2
    assert "must end in .pt2" in capsys.readouterr().err
    assert main(["export", "smollm2", str(tmp_path / "out.pt2"), "--isa", "sse"]) == 2
    assert "invalid choice: 'sse'" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none.pt2")]) == 2
    assert "does not exist" in capsys.readouterr().err
