"""Registers the operators of the library `int8compile`.

| operator | weight | what it computes |
|---|---|---|
| `linear`, `batched_linear` | [N, K], [B, N, K] int8 | `reference.linear`: all in int8, on one grid for each row |
| `weight_only_linear` | [N, K] int8 | `reference.weight_only_linear`: weights in int8, activations in fixed point |
| `grouped_linear` | [E, N, K] int8 | `linear` of each row with the weight of its expert |
| `column_linear` | [N, K] int8 | `column.column_linear`: LLM.int8() as published, outlier columns in float |
| `module_weight` | [..., N, K] int8 | the float weight, for the passes: `policy` says how to multiply with it |
| `quantize_weight` | [..., N, K] float | `reference.quantize_weight` |
| `pack_weight` | [..., N, K] int8 | the layout of `packing` |
| `packed_...` | as `packing.pack_weight` makes it | the same |
| `..._no_grad` | as without | the same, without a formula for gradients: what compiled inference calls |
| `packed_linear_pair_no_grad`, `..._triple_no_grad` | several, one behind the other | `linear` of one x with each |
| `quantize_rows`, `quantized_linear` | [N, K] int8 | `linear` in two steps (`quantized.py`), for GPUs |

`d` rotates x as it did the weight; a weight without one is not rotated. Each operator is declared once
(`declaration.py`), with its definition in PyTorch; autograd and autocast are the same for all. CPU kernels
(`int8compile.cpu`) implement those that are not in two steps, grouped or by column for the dispatch key CPU, and so
take the place of the PyTorch implementation once they are loaded.

`define` + `impl` rather than `torch.library.custom_op`: a call costs 6 us instead of 31. The no_grad operators are
there because `torch.library.register_autograd` costs 8 us a call even when no gradient is asked for. Schemas hold no
strings and no lists, so that Inductor's C++ wrapper calls operators without Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from int8compile.errors import InputError
from int8compile.ops import column, packing, reference
from int8compile.ops.declaration import SUPPORTED_DTYPES, Declaration, check_d

_LIBRARY = torch.library.Library("int8compile", "DEF")


def _register(declared: Declaration) -> Any:
    """Define a differentiable operator."""
    name, batch_dims, packed = declared.name, declared.batch_dims, declared.packed
    _LIBRARY.define(declared.schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.int8compile, name)
    bias_at = list(declared.parameters).index("bias")

    def rotated_weight(weight: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        qweight = packing.unpack_weight(weight, scale.shape[-1], k) if packed else weight
        return reference.dequantize_weight(qweight, scale, None, dtype)

    class Derivatives(_SingleLevelFunction):
        """Derivatives of the product with the dequantized weight, not quantized (LLM.int8(), 2022, appendix E)."""

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return _without_derivatives(op, *args)

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
            with _all_derivatives():
                if along_x is not None:
                    along = _along_x(along_x, rotated_weight(weight, scale, ctx.k, ctx.dtype), d)
                if along_bias is not None:
                    along = along + (along_bias.unsqueeze(-2) if batch_dims else along_bias).to(ctx.dtype)
                return along

    _LIBRARY.impl(name, declared.implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"int8compile::{name}", declared.fake, lib=_LIBRARY)
    _register_derivatives(name, op, Derivatives)
    # Which columns are multiplied in float depends on all rows.
    _register_vmap(name, op, rows_alone=not batch_dims and declared.rotates)
    _register_autocast(name, op)
    return op


def _grad_x(grad: Tensor, weight: Tensor, d: Tensor | None) -> Tensor:
    """Return the gradient of x: `d * H(grad @ W')`, the rotation in float32."""
    product = grad @ weight
    return product if d is None else reference.unrotated(product.to(torch.float32), d).to(grad.dtype)


def _along_x(along: Tensor, weight: Tensor, d: Tensor | None) -> Tensor:
    """Return the derivative of y along x: `H(along * d) @ W'.T`, the rotation in float32."""
    rows = along if d is None else reference.rotated(along.to(torch.float32), d).to(along.dtype)
    return rows @ weight.mT


def _register_vmap(name: str, op: Any, *, rows_alone: bool) -> None:
    """Has `torch.vmap` give what a loop gives; by one call where the rows of x are independent of each other."""

    def vectorized(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        x, *rest = args
        if rows_alone and all(dim is None for dim in in_dims[1:]):
            return op(x.movedim(in_dims[0], 0), *rest), 0
        each = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0

    torch.library.register_vmap(f"int8compile::{name}", vectorized, lib=_LIBRARY)


@contextlib.contextmanager
def _all_derivatives() -> Iterator[None]:
    """Switches on again what PyTorch switches off inside of a function: other levels of `torch.func` need both."""
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        yield


def _without_derivatives(op: Any, *args: Any) -> Tensor:
    """Calls an operator below the level of autograd, or of `torch.func`, that a function stands on."""
    with _all_derivatives(), torch._C._AutoDispatchBelowAutograd():
        result: Tensor = op(*args)
        return result


def _register_derivatives(name: str, op: Any, function: Any) -> None:
    """Has calls that autograd records, or that carry tangents, go through a function.

    `torch.library.register_autograd` knows no derivatives in forward mode and drops tangents in silence, and what it
    makes cannot be used under `torch.func`. That calls the operator once for each of its levels, hence the functions of
    a single level.
    """
    overload = op.default

    # Dynamo would compile it by itself where the code that calls it is not captured.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def autograd(keys: Any, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        # Tangents there are inside of `forward_ad.dual_level` and `torch.func` only.
        if recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _register_autocast(name: str, op: Callable[..., Any]) -> None:
    def autocast(device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def cast_x(x: Tensor, *rest: Any) -> Any:
            # Only x: torch.library.register_autocast would also cast the scales, which stay float32. As for F.linear,
            # autocast leaves integers and float64 alone, so that `check` sees them.
            if x.dtype in SUPPORTED_DTYPES:
                x = x.to(torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(x, *rest)

        return cast_x

    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, autocast(device), f"Autocast{device.upper()}")


def register_no_grad(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines an operator that autograd does not see; only for graphs that need no gradients."""

    def unseen(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*args)

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, unseen, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"int8compile::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.int8compile, name)
    _register_autocast(name, op)
    return op


