"""The operators as PyTorch sees them: registration, gradients, autocast, errors, and what a row may depend on."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import int8compile
from int8compile.ops import (
    MAX_K,
    OUTLIER_POLICIES,
    SUPPORTED_DTYPES,
    batched_linear,
    dequantize_weight,
    linear,
    quantize_weight,
    reference,
)
from tests.models import threads

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# One rounding of float32, relative.
U = 2.0**-24
SEEDS = st.integers(0, 2**31 - 1)
OPS = {"linear": linear, "batched_linear": batched_linear}
# Every operator of the library, with the function that defines it. An operator missing here fails
# `test_every_operator_is_complete`: add it with its tests.
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "int8compile::linear": reference.linear,
    "int8compile::batched_linear": reference.batched_linear,
}

every_dtype = pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
every_policy = pytest.mark.parametrize("outliers", OUTLIER_POLICIES)
every_op = pytest.mark.parametrize("name", OPS)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with some that stand far out: outliers in both policies."""
    x = torch.randn(shape)
    if x.numel():
        x.view(-1)[torch.randint(x.numel(), (1 + x.numel() // 64,))] *= 25
    return x.to(dtype)


def arguments(name: str, dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (4, 40, 6)) -> list[Any]:
    """x, qweight, scale, bias, threshold, outliers; two experts for batched_linear."""
    M, K, N = sizes
    batch = [2] if name == "batched_linear" else []
    qweight, scale = quantize_weight(torch.randn(*batch, N, K))
    return [activations(*batch, M, K, dtype=dtype), qweight, scale, torch.randn(*batch, N, dtype=dtype), 6.0, "row"]


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, the sign of zero included; any NaN equals any NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    a, b = (each.masked_fill(each.isnan(), 0).contiguous().view(bits) for each in (actual, expected))
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"


# Registration


def test_every_operator_is_complete() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("int8compile::")}
    assert names == set(REFERENCES)
    for name in names:
        for key in ("Meta", "Autograd", "AutocastCPU", "AutocastCUDA", "CompositeExplicitAutograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has nothing for {key}"


@pytest.mark.parametrize("name", REFERENCES)
def test_schema(name: str) -> None:
    """Compiled artifacts name the operator and its arguments: a change here breaks them."""
    op = getattr(torch.ops.int8compile, name.split("::")[1]).default
    assert str(op._schema) == (
        f"{name}(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, float threshold, str outliers) -> Tensor"
    )
    assert torch.Tag.pt2_compliant_tag in op.tags


@pytest.mark.parametrize("name", REFERENCES)
@every_dtype
@every_policy
def test_operator_is_its_reference(name: str, dtype: torch.dtype, outliers: str) -> None:
    """In eager mode on the CPU, and it leaves its arguments as they were."""
    args = [*arguments(name.split("::")[1], dtype)[:5], outliers]
    before = [each.clone() for each in args[:4]]
    y = getattr(torch.ops.int8compile, name.split("::")[1])(*args)
    assert_bitwise(y, REFERENCES[name](*args))
    assert all(torch.equal(each, was) for each, was in zip(args[:4], before, strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
}


@pytest.mark.parametrize(
    ("dtype", "outliers", "bias", "layout", "requires_grad"),
    [
        # Every value of each column at least twice, and the default configuration in every dtype.
        (torch.float32, "row", True, "contiguous", True),
        (torch.float16, "row", True, "contiguous", True),
        (torch.bfloat16, "row", True, "contiguous", True),
        (torch.float32, "column", False, "transposed", True),
        (torch.bfloat16, "column", True, "sliced", True),
        (torch.float16, "column", False, "expanded", False),
        (torch.float32, "row", False, "sliced", False),
        (torch.float32, "row", True, "expanded", True),
        (torch.bfloat16, "row", False, "transposed", False),
    ],
)
@every_op
def test_opcheck(name: str, dtype: torch.dtype, outliers: str, bias: bool, layout: str, requires_grad: bool) -> None:
    x, qweight, scale, bias_value, threshold, _ = arguments(name, dtype)
    x = LAYOUTS[layout](x).detach().requires_grad_(requires_grad)
    bias_value = bias_value.requires_grad_(requires_grad) if bias else None
    torch.library.opcheck(
        getattr(torch.ops.int8compile, name).default, (x, qweight, scale, bias_value, threshold, outliers)
    )


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 40), (2, 0, 3, 40)])
def test_opcheck_leading_dims(shape: tuple[int, ...]) -> None:
    _, *rest = arguments("linear")
    torch.library.opcheck(torch.ops.int8compile.linear.default, (activations(*shape).requires_grad_(), *rest))


@pytest.mark.parametrize("sizes", [(0, 2, 4, 3), (2, 0, 4, 3), (2, 3, 0, 3), (2, 3, 4, 0)])
def test_opcheck_of_empty_experts(sizes: tuple[int, int, int, int]) -> None:
    B, M, K, N = sizes
    qweight, scale = quantize_weight(torch.randn(B, N, K))
    args = (activations(B, M, K).requires_grad_(), qweight, scale, torch.randn(B, N), 6.0, "row")
    torch.library.opcheck(torch.ops.int8compile.batched_linear.default, args)


@every_op
def test_meta_device(name: str) -> None:
    args = arguments(name)
    y = OPS[name](*(each.to("meta") for each in args[:4]), *args[4:])
    assert y.device.type == "meta"
    assert y.shape == OPS[name](*args).shape


@every_op
def test_inference_mode(name: str) -> None:
    args = arguments(name)
    with torch.inference_mode():
        y = OPS[name](*args)
    assert y.is_inference()
    assert_bitwise(y.clone(), OPS[name](*args))


# The row policy: a row's result depends on that row alone


@settings(max_examples=50)
@given(
    SEEDS,
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 16, 37, 130, 1041, 2500]), st.integers(1, 9)),
    st.sampled_from(SUPPORTED_DTYPES),
    st.sampled_from([0.0, 1.0, 6.0]),
)
def test_row_does_not_depend_on_the_batch(
    seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    """Alone, as a 1-D input, in another order, beside other rows, and as part of any leading dimensions."""
    torch.manual_seed(seed)
    M, K, N = sizes
    x = activations(M, K, dtype=dtype)
    qweight, scale = quantize_weight(torch.randn(N, K))
    run = partial(linear, qweight=qweight, scale=scale, bias=torch.randn(N), threshold=threshold, outliers="row")
    y = run(x)
    m = seed % M
    assert_bitwise(run(x[m : m + 1]), y[m : m + 1])
    assert_bitwise(run(x[m]), y[m])
    order = torch.randperm(M)
    assert_bitwise(run(x[order]), y[order])
    assert_bitwise(run(x.repeat(5, 1))[:M], y)
    assert_bitwise(run(x.reshape(1, M, 1, K)), y.reshape(1, M, 1, N))
    assert_bitwise(run(x.expand(3, M, K)), y.expand(3, M, N))
    others = torch.arange(M) != m
    for value in (math.nan, math.inf, -math.inf, torch.finfo(dtype).max, 0.0, 1e-7):
        changed = x.clone()
        changed[others] = value
        assert_bitwise(run(changed)[m], y[m])
    changed = torch.where(others[:, None] & (torch.rand(M, K) < 0.2), math.nan, x)
    assert_bitwise(run(changed)[m], y[m])


@settings(max_examples=100)
@given(
    SEEDS,
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 37, 130, 1041]), st.integers(1, 9)),
    st.sampled_from(SUPPORTED_DTYPES),
    st.sampled_from(OUTLIER_POLICIES),
    st.sampled_from([1, 2, 3]),
)
def test_result_does_not_depend_on_strides_or_threads(
    seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, outliers: str, count: int
) -> None:
    """In the row policy bit by bit. In the column policy up to the order in which the residuals' product is summed."""
    torch.manual_seed(seed)
    M, K, N = sizes
    x = activations(M, K, dtype=dtype)
    qweight, scale = quantize_weight(torch.randn(N, K))
    bias = torch.randn(N)
    y = linear(x, qweight, scale, bias, 6.0, outliers)
    # With S = sum |x| |w|: a float64 sum in another order can move `out`, at most S, by one float32 ulp, 2U * S. It is
    # added to the int8 part, at most 2S (|s_x * q_x| <= 2 |x|), then come two operations on at most 3S + |bias|, and
    # each can round the other way: 2U * (1 + 3 + 3 + 3) * S. Last, the rounding to x's dtype can.
    size = x.double().abs() @ dequantize_weight(qweight, scale, torch.float64).abs().mT + bias.abs()
    info = torch.finfo(dtype)
    last = 0.0 if dtype == torch.float32 else y.double().abs() * info.eps + info.smallest_normal * info.eps
    slack = 20 * U * size + last
    for layout in ("contiguous", "transposed", "sliced"):
        view = LAYOUTS[layout](x)
        weight = LAYOUTS[layout](qweight)
        with threads(count):
            other = linear(view, weight, LAYOUTS["sliced"](scale), bias, 6.0, outliers)
        if outliers == "row":
            assert_bitwise(other, y)
        else:
            assert ((other.double() - y.double()).abs() <= slack).all()


