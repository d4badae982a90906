"""`int8compile.ops.reference` against NUMERICS, for weights, rotation and the integer product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from int8compile.ops import MAX_K, dequantize_weight
from int8compile.ops.reference import butterflies, int_matmul, quantize_weight, rotated, rotation_size, signs, unrotated
from tests.helpers.models import threads

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.numerics import DTYPES, SEEDS, SIZES, Row, U, f32, factors, spec_absmax, spec_hadamard, spec_size

FLOAT32_MAX = torch.finfo(torch.float32).max


def spec_rotated_weight(w: Row, d: Row) -> Row:
    """Return W', with its float additions in NUMERICS' order."""
    size, run = spec_size(len(w)), len(w) // spec_size(len(w))
    x, bit = [f32(a * f32(1 / b)) for a, b in zip(w, d, strict=True)], 1
    while bit < size:
        pairs = [(x[k], x[(k // run ^ bit) * run + k % run]) for k in range(len(x))]
        x = [f32(b - a) if k // run & bit else f32(a + b) for k, (a, b) in enumerate(pairs)]
        bit *= 2
    return [f32(value * (1 / size)) for value in x]


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
    """The bound is in real numbers, in any order of operations: 1/absmax, times 127, times W are rounded once each."""
    weight = torch.randn(50, 101) * torch.logspace(-30, 30, 50)[:, None]
    qweight, scale = quantize_weight(weight, None)
    exact = weight.double() * (127 / weight.double().abs().amax(1, keepdim=True))
    assert (qweight - exact).abs().max() <= 0.5 + 127 * 3 * U
    assert (qweight.abs().amax(1) == 127).all()
    torch.testing.assert_close(scale.double(), weight.double().abs().amax(1) / 127, rtol=U, atol=0)


def test_quantize_weight_rounds_half_to_even() -> None:
    """With absmax 127 each step is 1, so the ties are exact."""
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 125.5]
    qweight, scale = quantize_weight(torch.tensor([row]), None)
    assert qweight.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 126]]
    assert scale.tolist() == [1.0]


def test_quantize_weight_next_to_ties() -> None:
    """Next to ties the order of the float32 operations matters: 1/absmax, times 127, times W, as in bitsandbytes."""
    absmax = torch.rand(40) + 0.5
    ties = (torch.arange(127) + 0.5) * (absmax / 127)[:, None]
    weight = torch.cat([ties, -ties.nextafter(torch.tensor(0.0)), absmax[:, None]], dim=1)
    qweight, scale = quantize_weight(weight, None)
    for row, q, s in zip(weight.tolist(), qweight.tolist(), scale.tolist(), strict=True):
        assert (q, s) == spec_absmax(row, row[-1])


@given(SEEDS)
def test_quantize_weight_stays_within_127(seed: int) -> None:
    """Three roundings raise the largest element to at most 127 * (1 + 3U), which is 127, never 128."""
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
    """Each of B rotated weights adds at most half a step; the float additions make 2 * log2(B) + 4 roundings."""
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
    """A 32-bit hash, computed with Python's integers."""
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
    """Butterflies of integers are exact in any order; applying them twice multiplies by B."""
    size = spec_size(K)
    x = torch.randint(-(2**22), 2**22, (3, K), dtype=torch.int32)
    once = butterflies(x, size)
    assert once.tolist() == [spec_hadamard(row, size) for row in x.tolist()]
    assert torch.equal(butterflies(once, size), size * x)


@pytest.mark.parametrize("K", SIZES)
def test_rotated_and_unrotated_are_adjoint(K: int) -> None:
    """Gradients rely on (H(x * d)) . y = x . (d * H(y)), up to the roundings of both sides."""
    x, y, d = torch.randn(2, K), torch.randn(2, K), factors(K)
    left, right = (rotated(x, d).double() * y).sum(), (x.double() * unrotated(y, d)).sum()
    size = (rotated(x.abs(), d.abs()).abs().double() * y.abs()).sum() + (x.abs() * d.abs()).double().sum() * K
    assert (left - right).abs() <= 40 * U * size
    assert torch.equal(rotated(x, None), x)
    assert torch.equal(unrotated(x, None), x)


# The integer product


@st.composite
def int8_operands(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """K lies around the slice length 1040 and its multiples, where float32 would begin to round."""
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
        # The products differ, so that partial sums are odd numbers close to 2**24.
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
    """`quantize_weight` never gives -128, but an int8 weight from elsewhere may contain it, and no check refuses it.

    MAX_K allows for it (131071 * 128 * 128 is below 2**31), so the slices must be short enough too.
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