_LIBRARY.define("pack_weight(Tensor qweight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("pack_weight", packing.pack_weight, "CompositeExplicitAutograd")
torch.library.register_fake("int8compile::pack_weight", packing.pack_weight, lib=_LIBRARY)
pack_weight = torch.ops.int8compile.pack_weight


def _check_weight(weight: Tensor, d: Tensor | None) -> None:
    if weight.dtype not in SUPPORTED_DTYPES or weight.dim() < 1:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise InputError(
            f"int8compile::quantize_weight: weight is {weight.dtype} {list(weight.shape)}; give [..., N, K] of "
            f"{allowed}"
        )
    check_d("int8compile::quantize_weight", d, weight.shape[-1], weight.shape[:-2])


def _quantize_weight(weight: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_weight(weight, d)
    return reference.quantize_weight(weight, d)


def _quantize_weight_fake(weight: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_weight(weight, d)
    scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


_LIBRARY.define("quantize_weight(Tensor weight, Tensor? d) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("quantize_weight", _quantize_weight, "CompositeExplicitAutograd")
_LIBRARY.impl("quantize_weight", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("int8compile::quantize_weight", _quantize_weight_fake, lib=_LIBRARY)
quantize_weight = torch.ops.int8compile.quantize_weight


def _module_weight(qweight: Tensor, scale: Tensor, d: Tensor | None, dtype: torch.dtype, policy: str) -> Tensor:
    return reference.dequantize_weight(qweight, scale, d, dtype)


# The weight of an int8 module in float. `policy` says how the passes multiply with it: "weight_only", or the outlier
# policy and the threshold, "row 12.0". A composite of PyTorch's operators, so that other compilers do without it.
_LIBRARY.define(
    "module_weight(Tensor qweight, Tensor scale, Tensor? d, ScalarType dtype, str policy) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("module_weight", _module_weight, "CompositeImplicitAutograd")
module_weight = torch.ops.int8compile.module_weight


def grouped_parts(ends: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have rows, and their rows. Reads `ends`, so a GPU is waited for."""
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
        InputError: `ends` does not ascend, or ends after x. GPUs do not wait to look: there the rows that would have
            no expert, or several, are NaN.
    """
    y = x.new_zeros(x.shape[0], scale.shape[1])
    for expert, part in grouped_parts(ends, x.shape[0]):
        y[part] = linear(x[part], qweight[expert], scale[expert], reference.of_each(d, expert), None, threshold)
    return y


class _GroupedDerivatives(_SingleLevelFunction):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _without_derivatives(grouped_linear, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # An operator of its own, because what it does depends on the values of `ends`.
        grad_x = torch.ops.int8compile.grouped_linear_backward(grad, *ctx.saved_tensors)
        return grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        along, (qweight, scale, d, ends) = tangents[0], ctx.saved_tensors
        assert along is not None
        with _all_derivatives():
            y = along.new_zeros(along.shape[0], scale.shape[1])
            for expert, part in grouped_parts(ends, along.shape[0]):
                weight = reference.dequantize_weight(qweight[expert], scale[expert], None, along.dtype)
                y[part] = _along_x(along[part], weight, reference.of_each(d, expert))
            return y


def _grouped_grad_x(grad: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, ends: Tensor) -> Tensor:
    grad_x = grad.new_zeros(grad.shape[0], qweight.shape[-1])
    for expert, part in grouped_parts(ends, grad.shape[0]):
        weight = reference.dequantize_weight(qweight[expert], scale[expert], None, grad.dtype)
        grad_x[part] = _grad_x(grad[part], weight, reference.of_each(d, expert))
    return grad_x


def _grouped_grad_x_fake(grad: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, ends: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[-1])


linear = _register(Declaration("linear", reference.linear))
batched_linear = _register(Declaration("batched_linear", reference.batched_linear, batch_dims=1))
weight_only_linear = _register(Declaration("weight_only_linear", reference.weight_only_linear, quantizes=False))
column_linear = _register(Declaration("column_linear", column.column_linear, rotates=False))
packed_linear = _register(Declaration("packed_linear", reference.linear, packed=True))
packed_batched_linear = _register(
    Declaration("packed_batched_linear", reference.batched_linear, packed=True, batch_dims=1)
)
packed_weight_only_linear = _register(
    Declaration("packed_weight_only_linear", reference.weight_only_linear, packed=True, quantizes=False)
)

_GROUPED = Declaration("grouped_linear", grouped_by_definition, grouped=True)
_LIBRARY.define(
    "grouped_linear_backward(Tensor grad, Tensor qweight, Tensor scale, Tensor? d, Tensor ends) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("grouped_linear_backward", _grouped_grad_x, "CompositeExplicitAutograd")
torch.library.register_fake("int8compile::grouped_linear_backward", _grouped_grad_x_fake, lib=_LIBRARY)
_LIBRARY.define(_GROUPED.schema, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("grouped_linear", _GROUPED.implementation, "CompositeExplicitAutograd")
torch.library.register_fake("int8compile::grouped_linear", _GROUPED.fake, lib=_LIBRARY)
grouped_linear = torch.ops.int8compile.grouped_linear
_register_derivatives("grouped_linear", grouped_linear, _GroupedDerivatives)
_register_autocast("grouped_linear", grouped_linear)


def _register_inference(declared: Declaration) -> Any:
    """Define an operator for graphs that need no gradients."""
    schema = declared.schema.removeprefix(declared.name)
    op = register_no_grad(declared.name, schema, declared.implementation, declared.fake)
    if not declared.packed:
        _register_vmap(declared.name, op, rows_alone=True)
    return op


linear_no_grad = _register_inference(Declaration("linear_no_grad", reference.linear))
weight_only_linear_no_grad = _register_inference(
    Declaration("weight_only_linear_no_grad", reference.weight_only_linear, quantizes=False)
)
packed_linear_no_grad = _register_inference(Declaration("packed_linear_no_grad", reference.linear, packed=True))
packed_linear_pair_no_grad = _register_inference(
    Declaration("packed_linear_pair_no_grad", reference.linear, packed=True, results=2)
)
packed_linear_triple_no_grad = _register_inference(
    Declaration("packed_linear_triple_no_grad", reference.linear, packed=True, results=3)
)
packed_weight_only_linear_no_grad = _register_inference(
    Declaration("packed_weight_only_linear_no_grad", reference.weight_only_linear, packed=True, quantizes=False)
)
