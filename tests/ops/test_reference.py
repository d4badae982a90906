"""`int8compile.ops.reference` against NUMERICS: a literal transcription in Python floats, integers and fractions.

A Python float is a float64: products of two float32 values are exact in it, and `f32` of a sum, difference, product or
quotient of two float32 values is that operation rounded once (53 >= 2 * 24 + 2 bits). So results are equal, bit for
bit, not close.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from int8compile.ops import MAX_K, dequantize_weight
from int8compile.ops.column import column_linear
from int8compile.ops.reference import (
    batched_linear,
    butterflies,
    digits,
    fixed_point,
    input_scales,
    int_matmul,
    linear,
    product,
    quantize_rows,
    quantize_weight,
    rotated,
    rotation_of,
    rotation_size,
    signs,
    unrotated,
    weight_only_linear,
)
from tests.helpers.models import threads

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding of float32, relative.
U = 2.0**-24
FLOAT32_MAX = torch.finfo(torch.float32).max
SEEDS = st.integers(0, 2**31 - 1)
# One for each B, with runs of one, odd and even lengths.
SIZES = (1, 2, 7, 8, 40, 100, 16, 48, 80, 32, 96, 160, 64, 192, 128, 384, 640)
THRESHOLDS = (0.0, 1.0, 2.5, 6.0, 12.0)

Row = list[float]


def f32(value: float) -> float:
    """Round to float32, half to even."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:  # beyond the largest by half a unit in its last place
        return math.copysign(math.inf, value)


def spec_absmax(row: Row, statistic: float) -> tuple[list[int], float]:
    """Return `q = rne(x * 127/absmax)` and `s = absmax/127`, in float32; a zero row gives q = 0, s = 0.

    `127 / tensor` is `tensor.reciprocal() * 127` in PyTorch, rounded twice, in bitsandbytes too. It decides ties.
    """
    if statistic < 2.0**-120:
        return [0] * len(row), 0.0
    inverse = f32(127 * f32(1 / statistic))
    return [round(f32(value * inverse)) for value in row], f32(statistic / 127)  # round() is half to even


def spec_size(k: int) -> int:
    """Return B: the largest power of two that divides K, at most 128; 1 below 16."""
    size = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if k % size == 0) if k else 1
    return size if size >= 16 else 1


def spec_hadamard(x: list[int], size: int) -> list[int]:
    """Return `x'[i*C + j] = sum_b H[i,b] * x[b*C + j]`."""
    run = len(x) // size if x else 0
    return [
        sum((-1) ** (i & b).bit_count() * x[b * run + j] for b in range(size)) for i in range(size) for j in range(run)
    ]


def spec_fixed_point(x: Row, d: Row | None) -> tuple[list[int], float]:
    """Return X' and 2**(p - 22): NaN for a row with NaN or Inf, 0 for one that counts as zero."""
    v = x if d is None else [f32(a * b) for a, b in zip(x, d, strict=True)]
    if not all(map(math.isfinite, v)):
        return [0] * len(v), math.nan
    largest = max(map(abs, v), default=0.0)
    if largest < 2.0**-100:
        return [0] * len(v), 0.0
    p = math.frexp(largest)[1]
    integers = [round(Fraction(value) * Fraction(2) ** (22 - p)) for value in v]
    assert max(map(abs, integers)) <= 2**22
    result = spec_hadamard(integers, 1 if d is None else spec_size(len(v)))
    assert max(map(abs, result)) <= 2**29
    return result, 2.0 ** (p - 22)


def spec_quantize(x: Row, d: Row | None, t: float) -> tuple[list[int], float]:
    """Return Q and s_x."""
    integers, unit = spec_fixed_point(x, d)
    if not any(integers):
        return integers, unit
    largest, total = max(map(abs, integers)), sum(map(abs, integers))
    c1, c3 = f32(1 / 127), f32(1 / 32639)
    c2 = f32(t / (127 * len(x))) if t else 2.0**100
    s = max(min(f32(f32(largest) * c1), f32(f32(total) * c2)), f32(f32(largest) * c3))
    inverse = f32(1 / s)
    return [round(f32(f32(each) * inverse)) for each in integers], f32(s * unit)


