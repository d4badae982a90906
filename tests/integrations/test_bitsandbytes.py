"""The column policy against bitsandbytes 0.50, whose LLM.int8() it reproduces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from int8compile.ops import column_linear, quantize_weight

bnb = pytest.importorskip("bitsandbytes")

# Relative error of one rounding in float32.
U = 2.0**-24
# bitsandbytes 0.50 multiplies its integer product by 6.200124e-05. 1/127**2 is 6.2000124e-05: a zero is missing, so its
# int8 part is 1.8e-5 too large.
CONSTANT_ERROR = 6.200124e-05 * 127**2 - 1
SHAPES = [(64, 32, 8), (256, 128, 32), (768, 96, 17), (1024, 128, 24), (300, 64, 1)]  # K, N, M
every_shape = pytest.mark.parametrize("shape", SHAPES)


def representable(x: Tensor) -> Tensor:
    """Return values that float16 holds: bitsandbytes casts weights and activations to float16 before quantizing."""
    return x.half().float()


def case(seed: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return x with outliers in three columns, a weight that keeps its variance, and a bias."""
    torch.manual_seed(seed)
    K, N, M = shape
    x = torch.randn(M, K)
    columns = torch.randperm(K)[:3]
    x[torch.randint(M, (3,)), columns] = torch.tensor([20.0, -35.0, 60.0])
    return x, representable(torch.randn(N, K) / math.sqrt(K)), torch.randn(N)


