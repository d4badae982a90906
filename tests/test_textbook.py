"""The textbook formulas, with the numbers of the blog post they come from."""

from __future__ import annotations

import pytest
import torch

from int8compile.ops.textbook import absmax_quantize, vectorwise_matmul, zeropoint_quantize

# Half the spacing of float32 at 1: the relative error of one rounding.
U = 2.0**-24


def test_absmax_numbers_of_the_post() -> None:
    q, scale = absmax_quantize(torch.tensor([1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]))
    assert q.dtype == torch.int8
    assert q.tolist() == [28, -12, -101, 28, -73, 19, 56, 127]
    assert scale.item() == pytest.approx(5.4 / 127, rel=2 * U)


def test_absmax_round_trip() -> None:
    """At most half a step off. Two roundings of float32 at |x/scale| <= 127 move the tie by 127 * 2U more."""
    x = torch.randn(1000)
    q, scale = absmax_quantize(x)
    error = (x.double() - q.double() * scale.double()).abs() / scale.double()
    assert error.max() <= 0.5 + 127 * 2 * U
    assert q.abs().max() == 127


def test_zeropoint_number_of_the_post() -> None:
    q, scale, zero_point = zeropoint_quantize(torch.tensor([0.3]), -1.0, 1.0)
    assert q.tolist() == [38]
    assert (scale, zero_point) == (2 / 255, 0)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 2.1), (0.0, 6.0), (-5.0, -1.0), (3.0, 4.0)])
def test_zeropoint_round_trip(low: float, high: float) -> None:
    """At most half a step off, at both ends too: rounding the zero point moves the ends by at most half a step.

    |x/scale| and |zero_point| are at most 128 + 255 * max(|low|, |high|) / (high - low), and two float32 operations
    on numbers of that size move the tie.
    """
    x = torch.cat([torch.linspace(low, high, 997), torch.tensor([low, high])])
    q, scale, zero_point = zeropoint_quantize(x, low, high)
    assert q.dtype == torch.int8
    error = (x.double() - (q.double() - zero_point) * scale).abs() / scale
    size = 128 + 255 * max(abs(low), abs(high)) / (high - low)
    assert error.max() <= 0.5 + 3 * U * size


def test_zeropoint_clamps_what_is_outside() -> None:
    q, _, _ = zeropoint_quantize(torch.tensor([-50.0, 50.0]), -1.0, 1.0)
    assert q.tolist() == [-128, 127]


def test_vectorwise_is_the_rescaled_integer_product() -> None:
    x, w = torch.randn(7, 33), torch.randn(33, 5)
    scale_x = torch.stack([row.abs().max() for row in x]) / 127
    scale_w = torch.stack([column.abs().max() for column in w.T]) / 127
    q_x = (x / scale_x[:, None]).round().long()
    q_w = (w / scale_w[None, :]).round().long()
    expected = (q_x @ q_w).double() * torch.outer(scale_x.double(), scale_w.double())
    y = vectorwise_matmul(x, w)
    # The integer, the outer product and their product are rounded once each.
    torch.testing.assert_close(y.double(), expected, rtol=3 * U, atol=0)


def test_vectorwise_is_close_to_the_float_product() -> None:
    """x and w are each off by half a step, so the product by |x| s_w/2 + |w| s_x/2 + s_x s_w/4 for each of K."""
    x, w = torch.randn(16, 256, dtype=torch.float64), torch.randn(256, 12, dtype=torch.float64)
    half_x = x.abs().amax(1, keepdim=True) / 254
    half_w = w.abs().amax(0, keepdim=True) / 254
    bound = x.abs() @ half_w.expand_as(w) + half_x.expand_as(x) @ w.abs() + 256 * half_x * half_w
    error = (vectorwise_matmul(x.float(), w.float()) - x @ w).abs()
    # 1e-4: roundings of float32 move a tie by 127 * 3U = 2.3e-5 of a step at most, and half a step is what is bounded.
    assert (error <= bound * (1 + 1e-4)).all()
