"""The CPU kernel: every variant that this machine can run gives the definition's bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import int8compile
from int8compile import cpu
from int8compile.ops import MAX_K, pack_weight, reference
from int8compile.ops.reference import TINY
from tests.helpers.implementations import VARIANTS, every_implementation, every_variant, needs_kernel, operator, using
from tests.helpers.numerics import attacks
from tests.helpers.operators import U, assert_bitwise, every_dtype, every_rotation, factors

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers.kernel_inputs import (
    DTYPES,
    FINITE,
    ROTATIONS,
    SEEDS,
    SIZES,
    batch,
    both_products,
    rotation,
    run,
    weights,
)

pytestmark = needs_kernel

THRESHOLDS = (0.0, 1.0, 2.5, 6.0, 12.0, 1e30, 1e200)


def bias_of(kind: str, N: int) -> Tensor | None:
    return None if kind == "none" else torch.randn(N).to(getattr(torch, kind))


BIASES = st.sampled_from(["none", "float32", "float16", "bfloat16", "float64"])


def test_variants_of_this_machine() -> None:
    """x86-64 with AVX2 must have at least two variants, or the tests below compare too little."""
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert "portable" in VARIANTS
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in VARIANTS
    for variant in VARIANTS:
        with using(variant):
            assert cpu.variant() == variant


# The definition's bits


@every_variant
@settings(max_examples=200)
@given(SEEDS, SIZES, DTYPES, st.sampled_from(THRESHOLDS), BIASES, ROTATIONS)
def test_linear(
    by: str,
    seed: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    threshold: float,
    bias_kind: str,
    rotation_kind: str,
) -> None:
    torch.manual_seed(seed)
    M, K, N = sizes
    x, (qweight, scale), bias, d = batch(M, K, dtype), weights(N, K), bias_of(bias_kind, N), rotation(rotation_kind, K)
    y = run("packed_linear_no_grad", by, x, pack_weight(qweight), scale, d, bias, threshold)
    assert_bitwise(y, reference.linear(x, qweight, scale, d, bias, threshold))


@every_variant
@settings(max_examples=60)
@given(
    SEEDS,
    st.one_of(st.integers(1, 40), st.integers(41, 110)),
    st.sampled_from([64, 70, 300, 704, 768, 769, 1041]),
    st.integers(1, 70),
    st.sampled_from([("outliers",), ("outliers", "zeros", "normal"), ("one huge", "normal", "normal", "NaN")]),
    st.sampled_from([1.0, 3.0, 12.0]),
    DTYPES,
    ROTATIONS,
)
def test_many_rows_of_which_some_have_outliers(
    by: str,
    seed: int,
    M: int,
    K: int,
    N: int,
    kinds: tuple[str, ...],
    threshold: float,
    dtype: torch.dtype,
    rotation_kind: str,
) -> None:
    torch.manual_seed(seed)
    x, (qweight, scale), d = batch(M, K, dtype, kinds), weights(N, K), rotation(rotation_kind, K)
    y = run("packed_linear_no_grad", by, x, pack_weight(qweight), scale, d, None, threshold)
    assert_bitwise(y, reference.linear(x, qweight, scale, d, None, threshold))


@every_variant
@settings(max_examples=100)
@given(SEEDS, SIZES, DTYPES, BIASES, ROTATIONS)
def test_weight_only(
    by: str, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, bias_kind: str, rotation_kind: str
) -> None:
    torch.manual_seed(seed)
    M, K, N = sizes
    x, (qweight, scale), bias, d = batch(M, K, dtype), weights(N, K), bias_of(bias_kind, N), rotation(rotation_kind, K)
    y = run("packed_weight_only_linear_no_grad", by, x, pack_weight(qweight), scale, d, bias)
    assert_bitwise(y, reference.weight_only_linear(x, qweight, scale, d, bias))
    bad = ~x.float().isfinite().all(-1)
    assert y[bad].isnan().all()


@every_implementation
@settings(max_examples=50)
@given(SEEDS, SIZES, DTYPES, BIASES, st.booleans())
def test_weight_only_against_float64(
    by: str, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, bias_kind: str, rotated: bool
) -> None:
    torch.manual_seed(seed)
    M, K, N = sizes
    x, qweight, bias = batch(M, K, dtype, FINITE), weights(N, K)[0], bias_of(bias_kind, N)
    # The products stay far below the largest float16.
    scale, d = torch.rand(N) / (100 * (K + 1)), reference.signs(K) if rotated else None
    y = operator("weight_only_linear", by)(x, qweight, scale, d, bias)
    x_rotated = x.double() if d is None else reference.butterflies(x.double() * d, reference.rotation_size(K))
    expected = x_rotated @ qweight.double().mT * scale.double()
    added = 0.0 if bias is None else bias.float().double()
    # x is off by half a unit per element; a unit is at most 2**-21 of the row's largest, and B elements are added.
    # Three roundings to float32 follow (the sum, times the scale, plus the bias), and one to x's dtype.
    unit = x.double().abs().amax(-1, keepdim=True) * 2.0**-21 if K else torch.zeros(M, 1, dtype=torch.float64)
    slack = reference.rotation(d) * unit / 2 * (qweight.double().abs().sum(-1) * scale)
    slack = slack + 3 * U * (expected.abs() + slack + abs(added)) * (1 + 3 * U)
    info = torch.finfo(dtype)
    if dtype != torch.float32:
        slack = slack + ((expected + added).abs() + slack) * info.eps / 2 + info.smallest_normal * info.eps / 2
    assert ((y.double() - (expected + added)).abs() <= slack).all()


@every_variant
@every_dtype
@every_rotation
def test_every_k(by: str, dtype: torch.dtype, rotated: bool) -> None:
    """K covers the sizes around groups, vectors and padded rows, and runs of every length."""
    plain = [*range(1, 70), *range(120, 135), 191, 192, 193]
    runs = [size * run for size in (16, 32, 64, 128) for run in (*range(1, 20), 31, 32, 33)]
    for K in runs if rotated else plain:
        x, (qweight, scale), d = batch(2, K, dtype, ("outliers",)), weights(18, K), factors(K) if rotated else None
        packed = pack_weight(qweight)
        y = run("packed_linear_no_grad", by, x, packed, scale, d, None, 1.5)
        assert_bitwise(y, reference.linear(x, qweight, scale, d, None, 1.5))
        y = run("packed_weight_only_linear_no_grad", by, x, packed, scale, d, None)
        assert_bitwise(y, reference.weight_only_linear(x, qweight, scale, d, None))
        weight = torch.randn(3, K).to(dtype)
        actual, expected = operator("quantize_weight", by)(weight, d), reference.quantize_weight(weight, d)
        assert all(map(torch.equal, actual, expected))


@every_variant
def test_every_number_of_rows_and_place_among_them(by: str) -> None:
    """A row's bits depend neither on the number of rows nor on its place among them."""
    K, N = 144, 50
    x, (qweight, scale), bias, d = batch(300, K, torch.float32), weights(N, K), torch.randn(N), factors(K)
    packed = pack_weight(qweight)
    calls = both_products(x, qweight, scale, d, bias)
    for M in [*range(1, 71), 255, 256, 257]:
        for name, policy, expected in calls:
            for first in (0, M % 40 + 1):
                part = slice(first, first + M)
                assert_bitwise(run(name, by, x[part], packed, scale, d, bias, *policy), expected[part])


