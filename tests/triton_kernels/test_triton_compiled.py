"""Every configuration of the table, compiled for its architecture without a GPU (tier 3)."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from benchmarks import compiled, sass
from benchmarks.compiled import LIMITS, QUANTIZED
from int8compile.ops import quantized
from int8compile.triton_kernels.grouped_gemm.launch import grouped_gemm_launch
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import in_chunks, norm_launch, quantize_launch
from int8compile.triton_kernels.tables import ARCHITECTURES, Architecture, Config
from int8compile.triton_kernels.weight_only.launch import weight_only_launches

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets, nothing is compiled"
)

WITH_INT8 = [arch for arch in ARCHITECTURES.values() if arch.matrix_instruction]
# For other architectures, only the first choices are fast tests: most of their configurations compile alike.
MOST = ("sm_90",)
CASES = [
    pytest.param(
        *(arch, bucket, config),
        id=f"{arch.name}-{bucket}-{config}",
        marks=[] if arch.name in MOST or config is arch.by_bucket[bucket][0] else pytest.mark.slow,
    )
    for arch in WITH_INT8
    for bucket, config in compiled.cases(arch)
]


@pytest.mark.parametrize(("arch", "bucket", "config"), CASES)
def test_compiles_to_what_it_is_meant_for(arch: Architecture, bucket: int, config: Config) -> None:
    found = compiled.compile_product(arch, bucket, config)
    assert found.shared <= arch.shared_memory
    assert (found.spilled, found.spills_in_loops) == (0, 0)
    assert found.widest_load == 16 or (arch.name == "gfx942" and config.bn < 4)
    instructions = " ".join(found.instructions)
    if config.kernel == "gemv":
        assert not instructions
        assert found.loop is None or found.loop.dots > 0
    elif arch.name == "gfx942":
        assert "v_mfma_i32" in instructions
        assert "_i8" in instructions
    elif arch.matrix_instruction == "wgmma" and config.bm >= 64:
        assert "wgmma.mma_async" in instructions
        assert "s32.s8.s8" in instructions
        assert "mma.sync" not in instructions
    else:
        assert "s32.s8.s8" in instructions or "tcgen05.mma.cta_group::1.kind::i8" in instructions
    if arch.name == "sm_90":
        assert_loop(found, config)


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, id=arch.name, marks=[] if arch.name in MOST else pytest.mark.slow) for arch in WITH_INT8],
)
@pytest.mark.parametrize("bucket", [2, 17, 33, 65])
def test_split_sums_compile(bucket: int, arch: Architecture) -> None:
    """All threads store their sums before the program counts itself, and read the others' sums only after that."""
    config = next(config for config in arch.by_bucket[bucket] if config.kernel == "gemm")
    kernel = compiled.launch(bucket, dataclasses.replace(config, splits=2)).compile(compiled.target_of(arch))
    found = compiled.examine(kernel)
    assert found.spills_in_loops == 0
    assert found.shared <= arch.shared_memory
    if "ptx" in kernel.asm:
        stores, barrier, count, others = (
            r"st\.global\.v4\.b32 ", r"bar\.sync", r"atom\.global\.gpu\.acq_rel\.add\.u32", r"ld\.global\.cg\.v4\.b32 ",
        )  # fmt: skip
        order = re.findall("|".join((stores, barrier, count, others)), kernel.asm["ptx"])
        at = next(i for i, each in enumerate(order) if each.startswith("atom"))
        assert order[at - 1].startswith("bar.sync")
        assert [each for each in order[:at] if not each.startswith("bar.sync")][-1].startswith("st.global")
        assert order[at + 1].startswith("bar.sync")
        assert not any(each.startswith("ld.global.cg") for each in order[:at])
        assert any(each.startswith("ld.global.cg") for each in order[at:])


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, id=arch.name, marks=[] if arch.name in MOST else pytest.mark.slow) for arch in WITH_INT8],
)
@pytest.mark.parametrize("m", [8, 200, 400, 4096])
def test_grouped_compiles(m: int, arch: Architecture) -> None:
    x, y = (torch.empty(m, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
    made = quantized.empty_rows(x, 12.0)
    qweight = torch.empty(8, 4096, 4096, dtype=torch.int8, device="meta")
    scale = torch.empty(8, 4096, device="meta")
    ends = torch.empty(8, dtype=torch.int32, device="meta")
    call = grouped_gemm_launch(Product(*made, qweight, scale, None, y), ends, 0)
    found = compiled.examine(call.compile(compiled.target_of(arch)))
    assert found.spills_in_loops == 0
    assert found.shared <= arch.shared_memory
    assert found.widest_load == 16
    assert found.instructions


def assert_loop(found: compiled.Compiled, config: Config) -> None:
    """Require that a step loads each byte once, 16 at a time, without conversions; Gluon's waits for no product."""
    loop = found.loop
    assert loop is not None
    wide = 16 * dict(loop.loads).get(16, 0) * 32 * found.warps
    copied = 32 * found.warps * (loop.loaded - sum(width * count for width, count in loop.loads))
    if config.kernel == "gemv":
        assert loop.dots > 0
        assert wide == (config.bn + 1) * config.bk  # The row is loaded once, for all outputs of the program.
    elif config.kernel == "gluon_gemm":
        assert (loop.waits, wide, copied) == (("gsb0 1",), 0, 0)  # The producer copies.
    else:
        assert copied == (config.bm + config.bn) * config.bk
    assert loop.conversions == 0
    assert loop.spills == 0


def compile_quantize(
    monkeypatch: pytest.MonkeyPatch,
    arch: Architecture,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    rotated: bool = True,
    norm: int | None = None,
) -> tuple[Any, compiled.Compiled, int]:
    """Compile with every part that a norm can have; return the kernel, its instructions, and its threads."""
    if arch.name == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7")  # A warp has 64 threads there.
    x = torch.empty(2048, k, dtype=dtype, device="meta")
    d = torch.empty(k, device="meta") if rotated else None
    into = quantized.empty_rows(x, 12.0)
    if norm is None:
        call = quantize_launch(x, d, 12.0, *into)
    else:
        weight = torch.empty(k, dtype=dtype, device="meta")
        call = norm_launch(x, x, weight, weight if norm == quantized.LAYER else None, d, norm, 1e-5, 12.0, x, *into)
    target = compiled.target_of(arch)
    kernel = call.compile(target)
    return kernel, compiled.examine(kernel), call.num_warps * target.warp_size


@pytest.mark.parametrize(
    ("k", "dtype", "rotated", "norm"),
    [
        # The sizes of Llama-3.1-8B: see test_quantize_fills_multiprocessors.
        *[(k, torch.bfloat16, True, None) for k in (576, 5120, 28672)],
        *[(k, torch.bfloat16, False, None) for k in (4096, 33001)],
        *[(4096, torch.float32, True, None), (14336, torch.float32, True, quantized.LAYER)],
    ],
)
@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, id=arch.name, marks=[] if arch.name in MOST else pytest.mark.slow) for arch in WITH_INT8],
)
def test_quantize_compiles(
    arch: Architecture,
    k: int,
    dtype: torch.dtype,
    rotated: bool,
    norm: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, found, threads = compile_quantize(monkeypatch, arch, k, dtype, rotated, norm)
    assert found.spilled == 0
    assert found.shared <= arch.shared_memory
    assert threads <= 1024
    if "ptx" in kernel.asm:
        assert ".satfinite" not in kernel.asm["ptx"]
        assert found.registers * threads <= 65536
    if k == 4096 and "ptx" in kernel.asm:  # A multiprocessor can hold 32 warps, 1024 threads.
        assert min(65536 // found.registers // threads, arch.shared_memory // found.shared) * threads >= 1024


@pytest.mark.parametrize("arch", WITH_INT8, ids=lambda arch: arch.name)
def test_a_row_moves_between_threads_once(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other butterflies are between registers; a second conversion belongs to the second digits' blocks."""
    kernel, found, _ = compile_quantize(monkeypatch, arch, 4096)
    assert kernel.asm["ttgir"].count("ttg.convert_layout") <= 2
    assert found.spilled == 0
    assert found.shared == 4 * 4096


@pytest.mark.parametrize("k", QUANTIZED)
@pytest.mark.parametrize("norm", [None, *compiled.NORMS])
def test_quantize_fills_multiprocessors(norm: str | None, k: int) -> None:
    found = compiled.compile_quantize(ARCHITECTURES["sm_90"], k, norm)
    # 2048 long rows go in chunks, of which Triton 3.9 keeps two words of a thread in memory; 3.6, none.
    chunks = in_chunks(2048, k) and norm is None
    assert (found.spilled, found.spills_in_loops) <= ((8, 1) if chunks else (0, 0))
    assert found.resident("sm_90") * found.warps >= (24 if chunks else 32)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", WITH_INT8, ids=lambda arch: arch.name)
def test_weight_only_compiles(arch: Architecture, dtype: torch.dtype) -> None:
    x, y = (torch.empty(64, 4096, dtype=dtype, device="meta") for _ in range(2))
    qweight = torch.empty(4096, 4096, dtype=torch.int8, device="meta")
    scale = torch.empty(4096, device="meta")
    for call in weight_only_launches(x, scale, qweight, scale, None, y):
        found = compiled.examine(call.compile(compiled.target_of(arch)))
        assert found.shared <= arch.shared_memory
        assert found.spilled == 0


def test_activations_and_parts_compile() -> None:
    """The end of a kernel compiles in full, on the largest tile."""
    arch = ARCHITECTURES["sm_90"]
    config = arch.by_bucket[512][0]
    for activation in (quantized.GELU, quantized.SILU_MUL):
        found = compiled.examine(compiled.launch(512, config, activation).compile(compiled.target_of(arch)))
        assert found.spills_in_loops == 0
    for bucket in (1, 2, 33):
        call = compiled.launch(bucket, arch.by_bucket[bucket][0], quantized.SILU_MUL)
        assert compiled.examine(call.compile(compiled.target_of(arch))).spilled == 0
    call = compiled.launch(512, config)
    call.constants["PARTS"] = 3
    text = call.compile(compiled.target_of(arch)).asm["ptx"]
    assert "st.global.v4.b32" in text  # Neighbours are still stored together.
    assert ".satfinite" not in text  # Partial sums may wrap.


# A loop around two loops with matrix instructions, of which the second copies ahead; behind the end, a wait for the
# copy engine jumps back into it.
CODE = """
.L_x_0:
        /*0000*/ STL [R1], R2 ;
.L_x_1:
        /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/ @P3 LDG.E.U8 R8, desc[UR4][R2.64] ;
        /*0030*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/ I2FP.F32.S32 R3, R3 ;
        /*0050*/ STS.128 [R3], R4 ;
        /*0060*/ IGMMA.64x128x32.S8.S8 R24, gdesc[UR20], R24, gsb0 ;
        /*0070*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        {seldom}
        /*0080*/ @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13+0x24000], R0 ;
        /*00a0*/ @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/ @P1 LDGSTS.E.BYPASS.128 [R105], desc[UR14][R28.64], P5 ;
        /*00c0*/ LDGDEPBAR ;
        /*00d0*/ DEPBAR.LE SB0, 0x4 ;
        /*00e0*/ @!PT LDS RZ, [RZ] ;
        /*00f0*/ NOP ;
        /*0100*/ LDSM.16.M88.4 R32, [R53+UR17+0xc000] ;
        /*0110*/ IGMMA.64x128x32.S8.S8 R24, gdesc[UR20], R24 ;
        /*0120*/ IGMMA.64x128x32.S8.S8 R24, gdesc[UR20], R24, gsb0 ;
        /*0130*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        {often}
        /*0140*/ @P0 BRA `(.L_x_2) ;
        /*0150*/ STG.E.128 desc[UR4][R2.64], R4 ;
        /*0160*/ @P2 BRA `(.L_x_0) ;
        /*0170*/ EXIT ;
.L_x_4:
        /*0180*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13+0x24000], R0 ;
        /*0190*/ @!P0 BRA `(.L_x_4) ;
        /*01a0*/ BRA `(.L_x_3) ;
"""


def test_the_main_loop_is_told_from_that_of_second_digits() -> None:
    code = CODE.format(seldom="", often="")
    assert len(sass.loops(*sass.instructions(code))) == 4
    loop, outside = sass.main_loop(code)
    assert loop is not None
    assert (loop.matrix, loop.waits, loop.phases) == (2, ("SB0 4", "gsb0 1"), 1)
    assert (loop.copies, loop.loaded, loop.shared_loads, loop.conversions) == ((("LDGSTS 16", 1),), 16, 1, 0)
    assert loop.instructions == 10  # Without instructions that only fill up.
    assert outside == 5  # The outer loop, its end, and the way back from the wait.


def test_a_kernel_without_matrix_instructions_is_the_loop_that_loads_most() -> None:
    lines = [line for line in CODE.format(seldom="", often="").splitlines() if "GMMA" not in line]
    loop, _ = sass.main_loop("\n".join(lines))
    assert loop is not None
    assert (loop.loads, loop.barriers, loop.conversions, loop.shared_stores) == (((1, 1), (16, 1)), 1, 1, 1)
    assert sass.main_loop("/*0000*/ EXIT ;") == (None, 1)


def test_what_is_usual_makes_every_jump_forwards() -> None:
    code = """
        /*0000*/ FADD R1, R1, R2 ;
        /*0010*/ @!P0 BRA `(.L_x_1) ;
        /*0020*/ STG.E.U8 desc[UR6][R2.64], R9 ;
    .L_x_1:
        /*0030*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/ @P1 EXIT ;
        /*0050*/ @P0 BRA `(.L_x_1) ;
        /*0060*/ EXIT ;
        /*0070*/ MUFU.RCP R1, R1 ;
    """
    counts = sass.usual(code)
    assert (counts.instructions, counts.stores, counts.barriers) == (6, 0, 1)
    assert sass.whole(code).instructions == 8


@pytest.mark.parametrize("where", ["seldom", "often"])
def test_spills_are_looked_for_in_innermost_loops(where: str) -> None:
    spill = {"seldom": "", "often": "", where: "/*0088*/ LDL.64 R2, [R1] ;"}
    assert sass.spills_in_loops(CODE.format(seldom="", often="")) == 0
    assert sass.spills_in_loops(CODE.format(**spill)) == 1


def test_counts_come_back_from_data() -> None:
    counts = sass.count(["LDG.E.64 R4, desc[UR4][R2.64]", "LDGSTS.E.128 [R1], desc[UR14][R2.64]", "DEPBAR.LE SB0, 0x2"])
    assert (counts.loads, counts.copies, counts.waits) == (((8, 1),), (("LDGSTS 16", 1),), ("SB0 2",))
    data = json.loads(json.dumps(dataclasses.asdict(counts)))
    assert sass.counts_of(data) == counts
    assert sass.counts_of({"matrix": 3}) == sass.Counts(matrix=3)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "programs"),
    [
        ("sm_90", 8, 240, 147480, 1),  # Registers and shared memory.
        ("sm_90", 4, 61, 512, 8),  # Registers.
        ("sm_90", 4, 124, 73728, 3),  # Shared memory.
        ("sm_90", 32, 32, 0, 2),  # warps
        ("sm_86", 1, 16, 0, 16),  # programs
        ("gfx942", 4, 128, 0, 4),
    ],
)
def test_programs_of_a_multiprocessor(arch: str, warps: int, registers: int, shared: int, programs: int) -> None:
    assert LIMITS[arch].resident(warps, registers, shared) == programs


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ARCHITECTURES["sm_80"].by_bucket[1][0]
    monkeypatch.setattr(compiled, "cases", lambda arch: [(1, config)])
    monkeypatch.setattr(compiled, "QUANTIZED", (4096,))
    monkeypatch.setattr(compiled, "NORMS", {"rms_norm": quantized.RMS})
    assert compiled.main(["--arch", "sm_80"]) == 0
    printed = capsys.readouterr().out
    for name in (str(config), "quantize K=4096", "rms_norm K=4096"):
        assert f"| {name} " in printed


def test_the_committed_table_has_every_configuration() -> None:
    """On failure: python -m benchmarks.compiled --out benchmarks/results/triton-compiled.md."""
    committed = (pathlib.Path(compiled.__file__).parent / "results" / "triton-compiled.md").read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in committed.splitlines()}
    expected = {(arch.name, str(bucket), str(config)) for arch in WITH_INT8 for bucket, config in compiled.cases(arch)}
    expected |= {
        (arch.name, "", f"{name} K={k}")
        for arch in WITH_INT8
        for name in ("quantize", *compiled.NORMS)
        for k in QUANTIZED
    }
    assert expected <= rows
    assert len(rows - expected) < 10  # The heading.


