"""The Triton kernels against their definition: in Triton's interpreter (tier 2) and on a GPU (tier 4).

Results are equal bit for bit, but for activation functions. The interpreter rounds to bfloat16 in its own way, so
results are taken in float32 there.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_contract.py
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from int8compile import ops
from int8compile.ops import quantized, reference, rotation_of, rotation_size
from int8compile.triton_kernels import operators, tables
from int8compile.triton_kernels.tables import ARCHITECTURES, Config
from tests.triton_problems import Problem, assert_equal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# NumPy, which the interpreter computes with, warns of what silu does with -Inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ARCHES = [arch for arch in ARCHITECTURES.values() if arch.instruction]
# Tiles so small that small problems have several of them.
SMALL = {
    "gemv": Config("gemv", 1, 32, 128, 4, 1),
    "gemm, few rows": Config("gemm", 16, 16, 64, 4, 1),
    "gemm": Config("gemm", 64, 32, 64, 4, 1),
    "tma_gemm": Config("tma_gemm", 64, 32, 64, 4, 1),
}
ROWS = {"gemv": 1, "gemm, few rows": 9, "gemm": 131, "tma_gemm": 131}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def size_of(kernel: str) -> tuple[int, int, int]:
    # The copy engine wants rows that begin at multiples of 16 bytes.
    return ROWS[kernel], 75, 272 if kernel.startswith("tma") else 275


def runs_on(kernel: str, device: str) -> None:
    if device == "cuda" and kernel.startswith("tma") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", SMALL)
def test_product(kernel: str, dtype: torch.dtype, device: str) -> None:
    runs_on(kernel, device)
    problem = Problem.random(*size_of(kernel), dtype, device=device)
    _, rows = problem.quantize_by_definition()
    assert 0 < rows[1].sum() < len(rows[1]) or kernel == "gemv"
    assert_equal(problem.product(SMALL[kernel]), problem.expected())


@pytest.mark.parametrize("kernel", SMALL)
def test_without_outliers(kernel: str, device: str) -> None:
    """By the threshold, and because no row has one."""
    runs_on(kernel, device)
    for threshold in (0.0, 12.0):
        problem = Problem.random(*size_of(kernel), torch.float16, threshold=threshold, bias=False, device=device)
        problem.x = torch.randn_like(problem.x)
        q, rows = problem.quantize_by_definition()
        assert (len(q), rows[1].any()) == (2 if threshold else 1, False)
        assert_equal(problem.product(SMALL[kernel]), problem.expected())


@pytest.mark.parametrize("kernel", SMALL)
def test_rows_that_are_special(kernel: str, device: str) -> None:
    """NaN, Inf, zeros, tiny and huge values; a weight of zeros."""
    runs_on(kernel, device)
    m, n, k = size_of(kernel)
    rows = ({7: math.nan}, {7: math.inf}, {7: -math.inf, 9: -math.inf}, {7: math.inf, 9: math.nan}, {7: 3e38, 8: 3e38})
    for set_row in rows if m == 1 else [{}]:
        problem = Problem.random(m, n, k, torch.float32, device=device)
        problem.qweight[3] = 0
        for row, values in enumerate(rows if m > 1 else [set_row]):
            for column, value in values.items():
                problem.x[row, column] = value
        if m > 1:
            problem.x[5] = 0
            problem.x[6] *= 1e-35
            problem.x[7] *= 1e33
        expected = problem.expected()
        assert_equal(problem.product(SMALL[kernel]), expected)
        assert m == 1 or expected.isnan().all(dim=1).tolist() == [True] * 4 + [False] * (m - 4)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "k"), [(1, 1), (1, 33), (3, 64), (5, 96), (20, 300), (4, 384), (2, 2304), (2, 16500), (2, 16640)]
)
def test_quantize(m: int, k: int, dtype: torch.dtype, threshold: float, device: str) -> None:
    """Integers and scales equal the definition's, whatever the strides of x and the number of factors of two in K."""
    problem = Problem.random(m, 1, k, dtype, threshold=threshold, device=device)
    if m > 2:
        problem.x[1, k // 2] = math.inf
        problem.x[2, 0] = math.nan
    problem.x = torch.cat([problem.x, problem.x], dim=1)[:, :k]
    assert problem.x.stride(0) == 2 * k
    q, rows = problem.quantize()
    expected_q, expected_rows = problem.quantize_by_definition()
    assert_equal(rows, expected_rows)
    assert_equal(q[0], expected_q[0])
    if threshold:
        written = expected_rows[1] > 0
        assert_equal(q[1].cpu()[written], expected_q[1][written])


def test_quantize_with_scales_that_rotate_nothing(device: str) -> None:
    problem = Problem.random(4, 1, 40, torch.float32, device=device)
    assert rotation_size(40) == 1
    problem.d = torch.rand(40, device=device)
    for actual, expected in zip(problem.quantize(), problem.quantize_by_definition(), strict=True):
        assert_equal(actual[0], expected[0])


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_rows_of_few_values(spread: float, device: str) -> None:
    """Flat, two-valued and one-hot rows, whose integers are as large as they get; ties between grid points."""
    problem = Problem.random(6, 9, 256, torch.float32, threshold=1.0, device=device)
    problem.x = torch.full_like(problem.x, 1.0)
    problem.x[1] = 0
    problem.x[1, 5] = 1
    problem.x[2, ::2] = -spread
    problem.x[3] = torch.arange(256) - 127.5
    problem.x[4, :100] = spread
    problem.x[5] *= torch.finfo(torch.float32).max
    for d in (problem.d, None):
        problem.d = d
        assert_equal(problem.product(SMALL["gemm, few rows"]), problem.expected())


@pytest.mark.parametrize("m", [*tables.BUCKETS, *[bucket + 1 for bucket in tables.BUCKETS]])
@pytest.mark.parametrize(
    "arch",
    # In the interpreter the tables differ in the sizes of tiles only; on a GPU its own counts.
    [
        pytest.param(arch, id=arch.name, marks=[] if arch.name in ("sm_80", "sm_90") else pytest.mark.slow)
        for arch in ARCHES
    ],
)
def test_every_bucket(arch: tables.Architecture, m: int, device: str) -> None:
    """What the table gives for M at the edges of its ranges."""
    if device == "cuda" and arch is not operators.architecture(0):
        pytest.skip("not this GPU's table")
    n, k = 40, 80
    configs = tables.candidates(arch, m, k)
    problem = Problem.random(m, n, k, torch.bfloat16, device=device)
    x = problem.quantize() if device == "cuda" else problem.quantize_by_definition()
    for config in configs if device == "cuda" else {tables.choose(configs, m, n, 100), configs[0]}:
        assert_equal(problem.product(config, x=x), problem.expected())


@pytest.mark.parametrize("activation", range(1, len(quantized.ACTIVATIONS)))
@pytest.mark.parametrize("kernel", ["gemv", "gemm, few rows", "tma_gemm"])
def test_activations(kernel: str, activation: int, device: str) -> None:
    """They and their derivatives are at most of the size of their arguments; a few roundings of float32 are allowed."""
    runs_on(kernel, device)
    m, _, k = size_of(kernel)
    problem = Problem.random(m, 74, k, torch.float16, device=device)
    actual = problem.product(SMALL[kernel], activation=activation).cpu()
    expected, argument = problem.expected(activation), problem.expected()
    size = argument.abs()
    if activation == quantized.SILU_MUL:
        size = size[:, ::2] * size[:, 1::2]
    assert actual.shape == expected.shape
    assert bool(((actual - expected).abs() <= 2.0**-20 * size + 1e-30).all())


@pytest.mark.parametrize("parts", [(32, 0), (32, 32), (7, 40)])
@pytest.mark.parametrize("kernel", ["gemv", "gemm, few rows", "tma_gemm"])
def test_parts(kernel: str, parts: tuple[int, int], device: str) -> None:
    """Several linears of one activation: each result whole, one behind the other."""
    runs_on(kernel, device)
    problem = Problem.random(*size_of(kernel), torch.bfloat16, device=device)
    actual = problem.product(SMALL[kernel], parts=parts)
    m, n, _ = size_of(kernel)
    sizes = [size for size in (*parts, n - sum(parts)) if size]
    results = [part.view(m, -1) for part in actual.split([m * size for size in sizes])]
    assert_equal(torch.cat(results, dim=1), problem.expected())


def test_rows_do_not_depend_on_the_batch(device: str) -> None:
    """Bit for bit, though alone and among others they go through other kernels."""
    problem = Problem.random(150, 40, 275, torch.bfloat16, device=device)
    together = problem.product(SMALL["gemm"])
    for rows, kernel in (((3, 4), "gemv"), ((0, 9), "gemm, few rows"), ((20, 100), "gemm")):
        alone = dataclasses.replace(problem, x=problem.x[slice(*rows)])
        assert torch.equal(alone.product(SMALL[kernel]), together[slice(*rows)])
    others = problem.x * 1e4
    others[30] = problem.x[30]
    others[31] = math.nan
    changed = dataclasses.replace(problem, x=others)
    assert torch.equal(changed.product(SMALL["gemm"])[30], together[30])


def test_a_weight_whose_rows_lie_apart(device: str) -> None:
    problem = Problem.random(5, 40, 96, torch.bfloat16, device=device)
    expected = problem.product(SMALL["gemm, few rows"])
    problem.qweight = torch.stack([problem.qweight, problem.qweight], dim=1).flatten(0, 1)[::2]
    assert problem.qweight.stride() == (192, 1)
    assert torch.equal(problem.product(SMALL["gemm, few rows"]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 275), (5, 272), (40, 384), (70, 96), (1, 33000)])
