"""The CPU kernel: every variant that this machine runs gives the definition's bits, for any input and any threads."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8compile
from int8compile import cpu
from int8compile.exporting.aot import _CPU_OPERATORS
from int8compile.ops import MAX_K, SUPPORTED_DTYPES, c_parameters, pack_weight, packing, quantize_weight, reference
from int8compile.ops.reference import TINY
from tests.helpers.implementations import (
    VARIANTS,
    every_implementation,
    every_variant,
    needs_kernel,
    operator,
    profiled,
    using,
)
from tests.helpers.models import threads
from tests.ops.test_ops import LAYOUTS, OPS, U, assert_bitwise, every_dtype, every_rotation, factors
from tests.ops.test_reference import attacks

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = needs_kernel

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from(SUPPORTED_DTYPES)
THRESHOLDS = (0.0, 1.0, 2.5, 6.0, 12.0, 1e30, 1e200)


def rows(kind: str, K: int) -> Tensor:
    """A row of float32 values of one kind."""
    x = torch.randn(K)
    largest = torch.finfo(torch.float32).max
    return {
        "normal": lambda: x,
        "outliers": lambda: torch.where(torch.rand(K) < 0.02, x * 40, x),
        "outliers of few bits": lambda: torch.where(torch.rand(K) < 0.02, x * 40, x).bfloat16().float(),
        "outlier columns": lambda: torch.where((torch.arange(K) % 23 == 3) & (torch.rand(K) < 0.8), x * 40, x),
        "zeros": lambda: x * 0,
        "minus zeros": lambda: torch.full((K,), -0.0),
        "mostly zeros": lambda: torch.where(torch.rand(K) < 0.9, 0.0, x),
        "one element": lambda: x * (torch.arange(K) == K // 2),
        "one huge": lambda: torch.where(torch.arange(K) == K // 3, 1e4, x),
        "constant": lambda: torch.where(x < 0, -1.5, 1.5),
        "all equal": lambda: torch.full((K,), 0.7),
        "alternating": lambda: torch.where(torch.arange(K) % 2 == 0, 3.1, -3.1),
        "ties": lambda: torch.cat([torch.tensor([127.0]), (x * 40).round() + 0.5])[:K],
        "subnormal": lambda: x * 1e-40,
        # Above and below what counts as zero.
        "tiny": lambda: x / x.abs().amax().clamp(min=1e-3) * TINY if K else x,
        "huge": lambda: (x * largest / 3).clamp(-largest, largest),
        "all sizes": lambda: x * 2.0 ** torch.randint(-126, 120, (K,)),
        "few bits": lambda: x.mul(8).round() / 8,
        "NaN": lambda: torch.where(torch.rand(K) < 0.05, math.nan, x),
        "Inf": lambda: torch.where(torch.rand(K) < 0.05, math.inf, x),
        "both Infs": lambda: torch.where(torch.rand(K) < 0.1, x.sign() * math.inf, x),
    }[kind]()


KINDS = (
    "normal",
    "outliers",
    "outliers of few bits",
    "zeros",
    "minus zeros",
    "mostly zeros",
    "one element",
    "constant",
    "subnormal",
    "tiny",
)
KINDS += ("huge", "all sizes", "few bits", "NaN", "Inf", "both Infs", "one huge", "all equal", "alternating", "ties")
FINITE = ("normal", "outliers", "zeros", "mostly zeros", "one element", "constant", "few bits", "one huge", "ties")


def batch(M: int, K: int, dtype: torch.dtype, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """M rows of kinds chosen by torch's seed."""
    chosen = torch.randint(len(kinds), (M,)).tolist()
    x = torch.stack([rows(kinds[kind], K) for kind in chosen]) if M else torch.empty(0, K)
    return x.to(dtype)


def weights(N: int, K: int) -> tuple[Tensor, Tensor]:
    """int8 values and scales: -128 among the values; 0, a subnormal and a large one among the scales."""
    qweight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    scale = torch.rand(N)
    for value in (0.0, 1e-40, 1e30):
        scale = torch.where(torch.rand(N) < 0.05, value, scale)
    return qweight, scale


def bias_of(kind: str, N: int) -> Tensor | None:
    return None if kind == "none" else torch.randn(N).to(getattr(torch, kind))