def spec_linear(x: Row, d: Row | None, q: list[list[int]], scale: Row, bias: Row | None, t: float) -> Row:
    """Return a row of the output before it is rounded to x's dtype."""
    Q, s_x = spec_quantize(x, d, t)
    y = []
    for n, (row, s_w) in enumerate(zip(q, scale, strict=True)):
        acc = sum(a * b for a, b in zip(Q, row, strict=True))
        assert abs(acc) < 2**31
        value = f32(f32(f32(acc) * s_x) * s_w)
        y.append(value if bias is None else f32(value + bias[n]))
    return y


def spec_weight_only(x: Row, d: Row | None, q: list[list[int]], scale: Row, bias: Row | None) -> Row:
    """Return a row of the output of a weight-only product."""
    integers, unit = spec_fixed_point(x, d)
    y = []
    for n, (row, s_w) in enumerate(zip(q, scale, strict=True)):
        acc = sum(a * b for a, b in zip(integers, row, strict=True))
        value = f32(f32(f32(acc) * unit) * s_w)
        y.append(value if bias is None else f32(value + bias[n]))
    return y


def spec_rotated_weight(w: Row, d: Row) -> Row:
    """Return W', in the order of its float additions."""
    size, run = spec_size(len(w)), len(w) // spec_size(len(w))
    x, bit = [f32(a * f32(1 / b)) for a, b in zip(w, d, strict=True)], 1
    while bit < size:
        pairs = [(x[k], x[(k // run ^ bit) * run + k % run]) for k in range(len(x))]
        x = [f32(b - a) if k // run & bit else f32(a + b) for k, (a, b) in enumerate(pairs)]
        bit *= 2
    return [f32(value * (1 / size)) for value in x]


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, the sign of zero included; any NaN equals any NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "outliers": lambda x: torch.where(torch.rand(x.shape) < 0.05, 40 * x, x),
    "one huge": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 1e4, x),
    "one hot": lambda x: torch.where(torch.arange(len(x)) == len(x) // 3, 1.5, 0.0),
    "sparse": lambda x: torch.where(torch.rand(x.shape) < 0.9, 0.0, x),
    "constant": lambda x: torch.full_like(x, 0.75),
    "alternating": lambda x: torch.where(torch.arange(len(x)) % 2 == 0, 2.5, -2.5),
    "two values": lambda x: torch.where(x < 0, 1.0, 12.0),
    "few bits": lambda x: x.mul(8).round() / 8,
    "zeros": lambda x: torch.where(x < 0, 0.0, -0.0),
    "denormal": lambda x: x * 1e-41,
    "around tiny": lambda x: x * 2.0**-100,
    "huge": lambda x: x * 3e37,
    "all sizes": lambda x: x * 2.0 ** torch.randint(-126, 120, x.shape),
    "NaN": lambda x: torch.where(torch.rand(x.shape) < 0.05, math.nan, x),
    "Inf": lambda x: torch.where(torch.rand(x.shape) < 0.05, math.inf, x),
}


def rows_of(kinds: Sequence[str], K: int) -> Tensor:
    """Rows of the kinds given, [len(kinds), K]."""
    return torch.stack([KINDS[kind](torch.randn(K)) for kind in kinds])


def factors(K: int, size: float = 1.0) -> Tensor:
    """A d of K inputs."""
    return rotation_of(0.25 + 2 * torch.rand(K)) * size


# Weights


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantize_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 33).to(dtype)
    weight[4] = 0
    weight[5, 7] = 300
    before = weight.clone()
    qweight, scale = quantize_weight(weight, None)
    assert (qweight.dtype, scale.dtype) == (torch.int8, torch.float32)
    for row, q, s in zip(weight.to(torch.float32).tolist(), qweight.tolist(), scale.tolist(), strict=True):
        assert (q, s) == spec_absmax(row, max(map(abs, row)))
    assert not qweight[4].any()
    assert scale[4] == 0
    assert torch.equal(weight, before)


def test_quantize_weight_is_half_a_step_off_at_most() -> None:
    """In real numbers, whatever the order of operations: 1/absmax, times 127 and times W are rounded once each."""
    weight = torch.randn(50, 101) * torch.logspace(-30, 30, 50)[:, None]
    qweight, scale = quantize_weight(weight, None)
    exact = weight.double() * (127 / weight.double().abs().amax(1, keepdim=True))
    assert (qweight - exact).abs().max() <= 0.5 + 127 * 3 * U
    assert (qweight.abs().amax(1) == 127).all()
    torch.testing.assert_close(scale.double(), weight.double().abs().amax(1) / 127, rtol=U, atol=0)


def test_quantize_weight_rounds_half_to_even() -> None:
    """absmax 127 makes every step 1, so the ties are exact."""
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 125.5]
    qweight, scale = quantize_weight(torch.tensor([row]), None)
    assert qweight.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 126]]
    assert scale.tolist() == [1.0]


