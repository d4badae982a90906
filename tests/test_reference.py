"""`int8compile.ops.reference` against NUMERICS: a literal transcription in Python floats, integers and fractions.

A Python float is a float64: products of two float32 values are exact in it, and `f32` of a sum, difference, product or
quotient of two float32 values is that operation rounded once (53 >= 2 * 24 + 2 bits).
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from int8compile.ops import MAX_K, dequantize_weight, linear
from int8compile.ops.reference import (
    QuantizedRows,
    fixed_point_squares,
    int_matmul,
    outlier_mask,
    outlier_product,
    quantize_rows,
    quantize_weight,
)
from tests.models import threads

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POLICIES = ["row", "column"]
# One rounding of float32, relative.
U = 2.0**-24
FLOAT32_MAX = torch.finfo(torch.float32).max
SEEDS = st.integers(0, 2**31 - 1)

Rows = list[list[float]]


def f32(value: float) -> float:
    """Rounds to float32, half to even."""
    return struct.unpack("f", struct.pack("f", value))[0]


def spec_quantize(row: list[float], statistic: float) -> tuple[list[int], float]:
    """`q = rne(x * 127/absmax)`, `s = absmax/127`, in float32; a zero row gives q = 0, s = 0.

    `127 / tensor` is `tensor.reciprocal() * 127` in PyTorch, rounded twice, in bitsandbytes too. It decides ties.
    """
    if statistic < 2.0**-120:
        return [0] * len(row), 0.0
    inverse = f32(127 * f32(1 / statistic))
    return [round(f32(value * inverse)) for value in row], f32(statistic / 127)  # round() is half to even


def spec_stands_out(x: Rows, threshold: float, outliers: str) -> list[list[bool]]:
    """The elements that do not count for absmax, for finite x. In fractions: no rounding at all."""
    if threshold == 0:
        return [[False] * len(row) for row in x]
    if outliers == "column":
        return [[abs(value) >= threshold for value in row] for row in x]
    mask = []
    for row in x:
        square_of_rms = sum(Fraction(value) ** 2 for value in row) / len(row) if row else Fraction(0)
        limit = Fraction(threshold) ** 2 * square_of_rms
        mask.append([value != 0 and Fraction(value) ** 2 >= limit for value in row])
    return mask


def spec_linear(
    x: Rows, qweight: list[list[int]], scale: list[float], bias: list[float] | None, threshold: float, outliers: str
) -> tuple[Rows, Rows]:
    """The output before it is rounded to x's dtype, and a bound on the error of evaluating it in float32.

    The column policy is written as LLM.int8() has it: the outlier columns leave the integer product and are multiplied
    in float. The specification's residual form must equal it.
    """
    stands_out = spec_stands_out(x, threshold, outliers)
    columns = [any(column) for column in zip(*stands_out, strict=True)]
    y: Rows = []
    bound: Rows = []
    for row, mask in zip(x, stands_out, strict=True):
        kept = [0.0 if out else value for value, out in zip(row, mask, strict=True)]
        q, s_x = spec_quantize(kept, max(map(abs, kept), default=0.0))
        in_float = columns if outliers == "column" else mask
        y.append([])
        bound.append([])
        for n, (q_w, s_w) in enumerate(zip(qweight, scale, strict=True)):
            acc = sum(a * b for a, b, out in zip(q, q_w, in_float, strict=True) if not out)
            out = math.fsum(value * b for value, b, is_out in zip(row, q_w, in_float, strict=True) if is_out)
            b = 0.0 if bias is None else bias[n]
            y[-1].append((acc * s_x + out) * s_w + b)
            # Everything that is added up, by magnitude; in the column policy the integer part runs over all columns
            # and the residual subtracts s_x * q_x again.
            size = abs(acc) * s_x + sum(
                (abs(value) + 2 * s_x * abs(a)) * abs(w)
                for value, a, w, is_out in zip(row, q, q_w, in_float, strict=True)
                if is_out
            )
            # Roundings on the longest way: acc, times s_x (or s_x * q, the subtraction, the sum of float64), plus,
            # times s_w, plus bias: 6. The 7th covers products of roundings and the float64 sums here and there.
            bound[-1].append(7 * U * (size * s_w + abs(b)))
    return y, bound


def assert_matches_spec(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
) -> None:
    y = linear(x, qweight, scale, bias, threshold, outliers)
    expected, bound = spec_linear(
        x.tolist(),
        qweight.tolist(),
        scale.tolist(),
        None if bias is None else bias.to(torch.float32).tolist(),
        threshold,
        outliers,
    )
    shape = (x.shape[0], qweight.shape[0])
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(shape)
    allowed = torch.tensor(bound, dtype=torch.float64).reshape(shape)
    assert y.dtype == x.dtype
    assert y.shape == shape
    if x.dtype != torch.float32:
        # One more rounding: half an ulp, or half of the smallest subnormal.
        info = torch.finfo(x.dtype)
        allowed = allowed + (wanted.abs() + allowed) * info.eps / 2 + info.smallest_normal * info.eps / 2
    error = (y.double() - wanted).abs()
    assert (error <= allowed).all(), f"off by {error.max():.3g}, allowed {allowed.flatten()[error.argmax()]:.3g}"


def activations(M: int, K: int, spread: float = 1.0, planted: int = 3) -> Tensor:
    """Normal values with a few that stand far out."""
    x = torch.randn(M, K) * spread
    if x.numel():
        x.view(-1)[torch.randint(x.numel(), (planted,))] *= 25
    return x


# Weights


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantize_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 33).to(dtype)
    weight[4] = 0
    weight[5, 7] = 300
    before = weight.clone()
    qweight, scale = quantize_weight(weight)
    assert (qweight.dtype, scale.dtype) == (torch.int8, torch.float32)
    for row, q, s in zip(weight.to(torch.float32).tolist(), qweight.tolist(), scale.tolist(), strict=True):
        assert (q, s) == spec_quantize(row, max(map(abs, row)))
    assert not qweight[4].any()
    assert scale[4] == 0
    assert torch.equal(weight, before)


def test_quantize_weight_is_half_a_step_off_at_most() -> None:
    """In real numbers, whatever the order of operations: 1/absmax, times 127 and times W are rounded once each."""
    weight = torch.randn(50, 101) * torch.logspace(-30, 30, 50)[:, None]
    qweight, scale = quantize_weight(weight)
    exact = weight.double() * (127 / weight.double().abs().amax(1, keepdim=True))
    assert (qweight - exact).abs().max() <= 0.5 + 127 * 3 * U
    assert (qweight.abs().amax(1) == 127).all()
    torch.testing.assert_close(scale.double(), weight.double().abs().amax(1) / 127, rtol=U, atol=0)


def test_quantize_weight_rounds_half_to_even() -> None:
    """absmax 127 makes every step 1, so the ties are exact."""
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 125.5]
    qweight, scale = quantize_weight(torch.tensor([row]))
    assert qweight.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 126]]
    assert scale.tolist() == [1.0]


def test_quantize_weight_next_to_ties() -> None:
    """There the order of the float32 operations shows: 1/absmax, times 127, times W, as bitsandbytes does."""
    absmax = torch.rand(40) + 0.5
    ties = (torch.arange(127) + 0.5) * (absmax / 127)[:, None]
    weight = torch.cat([ties, -ties.nextafter(torch.tensor(0.0)), absmax[:, None]], dim=1)
    qweight, scale = quantize_weight(weight)
    for row, q, s in zip(weight.tolist(), qweight.tolist(), scale.tolist(), strict=True):
        assert (q, s) == spec_quantize(row, row[-1])


@given(SEEDS)
def test_quantize_weight_stays_within_127(seed: int) -> None:
    """Three roundings bring the largest to 127 * (1 + 3U) at most: still 127, never 128."""
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(4096, generator=generator) * 2.0 ** torch.randint(-119, 127, (4096,), generator=generator)
    absmax = absmax.clamp(min=2.0**-119)
    qweight, _ = quantize_weight(torch.stack([absmax, -absmax], dim=1))
    assert qweight.tolist() == [[127, -127]] * 4096


@pytest.mark.parametrize("last", [2.0**-120, FLOAT32_MAX])
def test_quantize_weight_at_the_ends_of_float32(last: float) -> None:
    qweight, scale = quantize_weight(torch.tensor([[last, -last, last / 4]]))
    assert qweight.tolist() == [[127, -127, 32]]
    assert scale.tolist() == [f32(last / 127)]


@pytest.mark.parametrize("last", [2.0**-120 * (1 - 2 * U), 2.0**-149, 0.0])
def test_quantize_weight_counts_a_tiny_row_as_zero(last: float) -> None:
    qweight, scale = quantize_weight(torch.tensor([[last, -last], [1.0, -2.0]]))
    assert qweight.tolist() == [[0, 0], [64, -127]]
    assert scale.tolist() == [0.0, f32(2 / 127)]


def test_quantize_weight_of_experts_is_each_expert_alone() -> None:
    weight = torch.randn(3, 5, 17)
    qweight, scale = quantize_weight(weight)
    for each in range(3):
        q, s = quantize_weight(weight[each])
        assert torch.equal(qweight[each], q)
        assert torch.equal(scale[each], s)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (1, 1)])
def test_quantize_weight_of_any_size(shape: tuple[int, ...]) -> None:
    qweight, scale = quantize_weight(torch.randn(shape))
    assert qweight.shape == shape
    assert scale.shape == shape[:-1]
    if shape[-1] == 0:
        assert not scale.any()


def test_quantize_weight_does_not_depend_on_strides() -> None:
    weight = torch.randn(13, 9)
    for view in (weight.T.contiguous().T, torch.stack([weight, weight], dim=2)[..., 0]):
        assert not view.is_contiguous()
        for actual, expected in zip(quantize_weight(view), quantize_weight(weight), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_weight(dtype: torch.dtype) -> None:
    qweight, scale = quantize_weight(torch.randn(2, 6, 11))
    weight = dequantize_weight(qweight, scale, dtype)
    product = [
        f32(q * s)
        for rows, scales in zip(qweight.tolist(), scale.tolist(), strict=True)
        for row, s in zip(rows, scales, strict=True)
        for q in row
    ]
    assert torch.equal(weight, torch.tensor(product).to(dtype).reshape(2, 6, 11))


# Which elements are outliers


@given(SEEDS, st.integers(1, 5), st.integers(1, 40), st.sampled_from([0.5, 1.0, 2.0, 6.0]), st.sampled_from(POLICIES))
def test_outlier_mask(seed: int, M: int, K: int, threshold: float, outliers: str) -> None:
    torch.manual_seed(seed)
    x = activations(M, K)
    assert outlier_mask(x, threshold, outliers).tolist() == spec_stands_out(x.tolist(), threshold, outliers)


def test_row_policy_at_the_threshold() -> None:
    """One value among zeros is sqrt(K) times the rms: K = 36 is equality at threshold 6, K = 35 is below it."""
    for value in (1.0, -3.0, 0.1, 3e38, 2.0**-149):
        row = torch.zeros(1, 36)
        row[0, 11] = value
        assert outlier_mask(row, 6.0, "row").nonzero().tolist() == [[0, 11]]
        assert not outlier_mask(row[:, :35], 6.0, "row").any()


def test_column_policy_at_the_threshold() -> None:
    below = math.nextafter(6.0, 0.0)
    row = torch.tensor([[6.0, -6.0, f32(below - 3e-7), -f32(below - 3e-7), 7.0]])
    assert row[0, 2] < 6
    assert outlier_mask(row, 6.0, "column").tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize("outliers", POLICIES)
def test_threshold_0_turns_the_split_off(outliers: str) -> None:
    assert not outlier_mask(torch.tensor([[0.0, 1.0, -3e38, 2.0**-149]]), 0.0, outliers).any()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("outliers", POLICIES)
def test_nan_and_inf_always_are_outliers(outliers: str, threshold: float) -> None:
    x = torch.tensor([[1.0, math.nan, 2.0, 0.0], [math.inf, 1.0, -math.inf, 0.0], [1.0, 1.0, 1.0, 0.0]])
    expected = [[False, True, False, False], [True, False, True, False], [False] * 4]
    assert outlier_mask(x, threshold, outliers).tolist() == expected


@pytest.mark.parametrize("outliers", POLICIES)
@pytest.mark.parametrize("threshold", [6.0, 1e-20, 1e-46, 1e-300])
def test_zero_never_is_an_outlier(outliers: str, threshold: float) -> None:
    """Neither in a zero row nor beside others, for any threshold: 1e-46 is 0 in float32, its square 0 in float64."""
    x = torch.tensor([[0.0, 0.0, -0.0], [0.0, 1.0, -0.0]])
    mask = outlier_mask(x, threshold, outliers)
    assert not mask[x == 0].any()
    assert mask[1, 1] == (threshold < 1)


@pytest.mark.parametrize("outliers", POLICIES)
@pytest.mark.parametrize("threshold", [1e39, 1e200, 1.7e308])
def test_no_element_reaches_a_huge_threshold(outliers: str, threshold: float) -> None:
    """Every finite threshold >= 0 is allowed, also one whose square is not finite."""
    x = torch.tensor([[0.0, 0.0], [1.0, 3e38], [-3e38, -3e38]])
    assert not outlier_mask(x, threshold, outliers).any()


@pytest.mark.parametrize("K", [1, 7, 997, 131071])
def test_squares_have_an_exact_sum_in_any_order(K: int) -> None:
    """What makes the row policy's decision independent of strides, batch, threads and kernels."""
    x = torch.randn(2, K) * torch.tensor([[1e-42], [1e38 / 6]])
    square = fixed_point_squares(x)
    exact = [float(sum(map(Fraction, row))) for row in square.tolist()]
    for _ in range(3):
        assert square[:, torch.randperm(K)].sum(dim=-1).tolist() == exact
    # Relative to the largest they are right to 2**-35 times four.
    largest = x.double().abs().amax(dim=-1, keepdim=True)
    error = square / square.amax(dim=-1, keepdim=True) - (x.double() / largest).square()
    assert error.abs().max() <= 2.0**-32