def borderline(sums: list[Tensor], square: Tensor, K: int) -> list[float]:
    """Thresholds at which the last bit of `sum(x^2)` decides whether the largest element is an outlier."""
    thresholds = []
    for total in {float(each) for each in sums}:
        threshold = math.sqrt(float(square) * K / total)
        for direction in (0.0, math.inf):
            near = threshold
            for _ in range(3):
                thresholds.append(near)
                near = math.nextafter(near, direction)
    return thresholds


def test_borderline_outlier_does_not_depend_on_strides() -> None:
    """An element at the threshold is quantized or not: one way of summing squares must decide, whatever the layout."""
    K = 997
    qweight, scale = quantize_weight(torch.randn(3, K))
    found = 0
    for _ in range(40):
        x = torch.randn(4, K)
        view = LAYOUTS["transposed"](x)
        square = x.double().square()
        sums = torch.stack([square.sum(1), view.double().square().sum(1), square.flip(1).cumsum(1)[:, -1]])
        for m in range(4):
            if len(set(sums[:, m].tolist())) == 1:
                continue
            found += 1
            for threshold in borderline(list(sums[:, m]), square[m].max(), K):
                y = linear(x, qweight, scale, None, threshold, "row")
                assert_bitwise(linear(view, qweight, scale, None, threshold, "row"), y)
                assert_bitwise(linear(x[m], qweight, scale, None, threshold, "row"), y[m])
        if found >= 8:
            return
    assert found, "no row whose sum of squares depends on the order: the test shows nothing"


