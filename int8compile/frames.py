"""Warn of code that Dynamo gives up on: no backend is called then, so linears run in float.

Dynamo calls back at the end of each compilation. The code and its backend are found in Dynamo's frames on the stack.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import graph_break_reasons

from int8compile.errors import Int8Warning, first_line, listed

_MODULES = os.path.dirname(nn.modules.__file__)
# The number of Dynamo's graph breaks that have been looked at.
_seen = types.SimpleNamespace(count=0)


def is_ours(backend: Any) -> bool:
    """Return whether a backend is int8compile's, with or without the wrappers of torch.compile."""
    while backend is not None and getattr(backend, "__module__", None) != "int8compile.backend":
        wrapped = (getattr(backend, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn"))
        backend = next((inner for inner in wrapped if inner is not None), None)
    return backend is not None


def watch() -> None:
    """Warn from now on of code that Dynamo gives up on, until the next `torch._dynamo.reset()`."""
    _seen.count = min(_seen.count, len(graph_break_reasons))
    if _warn_of_float not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_warn_of_float)


def _warn_of_float(_: Any) -> None:
    error = sys.exception()
    new = graph_break_reasons[_seen.count :]
    _seen.count = len(graph_break_reasons)
    if isinstance(error, Unsupported) and (compiled := _compiled_frame()) is not None:
        code, module = compiled
        linears = [name for name, _ in _called(module)]
        _warn(
            f"does not compile {type(module).__name__}.{code.co_name} ({first_line(error)}), so linears that it",
            linears,
        )
        return
    # PyTorch's modules are not compiled separately, so a break inside one leaves all of it in float.
    inside = [frame for reason in new for frame in reason.user_stack[1:] if frame.filename.startswith(_MODULES)]
    if error is None and inside and (compiled := _compiled_frame()) is not None:
        _, module = compiled
        linears = [name for name, inner in _called(module) if inner or _is_of_pytorch(module)]
        where = f"{os.path.basename(inside[-1].filename)}:{inside[-1].lineno}"
        _warn(
            f"breaks the graph inside a module of PyTorch ({where}), which is not compiled then, so linears that it",
            linears,
        )


def _warn(what: str, linears: list[str]) -> None:
    if linears:
        warnings.warn(
            f"Dynamo {what} calls run in float: {listed(linears)}. TORCH_LOGS=graph_breaks shows why; "
            "int8compile.quantize_(model) makes them int8 without Dynamo",
            Int8Warning,
            stacklevel=3,
        )


def _compiled_frame() -> tuple[Any, nn.Module] | None:
    """Return the code that is being compiled for this backend and the module it is a method of; None for other code.

    With fullgraph=True the user gets the error itself, so None is returned.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        compiler, compiled = frame.f_locals.get("self"), frame.f_locals.get("frame")
        if hasattr(compiler, "_one_graph") and hasattr(compiled, "f_code"):
            # To compile a module of PyTorch itself, Dynamo begins with a function that calls it.
            module = compiled.f_locals.get("self", compiled.f_locals.get("fn"))
            ours = is_ours(getattr(compiler, "_torchdynamo_orig_backend", None))
            if ours and not compiler._one_graph and isinstance(module, nn.Module):
                return compiled.f_code, module
            return None
        frame = frame.f_back
    return None


def _called(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the linears that a module's own code calls, directly or through modules of PyTorch.

    Dynamo never begins with a module of PyTorch. It compiles other modules separately, when they are called.

    Yields:
        The name of each linear, and whether it is inside a module of PyTorch.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            yield prefix + name, bool(prefix)
        elif _is_of_pytorch(child):
            yield from _called(child, f"{prefix}{name}.")


def _is_of_pytorch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