def test_quantize_weight_next_to_ties() -> None:
    """There the order of the float32 operations shows: 1/absmax, times 127, times W, as bitsandbytes does."""
    absmax = torch.rand(40) + 0.5
    ties = (torch.arange(127) + 0.5) * (absmax / 127)[:, None]
    weight = torch.cat([ties, -ties.nextafter(torch.tensor(0.0)), absmax[:, None]], dim=1)
    qweight, scale = quantize_weight(weight, None)
    for row, q, s in zip(weight.tolist(), qweight.tolist(), scale.tolist(), strict=True):
        assert (q, s) == spec_absmax(row, row[-1])


@given(SEEDS)
def test_quantize_weight_stays_within_127(seed: int) -> None:
    """Three roundings bring the largest to 127 * (1 + 3U) at most: still 127, never 128."""
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(4096, generator=generator) * 2.0 ** torch.randint(-119, 127, (4096,), generator=generator)
    absmax = absmax.clamp(min=2.0**-119)
    qweight, _ = quantize_weight(torch.stack([absmax, -absmax], dim=1), None)
    assert qweight.tolist() == [[127, -127]] * 4096


@pytest.mark.parametrize("last", [2.0**-120, FLOAT32_MAX])
def test_quantize_weight_at_the_ends_of_float32(last: float) -> None:
    qweight, scale = quantize_weight(torch.tensor([[last, -last, last / 4]]), None)
    assert qweight.tolist() == [[127, -127, 32]]
    assert scale.tolist() == [f32(last / 127)]


@pytest.mark.parametrize("last", [2.0**-120 * (1 - 2 * U), 2.0**-149, 0.0])
def test_quantize_weight_counts_a_tiny_row_as_zero(last: float) -> None:
    qweight, scale = quantize_weight(torch.tensor([[last, -last], [1.0, -2.0]]), None)
    assert qweight.tolist() == [[0, 0], [64, -127]]
    assert scale.tolist() == [0.0, f32(2 / 127)]


def test_quantize_weight_of_experts_is_each_expert_alone() -> None:
    weight = torch.randn(3, 5, 17)
    qweight, scale = quantize_weight(weight, None)
    for each in range(3):
        q, s = quantize_weight(weight[each], None)
        assert torch.equal(qweight[each], q)
        assert torch.equal(scale[each], s)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (1, 1)])
def test_quantize_weight_of_any_size(shape: tuple[int, ...]) -> None:
    qweight, scale = quantize_weight(torch.randn(shape), None)
    assert qweight.shape == shape
    assert scale.shape == shape[:-1]
    if shape[-1] == 0:
        assert not scale.any()


def test_quantize_weight_does_not_depend_on_strides() -> None:
    weight = torch.randn(13, 9)
    for view in (weight.T.contiguous().T, torch.stack([weight, weight], dim=2)[..., 0]):
        assert not view.is_contiguous()
        for actual, expected in zip(quantize_weight(view, None), quantize_weight(weight, None), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [None, 1.0, 1e-3])
@pytest.mark.parametrize("K", SIZES)
def test_quantize_weight_rotated(K: int, size: float | None) -> None:
    weight, d = torch.randn(5, K), None if size is None else factors(K, size)
    weight[2] = 0
    qweight, scale = quantize_weight(weight, d)
    for row, q, s in zip(weight.tolist(), qweight.tolist(), scale.tolist(), strict=True):
        values = row if d is None else spec_rotated_weight(row, d.tolist())
        assert (q, s) == spec_absmax(values, max(map(abs, values)))


