"""The Triton kernels against their definition: in Triton's interpreter (tier 2) and on a GPU (tier 4).

Results are equal bit for bit, except for activation functions. The interpreter rounds to bfloat16 in its own way, so
results are taken in float32 there.

    TRITON_INTERPRET=1 python -m pytest tests/triton_kernels/test_triton_contract.py
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from int8compile import ops
from int8compile.ops import quantized, reference, rotation_of, rotation_size
from int8compile.triton_kernels import loading, operators, tables
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import ARCHITECTURES, Config
from tests.helpers.triton_problems import Problem, assert_equal

# The interpreter computes with NumPy, which warns about silu of -Inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ARCHES = [arch for arch in ARCHITECTURES.values() if arch.matrix_instruction]
# Tiles are small, so that small problems have several of them.
SMALL = {
    "gemv": Config("gemv", 1, 32, 512, 4, 1, instruction="dp4a"),
    "gemv, bytes": Config("gemv", 1, 32, 512, 4, 1),
    "gemm, few rows": Config("gemm", 16, 16, 64, 4, 1),
    "gemm": Config("gemm", 64, 32, 64, 4, 1),
    "gemm, split": Config("gemm", 64, 32, 64, 4, 1, splits=2),
    # Two programs for three tiles.
    "gluon_gemm": Config("gluon_gemm", 64, 128, 128, 4, 3, programs=2),
    "gluon_gemm, split": Config("gluon_gemm", 64, 128, 128, 4, 3, splits=2),
}
# Where K is a multiple of 16, gemv reads four inputs at once.
SIZES = {
    "gemv": (1, 75, 1040),
    "gemv, bytes": (1, 75, 275),
    "gemm, few rows": (9, 75, 275),
    "gemm": (131, 75, 275),
    "gemm, split": (131, 75, 275),
    "gluon_gemm": (131, 75, 272),
    "gluon_gemm, split": (131, 75, 272),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _skip_where_there_is_no_gluon(request: pytest.FixtureRequest) -> None:
    if "gluon_gemm" in request.node.name:
        if why := loading.gluon_failure():
            pytest.skip(why)
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("gluon_gemm is for sm_90")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", SMALL)
def test_product(kernel: str, dtype: torch.dtype, device: str) -> None:
    problem = Problem.random(*SIZES[kernel], dtype, device=device)
    _, rows, _ = problem.quantize_by_definition()
    counts = (rows[1:] != 0).any(dim=0)
    assert counts.any()
    assert not counts.all() or len(counts) == 1
    assert_equal(problem.product(SMALL[kernel]), problem.expected())


@pytest.mark.parametrize("kernel", SMALL)
def test_without_outliers(kernel: str, device: str) -> None:
    """A threshold of 0 makes no outliers, and rows without outliers exist as well."""
    for threshold in (0.0, 12.0):
        problem = Problem.random(*SIZES[kernel], torch.float16, threshold=threshold, bias=False, device=device)
        problem.x = torch.randn_like(problem.x)
        q, rows, _ = problem.quantize_by_definition()
        assert (len(q), bool(rows[1:].any())) == (2 if threshold else 1, False)
        assert_equal(problem.product(SMALL[kernel]), problem.expected())


@pytest.mark.parametrize("kernel", SMALL)
def test_rows_that_are_special(kernel: str, device: str) -> None:
    """NaN, Inf, zeros, tiny and huge values; a weight of zeros."""
    m, n, k = SIZES[kernel]
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


def assert_quantized(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Require equal values, and equal second digits where they are used."""
    (q, rows, counters), (expected_q, expected_rows, expected_counters) = actual, expected
    assert_equal(rows[0].view(torch.float32), expected_rows[0].view(torch.float32))
    assert_equal(rows[1:], expected_rows[1:])
    assert_equal(q[0], expected_q[0])
    assert_equal(counters, expected_counters)
    if len(q) > 1:
        assert_equal(quantized.counted(q, rows), expected_q[1])


