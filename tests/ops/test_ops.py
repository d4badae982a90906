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
    SUPPORTED_DTYPES,
    batched_linear,
    column,
    column_linear,
    dequantize_weight,
    grouped_linear,
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
    rotation_of,
    unpack_weight,
    weight_only_linear,
    weight_only_linear_no_grad,
)
from tests.helpers.implementations import DEFINITION, VARIANTS, every_implementation, needs_kernel, operator
from tests.helpers.models import threads

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

    def run(x: Tensor, packed: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        return define(x, unpack_weight(packed, scale.shape[-1], x.shape[-1]), scale, *rest)

    return run


def each(count: int) -> Callable[..., tuple[Tensor, ...]]:
    """`linear` of one x and several packed weights, one after the other."""

    def run(
        x: Tensor, packed: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        sizes = [*rest[: count - 1], scale.shape[0] - sum(rest[: count - 1])]
        biases = [None] * count if bias is None else bias.split(sizes)
        panels = packed.split([-(-size // 16) for size in sizes])
        parts = zip(panels, scale.split(sizes), biases, strict=True)
        return tuple(
            unpacked(reference.linear)(x, part, its_scale, d, its_bias, rest[-1]) for part, its_scale, its_bias in parts
        )

    return run


FLOATS = "(Tensor x, Tensor {}, Tensor scale, Tensor? d, Tensor? bias{}) -> Tensor"
POLICY = ", float threshold"
# Every operator of the library. One missing here fails `test_every_operator_is_complete`: add it with its tests.
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
# Those that take x, those that have gradients, those whose result is one tensor.
OPS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "batched_linear": batched_linear,
    "weight_only_linear": weight_only_linear,
    "column_linear": column_linear,
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
# Whether the weight is rotated.
every_rotation = pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
every_op = pytest.mark.parametrize("name", OPS)
every_differentiable_op = pytest.mark.parametrize("name", DIFFERENTIABLE)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with some that stand far out: outliers."""
    x = torch.randn(shape)
    if x.numel():
        x.view(-1)[torch.randint(x.numel(), (1 + x.numel() // 64,))] *= 25
    return x.to(dtype)


def factors(*shape: int) -> Tensor:
    """A d of K inputs, or of each of several weights."""
    return torch.stack([rotation_of(0.25 + 2 * torch.rand(shape[-1])) for _ in range(math.prod(shape[:-1]))]).view(
        shape
    )


def quantized(*shape: int, d: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An int8 weight [..., N, K] and its scales."""
    qweight, scale = quantize_weight(torch.randn(shape), d)
    return qweight, scale


def arguments(
    name: str, dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (4, 48, 6), rotated: bool = True
) -> list[Any]:
    """x, weight, scale, d, bias, and what else the operator takes; two experts for the batched ones.

    48 inputs are rotated by 16.
    """
    M, K, N = sizes
    batch = [2] if "batched" in name else []
    several = 3 if "triple" in name else 2 if "pair" in name else 1
    d = factors(*batch, K) if rotated and name != "column_linear" else None
    # Outputs of the first ones: not multiples of a panel's.
    split = [N + 13, N + 1][: several - 1]
    weights = [quantized(*batch, outputs, K, d=d) for outputs in [*split, N]]
    scale = torch.cat([scale for _, scale in weights], -1)
    packed = [packing.pack_weight(qweight) for qweight, _ in weights]
    weight = torch.cat(packed) if several > 1 else packed[0] if "packed" in name else weights[0][0]
    x, bias = activations(*batch, M, K, dtype=dtype), torch.randn(scale.shape, dtype=dtype)
    threshold = [] if "weight_only" in name else [6.0]
    return [x, weight, scale, *([] if name == "column_linear" else [d]), bias, *split, *threshold]


def float_weight(name: str, args: list[Any], dtype: torch.dtype) -> Tensor:
    """The [..., N, K] weight that an operator's int8 weight stands for."""
    x, weight, scale, d, *_ = args
    qweight = unpack_weight(weight, scale.shape[-1], x.shape[-1]) if "packed" in name else weight
    return dequantize_weight(qweight, scale, None if name == "column_linear" else d, dtype)


def changing(name: str, args: list[Any], **changed: Any) -> list[Any]:
    """The arguments with some replaced, by their names."""
    names = [each.name for each in getattr(torch.ops.int8compile, name).default._schema.arguments]
    return [changed.get(at, value) for at, value in zip(names, args, strict=True)]


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
    others = ("quantize_rows", "norm_quantize_rows", "quantized_linear", "grouped_linear", "grouped_linear_backward")
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
        kernels = VARIANTS and name not in (*others, "int8compile::column_linear")
        for key in [*keys, "CPU"] if kernels else keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has nothing for {key}"


@pytest.mark.parametrize("name", OPERATORS)
def test_schema(name: str) -> None:
    """Compiled artifacts name the operator and its arguments: a change here breaks them."""
    op = getattr(torch.ops.int8compile, name).default
    assert str(op._schema) == f"int8compile::{name}{OPERATORS[name].arguments}"
    assert torch.Tag.pt2_compliant_tag in op.tags


@every_op
@every_dtype
@every_rotation
@every_implementation
def test_operator_is_its_reference(name: str, dtype: torch.dtype, rotated: bool, by: str) -> None:
    """In eager mode on the CPU, and it leaves its arguments as they were."""
    if by in VARIANTS and name == "column_linear":
        return  # It has no kernel.
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
    # All of them where the code of all operators is run, and for the others those that differ most.
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
    """What `no_grad` in a name means: autograd does not see the call at all."""
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
    """Alone, as a 1-D input, in another order, beside other rows, and as part of any leading dimensions."""
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
    """What LLM.int8() does and `linear` avoids: a value in row 3 takes its column out of the int8 part of rows 0-2."""
    x = torch.randn(4, 16).clamp(-3, 3)
    qweight, scale = quantized(8, 16)
    before, row_before = column_linear(x, qweight, scale, None, 6.0), linear(x, qweight, scale, None, None, 6.0)
    x[3, 5] = 50.0
    after, row_after = column_linear(x, qweight, scale, None, 6.0), linear(x, qweight, scale, None, None, 6.0)
    assert (before[:3] != after[:3]).any(dim=1).all()
    assert_bitwise(row_after[:3], row_before[:3])


def test_the_column_policy_can_be_traced() -> None:
    """Whatever the values are: its operators have shapes that do not depend on them, and nothing is read back."""
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
    """All of its outputs are NaN, also those of weights that are 0."""
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
    """With its derivatives; an expert without rows, and rows that are nobody's, which give zeros."""
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


# Gradients


@pytest.mark.parametrize("shape", [(48,), (4, 48), (2, 3, 48), (0, 48)])
@every_dtype
@pytest.mark.parametrize("op", [linear, column_linear])
def test_gradients_are_those_of_the_float_formula(dtype: torch.dtype, op: Any, shape: tuple[int, ...]) -> None:
    """`grad_x = grad_y @ W` and `grad_bias = sum(grad_y)`, W the dequantized weight in x's dtype: not rotated."""
    qweight, scale = quantized(6, 48)
    weight = dequantize_weight(qweight, scale, None, dtype)
    x = activations(*shape, dtype=dtype).requires_grad_()
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    y = op(x, qweight, scale, *([] if op is column_linear else [None]), bias, 6.0)
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


@every_dtype
def test_gradients_of_a_rotated_weight(dtype: torch.dtype) -> None:
    """`grad_x = d * H((grad_y * scale) @ qweight)`: the product in x's dtype, the rotation in float32."""
    x, qweight, scale, d, bias, t = arguments("linear", dtype, sizes=(5, 192, 33))
    x.requires_grad_()
    y = linear(x, qweight, scale, d, bias, t)
    grad = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    weight = dequantize_weight(qweight, scale, d, torch.float64)
    in_rotated = grad.double().abs() @ dequantize_weight(qweight, scale, None, torch.float64).abs()
    # The weight and its product are rounded to x's dtype, the product's sum and the rotation to float32.
    eps = torch.finfo(dtype).eps
    bound = reference.unrotated(in_rotated, None).sum(-1, keepdim=True) * d.abs() * (3 * eps + 60 * U)
    assert ((grad_x.double() - grad.double() @ weight).abs() <= bound).all()


def test_gradients_of_float32_against_float64() -> None:
    x = activations(5, 40).requires_grad_()
    qweight, scale = quantized(64, 40)
    bias = torch.randn(64, requires_grad=True)
    grad = torch.randn(5, 64)
    linear(x, qweight, scale, None, bias, 6.0).backward(grad)
    weight = qweight.double() * scale.double()[:, None]
    # A sum of 64 products: 64 roundings of its size, one more for the dequantized weight.
    bound = 65 * U * (grad.double().abs() @ weight.abs())
    assert ((x.grad - grad.double() @ weight).abs() <= bound).all()
    assert ((bias.grad - grad.double().sum(0)).abs() <= 5 * U * grad.abs().sum(0)).all()


@pytest.mark.parametrize("name", ["batched_linear", "packed_batched_linear"])
@every_dtype
@every_rotation
def test_gradients_of_experts(name: str, dtype: torch.dtype, rotated: bool) -> None:
    x, weight, scale, d, bias, *rest = args = arguments(name, dtype, rotated=rotated)
    x.requires_grad_()
    bias.requires_grad_()
    y = OPS[name](*args)
    grad = torch.randn_like(y)
    y.backward(grad)
    if not rotated:
        assert_bitwise(x.grad, torch.bmm(grad, float_weight(name, args, dtype)))
    for b in range(2):
        each, alone = x[b].detach().requires_grad_(), bias[b].detach().requires_grad_()
        its_d = reference.of_each(d, b)
        OPS[name.replace("batched_", "")](each, weight[b], scale[b], its_d, alone, *rest).backward(grad[b])
        assert_bitwise(bias.grad[b], alone.grad)
        # By a product of all experts or of one: sums in another order.
        torch.testing.assert_close(
            x.grad[b], each.grad, rtol=0, atol=float(8 * torch.finfo(dtype).eps * x.grad.abs().max())
        )


@pytest.mark.parametrize("shape", [(48,), (4, 48), (2, 3, 48), (0, 48)])
@pytest.mark.parametrize("name", ["packed_linear", "weight_only_linear", "packed_weight_only_linear"])
@every_dtype
def test_gradients_are_those_of_linear(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """However the weight is laid out and x is taken: the formula has only the weight and the scales in it."""
    d = factors(48)
    qweight, scale = quantized(6, 48, d=d)
    weight = packing.pack_weight(qweight) if "packed" in name else qweight
    rest = [] if "weight_only" in name else [6.0]
    x, bias = activations(*shape, dtype=dtype).requires_grad_(), torch.randn(6, dtype=dtype, requires_grad=True)
    y = OPS[name](x, weight, scale, d, bias, *rest)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, bias), grad)
    expected = torch.autograd.grad(linear(x, qweight, scale, d, bias, 6.0), (x, bias), grad)
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise(one, other)


@every_differentiable_op
def test_gradient_of_one_value_at_a_time(name: str) -> None:
    """The column of the Jacobian that `gradcheck` would probe, by formula: a step function has no slope."""
    args = changing(name, arguments(name, sizes=(2, 5, 3), rotated=False), bias=None)
    x = args[0]
    jacobian = torch.autograd.functional.jacobian(lambda each: OPS[name](each, *args[1:]), x)
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
    args = arguments(name, torch.float16)
    x, bias = args[0], torch.randn(args[2].shape).half().to(bias_dtype).requires_grad_()
    y = OPS[name](*changing(name, args, bias=bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is None
    assert bias.grad.dtype == bias_dtype
    # float16 values of this size: a sum of 4 has less than 24 bits, so float32 holds it exactly.
    assert torch.equal(bias.grad, grad.double().sum(-2).to(bias_dtype))


@every_differentiable_op
def test_weight_and_scale_get_no_gradient(name: str) -> None:
    args = arguments(name)
    floats = [each for each in args if isinstance(each, Tensor) and each.is_floating_point()]
    for each in floats:
        each.requires_grad_()
    OPS[name](*args).sum().backward()
    # x comes first and the bias last.
    assert [each.grad is not None for each in floats] == [True, *[False] * (len(floats) - 2), True]
    assert not OPS[name](*(each.detach() if isinstance(each, Tensor) else each for each in args)).requires_grad


@every_differentiable_op
def test_second_derivative(name: str) -> None:
    """grad_x is linear in grad_y, so a gradient penalty trains what comes after the layer."""
    args = changing(name, arguments(name), bias=None)
    x = args[0].requires_grad_()
    y = OPS[name](*args)
    grad = torch.randn_like(y, requires_grad=True)
    (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (actual,) = torch.autograd.grad(grad_x, grad, torch.ones_like(grad_x))
    weight = float_weight(name, args, torch.float32)
    # A sum of 48 values, in any order, and of 16 by the rotation.
    expected, size = weight.sum(-1), weight.abs().sum(-1) * 16
    assert ((actual - expected[..., None, :]).abs() <= 100 * U * size[..., None, :]).all()


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
    args = arguments(name, rotated=False)
    x, bias = args[0].requires_grad_(), torch.randn(args[2].shape, requires_grad=True)
    args = changing(name, args, bias=bias)
    with torch.autocast("cpu", dtype=dtype):
        y = OPS[name](*args)
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
    x, weight, *_ = args
    long = torch.zeros(*weight.shape[: -3 if "packed" in name else -1], MAX_K + 1, dtype=torch.int8)
    if "packed" in name:
        groups = packing.packed_shape(1, MAX_K + 1)[1]
        long = torch.full((*weight.shape[:-3], groups, 16, 4), 128, dtype=torch.uint8)
    x = torch.zeros(*x.shape[:-1], MAX_K + 1)
    return changing(name, args, x=x, qweight=long, packed=long, d=None)


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
    "wrong K": (_replace("x", lambda x: x[..., :-1]), ["x is [", "47]", "qweight [", "48]", "K]"]),
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
    "wrong K": (_replace("x", lambda x: torch.cat([x, x], -1)), ["x is [", "96]", "packed [", "K]"]),
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
BAD_THRESHOLDS: BadCalls = {
    "negative threshold": (_replace("threshold", lambda _: -1.0), ["threshold is -1.0", "finite number >= "]),
    "NaN threshold": (_replace("threshold", lambda _: math.nan), ["threshold is nan", "finite"]),
    "infinite threshold": (_replace("threshold", lambda _: math.inf), ["threshold is inf", "finite"]),
}
BAD_ROTATIONS: BadCalls = {
    "float64 d": (_replace("d", lambda d: d.double()), ["d is torch.float64 [", "give float32 [48]", "None"]),
    "d of other inputs": (_replace("d", lambda d: d[..., :-1]), ["d is torch.float32 [", "47]", "give float32 [48]"]),
    "d of one dimension too many": (_replace("d", lambda d: d[None]), ["d is torch.float32 [1, ", "give float32 [48]"]),
}
# The column policy's is absolute.
BAD_MEANS: BadCalls = {
    "threshold below 1": (_replace("threshold", lambda _: 0.999), ["threshold is 0.999", "finite number >= 1", "or 0"]),
}
BAD_EXPERTS: BadCalls = {
    "2-D x": (_replace("x", lambda x: x[0]), ["x is [4, 48]", "[B, M, K]", "[B, N, K]"]),
    "d of another number of experts": (
        _replace("d", lambda d: d[:1]),
        ["d is torch.float32 [1, 48]", "[48] or [2, 48]"],
    ),
    "other number of experts": (_replace("x", lambda x: x[:1]), ["x is [1, 4, 48]", "[2, "]),
}


def bad_calls(name: str) -> BadCalls:
    """The calls that an operator must refuse, and what it says."""
    several = "pair" in name or "triple" in name
    calls = BAD_CALLS | (BAD_SEVERAL if several else BAD_PACKED if "packed" in name else BAD_WEIGHTS)
    if "weight_only" not in name:
        calls = calls | BAD_THRESHOLDS
    if name != "column_linear":
        calls = calls | BAD_ROTATIONS | (BAD_MEANS if "weight_only" not in name else {})
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
@pytest.mark.parametrize(("name", "case"), [call for call in ALL_BAD_CALLS if call[0] != "column_linear"])
def test_the_kernel_refuses_what_its_definition_refuses(name: str, case: str) -> None:
    """Called directly, without tracing: it would read or write beyond its arguments."""
    change, _ = bad_calls(name)[case]
    args = change(name, arguments(name))
    with pytest.raises(RuntimeError) as caught:
        OPS[name](*args)
    (argument,) = [
        schema.name
        for schema, bad, right in zip(
            getattr(torch.ops.int8compile, name).default._schema.arguments, args, arguments(name), strict=True
        )
        if not _alike(bad, right) and not (case == "K beyond int32" and schema.name != "x")
    ]
    message = str(caught.value)
    # Operators with and without gradients are one function of the kernel.
    assert re.search(rf"int8compile::{name.removesuffix('_no_grad')}(_no_grad)?: ", message)
    # That of a number of outputs shows in its sum, or in the panels.
    assert argument in message or (argument == "n0" and re.search("outputs|packed", message.partition(": ")[2]))


def _alike(bad: Any, right: Any) -> bool:
    if isinstance(right, Tensor):
        return isinstance(bad, Tensor) and (bad.dtype, bad.shape) == (right.dtype, right.shape)
    return bool(bad == right)


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
    qweight, scale = quantize_weight(x.clone(), None)
    # Q is 32639. Each factor is 127/127 with one rounding of 1/127 or 1/32639, and there are two products.
    y = operator(name, by)(x, qweight, scale, None, None, *([] if "weight_only" in name else [6.0]))
    torch.testing.assert_close(y, torch.full_like(y, 2.0), rtol=5 * U, atol=0)


@every_implementation
def test_threshold_of_minus_zero_is_zero(by: str) -> None:
    """-0.0 is 0, not a negative number."""
    linear = operator("linear", by)
    *args, _ = arguments("linear")
    assert_bitwise(linear(*args, -0.0), linear(*args, 0.0))


@given(SEEDS, st.booleans(), st.sampled_from([0.0, 6.0]))
@every_implementation
def test_negating_x_negates_the_product(by: str, seed: int, rotated: bool, threshold: float) -> None:
    """Symmetric grids and half-to-even rounding: no sign is treated differently, though q0 reaches -128 alone."""
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
    """A power of two changes nothing but the exponent: thresholds have no unit, unlike the column policy's."""
    linear = operator("linear", by)
    torch.manual_seed(seed)
    x, qweight, scale, d, *_ = arguments("linear", rotated=rotated)
    y = linear(x, qweight, scale, d, None, 6.0)
    assert_bitwise(linear(x * 2.0**exponent, qweight, scale, d, None, 6.0), y * 2.0**exponent)


# Under torch.func


@every_differentiable_op
def test_forward_mode_is_that_of_the_float_weight(name: str) -> None:
    """Along x and the bias at once; and what `jvp` gives along x is what `vjp` has for it."""
    args = arguments(name)
    x, bias = args[0], torch.randn(args[2].shape)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return OPS[name](*changing(name, args, x=x, bias=bias))

    along_x, along_bias = torch.randn_like(x), torch.randn_like(bias)
    y, tangent = torch.func.jvp(call, (x, bias), (along_x, along_bias))
    assert_bitwise(y, call(x, bias))
    weight = float_weight(name, args, torch.float32)
    expected = along_x @ weight.mT + (along_bias.unsqueeze(-2) if bias.dim() > 1 else along_bias)
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(y)
    (grad_x,) = torch.func.vjp(lambda x: call(x, bias), x)[1](grad)
    torch.testing.assert_close(grad_x, grad @ weight, rtol=1e-4, atol=1e-4)


@every_differentiable_op
def test_vmap_is_a_loop(name: str) -> None:
    args = arguments(name)
    x = torch.stack([args[0], 3 * args[0]])
    y = torch.func.vmap(lambda x: OPS[name](*changing(name, args, x=x)))(x)
    for each_x, each_y in zip(x, y, strict=True):
        assert_bitwise(each_y, OPS[name](*changing(name, args, x=each_x)))
