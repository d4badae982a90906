"""The operators as PyTorch sees them: registration, what a row's result depends on, experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import int8compile
from int8compile.ops import (
    MAX_K,
    SUPPORTED_DTYPES,
    column,
    column_linear,
    grouped_linear,
    linear,
    packing,
    quantize_weight,
    reference,
    unpack_weight,
)
from tests.helpers.implementations import VARIANTS, every_implementation, operator
from tests.helpers.models import threads

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.operators import (
    DIFFERENTIABLE,
    LAYOUTS,
    OPS,
    U,
    activations,
    arguments,
    assert_bitwise,
    changing,
    each,
    every_dtype,
    every_op,
    every_rotation,
    factors,
    quantized,
    tensors,
    unpacked,
)

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


FLOATS = "(Tensor x, Tensor {}, Tensor scale, Tensor? d, Tensor? bias{}) -> Tensor"

POLICY = ", float threshold"

# Every operator of the library. A missing one fails `test_every_operator_is_complete`: add it with its tests.
OPERATORS: dict[str, Operator] = {
    "linear": Operator(reference.linear, FLOATS.format("qweight", POLICY)),
    "batched_linear": Operator(reference.batched_linear, FLOATS.format("qweight", POLICY)),
    "weight_only_linear": Operator(reference.weight_only_linear, FLOATS.format("qweight", "")),
    "column_linear": Operator(column.column_linear, FLOATS.format("qweight", POLICY).replace("Tensor? d, ", "")),
    "quantize_weight": Operator(reference.quantize_weight, "(Tensor weight, Tensor? d) -> (Tensor, Tensor)"),
    "pack_weight": Operator(packing.pack_weight, "(Tensor qweight) -> Tensor"),
    "packed_linear": Operator(unpacked(reference.linear), FLOATS.format("packed", POLICY)),
    "packed_batched_linear": Operator(unpacked(reference.batched_linear), FLOATS.format("packed", POLICY)),
    "packed_weight_only_linear": Operator(unpacked(reference.weight_only_linear), FLOATS.format("packed", "")),
    "linear_no_grad": Operator(reference.linear, FLOATS.format("qweight", POLICY)),
    "weight_only_linear_no_grad": Operator(reference.weight_only_linear, FLOATS.format("qweight", "")),
    "packed_linear_no_grad": Operator(unpacked(reference.linear), FLOATS.format("packed", POLICY)),
    "packed_linear_pair_no_grad": Operator(
        each(2), FLOATS.format("packed", ", int n0" + POLICY).replace("-> Tensor", "-> (Tensor, Tensor)")
    ),
    "packed_linear_triple_no_grad": Operator(
        each(3),
        FLOATS.format("packed", ", int n0, int n1" + POLICY).replace("-> Tensor", "-> (Tensor, Tensor, Tensor)"),
    ),
    "packed_weight_only_linear_no_grad": Operator(unpacked(reference.weight_only_linear), FLOATS.format("packed", "")),
}

# Operators on a weight alone.
WEIGHTS = ("quantize_weight", "pack_weight")


def strided(name: str, weight: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a weight in another layout; packed weights have only one."""
    return weight if "packed" in name else layout(weight)


# Registration


def test_every_operator_is_complete() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("int8compile::")}
    # test_quantized.py tests the first three, test_modules.py the others.
    others = ("quantize_rows", "norm_quantize_rows", "quantized_linear", "grouped_linear", "grouped_linear_backward")
    others = {f"int8compile::{name}" for name in others}
    # Composed of PyTorch's operators; test_module_weight.py tests it.
    names.remove("int8compile::module_weight")
    assert names == {f"int8compile::{name}" for name in OPERATORS} | others
    assert set(OPERATORS) == {*OPS, *WEIGHTS}
    for name in names:
        keys = ["Meta", "CompositeExplicitAutograd"]
        # Weights have no gradient and are not cast. A backward pass is outside of autocast.
        if name.removeprefix("int8compile::") not in (*WEIGHTS, "grouped_linear_backward"):
            keys += ["Autograd", "AutocastCPU", "AutocastCUDA"]
        kernels = VARIANTS and name not in (*others, "int8compile::column_linear")
        for key in [*keys, "CPU"] if kernels else keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has nothing for {key}"