def test_borderline_outlier_does_not_depend_on_the_batch_or_on_threads() -> None:
    """A single long row is summed by all threads, the rows of a batch by one thread each."""
    K = 40_000  # PyTorch divides a sum among threads from 32768 elements on
    qweight, scale = quantize_weight(torch.randn(2, K))
    found = 0
    for _ in range(6):
        x = torch.randn(2, K)
        square = x.double().square()
        sums = [square.sum(1)[0], square[:1].sum(1)[0], square[0].cumsum(0)[-1]]
        found += len({float(each) for each in sums}) > 1
        for threshold in borderline(sums, square[0].max(), K):
            y = linear(x, qweight, scale, None, threshold, "row")[0]
            assert_bitwise(linear(x[0], qweight, scale, None, threshold, "row"), y)
            with threads(1):
                assert_bitwise(linear(x[0], qweight, scale, None, threshold, "row"), y)
        if found >= 2:
            return
    assert found, "no row whose sum of squares depends on the order: the test shows nothing"


@every_dtype
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 3, 7), (2, 1, 0, 7), (0, 7), (2, 2, 2, 2, 7)])
def test_leading_dims(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    qweight, scale = quantize_weight(torch.randn(5, 7))
    x = activations(*shape, dtype=dtype)
    y = linear(x, qweight, scale, None, 6.0, "row")
    assert y.shape == (*shape[:-1], 5)
    flat = [linear(row, qweight, scale, None, 6.0, "row") for row in x.reshape(math.prod(shape[:-1]), 7)]
    assert_bitwise(y, torch.stack(flat).reshape(y.shape) if flat else x.new_empty(y.shape))


@every_policy
@pytest.mark.parametrize(("M", "K", "N"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0), (1, 1, 1)])
def test_sizes_of_zero_and_one(outliers: str, M: int, K: int, N: int) -> None:
    qweight, scale = quantize_weight(torch.randn(N, K))
    bias = torch.randn(N)
    y = linear(activations(M, K), qweight, scale, bias, 6.0, outliers)
    assert y.shape == (M, N)
    if K == 0:
        assert_bitwise(y, bias.expand(M, N).contiguous())