def test_rms_does_not_overflow() -> None:
    """3e38 squared is 9e76, and float32 ends at 3.4e38."""
    equal = torch.full((1, 100), 3e38)
    assert not outlier_mask(equal, 6.0, "row").any()
    alone = torch.full((1, 100), 3e37)
    alone[0, 5] = -3e38  # 10 times the others, and 7.1 times the rms
    assert outlier_mask(alone, 6.0, "row").nonzero().tolist() == [[0, 5]]
    tiny = torch.full((1, 100), 2.0**-140)
    tiny[0, 5] = 2.0**-135
    assert outlier_mask(tiny, 6.0, "row").nonzero().tolist() == [[0, 5]]


# Activations


@given(SEEDS, st.integers(1, 4), st.integers(1, 60), st.sampled_from([0.0, 2.0, 6.0]), st.sampled_from(POLICIES))
def test_quantize_rows(seed: int, M: int, K: int, threshold: float, outliers: str) -> None:
    torch.manual_seed(seed)
    x = activations(M, K, spread=10.0 ** (seed % 7 - 3))
    rows = quantize_rows(x, threshold, outliers)
    mask = spec_stands_out(x.tolist(), threshold, outliers)
    assert (rows.q.dtype, rows.scale.dtype, rows.outlier.dtype) == (torch.int8, torch.float32, torch.bool)
    assert rows.outlier.tolist() == mask
    for row, out, q, scale in zip(x.tolist(), mask, rows.q.tolist(), rows.scale.tolist(), strict=True):
        kept = [0.0 if is_out else value for value, is_out in zip(row, out, strict=True)]
        assert (q, scale) == spec_quantize(kept, max(map(abs, kept)))