@pytest.mark.parametrize("name", OPERATORS)
def test_schema(name: str) -> None:
    """Compiled artifacts contain the operator's name and arguments: a change here breaks them."""
    op = getattr(torch.ops.int8compile, name).default
    assert str(op._schema) == f"int8compile::{name}{OPERATORS[name].arguments}"
    assert torch.Tag.pt2_compliant_tag in op.tags


@every_op
@every_dtype
@every_rotation
@every_implementation
def test_operator_is_its_reference(name: str, dtype: torch.dtype, rotated: bool, by: str) -> None:
    """The operator in eager mode on the CPU gives the reference's bits and leaves its arguments unchanged."""
    if by in VARIANTS and name == "column_linear":
        return  # Only its definition exists.
    args = arguments(name, dtype, rotated=rotated)
    before = [each.clone() for each in args if isinstance(each, Tensor)]
    results = tensors(operator(name, by)(*args))
    for y, expected in zip(results, tensors(OPERATORS[name].reference(*args)), strict=True):
        assert_bitwise(y, expected)
        assert y.is_contiguous()
    tensors_of = [each for each in args if isinstance(each, Tensor)]
    assert all(torch.equal(each, was) for each, was in zip(tensors_of, before, strict=True))


@every_implementation
@pytest.mark.parametrize(
    "shape", [(6, 40), (16, 64), (17, 65), (1, 1), (33, 300), (0, 5), (5, 0), (2, 3, 7), (2, 0, 3, 7)]
)
def test_pack_weight(shape: tuple[int, ...], by: str) -> None:
    """Packed weights follow the formula of `packing`, with the byte for 0 as padding; unpacking undoes it."""
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


OPCHECKS = [
    # Each column has every value at least twice, and every dtype has the default configuration.
    (torch.float32, True, True, "contiguous", True),
    (torch.float16, True, True, "contiguous", True),
    (torch.bfloat16, True, True, "contiguous", True),
    (torch.float32, False, False, "transposed", True),
    (torch.bfloat16, False, True, "sliced", True),
    (torch.float16, False, False, "expanded", False),
    (torch.float32, True, False, "sliced", False),
    (torch.float32, True, True, "expanded", True),
    (torch.bfloat16, True, False, "transposed", False),
]


@pytest.mark.parametrize(
    ("name", "dtype", "rotated", "bias", "layout", "requires_grad"),
    # All checks for three operators, which together run all the code; the most different checks for the others.
    [
        (name, *check)
        for name in OPS
        for check in (OPCHECKS if name in ("linear", "batched_linear", "packed_linear_no_grad") else OPCHECKS[2:5])
    ],
)
def test_opcheck(name: str, dtype: torch.dtype, rotated: bool, bias: bool, layout: str, requires_grad: bool) -> None:
    args = arguments(name, dtype, rotated=rotated)
    requires_grad = requires_grad and name in DIFFERENTIABLE
    x = LAYOUTS[layout](args[0]).detach().requires_grad_(requires_grad)
    bias_value = torch.randn_like(args[2], dtype=dtype).requires_grad_(requires_grad) if bias else None
    torch.library.opcheck(
        getattr(torch.ops.int8compile, name).default, tuple(changing(name, args, x=x, bias=bias_value))
    )


@pytest.mark.parametrize("name", ["linear", "packed_linear_pair_no_grad", "packed_weight_only_linear"])
@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 3, 48), (2, 0, 3, 48)])
def test_opcheck_leading_dims(name: str, shape: tuple[int, ...]) -> None:
    _, *rest = arguments(name)
    x = activations(*shape).requires_grad_(name in DIFFERENTIABLE)
    torch.library.opcheck(getattr(torch.ops.int8compile, name).default, (x, *rest))


