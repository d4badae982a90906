"""`quantize_rows` and `quantized_linear`, which define the results of the Triton kernels (tier 1)."""

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
from int8compile.ops import input_scales, portable, quantize_weight, quantized, reference, rotation_of, rotation_size

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def rotation_for(weight: Tensor) -> Tensor | None:
    return rotation_of(input_scales([weight])) if rotation_size(weight.shape[-1]) > 1 else None


def in_two_steps(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    return ops.quantized_linear(
        *ops.quantize_rows(x, d, threshold), qweight, scale, bias, quantized.NONE, 0, 0, x.dtype
    )


@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from([1, 3, 16, 32, 128]), DTYPES,
       st.sampled_from([0.0, 1.0, 6.0, 12.0]), st.integers(0, 2**31))  # fmt: skip
def test_two_steps_are_linear(m: int, c: int, b: int, dtype: torch.dtype, threshold: float, seed: int) -> None:
    """The two steps give the bits of `linear`, and so does their decomposition into PyTorch operators."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, b * c, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.05, 300 * x, x).to(dtype)
    x[0, 0] = math.nan if m > 1 else 1
    weight = torch.randn(7, b * c, generator=generator)
    d = rotation_for(weight)
    qweight, scale = quantize_weight(weight, d)
    bias = torch.randn(7, generator=generator)
    expected = reference.linear(x, qweight, scale, d, bias, threshold)
    same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(in_two_steps(x, qweight, scale, d, bias, threshold), expected, **same)
    alone = portable.quantized_linear(*quantized.row_digits(x, d, threshold), qweight, scale, bias, x)
    torch.testing.assert_close(alone, expected, **same)


@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from([3, 32, 128]), DTYPES, st.integers(0, 2**31))
def test_weight_only_products_of_digits(m: int, c: int, b: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, b * c, generator=generator), torch.randn(7, b * c, generator=generator)
    x[0, 0] = math.inf if m > 1 else 1e4
    d = rotation_for(weight)
    given = (x.to(dtype), *quantize_weight(weight, d), d, torch.randn(7, generator=generator))
    given[1][2] = -128
    expected = reference.weight_only_linear(*given)
    torch.testing.assert_close(portable.weight_only_by_digits(*given), expected, rtol=0, atol=0, equal_nan=True)


def test_second_digits_count_in_blocks_that_say_so() -> None:
    """A kernel need not write second digits in other blocks."""
    x = torch.randn(6, 4600)
    x[2, 5] = x[2, 4500] = 1000
    x[3, 31 * 128] = 1000
    x[4] = math.inf
    q, rows, counters = ops.quantize_rows(x, None, 12.0)
    assert rows[1:].tolist() == [[0, 0, 1, -(2**31), 0, 0], [0, 0, 1 << (4500 // 128 - 32), 0, 0, 0]]
    assert rows[0].view(torch.float32).isnan().tolist() == [False] * 4 + [True, False]
    qweight, scale = quantize_weight(torch.randn(7, 4600), None)
    arguments = (rows, counters, qweight, scale, None, quantized.NONE, 0, 0, torch.float32)
    expected = ops.quantized_linear(q, *arguments)
    kept = q[1, 2, :128].clone(), q[1, 2, 35 * 128 :].clone(), q[1, 3, 31 * 128 : 32 * 128].clone()
    q[1] = 85
    q[1, 2, :128], q[1, 2, 35 * 128 :], q[1, 3, 31 * 128 : 32 * 128] = kept
    torch.testing.assert_close(ops.quantized_linear(q, *arguments), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    """Norms agree with PyTorch and transformers; their result is then quantized as usual."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual, weight, bias = (torch.randn(*size, 96, dtype=dtype) for size in ((2, 3), (2, 3), (), ()))
    h = x + residual
    llama, gemma = LlamaRMSNorm(96, 1e-5), GemmaRMSNorm(96, 1e-5)
    llama.weight.data, gemma.weight.data = weight, weight
    exact = h.to(torch.float32)
    expected = {
        quantized.RMS: torch.nn.functional.rms_norm(exact, (96,), weight.to(torch.float32), 1e-5).to(dtype),
        quantized.RMS_ROUNDED: llama(h),
        quantized.RMS_PLUS_ONE: gemma(h),
        quantized.LAYER: torch.nn.functional.layer_norm(exact, (96,), weight.float(), bias.float(), 1e-5).to(dtype),
    }
    # Different summation orders differ by a few float32 ulps of values up to about 10; one more rounding follows.
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(torch.float32).eps}
    d = rotation_of(torch.ones(96))
    for kind, normalized in expected.items():
        given_bias = bias if kind == quantized.LAYER else None
        y = quantized.norm(h, weight, given_bias, kind, 1e-5)
        torch.testing.assert_close(y, normalized, **close)
        added, *made = ops.norm_quantize_rows(x, residual, weight, given_bias, d, kind, 1e-5, 12.0)
        assert torch.equal(added, h)
        for part, alone in zip(made, ops.quantize_rows(y, d, 12.0), strict=True):
            assert torch.equal(part, alone)
        without, *made = ops.norm_quantize_rows(h, None, weight, given_bias, d, kind, 1e-5, 12.0)
        assert without.numel() == 0
        assert torch.equal(made[0], ops.quantize_rows(y, d, 12.0)[0])


