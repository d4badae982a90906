"""The Triton kernels against their definition: in Triton's interpreter (tier 2) and on a GPU (tier 4).

Integers are equal; so is the result where its outliers' sum is rounded once, and within a derived bound elsewhere. The
interpreter rounds to bfloat16 in its own way, so results are taken in float32 there.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_contract.py
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from int8compile.ops import digits, reference
from int8compile.triton_kernels import operators, tables
from int8compile.triton_kernels.tables import ARCHITECTURES, Config
from tests.triton_problems import Problem, assert_product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# NumPy, which the interpreter computes with, warns of what silu does with -Inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ARCHES = [arch for arch in ARCHITECTURES.values() if arch.instruction]
# Tiles so small that small problems have several of them.
SMALL = {
    "gemv": Config("gemv", 1, 32, 128, 4, 1),
    "small_gemm": Config("small_gemm", 16, 16, 64, 4, 1),
    "gemm": Config("gemm", 64, 32, 64, 4, 1),
    "tma_gemm": Config("tma_gemm", 64, 32, 64, 4, 1),
    "tma_gemm, halves": Config("tma_gemm", 64, 256, 64, 8, 1),
}
ROWS = {"gemv": 1, "small_gemm": 9, "gemm": 131, "tma_gemm": 131, "tma_gemm, halves": 70}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def architecture(device: str) -> tables.Architecture:
    """The GPU's, or the one that has every kernel."""
    found = operators.architecture(0) if device == "cuda" else ARCHITECTURES["sm_90"]
    assert found is not None
    return found


def size_of(kernel: str) -> tuple[int, int, int]:
    # The copy engine wants rows that begin at multiples of 16 bytes.
    return ROWS[kernel], 75, 272 if kernel.startswith("tma") else 275


def runs_on(kernel: str, device: str) -> None:
    if device == "cuda" and kernel.startswith("tma") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", SMALL)
