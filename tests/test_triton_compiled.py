"""Every configuration of the table, compiled for its architecture without a GPU (tier 3)."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from benchmarks import compiled
from int8compile.ops import digits
from int8compile.ops.digits import Activations
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.policy import Policy
from int8compile.triton_kernels.quantize.launch import launches
from int8compile.triton_kernels.tables import ARCHITECTURES, Architecture, Config
from int8compile.triton_kernels.weight_only.launch import launch as weight_only_launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets, nothing is compiled"
)

WITH_INT8 = [arch for arch in ARCHITECTURES.values() if arch.instruction]
# Most of the others' configurations differ in nothing that a compiler would trip over: of these only the first choices
# are fast tests.
MOST = ("sm_90",)
CASES = [
    pytest.param(
        *(arch, bucket, config, by_column),
        id=f"{arch.name}-{bucket}-{config}{'-column' * by_column}",
        marks=[] if (arch.name in MOST or config is arch.rows[bucket][0]) and not by_column else pytest.mark.slow,
    )
    for by_column in (False, True)
    for arch in WITH_INT8
    for bucket, config in compiled.cases(arch, by_column=by_column)
    # Of the column policy, whose three digits want more registers, the first choices.
    if not by_column or config is tables.candidates(arch, bucket, compiled.K, lists=bucket > 1)[0]
]


@pytest.mark.parametrize(("arch", "bucket", "config", "by_column"), CASES)
def test_compiles_to_what_it_is_meant_for(arch: Architecture, bucket: int, config: Config, by_column: bool) -> None:
    found = compiled.compiled(arch, bucket, config, by_column=by_column)
    assert found.shared <= arch.shared_memory
    assert found.spills_in_loops == 0
    assert found.widest_load == 16 or (arch.name == "gfx942" and config.bn < 4)
    # Some bytes outside of the main loop cost less than a smaller tile would.
    assert found.spilled <= (256 if config.bn == 256 else 0)
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
@pytest.mark.parametrize(("m", "k", "threshold", "by_column"), [
    (1, 4096, 6.0, False),
    (2048, 4096, 6.0, False),
    (2048, 14336, 6.0, True),
    (2048, 28672, 6.0, False),
    (2048, 4096, 0.0, False),
])  # fmt: skip
@pytest.mark.parametrize("name", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_quantize_compiles(name: str, m: int, k: int, threshold: float, by_column: bool, dtype: torch.dtype) -> None:
    arch = ARCHITECTURES[name]
    x = torch.empty(m, k, dtype=dtype, device="meta")
    into = Activations.empty(x, threshold, by_column)
    policy = Policy.of(m, k, digits.count(dtype, by_column), threshold, by_column, arch)
    calls = launches(x, into, policy)
    assert len(calls) == (3 if policy.lists and threshold else 1)
    for call in calls:
        found = compiled.examine(call.compile(compiled.target_of(arch)))
        assert found["spilled"] == 0
        assert found["shared"] <= arch.shared_memory


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("m", [pytest.param(1, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weight_only_compiles(name: str, m: int, dtype: torch.dtype) -> None:
    """For every GPU that Triton knows, those without int8 matrix instructions too."""
    arch = ARCHITECTURES[name]
    x, y = (torch.empty(m, 4096, dtype=dtype, device="meta") for _ in range(2))
    qweight = torch.empty(4096, 4096, dtype=torch.int8, device="meta")
    call = weight_only_launch(x, qweight, torch.empty(4096, device="meta"), None, y)
    found = compiled.examine(call.compile(compiled.target_of(arch)))
    assert found["shared"] <= arch.shared_memory
    assert found["spills_in_loops"] == 0


def test_activations_and_parts_compile() -> None:
    """The whole end of a kernel, on the largest tile; the halves of a tile keep gate and up together."""
    arch = ARCHITECTURES["sm_90"]
    config = arch.rows[512][0]
    for activation in (digits.GELU, digits.SILU_MUL):
        call = compiled.launch(arch, 512, config, by_column=False)
        call.constants["ACTIVATION"] = activation
        found = compiled.examine(call.compile(compiled.target_of(arch)))
        assert found["spills_in_loops"] == 0
    for bucket in (1, 2, 33):
        call = compiled.launch(arch, bucket, arch.rows[bucket][0], by_column=False)
        call.constants.update(ACTIVATION=digits.SILU_MUL)
        assert compiled.examine(call.compile(compiled.target_of(arch)))["spilled"] == 0
    call = compiled.launch(arch, 512, config, by_column=False)
    call.constants["PARTS"] = 3
    text = call.compile(compiled.target_of(arch)).asm["ptx"]
    assert "st.global.v4.b32" in text  # neighbours still are stored together


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
    monkeypatch.setattr(compiled, "cases", lambda arch, by_column: [(1, arch.rows[1][0])])
    assert compiled.main(["--arch", "sm_80"]) == 0
    assert "| sm_80  |        1 | gemv 1x8x512 4w 1s |" in capsys.readouterr().out


def test_the_committed_table_has_every_configuration() -> None:
    """If not: python -m benchmarks.compiled --out benchmarks/results/triton-compiled.md."""
    committed = (pathlib.Path(compiled.__file__).parent / "results" / "triton-compiled.md").read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in committed.splitlines()}
    expected = {
        (arch.name, str(bucket), str(config))
        for arch in WITH_INT8
        for bucket, config in compiled.cases(arch, by_column=False)
    }
    assert expected <= rows
    assert len(rows - expected) < 10  # the heading