@pytest.mark.parametrize(("change", "message"), [
    ({"residual": torch.ones(3, 9)}, r"residual is torch.float32 \[3, 9\]; give what x has, torch.float32 \[3, 8\]"),
    ({"weight": torch.ones(9)}, r"weight is torch.float32 \[9\]; give \[8\]"),
    ({"bias": torch.ones(8, dtype=torch.int8)}, r"bias is torch.int8 \[8\]"),
    ({"kind": 4}, "kind is 4"),
    ({"x": torch.ones(3, 8, dtype=torch.int8)}, "norm_quantize_rows: x is torch.int8"),
])  # fmt: skip
def test_norms_that_do_not_fit(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.ones(3, 8), "residual": None, "weight": None, "bias": None, "d": None}
    arguments |= {"kind": quantized.RMS, "eps": 1e-5, "threshold": 12.0}
    with pytest.raises(InputError, match=message):
        ops.norm_quantize_rows(*(arguments | change).values())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (8,), (2, 3, 8)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_shapes(shape: tuple[int, ...], threshold: float) -> None:
    x, k = torch.randn(shape), shape[-1]
    q, rows, counters = ops.quantize_rows(x, None, threshold)
    m = math.prod(shape[:-1])
    assert q.shape == (2 if threshold else 1, m, k)
    assert rows.shape == (1 + (k > 0) if threshold else 1, m)
    assert counters.tolist() == [0] * quantized.COUNTERS
    y = ops.quantized_linear(
        q, rows, counters, torch.ones(5, k, dtype=torch.int8), torch.ones(5), None, 0, 0, 0, x.dtype
    )
    assert y.shape == (m, 5)


def test_parts_lie_one_behind_the_other() -> None:
    qweight, scale = quantize_weight(torch.randn(12, 32), None)
    made = ops.quantize_rows(torch.randn(6, 32), None, 6.0)

    def call(n0: int, n1: int) -> Tensor:
        return ops.quantized_linear(*made, qweight, scale, None, quantized.NONE, n0, n1, torch.float32)

    whole = call(0, 0)
    assert torch.equal(call(5, 0), torch.cat([whole[:, :5].flatten(), whole[:, 5:].flatten()]))
    assert torch.equal(call(5, 3), torch.cat([part.flatten() for part in whole.split([5, 3, 4], dim=1)]))