@pytest.mark.parametrize("threshold", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "k"),
    # B is 1, 64, 32, 1, 128, 128, 1, 128, 16; the last three have several words, two of them several chunks of columns.
    [(1, 1), (3, 64), (5, 96), (6, 300), (4, 384), (2, 2304), (2, 16500), (1, 16640), (2, 16 * 261)],
)
def test_quantize(m: int, k: int, dtype: torch.dtype, threshold: float, device: str) -> None:
    """Integers and scales equal the definition's for any strides of x and any number of factors of two in K."""
    problem = Problem.random(m, 1, k, dtype, threshold=threshold, device=device)
    if m > 2:
        problem.x[1, k // 2] = math.inf
        problem.x[2, 0] = math.nan
    problem.x = torch.cat([problem.x, problem.x], dim=1)[:, :k]
    assert problem.x.stride(0) == 2 * k
    assert_quantized(problem.quantize(), problem.quantize_by_definition())


def test_quantize_with_scales_that_rotate_nothing(device: str) -> None:
    problem = Problem.random(4, 1, 40, torch.float32, device=device)
    assert rotation_size(40) == 1
    problem.d = torch.rand(40, device=device)
    assert_quantized(problem.quantize(), problem.quantize_by_definition())


@pytest.mark.parametrize("rotated", [True, False])
def test_rows_at_the_limits(rotated: bool, device: str) -> None:
    """The largest integers and sums, the smallest scales above zero, and overflowing products with d."""
    k = 128
    problem = Problem.random(1, 1, k, torch.float32, threshold=1.0, device=device)
    b = torch.arange(k)
    # A bent function: all the energy of the row, at its largest, in 16 rotated elements of equal size that sum to
    # 2**31.
    bent = (-1.0) ** ((b & 1) * (b >> 1 & 1) + (b >> 2 & 1) * (b >> 3 & 1)) * (2 - 2.0**-23)
    ones, tiny = torch.ones(k), torch.full((k,), 2.0**-100)
    one_hot, below = torch.zeros(k), torch.nextafter(tiny, torch.zeros(k))
    one_hot[77] = 5
    rows = [bent, bent.sort().values, ones, one_hot, tiny, below, below * 2.0**-40, 0 * ones, -0.0 * ones]
    rows += [ones * math.inf, one_hot * math.nan, ones * torch.finfo(torch.float32).max, (-1.0) ** b * 2.0**127]
    problem.x = torch.stack(rows).to(device)
    for d in (torch.ones(k), reference.signs(k), torch.full((k,), 2.0)):
        problem.d = d.to(device) if rotated else None
        expected = problem.quantize_by_definition()
        assert_quantized(problem.quantize(), expected)
        scale = expected[1][0].view(torch.float32)
        assert scale[5:9].tolist() == [0.0] * 4 or (rotated and d[0] == 2)
        assert scale[9:11].isnan().all()


def test_which_blocks_have_second_digits(device: str) -> None:
    """Outliers at the edges of blocks and words set the right bits; -128 needs no second digit, 128 does."""
    k, edges = 8300, [0, 127, 128, 4095, 4096, 8191, 8192, 8299]
    problem = Problem.random(len(edges) + 3, 1, k, torch.float32, device=device)
    assert problem.d is None
    problem.x = torch.randn(len(edges) + 3, k, device=device)
    for row, at in enumerate(edges):
        problem.x[row, at] = 100.0
    problem.x[len(edges), :: k // 6] = -100.0
    problem.x[-2:] = 127.0
    problem.x[-2:, 1] = 126.0
    problem.x[-2, 0], problem.x[-1, 0] = 128.0, -128.0
    _, rows, _ = problem.quantize()
    bits = torch.stack([rows[1 + at // 4096, row] for row, at in enumerate(edges)]).cpu()
    assert bits.tolist() == [-(2**31) if at // 128 % 32 == 31 else 1 << at // 128 % 32 for at in edges]
    assert_quantized(problem.quantize(), problem.quantize_by_definition())
    problem.threshold = 1.0  # The step is 1/127 of the mean; for 127, it is 1.
    _, rows, _ = problem.quantize()
    assert rows[1:, -2:].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert_quantized(problem.quantize(), problem.quantize_by_definition())


@pytest.mark.parametrize("given", ["ends", "int64 ends", "equal groups"])
@pytest.mark.parametrize("k", [64, 33])
def test_quantize_for_experts(k: int, given: str, device: str) -> None:
    """Each row is multiplied by its expert's d; experts may have no rows, and q of rows without an expert is unused."""
    from int8compile.triton_kernels.quantize.launch import quantize_launch

    problem = Problem.random(10, 1, k, torch.float32, device=device)
    d = torch.stack([rotation_of(torch.rand(k) + 0.5) if k == 64 else torch.rand(k) for _ in range(5)]).to(device)
    ends = [0, 3, 3, 8, 9] if given != "equal groups" else [2, 4, 6, 8, 10]
    into = quantized.empty_rows(problem.x, problem.threshold)
    if given == "equal groups":
        quantize_launch(problem.x, d, problem.threshold, *into, rows_per_group=2).run()
    else:
        dtype = torch.int64 if given == "int64 ends" else torch.int32
        quantize_launch(
            problem.x, d, problem.threshold, *into, ends=torch.tensor(ends, dtype=dtype, device=device)
        ).run()
    for expert, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        part = dataclasses.replace(problem, x=problem.x[begin:end], d=d[expert])
        q, rows, counters = into
        assert_quantized((q[:, begin:end], rows[:, begin:end], counters), part.quantize_by_definition())


@pytest.mark.parametrize(
    ("kind", "k", "extras"),
    [
        *itertools.product(
            *[(quantized.RMS, quantized.RMS_ROUNDED, quantized.RMS_PLUS_ONE, quantized.LAYER), (96, 275), (True, False)]
        ),
        *[(quantized.RMS, 1152, True), (quantized.LAYER, 16500, True)],
    ],
)
def test_norm_quantize(k: int, extras: bool, kind: int, device: str) -> None:
    """The sum with the residual is exact, the norm is exact up to the order of its sums.

    The rest is the definition's, applied to the kernel's own norm. A row alone gives what it gives among others.
    """
    for dtype in DTYPES if device == "cuda" else [torch.float16, torch.float32]:
        problem = Problem.random(3, 1, k, dtype, threshold=3.0, device=device)
        x = problem.x = torch.randn_like(problem.x) + (torch.rand(3, 1) * 3).to(problem.x)
        residual, weight, bias = (
            torch.randn(size, dtype=of, device=device) if extras else None
            for size, of in (((3, k), dtype), ((k,), dtype), ((k,), torch.float32))
        )
        h, *actual, normed = norm_quantize(problem, residual, weight, bias, kind)
        assert_quantized(actual, dataclasses.replace(problem, x=normed).quantize_by_definition())
        if residual is not None:
            assert_equal(h, x.cpu() + residual.cpu())
            *_, alone = norm_quantize(dataclasses.replace(problem, x=x[1:2]), residual[1:2], weight, bias, kind)
            assert_equal(alone, normed[1:2])
        else:
            h = x
        assert_norm(normed.cpu(), h.cpu(), *(of if of is None else of.cpu() for of in (weight, bias)), kind)


def norm_quantize(
    problem: Problem, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: int
) -> tuple[Tensor, ...]:
    from int8compile.triton_kernels.quantize.launch import norm_launch

    total, normed = torch.empty_like(problem.x), torch.empty_like(problem.x)
    into = quantized.empty_rows(problem.x, problem.threshold)
    norm_launch(
        *(problem.x, residual, weight, bias, problem.d, kind, 1e-5, problem.threshold, total, *into), normed=normed
    ).run()
    return total, *into, normed


def assert_norm(actual: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int) -> None:
    """Require a result near the definition's.

    A mean of up to 16384 elements is a tree of additions at most 16 + 10 deep in the kernel, and not much deeper in
    PyTorch: in both its error is below 32 roundings of 2**-24 each. The reciprocal root halves that and adds two units
    in the last place of its own; two products and a sum follow. A layer norm's mean has the same error. A value on the
    other side of a tie is rounded to the other neighbour, at the end and, for RMS_ROUNDED, before.
    """
    expected = quantized.norm(h, weight, bias, kind, 1e-5).double()
    v = h.double()
    mean = v.mean(dim=-1, keepdim=True) if kind == quantized.LAYER else torch.zeros(())
    factor = ((v - mean).square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    by = 1.0 if weight is None else weight.double() + (kind == quantized.RMS_PLUS_ONE)
    size = ((v - mean).abs() + (v.abs().mean(dim=-1, keepdim=True) if kind == quantized.LAYER else 0)) * factor
    size = size * (by.abs() if isinstance(by, Tensor) else by) + (0 if bias is None else bias.double().abs())
    ulp = torch.finfo(h.dtype).eps * (2 if kind == quantized.RMS_ROUNDED else 1)
    assert ((actual.double() - expected).abs() <= (2 * 40 * 2.0**-24 + ulp) * size).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_rows_of_few_values(spread: float, device: str) -> None:
    """Flat, two-valued and one-hot rows, whose integers are the largest possible; ties between grid points."""
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
    # In the interpreter, tables differ only in the sizes of tiles; on a GPU, only its own table is used.
    [
        pytest.param(arch, id=arch.name, marks=[] if arch.name in ("sm_80", "sm_90") else pytest.mark.slow)
        for arch in ARCHES
    ],
)
def test_every_bucket(arch: tables.Architecture, m: int, device: str) -> None:
    """The table's configurations work for M at the edges of its ranges."""
    if device == "cuda" and arch is not operators.architecture(0):
        pytest.skip("not this GPU's table")
    n, k = 40, 80
    configs = tables.candidates(arch, m, k)
    problem = Problem.random(m, n, k, torch.bfloat16, device=device)
    x = problem.digits()
    for config in configs if device == "cuda" else {tables.choose(configs, m, n, k, 100), configs[0]}:
        assert_equal(problem.product(config, x=x), problem.expected())


@pytest.mark.parametrize("activation", range(1, len(quantized.ACTIVATIONS)))
@pytest.mark.parametrize("kernel", ["gemv", "gemm, few rows", "gemm, split", "gluon_gemm"])
def test_activations(kernel: str, activation: int, device: str) -> None:
    """Activation functions and their derivatives do not exceed the size of their arguments, up to some roundings."""
    m, _, k = SIZES[kernel]
    problem = Problem.random(m, 74, k, torch.float16, device=device)
    actual = problem.product(SMALL[kernel], activation=activation).cpu()
    expected, argument = problem.expected(activation), problem.expected()
    size = argument.abs()
    if activation == quantized.SILU_MUL:
        size = size[:, ::2] * size[:, 1::2]
    assert actual.shape == expected.shape
    assert bool(((actual - expected).abs() <= 2.0**-20 * size + 1e-30).all())


@pytest.mark.parametrize("parts", [(32, 0), (32, 32), (7, 40)])
@pytest.mark.parametrize("kernel", ["gemv", "gemm, few rows", "gemm, split", "gluon_gemm"])
def test_parts(kernel: str, parts: tuple[int, int], device: str) -> None:
    """Several linears of one activation give whole results, one after the other."""
    problem = Problem.random(*SIZES[kernel], torch.bfloat16, device=device)
    actual = problem.product(SMALL[kernel], parts=parts)
    m, n, _ = SIZES[kernel]
    sizes = [size for size in (*parts, n - sum(parts)) if size]
    results = [part.view(m, -1) for part in actual.split([m * size for size in sizes])]
    assert_equal(torch.cat(results, dim=1), problem.expected())


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [640, 8333])
def test_outliers_at_the_edges_of_blocks_words_and_splits(k: int, splits: int, device: str) -> None:
    edges = [edge for edge in (0, 127, 128, 255, 256, 383, 384, 511, 4095, 4096, 8191, 8192, k - 1) if edge < k]
    problem = Problem.random(20, 40, k, torch.float32, device=device)
    problem.d = None
    problem.x = torch.randn_like(problem.x)
    problem.x[range(len(edges)), edges] = 100.0
    problem.x[19, edges] = 100.0
    _, rows, _ = problem.quantize_by_definition()
    assert (rows[1:] != 0).any(dim=1).all()
    config = dataclasses.replace(SMALL["gemm, few rows"], splits=splits)
    assert_equal(problem.product(config), problem.expected())
    alone = dataclasses.replace(problem, x=problem.x[19:])
    for kernel in ("gemv", "gemm"):
        assert_equal(alone.product(dataclasses.replace(SMALL[kernel], splits=splits)), alone.expected())


def test_products_in_a_row_share_counters(device: str) -> None:
    """q, k and v of one activation: the last program to arrive leaves zeros."""
    problem = Problem.random(20, 75, 400, torch.bfloat16, device=device)
    x = problem.digits()
    for splits in (3, 2, 3):
        config = dataclasses.replace(SMALL["gemm, few rows"], splits=splits)
        assert_equal(problem.product(config, x=x), problem.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize(
    "config", [each for each in ARCHITECTURES["sm_90"].by_bucket[512] if each.kernel == "gluon_gemm"], ids=str
)
def test_programs_with_many_tiles(config: Config, programs: int) -> None:
    """Programs compute many tiles, repeatedly, since a wrong phase of a barrier shows only now and then."""
    problem = Problem.random(700, 1100, 1552, torch.bfloat16, threshold=12.0, device="cuda")
    x, expected = problem.quantize(), problem.expected()
    for _ in range(20):
        assert_equal(problem.product(dataclasses.replace(config, programs=programs), x=x), expected)


def test_rows_do_not_depend_on_the_batch(device: str) -> None:
    """The bits are equal, although rows alone and rows among others go through different kernels."""
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


@pytest.mark.parametrize("ends", [
    [3, 3, 11, 20], [0, 0, 0, 0], [1, 2, 3, 4], [17, 18, 18, 19], [0, 0, 0, 20],
    [5, 10, 15, 21], [10, 5, 15, 20], [-1, 5, 10, 15], [2**31, 5, 10, 15], None,
])  # fmt: skip
def test_grouped(ends: list[int] | None, device: str) -> None:
    """Rows after the last group are zeros; invalid ends give NaN instead of a wrong number."""
    threshold = 6.0 if ends else 0.0
    problem = Problem.random(20, 4 * 150, 272, torch.float32, threshold=threshold, device=device)
    last = torch.tensor(ends or [5, 10, 15, 20], dtype=torch.int64)
    every = problem.expected().view(20, 4, 150)
    if torch.equal(last.sort().values, last) and last[0] >= 0 and last[3] <= 20:
        groups = torch.bucketize(torch.arange(20), last, right=True)
        expected = torch.cat([every, torch.zeros(20, 1, 150)], dim=1)[torch.arange(20), groups]
    else:
        expected = torch.full((20, 150), math.nan)
    assert_equal(grouped(problem, 4, last.to(device) if ends else None), expected)


@pytest.mark.parametrize(("m", "groups"), [(1, 1), (1, 5), (150, 2), (300, 2), (90, 20)])
def test_groups_of_any_size(m: int, groups: int, device: str) -> None:
    """Tiles of every number of rows, more tiles than programs, and empty groups."""
    problem = Problem.random(m, groups * 13, 200, torch.float32, device=device)
    last = torch.randint(0, m + 1, (groups,)).sort().values.to(torch.int32)
    every = problem.expected().view(m, groups, 13)
    which = torch.bucketize(torch.arange(m), last, right=True)
    expected = torch.cat([every, torch.zeros(m, 1, 13)], dim=1)[torch.arange(m), which]
    assert_equal(grouped(problem, groups, last.to(device)), expected)


def grouped(problem: Problem, groups: int, ends: Tensor | None) -> Tensor:
    """Return the kernel's result; outputs of the weight and the bias are those of the groups in turn."""
    from int8compile.triton_kernels.grouped_gemm.launch import grouped_gemm_launch

    (m, k), n = problem.x.shape, problem.qweight.shape[0] // groups
    assert problem.bias is not None
    bias, scale = problem.bias.view(groups, n), problem.scale.view(groups, n)
    y = torch.full((m, n), 85.0, device=problem.x.device)
    product = Product(*problem.digits(), problem.qweight.view(groups, n, k), scale, bias, y)
    grouped_gemm_launch(product, ends, m // groups).run()
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 275), (5, 272), (33, 384), (40, 96), (1, 33000)])
def test_weight_only(m: int, k: int, dtype: torch.dtype, device: str) -> None:
    """The sums are exact."""
    from int8compile.triton_kernels.weight_only.launch import weight_only_launches

    problem = Problem.random(m, 13, k, dtype, device=device)
    problem.x[m // 2, 0] = math.inf if m > 1 else 1
    problem.qweight[3] = -128
    here = problem.to("cpu")
    expected = reference.weight_only_linear(here.x.float(), here.qweight, here.scale, here.d, here.bias)
    y = torch.full((m, 13), math.nan, device=device)
    for call in weight_only_launches(problem.x, problem.d, problem.qweight, problem.scale, problem.bias, y):
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
        """There is no host sync, and replays see new activations with other outliers."""
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