def test_quantize_weight_takes_one_d_for_each_expert() -> None:
    weight, d = torch.randn(3, 5, 64), torch.stack([factors(64) for _ in range(3)])
    qweight, scale = quantize_weight(weight, d)
    dequantized = dequantize_weight(qweight, scale, d, torch.float32)
    for each in range(3):
        q, s = quantize_weight(weight[each], d[each])
        assert torch.equal(qweight[each], q)
        assert torch.equal(scale[each], s)
        assert torch.equal(dequantized[each], dequantize_weight(q, s, d[each], torch.float32))
    shared = quantize_weight(weight, d[0])
    assert torch.equal(shared[0][2], quantize_weight(weight[2], d[0])[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_weight(dtype: torch.dtype) -> None:
    qweight, scale = quantize_weight(torch.randn(2, 6, 11), None)
    weight = dequantize_weight(qweight, scale, None, dtype)
    product = [
        f32(q * s)
        for rows, scales in zip(qweight.tolist(), scale.tolist(), strict=True)
        for row, s in zip(rows, scales, strict=True)
        for q in row
    ]
    assert torch.equal(weight, torch.tensor(product).to(dtype).reshape(2, 6, 11))


@pytest.mark.parametrize("K", SIZES)
def test_dequantizing_takes_the_rotation_back(K: int) -> None:
    """Half a step of each rotated weight, over B of them; the float additions are 2 * log2(B) + 4 roundings."""
    weight, d = torch.randn(4, K), factors(K)
    qweight, scale = quantize_weight(weight, d)
    back = dequantize_weight(qweight, scale, d, torch.float32)
    size = spec_size(K)
    bound = size * scale[:, None].double() * (0.5 + 127 * 20 * U) * d.abs().double()
    assert ((back.double() - weight.double()).abs() <= bound).all()


# Rotation


def test_rotation_size() -> None:
    assert [rotation_size(k) for k in (0, 1, 8, 15, 16, 24, 48, 32, 96, 64, 576, 128, 256, 768, 4096, MAX_K)] == (
        [1, 1, 1, 1, 16, 1, 16, 32, 32, 64, 64, 128, 128, 128, 128, 1]
    )
    assert all(rotation_size(k) == spec_size(k) for k in range(1, 1025))


@pytest.mark.parametrize("K", [1, 16, 576, 4096, MAX_K])
def test_signs(K: int) -> None:
    """A hash of 32 bits, by Python's integers."""
    expected = []
    for k in range(K):
        h = (k * 0x9E3779B1 + K) % 2**32
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        expected.append(-1.0 if h % 2 else 1.0)
    assert signs(K).tolist() == expected
    assert K < 16 or 0.3 < expected.count(1.0) / K < 0.7


@pytest.mark.parametrize("K", SIZES)
def test_butterflies(K: int) -> None:
    """Of integers, in any order; and twice is B times."""
    size = spec_size(K)
    x = torch.randint(-(2**22), 2**22, (3, K), dtype=torch.int32)
    once = butterflies(x, size)
    assert once.tolist() == [spec_hadamard(row, size) for row in x.tolist()]
    assert torch.equal(butterflies(once, size), size * x)


@pytest.mark.parametrize("K", SIZES)
def test_rotated_and_unrotated_are_adjoint(K: int) -> None:
    """What gradients need: (H(x * d)) . y = x . (d * H(y)), up to the roundings of both sides."""
    x, y, d = torch.randn(2, K), torch.randn(2, K), factors(K)
    left, right = (rotated(x, d).double() * y).sum(), (x.double() * unrotated(y, d)).sum()
    size = (rotated(x.abs(), d.abs()).abs().double() * y.abs()).sum() + (x.abs() * d.abs()).double().sum() * K
    assert (left - right).abs() <= 40 * U * size
    assert torch.equal(rotated(x, None), x)
    assert torch.equal(unrotated(x, None), x)


# Activations


@given(SEEDS, st.sampled_from(SIZES), st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60)
def test_quantize_rows(seed: int, K: int, kinds: list[str], is_rotated: bool) -> None:
    torch.manual_seed(seed)
    x, t = rows_of(kinds, K), THRESHOLDS[seed % len(THRESHOLDS)]
    d = factors(K, 1e5 if seed % 5 == 0 else 1.0) if is_rotated else None
    integers, unit, zero = fixed_point(x, d)
    grid = quantize_rows(x, d, t)
    assert (integers.dtype, grid.Q.dtype, grid.scale.dtype) == (torch.int32, torch.int32, torch.float32)
    for row, found_integers, u, is_zero, found, s in zip(
        x.tolist(), integers.tolist(), unit.tolist(), zero.tolist(), grid.Q.tolist(), grid.scale.tolist(), strict=True
    ):
        factors_of = None if d is None else d.tolist()
        expected, expected_unit = spec_fixed_point(row, factors_of)
        assert found_integers == expected
        assert is_zero == (expected_unit == 0)
        assert is_zero or math.isnan(u) == math.isnan(expected_unit)
        assert is_zero or math.isnan(u) or u == expected_unit
        expected, expected_scale = spec_quantize(row, factors_of, t)
        assert found == expected
        assert s == expected_scale or (math.isnan(s) and math.isnan(expected_scale))
        assert max(map(abs, found)) <= 32639


@given(SEEDS, st.sampled_from(SIZES), st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4))
@settings(max_examples=60)
def test_few_elements_are_outliers(seed: int, K: int, kinds: list[str]) -> None:
    """At most K / t of a row, and a row without any is on the grid of its largest element."""
    torch.manual_seed(seed)
    x, d = rows_of(kinds, K), factors(K) if seed % 2 else None
    for t in THRESHOLDS:
        grid = quantize_rows(x, d, t)
        _, q1 = digits(grid.Q)
        count = (q1 != 0).sum(-1)
        assert (count <= K / t).all() if t else not count.any()


def test_digits() -> None:
    """All that there are: q0 reaches -128, and 128 is an outlier where -128 is none."""
    Q = torch.arange(-32639, 32640, dtype=torch.int32)
    q0, q1 = digits(Q)
    assert (q0.dtype, q1.dtype) == (torch.int8, torch.int8)
    assert torch.equal(256 * q1.int() + q0.int(), Q)
    assert torch.equal(q1 != 0, (Q > 127) | (Q < -128))


@pytest.mark.parametrize("K", SIZES)
def test_a_row_is_off_by_half_a_step(K: int) -> None:
    """In real numbers: half a unit of the fixed point for each of B elements, half a step, and three roundings."""
    x, d = rows_of(("normal", "outliers", "one huge", "constant", "huge", "sparse"), K), factors(K)
    grid = quantize_rows(x, d, 12.0)
    unit = fixed_point(x, d)[1].double()[:, None]
    exact = butterflies((x * d).double(), spec_size(K))
    scale = grid.scale.double()[:, None]
    bound = spec_size(K) * unit / 2 + scale * (0.5 + 32639 * 4 * U)
    assert ((grid.Q * scale - exact).abs() <= bound).all()


def test_nan_inf_and_overflow_make_their_row_nan() -> None:
    x, d = rows_of(["normal"] * 5, 64), factors(64)
    d[3] = 1e10
    x[1, 3], x[2, 5], x[3, 6], x[4, 3] = 1e30, math.nan, -math.inf, 1e27
    grid = quantize_rows(x, d, 12.0)
    assert grid.scale.isnan().tolist() == [False, True, True, True, False]
    assert not grid.Q[1:4].any()
    qweight, scale = quantize_weight(torch.randn(6, 64), d)
    qweight[0] = 0
    for y in (linear(x, qweight, scale, d, torch.ones(6), 12.0), weight_only_linear(x, qweight, scale, d, None)):
        assert y.isnan().tolist() == [[bad] * 6 for bad in (False, True, True, True, False)]


@pytest.mark.parametrize("largest", [2.0**-100, math.nextafter(2.0**-100, 0), f32(2.0**-100 * (1 - U)), 2.0**-149, 0.0])
def test_tiny_rows_count_as_zero(largest: float) -> None:
    x = torch.tensor([[largest, -largest / 2]])
    grid = quantize_rows(x, None, 12.0)
    if f32(largest) >= 2.0**-100:
        assert grid.Q.tolist() == [[127, -64]]
        assert grid.scale.item() == f32(1 / 127) * 2.0**-100
    else:
        assert (grid.Q.tolist(), grid.scale.item()) == ([[0, 0]], 0.0)


# The attack rows of NUMERICS, 3: what comes closest to an overflow of the int32 sum
def attacks(K: int) -> Tensor:
    """Two-valued rows of several shares and ratios, one-hot, massive and alternating ones."""
    rows = [torch.ones(K), torch.zeros(K).index_fill(0, torch.tensor([K // 2]), 1.0)]
    for share, ratio in (
        (0.5, 1.0),
        (0.083, 11.9),
        (0.083, 12.0),
        (0.5, 2.01),
        (0.9, 1.1),
        (0.003, 300.0),
        (1e-4, 1e4),
    ):
        rows.append(torch.where(torch.rand(K) < share, ratio, 1.0))
        # Just above half a step, so that all round up.
        rows.append(torch.where(torch.rand(K) < share, 127 * ratio, 126.5001))
    rows.append(torch.where(torch.arange(K) % 2 == 0, 127.0, -126.51))
    massive = torch.randn(K)
    massive[K // 3] = 1e6
    return torch.stack([*rows, massive])


@pytest.mark.parametrize(("K", "is_rotated"), [(MAX_K, False), (131056, True), (130944, True), (131056, False)])
def test_the_sum_cannot_overflow(K: int, is_rotated: bool) -> None:
    """131056 is 16 * 8191, 130944 is 128 * 1023."""
    x, d = attacks(K), signs(K) if is_rotated else None
    for t in (1.0, 1.5, 12.0):
        grid = quantize_rows(x, d, t)
        total = grid.Q.abs().sum(-1, dtype=torch.int64)
        assert (total <= 127.5 * K * (1 + 8 * U)).all()
        assert total.max() * 128 < 2**31
        # The weight that makes the most of each row.
        qweight = torch.where(grid.Q < 0, -127, 127).to(torch.int8)
        acc = product(grid, qweight)
        assert torch.equal(acc.diag().long(), 127 * total)


# The integer product


@st.composite
def int8_operands(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Around the slice length 1040 and its multiples, where float32 would begin to round."""
    M, N = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    K = draw(
        st.sampled_from([0, 1, 2, 3, 7, 64, 1023, 1024, 1025, 1039, 1040, 1041, 2048, 2079, 2080, 2081, 3121, 5200])
    )
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(st.sampled_from(["random", "all equal", "extreme signs", "odd extremes"]))
    if kind == "random":
        low_high: tuple[int, int] = (-127, 128)
        return (
            torch.randint(*low_high, (M, K), generator=generator, dtype=torch.int8),
            torch.randint(*low_high, (N, K), generator=generator, dtype=torch.int8),
        )
    a = torch.full((M, K), 127, dtype=torch.int8)
    b = torch.full((N, K), draw(st.sampled_from([127, -127])), dtype=torch.int8)
    if kind == "extreme signs":
        a *= torch.randint(2, (M, K), generator=generator, dtype=torch.int8) * 2 - 1
    if kind == "odd extremes":
        # Not all products equal, so that partial sums are odd numbers close to 2**24.
        b += torch.randint(2, (N, K), generator=generator, dtype=torch.int8) * (-b.sign())
    return a, b


@settings(max_examples=150)
@given(int8_operands(), st.sampled_from(["highest", "high", "medium"]), st.sampled_from([1, 2, 3]))
def test_int_matmul_is_exact(operands: tuple[Tensor, Tensor], precision: str, count: int) -> None:
    q_x, qweight = operands
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with threads(count):
            acc = int_matmul(q_x, qweight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert acc.dtype == torch.int32
    assert torch.equal(acc.long(), q_x.long() @ qweight.long().T)


@pytest.mark.parametrize("sign", [1, -1])
def test_int_matmul_does_not_overflow_at_the_largest_k(sign: int) -> None:
    q_x = torch.full((2, MAX_K), 127, dtype=torch.int8)
    qweight = torch.full((3, MAX_K), 127 * sign, dtype=torch.int8)
    assert torch.equal(int_matmul(q_x, qweight), torch.full((2, 3), MAX_K * 127 * 127 * sign, dtype=torch.int32))


def test_int_matmul_is_exact_for_minus_128() -> None:
    """`quantize_weight` makes none, but an int8 weight from elsewhere may hold it, and no check refuses it.

    MAX_K is chosen for it (131071 * 128 * 128 is below 2**31), so the slices must be short enough too.
    """
    K = 1040
    q_x = torch.full((1, K), 127, dtype=torch.int8)
    qweight = torch.full((1, K), -128, dtype=torch.int8)
    qweight[0, 0] = -127
    assert int_matmul(q_x, qweight).tolist() == [[-127 * 128 * K + 127]]


def test_int_matmul_takes_any_strides() -> None:
    q_x = torch.randint(-127, 128, (8, 50), dtype=torch.int8)
    qweight = torch.randint(-127, 128, (6, 50), dtype=torch.int8)
    expected = (q_x.long() @ qweight.long().T).int()
    assert torch.equal(int_matmul(q_x.T.contiguous().T, qweight.T.contiguous().T), expected)
    assert torch.equal(
        int_matmul(q_x[::2, ::3], qweight[::3, ::3]), (q_x[::2, ::3].long() @ qweight[::3, ::3].long().T).int()
    )


# The whole


@given(
    SEEDS,
    st.sampled_from([0, *SIZES]),
    st.integers(0, 4),
    st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
)
@settings(max_examples=100)
def test_linear(
    seed: int, K: int, N: int, kinds: list[str], dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(seed)
    x, t = (rows_of(kinds, K) if K else torch.empty(len(kinds), 0)).to(dtype), THRESHOLDS[seed % len(THRESHOLDS)]
    d = factors(K) if seed % 3 else None
    bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
    qweight, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N)
    rest = (None if d is None else d.tolist(), qweight.tolist(), scale.tolist())
    rest = (*rest, None if bias is None else bias.float().tolist())
    for y, expected in (
        (linear(x, qweight, scale, d, bias, t), [spec_linear(row, *rest, t) for row in x.float().tolist()]),
        (weight_only_linear(x, qweight, scale, d, bias), [spec_weight_only(row, *rest) for row in x.float().tolist()]),
    ):
        assert_bits(y, torch.tensor(expected, dtype=torch.float32).reshape(len(kinds), N).to(dtype))


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=16, max_size=16), min_size=1, max_size=3))
def test_linear_of_numbers_that_hypothesis_picks(x: list[Row]) -> None:
    """Zeros, subnormals, ties and equal magnitudes."""
    torch.manual_seed(0)
    d = factors(16)
    qweight, scale = quantize_weight(torch.randn(3, 16), d)
    for t in (0.0, 1.0, 2.0):
        for given_d in (None, d):
            rest = (None if given_d is None else d.tolist(), qweight.tolist(), scale.tolist(), None, t)
            expected = torch.tensor([spec_linear(row, *rest) for row in x])
            assert_bits(linear(torch.tensor(x), qweight, scale, given_d, None, t), expected)


@pytest.mark.parametrize("K", [100, 640])
def test_batched_linear(K: int) -> None:
    """Each of the experts alone, with one d for all, one for each, or none."""
    x, bias = torch.randn(3, 4, K), torch.randn(3, 5)
    for d in (None, factors(K), torch.stack([factors(K) for _ in range(3)])):
        qweight, scale = quantize_weight(torch.randn(3, 5, K), d)
        y = batched_linear(x, qweight, scale, d, bias, 12.0)
        for b in range(3):
            alone = d if d is None or d.dim() == 1 else d[b]
            assert_bits(y[b], linear(x[b], qweight[b], scale[b], alone, bias[b], 12.0))


def test_it_is_near_to_float() -> None:
    """The errors of NUMERICS' table for kinds of rows at K = 4096, with signs only, and a tenth of room."""
    K = 4096
    weight, d = torch.randn(64, K) / 64, signs(K)
    qweight, scale = quantize_weight(weight, d)
    normal = torch.randn(32, K)
    for x, percent in (
        (normal, 1.23),
        (normal.relu(), 1.24),
        (normal.sign() * normal.abs().log1p().exp2(), 1.3),
        (torch.where(torch.rand(32, K) < 0.95, 0.0, normal), 1.30),
        (normal + 5, 1.2),
    ):
        exact = x.double() @ weight.double().T
        error = (linear(x, qweight, scale, d, None, 12.0) - exact).norm() / exact.norm()
        assert error <= percent * 1.1 / 100


# The scales of inputs


def test_input_scales_of_weights_alone() -> None:
    """sqrt(mean w / w) over the rows of all, between 1 and 32; what no weight reads has a floor."""
    first, second = torch.randn(5, 48), torch.randn(9, 48).bfloat16()
    first[:, 3], second[:, 3] = 0, 0
    first[:, 4], second[:, 4] = 0.01 * first[:, 4], 0.01 * second[:, 4]
    w = torch.cat([first, second.float()]).double().square().mean(0).sqrt()
    w = w.clamp_min(1e-3 * float(w.mean()))
    c = input_scales([first, second])
    torch.testing.assert_close(c, (w.mean() / w).sqrt().clamp(1, 32).float(), rtol=2 * U, atol=0)
    assert c.min() == 1
    assert 5 < c[4] < c[3] < 32
    d = rotation_of(c)
    assert torch.equal(d, signs(48) / c)


def test_input_scales_with_statistics() -> None:
    weight, a = torch.randn(20, 48), torch.rand(48) + 0.1
    a[5], a[6] = 0, 1e6
    w = weight.double().square().mean(0).sqrt()
    floored = a.double().clamp_min(1e-3 * float(a.double().mean()))
    c = (floored / w).sqrt()
    c = (c / c.log().mean().exp()).clamp(1 / 32, 32)
    torch.testing.assert_close(input_scales([weight], a), c.float(), rtol=2 * U, atol=0)
    assert input_scales([weight], a)[6] == 32


# The column policy: LLM.int8() as published


def spec_column(x: list[Row], qweight: list[list[int]], scale: Row, threshold: float) -> tuple[list[Row], list[Row]]:
    """Return the output of finite rows, and a bound on what float32 sums in any order add."""
    outlier = [[threshold > 0 and value != 0 and abs(value) >= threshold for value in row] for row in x]
    columns = [any(column) for column in zip(*outlier, strict=True)]
    y: list[Row] = []
    bound: list[Row] = []
    for row, mask in zip(x, outlier, strict=True):
        kept = [0.0 if out else value for value, out in zip(row, mask, strict=True)]
        q, s_x = spec_absmax(kept, max(map(abs, kept), default=0.0))
        y.append([])
        bound.append([])
        for q_w, s_w in zip(qweight, scale, strict=True):
            acc = sum(a * b for a, b, out in zip(q, q_w, columns, strict=True) if not out)
            products = [value * b for value, b, out in zip(row, q_w, columns, strict=True) if out]
            y[-1].append((acc * s_x + math.fsum(products)) * s_w)
            size = abs(acc) * s_x + sum(map(abs, products))
            bound[-1].append((len(products) + 4) * U * size * s_w)
    return y, bound


@given(SEEDS, st.integers(1, 4), st.integers(1, 60), st.sampled_from([0.0, 2.0, 6.0]))
def test_column_linear(seed: int, M: int, K: int, threshold: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(M, K)
    x.view(-1)[torch.randint(x.numel(), (3,))] *= 25
    qweight, scale = quantize_weight(torch.randn(5, K), None)
    expected, bound = spec_column(x.tolist(), qweight.tolist(), scale.tolist(), threshold)
    y = column_linear(x, qweight, scale, None, threshold)
    assert ((y.double() - torch.tensor(expected).double()).abs() <= torch.tensor(bound).double() * (1 + U)).all()


def test_column_policy_counts_elements_below_the_threshold_in_outlier_columns() -> None:
    """bitsandbytes' statistics: the row [2, -1, 5.5] has a scale of 5.5/127 though its third column runs in float."""
    x = torch.tensor([[2.0, -1.0, 5.5], [0.5, 1.0, 7.0]])
    identity = 127 * torch.eye(3, dtype=torch.int8)
    y = column_linear(x, identity, torch.full((3,), 1 / 127), None, 6.0)
    expected = torch.tensor([[46 * 5.5 / 127, -23 * 5.5 / 127, 5.5], [64 / 127, 1.0, 7.0]])
    torch.testing.assert_close(y, expected, rtol=8 * U, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_column_policy_keeps_nan_and_inf_in_their_row(value: float) -> None:
    x = torch.randn(4, 20)
    x[2, 7] = value
    qweight, scale = quantize_weight(torch.randn(6, 20), None)
    y = column_linear(x, qweight, scale, torch.ones(6), 6.0)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()
