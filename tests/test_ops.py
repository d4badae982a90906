"""The operators as PyTorch sees them: registration, gradients, autocast, errors, and what a row may depend on."""

from __future__ import annotations

import contextlib
import dataclasses
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
    linear_no_grad,
    packed_batched_linear,
    packed_linear,
    packed_linear_no_grad,
    packed_linear_pair_no_grad,
    packed_linear_triple_no_grad,
    packed_weight_only_linear,
    packed_weight_only_linear_no_grad,
    packing,
    quantize_weight,
    reference,
    unpack_weight,
    weight_only_linear,
    weight_only_linear_no_grad,
)
from tests.implementations import DEFINITION, VARIANTS, every_implementation, needs_kernel, operator
from tests.models import threads

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# One rounding of float32, relative.
U = 2.0**-24
SEEDS = st.integers(0, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of the library.

    Attributes:
        reference: The function that defines it, over the operator's arguments.
        arguments: The schema, without the name.
    """

    reference: Callable[..., Any]
    arguments: str


def unpacked(define: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference over a packed weight."""

    def run(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *policy: Any) -> Tensor:
        return define(x, unpack_weight(packed, scale.shape[-1], x.shape[-1]), scale, bias, *policy)

    return run


def with_flag(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, by_column: bool
) -> Tensor:
    """`linear`, the policy given as a flag."""
    return reference.linear(x, qweight, scale, bias, threshold, "column" if by_column else "row")


def each(count: int) -> Callable[..., tuple[Tensor, ...]]:
    """`linear` of one x and several packed weights, one after the other."""

    def run(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        sizes = [*rest[: count - 1], scale.shape[0] - sum(rest[: count - 1])]
        biases = [None] * count if bias is None else bias.split(sizes)
        panels = packed.split([-(-size // 16) for size in sizes])
        parts = zip(panels, scale.split(sizes), biases, strict=True)
        return tuple(unpacked(with_flag)(x, *part, *rest[count - 1 :]) for part in parts)

    return run


FLOATS = "(Tensor x, Tensor {}, Tensor scale, Tensor? bias{}) -> Tensor"
POLICY, FLAG = ", float threshold, str outliers", ", float threshold, bool by_column"
# Every operator of the library. One missing here fails `test_every_operator_is_complete`: add it with its tests.
OPERATORS: dict[str, Operator] = {
    "linear": Operator(reference.linear, FLOATS.format("qweight", POLICY)),
    "batched_linear": Operator(reference.batched_linear, FLOATS.format("qweight", POLICY)),
    "weight_only_linear": Operator(reference.weight_only_linear, FLOATS.format("qweight", "")),
    "quantize_weight": Operator(reference.quantize_weight, "(Tensor weight) -> (Tensor, Tensor)"),
    "pack_weight": Operator(packing.pack_weight, "(Tensor qweight) -> Tensor"),
    "packed_linear": Operator(unpacked(reference.linear), FLOATS.format("packed", POLICY)),
    "packed_batched_linear": Operator(unpacked(reference.batched_linear), FLOATS.format("packed", POLICY)),
    "packed_weight_only_linear": Operator(unpacked(reference.weight_only_linear), FLOATS.format("packed", "")),
    "linear_no_grad": Operator(with_flag, FLOATS.format("qweight", FLAG)),
    "weight_only_linear_no_grad": Operator(reference.weight_only_linear, FLOATS.format("qweight", "")),
    "packed_linear_no_grad": Operator(unpacked(with_flag), FLOATS.format("packed", FLAG)),
    "packed_linear_pair_no_grad": Operator(
        each(2), FLOATS.format("packed", ", int n0" + FLAG).replace("-> Tensor", "-> (Tensor, Tensor)")
    ),
    "packed_linear_triple_no_grad": Operator(
        each(3), FLOATS.format("packed", ", int n0, int n1" + FLAG).replace("-> Tensor", "-> (Tensor, Tensor, Tensor)")
    ),
    "packed_weight_only_linear_no_grad": Operator(unpacked(reference.weight_only_linear), FLOATS.format("packed", "")),
}
# Those that take x, those that have gradients, those whose result is one tensor.
OPS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "batched_linear": batched_linear,
    "weight_only_linear": weight_only_linear,
    "packed_linear": packed_linear,
    "packed_batched_linear": packed_batched_linear,
    "packed_weight_only_linear": packed_weight_only_linear,
    "linear_no_grad": linear_no_grad,
    "weight_only_linear_no_grad": weight_only_linear_no_grad,
    "packed_linear_no_grad": packed_linear_no_grad,
    "packed_linear_pair_no_grad": packed_linear_pair_no_grad,
    "packed_linear_triple_no_grad": packed_linear_triple_no_grad,
    "packed_weight_only_linear_no_grad": packed_weight_only_linear_no_grad,
}
# Those that take a weight alone.
WEIGHTS = ("quantize_weight", "pack_weight")
DIFFERENTIABLE = [name for name in OPS if not name.endswith("no_grad")]

every_dtype = pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
every_policy = pytest.mark.parametrize("outliers", OUTLIER_POLICIES)
every_op = pytest.mark.parametrize("name", OPS)
every_differentiable_op = pytest.mark.parametrize("name", DIFFERENTIABLE)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with some that stand far out: outliers in both policies."""
    x = torch.randn(shape)
    if x.numel():
        x.view(-1)[torch.randint(x.numel(), (1 + x.numel() // 64,))] *= 25
    return x.to(dtype)


def arguments(
    name: str, dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (4, 40, 6), outliers: str = "row"
) -> list[Any]:
    """x, weight, scale, bias, and what else the operator takes; two experts for the batched ones."""
    M, K, N = sizes
    batch = [2] if "batched" in name else []
    several = 3 if "triple" in name else 2 if "pair" in name else 1
    # Outputs of the first ones: not multiples of a panel's.
    split = [N + 13, N + 1][: several - 1]
    weights = [quantize_weight(torch.randn(*batch, outputs, K)) for outputs in [*split, N]]
    scale = torch.cat([scale for _, scale in weights], -1)
    packed = [packing.pack_weight(qweight) for qweight, _ in weights]
    weight = torch.cat(packed) if several > 1 else packed[0] if "packed" in name else weights[0][0]
    x, bias = activations(*batch, M, K, dtype=dtype), torch.randn(scale.shape, dtype=dtype)
    policy = [] if "weight_only" in name else [6.0, outliers == "column" if name.endswith("no_grad") else outliers]
    return [x, weight, scale, bias, *split, *policy]


def float_weight(name: str, args: list[Any], dtype: torch.dtype) -> Tensor:
    """The [..., N, K] weight that an operator's int8 weight stands for."""
    x, weight, scale, *_ = args
    qweight = unpack_weight(weight, scale.shape[-1], x.shape[-1]) if "packed" in name else weight
    return dequantize_weight(qweight, scale, dtype)


def strided(name: str, weight: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """A weight in another layout; packed ones have only one."""
    return weight if "packed" in name else layout(weight)


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An operator's results as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


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
    # test_quantized.py is about the first two, test_modules.py about the others.
    others = ("quantize_rows", "quantized_linear", "grouped_linear", "grouped_linear_backward")
    others = {f"int8compile::{name}" for name in others}
    # A composite of PyTorch's operators; test_module_weight.py is about it.
    names.remove("int8compile::module_weight")
    assert names == {f"int8compile::{name}" for name in OPERATORS} | others
    assert set(OPERATORS) == {*OPS, *WEIGHTS}
    for name in names:
        keys = ["Meta", "CompositeExplicitAutograd"]
        # Weights need no gradient, nor are they cast. A backward pass is outside of autocast.
        if name.removeprefix("int8compile::") not in (*WEIGHTS, "grouped_linear_backward"):
            keys += ["Autograd", "AutocastCPU", "AutocastCUDA"]
        for key in [*keys, "CPU"] if VARIANTS and name not in others else keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has nothing for {key}"


@pytest.mark.parametrize("name", OPERATORS)
def test_schema(name: str) -> None:
    """Compiled artifacts name the operator and its arguments: a change here breaks them."""
    op = getattr(torch.ops.int8compile, name).default
    assert str(op._schema) == f"int8compile::{name}{OPERATORS[name].arguments}"
    assert torch.Tag.pt2_compliant_tag in op.tags


@every_op
@every_dtype
@every_policy
@every_implementation
def test_operator_is_its_reference(name: str, dtype: torch.dtype, outliers: str, by: str) -> None:
    """In eager mode on the CPU, and it leaves its arguments as they were.

    One outlier column: its product is exact in float64, and so is equal in the column policy too.
    """
    args = arguments(name, dtype, outliers=outliers)
    args[0] = args[0].clamp(-5, 5)
    args[0].view(-1, 40)[1, 7] = 30
    before = [each.clone() for each in args[:4]]
    results = tensors(operator(name, by)(*args))
    for y, expected in zip(results, tensors(OPERATORS[name].reference(*args)), strict=True):
        assert_bitwise(y, expected)
        assert y.is_contiguous()
    assert all(torch.equal(each, was) for each, was in zip(args[:4], before, strict=True))


@every_implementation
@pytest.mark.parametrize(
    "shape", [(6, 40), (16, 64), (17, 65), (1, 1), (33, 300), (0, 5), (5, 0), (2, 3, 7), (2, 0, 3, 7)]
)
def test_pack_weight(shape: tuple[int, ...], by: str) -> None:
    """By the formula of `packing`, padded with what stands for 0, from any strides; and there is a way back."""
    qweight = torch.randint(-128, 128, shape, dtype=torch.int8)
    *batch, N, K = shape
    panels, groups = -(-N // 16), -(-K // 64) * 16
    expected = torch.full((*batch, panels, groups, 16, 4), 128, dtype=torch.uint8)
    for n in range(N):
        for k in range(K):
            expected[..., n // 16, k // 4, n % 16, k % 4] = (qweight[..., n, k].int() + 128).to(torch.uint8)
    for layout in ("contiguous", "transposed", "sliced"):
        packed = operator("pack_weight", by)(LAYOUTS[layout](qweight))
        assert packed.dtype == torch.uint8
        assert packed.is_contiguous()
        assert torch.equal(packed, expected)
    assert torch.equal(unpack_weight(expected, N, K), qweight)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
}


OPCHECKS = [
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
]


@pytest.mark.parametrize(
    ("name", "dtype", "outliers", "bias", "layout", "requires_grad"),
    # All of them where the code of all operators is run, and for the others those that differ most.
    [
        (name, *check)
        for name in OPS
        for check in (OPCHECKS if name in ("linear", "batched_linear", "packed_linear_no_grad") else OPCHECKS[2:5])
    ],
)
def test_opcheck(name: str, dtype: torch.dtype, outliers: str, bias: bool, layout: str, requires_grad: bool) -> None:
    x, weight, scale, bias_value, *rest = arguments(name, dtype, outliers=outliers)
    requires_grad = requires_grad and name in DIFFERENTIABLE
    x = LAYOUTS[layout](x).detach().requires_grad_(requires_grad)
    bias_value = bias_value.requires_grad_(requires_grad) if bias else None
    torch.library.opcheck(getattr(torch.ops.int8compile, name).default, (x, weight, scale, bias_value, *rest))


@pytest.mark.parametrize("name", ["linear", "packed_linear_pair_no_grad", "packed_weight_only_linear"])
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 40), (2, 0, 3, 40)])
def test_opcheck_leading_dims(name: str, shape: tuple[int, ...]) -> None:
    _, *rest = arguments(name)
    x = activations(*shape).requires_grad_(name in DIFFERENTIABLE)
    torch.library.opcheck(getattr(torch.ops.int8compile, name).default, (x, *rest))


@pytest.mark.parametrize("name", ["batched_linear", "packed_batched_linear"])
@pytest.mark.parametrize("sizes", [(0, 2, 4, 3), (2, 0, 4, 3), (2, 3, 0, 3), (2, 3, 4, 0)])
def test_opcheck_of_empty_experts(name: str, sizes: tuple[int, int, int, int]) -> None:
    B, M, K, N = sizes
    qweight, scale = quantize_weight(torch.randn(B, N, K))
    weight = packing.pack_weight(qweight) if "packed" in name else qweight
    args = (activations(B, M, K).requires_grad_(), weight, scale, torch.randn(B, N), 6.0, "row")
    torch.library.opcheck(getattr(torch.ops.int8compile, name).default, args)


@pytest.mark.parametrize("shape", [(6, 40), (3, 17, 65), (0, 5), (5, 0)])
def test_opcheck_of_packing(shape: tuple[int, ...]) -> None:
    qweight = torch.randint(-128, 128, shape, dtype=torch.int8)
    torch.library.opcheck(torch.ops.int8compile.pack_weight.default, (qweight,))


@every_op
def test_meta_device(name: str) -> None:
    args = arguments(name)
    results = tensors(OPS[name](*(each.to("meta") if isinstance(each, Tensor) else each for each in args)))
    for y, expected in zip(results, tensors(OPS[name](*args)), strict=True):
        assert y.device.type == "meta"
        assert y.shape == expected.shape


@every_op
def test_inference_mode(name: str) -> None:
    args = arguments(name)
    with torch.inference_mode():
        results = tensors(OPS[name](*args))
    for y, expected in zip(results, tensors(OPS[name](*args)), strict=True):
        assert y.is_inference()
        assert_bitwise(y.clone(), expected)


@every_op
def test_operators_without_gradients_record_none(name: str) -> None:
    """What `no_grad` in a name means: autograd does not see the call at all."""
    args = arguments(name)
    args[0].requires_grad_()
    assert all(y.requires_grad is (name in DIFFERENTIABLE) for y in tensors(OPS[name](*args)))


# The row policy: a row's result depends on that row alone


@settings(max_examples=50)
@given(
    SEEDS,
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 16, 37, 130, 1041, 2500]), st.integers(1, 9)),
    st.sampled_from(SUPPORTED_DTYPES),
    st.sampled_from([0.0, 1.0, 6.0]),
)
@every_implementation
def test_row_does_not_depend_on_the_batch(
    by: str, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    """Alone, as a 1-D input, in another order, beside other rows, and as part of any leading dimensions."""
    linear = operator("linear", by)
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
@every_implementation
def test_result_does_not_depend_on_strides_or_threads(
    by: str, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, outliers: str, count: int
) -> None:
    """In the row policy bit by bit. In the column policy up to the order in which the residuals' product is summed."""
    linear = operator("linear", by)
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


@every_implementation
def test_borderline_outlier_does_not_depend_on_strides(by: str) -> None:
    """An element at the threshold is quantized or not: one way of summing squares must decide, whatever the layout."""
    linear = operator("linear", by)
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


@every_implementation
def test_borderline_outlier_does_not_depend_on_the_batch_or_on_threads(by: str) -> None:
    """A single long row is summed by all threads, the rows of a batch by one thread each."""
    linear = operator("linear", by)
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
@every_implementation
def test_leading_dims(dtype: torch.dtype, shape: tuple[int, ...], by: str) -> None:
    linear = operator("linear", by)
    qweight, scale = quantize_weight(torch.randn(5, 7))
    x = activations(*shape, dtype=dtype)
    y = linear(x, qweight, scale, None, 6.0, "row")
    assert y.shape == (*shape[:-1], 5)
    flat = [linear(row, qweight, scale, None, 6.0, "row") for row in x.reshape(math.prod(shape[:-1]), 7)]
    assert_bitwise(y, torch.stack(flat).reshape(y.shape) if flat else x.new_empty(y.shape))


@every_policy
@pytest.mark.parametrize(("M", "K", "N"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0), (1, 1, 1)])
@every_implementation
def test_sizes_of_zero_and_one(outliers: str, M: int, K: int, N: int, by: str) -> None:
    linear = operator("linear", by)
    qweight, scale = quantize_weight(torch.randn(N, K))
    bias = torch.randn(N)
    y = linear(activations(M, K), qweight, scale, bias, 6.0, outliers)
    assert y.shape == (M, N)
    if K == 0:
        assert_bitwise(y, bias.expand(M, N).contiguous())