def test_element_below_the_threshold_in_an_outlier_column_counts_for_the_statistic() -> None:
    """The row [2, -1, 5.5] of NUMERICS and FACTS: the 7 below 5.5 makes column 2 run in float for both rows.

    bitsandbytes stores 0 where we store 127: it zeroes the column, we subtract `scale * q` from x. Column 2 gives 5.5
    times its weight in both.
    """
    x = torch.tensor([[2.0, -1.0, 5.5], [0.5, 1.0, 7.0]])
    rows = quantize_rows(x, 6.0, "column")
    assert rows.scale.tolist() == [f32(5.5 / 127), f32(1 / 127)]
    assert rows.q.tolist() == [[46, -23, 127], [64, 127, 0]]
    assert rows.outlier.tolist() == [[False] * 3, [False, False, True]]
    picks_column_2 = torch.tensor([[0, 0, 127]], dtype=torch.int8)
    y = linear(x, picks_column_2, torch.tensor([1 / 127]), None, 6.0, "column")
    # The roundings of `spec_linear`, about terms of 5.5 * 127 / 127, with scale = 1/127 rounded itself.
    torch.testing.assert_close(y, torch.tensor([[5.5], [7.0]]), rtol=8 * U, atol=0)
    # bitsandbytes' q, zeroed column and float product, in the specification's own words.
    assert_matches_spec(x, *quantize_weight(torch.randn(4, 3)), None, 6.0, "column")


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