def test_row_policy(kernel: str, dtype: torch.dtype, device: str) -> None:
    runs_on(kernel, device)
    arch = architecture(device)
    problem = Problem.random(*size_of(kernel), dtype, device=device)
    assert problem.policy(arch).lists == (kernel not in ("gemv", "small_gemm"))
    assert_product(problem, problem.product(SMALL[kernel], arch), arch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kernel", [kernel for kernel in SMALL if kernel != "small_gemm"])
def test_column_policy(kernel: str, dtype: torch.dtype, device: str) -> None:
    runs_on(kernel, device)
    arch = architecture(device)
    problem = Problem.random(*size_of(kernel), dtype, by_column=True, device=device)
    assert_product(problem, problem.product(SMALL[kernel], arch), arch)


@pytest.mark.parametrize("kernel", SMALL)
def test_without_outliers(kernel: str, device: str) -> None:
    runs_on(kernel, device)
    arch = architecture(device)
    problem = Problem.random(*size_of(kernel), torch.float16, threshold=0.0, bias=False, device=device)
    assert_product(problem, problem.product(SMALL[kernel], arch), arch)


@pytest.mark.parametrize("by_column", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("kernel", SMALL)
def test_rows_that_are_special(kernel: str, by_column: bool, device: str) -> None:
    """NaN, Infs of one and of both signs, zeros, tiny and huge values; a weight of zeros."""
    runs_on(kernel, device)
    if by_column and kernel == "small_gemm":
        pytest.skip("the column policy has lists for more than one row")
    arch = architecture(device)
    m, n, k = size_of(kernel)
    rows = {
        "nan": {7: math.nan},
        "inf": {7: math.inf},
        "-inf": {7: -math.inf, 9: -math.inf},
        "both": {7: math.inf, 9: -math.inf},
        "nan and inf": {7: math.inf, 9: math.nan},
    }
    for set_row in rows.values() if m == 1 else [{}]:
        problem = Problem.random(m, n, k, torch.float32, by_column=by_column, device=device)
        problem.qweight[3] = 0
        problem.qweight[5, 7] = 0
        for row, values in enumerate(rows.values() if m > 1 else [set_row]):
            for column, value in values.items():
                problem.x[row, column] = value
        if m > 1:
            problem.x[5] = 0
            problem.x[6] *= 1e-35
            problem.x[7] *= 1e33
            problem.x[8] = problem.x[8].abs().log2().exp2().clamp(max=1)
        actual = problem.product(SMALL[kernel], arch)
        assert_product(problem, actual, arch)
        here = problem.to("cpu")
        full = reference.linear(here.x, here.qweight, here.scale, here.bias, here.threshold, here.outliers)
        assert torch.equal(actual.cpu().isnan(), full.isnan())
        assert torch.equal(actual.cpu().isinf(), full.isinf())


@pytest.mark.parametrize("by_column", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 33), (3, 64), (66, 65), (200, 300), (2, 16500)])
def test_quantize(m: int, k: int, dtype: torch.dtype, by_column: bool, device: str) -> None:
    """Integers, scales and lists equal the definition's, whatever the strides of x."""
    arch = architecture(device)
    problem = Problem.random(m, 1, k, dtype, by_column=by_column, device=device)
    if m > 2:
        problem.x[1, k // 2] = math.inf
        problem.x[2, 0] = math.nan
    problem.x = torch.cat([problem.x, problem.x], dim=1)[:, :k]
    assert problem.x.stride(0) == 2 * k
    actual = problem.quantized(arch)
    here = problem.to("cpu")
    expected = digits.quantize_rows(here.x, 6.0, here.outliers)
    assert torch.equal(actual.q.cpu(), expected.q)
    assert torch.equal(actual.rows.cpu(), expected.rows)
    if not problem.policy(arch).lists:
        assert torch.equal(actual.digits.cpu(), expected.digits)
        return
    outlier = reference.quantize_rows(here.x.float(), 6.0, here.outliers).outlier
    together = m if by_column else digits.LIST_ROWS
    for tile, begin in enumerate(range(0, m, together)):
        rows = slice(begin, begin + together)
        columns = outlier[rows].any(dim=0).nonzero().flatten()
        count = int(actual.lists[tile, 0])
        assert torch.equal(actual.lists[tile, 1 : 1 + count].cpu().long(), columns)
        assert torch.equal(actual.digits[:, rows, :count].cpu(), expected.digits[:, rows, columns])


@pytest.mark.parametrize("scale", [1.0, 2.0**-115, 1e37])
def test_decisions_at_the_threshold(scale: float, device: str) -> None:
    """Rows whose largest element is the threshold times the rms up to a unit in the last place: float64 decides."""
    arch = architecture(device)
    k = 64
    x = torch.ones(96, k)
    # x0**2 * k == 36 * (x0**2 + k - 1): both sides of it, in steps of one unit.
    limit = torch.tensor(math.sqrt(36 * (k - 1) / (k - 36)))
    for row in range(96):
        x[row, row % k] = limit + (row - 48) * 2.0**-20
    problem = Problem(x * scale, torch.ones(1, k, dtype=torch.int8), torch.ones(1), None).to(device)
    actual = problem.quantized(arch)
    expected = digits.quantize_rows((x * scale), 6.0, "row")
    found = actual.rows[digits.CUTOFF].cpu().isfinite()
    assert torch.equal(found, expected.rows[digits.CUTOFF].isfinite())
    assert 0 < int(found.sum()) < 96
    assert torch.equal(actual.q.cpu(), expected.q)


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 1.0, 1e20, 1e200])
@pytest.mark.parametrize("by_column", [False, True], ids=["row", "column"])
def test_unusual_thresholds(threshold: float, by_column: bool, device: str) -> None:
    """Everything an outlier, or nothing."""
    arch = architecture(device)
    for m, kernel in ((1, "gemv"), (70, "gemm")):
        problem = Problem.random(m, 33, 100, torch.bfloat16, threshold=threshold, by_column=by_column, device=device)
        assert_product(problem, problem.product(SMALL[kernel], arch), arch)


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
    """What the table gives for M at the edges of its ranges, in both policies."""
    if device == "cuda" and arch is not architecture(device):
        pytest.skip("not this GPU's table")
    n, k = 40, 80
    for by_column in (False, True):
        problem = Problem.random(m, n, k, torch.bfloat16, by_column=by_column, device=device)
        policy = problem.policy(arch)
        configs = tables.candidates(arch, m, k, lists=policy.lists)
        x = problem.quantized(arch) if device == "cuda" else problem.quantized_by_definition(arch)
        for config in configs if device == "cuda" else {tables.choose(configs, m, n, 100), configs[0]}:
            assert_product(problem, problem.product(config, arch, x=x), arch)