@every_implementation
def test_column_policy_depends_on_the_batch(by: str) -> None:
    """What LLM.int8() does and "row" avoids: one value in row 3 takes its column out of the int8 part of rows 0-2."""
    linear = operator("linear", by)
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
@every_implementation
def test_nan_stays_in_its_row(dtype: torch.dtype, outliers: str, threshold: float, by: str) -> None:
    linear = operator("linear", by)
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
@every_implementation
def test_inf_gives_what_float_gives(dtype: torch.dtype, outliers: str, threshold: float, by: str) -> None:
    """Plus or minus Inf by the sign of the int8 weight, NaN where it is 0 and where two Infs of other sign meet."""
    linear = operator("linear", by)
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
@every_implementation
def test_zero_row_gives_the_bias(dtype: torch.dtype, outliers: str, bias_dtype: torch.dtype, by: str) -> None:
    linear = operator("linear", by)
    x = activations(4, 40, dtype=dtype)
    x[1] = 0
    x[2] = -0.0
    x[3, 4] = math.inf
    bias = torch.randn(6).to(bias_dtype)
    y = linear(x, *quantize_weight(torch.randn(6, 40)), bias, 6.0, outliers)
    for m in (1, 2):
        assert_bitwise(y[m], bias.to(dtype))


@every_implementation
def test_zero_row_without_bias_is_zero(by: str) -> None:
    linear = operator("linear", by)
    y = linear(torch.zeros(2, 9), *quantize_weight(torch.randn(3, 9)), None, 6.0, "row")
    assert torch.equal(y, torch.zeros(2, 3))


