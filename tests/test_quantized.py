"""`quantize_rows` and `quantized_linear`, the definition of what the Triton kernels compute (tier 1)."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from int8compile import ops
from int8compile.errors import InputError
from int8compile.ops import OUTLIER_POLICIES, digits, quantize_weight, reference
from int8compile.ops.digits import MIN_EXPONENT, Activations

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
NAMES = ("planes", "info")


def in_two_steps(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
) -> Tensor:
    by_column = bool(OUTLIER_POLICIES.index(outliers))
    activations = ops.quantize_rows(x, threshold, by_column)
    return ops.quantized_linear(
        *activations, qweight, scale, bias, threshold, by_column, digits.NONE, 0, 0, torch.float32
    )


@given(st.integers(1, 9), st.integers(1, 300), DTYPES, st.sampled_from(["row", "column"]),
       st.sampled_from([0.0, 0.5, 3.0, 6.0]), st.integers(0, 2**31))  # fmt: skip
def test_two_steps_are_linear(m: int, k: int, dtype: torch.dtype, outliers: str, threshold: float, seed: int) -> None:
    """The only difference is the rounding of outliers to digits: half a unit for each, at most."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x = torch.where(torch.rand(m, k, generator=generator) < 0.05, 30 * x, x).to(dtype)
    qweight, scale = quantize_weight(torch.randn(7, k, generator=generator))
    bias = torch.randn(7, generator=generator)
    expected = reference.linear(x.float(), qweight, scale, bias, threshold, outliers)
    actual = in_two_steps(x, qweight, scale, bias, threshold, outliers)
    made = digits.quantize_rows(x, threshold, outliers)
    rounded = torch.zeros(m, 7, dtype=torch.float64)
    if threshold > 0:
        outlier = reference.quantize_rows(x.float(), threshold, outliers).outlier
        where = outlier.any(dim=0).expand_as(outlier) if outliers == "column" else outlier
        rounded = 0.5 * made.rows[digits.UNIT, :, None] * (where.double() @ qweight.abs().double().mT)
        exact = dtype == torch.bfloat16 and outliers == "row" and digits.fits_int32(k, threshold, 2)
        rounded *= not exact
    # Two float32 roundings may go the other way when what is rounded differs a little.
    slack = 4 * 2.0**-24 * (expected.abs() + bias.abs()) * (rounded > 0)
    assert bool(((actual - expected).abs() <= rounded * scale + slack).all())


@given(st.integers(1, 5), st.integers(1, 200), DTYPES, st.sampled_from(["row", "column"]), st.integers(0, 2**31))
def test_digits_stand_for_outliers(m: int, k: int, dtype: torch.dtype, outliers: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).pow(5).to(dtype)
    made = digits.quantize_rows(x, 3.0, outliers)
    rows = reference.quantize_rows(x.float(), 3.0, outliers)
    assert torch.equal(made.q, rows.q)
    assert torch.equal(made.rows[digits.SCALE], rows.scale)
    d = sum(plane.double() * 256**i for i, plane in enumerate(made.digits))
    unit = made.rows[digits.UNIT, :, None].double()
    assert bool((d.abs() <= 2.0 ** digits.bits(len(made.digits))).all())
    value = x.double() * rows.outlier
    if outliers == "column":
        value = (x.float() - rows.scale[:, None] * rows.q).double() * rows.outlier.any(dim=0)
    assert bool(((d * unit - value).abs() <= unit / 2).all())
    # The last digit of the largest element is in use: nothing is given away.
    largest = (x.float().abs() * rows.outlier).amax(dim=1)
    used = largest > 0
    assert bool((largest[used] >= unit[used, 0] * 2.0 ** (digits.bits(len(made.digits)) - 1)).all())