def test_column_policy_depends_on_the_batch() -> None:
    """What LLM.int8() does and "row" avoids: one value in row 3 takes its column out of the int8 part of rows 0-2."""
    x = torch.randn(4, 16).clamp(-3, 3)
    qweight, scale = quantize_weight(torch.randn(8, 16))
    before, after = {}, {}
    for outliers in OUTLIER_POLICIES:
        before[outliers] = linear(x, qweight, scale, None, 6.0, outliers)
    x[3, 5] = 50.0
    for outliers in OUTLIER_POLICIES:
        after[outliers] = linear(x, qweight, scale, None, 6.0, outliers)
    assert (before["column"][:3] != after["column"][:3]).any(dim=1).all()
    assert_bitwise(after["row"][:3], before["row"][:3])
    # What moves is what quantizing column 5 had cost: half a step of x, and 127 * 3U of a step for the three roundings
    # of q, times the weight. The rest is the error of
    # evaluating both in float32, 7U (see tests/test_reference.py) of a size that is at most 3 sum |x| |w|.
    weight = dequantize_weight(qweight, scale, torch.float64).abs()
    half_step = x[:3].double().abs().amax(1, keepdim=True) / 254
    moved = (after["column"][:3].double() - before["column"][:3].double()).abs()
    assert (
        moved <= half_step * (1 + 127 * 6 * U) * weight[:, 5] + 2 * 7 * U * 3 * x[:3].double().abs() @ weight.T
    ).all()


# NaN, Inf, zero


@every_dtype
@every_policy
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nan_stays_in_its_row(dtype: torch.dtype, outliers: str, threshold: float) -> None:
    x = activations(5, 40, dtype=dtype)
    qweight, scale = quantize_weight(torch.randn(6, 40))
    qweight[:, 7] = torch.tensor([0, 1, -1, 0, 127, -127])
    bias = torch.randn(6)
    before = linear(x, qweight, scale, bias, threshold, outliers)
    x[2, 7] = math.nan
    y = linear(x, qweight, scale, bias, threshold, outliers)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    assert y[others].isfinite().all()
    if outliers == "row":
        assert_bitwise(y[others], before[others])


@every_dtype
@every_policy
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_inf_gives_what_float_gives(dtype: torch.dtype, outliers: str, threshold: float) -> None:
    """Plus or minus Inf by the sign of the int8 weight, NaN where it is 0 and where two Infs of other sign meet."""
    x = activations(6, 40, dtype=dtype)
    qweight, scale = quantize_weight(torch.randn(6, 40))
    qweight[:, 7] = torch.tensor([0, 1, -1, 3, 127, -127])
    qweight[:, 8] = torch.tensor([1, 1, 1, -3, 5, 0])
    qweight[5], scale[5] = 0, 0.0  # a zero row of the weight: 0 * Inf
    before = linear(x, qweight, scale, None, threshold, outliers)
    x[1, 7] = math.inf
    x[2, 7] = -math.inf
    x[4, 7], x[4, 8] = math.inf, -math.inf
    y = linear(x, qweight, scale, None, threshold, outliers)
    expected = x.double() @ dequantize_weight(qweight, scale, torch.float64).mT
    for m in (1, 2, 4):
        assert not expected[m].isfinite().any()
        assert_bitwise(y[m], expected[m].to(dtype))
    assert expected[1].isposinf().any()
    assert expected[1].isneginf().any()
    assert expected[1].isnan().any()
    others = [0, 3, 5]
    assert y[others].isfinite().all()
    if outliers == "row":
        assert_bitwise(y[others], before[others])


@every_dtype
@every_policy
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_zero_row_gives_the_bias(dtype: torch.dtype, outliers: str, bias_dtype: torch.dtype) -> None:
    x = activations(4, 40, dtype=dtype)
    x[1] = 0
    x[2] = -0.0
    x[3, 4] = math.inf
    bias = torch.randn(6).to(bias_dtype)
    y = linear(x, *quantize_weight(torch.randn(6, 40)), bias, 6.0, outliers)
    for m in (1, 2):
        assert_bitwise(y[m], bias.to(dtype))