@every_policy
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("size", [1e-9, 1e6])
@every_implementation
def test_float32_is_not_cut_to_the_range_of_float16(outliers: str, threshold: float, size: float, by: str) -> None:
    """A detour through float16 would turn 1e6 into Inf and 1e-9 into 0."""
    linear = operator("linear", by)
    weight = torch.randn(6, 40, dtype=torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64) * size
    y = linear(x.float(), *reference.quantize_weight(weight), None, threshold, outliers)
    # x and the weight are each off by half a step: the bound of tests/test_textbook.py, with its 1e-4.
    half_x, half_w = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1, keepdim=True) / 254
    bound = x.abs() @ half_w.expand(6, 40).T + half_x.expand(3, 40) @ weight.abs().T + 40 * half_x * half_w.T
    assert ((y - x @ weight.T).abs() <= bound * (1 + 1e-4)).all()


# Experts


@every_dtype
@every_policy
@pytest.mark.parametrize("bias", [True, False])
@every_implementation
def test_batched_linear_is_linear_of_each_expert(dtype: torch.dtype, outliers: str, bias: bool, by: str) -> None:
    """In the column policy too an expert's columns are its own."""
    batched_linear = operator("batched_linear", by)
    linear = operator("linear", by)
    x = activations(3, 5, 40, dtype=dtype)
    qweight, scale = quantize_weight(torch.randn(3, 6, 40))
    bias_value = torch.randn(3, 6) if bias else None
    y = batched_linear(x, qweight, scale, bias_value, 6.0, outliers)
    assert y.is_contiguous()
    for b in range(3):
        each = None if bias_value is None else bias_value[b]
        assert_bitwise(y[b], linear(x[b], qweight[b], scale[b], each, 6.0, outliers))