# What the outliers add


@pytest.mark.parametrize("threshold", [6.0, 1.0, 0.25])
def test_outlier_product_of_the_row_policy_is_exact(threshold: float) -> None:
    """The float32 nearest to the exact sum, whatever else is in the batch.

    With threshold t an outlier is at least t * rms, so all products are multiples of t * rms * 2**-24 at least, and
    their sum is at most 127 * K/t * rms: below 2**53 such units while K/t**2 < 2**22. Then float64 is exact in any
    order, for every K from t = 0.18 on.
    """
    K = 3000
    x = torch.randn(5, K) * torch.exp(2 * torch.randn(5, K))
    x[:, 1::2] = x[:, ::2] * -(1 + torch.rand(5, K // 2) * 1e-6)  # cancels, down to the last bits
    qweight = torch.randint(-127, 128, (4, K), dtype=torch.int8)
    qweight[:, 1::2] = qweight[:, ::2]
    rows = quantize_rows(x, threshold, "row")
    assert (rows.outlier.sum(1) > 4).all()
    batch = outlier_product(x, rows, qweight, "row")
    assert batch.dtype == torch.float32
    for m in range(5):
        one = QuantizedRows(rows.q[m : m + 1], rows.scale[m : m + 1], rows.outlier[m : m + 1])
        assert torch.equal(outlier_product(x[m : m + 1], one, qweight, "row")[0], batch[m])
        chosen = rows.outlier[m].nonzero().flatten().tolist()
        for n in range(4):
            exact = sum(Fraction(x[m, k].item()) * qweight[n, k].item() for k in chosen)
            assert Fraction(float(exact)) == exact
            assert batch[m, n].item() == f32(float(exact))


def test_outlier_product_without_outliers_is_zero() -> None:
    x = torch.randn(3, 8)
    for outliers in POLICIES:
        rows = quantize_rows(x, 0.0, outliers)
        assert not outlier_product(x, rows, torch.ones(5, 8, dtype=torch.int8), outliers).any()


# The whole operator


@settings(max_examples=150)
@given(
    SEEDS,
    st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 4)),
    st.sampled_from(DTYPES),
    st.sampled_from(POLICIES),
    st.sampled_from([0.0, 1.5, 6.0]),
    st.sampled_from([None, *DTYPES, torch.float64]),
)
def test_linear_is_the_specification(
    seed: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    outliers: str,
    threshold: float,
    bias_dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(seed)
    M, K, N = sizes
    x = activations(M, K, spread=2.0).to(dtype)
    bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
    assert_matches_spec(x, *quantize_weight(torch.randn(N, K)), bias, threshold, outliers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", POLICIES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_linear_of_a_longer_row(
    dtype: torch.dtype, outliers: str, threshold: float, bias_dtype: torch.dtype | None
) -> None:
    """K beyond one exact slice, with outliers of both policies."""
    x = activations(3, 1100, planted=5)
    x[1] *= 0.01  # all of it below a threshold of 6, and with an outlier of its own size
    x[1, 3] = 1.0
    bias = None if bias_dtype is None else torch.randn(2).to(bias_dtype)
    x = x.to(dtype)
    assert threshold == 0 or any(map(any, spec_stands_out(x.tolist(), threshold, outliers)))
    assert_matches_spec(x, *quantize_weight(torch.randn(2, 1100) / 30), bias, threshold, outliers)


@settings(max_examples=100)
@given(st.lists(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=6, max_size=6), min_size=1, max_size=3))
def test_linear_of_numbers_that_hypothesis_picks(x: Rows) -> None:
    """Zeros, subnormals, ties and equal magnitudes. At threshold 1 in six columns equality does happen."""
    qweight, scale = quantize_weight(torch.tensor([[1.0, -2.0, 0.5, 3.0, -0.25, 1.5], [0.0, 0.0, 1.0, 0.0, 0.0, -1.0]]))
    for outliers in POLICIES:
        for threshold in (0.0, 1.0, 2.0):
            assert_matches_spec(torch.tensor(x), qweight, scale, None, threshold, outliers)