def test_zero_row_without_bias_is_zero() -> None:
    y = linear(torch.zeros(2, 9), *quantize_weight(torch.randn(3, 9)), None, 6.0, "row")
    assert torch.equal(y, torch.zeros(2, 3))


@every_policy
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_float32_is_not_cut_to_the_range_of_float16(outliers: str, threshold: float, size: float) -> None:
    """A detour through float16 would turn 1e6 into Inf and 1e-9 into 0."""
    weight = torch.randn(6, 40, dtype=torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64) * size
    y = linear(x.float(), *quantize_weight(weight), None, threshold, outliers)
    # x and the weight are each off by half a step: the bound of tests/test_textbook.py, with its 1e-4.
    half_x, half_w = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1, keepdim=True) / 254
    bound = x.abs() @ half_w.expand(6, 40).T + half_x.expand(3, 40) @ weight.abs().T + 40 * half_x * half_w.T
    assert ((y - x @ weight.T).abs() <= bound * (1 + 1e-4)).all()


# Experts


@every_dtype
@every_policy
@pytest.mark.parametrize("bias", [True, False])
def test_batched_linear_is_linear_of_each_expert(dtype: torch.dtype, outliers: str, bias: bool) -> None:
    """In the column policy too an expert's columns are its own."""
    x = activations(3, 5, 40, dtype=dtype)
    qweight, scale = quantize_weight(torch.randn(3, 6, 40))
    bias_value = torch.randn(3, 6) if bias else None
    y = batched_linear(x, qweight, scale, bias_value, 6.0, outliers)
    assert y.is_contiguous()
    for b in range(3):
        each = None if bias_value is None else bias_value[b]
        assert_bitwise(y[b], linear(x[b], qweight[b], scale[b], each, 6.0, outliers))


@pytest.mark.parametrize("bias", [True, False])
def test_batched_linear_without_experts(bias: bool) -> None:
    qweight, scale = quantize_weight(torch.randn(0, 6, 40))
    y = batched_linear(torch.randn(0, 5, 40), qweight, scale, torch.randn(0, 6) if bias else None, 6.0, "row")
    assert y.shape == (0, 5, 6)


def test_batched_linear_of_any_strides() -> None:
    x, qweight, scale, bias, *rest = arguments("batched_linear")
    y = batched_linear(x, qweight, scale, bias, *rest)
    for change in (
        LAYOUTS["transposed"],
        LAYOUTS["sliced"],
        lambda each: each.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_bitwise(batched_linear(change(x), change(qweight), LAYOUTS["sliced"](scale), bias, *rest), y)


# Gradients


@pytest.mark.parametrize("shape", [(40,), (4, 40), (2, 3, 40), (0, 40)])
@every_dtype
@every_policy
def test_gradients_are_those_of_the_float_formula(dtype: torch.dtype, outliers: str, shape: tuple[int, ...]) -> None:
    """`grad_x = grad_y @ W` and `grad_bias = sum(grad_y)`, W the dequantized weight in x's dtype."""
    qweight, scale = quantize_weight(torch.randn(6, 40))
    weight = dequantize_weight(qweight, scale, dtype)
    x = activations(*shape, dtype=dtype).requires_grad_()
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    y = linear(x, qweight, scale, bias, 6.0, outliers)
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    float_x, float_bias = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), grad)
    assert_bitwise(grad_x, float_x)
    # Float sums the bias gradient in any order, this operator in float32 and rounds once. Both are off by at most
    # (rows - 1) float32 roundings of the sum of magnitudes, plus half an ulp of the dtype each.
    rows = math.prod(shape[:-1])
    size = grad.float().abs().reshape(rows, 6).sum(0)
    assert grad_bias.dtype == dtype
    assert ((grad_bias - float_bias).abs() <= size * (2 * rows * U + torch.finfo(dtype).eps)).all()


