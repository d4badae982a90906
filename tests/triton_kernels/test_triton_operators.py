"""The operators on GPUs, with kernels in Triton's interpreter: they compute the definition for any strides.

TRITON_INTERPRET=1 python -m pytest tests/triton_kernels/test_triton_operators.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from int8compile.ops import quantized, reference
from int8compile.ops.linears import grouped_by_definition
from int8compile.triton_kernels import operators
from int8compile.triton_kernels.tables import ARCHITECTURES
from tests.helpers.triton_problems import Problem, assert_equal

# The interpreter computes with NumPy, which warns about operations on NaN.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def _the_cpu_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_index", lambda tensor: 0)
    monkeypatch.setattr(operators, "_on", lambda device: operators._HERE)
    monkeypatch.setattr(operators, "architecture", lambda device: ARCHITECTURES["sm_90"])
    monkeypatch.setattr(operators, "multiprocessors", lambda device: 8)


def call(name: str, *args: Any) -> Any:
    return operators._OPERATORS[name](*args)


def forms(x: Tensor) -> list[Tensor]:
    """Return tensors with the same elements and other layouts in memory."""
    wide = torch.cat([x, x], dim=-1)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    return [x, wide[..., : x.shape[-1]], shifted, x.repeat_interleave(2, dim=-1)[..., ::2]]


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("shape", [(1, 96), (1, 1, 384), (2, 9, 147), (96,)])
def test_linear(shape: tuple[int, ...], threshold: float) -> None:
    problem = Problem.random(math.prod(shape[:-1]), 40, shape[-1], torch.float16, threshold=threshold)
    expected = problem.expected().to(torch.float16).view(*shape[:-1], 40)
    for x in forms(problem.x.view(shape)):
        y = call("linear", x, problem.qweight, problem.scale, problem.d, problem.bias, threshold)
        assert_equal(y, expected)


def test_weights_that_lie_anywhere() -> None:
    """Scales, biases, d and weights may have strides, and may begin between multiples of 16 bytes."""
    problem = Problem.random(20, 48, 96, torch.float16)
    expected = problem.expected().to(torch.float16)
    assert problem.d is not None
    assert problem.bias is not None
    weights = [*forms(problem.qweight)[1:], problem.qweight.mT.contiguous().mT]
    for weight, *rest in zip(weights, *map(forms, (problem.scale, problem.d, problem.bias)), strict=True):
        assert_equal(call("linear", problem.x, weight, *rest, 6.0), expected)


def test_several_products_of_one_activation() -> None:
    """The counters of split sums are zero again after each product."""
    problem = Problem.random(20, 128, 1024, torch.float16)
    made = call("quantize_rows", problem.x, problem.d, 6.0)
    rest = (problem.qweight, problem.scale, problem.bias, quantized.NONE, 0, 0, torch.float32)
    for _ in range(3):
        assert_equal(call("quantized_linear", *made, *rest), problem.expected())
        assert not made[2].any()


@pytest.mark.parametrize("m", [1, 5])
def test_some_rows_of_quantized_activations(m: int) -> None:
    """Their digits and bits are not contiguous."""
    problem = Problem.random(9, 40, 256, torch.float16)
    q, rows, counters = call("quantize_rows", problem.x, problem.d, 6.0)
    rest = (problem.qweight, problem.scale, problem.bias, quantized.NONE, 0, 0, torch.float32)
    assert_equal(
        call("quantized_linear", q[:, 3 : 3 + m], rows[:, 3 : 3 + m], counters, *rest), problem.expected()[3 : 3 + m]
    )


@pytest.mark.parametrize("kind", range(quantized.LAYER + 1))
@pytest.mark.parametrize("residual", [False, True])
def test_norms(kind: int, residual: bool) -> None:
    """The sum is exact; the quantized norm is within a sum's reordering and one rounding of x's dtype."""
    x, added = torch.randn(2, 2, 192, dtype=torch.float16), torch.randn(2, 2, 192, dtype=torch.float16)
    weight, bias, d = torch.rand(192) + 0.5, torch.randn(192), reference.signs(192, x.device)
    rest = (weight, bias if kind == quantized.LAYER else None, d, kind, 1e-6, 6.0)
    first = call("norm_quantize_rows", x, added if residual else None, *rest)
    expected = quantized.NormQuantizeRows.implementation(x, added if residual else None, *rest)
    assert_equal(first[0], expected[0])
    assert [each.shape for each in first] == [each.shape for each in expected]
    normed = quantized.norm(expected[0] if residual else x, *rest[:2], *rest[3:5]).abs().amax(dim=-1).view(-1, 1)
    step = torch.maximum(*(made[2][0].view(torch.float32) for made in (first, expected)))[:, None]
    # A rotated element adds 64 values, each of which float16 may round to a neighbour; half a step each comes on top.
    apart = (values(first[1:]) - values(expected[1:])).abs()
    assert bool((apart <= 64 * torch.finfo(torch.float16).eps * normed + 1.001 * step).all())
    for left, right in zip(forms(x), reversed(forms(added)), strict=True):
        again = call("norm_quantize_rows", left, right if residual else None, *rest)
        for one, other in zip(first[:1] + first[2:], again[:1] + again[2:], strict=True):
            assert_equal(other, one)
        assert_equal(values(again[1:]), values(first[1:]))


def values(made: tuple[Tensor, ...]) -> Tensor:
    """Return the values of quantized activations."""
    q, rows, _ = made
    return (256 * quantized.counted(q, rows).float() + q[0]) * rows[0].view(torch.float32)[:, None]


@pytest.mark.parametrize(
    ("ends", "shared"), [([3, 3, 5, 9], False), ([0, 0, 0, 9], True), ([1, 2, 3, 4], False), ([0, 0, 0, 0], True)]
)
def test_grouped(ends: list[int], shared: bool) -> None:
    """Experts may have no rows, and rows without an expert are zeros."""
    x, *weights = experts(9, shared)
    expected = grouped_by_definition(x, *weights, torch.tensor(ends), 6.0)
    dtype = torch.int32 if shared else torch.int64
    assert_equal(call("grouped_linear", forms(x)[shared], *weights, torch.tensor(ends, dtype=dtype), 6.0), expected)


@pytest.mark.parametrize("ends", [[3, 2, 5, 9], [3, 5, 9, 10], [-1, 2, 3, 4]])
def test_groups_that_do_not_ascend(ends: list[int]) -> None:
    x, *weights = experts(9, shared=False)
    assert call("grouped_linear", x, *weights, torch.tensor(ends), 6.0).isnan().all()


@pytest.mark.parametrize(("m", "shared", "bias"), [(1, True, False), (3, False, True), (6, True, True)])
def test_batched(m: int, shared: bool, bias: bool) -> None:
    x, *weights = experts(4 * m, shared)
    x, addend = x.view(4, m, -1), torch.randn(4, 40) if bias else None
    expected = reference.batched_linear(x, *weights, addend, 6.0)
    assert_equal(call("batched_linear", forms(x)[m % 4], *weights, addend, 6.0), expected)


def experts(rows: int, shared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x [rows, 96] with outliers in some rows, and four weights of 40 outputs, their scales and d."""
    problems = [Problem.random(rows, 40, 96, torch.float16) for _ in range(4)]
    d = [problem.d for problem in problems if problem.d is not None]
    qweight, scale = torch.stack([each.qweight for each in problems]), torch.stack([each.scale for each in problems])
    return problems[0].x, qweight, scale, d[0] if shared else torch.stack(d)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64)])
def test_sizes_of_zero(shape: tuple[int, ...]) -> None:
    x, bias = torch.randn(shape), torch.randn(5)
    weight = torch.ones(5, shape[-1], dtype=torch.int8), torch.ones(5)
    assert_equal(call("linear", x, *weight, None, bias, 6.0), reference.linear(x, *weight, None, bias, 6.0))
    made = call("norm_quantize_rows", x, None, None, None, None, quantized.RMS, 1e-6, 6.0)
    expected = quantized.NormQuantizeRows.implementation(x, None, None, None, None, quantized.RMS, 1e-6, 6.0)
    assert [each.shape for each in made] == [each.shape for each in expected]
    several = torch.ones(2, 5, shape[-1], dtype=torch.int8), torch.ones(2, 5)
    if x.dim() == 3:
        assert call("batched_linear", x, *several, None, None, 6.0).shape == (2, 0, 5)
    else:
        ends = torch.tensor([0, len(x)])
        expected = grouped_by_definition(x, *several, None, ends, 6.0)
        assert_equal(call("grouped_linear", x, *several, None, ends, 6.0), expected)