@pytest.mark.parametrize("bias", [True, False])
@every_implementation
def test_batched_linear_without_experts(bias: bool, by: str) -> None:
    batched_linear = operator("batched_linear", by)
    qweight, scale = quantize_weight(torch.randn(0, 6, 40))
    y = batched_linear(torch.randn(0, 5, 40), qweight, scale, torch.randn(0, 6) if bias else None, 6.0, "row")
    assert y.shape == (0, 5, 6)


@every_implementation
def test_batched_linear_of_any_strides(by: str) -> None:
    batched_linear = operator("batched_linear", by)
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


@pytest.mark.parametrize("name", ["batched_linear", "packed_batched_linear"])
@every_dtype
def test_gradients_of_experts(name: str, dtype: torch.dtype) -> None:
    x, weight, scale, bias, *rest = args = arguments(name, dtype)
    x.requires_grad_()
    bias.requires_grad_()
    y = OPS[name](x, weight, scale, bias, *rest)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_bitwise(x.grad, torch.bmm(grad, float_weight(name, args, dtype)))
    for b in range(2):
        alone = bias[b].detach().requires_grad_()
        OPS[name.replace("batched_", "")](x[b].detach(), weight[b], scale[b], alone, *rest).backward(grad[b])
        assert_bitwise(bias.grad[b], alone.grad)


