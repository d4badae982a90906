"""Register operators of the library `int8compile`: definition, fake, derivatives, vmap and autocast.

`define` + `impl` rather than `torch.library.custom_op`: a call costs 6 us instead of 31. Operators without gradients
exist because `torch.library.register_autograd` costs 8 us a call even when no gradient is asked for.
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

from int8compile.ops.declaration import SUPPORTED_DTYPES, Call, Declaration

_LIBRARY = torch.library.Library("int8compile", "DEF")


def define(
    declared: Declaration | type[Call],
    implementation: Callable[..., Any] | None = None,
    key: str = "CompositeExplicitAutograd",
) -> Any:
    """Define an operator with its fake, and return it.

    Args:
        declared: The declaration.
        implementation: The implementation in PyTorch; by default the declared one.
        key: The dispatch key of the implementation. CompositeImplicitAutograd needs no fake.
    """
    name = declared.name
    _LIBRARY.define(declared.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation or declared.implementation, key)
    if key != "CompositeImplicitAutograd":
        torch.library.register_fake(f"int8compile::{name}", declared.fake, lib=_LIBRARY)
    return getattr(torch.ops.int8compile, name)


def define_no_grad(declared: Declaration | type[Call]) -> Any:
    """Define an operator that autograd does not see; only for graphs that need no gradients."""

    def unseen(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return declared.implementation(*args)

    op = define(declared, unseen)
    hide_from_autograd(declared.name)
    register_autocast(declared.name, op)
    return op


def hide_from_autograd(name: str) -> None:
    """Have autograd pass calls of an operator on without recording them."""
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def register_vmap(name: str, op: Any, *, rows_alone: bool) -> None:
    """Register `torch.vmap`: one call if only x has a batch and its rows are independent, else a loop."""

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
def all_derivatives() -> Iterator[None]:
    """Enable gradients and tangents, which PyTorch disables inside a function and other levels of `torch.func` need."""
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        yield


def without_derivatives(op: Any, *args: Any) -> Tensor:
    """Call an operator below the current level of autograd or `torch.func`."""
    with all_derivatives(), torch._C._AutoDispatchBelowAutograd():
        result: Tensor = op(*args)
        return result


def register_derivatives(name: str, op: Any, function: Any) -> None:
    """Have calls that autograd records, or that carry tangents, go through a function.

    `torch.library.register_autograd` has no forward-mode derivatives, drops tangents without an error, and does not
    work under `torch.func`. `torch.func` calls the operator once for each of its levels, so the function is of a single
    level.
    """
    overload = op.default

    # Where Dynamo does not capture the calling code, it would compile this function by itself.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def autograd(keys: Any, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        # Only `forward_ad.dual_level` and `torch.func` have tangents.
        if recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def register_autocast(name: str, op: Callable[..., Any]) -> None:
    """Have autocast convert x."""

    def autocast(device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def cast_x(x: Tensor, *rest: Any) -> Any:
            # Only x: torch.library.register_autocast would also convert the scales, which stay float32. As with
            # F.linear, integers and float64 are not converted, so that `check` refuses them.
            if x.dtype in SUPPORTED_DTYPES:
                x = x.to(torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(x, *rest)

        return cast_x

    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, autocast(device), f"Autocast{device.upper()}")
