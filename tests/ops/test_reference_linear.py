"""`int8compile.ops.reference` against NUMERICS, for activations and whole linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from int8compile.ops import MAX_K
from int8compile.ops.column import column_linear
from int8compile.ops.reference import (
    batched_linear,
    butterflies,
    digits,
    fixed_point,
    input_scales,
    linear,
    product,
    quantize_rows,
    quantize_weight,
    rotation_of,
    signs,
    weight_only_linear,
)

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.numerics import (
    DTYPES,
    SEEDS,
    SIZES,
    Row,
    U,
    attacks,
    f32,
    factors,
    spec_absmax,
    spec_hadamard,
    spec_size,
)

THRESHOLDS = (0.0, 1.0, 2.5, 6.0, 12.0)


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
    """Return a row of the output before rounding to x's dtype."""
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


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    """Require equal bits, including the sign of zero; any NaN equals any NaN."""
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
    """Return rows of the given kinds, [len(kinds), K]."""
    return torch.stack([KINDS[kind](torch.randn(K)) for kind in kinds])


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
    """A row has at most K / t outliers; a row without outliers uses the grid of its largest element."""
    torch.manual_seed(seed)
    x, d = rows_of(kinds, K), factors(K) if seed % 2 else None
    for t in THRESHOLDS:
        grid = quantize_rows(x, d, t)
        _, q1 = digits(grid.Q)
        count = (q1 != 0).sum(-1)
        assert (count <= K / t).all() if t else not count.any()


def test_digits() -> None:
    """Every Q splits into digits: q0 reaches -128, so 128 is an outlier and -128 is not."""
    Q = torch.arange(-32639, 32640, dtype=torch.int32)
    q0, q1 = digits(Q)
    assert (q0.dtype, q1.dtype) == (torch.int8, torch.int8)
    assert torch.equal(256 * q1.int() + q0.int(), Q)
    assert torch.equal(q1 != 0, (Q > 127) | (Q < -128))


@pytest.mark.parametrize("K", SIZES)
def test_a_row_is_off_by_half_a_step(K: int) -> None:
    """The bound is in real numbers: half a fixed-point unit for each of B elements, half a step, three roundings."""
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


@pytest.mark.parametrize(("K", "is_rotated"), [(MAX_K, False), (131056, True), (130944, True), (131056, False)])
def test_the_sum_cannot_overflow(K: int, is_rotated: bool) -> None:
    """131056 is 16 * 8191, 130944 is 128 * 1023."""
    x, d = attacks(K), signs(K) if is_rotated else None
    for t in (1.0, 1.5, 12.0):
        grid = quantize_rows(x, d, t)
        total = grid.Q.abs().sum(-1, dtype=torch.int64)
        assert (total <= 127.5 * K * (1 + 8 * U)).all()
        assert total.max() * 128 < 2**31
        # The weight with the largest product for each row.
        qweight = torch.where(grid.Q < 0, -127, 127).to(torch.int8)
        acc = product(grid, qweight)
        assert torch.equal(acc.diag().long(), 127 * total)


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
    """Hypothesis adds zeros, subnormals, ties and equal magnitudes."""
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
    """The result is that of each expert alone, with one d for all, one for each, or none."""
    x, bias = torch.randn(3, 4, K), torch.randn(3, 5)
    for d in (None, factors(K), torch.stack([factors(K) for _ in range(3)])):
        qweight, scale = quantize_weight(torch.randn(3, 5, K), d)
        y = batched_linear(x, qweight, scale, d, bias, 12.0)
        for b in range(3):
            alone = d if d is None or d.dim() == 1 else d[b]
            assert_bits(y[b], linear(x[b], qweight[b], scale[b], alone, bias[b], 12.0))


def test_it_is_near_to_float() -> None:
    """The errors of NUMERICS' table for kinds of rows at K = 4096, with signs only, and a margin of a tenth."""
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
    """sqrt(mean w / w) over the rows of all weights, between 1 and 32; columns that are all zero have a floor."""
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
    """Return the output of finite rows, and a bound on the error of float32 sums in any order."""
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
    """The statistics are bitsandbytes': the row [2, -1, 5.5] has scale 5.5/127 though its third column is in float."""
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
