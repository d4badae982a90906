"""`quantize_rows` and `quantized_linear`: `linear` in two steps, for graphs on GPUs.

All linears that read an activation share its quantization. Up to three of them (q, k and v) can be one product, with
`n0`, `n1` and the remaining outputs each. Its results [M, n0], [M, n1], ... lie one behind the other.

The Triton kernels (`int8compile.triton_kernels`) implement both operators for the dispatch key CUDA. The PyTorch
implementation here is their definition. Quantized activations are three tensors:

    q: [2, M, K] int8, the digits of Q = 256 * q[1] + q[0]; [1, M, K] for a threshold of 0, without outliers.
    rows: [1 + W, M] int32, W = ceil(K / 4096), or 0 for a threshold of 0. rows[0] holds the bits of each row's scale
        in float32. Bit b of rows[1 + w] says whether the row has a second digit among its inputs from
        128 * (32 * w + b) to 128 * (32 * w + b + 1). Elsewhere q[1] counts as zeros, whatever it holds.
    counters: [512] int32 zeros, for products whose sums are split over several programs: the last program of a tile
        adds them up, and sets its counter to zero again.

`norm_quantize_rows` is a norm, with the residual add before it, and `quantize_rows` of the result in one operator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from int8compile.errors import InputError
from int8compile.ops import reference
from int8compile.ops.declaration import DTYPES, SUPPORTED_DTYPES, Call, check_d, check_threshold
from int8compile.ops.reference import MAX_K
from int8compile.ops.registration import define_no_grad


def _silu_mul(y: Tensor) -> Tensor:
    return torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]


# Activation functions of the float32 result, before it is rounded. Schemas have their numbers: without strings C++ can
# call the operators. silu_mul takes gate and up from even and odd outputs.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y,
    torch.relu,
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    _silu_mul,
)
NONE, RELU, SILU, GELU, GELU_TANH, SILU_MUL = range(6)

# Inputs of a block, for whose second digits there is one bit, and of a word of such bits.
BLOCK, WORD = 128, 32 * 128
COUNTERS = 512

# Norms, by number. RMS is torch.nn.functional.rms_norm. RMS_ROUNDED rounds to x's dtype before it multiplies by the
# weight (transformers' Llama). RMS_PLUS_ONE multiplies by 1 + weight (transformers' Gemma).
RMS, RMS_ROUNDED, RMS_PLUS_ONE, LAYER = range(4)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int, eps: float) -> Tensor:
    """Normalize rows in float32 and round the result once to x's dtype; RMS_ROUNDED rounds twice.

    Shapes:
        x: [..., K]; weight, bias: [K], or None; result: [..., K] in x's dtype.
    """
    v = x.to(torch.float32)
    if kind == LAYER:
        v = v - v.mean(dim=-1, keepdim=True)
    v = v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + eps)
    if kind == RMS_ROUNDED:
        v = v.to(x.dtype).to(torch.float32)
    if weight is not None:
        v = v * (weight.to(torch.float32) + (1 if kind == RMS_PLUS_ONE else 0))
    if bias is not None:
        v = v + bias.to(torch.float32)
    return v.to(x.dtype)


def flattened(x: Tensor) -> Tensor:
    """Return x as [M, K], also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _words(k: int) -> int:
    return -(-k // WORD)


def empty_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of `quantize_rows` for x [..., K]."""
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    return (
        x.new_empty(2 if threshold else 1, m, k, dtype=torch.int8),
        x.new_empty(1 + _words(k) if threshold else 1, m, dtype=torch.int32),
        x.new_empty(COUNTERS, dtype=torch.int32),
    )


def block_bits(q1: Tensor) -> Tensor:
    """Return which blocks of rows have a second digit, 32 of them a word.

    Shapes:
        q1: [M, K] int8; result: [ceil(K / 4096), M] int32.
    """
    m, k = q1.shape
    blocks = torch.nn.functional.pad(q1 != 0, (0, _words(k) * WORD - k)).reshape(m, _words(k), 32, BLOCK).any(dim=-1)
    values = (blocks.to(torch.int64) << torch.arange(32, device=q1.device)).sum(dim=-1)
    return values.to(torch.int32).mT.contiguous()


def counted(q: Tensor, rows: Tensor) -> Tensor:
    """Return the second digits that count: q[1], with zeros where a row's bits say that it has none.

    Shapes:
        q: [2, M, K] int8; rows: [1 + W, M] int32; result: [M, K] int8.
    """
    bits = (rows[1:, :, None] >> torch.arange(32, dtype=torch.int32, device=rows.device)) & 1
    blocks = bits.permute(1, 0, 2).flatten(1)
    return q[1].masked_fill(blocks.repeat_interleave(BLOCK, dim=1)[:, : q.shape[2]] == 0, 0)


def empty_result(q: Tensor, qweight: Tensor, activation: int, n0: int, dtype: torch.dtype) -> Tensor:
    """Allocate the result of `quantized_linear`: [M, N], or [M * N] of several parts."""
    m, n = q.shape[1], qweight.shape[0]
    if n0:
        return q.new_empty(m * n, dtype=dtype)
    return q.new_empty(m, n // 2 if activation == SILU_MUL else n, dtype=dtype)


def row_digits(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Quantize activations in PyTorch.

    Shapes:
        x: [..., K]; d: [K] float32; results: q [2, M, K] or [1, M, K] int8, scales [M] float32.
    """
    Q, scale = reference.quantize_rows(flattened(x), d, threshold)
    return torch.stack(reference.digits(Q) if threshold else (Q.to(torch.int8),)), scale


def quantize(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations in PyTorch: the definition of `quantize_rows`, without checks.

    Shapes:
        x: [..., K]; d: [K] float32; results: q, rows and counters, as in the module's docstring.
    """
    q, scale = row_digits(x, d, threshold)
    rows = scale.view(torch.int32)[None]
    if threshold:
        rows = torch.cat([rows, block_bits(q[1])])
    return q, rows, rows.new_zeros(COUNTERS)


def affine_product(
    q: Tensor,
    row_scale: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    int_matmul: Callable[[Tensor, Tensor], Tensor] = reference.int_matmul,
) -> Tensor:
    """Multiply the result of `row_digits` by a weight, up to the activation function.

    Shapes:
        q: [2, M, K] or [1, M, K] int8; row_scale: [M] float32; qweight: [N, K] int8; scale: [N] float32; bias: [N];
            result: [M, N] float32.
    """
    planes, m, k = q.shape
    sums = int_matmul(q.reshape(planes * m, k), qweight).reshape(planes, m, qweight.shape[0])
    acc = sums[0] if planes == 1 else sums[0] + 256 * sums[1]
    y = acc.to(torch.float32) * row_scale[:, None] * scale
    return y if bias is None else y + bias.to(torch.float32)


def product(q: Tensor, rows: Tensor, counters: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply quantized activations in PyTorch: the definition of `quantized_linear`, up to the activation function.

    Shapes:
        q, rows, counters: See the module's docstring; qweight: [N, K] int8; scale: [N] float32; bias: [N];
        result: [M, N] float32.
    """
    if q.shape[0] == 2:
        q = torch.stack([q[0], counted(q, rows)])
    return affine_product(q, rows[0].view(torch.float32), qweight, scale, bias)


def empty_sum(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Allocate the first result of `norm_quantize_rows`, which is empty without a residual."""
    return x.new_empty(0) if residual is None else x.new_empty(x.shape)


def _check_activations(name: str, x: Tensor, d: Tensor | None, threshold: float) -> None:
    if x.dtype not in SUPPORTED_DTYPES or x.dim() < 1:
        raise InputError(f"{name}: x is {x.dtype} {list(x.shape)}; give [..., K] of one of {DTYPES}")
    if x.shape[-1] > MAX_K:
        raise InputError(f"{name}: K is {x.shape[-1]}; at most {MAX_K} is exact in int32. Split the layer or skip it")
    check_d(name, d, x.shape[-1], ())
    check_threshold(name, threshold)


@dataclasses.dataclass(frozen=True)
class QuantizeRows(Call):
    """A call of `quantize_rows`."""

    name = "quantize_rows"
    results = ("q", "rows", "counters")
    x: Tensor
    d: Tensor | None
    threshold: float

    def check(self) -> None:
        """Check that x can be quantized."""
        _check_activations("int8compile::quantize_rows", self.x, self.d, self.threshold)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize in PyTorch."""
        return quantize(self.x, self.d, self.threshold)

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate the results."""
        return empty_rows(self.x, self.threshold)


@dataclasses.dataclass(frozen=True)
class NormQuantizeRows(Call):
    """A call of `norm_quantize_rows`."""

    name = "norm_quantize_rows"
    results = ("sum", "q", "rows", "counters")
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    d: Tensor | None
    kind: int
    eps: float
    threshold: float

    def check(self) -> None:
        """Check that x can be normalized and quantized, and that the other arguments fit it."""
        name, x = "int8compile::norm_quantize_rows", self.x
        _check_activations(name, x, self.d, self.threshold)
        residual = self.residual
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise InputError(
                f"{name}: residual is {residual.dtype} {list(residual.shape)}; give what x has, {x.dtype} "
                f"{list(x.shape)}"
            )
        for of, given in (("weight", self.weight), ("bias", self.bias)):
            if given is not None and (list(given.shape) != [x.shape[-1]] or not given.is_floating_point()):
                raise InputError(
                    f"{name}: {of} is {given.dtype} {list(given.shape)}; give [{x.shape[-1]}] of a float dtype"
                )
        if not RMS <= self.kind <= LAYER:
            raise InputError(f"{name}: kind is {self.kind}; give one of the norms of int8compile.ops.quantized")

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add, normalize and quantize in PyTorch."""
        h = self.x if self.residual is None else self.x + self.residual
        normed = norm(h, self.weight, self.bias, self.kind, self.eps)
        return empty_sum(h) if self.residual is None else h, *quantize(normed, self.d, self.threshold)

    def empty(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Allocate the results."""
        return empty_sum(self.x, self.residual), *empty_rows(self.x, self.threshold)


@dataclasses.dataclass(frozen=True)
class QuantizedLinear(Call):
    """A call of `quantized_linear`."""

    name = "quantized_linear"
    q: Tensor
    rows: Tensor
    counters: Tensor
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    activation: int
    n0: int
    n1: int
    dtype: torch.dtype

    def check(self) -> None:
        """Check that the arguments fit each other."""
        q, rows, counters, qweight, scale, bias, activation, n0, n1, dtype = vars(self).values()
        name = "int8compile::quantized_linear"
        for given in (rows, counters, qweight, scale, bias):
            if given is not None and given.device != q.device:
                raise InputError(f"{name}: tensors are on {q.device} and {given.device}; give all on one device")
        n, k = qweight.shape if qweight.dim() == 2 else (-1, -1)
        if qweight.dtype != torch.int8 or q.dim() != 3 or k != q.shape[2]:
            raise InputError(
                f"{name}: qweight is {qweight.dtype} {list(qweight.shape)} and q {list(q.shape)}; give int8 [N, K] for "
                "[2, M, K], from quantize_rows"
            )
        # Kernels read to the end of these sizes.
        fits = q.dtype == torch.int8 and q.shape[0] in (1, 2)
        words = _words(k) if q.shape[0] == 2 else 0
        fits = fits and rows.dtype == torch.int32 and list(rows.shape) == [1 + words, q.shape[1]]
        if not (fits and counters.dtype == torch.int32 and list(counters.shape) == [COUNTERS]):
            raise InputError(
                f"{name}: q is {q.dtype} {list(q.shape)}, rows are {rows.dtype} {list(rows.shape)} and counters "
                f"{counters.dtype} {list(counters.shape)}; give the results of quantize_rows"
            )
        if scale.dtype != torch.float32 or list(scale.shape) != [n]:
            raise InputError(f"{name}: scale is {scale.dtype} {list(scale.shape)}; give float32 [{n}]")
        if bias is not None and (list(bias.shape) != [n] or not bias.is_floating_point()):
            raise InputError(f"{name}: bias is {bias.dtype} {list(bias.shape)}; give [{n}] of a float dtype, or None")
        if not 0 <= activation < len(ACTIVATIONS) or (activation == SILU_MUL and n % 2):
            raise InputError(
                f"{name}: activation is {activation} for {n} outputs; give one of int8compile.ops.quantized, and an "
                "even number of outputs to SILU_MUL"
            )
        if not (min(n0, n1) >= 0 and n0 + n1 <= n) or (n1 and not n0) or (n0 and activation == SILU_MUL):
            raise InputError(
                f"{name}: parts of {n0} and {n1} outputs of {n}; give sizes that leave some to the last part"
            )
        if dtype not in SUPPORTED_DTYPES:
            raise InputError(f"{name}: dtype is {dtype}; allowed are {DTYPES}")

    def compute(self) -> Tensor:
        """Multiply in PyTorch."""
        sums = product(self.q, self.rows, self.counters, self.qweight, self.scale, self.bias)
        y = ACTIVATIONS[self.activation](sums).to(self.dtype)
        sizes = [size for size in (self.n0, self.n1, y.shape[1] - self.n0 - self.n1) if size]
        return torch.cat([part.flatten() for part in y.split(sizes, dim=1)]) if self.n0 else y

    def empty(self) -> Tensor:
        """Allocate the result."""
        return empty_result(self.q, self.qweight, self.activation, self.n0, self.dtype)


quantize_rows = define_no_grad(QuantizeRows)
norm_quantize_rows = define_no_grad(NormQuantizeRows)
quantized_linear = define_no_grad(QuantizedLinear)