@every_variant
def test_every_number_of_outputs(by: str) -> None:
    """Panels of 16 outputs are taken by one, two or four; the last one is cut off."""
    K = 70
    qweight, scale = weights(140, K)
    bias, calls = torch.randn(140), {}
    for M in (1, 2, 5, 17, 40):
        x = batch(M, K, torch.bfloat16, ("outliers",))
        calls[M] = (
            x,
            reference.linear(x, qweight, scale, None, bias, 2.5),
            reference.weight_only_linear(x, qweight, scale, None, bias),
        )
    for N in [*range(1, 70), 95, 96, 97, 127, 128, 129, 140]:
        packed = pack_weight(qweight[:N])
        for x, linear, weight_only in calls.values():
            y = run("packed_linear_no_grad", by, x, packed, scale[:N], None, bias[:N], 2.5)
            assert_bitwise(y, linear[:, :N])
            y = run("packed_weight_only_linear_no_grad", by, x, packed, scale[:N], None, bias[:N])
            assert_bitwise(y, weight_only[:, :N])


@every_variant
@every_dtype
@every_rotation
def test_quantize_weight(by: str, dtype: torch.dtype, rotated: bool) -> None:
    """Rows of every kind and length give the definition's bits; NaN and Inf show in the scale."""
    for shape in ((0, 5), (4, 0), (5,), (3, 1), (17, 15), (9, 64), (2, 3, 144), (300, 1041), (40, 1152)):
        weight = batch(math.prod(shape[:-1]), shape[-1], dtype).view(shape)
        d = factors(shape[-1]) if rotated else None
        q, scale = operator("quantize_weight", by)(weight, d)
        expected_q, expected = reference.quantize_weight(weight, d)
        finite = expected.isfinite()
        assert rotated or torch.equal(finite, weight.isfinite().all(-1))
        assert torch.equal(scale.isfinite(), finite)
        assert torch.equal(scale[finite], expected[finite])
        assert torch.equal(q[finite], expected_q[finite])
    transposed, d = torch.randn(48, 70, dtype=dtype).T, factors(48) if rotated else None
    made = operator("quantize_weight", by)(transposed, d)
    assert all(map(torch.equal, made, reference.quantize_weight(transposed, d)))
    experts, each = torch.randn(2, 3, 5, 48, dtype=dtype), factors(2, 3, 48) if rotated else None
    made = operator("quantize_weight", by)(experts, each)
    assert all(map(torch.equal, made, reference.quantize_weight(experts, each)))