def bitsandbytes_layer(weight: Tensor, bias: Tensor, threshold: float = 6.0) -> Any:
    """Return bitsandbytes' layer, which quantizes on moving to a device.

    `eval`, because in training mode it keeps activations in float on a CPU.
    """
    N, K = weight.shape
    layer = bnb.nn.Linear8bitLt(K, N, threshold=threshold, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu").eval()


def exact_llm_int8(x: Tensor, qweight: Tensor, weight_absmax: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute LLM.int8() in float64, except for q, which the specification computes in float32.

    Returns:
        The product, its int8 part without the bias, and the sum of the magnitudes of all addends.
    """
    stands_out = x.abs() >= 6.0
    columns = stands_out.any(dim=0)
    absmax = x.masked_fill(stands_out, 0).abs().amax(dim=1, keepdim=True)
    q = (x * (absmax.reciprocal() * 127)).round().double()
    q[:, columns] = 0
    scales = absmax.double() / 127 * (weight_absmax.double() / 127)
    in_int8 = (q @ qweight.double().T) * scales
    w = qweight[:, columns].double() * (weight_absmax.double() / 127)[:, None]
    outlier = x[:, columns].double()
    size = (q.abs() @ qweight.double().abs().T) * scales + 2 * outlier.abs() @ w.abs().T + bias.abs()
    return in_int8 + outlier @ w.T + bias, in_int8, size


@every_shape
def test_weights_are_quantized_the_same(shape: tuple[int, int, int]) -> None:
    _, weight, bias = case(0, shape)
    layer = bitsandbytes_layer(weight, bias)
    qweight, scale = quantize_weight(weight, None)
    assert torch.equal(qweight, layer.weight.CB)
    assert torch.equal(scale, layer.weight.SCB / 127)


def test_row_statistic_is_the_same() -> None:
    """Row 1 makes row 0's 5.5 part of an outlier column; both implementations still count it in row 0's scale."""
    x = torch.tensor([[2.0, -1.0, 5.5], [0.5, 1.0, 7.0]])
    q, statistic, columns = bnb.functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert q.tolist() == [[46, -23, 0], [64, 127, 0]]
    assert statistic.tolist() == [5.5, 1.0]
    assert columns.tolist() == [2]
    y = column_linear(x, *quantize_weight(torch.eye(3), None), None, 6.0)
    # The product with a unit matrix: q times the step of each row, and x in the outlier column.
    torch.testing.assert_close(y[:, :2], q[:, :2] * (statistic[:, None] / 127), rtol=1e-6, atol=0)
    assert torch.equal(y[:, 2], x[:, 2])


@every_shape
@pytest.mark.parametrize("seed", range(4))
def test_equal_up_to_rounding_when_float16_holds_the_input(shape: tuple[int, int, int], seed: int) -> None:
    """The two differ only by float32 rounding and by the zero missing from bitsandbytes' constant."""
    x, weight, bias = case(seed, shape)
    x = representable(x)
    qweight, scale = quantize_weight(weight, None)
    y = column_linear(x, qweight, scale, bias, 6.0)
    layer = bitsandbytes_layer(weight, bias)
    theirs = layer(x)
    expected, in_int8, size = exact_llm_int8(x, qweight, layer.state.SCB, bias)
    # Ours: a float32 sum of three outlier columns, two roundings of the scales, and those of the affine part.
    ours_off = 8 * U * size
    # Theirs: a float32 sum of three outlier columns, and about 6 roundings on the way.
    theirs_off = 10 * U * size + CONSTANT_ERROR * in_int8.abs()
    assert ((y - expected).abs() <= ours_off).all()
    assert ((theirs - expected).abs() <= theirs_off).all()
    # Their int8 part has the error of the constant; without it they are as close as we are.
    assert ((theirs - CONSTANT_ERROR * in_int8 - expected).abs() <= 10 * U * size).all()


@every_shape
@pytest.mark.parametrize("seed", range(6))
def test_close_for_any_input(shape: tuple[int, int, int], seed: int) -> None:
    """Within 5e-3, and always nearer to exact LLM.int8(): rounding to float16 moves some of their q by one."""
    x, weight, bias = case(seed, shape)
    qweight, scale = quantize_weight(weight, None)
    y = column_linear(x, qweight, scale, bias, 6.0)
    layer = bitsandbytes_layer(weight, bias)
    theirs = layer(x)
    product = x.double() @ weight.double().T + bias
    assert (y - theirs).norm() <= 5e-3 * product.norm()
    expected, _, _ = exact_llm_int8(x, qweight, layer.state.SCB, bias)
    assert (y - expected).norm() < (theirs - expected).norm()


def test_not_farther_from_the_float_product() -> None:
    """The average over 60 layers counts; a single layer proves nothing.

    Rounding to int8 makes both 0.7 % wrong. Their float16 moves about one q in a hundred to the other side of a tie,
    which changes a layer's error by up to 2 %, up or down. So the mean excess of our squared error over theirs must not
    be above 0 by more than 3 times its standard error.
    """
    excess = []
    for seed in range(20):
        for shape in SHAPES[:3]:
            x, weight, bias = case(100 + seed, shape)
            product = x.double() @ weight.double().T + bias
            y = column_linear(x, *quantize_weight(weight, None), bias, 6.0)
            theirs = bitsandbytes_layer(weight, bias)(x)
            excess.append(float((y - product).square().sum() / (theirs - product).square().sum()) - 1)
    values = torch.tensor(excess)
    assert values.mean() <= 3 * values.std() / math.sqrt(len(excess))


@pytest.mark.parametrize("seed", range(4))
def test_nearer_to_float_where_float16_runs_out(seed: int) -> None:
    """float16 has steps of 6e-8 near zero and ends at 65504."""
    x, weight, bias = case(seed, SHAPES[1])
    quantized = quantize_weight(weight, None)
    layer = bitsandbytes_layer(weight, torch.zeros_like(bias))
    small = x * 1e-7
    product = small.double() @ weight.double().T
    y = column_linear(small, *quantized, None, 6.0)
    assert (y - product).norm() < (layer(small) - product).norm() / 2
    x[0, 0] = 1e5
    y = column_linear(x, *quantized, None, 6.0)
    product = x.double() @ weight.double().T
    assert y.isfinite().all()
    # Outlier columns have only the weight's half step, at most 1/254 of its absmax.
    half_step = weight.double().abs().amax(1) / 254
    assert ((y - product)[0].abs() <= half_step * x[0].double().abs().sum() * 2).all()


@every_shape
def test_one_value_changes_the_same_rows(shape: tuple[int, int, int]) -> None:
    """The column policy depends on the batch as bitsandbytes does."""
    K, N, _ = shape
    x = representable(torch.randn(4, K).clamp(-3, 3))
    weight = representable(torch.randn(N, K) / math.sqrt(K))
    quantized, layer = quantize_weight(weight, None), bitsandbytes_layer(weight, torch.zeros(N))
    ours, theirs = column_linear(x, *quantized, None, 6.0), layer(x)
    x[3, 5] = 50.0
    assert (column_linear(x, *quantized, None, 6.0)[:3] != ours[:3]).any(dim=1).all()
    assert (layer(x)[:3] != theirs[:3]).any(dim=1).all()


@pytest.mark.parametrize("seed", range(2))
def test_gradient_is_the_same(seed: int) -> None:
    x, weight, bias = case(seed, SHAPES[1])
    qweight, scale = quantize_weight(weight, None)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = column_linear(ours, qweight, scale, bias, 6.0)
    grad = torch.randn_like(y)
    y.backward(grad)
    bitsandbytes_layer(weight, bias)(theirs).backward(grad)
    # Two sums of N = 128 products, each rounded N times, of weights rounded twice.
    bound = 2 * 130 * U * (grad.abs() @ (qweight * scale[:, None]).abs())
    assert ((ours.grad - theirs.grad).abs() <= bound).all()


def test_no_split() -> None:
    """With threshold 0, both are plain vector-wise int8."""
    x, weight, bias = case(0, SHAPES[1])
    x = representable(x)
    y = column_linear(x, *quantize_weight(weight, None), bias, 0.0)
    theirs = bitsandbytes_layer(weight, bias, threshold=0.0)(x)
    in_int8 = (y - bias).abs()
    assert ((y - theirs).abs() <= CONSTANT_ERROR * in_int8 + 12 * U * (in_int8 + bias.abs())).all()
