"""The Gluon kernel for Hopper: the results of its code, and the instructions it compiles to (tier 3).

Triton's interpreter does not support Gluon, so gluon_stand_in.py runs the code; test_triton_contract.py runs it on a
GPU.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import re
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import triton

from benchmarks import compiled
from int8compile.app import doctor
from int8compile.ops import quantized
from int8compile.ops.quantized import empty_result
from int8compile.triton_kernels import loading, tables
from int8compile.triton_kernels.launch import Programs
from int8compile.triton_kernels.numerics import TILED
from int8compile.triton_kernels.operators import launch_of
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import ARCHITECTURES, Config
from tests.helpers import gluon_stand_in
from tests.helpers.triton_problems import Problem

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets, and Gluon cannot be"
)

SM_90 = ARCHITECTURES["sm_90"]
CONFIGS = [config for config in SM_90.by_bucket[512] if config.kernel == "gluon_gemm"]
SMALL = Config("gluon_gemm", 64, 128, 128, 4, 3, programs=2)
REAL = Config("gluon_gemm", 128, 256, 128, 8, 4, programs=2)
SPLIT = Config("gluon_gemm", 128, 128, 128, 8, 6, splits=3)


def assert_right(
    problem: Problem, config: Config, *, activation: int = quantized.NONE, parts: tuple[int, int] = (0, 0)
) -> None:
    """Run the kernel's code in Python; it must give the definition's result and leave the counters as they were."""
    q, rows, counters = problem.quantize_by_definition()
    if problem.threshold:
        # Second digits of other blocks need not have been written.
        bits = (rows[1:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
        written = bits.permute(1, 0, 2).flatten(1).repeat_interleave(quantized.BLOCK, dim=1)[:, : q.shape[2]] != 0
        q[1] = torch.where(written, q[1], 85)
    y = empty_result(q, problem.qweight, activation, parts[0], torch.float32).fill_(math.nan)
    product = Product(q, rows, counters, problem.qweight, problem.scale, problem.bias, y, activation, *parts)
    gluon_stand_in.run(launch_of(product, config), seed=0)
    m, n = problem.x.shape[0], problem.qweight.shape[0]
    if parts[0]:
        sizes = [size for size in (*parts, n - sum(parts)) if size]
        y = torch.cat([part.view(m, -1) for part in y.split([m * size for size in sizes])], dim=1)
    tolerance = 1e-5 if activation == quantized.SILU_MUL else 0
    torch.testing.assert_close(y, problem.expected(activation), rtol=tolerance, atol=tolerance)
    assert not counters.any()


@pytest.mark.parametrize(("config", "size", "options"), [
    (SMALL, (131, 75, 272), {}),
    (SMALL, (131, 75, 16), {}),  # Fewer inputs than a step.
    (SMALL, (1, 1, 128), {}),  # A program without a tile.
    (SMALL, (131, 75, 272), {"threshold": 0.0, "bias": False}),
    (SMALL, (300, 300, 80), {}),  # Fewer steps than stages, and many tiles.
    (REAL, (200, 300, 272), {}),
    (SPLIT, (131, 75, 544), {}),
    (dataclasses.replace(SPLIT, splits=4), (65, 75, 8720), {}),  # Several words of bits.
])  # fmt: skip
def test_product(config: Config, size: tuple[int, int, int], options: dict[str, Any]) -> None:
    assert_right(Problem.random(*size, torch.bfloat16, **options), config)


def test_all_rows_have_second_digits_or_none() -> None:
    problem = Problem.random(70, 40, 272, torch.bfloat16, threshold=1.0)
    assert_right(problem, SMALL)
    problem.x, problem.threshold = torch.randn_like(problem.x), 12.0
    assert_right(problem, SMALL)


def test_activations_and_parts() -> None:
    problem = Problem.random(131, 434, 144, torch.bfloat16)
    for activation in (quantized.RELU, quantized.SILU_MUL):
        assert_right(problem, SMALL, activation=activation)
    for parts in ((256, 128), (256, 0), (7, 40)):
        assert_right(problem, SMALL, parts=parts)


@pytest.mark.parametrize("wrong", ["phase_of", "stage_of"])
def test_wrong_barriers_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in notices products of half copied stages, and deadlocks."""
    from int8compile.triton_kernels.gluon_gemm import kernel

    def always(step: Any, STAGES: int) -> int:
        return 0

    monkeypatch.setattr(kernel, wrong, types.SimpleNamespace(fn=always))
    with pytest.raises(AssertionError):
        assert_right(Problem.random(65, 75, 1040, torch.bfloat16), SMALL)


@functools.cache
def built(config: Config, activation: int = quantized.NONE, **constants: Any) -> tuple[compiled.Compiled, str]:
    """Compile a configuration, and return its instructions and its PTX."""
    call = compiled.launch(512, config, activation)
    call.constants.update(constants)
    kernel = call.compile(compiled.target_of(SM_90))
    return compiled.examine(kernel), kernel.asm["ptx"]


