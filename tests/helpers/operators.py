"""The operators, arguments for them, and a comparison of their results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import int8compile
from int8compile.ops import (
    SUPPORTED_DTYPES,
    batched_linear,
    column_linear,
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

# Relative error of one rounding in float32.
U = 2.0**-24


def unpacked(define: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a reference that takes a packed weight."""

    def run(x: Tensor, packed: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        return define(x, unpack_weight(packed, scale.shape[-1], x.shape[-1]), scale, *rest)

    return run


def each(count: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return a reference that applies `linear` to one x and several packed weights in turn."""

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


# Operators that take x. The next lists are the operators with gradients, and those with one tensor as their result.
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

DIFFERENTIABLE = [name for name in OPS if not name.endswith("no_grad")]

every_dtype = pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=lambda dtype: str(dtype).split(".")[1])

# Whether the weight is rotated.
every_rotation = pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])

every_op = pytest.mark.parametrize("name", OPS)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal values with outliers."""
    x = torch.randn(shape)
    if x.numel():
        x.view(-1)[torch.randint(x.numel(), (1 + x.numel() // 64,))] *= 25
    return x.to(dtype)


def factors(*shape: int) -> Tensor:
    """Return a d for K inputs, or one for each of several weights."""
    return torch.stack([rotation_of(0.25 + 2 * torch.rand(shape[-1])) for _ in range(math.prod(shape[:-1]))]).view(
        shape
    )


def quantized(*shape: int, d: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return an int8 weight [..., N, K] and its scales."""
    qweight, scale = quantize_weight(torch.randn(shape), d)
    return qweight, scale


def arguments(
    name: str, dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (4, 48, 6), rotated: bool = True
) -> list[Any]:
    """Return x, weight, scale, d, bias, and the operator's other arguments; batched operators get two experts.

    48 inputs are rotated by 16.
    """
    M, K, N = sizes
    batch = [2] if "batched" in name else []
    several = 3 if "triple" in name else 2 if "pair" in name else 1
    d = factors(*batch, K) if rotated and name != "column_linear" else None
    # Outputs of the first weights, which are not multiples of a panel's.
    split = [N + 13, N + 1][: several - 1]
    weights = [quantized(*batch, outputs, K, d=d) for outputs in [*split, N]]
    scale = torch.cat([scale for _, scale in weights], -1)
    packed = [packing.pack_weight(qweight) for qweight, _ in weights]
    weight = torch.cat(packed) if several > 1 else packed[0] if "packed" in name else weights[0][0]
    x, bias = activations(*batch, M, K, dtype=dtype), torch.randn(scale.shape, dtype=dtype)
    threshold = [] if "weight_only" in name else [6.0]
    return [x, weight, scale, *([] if name == "column_linear" else [d]), bias, *split, *threshold]


def changing(name: str, args: list[Any], **changed: Any) -> list[Any]:
    """Return the arguments with some replaced by name."""
    names = [each.name for each in getattr(torch.ops.int8compile, name).default._schema.arguments]
    return [changed.get(at, value) for at, value in zip(names, args, strict=True)]


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return an operator's results as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """Require equal bits, including the sign of zero; any NaN equals any NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    a, b = (each.masked_fill(each.isnan(), 0).contiguous().view(bits) for each in (actual, expected))
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"


# A bad call is refused by a check in Python, or by the kernel.
REFUSED = (int8compile.InputError, RuntimeError)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
}