@pytest.mark.parametrize("activation", range(1, len(digits.ACTIVATIONS)))
@pytest.mark.parametrize("kernel", ["gemv", "small_gemm", "tma_gemm, halves"])
def test_activations(kernel: str, activation: int, device: str) -> None:
    """They and their derivatives are at most of the size of their arguments; a few roundings of float32 are allowed."""
    runs_on(kernel, device)
    arch = architecture(device)
    m, _, k = size_of(kernel)
    problem = Problem.random(m, 74, k, torch.float16, device=device)
    actual = problem.product(SMALL[kernel], arch, activation=activation).cpu()
    expected, argument = problem.expected(activation), problem.expected()
    size = argument.abs()
    if activation == digits.SILU_MUL:
        size = size[:, ::2] * size[:, 1::2]
    assert actual.shape == expected.shape
    assert bool(((actual - expected).abs() <= 2.0**-20 * size + 1e-30).all())


@pytest.mark.parametrize("parts", [(32, 0), (32, 32), (7, 40)])
@pytest.mark.parametrize("kernel", ["gemv", "small_gemm", "tma_gemm, halves"])
def test_parts(kernel: str, parts: tuple[int, int], device: str) -> None:
    """Several linears of one activation: each result whole, one behind the other."""
    runs_on(kernel, device)
    arch = architecture(device)
    problem = Problem.random(*size_of(kernel), torch.bfloat16, device=device)
    actual = problem.product(SMALL[kernel], arch, parts=parts).cpu()
    m, n, _ = size_of(kernel)
    sizes = [size for size in (*parts, n - sum(parts)) if size]
    results = [part.view(m, -1) for part in actual.split([m * size for size in sizes])]
    assert_product(problem, torch.cat(results, dim=1), arch)


def test_rows_do_not_depend_on_the_batch(device: str) -> None:
    """Bit for bit, though alone and among others they go through other kernels."""
    arch = architecture(device)
    problem = Problem.random(150, 40, 275, torch.bfloat16, device=device)
    together = problem.product(SMALL["gemm"], arch)
    for rows, kernel in (((3, 4), "gemv"), ((0, 9), "small_gemm"), ((20, 100), "gemm")):
        alone = Problem(problem.x[slice(*rows)], problem.qweight, problem.scale, problem.bias)
        assert torch.equal(alone.product(SMALL[kernel], arch), together[slice(*rows)])
    others = problem.x * 1e4
    others[30] = problem.x[30]
    others[31] = math.nan
    changed = Problem(others, problem.qweight, problem.scale, problem.bias)
    assert torch.equal(changed.product(SMALL["gemm"], arch)[30], together[30])


def test_a_weight_whose_rows_lie_apart(device: str) -> None:
    arch = architecture(device)
    problem = Problem.random(5, 40, 96, torch.bfloat16, device=device)
    expected = problem.product(SMALL["small_gemm"], arch)
    problem.qweight = torch.stack([problem.qweight, problem.qweight], dim=1).flatten(0, 1)[::2]
    assert problem.qweight.stride() == (192, 1)
    assert torch.equal(problem.product(SMALL["small_gemm"], arch), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 20, 64])
