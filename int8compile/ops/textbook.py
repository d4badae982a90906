"""Textbook int8 quantization, as introduced in the LLM.int8() blog post. Nothing in the backend uses it.

These are the three ideas the operators build on, with the numbers of the post as tests: absmax quantization,
zero-point quantization, and the vector-wise matmul whose result is rescaled by the outer product of the scales.

Source: https://huggingface.co/blog/hf-bitsandbytes-integration and Dettmers et al. 2022, section 2
(https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import torch
from torch import Tensor


def absmax_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes symmetrically: `q = round(x * 127 / max|x|)`.

    Args:
        x: Any shape, floating point, finite.

    Returns:
        `q`, int8 of x's shape in [-127, 127], and the scalar `scale` with `x ~ q * scale`.
    """
    scale = x.abs().max() / 127
    return (x / scale).round().to(torch.int8), scale


def zeropoint_quantize(x: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    """Quantizes asymmetrically: maps the range [low, high] onto [-128, 127].

    Args:
        x: Any shape, floating point, finite; values outside the range are clamped.
        low: Smallest value of the range.
        high: Largest value of the range, above `low`.

    Returns:
        `q` (int8 of x's shape), `scale` and `zero_point`, with `x ~ (q - zero_point) * scale`.
    """
    scale = (high - low) / 255
    zero_point = round(-128 - low / scale)
    return (x / scale + zero_point).round().clamp(-128, 127).to(torch.int8), scale, zero_point


def vectorwise_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Multiplies in int8 with one scale per row of `x` and one per column of `w`.

    `x @ w ~ (q_x @ q_w) * outer(scale_x, scale_w)`: section 2.2 of the paper.

    Shapes:
        x: [M, K]; w: [K, N]; result: [M, N], float32.
    """
    scale_x = x.abs().amax(dim=1) / 127
    scale_w = w.abs().amax(dim=0) / 127
    q_x = (x / scale_x[:, None]).round().to(torch.int32)
    q_w = (w / scale_w).round().to(torch.int32)
    return (q_x @ q_w) * torch.outer(scale_x, scale_w)