BIASES = st.sampled_from(["none", "float32", "float16", "bfloat16", "float64"])
# What is not rotated, and all B with runs of 1 element to more than a vector's.
INPUTS = st.one_of(
    st.integers(0, 80),
    st.sampled_from([127, 129, 255, 257, 1041, 4999]),
    st.sampled_from([16, 48, 112, 32, 96, 64, 192, 576, 128, 256, 384, 640, 1024, 1152, 2048, 2176, 4096]),
)
SIZES = st.tuples(
    st.one_of(st.integers(0, 9), st.integers(10, 70)), INPUTS, st.one_of(st.integers(0, 20), st.integers(21, 100))
)
ROTATIONS = st.sampled_from(["none", "signs", "factors", "overflow"])


def rotation(kind: str, K: int) -> Tensor | None:
    """A d; the last kind makes Inf of large elements, and of rows of small ones that count as zero others."""
    return {
        "none": lambda: None,
        "signs": lambda: reference.signs(K),
        "factors": lambda: factors(K),
        "overflow": lambda: factors(K) * 1e25,
    }[kind]()


def run(name: str, by: str, *args: Any) -> Any:
    """Runs an operator so that what it does not write is NaN: it gets memory that was full of it."""
    x, _, scale, *_ = args
    size = (*x.shape[:-1], scale.shape[-1])
    for dirt in [torch.full(size, math.nan, dtype=x.dtype) for _ in range(2)]:
        del dirt
    return operator(name, by)(*args)


def test_variants_of_this_machine() -> None:
    """On x86-64 with AVX2 there are two at least, or the tests below compare little."""
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
    scale, d = torch.rand(N) / (100 * (K + 1)), reference.signs(K) if rotated else None  # far from the largest float16
    y = operator("weight_only_linear", by)(x, qweight, scale, d, bias)
    x_rotated = x.double() if d is None else reference.butterflies(x.double() * d, reference.rotation_size(K))
    expected = x_rotated @ qweight.double().mT * scale.double()
    added = 0.0 if bias is None else bias.float().double()
    # x is off by half a unit for each element, the unit at most 2**-21 of the row's largest, and B of them are added.
    # Then there are three roundings to float32: the sum, times the scale, plus the bias; and the one to x's dtype.
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
    """Each number of inputs around a group's, a vector's and a padded row's; and runs of each number of elements."""
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
    """A row's bits do not depend on how many there are, nor on where it stands."""
    K, N = 144, 50
    x, (qweight, scale), bias, d = batch(300, K, torch.float32), weights(N, K), torch.randn(N), factors(K)
    packed = pack_weight(qweight)
    calls: list[tuple[str, tuple[Any, ...], Tensor]] = [
        ("packed_linear_no_grad", (2.5,), reference.linear(x, qweight, scale, d, bias, 2.5)),
        ("packed_weight_only_linear_no_grad", (), reference.weight_only_linear(x, qweight, scale, d, bias)),
    ]
    for M in [*range(1, 71), 255, 256, 257]:
        for name, policy, expected in calls:
            for first in (0, M % 40 + 1):
                part = slice(first, first + M)
                assert_bitwise(run(name, by, x[part], packed, scale, d, bias, *policy), expected[part])


@every_variant
def test_every_number_of_outputs(by: str) -> None:
    """Panels of 16, taken by one, two or four, the last one cut off."""
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
    """The definition's bits, for rows of every kind and length; NaN and Inf leave a scale that tells."""
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
    """The kernel packs it as it goes: rows of every length, cut-off panels, and more panels than it packs at a time."""
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
    """More than are quantized at a time (8 MiB), and more than are multiplied at a time."""
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
    """All 65536 of them, alone in their rows, through float32 and fixed point and back. A factor scales tiny ones."""
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
    """Products at and around ties, subnormal and overflowing results: as PyTorch rounds, half to even."""
    # acc = 127 * a + b takes every integer up to 2**14: x is (127, 1), whose scale is 1.
    a, b = torch.meshgrid(torch.arange(-128, 128), torch.arange(-63, 64), indexing="ij")
    qweight = torch.stack([a.flatten(), b.flatten()], dim=1).to(torch.int8)
    acc = (127 * a + b).flatten().float()
    x = torch.tensor([[127.0, 1.0]], dtype=dtype)
    packed = pack_weight(qweight)
    for exponent in (*range(-40, -8), -1, 0, 1, 2, 3, 4, 113, 114, 115, -126, -133, -134, -135, -149):
        scale = torch.full((len(acc),), 2.0**exponent)
        y = run("packed_linear_no_grad", by, x, packed, scale, None, None, 0.0)
        assert_bitwise(y[0], (acc * scale).to(dtype))