def test_weight_only(m: int, dtype: torch.dtype, device: str) -> None:
    """A float32 sum of K products, in any order: off by at most K u of the sum of their magnitudes."""
    from int8compile.triton_kernels.weight_only.launch import launch

    problem = Problem.random(m, 75, 275, dtype, device=device)
    y = torch.full((m, 75), math.nan, device=device)
    launch(problem.x, problem.qweight, problem.scale, problem.bias, y).run()
    here = problem.to("cpu")
    x, weight = here.x.to(torch.float64), here.qweight.to(torch.float64).mT
    assert here.bias is not None
    exact = x @ weight * here.scale + here.bias
    bound = (275 + 8) * 2.0**-24 * (x.abs() @ weight.abs() * here.scale + here.bias.abs())
    assert bool(((y.cpu() - exact).abs() <= bound).all())


@pytest.mark.gpu
class TestOperators:
    """The operators themselves, which only a GPU has."""

    @pytest.fixture(autouse=True)
    def _loaded(self) -> None:
        from int8compile import triton_kernels

        assert triton_kernels.load()

    @pytest.mark.parametrize("outliers", ["row", "column"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 65, 128, 129, 255, 256, 511, 512, 1000])
    def test_linear(self, m: int, dtype: torch.dtype, outliers: str) -> None:
        problem = Problem.random(m, 260, 528, dtype, by_column=outliers == "column", device="cuda")
        y = torch.ops.int8compile.linear(
            problem.x.view(1, m, -1), problem.qweight, problem.scale, problem.bias, 6.0, outliers
        )
        assert y.dtype == dtype
        expected = problem.expected()
        bound = problem.bound() if not problem.policy(architecture("cuda")).join else torch.zeros(())
        # What is off before it is rounded may be one unit off after it.
        eps = torch.finfo(dtype).eps * (bound.max() > 0)
        difference = (y[0].cpu().double() - expected.to(dtype).double()).abs()
        assert bool((difference <= bound + eps * expected.abs()).all())

    @pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64), (64,)])
    def test_sizes_of_zero_and_one_dimension(self, shape: tuple[int, ...]) -> None:
        qweight, scale = torch.ones(5, shape[-1], dtype=torch.int8), torch.ones(5)
        x, bias = torch.randn(shape), torch.randn(5)
        y = torch.ops.int8compile.linear(x.cuda(), qweight.cuda(), scale.cuda(), bias.cuda(), 6.0, "row")
        assert torch.equal(y.cpu(), reference.linear(x, qweight, scale, bias, 6.0, "row"))

    def test_captured_in_a_cuda_graph(self) -> None:
        """No host sync, and replays see new activations with other outliers."""
        problem = Problem.random(200, 256, 512, torch.bfloat16, device="cuda")
        arguments = (problem.qweight, problem.scale, problem.bias, 6.0, "row")
        torch.ops.int8compile.linear(problem.x, *arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.ops.int8compile.linear(problem.x, *arguments)
        for _ in range(3):
            problem.x.copy_(Problem.random(200, 1, 512, torch.bfloat16).x)
            graph.replay()
            assert torch.equal(y.cpu(), problem.expected().to(torch.bfloat16))

    def test_batched_and_weight_only(self) -> None:
        x = torch.randn(3, 40, 64, device="cuda", dtype=torch.float16)
        qweight = torch.randint(-127, 128, (3, 50, 64), dtype=torch.int8, device="cuda")
        scale = torch.rand(3, 50, device="cuda")
        y = torch.ops.int8compile.batched_linear(x, qweight, scale, None, 6.0, "row")
        expected = reference.batched_linear(x.cpu(), qweight.cpu(), scale.cpu(), None, 6.0, "row")
        assert torch.equal(y.cpu(), expected)
        for m in (40, 120):
            flat = x.view(-1, 64)[:m]
            y = torch.ops.int8compile.weight_only_linear(flat, qweight[0], scale[0], None)
            expected = reference.weight_only_linear(flat.cpu(), qweight[0].cpu(), scale[0].cpu(), None)
            assert (y.cpu().float() - expected.float()).norm() <= 2e-3 * expected.float().norm()

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
