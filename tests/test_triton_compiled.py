"""Every configuration of the table, compiled for its architecture without a GPU (tier 3)."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from benchmarks import compiled
from int8compile.ops import quantized
from int8compile.triton_kernels.quantize.launch import launch as quantize_launch
from int8compile.triton_kernels.tables import ARCHITECTURES, Architecture, Config
from int8compile.triton_kernels.weight_only.launch import launches as weight_only_launches

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets, nothing is compiled"
)

WITH_INT8 = [arch for arch in ARCHITECTURES.values() if arch.instruction]
# Most of the others' configurations differ in nothing that a compiler would trip over: of these only the first choices
# are fast tests.
MOST = ("sm_90",)
CASES = [
    pytest.param(
        *(arch, bucket, config),
        id=f"{arch.name}-{bucket}-{config}",
        marks=[] if arch.name in MOST or config is arch.rows[bucket][0] else pytest.mark.slow,
    )
    for arch in WITH_INT8
    for bucket, config in compiled.cases(arch)
]


@pytest.mark.parametrize(("arch", "bucket", "config"), CASES)
def test_compiles_to_what_it_is_meant_for(arch: Architecture, bucket: int, config: Config) -> None:
    found = compiled.compiled(arch, bucket, config)
    assert found.shared <= arch.shared_memory
    assert (found.spilled, found.spills_in_loops) == (0, 0)
    assert found.widest_load == 16 or (arch.name == "gfx942" and config.bn < 4)
    instructions = " ".join(found.instructions)
    if config.kernel == "gemv":
        assert not instructions
    elif arch.name == "gfx942":
        assert "v_mfma_i32" in instructions
        assert "_i8" in instructions
    elif arch.instruction == "wgmma" and config.bm >= 64:
        assert "wgmma.mma_async" in instructions
        assert "s32.s8.s8" in instructions
        assert "mma.sync" not in instructions
    else:
        assert "s32.s8.s8" in instructions or "tcgen05.mma.cta_group::1.kind::i8" in instructions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [576, 4096, 14336, 28672])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_quantize_compiles(name: str, rotated: bool, k: int, dtype: torch.dtype) -> None:
    arch = ARCHITECTURES[name]
    x = torch.empty(2048, k, dtype=dtype, device="meta")
    d = torch.empty(k, device="meta") if rotated else None
    call = quantize_launch(x, d, 12.0, *quantized.empty_rows(x, 12.0))
    found = compiled.examine(call.compile(compiled.target_of(arch)))
    assert found["spilled"] == 0
    assert found["shared"] <= arch.shared_memory


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", WITH_INT8, ids=lambda arch: arch.name)
def test_weight_only_compiles(arch: Architecture, dtype: torch.dtype) -> None:
    x, y = (torch.empty(64, 4096, dtype=dtype, device="meta") for _ in range(2))
    qweight = torch.empty(4096, 4096, dtype=torch.int8, device="meta")
    scale = torch.empty(4096, device="meta")
    for call in weight_only_launches(x, scale, qweight, scale, None, y):
        found = compiled.examine(call.compile(compiled.target_of(arch)))
        assert found["shared"] <= arch.shared_memory
        assert found["spilled"] == 0


def test_activations_and_parts_compile() -> None:
    """The whole end of a kernel, on the largest tile."""
    arch = ARCHITECTURES["sm_90"]
    config = arch.rows[512][0]
    for activation in (quantized.GELU, quantized.SILU_MUL):
        found = compiled.examine(compiled.launch(arch, 512, config, activation).compile(compiled.target_of(arch)))
        assert found["spills_in_loops"] == 0
    for bucket in (1, 2, 33):
        call = compiled.launch(arch, bucket, arch.rows[bucket][0], quantized.SILU_MUL)
        assert compiled.examine(call.compile(compiled.target_of(arch)))["spilled"] == 0
    call = compiled.launch(arch, 512, config)
    call.constants["PARTS"] = 3
    text = call.compile(compiled.target_of(arch)).asm["ptx"]
    assert "st.global.v4.b32" in text  # neighbours still are stored together
    assert ".satfinite" not in text  # partial sums may wrap


def test_spills_are_looked_for_in_innermost_loops_with_matrix_instructions() -> None:
    sass = """
    .L_x_0:
        /*0000*/ STL [R1], R2 ;
    .L_x_1:
        /*0010*/ IMMA.16832.S8.S8 R0, R1, R2, R3 ;
        {inner}
        /*0020*/ @P0 BRA `(.L_x_1) ;
    .L_x_2:
        /*0030*/ LDL R2, [R1] ;
        /*0040*/ @P1 BRA `(.L_x_2) ;
        /*0050*/ @P2 BRA `(.L_x_0) ;
    """
    assert compiled.spills_in_loops(sass.format(inner="")) == 0
    assert compiled.spills_in_loops(sass.format(inner="/*0018*/ LDL.64 R2, [R1] ;")) == 1


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "cases", lambda arch: [(1, arch.rows[1][0])])
    assert compiled.main(["--arch", "sm_80"]) == 0
    assert "| sm_80  |        1 | gemv 1x8x512 4w 1s |" in capsys.readouterr().out


def test_the_committed_table_has_every_configuration() -> None:
    """If not: python -m benchmarks.compiled --out benchmarks/results/triton-compiled.md."""
    committed = (pathlib.Path(compiled.__file__).parent / "results" / "triton-compiled.md").read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in committed.splitlines()}
    expected = {(arch.name, str(bucket), str(config)) for arch in WITH_INT8 for bucket, config in compiled.cases(arch)}
    assert expected <= rows
    assert len(rows - expected) < 10  # the heading