@pytest.mark.parametrize("shape", [(40,), (4, 40), (2, 3, 40), (0, 40)])
@pytest.mark.parametrize("name", ["packed_linear", "weight_only_linear", "packed_weight_only_linear"])
@every_dtype
def test_gradients_are_those_of_linear(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """However the weight is laid out and x is taken: the formula has only the weight and the scales in it."""
    qweight, scale = quantize_weight(torch.randn(6, 40))
    weight = packing.pack_weight(qweight) if "packed" in name else qweight
    rest = [] if "weight_only" in name else [6.0, "row"]
    x, bias = activations(*shape, dtype=dtype).requires_grad_(), torch.randn(6, dtype=dtype, requires_grad=True)
    y = OPS[name](x, weight, scale, bias, *rest)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, bias), grad)
    expected = torch.autograd.grad(linear(x, qweight, scale, bias, 6.0, "row"), (x, bias), grad)
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise(one, other)


@every_differentiable_op
def test_gradient_of_one_value_at_a_time(name: str) -> None:
    """The column of the Jacobian that `gradcheck` would probe, by formula: a step function has no slope."""
    x, int8_weight, scale, _, *rest = args = arguments(name, sizes=(2, 5, 3))
    jacobian = torch.autograd.functional.jacobian(lambda each: OPS[name](each, int8_weight, scale, None, *rest), x)
    weight = float_weight(name, args, torch.float32)
    expected = torch.zeros_like(jacobian)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).reshape(-1, x.dim() - 1).tolist():
        # Output n of a row depends on input k of the same row only.
        for n in range(3):
            expected[(*index, n, *index)] = weight[index[0]][n] if "batched" in name else weight[n]
    assert torch.equal(jacobian, expected)


@every_differentiable_op
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


@every_differentiable_op
def test_weight_and_scale_get_no_gradient(name: str) -> None:
    x, qweight, scale, bias, *rest = arguments(name)
    for each in (x, scale, bias):
        each.requires_grad_()
    OPS[name](x, qweight, scale, bias, *rest).sum().backward()
    assert scale.grad is None
    assert x.grad is not None
    assert bias.grad is not None
    assert not OPS[name](x.detach(), qweight, scale.detach(), bias.detach(), *rest).requires_grad


