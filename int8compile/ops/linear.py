"""Registers the operators of the library `int8compile`.

| operator | weight | what it computes |
|---|---|---|
| `linear`, `batched_linear` | [N, K], [B, N, K] int8 | `reference.linear`: all in int8, but outliers |
| `weight_only_linear` | [N, K] int8 | `reference.weight_only_linear`: weights in int8, activations in float |
| `grouped_linear` | [E, N, K] int8 | `linear` of each row with the weight of its expert |
| `module_weight` | [..., N, K] int8 | the float weight, for the passes: `policy` says how to multiply with it |
| `quantize_weight` | [..., N, K] float | `reference.quantize_weight` |
| `pack_weight` | [..., N, K] int8 | the layout of `packing` |
| `packed_...` | as `packing.pack_weight` makes it | the same |
| `..._no_grad` | as without | the same, without a formula for gradients: what compiled inference calls |
| `packed_linear_pair_no_grad`, `..._triple_no_grad` | several, one behind the other | `linear` of one x with each |
| `quantize_rows`, `quantized_linear` | [N, K] int8 | `linear` in two steps (`quantized.py`), for GPUs |

Each is defined once here: schema, fake, implementation in PyTorch (`reference.py`), autograd, autocast. CPU kernels
(`int8compile.cpu`) implement those that are not in two steps or grouped for the dispatch key CPU, and so take the place
of the PyTorch implementation once they are loaded.

`define` + `impl` rather than `torch.library.custom_op`: a call costs 6 us instead of 31. The no_grad operators are
there because `torch.library.register_autograd` costs 8 us a call even when no gradient is asked for; and their schemas
hold no strings and no lists, so that Inductor's C++ wrapper calls them without Python.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from int8compile.errors import InputError
from int8compile.ops import packing, reference

OUTLIER_POLICIES = ("row", "column")
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("int8compile", "DEF")

# x, weight, scale, bias, and what says how x is quantized: (threshold, outliers), or nothing for weight-only operators.
Compute = Callable[..., Tensor]


def check(
    name: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    policy: Sequence[Any],
    *,
    batch_dims: int = 0,
    packed: bool = False,
) -> None:
    """Validates a call. Fakes and implementations both run it: a check in a fake alone is not seen in eager mode.

    Raises:
        InputError: Names the argument, what it was and what is allowed.
    """
    name = f"int8compile::{name}"
    if x.dtype not in SUPPORTED_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise InputError(f"{name}: x is {x.dtype}; allowed are {allowed}. Convert it, e.g. x.to(torch.float32)")
    dims = batch_dims + (4 if packed else 2)
    if weight.dtype != (torch.uint8 if packed else torch.int8) or weight.dim() != dims:
        raise InputError(
            f"{name}: {'packed' if packed else 'qweight'} is {weight.dtype} {list(weight.shape)}; give "
            f"{'uint8' if packed else 'int8'} of {dims} dimensions, as int8compile.ops."
            f"{'pack_weight' if packed else 'quantize_weight'} makes"
        )
    rows = [*weight.shape[:batch_dims], scale.shape[-1] if packed and scale.dim() else weight.shape[batch_dims]]
    if scale.dtype != torch.float32 or list(scale.shape) != rows:
        raise InputError(
            f"{name}: scale is {scale.dtype} {list(scale.shape)}; give float32 "
            f"{'[..., N]' if packed else rows}, one for each output of the weight"
        )
    fits = x.dim() == 3 and x.shape[0] == weight.shape[0] if batch_dims else x.dim() >= 1
    if fits and packed:
        fits = tuple(weight.shape[batch_dims:]) == packing.packed_shape(scale.shape[-1], x.shape[-1])
    elif fits:
        fits = x.shape[-1] == weight.shape[-1]
    if not fits:
        shape = "[B, M, K] for [B, N, K]" if batch_dims else "[..., K] for [N, K]"
        given = (
            f"packed {list(weight.shape)} of {scale.shape[-1]} outputs" if packed else f"qweight {list(weight.shape)}"
        )
        raise InputError(f"{name}: x is {list(x.shape)} and {given}; x must be {shape}")
    if x.shape[-1] > reference.MAX_K:
        raise InputError(
            f"{name}: K is {x.shape[-1]}; at most {reference.MAX_K} is exact in int32. Split the layer or skip it"
        )
    if bias is not None and (bias.shape != scale.shape or not bias.is_floating_point()):
        raise InputError(
            f"{name}: bias is {bias.dtype} {list(bias.shape)}; give {list(scale.shape)} of a float dtype, or None"
        )
    if policy:
        threshold, outliers = policy
        if not (math.isfinite(threshold) and threshold >= 0):
            raise InputError(f"{name}: threshold is {threshold}; give a finite number >= 0 (0 turns the split off)")
        if outliers not in OUTLIER_POLICIES:
            raise InputError(f"{name}: outliers is {outliers!r}; allowed are 'row' and 'column'")


def _calls(name: str, compute: Compute, *, batch_dims: int = 0, packed: bool = False) -> tuple[Compute, Compute]:
    """What an operator runs in PyTorch, and its fake; both check first."""

    def validate(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, policy: Sequence[Any]) -> None:
        check(name, x, weight, scale, bias, policy, batch_dims=batch_dims, packed=packed)

    def implementation(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *policy: Any) -> Tensor:
        validate(x, weight, scale, bias, policy)
        qweight = packing.unpack_weight(weight, scale.shape[-1], x.shape[-1]) if packed else weight
        return compute(x, qweight, scale, bias, *policy)

    def fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *policy: Any) -> Tensor:
        validate(x, weight, scale, bias, policy)
        return x.new_empty(*x.shape[:-1], scale.shape[-1])

    return implementation, fake


def _register(
    name: str, compute: Compute, *, batch_dims: int = 0, packed: bool = False, weight_only: bool = False
) -> Any:
    """Defines a differentiable operator whose weight is [N, K] (or [B, N, K]), packed or not."""
    weight_name = "packed" if packed else "qweight"
    how = "" if weight_only else ", float threshold, str outliers"
    _LIBRARY.define(
        f"{name}(Tensor x, Tensor {weight_name}, Tensor scale, Tensor? bias{how}) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    qualified = f"int8compile::{name}"
    op = getattr(torch.ops.int8compile, name)
    implementation, fake = _calls(name, compute, batch_dims=batch_dims, packed=packed)

    def dequantized(weight: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        qweight = packing.unpack_weight(weight, scale.shape[-1], k) if packed else weight
        return reference.dequantize_weight(qweight, scale, dtype)

    class Derivatives(_SingleLevelFunction):
        """Derivatives of the product with the dequantized weight, not quantized (LLM.int8(), 2022, appendix E)."""

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return _without_derivatives(op, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, weight, scale, bias, *policy = inputs
            ctx.save_for_backward(weight, scale)
            ctx.save_for_forward(weight, scale)
            ctx.k, ctx.dtype, ctx.policies = x.shape[-1], x.dtype, len(policy)
            ctx.bias_dtype = None if bias is None else bias.dtype

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            weight, scale = ctx.saved_tensors
            grad_x = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_x = grad @ dequantized(weight, scale, ctx.k, grad.dtype)
            if ctx.needs_input_grad[3]:
                rows = grad.flatten(batch_dims, -2) if grad.dim() > batch_dims + 1 else grad.unsqueeze(-2)
                grad_bias = rows.sum(dim=-2, dtype=torch.float32).to(ctx.bias_dtype)
            return grad_x, None, None, grad_bias, *[None] * ctx.policies

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            weight, scale = ctx.saved_tensors
            along_x, _, _, along_bias, *_ = tangents
            along: Tensor = weight.new_zeros(1, dtype=ctx.dtype)
            with _all_derivatives():
                if along_x is not None:
                    along = along_x @ dequantized(weight, scale, ctx.k, ctx.dtype).mT
                if along_bias is not None:
                    along = along + (along_bias.unsqueeze(-2) if batch_dims else along_bias).to(ctx.dtype)
                return along

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    _register_derivatives(name, op, Derivatives)
    _register_vmap(name, op, rows_alone=not batch_dims)
    _register_autocast(name, op)
    return op


def _register_vmap(name: str, op: Any, *, rows_alone: bool) -> None:
    """Has `torch.vmap` give what a loop gives; by one call where the rows of x are independent of each other."""

    def vectorized(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        x, *rest = args
        by_column = not isinstance(rest[-1], Tensor) and rest[-1] in ("column", True)
        if rows_alone and not by_column and all(dim is None for dim in in_dims[1:]):
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


def _with_flag(run: Compute) -> Compute:
    """Takes the outlier policy as the flag that schemas without strings have."""

    def call(
        x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, by_column: bool
    ) -> Tensor:
        return run(x, packed, scale, bias, threshold, OUTLIER_POLICIES[by_column])

    return call


def _register_several(name: str, count: int) -> Any:
    """Defines `linear` of one x with `count` weights, packed one behind the other; the last gets what `sizes` leave.

    Each has panels of its own: the packed weight of N outputs has ceil(N / 16) of them. Scales and biases lie one
    behind the other without gaps.
    """
    sizes = [f"n{i}" for i in range(count - 1)]
    ints = "".join(f", int {size}" for size in sizes)
    schema = (
        f"(Tensor x, Tensor packed, Tensor scale, Tensor? bias{ints}, float threshold, bool by_column)"
        f" -> ({', '.join(['Tensor'] * count)})"
    )

    def parts(packed: Tensor, scale: Tensor, bias: Tensor | None, given: Sequence[int]) -> Any:
        if scale.dim() != 1 or (bias is not None and bias.shape != scale.shape):
            shape = None if bias is None else f"{bias.dtype} {list(bias.shape)}"
            raise InputError(
                f"int8compile::{name}: scale is {scale.dtype} {list(scale.shape)} and bias is {shape}; give float32 "
                "[N] of all outputs together, and [N] of a float dtype or None"
            )
        outputs = [*given, scale.shape[0] - sum(given)]
        if min(outputs) < 0:
            raise InputError(f"int8compile::{name}: outputs {outputs} do not add up to scale's {scale.shape[0]}")
        panels = [packing.packed_shape(n, 1)[0] for n in outputs]
        if packed.dim() == 0 or packed.shape[0] != sum(panels):
            raise InputError(
                f"int8compile::{name}: packed is {list(packed.shape)}; outputs {outputs} have {sum(panels)} panels"
            )
        biases = [None] * count if bias is None else bias.split(outputs)
        return zip(packed.split(panels), scale.split(outputs), biases, strict=True)

    def of_each(run: Compute) -> Callable[..., Any]:
        def call(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Any:
            *given, threshold, by_column = rest
            return tuple(run(x, *part, threshold, by_column) for part in parts(packed, scale, bias, given))

        return call

    implementation, fake = (of_each(_with_flag(run)) for run in _calls(name, reference.linear, packed=True))
    return register_no_grad(name, schema, implementation, fake)


_LIBRARY.define("pack_weight(Tensor qweight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("pack_weight", packing.pack_weight, "CompositeExplicitAutograd")
torch.library.register_fake("int8compile::pack_weight", packing.pack_weight, lib=_LIBRARY)
pack_weight = torch.ops.int8compile.pack_weight


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in SUPPORTED_DTYPES or weight.dim() < 1:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise InputError(
            f"int8compile::quantize_weight: weight is {weight.dtype} {list(weight.shape)}; give [..., N, K] of "
            f"{allowed}"
        )


def _quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    return reference.quantize_weight(weight)


def _quantize_weight_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


_LIBRARY.define("quantize_weight(Tensor weight) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("quantize_weight", _quantize_weight, "CompositeExplicitAutograd")
_LIBRARY.impl("quantize_weight", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("int8compile::quantize_weight", _quantize_weight_fake, lib=_LIBRARY)
quantize_weight = torch.ops.int8compile.quantize_weight


def _module_weight(qweight: Tensor, scale: Tensor, dtype: torch.dtype, policy: str) -> Tensor:
    return reference.dequantize_weight(qweight, scale, dtype)


# The weight of an int8 module in float. `policy` says how the passes multiply with it: "weight_only", or the outlier
# policy and the threshold, "row 6.0". A composite of PyTorch's operators, so that other compilers do without it.
_LIBRARY.define(
    "module_weight(Tensor qweight, Tensor scale, ScalarType dtype, str policy) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("module_weight", _module_weight, "CompositeImplicitAutograd")
module_weight = torch.ops.int8compile.module_weight

linear = _register("linear", reference.linear)
batched_linear = _register("batched_linear", reference.batched_linear, batch_dims=1)
weight_only_linear = _register("weight_only_linear", reference.weight_only_linear, weight_only=True)
packed_linear = _register("packed_linear", reference.linear, packed=True)
packed_batched_linear = _register("packed_batched_linear", reference.batched_linear, batch_dims=1, packed=True)
packed_weight_only_linear = _register(
    "packed_weight_only_linear", reference.weight_only_linear, packed=True, weight_only=True
)


def grouped_parts(ends: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and their rows. Reads `ends`, so a GPU is waited for."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if not begin <= end <= rows:
            raise InputError(f"int8compile::grouped_linear: ends must ascend and be at most {rows}, x's rows")
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _check_grouped(x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, threshold: float, outliers: str) -> None:
    if x.dim() != 2 or qweight.dim() != 3 or scale.dim() != 2 or ends.shape != qweight.shape[:1]:
        raise InputError(
            f"int8compile::grouped_linear: x is {list(x.shape)}, qweight {list(qweight.shape)}, scale "
            f"{list(scale.shape)} and ends {list(ends.shape)}; give [S, K], [E, N, K], [E, N] and [E]"
        )
    check("grouped_linear", x, qweight[0], scale[0], None, (threshold, outliers))


def _grouped_linear(x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, threshold: float, outliers: str) -> Tensor:
    _check_grouped(x, qweight, scale, ends, threshold, outliers)
    y = x.new_zeros(x.shape[0], scale.shape[1])
    for expert, part in grouped_parts(ends, x.shape[0]):
        y[part] = linear(x[part], qweight[expert], scale[expert], None, threshold, outliers)
    return y


def _grouped_linear_fake(
    x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, threshold: float, outliers: str
) -> Tensor:
    _check_grouped(x, qweight, scale, ends, threshold, outliers)
    return x.new_empty(x.shape[0], scale.shape[1])


class _GroupedDerivatives(_SingleLevelFunction):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _without_derivatives(grouped_linear, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # An operator of its own, because what it does depends on the values of `ends`.
        grad_x = torch.ops.int8compile.grouped_linear_backward(grad, *ctx.saved_tensors)
        return grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        along, (qweight, scale, ends) = tangents[0], ctx.saved_tensors
        assert along is not None
        with _all_derivatives():
            y = along.new_zeros(along.shape[0], scale.shape[1])
            for expert, part in grouped_parts(ends, along.shape[0]):
                y[part] = along[part] @ reference.dequantize_weight(qweight[expert], scale[expert], along.dtype).mT
            return y


def _grouped_grad_x(grad: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    grad_x = grad.new_zeros(grad.shape[0], qweight.shape[-1])
    for expert, part in grouped_parts(ends, grad.shape[0]):
        grad_x[part] = grad[part] @ reference.dequantize_weight(qweight[expert], scale[expert], grad.dtype)
    return grad_x


def _grouped_grad_x_fake(grad: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[-1])


_LIBRARY.define(
    "grouped_linear_backward(Tensor grad, Tensor qweight, Tensor scale, Tensor ends) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("grouped_linear_backward", _grouped_grad_x, "CompositeExplicitAutograd")
torch.library.register_fake("int8compile::grouped_linear_backward", _grouped_grad_x_fake, lib=_LIBRARY)
_LIBRARY.define(
    "grouped_linear(Tensor x, Tensor qweight, Tensor scale, Tensor ends, float threshold, str outliers) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("grouped_linear", _grouped_linear, "CompositeExplicitAutograd")
torch.library.register_fake("int8compile::grouped_linear", _grouped_linear_fake, lib=_LIBRARY)
grouped_linear = torch.ops.int8compile.grouped_linear
_register_derivatives("grouped_linear", grouped_linear, _GroupedDerivatives)
_register_autocast("grouped_linear", grouped_linear)


def _weight(name: str) -> str:
    return f"(Tensor x, Tensor {name}, Tensor scale, Tensor? bias"


_POLICY = ", float threshold, bool by_column"
linear_no_grad = register_no_grad(
    "linear_no_grad",
    f"{_weight('qweight')}{_POLICY}) -> Tensor",
    *(_with_flag(run) for run in _calls("linear_no_grad", reference.linear)),
)
_register_vmap("linear_no_grad", linear_no_grad, rows_alone=True)
weight_only_linear_no_grad = register_no_grad(
    "weight_only_linear_no_grad",
    f"{_weight('qweight')}) -> Tensor",
    *_calls("weight_only_linear_no_grad", reference.weight_only_linear),
)
_register_vmap("weight_only_linear_no_grad", weight_only_linear_no_grad, rows_alone=True)
packed_linear_no_grad = register_no_grad(
    "packed_linear_no_grad",
    f"{_weight('packed')}{_POLICY}) -> Tensor",
    *(_with_flag(run) for run in _calls("packed_linear_no_grad", reference.linear, packed=True)),
)
packed_linear_pair_no_grad = _register_several("packed_linear_pair_no_grad", 2)
packed_linear_triple_no_grad = _register_several("packed_linear_triple_no_grad", 3)
packed_weight_only_linear_no_grad = register_no_grad(
    "packed_weight_only_linear_no_grad",
    f"{_weight('packed')}) -> Tensor",
    *_calls("packed_weight_only_linear_no_grad", reference.weight_only_linear, packed=True),
)