# The integers


def exact(x: Tensor, qweight: Tensor) -> Tensor:
    """The integer product, in integers."""
    return x.long() @ qweight.long().mT


@every_variant
@settings(max_examples=60)
@given(SEEDS, st.integers(1, 40), st.one_of(st.integers(1, 300), st.sampled_from([1024, 4099])), st.integers(1, 40))
@example(1, 1, MAX_K, 3)
@example(2, 5, MAX_K, 17)
def test_sums_are_exact(by: str, seed: int, M: int, K: int, N: int) -> None:
    """Extreme factors, whose partial sums pass 2**31 with the weights' offset, and a sum small enough to be seen whole.

    Rows hold +-127, so their scale is 1 and y is the sum. Every other half of x takes back what the half before it
    gave, but for the last element and a few that are off by one.
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
    """2**31 less a little, of both signs; with 23 bits of activation too."""
    K = MAX_K
    x = torch.ones(M, K)
    x[M // 2] = -1
    qweight = torch.tensor([[127], [-128], [-127], [1]], dtype=torch.int8).expand(4, K)
    packed = pack_weight(qweight)
    y = run("packed_linear_no_grad", by, x * 127, packed, torch.ones(4), None, None, 0.0)
    assert_bitwise(y, exact(x * 127, qweight).float())
    # In units of 2**-21: what rounds up to 2**22, all digits as large as they get, and as small.
    for value in (2 - 2.0**-23, 0x3F7F7F * 2.0**-21, 0x3F7F80 * 2.0**-21):
        y = run("packed_weight_only_linear_no_grad", by, x * value, packed, torch.ones(4), None, None)
        fixed = round(value * 2**21) * x.double()
        assert_bitwise(y, (fixed @ qweight.double().mT * 2.0**-21).float())


@every_variant
def test_ties_go_to_even(by: str) -> None:
    """Elements half way between two integers, of which there are many in 16 bit, in units of the row's scale."""
    K = 255
    row = torch.cat([torch.tensor([127.0]), torch.arange(-126, 127) + 0.5, torch.tensor([-127.0])])
    identity = pack_weight(torch.eye(K, dtype=torch.int8))
    for dtype, size in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float32, 2.0**-60)):
        x = (row * size).to(dtype)[None]
        y = run("packed_linear_no_grad", by, x, identity, torch.ones(K), None, None, 0.0)
        assert_bitwise(y[0], reference.quantize_rows(x, None, 0.0).Q[0].to(dtype) * size)
        # Weight-only keeps the halves.
        y = run("packed_weight_only_linear_no_grad", by, x, identity, torch.ones(K), None, None)
        assert_bitwise(y[0], x[0])
    # At the last bit of 23: absmax just below 2, so the unit is 2**-21.
    x = torch.tensor([[1.5, 2.0**-21 * 1.5, 2.0**-21 * 2.5, 2.0**-21 * 0.5, 2.0**-21 * -0.5]])
    assert reference.fixed_point(x, None)[1].item() == 2.0**-21
    ones = pack_weight(torch.eye(5, dtype=torch.int8))
    y = run("packed_weight_only_linear_no_grad", by, x, ones, torch.ones(5), None, None)
    assert y[0].tolist() == [1.5, 2.0**-20, 2.0**-20, 0.0, 0.0]


@every_variant
def test_digits_at_their_edges(by: str) -> None:
    """Q of every value around 127, 128, 255, 256 and the largest: which elements have a second digit, and which."""
    edges = torch.tensor([126, 127, 128, 129, 254, 255, 256, 257, 383, 384, 385, 12345, 32639]).float()
    values = torch.cat([edges, -edges, torch.arange(-131, 132).float()])
    K, N = 8192, len(values)
    x = torch.ones(1, K)
    x[0, :N] = values
    # The threshold that makes the step 1, so that Q is x.
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
    """The rows that come closest to it (tests/ops/test_reference.py), by weights that make the most of them."""
    x, d = attacks(K), reference.signs(K) if rotated else None
    qweight = torch.where(reference.quantize_rows(x, d, 1.0).Q < 0, -128, 127).to(torch.int8)
    scale, packed = torch.ones(len(qweight)), pack_weight(qweight)
    for threshold in (1.0, 12.0):
        expected = reference.linear(x, qweight, scale, d, None, threshold)
        assert_bitwise(run("packed_linear_no_grad", by, x, packed, scale, d, None, threshold), expected)
    y = run("packed_weight_only_linear_no_grad", by, x, packed, scale, d, None)
    assert_bitwise(y, reference.weight_only_linear(x, qweight, scale, d, None))