@pytest.mark.parametrize("name", ["batched_linear", "packed_batched_linear"])
@pytest.mark.parametrize("sizes", [(0, 2, 4, 3), (2, 0, 4, 3), (2, 3, 0, 3), (2, 3, 4, 0)])
def test_opcheck_of_empty_experts(name: str, sizes: tuple[int, int, int, int]) -> None:
    B, M, K, N = sizes
    qweight, scale = quantized(B, N, K)
    weight = packing.pack_weight(qweight) if "packed" in name else qweight
    args = (activations(B, M, K).requires_grad_(), weight, scale, None, torch.randn(B, N), 6.0)
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
    """Operators with `no_grad` in their name are invisible to autograd."""
    args = arguments(name)
    args[0].requires_grad_()
    assert all(y.requires_grad is (name in DIFFERENTIABLE) for y in tensors(OPS[name](*args)))


# A row's result depends on that row alone


@settings(max_examples=50)
@given(
    SEEDS,
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 16, 37, 144, 1041, 2560]), st.integers(1, 9)),
    st.sampled_from(SUPPORTED_DTYPES),
    st.sampled_from([0.0, 1.0, 6.0]),
)
@every_implementation
def test_row_does_not_depend_on_the_batch(
    by: str, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    """A row's result is the same alone, as a 1-D input, reordered, beside other rows, and with more dimensions."""
    linear = operator("linear", by)
    torch.manual_seed(seed)
    M, K, N = sizes
    x, d = activations(M, K, dtype=dtype), factors(K) if seed % 3 else None
    qweight, scale = quantized(N, K, d=d)
    run = partial(linear, qweight=qweight, scale=scale, d=d, bias=torch.randn(N), threshold=threshold)
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


@settings(max_examples=60)
@given(
    SEEDS,
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 37, 144, 1041]), st.integers(1, 9)),
    st.sampled_from(SUPPORTED_DTYPES),
    st.sampled_from([1, 2, 3]),
)
@every_implementation
def test_result_does_not_depend_on_strides_or_threads(
    by: str, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, count: int
) -> None:
    linear = operator("linear", by)
    torch.manual_seed(seed)
    M, K, N = sizes
    x, d = activations(M, K, dtype=dtype), factors(K) if seed % 3 else None
    qweight, scale = quantized(N, K, d=d)
    bias = torch.randn(N)
    y = linear(x, qweight, scale, d, bias, 6.0)
    for layout in ("contiguous", "transposed", "sliced"):
        weight, sliced = LAYOUTS[layout](qweight), LAYOUTS["sliced"]
        with threads(count):
            other = linear(LAYOUTS[layout](x), weight, sliced(scale), None if d is None else sliced(d), bias, 6.0)
        assert_bitwise(other, y)


@every_dtype
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 3, 7), (2, 1, 0, 7), (0, 7), (2, 2, 2, 2, 7)])
@every_implementation
def test_leading_dims(dtype: torch.dtype, shape: tuple[int, ...], by: str) -> None:
    linear = operator("linear", by)
    qweight, scale = quantized(5, 7)
    x = activations(*shape, dtype=dtype)
    y = linear(x, qweight, scale, None, None, 6.0)
    assert y.shape == (*shape[:-1], 5)
    flat = [linear(row, qweight, scale, None, None, 6.0) for row in x.reshape(math.prod(shape[:-1]), 7)]
    assert_bitwise(y, torch.stack(flat).reshape(y.shape) if flat else x.new_empty(y.shape))


@every_rotation
@pytest.mark.parametrize(("M", "K", "N"), [(0, 16, 3), (2, 0, 3), (2, 16, 0), (0, 0, 0), (1, 1, 1)])
@every_implementation
def test_sizes_of_zero_and_one(rotated: bool, M: int, K: int, N: int, by: str) -> None:
    d = factors(K) if rotated else None
    qweight, scale = quantized(N, K, d=d)
    bias = torch.randn(N)
    for name, rest in (("linear", (6.0,)), ("weight_only_linear", ())):
        y = operator(name, by)(activations(M, K), qweight, scale, d, bias, *rest)
        assert y.shape == (M, N)
        if K == 0:
            assert_bitwise(y, bias.expand(M, N).contiguous())