def test_weight_only(m: int, k: int, dtype: torch.dtype, device: str) -> None:
    """Its sums are exact."""
    from int8compile.triton_kernels.weight_only.launch import launches

    problem = Problem.random(m, 13, k, dtype, device=device)
    problem.x[m // 2, 0] = math.inf if m > 1 else 1
    problem.qweight[3] = -128
    here = problem.to("cpu")
    expected = reference.weight_only_linear(here.x.float(), here.qweight, here.scale, here.d, here.bias)
    y = torch.full((m, 13), math.nan, device=device)
    for call in launches(problem.x, problem.d, problem.qweight, problem.scale, problem.bias, y):
        call.run()
    assert_equal(y, expected)


@pytest.mark.gpu
class TestOperators:
    """The operators themselves, which only a GPU has."""

    @pytest.fixture(autouse=True)
    def _loaded(self) -> None:
        from int8compile import triton_kernels

        assert triton_kernels.load()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 65, 128, 129, 255, 256, 511, 512, 1000])
    def test_linear(self, m: int, dtype: torch.dtype) -> None:
        problem = Problem.random(m, 260, 528, dtype, device="cuda")
        y = ops.linear(problem.x.view(1, m, -1), *weight_of(problem), 6.0)
        assert y.dtype == dtype
        assert_equal(y[0], problem.expected().to(dtype))

    @pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64), (64,)])
    def test_sizes_of_zero_and_one_dimension(self, shape: tuple[int, ...]) -> None:
        qweight, scale = torch.ones(5, shape[-1], dtype=torch.int8), torch.ones(5)
        x, bias = torch.randn(shape), torch.randn(5)
        y = ops.linear(x.cuda(), qweight.cuda(), scale.cuda(), None, bias.cuda(), 6.0)
        assert_equal(y, reference.linear(x, qweight, scale, None, bias, 6.0))

    def test_captured_in_a_cuda_graph(self) -> None:
        """No host sync, and replays see new activations with other outliers."""
        problem = Problem.random(200, 256, 512, torch.bfloat16, device="cuda")
        ops.linear(problem.x, *weight_of(problem), 6.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear(problem.x, *weight_of(problem), 6.0)
        for _ in range(3):
            problem.x.copy_(Problem.random(200, 1, 512, torch.bfloat16).x)
            graph.replay()
            assert_equal(y, problem.expected().to(torch.bfloat16))

    def test_batched_and_weight_only(self) -> None:
        x = torch.randn(3, 40, 64, device="cuda", dtype=torch.float16)
        qweight = torch.randint(-127, 128, (3, 50, 64), dtype=torch.int8, device="cuda")
        scale, d = torch.rand(3, 50, device="cuda"), rotation_of(torch.rand(64) + 0.5).cuda()
        y = ops.batched_linear(x, qweight, scale, d, None, 6.0)
        assert_equal(y, reference.batched_linear(x.cpu(), qweight.cpu(), scale.cpu(), d.cpu(), None, 6.0))
        for m in (40, 120):
            flat = x.view(-1, 64)[:m]
            y = ops.weight_only_linear(flat, qweight[0], scale[0], d, None)
            assert_equal(y, reference.weight_only_linear(flat.cpu(), qweight[0].cpu(), scale[0].cpu(), d.cpu(), None))

    @pytest.mark.parametrize("threshold", [6.0, 0.0])
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_a_compiled_model(self, mode: str, threshold: float) -> None:
        model = Block().cuda().to(torch.bfloat16)
        options = {"threshold": threshold, "mode": mode}
        compiled = torch.compile(model, backend="int8", options=options, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for rows in (2, 40, 300):
                x = torch.randn(2, rows, 256, device="cuda", dtype=torch.bfloat16)
                for _ in range(3):
                    y = compiled(x)
                expected = model(x)
                assert (y - expected).float().norm() <= 0.03 * expected.float().norm()


def weight_of(problem: Problem) -> tuple[Any, ...]:
    return problem.qweight, problem.scale, problem.d, problem.bias


class Block(torch.nn.Module):
    """Norm, q, k and v, and a gated MLP, as in a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(256)
        self.q, self.k, self.v = (torch.nn.Linear(256, size, bias=False) for size in (256, 128, 128))
        self.gate, self.up = (torch.nn.Linear(256, 512) for _ in range(2))
        self.down = torch.nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.q(h) + torch.cat([self.k(h), self.v(h)], dim=-1)
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