@every_differentiable_op
def test_second_derivative(name: str) -> None:
    """grad_x is linear in grad_y, so a gradient penalty trains what comes after the layer."""
    x, int8_weight, scale, _, *rest = args = arguments(name)
    x.requires_grad_()
    y = OPS[name](x, int8_weight, scale, None, *rest)
    grad = torch.randn_like(y, requires_grad=True)
    (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (actual,) = torch.autograd.grad(grad_x, grad, torch.ones_like(grad_x))
    weight = float_weight(name, args, torch.float32)
    # A sum of 40 values, in any order.
    expected, size = weight.sum(-1), weight.abs().sum(-1)
    assert ((actual - expected[..., None, :]).abs() <= 80 * U * size[..., None, :]).all()


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_op
def test_autocast_casts_x_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """The scales stay float32: with bfloat16 scales the operator would refuse, and each weight would be 0.4 % off."""
    x, *rest = args = arguments(name)
    with torch.autocast("cpu", dtype=dtype):
        results = tensors(OPS[name](*args))
        with torch.autocast("cpu", enabled=False):
            inner = tensors(OPS[name](*args))
    for y, expected in zip(results, tensors(OPS[name](x.to(dtype), *rest)), strict=True):
        assert y.dtype == dtype
        assert_bitwise(y, expected)
    for y, expected in zip(inner, tensors(OPS[name](*args)), strict=True):
        assert y.dtype == torch.float32
        assert_bitwise(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_differentiable_op
def test_gradients_under_autocast(name: str, dtype: torch.dtype) -> None:
    x, weight, scale, bias, *rest = args = arguments(name)
    x.requires_grad_()
    bias.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = OPS[name](x, weight, scale, bias, *rest)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    assert_bitwise(x.grad, (grad @ float_weight(name, args, dtype)).float())


@every_op
def test_autocast_when_compiled(name: str) -> None:
    """The cast is traced into the graph, forward and backward, and gives what eager mode gives."""
    args = arguments(name)
    x = args[0].requires_grad_(name in DIFFERENTIABLE)

    def step(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return OPS[name](x, *args[1:])

    compiled = tensors(torch.compile(step, backend="aot_eager", fullgraph=True)(x))
    for each_compiled, y in zip(compiled, tensors(step(x)), strict=True):
        assert_bitwise(each_compiled, y)
        if name in DIFFERENTIABLE:
            grad = torch.randn_like(y)
            assert_bitwise(torch.autograd.grad(each_compiled, x, grad)[0], torch.autograd.grad(y, x, grad)[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float64])
@every_op
def test_autocast_does_not_hide_a_wrong_dtype(name: str, dtype: torch.dtype) -> None:
    """Autocast of `F.linear` leaves integers and float64 alone, and so the operator still refuses them."""
    x, *rest = arguments(name)
    fake = FakeTensorMode()
    fakes = [fake.from_tensor(each) if isinstance(each, Tensor) else each for each in [x.to(dtype), *rest]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with fake, pytest.raises(int8compile.InputError, match="x is torch"):
            OPS[name](*fakes)
        with pytest.raises(REFUSED, match=r"x (is torch|must be float32)"):
            OPS[name](x.to(dtype), *rest)


# Errors: (which argument, its replacement, what the message must say)

# What refuses a bad call: a check in Python, or one of the kernel.
REFUSED = (int8compile.InputError, RuntimeError)

Change = Callable[[str, list[Any]], list[Any]]


def _replace(argument: str, change: Callable[[Any], Any]) -> Change:
    def replaced(name: str, args: list[Any]) -> list[Any]:
        names = [each.name for each in getattr(torch.ops.int8compile, name).default._schema.arguments]
        return [change(each) if at == argument else each for at, each in zip(names, args, strict=True)]

    return replaced


def _too_long(name: str, args: list[Any]) -> list[Any]:
    x, weight, scale, *rest = args
    long = torch.zeros(*weight.shape[: -3 if "packed" in name else -1], MAX_K + 1, dtype=torch.int8)
    if "packed" in name:
        groups = packing.packed_shape(1, MAX_K + 1)[1]
        long = torch.full((*weight.shape[:-3], groups, 16, 4), 128, dtype=torch.uint8)
    return [torch.zeros(*x.shape[:-1], MAX_K + 1), long, scale, *rest]


DTYPE_LIST = ["torch.float32", "torch.float16", "torch.bfloat16"]
BadCalls = dict[str, tuple[Change, list[str]]]
BAD_CALLS: BadCalls = {
    "integer x": (_replace("x", lambda x: x.long()), ["x is torch.int64", *DTYPE_LIST]),
    "float64 x": (_replace("x", lambda x: x.double()), ["x is torch.float64", *DTYPE_LIST]),
    "float16 scale": (_replace("scale", lambda s: s.half()), ["scale is torch.float16", "give float32 ["]),
    "too few biases": (_replace("bias", lambda b: b[..., :-1]), ["bias is torch.float32 [", "]", "None"]),
    "scalar bias": (_replace("bias", lambda b: b.sum()), ["bias is torch.float32 []", "]", "None"]),
    "bias with one more dimension": (_replace("bias", lambda b: b[None]), ["bias is torch.float32 [1, ", "]", "None"]),
    "integer bias": (_replace("bias", lambda b: b.long()), ["bias is torch.int64", "float dtype"]),
    "K beyond int32": (_too_long, ["K is 131072", "131071"]),
}
# Of a weight that is not packed.
BAD_WEIGHTS: BadCalls = {
    "wrong K": (_replace("x", lambda x: x[..., :-1]), ["x is [", "39]", "qweight [", "40]", "K]"]),
    "float qweight": (_replace("qweight", lambda q: q.float()), ["qweight is torch.float32", "give int8"]),
    "uint8 qweight": (_replace("qweight", lambda q: q.to(torch.uint8)), ["qweight is torch.uint8", "give int8"]),
    "qweight of too many dimensions": (
        _replace("qweight", lambda q: q[None]),
        ["qweight is torch.int8 [1, ", "dimensions"],
    ),
    "qweight of too few dimensions": (_replace("qweight", lambda q: q[0]), ["qweight is torch.int8 [", "dimensions"]),
    "scale with one more dimension": (
        _replace("scale", lambda s: s[..., None]),
        ["scale is torch.float32 [", "6, 1]", "6]"],
    ),
    "too few scales": (_replace("scale", lambda s: s[..., :-1]), ["scale is torch.float32 [", "5]", "6]"]),
}
# Of a packed one, which does not say how much of it is padding.
BAD_PACKED: BadCalls = {
    "wrong K": (_replace("x", lambda x: torch.cat([x, x], -1)), ["x is [", "80]", "packed [", "K]"]),
    "int8 packed": (_replace("packed", lambda q: q.view(torch.int8)), ["packed is torch.int8", "give uint8"]),
    "packed of too many dimensions": (_replace("packed", lambda q: q[None]), ["packed is torch.uint8 [", "dimensions"]),
    "packed of too few dimensions": (_replace("packed", lambda q: q[0]), ["packed is torch.uint8 [", "dimensions"]),
    "packed of other groups": (_replace("packed", lambda q: q[..., ::2, :]), ["packed [", "8, 4]", "K]"]),
    "too many scales": (_replace("scale", lambda s: s.repeat_interleave(17, -1)), ["x is [", "packed [", "outputs"]),
    "scale without dimensions": (_replace("scale", lambda s: s.sum()), ["scale is torch.float32 []", "N]"]),
}
BAD_SEVERAL: BadCalls = {name: BAD_PACKED[name] for name in ("wrong K", "int8 packed", "packed of other groups")} | {
    "negative outputs": (_replace("n0", lambda n: -n), ["outputs [-", "scale"]),
    "too many outputs": (_replace("n0", lambda n: n + 100), ["outputs [1", "scale"]),
    "too few panels": (_replace("packed", lambda q: q[1:]), ["packed is [", "panels"]),
    "other panels": (_replace("n0", lambda n: n - 5), ["packed is [", "panels"]),
}
BAD_POLICIES: BadCalls = {
    "negative threshold": (_replace("threshold", lambda _: -1.0), ["threshold is -1.0", ">= 0"]),
    "NaN threshold": (_replace("threshold", lambda _: math.nan), ["threshold is nan", "finite"]),
    "infinite threshold": (_replace("threshold", lambda _: math.inf), ["threshold is inf", "finite"]),
}
UNKNOWN_POLICY: BadCalls = {
    "unknown policy": (_replace("outliers", lambda _: "rows"), ["outliers is 'rows'", "'row'", "'column'"])
}
BAD_EXPERTS: BadCalls = {
    "2-D x": (_replace("x", lambda x: x[0]), ["x is [4, 40]", "[B, M, K]", "[B, N, K]"]),
    "other number of experts": (_replace("x", lambda x: x[:1]), ["x is [1, 4, 40]", "[2, "]),
}


def bad_calls(name: str) -> BadCalls:
    """The calls that an operator must refuse, and what it says."""
    several = "pair" in name or "triple" in name
    calls = BAD_CALLS | (BAD_SEVERAL if several else BAD_PACKED if "packed" in name else BAD_WEIGHTS)
    if "weight_only" not in name:
        calls = calls | BAD_POLICIES | ({} if name.endswith("no_grad") else UNKNOWN_POLICY)
    if "batched" in name:
        return calls | BAD_EXPERTS
    return calls | {"0-D x": (_replace("x", lambda x: x.sum()), ["x is []", "[..., K]", "[N, K]"])}


ALL_BAD_CALLS = [(name, case) for name in OPS for case in bad_calls(name)]


@pytest.mark.parametrize("mode", ["definition", "fake", "meta"])
@pytest.mark.parametrize(("name", "case"), ALL_BAD_CALLS)
def test_input_error(name: str, case: str, mode: str) -> None:
    """The same message when the call runs in PyTorch and when it is traced."""
    change, says = bad_calls(name)[case]
    args = change(name, arguments(name))
    run = operator(name, DEFINITION) if mode == "definition" else OPS[name]
    with contextlib.ExitStack() as stack:
        if mode == "fake":
            fake = stack.enter_context(FakeTensorMode())
            args = [fake.from_tensor(each) if isinstance(each, Tensor) else each for each in args]
        elif mode == "meta":
            args = [each.to("meta") if isinstance(each, Tensor) else each for each in args]
        with pytest.raises(int8compile.InputError) as caught:
            run(*args)
    message = str(caught.value)
    assert re.match(rf"int8compile::{name.removesuffix('_no_grad')}\w*: ", message)
    for words in says:
        assert words in message


@needs_kernel
@pytest.mark.parametrize(("name", "case"), ALL_BAD_CALLS)
def test_the_kernel_refuses_what_its_definition_refuses(name: str, case: str) -> None:
    """Called directly, without tracing: it would read or write beyond its arguments."""
    change, _ = bad_calls(name)[case]
    args = change(name, arguments(name))
    with pytest.raises(RuntimeError) as caught:
        OPS[name](*args)
    (argument,) = [
        schema.name
        for schema, given, right in zip(
            getattr(torch.ops.int8compile, name).default._schema.arguments, args, arguments(name), strict=True
        )
        if not _alike(given, right) and not (case == "K beyond int32" and schema.name != "x")
    ]
    message = str(caught.value)
    assert f"int8compile::{name}: " in message
    # That of a number of outputs shows in its sum, or in the panels.
    assert argument in message or (argument == "n0" and re.search("outputs|packed", message.split(name)[1]))


def _alike(given: Any, right: Any) -> bool:
    if isinstance(right, Tensor):
        return (given.dtype, given.shape) == (right.dtype, right.shape)
    return given == right


def test_input_errors_name_only_what_exists() -> None:
    """What a message tells the user to call can be called."""
    paths = set()
    for name, case in ALL_BAD_CALLS:
        change, _ = bad_calls(name)[case]
        for run in (operator(name, DEFINITION), OPS[name]):
            with pytest.raises(REFUSED) as caught:
                run(*change(name, arguments(name)))
            paths.update(re.findall(r"int8compile(?:\.\w+)+", str(caught.value)))
    for path in sorted(paths):
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"a message names {path}, which does not exist"


@every_op
def test_input_error_reaches_the_user_of_torch_compile(name: str) -> None:
    x, weight, scale, *rest = arguments(name)
    compiled = torch.compile(lambda x: OPS[name](x, weight, scale.half(), *rest), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=rf"int8compile::{name.removesuffix('_no_grad')}\w*: scale is torch\.float16"):
        compiled(x)


@pytest.mark.parametrize("name", ["linear", "batched_linear", "weight_only_linear"])
@every_implementation
def test_largest_k_is_allowed(name: str, by: str) -> None:
    """Equality: 131071 runs."""
    batch = [1] if name == "batched_linear" else []
    x = torch.zeros(*batch, 1, MAX_K)
    x[..., 0], x[..., -1] = 1.0, -1.0
    qweight, scale = quantize_weight(x.clone())
    # rms is sqrt(2 / K), so both elements are outliers and exact. Each weight is 127/127 with one rounding of 1/127.
    y = operator(name, by)(x, qweight, scale, None, *([] if "weight_only" in name else [6.0, "row"]))
    torch.testing.assert_close(y, torch.full_like(y, 2.0), rtol=3 * U, atol=0)


@every_implementation
def test_threshold_of_minus_zero_is_zero(by: str) -> None:
    """-0.0 is 0, not a negative number."""
    linear = operator("linear", by)
    args = arguments("linear")
    assert_bitwise(linear(*args[:4], -0.0, "row"), linear(*args[:4], 0.0, "row"))


@given(SEEDS, st.sampled_from(OUTLIER_POLICIES), st.sampled_from([0.0, 6.0]))
@every_implementation
def test_negating_x_negates_the_product(by: str, seed: int, outliers: str, threshold: float) -> None:
    """Symmetric quantization and half-to-even rounding: no sign is treated differently."""
    linear = operator("linear", by)
    torch.manual_seed(seed)
    x, qweight, scale, *_ = arguments("linear")
    assume(x.abs().max() > 0)
    y = linear(x, qweight, scale, None, threshold, outliers)
    assert torch.equal(linear(-x, qweight, scale, None, threshold, outliers), -y)
    assert torch.equal(linear(x, -qweight, scale, None, threshold, outliers), -y)


@given(SEEDS, st.integers(-20, 20))
@every_implementation
def test_row_policy_scales_with_x(by: str, seed: int, exponent: int) -> None:
    """A power of two changes nothing but the exponent: the row policy has no unit, unlike a threshold of 6.0."""
    linear = operator("linear", by)
    torch.manual_seed(seed)
    x, qweight, scale, *_ = arguments("linear")
    y = linear(x, qweight, scale, None, 6.0, "row")
    assert_bitwise(linear(x * 2.0**exponent, qweight, scale, None, 6.0, "row"), y * 2.0**exponent)