def test_gradients_of_float32_against_float64() -> None:
    x = activations(5, 40).requires_grad_()
    qweight, scale = quantize_weight(torch.randn(64, 40))
    bias = torch.randn(64, requires_grad=True)
    grad = torch.randn(5, 64)
    linear(x, qweight, scale, bias, 6.0, "row").backward(grad)
    weight = qweight.double() * scale.double()[:, None]
    # A sum of 64 products: 64 roundings of its size, one more for the dequantized weight.
    bound = 65 * U * (grad.double().abs() @ weight.abs())
    assert ((x.grad - grad.double() @ weight).abs() <= bound).all()
    assert ((bias.grad - grad.double().sum(0)).abs() <= 5 * U * grad.abs().sum(0)).all()


@every_dtype
def test_gradients_of_experts(dtype: torch.dtype) -> None:
    x, qweight, scale, bias, *rest = arguments("batched_linear", dtype)
    x.requires_grad_()
    bias.requires_grad_()
    y = batched_linear(x, qweight, scale, bias, *rest)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_bitwise(x.grad, torch.bmm(grad, dequantize_weight(qweight, scale, dtype)))
    for b in range(2):
        alone = bias[b].detach().requires_grad_()
        linear(x[b].detach(), qweight[b], scale[b], alone, *rest).backward(grad[b])
        assert_bitwise(bias.grad[b], alone.grad)


@every_op
def test_gradient_of_one_value_at_a_time(name: str) -> None:
    """The column of the Jacobian that `gradcheck` would probe, by formula: a step function has no slope."""
    x, qweight, scale, _, *rest = arguments(name, sizes=(2, 5, 3))
    jacobian = torch.autograd.functional.jacobian(lambda each: OPS[name](each, qweight, scale, None, *rest), x)
    weight = dequantize_weight(qweight, scale, torch.float32)
    expected = torch.zeros_like(jacobian)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).reshape(-1, x.dim() - 1).tolist():
        # Output n of a row depends on input k of the same row only.
        for n in range(3):
            expected[(*index, n, *index)] = weight[index[0]][n] if name == "batched_linear" else weight[n]
    assert torch.equal(jacobian, expected)


@every_op
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_of_the_bias_has_its_dtype(name: str, bias_dtype: torch.dtype) -> None:
    x, qweight, scale, bias, *rest = arguments(name, torch.float16)
    bias = bias.to(bias_dtype).requires_grad_()
    y = OPS[name](x, qweight, scale, bias, *rest)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is None
    assert bias.grad.dtype == bias_dtype
    # float16 values of this size: a sum of 4 has less than 24 bits, so float32 holds it exactly.
    assert torch.equal(bias.grad, grad.double().sum(-2).to(bias_dtype))


@every_op
def test_weight_and_scale_get_no_gradient(name: str) -> None:
    x, qweight, scale, bias, *rest = arguments(name)
    for each in (x, scale, bias):
        each.requires_grad_()
    OPS[name](x, qweight, scale, bias, *rest).sum().backward()
    assert scale.grad is None
    assert x.grad is not None
    assert bias.grad is not None
    assert not OPS[name](x.detach(), qweight, scale.detach(), bias.detach(), *rest).requires_grad