@pytest.mark.parametrize("k", [64, 4096, 36864])
def test_bfloat16_outliers_are_exact_where_int32_holds_their_sum(k: int) -> None:
    assert digits.fits_int32(k, 6.0, 2)
    assert not digits.fits_int32(k, 6.0, 3)
    assert not digits.fits_int32(36865, 6.0, 2)
    # The widest range that outliers of a row can have: one of sqrt(K) rms, others of 6.
    x = torch.zeros(1, k)
    x[0, 0] = math.sqrt(k) * 0.99
    x[0, 1 : 1 + k // 512] = 1.0 + 2.0**-7
    x[0, 1] = 6.0 + 2.0**-5
    x = x.to(torch.bfloat16)
    made = digits.quantize_rows(x, 6.0, "row")
    outlier = reference.quantize_rows(x.float(), 6.0, "row").outlier
    d = made.digits[0].double() + 256 * made.digits[1].double()
    assert torch.equal((d * made.rows[digits.UNIT, :, None])[outlier], x.double()[outlier])
    assert bool((d.abs().sum() * 127 < 2**31).all())


def test_tiny_outliers_are_rounded_to_the_least_unit() -> None:
    x = torch.zeros(1, 100)
    x[0, 3] = 2.0**-130
    made = digits.quantize_rows(x, 6.0, "row")
    assert made.rows[digits.UNIT, 0] == 2.0 ** (MIN_EXPONENT - 22)
    assert not made.digits.any()


@pytest.mark.parametrize("outliers", ["row", "column"])
@pytest.mark.parametrize(("values", "special"), [
    ({}, 0.0), ({1: math.inf}, 1.0), ({1: math.inf, 3: -math.inf}, 2.0), ({1: math.nan}, digits.HAS_NAN),
    ({1: math.inf, 2: math.nan}, digits.HAS_NAN),
])  # fmt: skip
def test_special_rows(values: dict[int, float], special: float, outliers: str) -> None:
    x = torch.randn(3, 40)
    for column, value in values.items():
        x[1, column] = value
    made = digits.quantize_rows(x, 6.0, outliers)
    assert made.rows[digits.SPECIAL].tolist() == [0.0, special, 0.0]
    qweight, scale = quantize_weight(torch.randn(30, 40))
    qweight[4] = 0
    expected = reference.linear(x, qweight, scale, None, 6.0, outliers)
    actual = in_two_steps(x, qweight, scale, None, 6.0, outliers)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[1].isposinf(), expected[1].isposinf())
    assert torch.equal(actual[1].isneginf(), expected[1].isneginf())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (8,), (2, 3, 8)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_shapes(shape: tuple[int, ...], threshold: float) -> None:
    x, k = torch.randn(shape), shape[-1]
    made = Activations(*ops.quantize_rows(x, threshold, False))
    m = math.prod(shape[:-1])
    assert made.q.shape == (m, k)
    assert made.digits.shape == (3 if threshold else 0, m, k)
    assert made.lists.shape == (digits.lists_of(m) if threshold else 0, 1 + k)
    y = ops.quantized_linear(
        *made, torch.ones(5, k, dtype=torch.int8), torch.ones(5), None, threshold, False, 0, 0, 0, x.dtype
    )
    assert y.shape == (m, 5)


def test_parts_lie_one_behind_the_other() -> None:
    x = torch.randn(6, 32)
    qweight, scale = quantize_weight(torch.randn(12, 32))
    made = ops.quantize_rows(x, 6.0, False)

    def call(n0: int, n1: int) -> Tensor:
        return ops.quantized_linear(*made, qweight, scale, None, 6.0, False, 0, n0, n1, torch.float32)

    whole = call(0, 0)
    assert torch.equal(call(5, 0), torch.cat([whole[:, :5].flatten(), whole[:, 5:].flatten()]))
    assert torch.equal(call(5, 3), torch.cat([part.flatten() for part in whole.split([5, 3, 4], dim=1)]))


@pytest.mark.parametrize("activation", range(len(digits.ACTIVATIONS)))
def test_activations_come_before_the_rounding(activation: int) -> None:
    x = torch.randn(6, 32)
    qweight, scale = quantize_weight(torch.randn(12, 32))
    made = ops.quantize_rows(x, 6.0, False)
    y = reference.linear(x, qweight, scale, None, 6.0, "row")
    expected = digits.ACTIVATIONS[activation](y).to(torch.bfloat16)
    actual = ops.quantized_linear(*made, qweight, scale, None, 6.0, False, activation, 0, 0, torch.bfloat16)
    assert actual.shape == (6, 6 if activation == digits.SILU_MUL else 12)
    # What digits round of float32 outliers may change the last place of bfloat16.
    assert bool(((actual - expected).float().abs() <= 2.0**-8 * expected.float().abs()).all())