def test_device_functions_return_at_their_end() -> None:
    """Triton 3.6 compiles the code after a `return` inside an `if`, even if the condition is a constant."""
    folder = pathlib.Path(compiled.__file__).parents[1] / "triton_kernels"
    checked = 0
    for path in [*folder.glob("*/kernel.py"), folder / "numerics.py"]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
                returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
                assert returns in ([], function.body[-1:]), f"{path}: {function.name} returns early"
                checked += 1
    assert checked > 20


def test_only_kernels_that_wait_overlap() -> None:
    """A kernel that starts while the one before it runs, and reads what that writes without waiting, is a race."""
    target, arch = compiled.target_of(ARCHITECTURES["sm_90"]), ARCHITECTURES["sm_90"]
    long = dataclasses.replace(compiled.launch(1, arch.by_bucket[1][0]), overlap=True)
    for call in (compiled.quantize(4096), compiled.quantize(4096, "rms_norm"), long):
        kernel = call.compile(target)
        ptx = kernel.asm["ptx"]
        assert kernel.metadata.launch_pdl
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
        before, after = ptx.split("griddepcontrol.wait")
        assert not re.search(r"\b(ld|st)\.global", before)
        assert "prefetch.global.L2" in before
        assert re.search(r"\bst\.global", after)
        assert not call.compile(target, overlap=False).metadata.launch_pdl
        assert not call.compile(compiled.target_of(ARCHITECTURES["sm_80"])).metadata.launch_pdl
    for bucket, config in compiled.cases(arch):
        assert not compiled.launch(bucket, config).overlap