@pytest.mark.parametrize("activation", range(len(quantized.ACTIVATIONS)))
def test_activations_come_before_the_rounding(activation: int) -> None:
    x = torch.randn(6, 32)
    qweight, scale = quantize_weight(torch.randn(12, 32), None)
    y = reference.linear(x, qweight, scale, None, None, 6.0)
    expected = quantized.ACTIVATIONS[activation](y).to(torch.bfloat16)
    made = ops.quantize_rows(x, None, 6.0)
    actual = ops.quantized_linear(*made, qweight, scale, None, activation, 0, 0, torch.bfloat16)
    assert actual.shape == (6, 6 if activation == quantized.SILU_MUL else 12)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"qweight": torch.ones(5, 9, dtype=torch.int8)}, r"qweight is torch.int8 \[5, 9\] and q \[2, 3, 8\]"),
    ({"qweight": torch.ones(5, 8)}, "qweight is torch.float32"),
    ({"scale": torch.ones(4)}, r"scale is torch.float32 \[4\]; give float32 \[5\]"),
    ({"bias": torch.ones(4)}, r"bias is torch.float32 \[4\]; give \[5\]"),
    ({"rows": torch.zeros(3)}, r"rows are torch.float32 \[3\] and counters torch.int32 \[512\]; give the results"),
    ({"counters": torch.zeros(8, dtype=torch.int32)}, r"counters torch.int32 \[8\]; give the results of quantize_rows"),
    ({"q": torch.zeros(3, 3, 8, dtype=torch.int8)}, r"q is torch.int8 \[3, 3, 8\]"),
    ({"q": torch.zeros(2, 3, 8)}, "q is torch.float32"),
    ({"scale": torch.ones(5, device="meta")}, "tensors are on cpu and meta"),
    ({"activation": 6}, "activation is 6"),
    ({"activation": quantized.SILU_MUL}, "an even number of outputs"),
    ({"n0": 6}, "parts of 6 and 0 outputs of 5"),
    ({"n1": 2}, "parts of 0 and 2 outputs of 5"),
    ({"dtype": torch.int32}, "dtype is torch.int32"),
])  # fmt: skip
def test_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = dict(
        zip(["q", "rows", "counters"], ops.quantize_rows(torch.randn(3, 8), None, 6.0), strict=True)
    )
    arguments |= {"qweight": torch.ones(5, 8, dtype=torch.int8), "scale": torch.ones(5), "bias": None}
    arguments |= {"activation": 0, "n0": 0, "n1": 0, "dtype": torch.float32}
    with pytest.raises(InputError, match=message):
        ops.quantized_linear(*(arguments | change).values())


@pytest.mark.parametrize(("x", "d", "threshold", "message"), [
    (torch.ones(3, 8, dtype=torch.int32), None, 6.0, "x is torch.int32"),
    (torch.ones(()), None, 6.0, r"x is torch.float32 \[\]"),
    (torch.ones(1, 131072), None, 6.0, "K is 131072; at most 131071"),
    (torch.ones(3, 8), torch.ones(9), 6.0, r"d is torch.float32 \[9\]; give float32 \[8\]"),
    (torch.ones(3, 8), None, -1.0, "threshold is -1.0"),
    (torch.ones(3, 8), None, 0.5, "threshold is 0.5; give a finite number >= 1"),
    (torch.ones(3, 8), None, math.nan, "threshold is nan"),
])  # fmt: skip
def test_what_cannot_be_quantized(x: Tensor, d: Tensor | None, threshold: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.quantize_rows(x, d, threshold)


def test_schemas() -> None:
    """Schemas have no strings or lists, so that C++ can call the operators."""
    assert str(ops.quantize_rows.default._schema) == (
        "int8compile::quantize_rows(Tensor x, Tensor? d, float threshold) -> (Tensor q, Tensor rows, Tensor counters)"
    )
    assert str(ops.quantized_linear.default._schema) == (
        "int8compile::quantized_linear(Tensor q, Tensor rows, Tensor counters, Tensor qweight, Tensor scale, "
        "Tensor? bias, int activation, int n0, int n1, ScalarType dtype) -> Tensor"
    )


@pytest.mark.parametrize("threshold", [0.0, 12.0])
def test_operators_are_registered_properly(threshold: float) -> None:
    x, d = torch.randn(3, 32), rotation_of(torch.ones(32))
    torch.library.opcheck(ops.quantize_rows.default, (x, d, threshold))
    made = ops.quantize_rows(x, d, threshold)
    weight = (torch.ones(6, 32, dtype=torch.int8), torch.ones(6), torch.ones(6))
    for how in ((quantized.NONE, 2, 3), (quantized.SILU_MUL, 0, 0)):
        torch.library.opcheck(ops.quantized_linear.default, (*made, *weight, *how, torch.bfloat16))


@pytest.mark.parametrize("k", [40, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_compiles_the_same(k: int, dtype: torch.dtype) -> None:
    """Portable packages contain this code: no float step may be contracted, approximated or flushed."""
    x = torch.randn(20, k)
    x[::2, 5] *= 60
    x[3] *= 1e30
    x[4, 7] = math.nan
    x[5] = 0
    x[6] *= 1e-25
    x = x.to(dtype)
    weight, bias = torch.randn(48, k), torch.randn(48)
    d = rotation_for(weight)
    qweight, scale = quantize_weight(weight, d)

    def call(x: Tensor) -> Tensor:
        return portable.quantized_linear(*quantized.row_digits(x, d, 6.0), qweight, scale, bias, x)

    expected = reference.linear(x, qweight, scale, d, bias, 6.0)
    actual = torch.compile(call, fullgraph=True)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