@pytest.mark.parametrize(("change", "message"), [
    ({"qweight": torch.ones(5, 9, dtype=torch.int8)}, r"qweight is torch.int8 \[5, 9\] and planes \[4, 3, 8\]"),
    ({"qweight": torch.ones(5, 8)}, "qweight is torch.float32"),
    ({"scale": torch.ones(4)}, r"scale is torch.float32 \[4\]; give float32 \[5\]"),
    ({"bias": torch.ones(4)}, r"bias is torch.float32 \[4\]; give \[5\]"),
    ({"info": torch.zeros(12, dtype=torch.int32)}, r"info is torch.int32 \[12\]; give what quantize_rows made with"),
    ({"planes": torch.zeros(1, 3, 8, dtype=torch.int8)}, r"planes are torch.int8 \[1, 3, 8\]"),
    ({"planes": torch.zeros(4, 3, 8)}, "planes are torch.float32"),
    ({"scale": torch.ones(5, device="meta")}, "tensors are on cpu and meta"),
    ({"activation": 6}, "activation is 6"),
    ({"activation": digits.SILU_MUL}, "an even number of outputs"),
    ({"n0": 6}, "parts of 6 and 0 outputs of 5"),
    ({"n1": 2}, "parts of 0 and 2 outputs of 5"),
    ({"dtype": torch.int32}, "dtype is torch.int32"),
])  # fmt: skip
def test_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = dict(zip(NAMES, ops.quantize_rows(torch.randn(3, 8), 6.0, False), strict=True))
    arguments |= {"qweight": torch.ones(5, 8, dtype=torch.int8), "scale": torch.ones(5), "bias": None}
    arguments |= {"threshold": 6.0, "by_column": False, "activation": 0, "n0": 0, "n1": 0, "dtype": torch.float32}
    with pytest.raises(InputError, match=message):
        ops.quantized_linear(*(arguments | change).values())


@pytest.mark.parametrize(("x", "threshold", "message"), [
    (torch.ones(3, 8, dtype=torch.int32), 6.0, "x is torch.int32"),
    (torch.ones(()), 6.0, r"x is torch.float32 \[\]"),
    (torch.ones(1, 131072), 6.0, "K is 131072; at most 131071"),
    (torch.ones(3, 8), -1.0, "threshold is -1.0"),
    (torch.ones(3, 8), math.nan, "threshold is nan"),
])  # fmt: skip
def test_what_cannot_be_quantized(x: Tensor, threshold: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.quantize_rows(x, threshold, False)


def test_schemas() -> None:
    """Without strings and lists, so that C++ can call them."""
    assert str(ops.quantize_rows.default._schema) == (
        "int8compile::quantize_rows(Tensor x, float threshold, bool by_column) -> (Tensor planes, Tensor info)"
    )
    assert str(ops.quantized_linear.default._schema) == (
        "int8compile::quantized_linear(Tensor planes, Tensor info, Tensor qweight, Tensor scale, Tensor? bias, "
        "float threshold, bool by_column, int activation, int n0, int n1, ScalarType dtype) -> Tensor"
    )


@pytest.mark.parametrize("by_column", [False, True])
def test_operators_are_registered_properly(by_column: bool) -> None:
    x = torch.randn(3, 8)
    torch.library.opcheck(ops.quantize_rows.default, (x, 6.0, by_column))
    made = ops.quantize_rows(x, 6.0, by_column)
    weight = (torch.ones(6, 8, dtype=torch.int8), torch.ones(6), torch.ones(6))
    for how in ((digits.NONE, 2, 3), (digits.SILU_MUL, 0, 0)):
        torch.library.opcheck(ops.quantized_linear.default, (*made, *weight, 6.0, by_column, *how, torch.bfloat16))
