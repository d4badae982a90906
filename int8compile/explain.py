"""`explain()`: which linears of a model `torch.compile(backend="int8")` rewrites, which not, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame
from torch.fx import GraphModule

from int8compile import roofline
from int8compile.backend import copy_graph, rewrite_captured
from int8compile.config import Int8Config
from int8compile.passes import RULES, finite, matches
from int8compile.report import Report


def explain(
    model: Callable[..., Any], *args: Any, config: Int8Config | Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Lists every linear site of a model with what `torch.compile(model, backend="int8")` would do with it.

    The model runs once, in float, under `torch.no_grad()`: explain() describes inference. (With grad mode on, weights that
    require grad stay in float; the backend warns.) Nothing is compiled, and the model is left as it was: buffers that the
    run changes are restored, Dynamo's cache entries dropped.

    Args:
        model: A module or a function; a compiled one is explained as what it was made from.
        *args: Its inputs.
        config: The options, as an `Int8Config` or as the dictionary given to `torch.compile(options=...)`.
        **kwargs: Its keyword inputs.

    Returns:
        A report: `print(report)` shows a table, `report.to_dict()` is data.

    Raises:
        ConfigError: An option is unknown or has a value that is not allowed.
    """
    if not isinstance(config, Int8Config):
        config = Int8Config.from_options(config)
    model = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", model)
    report = Report()

    def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report.add(rewrite_captured(copy_graph(gm), example_inputs, config, rules=(*RULES, finite))[1])
        return gm.forward

    with torch.no_grad(), _buffers_restored(model), _dynamo_caches_restored(record):
        torch.compile(model, backend=record)(*args, **kwargs)
    report.unused_patterns = tuple(
        pattern for pattern in config.skip_modules if not any(matches(pattern, site.path) for site in report.sites)
    )
    return report


@contextlib.contextmanager
def _buffers_restored(model: Any) -> Iterator[None]:
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [(buffer, buffer.clone(), buffer._version) for buffer in buffers if not buffer.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value, version in saved:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def _dynamo_caches_restored(backend: object) -> Iterator[None]:
    """Drops the cache entries that Dynamo makes meanwhile: they would count against the model's recompile limit."""

    def entries() -> dict[CodeType, list[Any]]:
        codes = [code for ref in convert_frame.input_codes.seen if (code := ref()) is not None]
        return {code: eval_frame._debug_get_cache_entry_list(code) for code in codes}

    before = entries()
    try:
        yield
    finally:
        for code, now in entries().items():
            old = before.get(code, [])
            if not old:
                eval_frame.reset_code(code)
