"""The operators on GPUs: what `int8compile.ops` defines, by Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from int8compile import hardware
from int8compile.ops import portable, reference
from int8compile.ops.declaration import Declaration
from int8compile.ops.quantized import (
    NONE,
    by_definition,
    check_quantize_rows,
    check_quantized_linear,
    empty_result,
    empty_rows,
    flattened,
    quantize,
)
from int8compile.triton_kernels import autotune, tables
from int8compile.triton_kernels.launch import Launch, Prepared
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import launch as quantize_launch
from int8compile.triton_kernels.tables import Architecture, Config
from int8compile.triton_kernels.weight_only.launch import launches as weight_only_launches

_library: torch.library.Library | None = None

# Calls of a few rows, by all that they depend on but the tensors' values. Tensors begin at multiples of 16 bytes, as
# all but parts of others do: kernels are compiled for that.
_prepared: dict[Any, Prepared] = {}
# Of more rows the host's time does not matter, and there are many numbers of them.
_PREPARED_ROWS = 64


@functools.cache
def architecture(index: int) -> Architecture | None:
    """The tables of a GPU of this machine; None where Triton has no kernels for it."""
    family = hardware.kernel_family(hardware.of(torch.device("cuda", index)).isa)
    return tables.ARCHITECTURES.get(family)


@functools.cache
def multiprocessors(index: int) -> int:
    """How many programs a GPU of this machine runs side by side, at least."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def register() -> None:
    """Registers the kernels for the dispatch key CUDA (ROCm's too), once."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("int8compile", "IMPL")
    for name, function in _OPERATORS.items():
        _library.impl(name, function, "CUDA")


def launch_of(product: Product, config: Config) -> Launch:
    """The call that computes a product with a configuration."""
    module = importlib.import_module(f"int8compile.triton_kernels.{config.kernel}.launch")
    made: Launch = module.launch(product, config)
    return made


def _prepare(key: Any, call: Launch) -> None:
    """Runs a call and keeps it, unless it is only a makeshift."""
    prepared = call.prepare()
    # What is captured cannot be measured; the first call outside of a graph is.
    if prepared is not None and not (autotune.enabled() and torch.cuda.is_current_stream_capturing()):
        _prepared[key] = prepared


def _index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def _on(device: int) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return _HERE if device == torch.cuda.current_device() else torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def _quantize_rows(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    index = _index(x)
    key = None
    if not (x.data_ptr() if d is None else x.data_ptr() | d.data_ptr()) % 16:
        rotation = None if d is None else (d.device, d.shape, d.dtype, d.stride())
        key = (index, x.shape, x.stride(), x.dtype, rotation, threshold)
    prepared = _prepared.get(key)
    if prepared is None:
        return _quantize_rows_checked(x, d, threshold, key)
    q, rows = empty_rows(x if x.dim() == 2 else flattened(x), threshold)
    with _on(index):
        if d is None:
            prepared.run(x, q, rows)
        else:
            prepared.run(x, d, q, rows)
    return q, rows


def _quantize_rows_checked(x: Tensor, d: Tensor | None, threshold: float, key: Any) -> tuple[Tensor, Tensor]:
    """Quantize after the checks that one call of a kind needs."""
    check_quantize_rows(x, d, threshold)
    index, given = _index(x), (x, d)
    x = flattened(x)
    arch = architecture(index)
    if arch is None or not arch.instruction or x.numel() == 0:
        return quantize(x, d, threshold)
    if x.stride(1) != 1:
        x = x.contiguous()
    d = None if d is None else d.contiguous()
    q, rows = empty_rows(x, threshold)
    with _on(index):
        call = quantize_launch(x, d, threshold, q, rows)
        same = x.data_ptr() == given[0].data_ptr() and d is given[1]
        if key and x.shape[0] <= _PREPARED_ROWS and same:
            _prepare(key, call)
        else:
            call.run()
    return q, rows


def _quantized_linear(
    q: Tensor,
    rows: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    index = _index(q)
    places = q.data_ptr() | rows.data_ptr() | qweight.data_ptr() | scale.data_ptr()
    key = None
    if not (places if bias is None else places | bias.data_ptr()) % 16:
        with_bias = None if bias is None else (bias.device, bias.shape, bias.dtype, bias.stride())
        weight = (qweight.device, qweight.dtype, qweight.shape, qweight.stride())
        with_scale = (scale.device, scale.dtype, scale.shape, scale.stride())
        key = (q.device, q.shape, rows.shape, weight, with_scale, with_bias, activation, n0, n1, dtype)
    prepared = _prepared.get(key)
    if prepared is None:
        return _quantized_linear_checked(q, rows, qweight, scale, bias, activation, n0, n1, dtype, key)
    y = empty_result(q, qweight, activation, n0, dtype)
    with _on(index):
        if bias is None:
            prepared.run(q, rows, qweight, scale, y)
        else:
            prepared.run(q, rows, qweight, scale, bias, y)
    return y


def _quantized_linear_checked(
    q: Tensor,
    rows: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
    key: Any,
) -> Tensor:
    """Multiply after the checks that one call of a kind needs."""
    check_quantized_linear(q, rows, qweight, scale, bias, activation, n0, n1, dtype)
    (_, m, k), n = q.shape, qweight.shape[0]
    index = _index(q)
    arch = architecture(index)
    if arch is None or not arch.instruction or 0 in (m, n, k):
        return by_definition(q, rows, qweight, scale, bias, activation, n0, n1, dtype)
    given = (qweight, scale, bias)
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    y = empty_result(q, qweight, activation, n0, dtype)
    product = Product(q, rows, qweight, scale, bias, y, activation, n0, n1)
    configs = tables.candidates(arch, m, k)
    if (qweight.data_ptr() | q.data_ptr() | qweight.stride(0)) % 16:
        configs = tuple(config for config in configs if config.kernel != "tma_gemm")
    with _on(index):
        call = launch_of(product, autotune.choose(product, configs, multiprocessors(index), launch_of))
        if key and m <= _PREPARED_ROWS and all(map(operator.is_, given, (qweight, scale, bias))):
            _prepare(key, call)
        else:
            call.run()
    return y


def _linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    y = _quantized_linear(*_quantize_rows(x, d, threshold), qweight, scale, bias, NONE, 0, 0, x.dtype)
    return y.reshape(*x.shape[:-1], qweight.shape[0])


def _batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    return reference.each_of(_linear, x, qweight, scale, d, bias, threshold)


def _weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None) -> Tensor:
    flat, n = flattened(x), qweight.shape[0]
    arch = architecture(_index(x))
    if arch is None or 0 in (*flat.shape, n):
        return reference.weight_only_linear(x, qweight, scale, d, bias)
    if not arch.instruction:
        return portable.weight_only_linear(x, qweight, scale, d, bias)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    d, bias = (None if each is None else each.contiguous() for each in (d, bias))
    with _on(_index(x)):
        for call in weight_only_launches(flat, d, qweight.contiguous(), scale.contiguous(), bias, y.view(-1, n)):
            call.run()
    return y


_OPERATORS: dict[str, Callable[..., Any]] = {
    "linear": Declaration("linear", _linear).implementation,
    "batched_linear": Declaration("batched_linear", _batched_linear, batch_dims=1).implementation,
    "weight_only_linear": Declaration("weight_only_linear", _weight_only_linear, quantizes=False).implementation,
    "quantize_rows": _quantize_rows,
    "quantized_linear": _quantized_linear,
}