# Several weights at once


@every_variant
@settings(max_examples=60)
@given(SEEDS, SIZES, DTYPES, st.tuples(st.integers(0, 70), st.integers(0, 40)), st.booleans(), ROTATIONS)
def test_pair_and_triple_are_single_calls(
    by: str,
    seed: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    others: tuple[int, int],
    has_bias: bool,
    rotation_kind: str,
) -> None:
    torch.manual_seed(seed)
    M, K, N = sizes
    x, d = batch(M, K, dtype), rotation(rotation_kind, K)
    for name, outputs in (("pair", (others[0], N)), ("triple", (*others, N))):
        parts = [weights(n, K) for n in outputs]
        biases = [torch.randn(n, dtype=dtype) if has_bias else None for n in outputs]
        results = operator(f"packed_linear_{name}_no_grad", by)(
            x,
            torch.cat([pack_weight(qweight) for qweight, _ in parts]),
            torch.cat([scale for _, scale in parts]),
            d,
            torch.cat(biases) if has_bias else None,
            *outputs[:-1],
            2.5,
        )
        for y, (qweight, scale), bias in zip(results, parts, biases, strict=True):
            single = run("packed_linear_no_grad", by, x, pack_weight(qweight), scale, d, bias, 2.5)
            assert_bitwise(y, single)
            assert y.is_contiguous()
        starts = [y.untyped_storage().data_ptr() for y in results if y.numel()]
        assert len(set(starts)) == len(starts)  # No result keeps another one's memory alive.


@every_variant
def test_experts_are_single_calls(by: str) -> None:
    for dtype, d in itertools.product(SUPPORTED_DTYPES, (None, factors(80), factors(3, 80))):
        x, parts = batch(3 * 7, 80, dtype).view(3, 7, 80), [weights(20, 80) for _ in range(3)]
        qweight, scale = (torch.stack(each) for each in zip(*parts, strict=True))
        bias = torch.randn(3, 20)
        y = operator("packed_batched_linear", by)(x, pack_weight(qweight), scale, d, bias, 2.5)
        for b in range(3):
            its_d = reference.of_each(d, b)
            one = operator("packed_linear", by)(x[b], pack_weight(qweight[b]), scale[b], its_d, bias[b], 2.5)
            assert_bitwise(y[b], one)


# Layouts, threads, modes


@settings(max_examples=30)
@given(SEEDS, st.integers(0, 2), st.integers(0, 600), st.integers(0, 600))
def test_pack_weight_is_its_definition(seed: int, B: int, N: int, K: int) -> None:
    """Large enough for several threads; tests/ops/test_ops.py has the formula."""
    torch.manual_seed(seed)
    qweight = torch.randint(-128, 128, (B, N, K) if B else (N, K), dtype=torch.int8)
    with threads(1 + seed % 3):
        assert torch.equal(pack_weight(qweight), packing.pack_weight(qweight))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "every other row": lambda x: torch.cat([x, x], -1).reshape(*x.shape[:-1], 2, x.shape[-1])[..., 0, :],
    "offset": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "negated lazily": lambda x: torch._neg_view(-x),
}


@every_variant
@every_dtype
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(by: str, dtype: torch.dtype, layout: str) -> None:
    x, (qweight, scale), bias = batch(9, 80, dtype, FINITE), weights(40, 80), torch.randn(40, dtype=dtype)
    x = STRIDES[layout](x)
    packed = pack_weight(STRIDES["transposed"](qweight))
    # Of scales, d and biases too.
    scale, d, bias = STRIDES["sliced"](scale), STRIDES["sliced"](factors(80)), STRIDES["offset"](bias)
    plain = (x.contiguous(), qweight, scale.contiguous(), d.contiguous(), bias.contiguous())
    expected = reference.linear(*plain, 2.5)
    assert_bitwise(operator("packed_linear_no_grad", by)(x, packed, scale, d, bias, 2.5), expected)
    y = operator("packed_weight_only_linear_no_grad", by)(x, packed, scale, d, bias)
    assert_bitwise(y, reference.weight_only_linear(*plain))
    y = operator("linear", by)(x, STRIDES["transposed"](qweight), scale, d, bias, 2.5)
    assert_bitwise(y, expected)
    # 4-D, its middle dimensions swapped.
    many = x.expand(2, 3, 9, 80).transpose(1, 2)
    y = operator("packed_linear_no_grad", by)(many, packed, scale, d, bias, 2.5)
    assert_bitwise(y, reference.linear(many.contiguous(), *plain[1:], 2.5))


