"""Code that Dynamo gives up on: no backend is asked then, so what would be int8 runs in float.

Dynamo tells of the end of each compilation; what was compiled, and for which backend, its own frames on the stack know.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import Unsupported

from int8compile.errors import Int8Warning, first_line, listed


def is_ours(backend: Any) -> bool:
    """Whether what Dynamo calls a backend is ours, in the wrappers that torch.compile puts around it."""
    while backend is not None and getattr(backend, "__module__", None) != "int8compile.backend":
        wrapped = (getattr(backend, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn"))
        backend = next((inner for inner in wrapped if inner is not None), None)
    return backend is not None


def watch() -> None:
    """Has Dynamo tell of code that it gives up on, for a warning; until the next `torch._dynamo.reset()`."""
    if _warn_of_float not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_warn_of_float)


def _warn_of_float(_: Any) -> None:
    error = sys.exception()
    if not isinstance(error, Unsupported):
        return
    compiled = _compiled_frame()
    if compiled is None:
        return
    code, module = compiled
    linears = list(_called(module))
    if linears:
        warnings.warn(
            f"Dynamo does not compile {type(module).__name__}.{code.co_name} ({first_line(error)}), so linears that it "
            f"calls run in float: {listed(linears)}. TORCH_LOGS=graph_breaks shows where it gives up; "
            "int8compile.quantize_(model) makes them int8 without Dynamo",
            Int8Warning,
            stacklevel=2,
        )


def _compiled_frame() -> tuple[Any, nn.Module] | None:
    """The code that is being compiled for our backend, and the module it is a method of; None for other code.

    Where the whole graph is asked for, the user gets the error itself.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        compiler, compiled = frame.f_locals.get("self"), frame.f_locals.get("frame")
        if hasattr(compiler, "_one_graph") and hasattr(compiled, "f_code"):
            module = compiled.f_locals.get("self")
            ours = is_ours(getattr(compiler, "_torchdynamo_orig_backend", None))
            if ours and not compiler._one_graph and isinstance(module, nn.Module):
                return compiled.f_code, module
            return None
        frame = frame.f_back
    return None


def _called(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The linears that a module's own code calls, itself or through modules of PyTorch, which Dynamo never begins with.

    Other modules are compiled by themselves, when they are called.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            yield prefix + name
        elif type(child).__module__.startswith("torch.nn."):
            yield from _called(child, f"{prefix}{name}.")