@every_implementation
def test_quantize_weight_refuses(by: str) -> None:
    for weight in (torch.ones(3, 4, dtype=torch.int8), torch.tensor(1.0), torch.ones(3, 4, dtype=torch.float64)):
        with pytest.raises((int8compile.InputError, RuntimeError), match="quantize_weight"):
            operator("quantize_weight", by)(weight, None)
    for d in (
        torch.ones(4, dtype=torch.float64),
        torch.ones(3),
        torch.ones(3, 4),
        torch.ones(2, 2, 4),
        torch.tensor(1.0),
    ):
        with pytest.raises((int8compile.InputError, RuntimeError), match="quantize_weight: d is"):
            operator("quantize_weight", by)(torch.ones(2, 3, 4), d)


@every_variant
def test_weight_that_is_not_packed(by: str) -> None:
    """The kernel packs in passing: rows of every length, cut-off panels, and more panels than it packs at a time."""
    sizes = [(N, K) for N in (1, 15, 16, 17, 50) for K in (1, 3, 4, 63, 64, 65, 127, 128, 130, 200)]
    for N, K in [*sizes, (200, 5000)]:
        (qweight, scale), bias = weights(N, K), torch.randn(N)
        packed = pack_weight(qweight)
        for M in (1, 3, 40):
            x = batch(M, K, torch.bfloat16, ("outliers",))
            for d in (None, factors(K)):
                y = run("linear_no_grad", by, x, qweight, scale, d, bias, 2.5)
                assert_bitwise(y, run("packed_linear_no_grad", by, x, packed, scale, d, bias, 2.5))
                y = run("weight_only_linear_no_grad", by, x, qweight, scale, d, bias)
                assert_bitwise(y, run("packed_weight_only_linear_no_grad", by, x, packed, scale, d, bias))