def test_a_packed_weight_that_is_not_contiguous_is_refused() -> None:
    x, packed = torch.randn(3, 128), pack_weight(torch.ones(32, 128, dtype=torch.int8))
    for view in (packed.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([packed, packed], -1)[..., 0]):
        assert view.shape == packed.shape
        with pytest.raises(RuntimeError, match=r"packed_linear: packed .* not contiguous"):
            torch.ops.int8compile.packed_linear_no_grad(x, view, torch.ones(32), None, None, 6.0)


@every_variant
@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 2048, 300), (3, 900, 1000), (70, 500, 130), (600, 300, 20), (33, 4096, 5)]
)
def test_threads_change_nothing(by: str, M: int, K: int, N: int) -> None:
    """Sizes that are divided by outputs, by rows, or both; and not divided at all."""
    x, (qweight, scale), bias = batch(M, K, torch.float32), weights(N, K), torch.randn(N)
    packed, d = pack_weight(qweight), factors(K)
    calls: list[tuple[str, tuple[Any, ...], Tensor]] = [
        ("packed_linear_no_grad", (2.5,), reference.linear(x, qweight, scale, d, bias, 2.5)),
        ("packed_weight_only_linear_no_grad", (), reference.weight_only_linear(x, qweight, scale, d, bias)),
    ]
    for name, policy, wanted in calls:
        for count in (1, 2, 3, 7):
            with threads(count):
                assert_bitwise(run(name, by, x, packed, scale, d, bias, *policy), wanted)


def _shapes() -> list[tuple[Any, ...]]:
    """Calls of many shapes with what each must give."""
    found = []
    for i in range(50):
        M, K, N = 1 + i * 7 % 40, (1 + i * 37 % 700) * (1 if i % 2 else 16), 1 + i * 13 % 150
        x, (qweight, scale) = batch(M, K, SUPPORTED_DTYPES[i % 3]), weights(N, K)
        packed, d = pack_weight(qweight), factors(K)
        if i % 4 == 3:
            call: tuple[Any, ...] = ("packed_weight_only_linear_no_grad", x, packed, scale, d, None)
            expected = reference.weight_only_linear(x, qweight, scale, d, None)
        else:
            call = ("packed_linear_no_grad", x, packed, scale, d, None, 2.5)
            expected = reference.linear(x, qweight, scale, d, None, 2.5)
        found.append((call, expected))
    return found


def test_several_python_threads_at_once() -> None:
    """Eight threads, 50 calls each in orders of their own, while a ninth changes the variant again and again."""
    shapes, done, start = _shapes(), threading.Event(), threading.Barrier(9)
    before = cpu.variant()

    def call(worker: int) -> int:
        start.wait()
        wrong = 0
        for i in range(50):
            (name, *args), expected = shapes[(i * 7 + worker * 11) % 50]
            y = getattr(torch.ops.int8compile, name)(*args)
            wrong += not torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
        return wrong

    def change() -> int:
        start.wait()
        for changes in itertools.count():
            cpu.use_variant(VARIANTS[changes % len(VARIANTS)])
            if done.wait(1e-4):
                return changes
        return 0

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        changer = pool.submit(change)
        try:
            assert sum(pool.map(call, range(8))) == 0
        finally:
            done.set()
        assert changer.result() > len(VARIANTS)
    cpu.use_variant(before)


def test_torch_says_how_many_threads() -> None:
    """In a fresh process: one thread makes none, three make two more, which PyTorch's own loops use as well."""
    program = """
import os, torch
import int8compile
from int8compile import cpu, ops
assert cpu.available()
x, packed, scale = torch.randn(64, 4096), ops.pack_weight(torch.ones(4096, 4096, dtype=torch.int8)), torch.ones(4096)
def count():
    return len(os.listdir("/proc/self/task"))
def call():
    ops.packed_linear_no_grad(x, packed, scale, None, None, 6.0)
    return count()
torch.set_num_threads(1)
before = count()
assert call() == before, (call(), before)
torch.set_num_threads(3)
assert call() == before + 2, (call(), before)
torch.randn(10**6).sin_()
assert count() == before + 2, (count(), before)
torch.set_num_threads(1)
assert call() <= before + 2
"""
    if sys.platform != "linux":
        pytest.skip("counts threads through /proc")
    # pack_weight runs before the threads are counted, with one: the pool must not be there yet.
    subprocess.run(
        [sys.executable, "-c", program.replace("import os, torch", "import os, torch; torch.set_num_threads(1)")],
        check=True,
        timeout=120,
    )


