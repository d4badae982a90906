"""The linear operators of the library `int8compile`, and the operators on weights.

| operator | weight | what it computes |
|---|---|---|
| `linear`, `batched_linear` | [N, K], [B, N, K] int8 | `reference.linear`: all in int8, on one grid for each row |
| `weight_only_linear` | [N, K] int8 | `reference.weight_only_linear`: weights in int8, activations in fixed point |
| `grouped_linear` | [E, N, K] int8 | `linear` of each row with the weight of its expert |
| `column_linear` | [N, K] int8 | `column.column_linear`: LLM.int8() as published, outlier columns in float |
| `module_weight` | [..., N, K] int8 | the float weight; the passes read in `policy` how to multiply with it |
| `quantize_weight` | [..., N, K] float | `reference.quantize_weight` |
| `pack_weight` | [..., N, K] int8 | the layout of `packing` |
| `packed_...` | in the layout of `packing` | the same as without `packed_` |
| `..._no_grad` | as without | the same, without derivatives: compiled inference calls these |
| `packed_linear_pair_no_grad`, `..._triple_no_grad` | several, one behind the other | `linear` of one x with each |
| `quantize_rows`, `quantized_linear` | [N, K] int8 | `linear` in two steps (`quantized.py`), for GPUs |

`d` rotates x as it rotated the weight; it is None for a weight that is not rotated. Each operator is declared once
(`declaration.py`), with its definition in PyTorch. CPU kernels (`int8compile.cpu`) implement those of
`signatures.REGISTERED` for the dispatch key CPU, and replace the PyTorch implementation when they are loaded. Schemas
hold no strings and no lists, so that Inductor's C++ wrapper calls operators without Python; `module_weight`, which is
traced away before, may.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from int8compile.errors import InputError
from int8compile.ops import column, packing, reference
from int8compile.ops.declaration import DTYPES, SUPPORTED_DTYPES, Call, Declaration, check_d
from int8compile.ops.registration import (
    all_derivatives,
    define,
    define_no_grad,
    hide_from_autograd,
    register_autocast,
    register_derivatives,
    register_vmap,
    without_derivatives,
)


def _define(name: str, compute: Callable[..., Tensor], batch_dims: int = 0, packed: bool = False, **kind: bool) -> Any:
    """Define a differentiable operator, a `Declaration` with these attributes."""
    declared = Declaration(name, compute, batch_dims=batch_dims, packed=packed, **kind)
    op = define(declared)
    bias_at = list(declared.parameters).index("bias")

    def rotated_weight(weight: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        qweight = packing.unpack_weight(weight, scale.shape[-1], k) if packed else weight
        return reference.dequantize_weight(qweight, scale, None, dtype)

    class Derivatives(_SingleLevelFunction):
        """Derivatives of the product with the dequantized weight, not quantized (LLM.int8(), 2022, appendix E)."""

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return without_derivatives(op, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            given = declared.given(inputs)
            x, bias = given["x"], given["bias"]
            saved = (given[declared.weight], given["scale"], given.get("d"))
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            ctx.k, ctx.dtype, ctx.count = x.shape[-1], x.dtype, len(inputs)
            ctx.bias_dtype = None if bias is None else bias.dtype

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            weight, scale, d = ctx.saved_tensors
            grads: list[Tensor | None] = [None] * ctx.count
            if ctx.needs_input_grad[0]:
                grads[0] = _grad_x(grad, rotated_weight(weight, scale, ctx.k, grad.dtype), d)
            if ctx.needs_input_grad[bias_at]:
                rows = grad.flatten(batch_dims, -2) if grad.dim() > batch_dims + 1 else grad.unsqueeze(-2)
                grads[bias_at] = rows.sum(dim=-2, dtype=torch.float32).to(ctx.bias_dtype)
            return tuple(grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            weight, scale, d = ctx.saved_tensors
            along_x, along_bias = tangents[0], tangents[bias_at]
            along: Tensor = weight.new_zeros(1, dtype=ctx.dtype)
            with all_derivatives():
                if along_x is not None:
                    along = _along_x(along_x, rotated_weight(weight, scale, ctx.k, ctx.dtype), d)
                if along_bias is not None:
                    along = along + (along_bias.unsqueeze(-2) if batch_dims else along_bias).to(ctx.dtype)
                return along

    register_derivatives(name, op, Derivatives)
    # In column_linear all rows decide which columns are multiplied in float.
    register_vmap(name, op, rows_alone=not batch_dims and declared.rotates)
    register_autocast(name, op)
    return op


def _grad_x(grad: Tensor, weight: Tensor, d: Tensor | None) -> Tensor:
    """Return the gradient of x: `d * H(grad @ W')`, the rotation in float32."""
    product = grad @ weight
    return product if d is None else reference.unrotated(product.to(torch.float32), d).to(grad.dtype)


def _along_x(along: Tensor, weight: Tensor, d: Tensor | None) -> Tensor:
    """Return the derivative of y along x: `H(along * d) @ W'.T`, the rotation in float32."""
    rows = along if d is None else reference.rotated(along.to(torch.float32), d).to(along.dtype)
    return rows @ weight.mT


@dataclasses.dataclass(frozen=True)
class _PackWeight(Call):
    name = "pack_weight"
    qweight: Tensor

    def compute(self) -> Tensor:
        return packing.pack_weight(self.qweight)

    empty = compute


@dataclasses.dataclass(frozen=True)
class _QuantizeWeight(Call):
    name = "quantize_weight"
    results = ("", "")
    weight: Tensor
    d: Tensor | None

    def check(self) -> None:
        weight = self.weight
        if weight.dtype not in SUPPORTED_DTYPES or weight.dim() < 1:
            raise InputError(
                f"int8compile::quantize_weight: weight is {weight.dtype} {list(weight.shape)}; give [..., N, K] of "
                f"{DTYPES}"
            )
        check_d("int8compile::quantize_weight", self.d, weight.shape[-1], weight.shape[:-2])

    def compute(self) -> tuple[Tensor, Tensor]:
        return reference.quantize_weight(self.weight, self.d)

    def empty(self) -> tuple[Tensor, Tensor]:
        scale = self.weight.new_empty(self.weight.shape[:-1], dtype=torch.float32)
        return self.weight.new_empty(self.weight.shape, dtype=torch.int8), scale


@dataclasses.dataclass(frozen=True)
class _ModuleWeight(Call):
    """The weight of an int8 module in float.

    `policy` tells the passes how to multiply with it: "weight_only", or the outlier policy and the threshold, "row
    12.0". The operator is a composite of PyTorch's, so that other compilers need to know nothing of it.
    """

    name = "module_weight"
    qweight: Tensor
    scale: Tensor
    d: Tensor | None
    dtype: torch.dtype
    policy: str

    def compute(self) -> Tensor:
        return reference.dequantize_weight(self.qweight, self.scale, self.d, self.dtype)


pack_weight = define(_PackWeight)
quantize_weight = define(_QuantizeWeight)
hide_from_autograd("quantize_weight")
module_weight = define(_ModuleWeight, key="CompositeImplicitAutograd")


def grouped_parts(ends: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have rows, and their rows. This reads `ends`, and so waits for a GPU."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if not begin <= end <= rows:
            raise InputError(f"int8compile::grouped_linear: ends must ascend and be at most {rows}, x's rows")
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def grouped_by_definition(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, ends: Tensor, threshold: float
) -> Tensor:
    """Compute `grouped_linear`: rows of x up to ends[0] with the first weight, and so on; zeros after the last.

    Shapes:
        x: [S, K]; qweight: [E, N, K] int8; scale: [E, N] float32; d: [K] or [E, K] float32; ends: [E] integers;
        result: [S, N] in x's dtype.

    Raises:
        InputError: `ends` does not ascend, or ends after x. Kernels for GPUs do not wait to check this: rows with no
            expert, or several, are NaN there.
    """
    y = x.new_zeros(x.shape[0], scale.shape[1])
    for expert, part in grouped_parts(ends, x.shape[0]):
        y[part] = linear(x[part], qweight[expert], scale[expert], reference.of_each(d, expert), None, threshold)
    return y


class _GroupedDerivatives(_SingleLevelFunction):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return without_derivatives(grouped_linear, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # An operator of its own, because it depends on the values of `ends`.
        grad_x = torch.ops.int8compile.grouped_linear_backward(grad, *ctx.saved_tensors)
        return grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        along, (qweight, scale, d, ends) = tangents[0], ctx.saved_tensors
        assert along is not None
        with all_derivatives():
            y = along.new_zeros(along.shape[0], scale.shape[1])
            for expert, part in grouped_parts(ends, along.shape[0]):
                weight = reference.dequantize_weight(qweight[expert], scale[expert], None, along.dtype)
                y[part] = _along_x(along[part], weight, reference.of_each(d, expert))
            return y


@dataclasses.dataclass(frozen=True)
class _GroupedLinearBackward(Call):
    name = "grouped_linear_backward"
    grad: Tensor
    qweight: Tensor
    scale: Tensor
    d: Tensor | None
    ends: Tensor

    def compute(self) -> Tensor:
        grad_x = self.empty().zero_()
        for expert, part in grouped_parts(self.ends, self.grad.shape[0]):
            weight = reference.dequantize_weight(self.qweight[expert], self.scale[expert], None, self.grad.dtype)
            grad_x[part] = _grad_x(self.grad[part], weight, reference.of_each(self.d, expert))
        return grad_x

    def empty(self) -> Tensor:
        return self.grad.new_empty(self.grad.shape[0], self.qweight.shape[-1])


linear = _define("linear", reference.linear)
batched_linear = _define("batched_linear", reference.batched_linear, batch_dims=1)
weight_only_linear = _define("weight_only_linear", reference.weight_only_linear, quantizes=False)
column_linear = _define("column_linear", column.column_linear, rotates=False)
packed_linear = _define("packed_linear", reference.linear, packed=True)
packed_batched_linear = _define("packed_batched_linear", reference.batched_linear, packed=True, batch_dims=1)
packed_weight_only_linear = _define(
    "packed_weight_only_linear", reference.weight_only_linear, packed=True, quantizes=False
)

define(_GroupedLinearBackward)
grouped_linear = define(Declaration("grouped_linear", grouped_by_definition, grouped=True))
register_derivatives("grouped_linear", grouped_linear, _GroupedDerivatives)
register_autocast("grouped_linear", grouped_linear)


def _define_no_grad(name: str, compute: Callable[..., Tensor], **kind: Any) -> Any:
    """Define a linear operator for graphs that need no gradients, a `Declaration` with these attributes."""
    declared = Declaration(f"{name}_no_grad", compute, **kind)
    op = define_no_grad(declared)
    if not declared.packed:
        register_vmap(declared.name, op, rows_alone=True)
    return op


linear_no_grad = _define_no_grad("linear", reference.linear)
weight_only_linear_no_grad = _define_no_grad("weight_only_linear", reference.weight_only_linear, quantizes=False)
packed_linear_no_grad = _define_no_grad("packed_linear", reference.linear, packed=True)
packed_linear_pair_no_grad = _define_no_grad("packed_linear_pair", reference.linear, packed=True, results=2)
packed_linear_triple_no_grad = _define_no_grad("packed_linear_triple", reference.linear, packed=True, results=3)
packed_weight_only_linear_no_grad = _define_no_grad(
    "packed_weight_only_linear", reference.weight_only_linear, packed=True, quantizes=False
)