@pytest.mark.parametrize(("config", "activation"), [
    (CONFIGS[0], quantized.NONE),
    (CONFIGS[0], quantized.GELU),  # This configuration needs the most registers.
    pytest.param(CONFIGS[0], quantized.SILU_MUL, marks=pytest.mark.slow),
    *((config, quantized.SILU_MUL) for config in CONFIGS[1:]),
], ids=str)  # fmt: skip
def test_compiles_to_products_in_flight(config: Config, activation: int) -> None:
    found, ptx = built(config, activation)
    # An instruction multiplies 16 rows of a warp with 128 outputs and 32 inputs.
    products = config.bm // (16 * config.num_warps) * (config.bn // 128) * (config.bk // 32)
    assert found.loop.matrix == products
    # One wait, during which the step's products are still in flight.
    assert found.loop.waits == ("gsb0 1",)
    assert found.loop.barriers <= 2
    # Second digits, and the end of a tile, wait for all products.
    assert sorted(found.whole.waits) == ["gsb0 0", "gsb0 0", "gsb0 1"]
    assert found.whole.matrix == 2 * products
    assert sorted(built(config, activation, OUTLIERS=False)[0].whole.waits) == ["gsb0 0", "gsb0 1"]
    assert found.whole.spills == 0
    assert ".satfinite" not in ptx
    # The producer takes a warp group of threads, and every thread has registers.
    assert found.warps == config.num_warps + 4
    assert found.registers <= 168
    assert found.registers * 32 * found.warps <= 65536
    assert found.shared <= SM_90.shared_memory
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}


def test_split_sums_compile() -> None:
    config = dataclasses.replace(CONFIGS[-1], splits=2)
    found, ptx = built(config)
    # Computing the first and last input takes up to four more instructions.
    whole = built(CONFIGS[-1])[0].loop
    assert found.loop == dataclasses.replace(whole, instructions=found.loop.instructions)
    assert found.loop.instructions <= whole.instructions + 4
    assert found.whole.spills == 0
    # Each thread stores two neighbours of a row, beside those of three others: whole sectors of memory.
    assert len(re.findall(r"st\.global\.v2\.b32", ptx)) == config.bm * config.bn // (32 * config.num_warps * 2)
    assert "atom.global.gpu.acq_rel.add" in ptx


def test_parts_of_whole_tiles_are_stored_as_widely() -> None:
    found, ptx = built(CONFIGS[0], PARTS=TILED.value)
    assert found.loop.waits == ("gsb0 1",)
    assert found.whole.spills == 0
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("activation", [
    quantized.NONE,
    quantized.SILU_MUL,
    *(pytest.param(each, marks=pytest.mark.slow) for each in (quantized.RELU, quantized.SILU, quantized.GELU_TANH)),
])  # fmt: skip
def test_the_end_rounds_as_the_other_kernels_do(activation: int) -> None:
    """Each element has the float instructions that the interpreter has compared with the definition."""
    gemm = next(config for config in SM_90.by_bucket[512] if config.kernel == "gemm")
    ptx, expected = (built(config, activation)[1] for config in (CONFIGS[1], gemm))
    elements = CONFIGS[1].bm * CONFIGS[1].bn // (32 * CONFIGS[1].num_warps)
    assert (gemm.bm * gemm.bn, gemm.num_warps) == (CONFIGS[1].bm * CONFIGS[1].bn, CONFIGS[1].num_warps)
    assert float_instructions(ptx) == float_instructions(expected)
    if activation == quantized.NONE:
        assert float_instructions(ptx)["mul.rn.f32"] == 2 * elements
        assert float_instructions(ptx)["add.rn.f32"] == elements


def float_instructions(ptx: str) -> collections.Counter[str]:
    """Count the float instructions of each kind."""
    found = collections.Counter(re.findall(r"\s((?:mul|add|sub|neg|fma|ex2|rcp|div|cvt)\.\S*f32(?:\.s32)?) ", ptx))
    found["cvt.rn.bf16.f32"] += 2 * found.pop("cvt.rn.bf16x2.f32", 0)
    return found


def test_programs_share_the_tiles() -> None:
    config = tables.choose(tables.candidates(SM_90, 8192, 4096), 8192, 4096, 4096, 132)
    assert (config.kernel, config.programs) == ("gluon_gemm", 132)
    assert [Programs(16, 128, 132).of(m) for m in (1, 128, 129, 1024, 1025, 100_000)] == [16, 16, 32, 128, 132, 132]


def test_another_gluon_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon's functions change from version to version."""
    assert doctor._on_hopper() == "gluon_gemm for many rows"
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    loading._gluon_missing.cache_clear()
    try:
        assert {config.kernel for config in tables.candidates(SM_90, 4096, 4096)} == {"gemm"}
        assert doctor._on_hopper().startswith("gemm, not the faster gluon_gemm: Triton is 3.99.0, and its Gluon is")
        monkeypatch.setenv("INT8COMPILE_TRITON", "0")
        assert doctor._on_hopper() == "no Triton kernels: INT8COMPILE_TRITON=0 turns them off"
    finally:
        loading._gluon_missing.cache_clear()


def test_rows_of_the_copy_engine_begin_at_multiples_of_16_bytes() -> None:
    assert {config.kernel for config in tables.candidates(SM_90, 4096, 4088)} == {"gemm"}
