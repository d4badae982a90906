"""Derivatives of the operators, autocast and torch.func."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import int8compile
from int8compile.ops import column_linear, dequantize_weight, linear, packing, reference, unpack_weight

pytest.importorskip("hypothesis")

from tests.helpers.operators import (
    DIFFERENTIABLE,
    OPS,
    REFUSED,
    U,
    activations,
    arguments,
    assert_bitwise,
    changing,
    every_dtype,
    every_op,
    every_rotation,
    factors,
    quantized,
    tensors,
)

every_differentiable_op = pytest.mark.parametrize("name", DIFFERENTIABLE)


def float_weight(name: str, args: list[Any], dtype: torch.dtype) -> Tensor:
    """Return the [..., N, K] float weight that an operator's int8 weight represents."""
    x, weight, scale, d, *_ = args
    qweight = unpack_weight(weight, scale.shape[-1], x.shape[-1]) if "packed" in name else weight
    return dequantize_weight(qweight, scale, None if name == "column_linear" else d, dtype)


@pytest.mark.parametrize("shape", [(48,), (4, 48), (2, 3, 48), (0, 48)])
@every_dtype
@pytest.mark.parametrize("op", [linear, column_linear])
def test_gradients_are_those_of_the_float_formula(dtype: torch.dtype, op: Any, shape: tuple[int, ...]) -> None:
    """`grad_x = grad_y @ W` and `grad_bias = sum(grad_y)`; W is the dequantized weight in x's dtype, not rotated."""
    qweight, scale = quantized(6, 48)
    weight = dequantize_weight(qweight, scale, None, dtype)
    x = activations(*shape, dtype=dtype).requires_grad_()
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    y = op(x, qweight, scale, *([] if op is column_linear else [None]), bias, 6.0)
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    float_x, float_bias = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), grad)
    assert_bitwise(grad_x, float_x)
    # PyTorch sums the bias gradient in any order; this operator sums in float32 and rounds once. Both are off by at
    # most (rows - 1) float32 roundings of the sum of magnitudes, plus half an ulp of the dtype each.
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
    # The weight and its product are rounded to x's dtype; the product's sum and the rotation are rounded to float32.
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
    # A sum of 64 products has 64 roundings of its size; the dequantized weight adds one.
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
        # One product of all experts and a product per expert sum in different orders.
        torch.testing.assert_close(
            x.grad[b], each.grad, rtol=0, atol=float(8 * torch.finfo(dtype).eps * x.grad.abs().max())
        )


@pytest.mark.parametrize("shape", [(48,), (4, 48), (2, 3, 48), (0, 48)])
@pytest.mark.parametrize("name", ["packed_linear", "weight_only_linear", "packed_weight_only_linear"])
@every_dtype
def test_gradients_are_those_of_linear(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The gradient depends on the weight and its scales, not on the weight's layout or how x is quantized."""
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
    """The Jacobian follows the formula. `gradcheck` cannot probe it, because a step function has no slope."""
    args = changing(name, arguments(name, sizes=(2, 5, 3), rotated=False), bias=None)
    x = args[0]
    jacobian = torch.autograd.functional.jacobian(lambda each: OPS[name](each, *args[1:]), x)
    weight = float_weight(name, args, torch.float32)
    expected = torch.zeros_like(jacobian)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).reshape(-1, x.dim() - 1).tolist():
        # Output n of a row depends only on input k of the same row.
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
    # float16 values of this size: a sum of 4 has fewer than 24 bits, so float32 holds it exactly.
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
    """grad_x is linear in grad_y, so a gradient penalty trains the layers after this one."""
    args = changing(name, arguments(name), bias=None)
    x = args[0].requires_grad_()
    y = OPS[name](*args)
    grad = torch.randn_like(y, requires_grad=True)
    (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (actual,) = torch.autograd.grad(grad_x, grad, torch.ones_like(grad_x))
    weight = float_weight(name, args, torch.float32)
    # A sum of 48 values in any order, and of 16 values by the rotation.
    expected, size = weight.sum(-1), weight.abs().sum(-1) * 16
    assert ((actual - expected[..., None, :]).abs() <= 100 * U * size[..., None, :]).all()


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_op
def test_autocast_casts_x_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """The scales stay float32: the operator refuses bfloat16 scales, which would make each weight 0.4 % wrong."""
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
    """The cast is traced into the graph, forward and backward, with the results of eager mode."""
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
    """Autocast of `F.linear` leaves integers and float64 alone, so the operator still refuses them."""
    x, *rest = arguments(name)
    fake = FakeTensorMode()
    fakes = [fake.from_tensor(each) if isinstance(each, Tensor) else each for each in [x.to(dtype), *rest]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with fake, pytest.raises(int8compile.InputError, match="x is torch"):
            OPS[name](*fakes)
        with pytest.raises(REFUSED, match=r"x (is torch|must be float32)"):
            OPS[name](x.to(dtype), *rest)


# Under torch.func


@every_differentiable_op
def test_forward_mode_is_that_of_the_float_weight(name: str) -> None:
    """Tangents of x and the bias are taken at once, and `jvp` along x agrees with `vjp`."""
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