def test_column_policy_depends_on_the_batch() -> None:
    """In LLM.int8(), unlike in `linear`, a value in row 3 takes its column out of the int8 part of rows 0-2."""
    x = torch.randn(4, 16).clamp(-3, 3)
    qweight, scale = quantized(8, 16)
    before, row_before = column_linear(x, qweight, scale, None, 6.0), linear(x, qweight, scale, None, None, 6.0)
    x[3, 5] = 50.0
    after, row_after = column_linear(x, qweight, scale, None, 6.0), linear(x, qweight, scale, None, None, 6.0)
    assert (before[:3] != after[:3]).any(dim=1).all()
    assert_bitwise(row_after[:3], row_before[:3])


def test_the_column_policy_can_be_traced() -> None:
    """Tracing works for any values: no shape depends on them and nothing is read back."""
    compiled = torch.compile(column.column_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for M, K in ((4, 48), (7, 50)):
        x, (qweight, scale) = activations(M, K), quantized(6, K)
        assert_bitwise(compiled(x, qweight, scale, None, 6.0), column_linear(x, qweight, scale, None, 6.0))


# NaN, Inf, zero


@every_dtype
@every_rotation
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_implementation
def test_nan_and_inf_stay_in_their_row(
    dtype: torch.dtype, rotated: bool, threshold: float, value: float, by: str
) -> None:
    """All outputs of such a row are NaN, including those whose weights are 0."""
    d = factors(48) if rotated else None
    x = activations(5, 48, dtype=dtype)
    qweight, scale = quantized(6, 48, d=d)
    qweight[3], scale[3] = 0, 0.0
    bias = torch.randn(6)
    others = [0, 1, 3, 4]
    for name, rest in (("linear", (threshold,)), ("weight_only_linear", ())):
        run = operator(name, by)
        before = run(x, qweight, scale, d, bias, *rest)
        bad = x.clone()
        bad[2, 7] = value
        y = run(bad, qweight, scale, d, bias, *rest)
        assert y[2].isnan().all()
        assert_bitwise(y[others], before[others])
        assert before.isfinite().all()


@every_implementation
def test_a_product_with_d_that_overflows_is_nan(by: str) -> None:
    x, d = torch.randn(3, 48), factors(48)
    d[5] = 1e10
    x[1, 5] = 1e30
    qweight, scale = quantized(6, 48, d=d)
    for name, rest in (("linear", (6.0,)), ("weight_only_linear", ())):
        y = operator(name, by)(x, qweight, scale, d, None, *rest)
        assert y.isnan().tolist() == [[False] * 6, [True] * 6, [False] * 6]


@every_dtype
@every_rotation
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@every_implementation
def test_zero_row_gives_the_bias(dtype: torch.dtype, rotated: bool, bias_dtype: torch.dtype, by: str) -> None:
    d = factors(48) if rotated else None
    x = activations(4, 48, dtype=dtype)
    x[1] = 0
    x[2] = -0.0
    x[3, 4] = math.inf
    bias = torch.randn(6).to(bias_dtype)
    y = operator("linear", by)(x, *quantized(6, 48, d=d), d, bias, 6.0)
    for m in (1, 2):
        assert_bitwise(y[m], bias.to(dtype))


@every_implementation
def test_zero_row_without_bias_is_zero(by: str) -> None:
    linear = operator("linear", by)
    y = linear(torch.zeros(2, 9), *quantized(3, 9), None, None, 6.0)
    assert torch.equal(y, torch.zeros(2, 3))


@every_rotation
@pytest.mark.parametrize("threshold", [0.0, 12.0])
@pytest.mark.parametrize("size", [1e-9, 1e6])
@every_implementation
def test_float32_is_not_cut_to_the_range_of_float16(rotated: bool, threshold: float, size: float, by: str) -> None:
    """A detour through float16 would turn 1e6 into Inf and 1e-9 into 0."""
    weight = torch.randn(6, 48, dtype=torch.float64)
    x = torch.randn(3, 48, dtype=torch.float64) * size
    d = reference.signs(48) if rotated else None
    y = operator("linear", by)(x.float(), *reference.quantize_weight(weight, d), d, None, threshold)
    exact = x @ weight.T
    assert (y - exact).norm() <= 0.02 * exact.norm()


# Experts


@every_dtype
@pytest.mark.parametrize("rotation", ["plain", "one d", "a d for each"])
@pytest.mark.parametrize("bias", [True, False])
@every_implementation
def test_batched_linear_is_linear_of_each_expert(dtype: torch.dtype, rotation: str, bias: bool, by: str) -> None:
    d = {"plain": None, "one d": factors(48), "a d for each": factors(3, 48)}[rotation]
    x = activations(3, 5, 48, dtype=dtype)
    qweight, scale = quantized(3, 6, 48, d=d)
    bias_value = torch.randn(3, 6) if bias else None
    y = operator("batched_linear", by)(x, qweight, scale, d, bias_value, 6.0)
    packed = operator("packed_batched_linear", by)(x, packing.pack_weight(qweight), scale, d, bias_value, 6.0)
    assert_bitwise(packed, y)
    assert y.is_contiguous()
    for b in range(3):
        each = None if bias_value is None else bias_value[b]
        alone = reference.of_each(d, b)
        assert_bitwise(y[b], operator("linear", by)(x[b], qweight[b], scale[b], alone, each, 6.0))


@pytest.mark.parametrize("bias", [True, False])
@every_implementation
def test_batched_linear_without_experts(bias: bool, by: str) -> None:
    batched_linear = operator("batched_linear", by)
    qweight, scale = quantized(0, 6, 40)
    y = batched_linear(torch.randn(0, 5, 40), qweight, scale, None, torch.randn(0, 6) if bias else None, 6.0)
    assert y.shape == (0, 5, 6)


@every_implementation
def test_batched_linear_of_any_strides(by: str) -> None:
    batched_linear = operator("batched_linear", by)
    x, qweight, scale, d, bias, *rest = arguments("batched_linear")
    y = batched_linear(x, qweight, scale, d, bias, *rest)
    for change in (
        LAYOUTS["transposed"],
        LAYOUTS["sliced"],
        lambda each: each.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        sliced = LAYOUTS["sliced"]
        assert_bitwise(batched_linear(change(x), change(qweight), sliced(scale), sliced(d), bias, *rest), y)


@every_dtype
@pytest.mark.parametrize("rotation", ["plain", "one d", "a d for each"])
def test_grouped_linear_is_linear_of_each_group(dtype: torch.dtype, rotation: str) -> None:
    """Values and derivatives agree; experts without rows are allowed, and rows without an expert give zeros."""
    d = {"plain": None, "one d": factors(48), "a d for each": factors(3, 48)}[rotation]
    qweight, scale = quantized(3, 6, 48, d=d)
    x, ends, parts = activations(9, 48, dtype=dtype).requires_grad_(), torch.tensor([4, 4, 7]), ((0, 0, 4), (2, 4, 7))
    y = grouped_linear(x, qweight, scale, d, ends, 6.0)
    grad, along = torch.randn_like(y), torch.randn_like(x)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    tangent = torch.func.jvp(lambda x: grouped_linear(x, qweight, scale, d, ends, 6.0), (x.detach(),), (along,))[1]
    for expert, begin, end in parts:
        group = x[begin:end].detach().requires_grad_()
        run = partial(linear, qweight=qweight[expert], scale=scale[expert], d=reference.of_each(d, expert))
        alone = run(group, bias=None, threshold=6.0)
        assert_bitwise(y[begin:end], alone)
        assert_bitwise(grad_x[begin:end], torch.autograd.grad(alone, group, grad[begin:end])[0])
        weight = (qweight[expert], scale[expert], reference.of_each(d, expert), None, 6.0)
        its = torch.func.jvp(lambda x, weight=weight: linear(x, *weight), (group.detach(),), (along[begin:end],))[1]
        assert_bitwise(tangent[begin:end], its)
    assert not y[7:].any()
    assert not grad_x[7:].any()


BAD_GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "3-D x": ({"x": torch.randn(2, 4, 48)}, r"x is \[2, 4, 48\] and qweight \[3, 6, 48\]; x must be \[S, K\]"),
    "too few ends": ({"ends": torch.tensor([2, 4])}, r"ends is \[2\]; give \[3\]"),
    "d of other experts": ({"d": torch.ones(2, 48)}, r"d is torch.float32 \[2, 48\]; give float32 \[48\] or \[3, 48\]"),
    "threshold below 1": ({"threshold": 0.5}, "threshold is 0.5; give a finite number >= 1"),
    "descending ends": ({"ends": torch.tensor([3, 2, 4])}, "ends must ascend and be at most 4"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_grouped_linear_refuses(case: str) -> None:
    qweight, scale = quantized(3, 6, 48)
    args = {"x": torch.randn(4, 48), "qweight": qweight, "scale": scale, "d": None}
    args |= {"ends": torch.tensor([1, 2, 4]), "threshold": 6.0}
    changed, says = BAD_GROUPS[case]
    with pytest.raises(int8compile.InputError, match=f"int8compile::grouped_linear: {says}"):
        grouped_linear(**(args | changed))


@pytest.mark.parametrize("name", ["linear", "batched_linear", "weight_only_linear"])
@every_implementation
def test_largest_k_is_allowed(name: str, by: str) -> None:
    """At the largest K, 131071."""
    batch = [1] if name == "batched_linear" else []
    x = torch.zeros(*batch, 1, MAX_K)
    x[..., 0], x[..., -1] = 1.0, -1.0
    qweight, scale = quantize_weight(x.clone(), None)
    # Q is 32639. Each factor is 127/127, with one rounding of 1/127 or 1/32639, and there are two products.
    y = operator(name, by)(x, qweight, scale, None, None, *([] if "weight_only" in name else [6.0]))
    torch.testing.assert_close(y, torch.full_like(y, 2.0), rtol=5 * U, atol=0)


@every_implementation
def test_threshold_of_minus_zero_is_zero(by: str) -> None:
    """The threshold -0.0 is taken as 0, not as negative."""
    linear = operator("linear", by)
    *args, _ = arguments("linear")
    assert_bitwise(linear(*args, -0.0), linear(*args, 0.0))


@given(SEEDS, st.booleans(), st.sampled_from([0.0, 6.0]))
@every_implementation
def test_negating_x_negates_the_product(by: str, seed: int, rotated: bool, threshold: float) -> None:
    """Grids are symmetric and ties round to even, so signs do not matter, although only q0 reaches -128."""
    linear = operator("linear", by)
    torch.manual_seed(seed)
    x, qweight, scale, d, *_ = arguments("linear", rotated=rotated)
    assume(x.abs().max() > 0)
    y = linear(x, qweight, scale, d, None, threshold)
    assert torch.equal(linear(-x, qweight, scale, d, None, threshold), -y)
    assert torch.equal(linear(x, -qweight, scale, d, None, threshold), -y)


@given(SEEDS, st.booleans(), st.integers(-20, 20))
@every_implementation
def test_result_scales_with_x(by: str, seed: int, rotated: bool, exponent: int) -> None:
    """A power of two changes only the exponent: thresholds have no unit, unlike those of the column policy."""
    linear = operator("linear", by)
    torch.manual_seed(seed)
    x, qweight, scale, d, *_ = arguments("linear", rotated=rotated)
    y = linear(x, qweight, scale, d, None, 6.0)
    assert_bitwise(linear(x * 2.0**exponent, qweight, scale, d, None, 6.0), y * 2.0**exponent)
