"""Arguments that the operators refuse, and their messages."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import int8compile
from int8compile.ops import MAX_K, packing
from tests.helpers.implementations import DEFINITION, needs_kernel, operator

pytest.importorskip("hypothesis")

from tests.helpers.operators import OPS, REFUSED, arguments, changing, every_op

Change = Callable[[str, list[Any]], list[Any]]


def _replace(argument: str, change: Callable[[Any], Any]) -> Change:
    def replaced(name: str, args: list[Any]) -> list[Any]:
        names = [each.name for each in getattr(torch.ops.int8compile, name).default._schema.arguments]
        return [change(each) if at == argument else each for at, each in zip(names, args, strict=True)]

    return replaced


def _too_long(name: str, args: list[Any]) -> list[Any]:
    x, weight, *_ = args
    long = torch.zeros(*weight.shape[: -3 if "packed" in name else -1], MAX_K + 1, dtype=torch.int8)
    if "packed" in name:
        groups = packing.packed_shape(1, MAX_K + 1)[1]
        long = torch.full((*weight.shape[:-3], groups, 16, 4), 128, dtype=torch.uint8)
    x = torch.zeros(*x.shape[:-1], MAX_K + 1)
    return changing(name, args, x=x, qweight=long, packed=long, d=None)


DTYPE_LIST = ["torch.float32", "torch.float16", "torch.bfloat16"]

BadCalls = dict[str, tuple[Change, list[str]]]

BAD_CALLS: BadCalls = {
    "integer x": (_replace("x", lambda x: x.long()), ["x is torch.int64", *DTYPE_LIST]),
    "float64 x": (_replace("x", lambda x: x.double()), ["x is torch.float64", *DTYPE_LIST]),
    "float16 scale": (_replace("scale", lambda s: s.half()), ["scale is torch.float16", "give float32 ["]),
    "too few biases": (_replace("bias", lambda b: b[..., :-1]), ["bias is torch.float32 [", "]", "None"]),
    "scalar bias": (_replace("bias", lambda b: b.sum()), ["bias is torch.float32 []", "]", "None"]),
    "bias with one more dimension": (_replace("bias", lambda b: b[None]), ["bias is torch.float32 [1, ", "]", "None"]),
    "integer bias": (_replace("bias", lambda b: b.long()), ["bias is torch.int64", "float dtype"]),
    "K beyond int32": (_too_long, ["K is 131072", "131071"]),
}

# For a weight that is not packed.
BAD_WEIGHTS: BadCalls = {
    "wrong K": (_replace("x", lambda x: x[..., :-1]), ["x is [", "47]", "qweight [", "48]", "K]"]),
    "float qweight": (_replace("qweight", lambda q: q.float()), ["qweight is torch.float32", "give int8"]),
    "uint8 qweight": (_replace("qweight", lambda q: q.to(torch.uint8)), ["qweight is torch.uint8", "give int8"]),
    "qweight of too many dimensions": (
        _replace("qweight", lambda q: q[None]),
        ["qweight is torch.int8 [1, ", "dimensions"],
    ),
    "qweight of too few dimensions": (_replace("qweight", lambda q: q[0]), ["qweight is torch.int8 [", "dimensions"]),
    "scale with one more dimension": (
        _replace("scale", lambda s: s[..., None]),
        ["scale is torch.float32 [", "6, 1]", "6]"],
    ),
    "too few scales": (_replace("scale", lambda s: s[..., :-1]), ["scale is torch.float32 [", "5]", "6]"]),
}

# For a packed weight, whose shape does not tell its padding.
BAD_PACKED: BadCalls = {
    "wrong K": (_replace("x", lambda x: torch.cat([x, x], -1)), ["x is [", "96]", "packed [", "K]"]),
    "int8 packed": (_replace("packed", lambda q: q.view(torch.int8)), ["packed is torch.int8", "give uint8"]),
    "packed of too many dimensions": (_replace("packed", lambda q: q[None]), ["packed is torch.uint8 [", "dimensions"]),
    "packed of too few dimensions": (_replace("packed", lambda q: q[0]), ["packed is torch.uint8 [", "dimensions"]),
    "packed of other groups": (_replace("packed", lambda q: q[..., ::2, :]), ["packed [", "8, 4]", "K]"]),
    "too many scales": (_replace("scale", lambda s: s.repeat_interleave(17, -1)), ["x is [", "packed [", "outputs"]),
    "scale without dimensions": (_replace("scale", lambda s: s.sum()), ["scale is torch.float32 []", "N]"]),
}

BAD_SEVERAL: BadCalls = {name: BAD_PACKED[name] for name in ("wrong K", "int8 packed", "packed of other groups")} | {
    "negative outputs": (_replace("n0", lambda n: -n), ["outputs [-", "scale"]),
    "too many outputs": (_replace("n0", lambda n: n + 100), ["outputs [1", "scale"]),
    "too few panels": (_replace("packed", lambda q: q[1:]), ["packed is [", "panels"]),
    "other panels": (_replace("n0", lambda n: n - 5), ["packed is [", "panels"]),
}

BAD_THRESHOLDS: BadCalls = {
    "negative threshold": (_replace("threshold", lambda _: -1.0), ["threshold is -1.0", "finite number >= "]),
    "NaN threshold": (_replace("threshold", lambda _: math.nan), ["threshold is nan", "finite"]),
    "infinite threshold": (_replace("threshold", lambda _: math.inf), ["threshold is inf", "finite"]),
}

BAD_ROTATIONS: BadCalls = {
    "float64 d": (_replace("d", lambda d: d.double()), ["d is torch.float64 [", "give float32 [48]", "None"]),
    "d of other inputs": (_replace("d", lambda d: d[..., :-1]), ["d is torch.float32 [", "47]", "give float32 [48]"]),
    "d of one dimension too many": (_replace("d", lambda d: d[None]), ["d is torch.float32 [1, ", "give float32 [48]"]),
}

# The threshold of the column policy is absolute.
BAD_MEANS: BadCalls = {
    "threshold below 1": (_replace("threshold", lambda _: 0.999), ["threshold is 0.999", "finite number >= 1", "or 0"]),
}

BAD_EXPERTS: BadCalls = {
    "2-D x": (_replace("x", lambda x: x[0]), ["x is [4, 48]", "[B, M, K]", "[B, N, K]"]),
    "d of another number of experts": (
        _replace("d", lambda d: d[:1]),
        ["d is torch.float32 [1, 48]", "[48] or [2, 48]"],
    ),
    "other number of experts": (_replace("x", lambda x: x[:1]), ["x is [1, 4, 48]", "[2, "]),
}


def bad_calls(name: str) -> BadCalls:
    """Return the calls that an operator must refuse, with their messages."""
    several = "pair" in name or "triple" in name
    calls = BAD_CALLS | (BAD_SEVERAL if several else BAD_PACKED if "packed" in name else BAD_WEIGHTS)
    if "weight_only" not in name:
        calls = calls | BAD_THRESHOLDS
    if name != "column_linear":
        calls = calls | BAD_ROTATIONS | (BAD_MEANS if "weight_only" not in name else {})
    if "batched" in name:
        return calls | BAD_EXPERTS
    return calls | {"0-D x": (_replace("x", lambda x: x.sum()), ["x is []", "[..., K]", "[N, K]"])}


ALL_BAD_CALLS = [(name, case) for name in OPS for case in bad_calls(name)]


@pytest.mark.parametrize("mode", ["definition", "fake", "meta"])
@pytest.mark.parametrize(("name", "case"), ALL_BAD_CALLS)
def test_input_error(name: str, case: str, mode: str) -> None:
    """The message is the same in eager mode and in tracing."""
    change, says = bad_calls(name)[case]
    args = change(name, arguments(name))
    run = operator(name, DEFINITION) if mode == "definition" else OPS[name]
    with contextlib.ExitStack() as stack:
        if mode == "fake":
            fake = stack.enter_context(FakeTensorMode())
            args = [fake.from_tensor(each) if isinstance(each, Tensor) else each for each in args]
        elif mode == "meta":
            args = [each.to("meta") if isinstance(each, Tensor) else each for each in args]
        with pytest.raises(int8compile.InputError) as caught:
            run(*args)
    message = str(caught.value)
    assert re.match(rf"int8compile::{name.removesuffix('_no_grad')}\w*: ", message)
    for words in says:
        assert words in message


@needs_kernel
@pytest.mark.parametrize(("name", "case"), [call for call in ALL_BAD_CALLS if call[0] != "column_linear"])
def test_the_kernel_refuses_what_its_definition_refuses(name: str, case: str) -> None:
    """A kernel called directly, without tracing, would read or write beyond its arguments."""
    change, _ = bad_calls(name)[case]
    args = change(name, arguments(name))
    with pytest.raises(RuntimeError) as caught:
        OPS[name](*args)
    (argument,) = [
        schema.name
        for schema, bad, right in zip(
            getattr(torch.ops.int8compile, name).default._schema.arguments, args, arguments(name), strict=True
        )
        if not _alike(bad, right) and not (case == "K beyond int32" and schema.name != "x")
    ]
    message = str(caught.value)
    # Operators with and without gradients call the same function of the kernel.
    assert re.search(rf"int8compile::{name.removesuffix('_no_grad')}(_no_grad)?: ", message)
    # A wrong number of outputs is noticed by the sum of outputs, or by the panels.
    assert argument in message or (argument == "n0" and re.search("outputs|packed", message.partition(": ")[2]))


def _alike(bad: Any, right: Any) -> bool:
    if isinstance(right, Tensor):
        return isinstance(bad, Tensor) and (bad.dtype, bad.shape) == (right.dtype, right.shape)
    return bool(bad == right)


def test_input_errors_name_only_what_exists() -> None:
    """Messages suggest only functions that exist."""
    paths = set()
    for name, case in ALL_BAD_CALLS:
        change, _ = bad_calls(name)[case]
        for run in (operator(name, DEFINITION), OPS[name]):
            with pytest.raises(REFUSED) as caught:
                run(*change(name, arguments(name)))
            paths.update(re.findall(r"int8compile(?:\.\w+)+", str(caught.value)))
    for path in sorted(paths):
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"a message names {path}, which does not exist"


@every_op
def test_input_error_reaches_the_user_of_torch_compile(name: str) -> None:
    x, weight, scale, *rest = arguments(name)
    compiled = torch.compile(lambda x: OPS[name](x, weight, scale.half(), *rest), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=rf"int8compile::{name.removesuffix('_no_grad')}\w*: scale is torch\.float16"):
        compiled(x)