def test_many_rows() -> None:
    """There are more rows than are quantized at a time (8 MiB), and more than are multiplied at a time."""
    M, K, N = 1700, 5008, 20
    x, (qweight, scale) = batch(M, K, torch.bfloat16, ("normal", "outliers", "zeros", "huge")), weights(N, K)
    x[1690, 4321] = math.inf
    packed, d = pack_weight(qweight), factors(K)
    expected = reference.linear(x, qweight, scale, d, None, 6.0)
    weight_only = reference.weight_only_linear(x, qweight, scale, d, None)
    for by in VARIANTS:
        assert_bitwise(run("packed_linear_no_grad", by, x, packed, scale, d, None, 6.0), expected)
        assert_bitwise(run("packed_weight_only_linear_no_grad", by, x, packed, scale, d, None), weight_only)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_written_as_it_is(by: str, dtype: torch.dtype) -> None:
    """All 65536 values, each alone in its row, survive float32 and fixed point. A factor scales tiny values."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    ones = pack_weight(torch.ones(1, 1, dtype=torch.int8))
    for factor in (1.0, 2.0**40):
        y = run(
            "packed_weight_only_linear_no_grad",
            by,
            x,
            ones,
            torch.full((1,), 1 / factor),
            torch.full((1,), factor),
            None,
        )
        lost = (x.float() * factor).abs() < TINY
        expected = torch.where(lost, torch.zeros_like(x), x)
        overflows = (x.float() * factor).isinf()
        assert_bitwise(y, torch.where(overflows, math.nan, expected))


@every_variant
@every_dtype
def test_rounding_to_the_output(by: str, dtype: torch.dtype) -> None:
    """Products at and around ties, subnormal and overflowing results round as in PyTorch, half to even."""
    # acc = 127 * a + b takes every integer up to 2**14; x is (127, 1), whose scale is 1.
    a, b = torch.meshgrid(torch.arange(-128, 128), torch.arange(-63, 64), indexing="ij")
    qweight = torch.stack([a.flatten(), b.flatten()], dim=1).to(torch.int8)
    acc = (127 * a + b).flatten().float()
    x = torch.tensor([[127.0, 1.0]], dtype=dtype)
    packed = pack_weight(qweight)
    for exponent in (*range(-40, -8), -1, 0, 1, 2, 3, 4, 113, 114, 115, -126, -133, -134, -135, -149):
        scale = torch.full((len(acc),), 2.0**exponent)
        y = run("packed_linear_no_grad", by, x, packed, scale, None, None, 0.0)
        assert_bitwise(y[0], (acc * scale).to(dtype))


# Integer sums


def exact(x: Tensor, qweight: Tensor) -> Tensor:
    """Return the integer product, computed in int64."""
    return x.long() @ qweight.long().mT


@every_variant
@settings(max_examples=60)
@given(SEEDS, st.integers(1, 40), st.one_of(st.integers(1, 300), st.sampled_from([1024, 4099])), st.integers(1, 40))
@example(1, 1, MAX_K, 3)
@example(2, 5, MAX_K, 17)
def test_sums_are_exact(by: str, seed: int, M: int, K: int, N: int) -> None:
    """Extreme factors: partial sums with the weights' offset pass 2**31, and float32 holds the final sum exactly.

    Rows hold +-127, so their scale is 1 and y is the sum. Each second half of x cancels the first half, except for the
    last element and a few that are off by one.
    """
    torch.manual_seed(seed)
    half = K // 2
    x = torch.where(torch.rand(M, K) < (0.5 if seed % 2 else 0.001), -127, 127)
    qweight = torch.where(torch.rand(N, K) < 0.5, -128, 127)
    x[:, half : 2 * half] = -x[:, :half]
    qweight[:, half : 2 * half] = qweight[:, :half] ^ (torch.rand(N, half) < 0.01)
    expected = exact(x, qweight)
    assert (expected.abs() < 2**24).all()
    packed = pack_weight(qweight.to(torch.int8))
    for dtype in (torch.float32, torch.bfloat16):
        y = run("packed_linear_no_grad", by, x.to(dtype), packed, torch.ones(N), None, None, 0.0)
        assert_bitwise(y, expected.float().to(dtype))
        y = run("packed_weight_only_linear_no_grad", by, x.to(dtype), packed, torch.ones(N), None, None)
        assert_bitwise(y, expected.float().to(dtype))


@every_variant
@pytest.mark.parametrize("M", [1, 6, 40])
def test_largest_sums(by: str, M: int) -> None:
    """Sums just below 2**31 in magnitude, of both signs, also with activations of 23 bits."""
    K = MAX_K
    x = torch.ones(M, K)
    x[M // 2] = -1
    qweight = torch.tensor([[127], [-128], [-127], [1]], dtype=torch.int8).expand(4, K)
    packed = pack_weight(qweight)
    y = run("packed_linear_no_grad", by, x * 127, packed, torch.ones(4), None, None, 0.0)
    assert_bitwise(y, exact(x * 127, qweight).float())
    # In units of 2**-21: a value that rounds up to 2**22, and all digits at their largest and smallest.
    for value in (2 - 2.0**-23, 0x3F7F7F * 2.0**-21, 0x3F7F80 * 2.0**-21):
        y = run("packed_weight_only_linear_no_grad", by, x * value, packed, torch.ones(4), None, None)
        fixed = round(value * 2**21) * x.double()
        assert_bitwise(y, (fixed @ qweight.double().mT * 2.0**-21).float())


@every_variant
def test_ties_go_to_even(by: str) -> None:
    """Elements half way between two integers in units of the row's scale; 16-bit dtypes have many of them."""
    K = 255
    row = torch.cat([torch.tensor([127.0]), torch.arange(-126, 127) + 0.5, torch.tensor([-127.0])])
    identity = pack_weight(torch.eye(K, dtype=torch.int8))
    for dtype, size in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float32, 2.0**-60)):
        x = (row * size).to(dtype)[None]
        y = run("packed_linear_no_grad", by, x, identity, torch.ones(K), None, None, 0.0)
        assert_bitwise(y[0], reference.quantize_rows(x, None, 0.0).Q[0].to(dtype) * size)
        # Weight-only products keep the halves.
        y = run("packed_weight_only_linear_no_grad", by, x, identity, torch.ones(K), None, None)
        assert_bitwise(y[0], x[0])
    # A tie at the last of 23 bits: absmax is just below 2, so the unit is 2**-21.
    x = torch.tensor([[1.5, 2.0**-21 * 1.5, 2.0**-21 * 2.5, 2.0**-21 * 0.5, 2.0**-21 * -0.5]])
    assert reference.fixed_point(x, None)[1].item() == 2.0**-21
    ones = pack_weight(torch.eye(5, dtype=torch.int8))
    y = run("packed_weight_only_linear_no_grad", by, x, ones, torch.ones(5), None, None)
    assert y[0].tolist() == [1.5, 2.0**-20, 2.0**-20, 0.0, 0.0]