def test_the_library_brings_no_thread_pool_of_its_own() -> None:
    library = cpu.load()
    assert library is not None
    if not shutil.which("readelf"):
        pytest.skip("no readelf here")
    listed = subprocess.run(["readelf", "-d", str(library.path)], check=True, capture_output=True, text=True).stdout
    needed = [line.rsplit("[", 1)[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert not [name for name in needed if "omp" in name or "tbb" in name]


@every_variant
def test_inference_mode(by: str) -> None:
    """Tensors made inside, and those from outside; results can be used on either side."""
    d = factors(80)
    qweight, scale = quantize_weight(torch.randn(40, 80), d)
    outside = torch.randn(5, 80)
    with torch.inference_mode():
        x, packed, bias = outside * 1, pack_weight(qweight), torch.randn(40, dtype=torch.float16)
        assert packed.is_inference()
        y = operator("packed_linear_no_grad", by)(x, packed, scale, d, bias, 6.0)
        assert_bitwise(y, reference.linear(x, qweight, scale, d, bias, 6.0))
    assert y.is_inference()
    assert_bitwise(operator("packed_linear_no_grad", by)(outside, packed, scale, d, bias, 6.0), y.clone())


# The path taken


def test_the_dispatcher_has_the_kernel_for_every_operator() -> None:
    for name in {*OPS, "pack_weight", "quantize_weight"} - {"column_linear"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"int8compile::{name}", "CPU")


# What the definition multiplies with, whichever way it gets there.
FLOAT_PRODUCTS = {"aten::mm", "aten::matmul", "aten::bmm", "aten::addmm", "mkldnn::_linear_pointwise", "aten::linear"}


@every_variant
def test_the_operator_runs_in_the_kernel(by: str) -> None:
    d = factors(80)
    qweight, scale = quantize_weight(torch.randn(40, 80), d)
    packed, x = pack_weight(qweight), torch.randn(5, 80)
    with using(by):
        names = profiled(lambda: torch.ops.int8compile.packed_linear(x, packed, scale, d, None, 6.0))
    assert names["int8compile::packed_linear"] == 1
    assert not FLOAT_PRODUCTS & set(names)
    names = profiled(lambda: operator("packed_linear", "definition")(x, packed, scale, d, None, 6.0))
    assert FLOAT_PRODUCTS & set(names), "the profiler shows no product: the test shows nothing"


def test_c_functions_of_packages_follow_from_the_schemas() -> None:
    """AOTInductor calls them by what `c_parameters` says; package.cpp defines them by hand."""
    source = (cpu.build.EXPORTED / "package.cpp").read_text()
    macro = re.search(r"#define WEIGHT\(weight\) (.*)", source)
    assert macro
    found = {}
    for name, parameters in re.findall(r"AOTITorchError aoti_torch_cpu_(\w+)\((.*?)\) \{", source, re.DOTALL):
        weight = re.match(r"WEIGHT\((\w+)\)", parameters)
        assert weight
        written = macro[1].replace(" weight,", f" {weight[1]},") + parameters[weight.end() :]
        found[name] = re.sub(r"\s+", " ", written)
    assert found == {op._opname: c_parameters(op) for op in _CPU_OPERATORS}


@pytest.mark.parametrize(
    ("grad", "expected"),
    [
        (False, {"int8compile::packed_linear_no_grad": 1, "int8compile::packed_weight_only_linear_no_grad": 1}),
        (True, {"int8compile::packed_linear": 1, "int8compile::packed_weight_only_linear": 1}),
    ],
)
def test_a_compiled_model_runs_in_the_kernel(grad: bool, expected: dict[str, int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lm_head = nn.Linear(32, 48), nn.Linear(48, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(torch.relu(self.inner(x)))

    model, x = Model().requires_grad_(False), torch.randn(5, 32, requires_grad=grad)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"lm_head": "int8_weight"})
    compiled(x)
    names = profiled(lambda: compiled(x))
    assert {name: count for name, count in names.items() if name.startswith("int8compile::")} == expected
    assert not FLOAT_PRODUCTS & set(names)