@every_op
def test_second_derivative(name: str) -> None:
    """grad_x is linear in grad_y, so a gradient penalty trains what comes after the layer."""
    x, qweight, scale, _, *rest = arguments(name)
    x.requires_grad_()
    y = OPS[name](x, qweight, scale, None, *rest)
    grad = torch.randn_like(y, requires_grad=True)
    (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (actual,) = torch.autograd.grad(grad_x, grad, torch.ones_like(grad_x))
    expected = dequantize_weight(qweight, scale, torch.float32).sum(-1)
    # A sum of 40 values, in any order.
    size = dequantize_weight(qweight, scale, torch.float32).abs().sum(-1)
    assert ((actual - expected[..., None, :]).abs() <= 80 * U * size[..., None, :]).all()


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_op
def test_autocast_casts_x_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """The scales stay float32: with bfloat16 scales the operator would refuse, and each weight would be 0.4 % off."""
    x, qweight, scale, bias, *rest = arguments(name)
    x.requires_grad_()
    bias.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = OPS[name](x, qweight, scale, bias, *rest)
        with torch.autocast("cpu", enabled=False):
            inner = OPS[name](x, qweight, scale, bias, *rest)
    assert y.dtype == dtype
    assert_bitwise(y, OPS[name](x.to(dtype), qweight, scale, bias, *rest))
    assert inner.dtype == torch.float32
    grad = torch.randn_like(y)
    y.backward(grad)
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    assert_bitwise(x.grad, (grad @ dequantize_weight(qweight, scale, dtype)).float())


@every_op
def test_autocast_when_compiled(name: str) -> None:
    """The cast is traced into the graph, forward and backward, and gives what eager mode gives."""
    args = arguments(name)
    x = args[0].requires_grad_()

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return OPS[name](x, *args[1:])

    y, compiled = step(x), torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert_bitwise(compiled, y)
    grad = torch.randn_like(y)
    assert_bitwise(torch.autograd.grad(compiled, x, grad)[0], torch.autograd.grad(y, x, grad)[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float64])
@every_op
def test_autocast_does_not_hide_a_wrong_dtype(name: str, dtype: torch.dtype) -> None:
    """Autocast of `F.linear` leaves integers and float64 alone, and so the operator still refuses them."""
    x, *rest = arguments(name)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(int8compile.InputError, match="x is torch"):
        OPS[name](x.to(dtype), *rest)


# Errors: (which argument, its replacement, what the message must say)


def _replace(index: int, change: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda args: [change(each) if i == index else each for i, each in enumerate(args)]


def _too_long(args: list[Any]) -> list[Any]:
    x, qweight, scale, *rest = args
    return [
        torch.zeros(*x.shape[:-1], MAX_K + 1),
        torch.zeros(*qweight.shape[:-1], MAX_K + 1, dtype=torch.int8),
        scale,
        *rest,
    ]


DTYPE_LIST = ["torch.float32", "torch.float16", "torch.bfloat16"]
BAD_CALLS: dict[str, tuple[Callable[[list[Any]], list[Any]], list[str]]] = {
    "integer x": (_replace(0, lambda x: x.long()), ["x is torch.int64", *DTYPE_LIST]),
    "float64 x": (_replace(0, lambda x: x.double()), ["x is torch.float64", *DTYPE_LIST]),
    "wrong K": (_replace(0, lambda x: x[..., :-1]), ["x is [", "39]", "qweight [", "40]", "K]"]),
    "float qweight": (_replace(1, lambda q: q.float()), ["qweight is torch.float32", "give int8"]),
    "uint8 qweight": (_replace(1, lambda q: q.to(torch.uint8)), ["qweight is torch.uint8", "give int8"]),
    "qweight of too many dimensions": (_replace(1, lambda q: q[None]), ["qweight is torch.int8 [1, ", "dimensions"]),
    "qweight of too few dimensions": (_replace(1, lambda q: q[0]), ["qweight is torch.int8 [", "dimensions"]),
    "float16 scale": (_replace(2, lambda s: s.half()), ["scale is torch.float16", "give float32 ["]),
    "scale with one more dimension": (_replace(2, lambda s: s[..., None]), ["scale is torch.float32 [", "6, 1]", "6]"]),
    "too few scales": (_replace(2, lambda s: s[..., :-1]), ["scale is torch.float32 [", "5]", "6]"]),
    "too few biases": (_replace(3, lambda b: b[..., :-1]), ["bias is torch.float32 [", "5]", "6]", "None"]),
    "scalar bias": (_replace(3, lambda b: b.sum()), ["bias is torch.float32 []", "6]", "None"]),
    "integer bias": (_replace(3, lambda b: b.long()), ["bias is torch.int64", "float dtype"]),
    "K beyond int32": (_too_long, ["K is 131072", "131071"]),
    "negative threshold": (_replace(4, lambda _: -1.0), ["threshold is -1.0", ">= 0"]),
    "NaN threshold": (_replace(4, lambda _: math.nan), ["threshold is nan", "finite"]),
    "infinite threshold": (_replace(4, lambda _: math.inf), ["threshold is inf", "finite"]),
    "unknown policy": (_replace(5, lambda _: "rows"), ["outliers is 'rows'", "'row'", "'column'"]),
}
BAD_CALLS_OF = {
    "linear": {"0-D x": (_replace(0, lambda x: x.sum()), ["x is []", "[..., K]", "[N, K]"])},
    "batched_linear": {
        "2-D x": (_replace(0, lambda x: x[0]), ["x is [4, 40]", "[B, M, K]", "[B, N, K]"]),
        "other number of experts": (_replace(0, lambda x: x[:1]), ["x is [1, 4, 40]", "qweight [2, 6, 40]"]),
    },
}
ALL_BAD_CALLS = [(name, case) for name in OPS for case in {**BAD_CALLS, **BAD_CALLS_OF[name]}]


@pytest.mark.parametrize("mode", ["eager", "fake", "meta"])
@pytest.mark.parametrize(("name", "case"), ALL_BAD_CALLS)
def test_input_error(name: str, case: str, mode: str) -> None:
    """The same message when the call runs and when it is traced."""
    change, says = {**BAD_CALLS, **BAD_CALLS_OF[name]}[case]
    args = change(arguments(name))
    with contextlib.ExitStack() as stack:
        if mode == "fake":
            fake = stack.enter_context(FakeTensorMode())
            args = [fake.from_tensor(each) if isinstance(each, Tensor) else each for each in args]
        elif mode == "meta":
            args = [each.to("meta") if isinstance(each, Tensor) else each for each in args]
        with pytest.raises(int8compile.InputError) as caught:
            OPS[name](*args)
    message = str(caught.value)
    assert message.startswith(f"int8compile::{name}: ")
    for words in says:
        assert words in message


def test_input_errors_name_only_what_exists() -> None:
    """What a message tells the user to call can be called."""
    paths = set()
    for name, case in ALL_BAD_CALLS:
        change, _ = {**BAD_CALLS, **BAD_CALLS_OF[name]}[case]
        with pytest.raises(int8compile.InputError) as caught:
            OPS[name](*change(arguments(name)))
        paths.update(re.findall(r"int8compile(?:\.\w+)+", str(caught.value)))
    for path in sorted(paths):
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"a message names {path}, which does not exist"


@every_op
def test_input_error_reaches_the_user_of_torch_compile(name: str) -> None:
    x, qweight, scale, *rest = arguments(name)
    compiled = torch.compile(lambda x: OPS[name](x, qweight, scale.half(), *rest), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=rf"int8compile::{name}: scale is torch\.float16"):
        compiled(x)


@every_op
def test_largest_k_is_allowed(name: str) -> None:
    """Equality: 131071 runs."""
    batch = [1] if name == "batched_linear" else []
    x = torch.zeros(*batch, 1, MAX_K)
    x[..., 0], x[..., -1] = 1.0, -1.0
    qweight, scale = quantize_weight(x.clone())
    # rms is sqrt(2 / K), so both elements are outliers and exact. Each weight is 127/127 with one rounding of 1/127.
    y = OPS[name](x, qweight, scale, None, 6.0, "row")
    torch.testing.assert_close(y, torch.full_like(y, 2.0), rtol=3 * U, atol=0)


def test_threshold_of_minus_zero_is_zero() -> None:
    """-0.0 is 0, not a negative number."""
    args = arguments("linear")
    assert_bitwise(linear(*args[:4], -0.0, "row"), linear(*args[:4], 0.0, "row"))


@given(SEEDS, st.sampled_from(OUTLIER_POLICIES), st.sampled_from([0.0, 6.0]))
def test_negating_x_negates_the_product(seed: int, outliers: str, threshold: float) -> None:
    """Symmetric quantization and half-to-even rounding: no sign is treated differently."""
    torch.manual_seed(seed)
    x, qweight, scale, *_ = arguments("linear")
    assume(x.abs().max() > 0)
    y = linear(x, qweight, scale, None, threshold, outliers)
    assert torch.equal(linear(-x, qweight, scale, None, threshold, outliers), -y)
    assert torch.equal(linear(x, -qweight, scale, None, threshold, outliers), -y)


@given(SEEDS, st.integers(-20, 20))
def test_row_policy_scales_with_x(seed: int, exponent: int) -> None:
    """A power of two changes nothing but the exponent: the row policy has no unit, unlike a threshold of 6.0."""
    torch.manual_seed(seed)
    x, qweight, scale, *_ = arguments("linear")
    y = linear(x, qweight, scale, None, 6.0, "row")
    assert_bitwise(linear(x * 2.0**exponent, qweight, scale, None, 6.0, "row"), y * 2.0**exponent)