@every_variant
def test_digits_at_their_edges(by: str) -> None:
    """Values of Q around 127, 128, 255, 256 and the largest get the right second digit, or none."""
    edges = torch.tensor([126, 127, 128, 129, 254, 255, 256, 257, 383, 384, 385, 12345, 32639]).float()
    values = torch.cat([edges, -edges, torch.arange(-131, 132).float()])
    K, N = 8192, len(values)
    x = torch.ones(1, K)
    x[0, :N] = values
    # With this threshold the step is 1, so Q equals x.
    threshold = 127 * K / float(x.abs().sum())
    assert torch.equal(reference.quantize_rows(x, None, threshold).Q.float(), x)
    identity = torch.zeros(N, K, dtype=torch.int8)
    identity.fill_diagonal_(1)
    packed = pack_weight(identity)
    for rows in (x, x * 2.0**30, x.repeat(40, 1)):
        y = run("packed_linear_no_grad", by, rows, packed, torch.ones(N), None, None, threshold)
        assert_bitwise(y, reference.linear(rows, identity, torch.ones(N), None, None, threshold))


@every_variant
@pytest.mark.parametrize(("K", "rotated"), [(MAX_K, False), (131056, True), (130944, True)])
def test_the_sum_cannot_overflow(by: str, K: int, rotated: bool) -> None:
    """Rows that come closest to an overflow (tests.helpers.numerics), with the weights whose products are largest."""
    x, d = attacks(K), reference.signs(K) if rotated else None
    qweight = torch.where(reference.quantize_rows(x, d, 1.0).Q < 0, -128, 127).to(torch.int8)
    scale, packed = torch.ones(len(qweight)), pack_weight(qweight)
    for threshold in (1.0, 12.0):
        expected = reference.linear(x, qweight, scale, d, None, threshold)
        assert_bitwise(run("packed_linear_no_grad", by, x, packed, scale, d, None, threshold), expected)
    y = run("packed_weight_only_linear_no_grad", by, x, packed, scale, d, None)
    assert_bitwise(y, reference.weight_only_linear(x, qweight, scale, d, None))
