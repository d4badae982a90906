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
from int8compile.ops import OUTLIER_POLICIES, dequantize_weight, reference
from int8compile.ops.digits import NONE, Activations, quantize_rows
from int8compile.ops.linear import check
from int8compile.ops.quantized import (
    by_definition,
    check_quantize_rows,
    check_quantized_linear,
    empty_result,
    flattened,
)
from int8compile.triton_kernels import autotune, tables
from int8compile.triton_kernels.launch import Launch, Prepared
from int8compile.triton_kernels.policy import Policy
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import launches
from int8compile.triton_kernels.tables import Architecture, Config
from int8compile.triton_kernels.weight_only.launch import MAX_ROWS
from int8compile.triton_kernels.weight_only.launch import launch as weight_only_launch

_library: torch.library.Library | None = None

# Calls of a few rows, by all that they depend on but the tensors' values. Tensors begin at multiples of 16 bytes, as
# all but parts of others do: kernels are compiled for that.
_prepared: dict[Any, Prepared] = {}


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


def _quantize_rows(x: Tensor, threshold: float, by_column: bool) -> tuple[Tensor, Tensor]:
    index = _index(x)
    key = None if x.data_ptr() % 16 else (index, x.shape, x.stride(), x.dtype, threshold, by_column)
    prepared = _prepared.get(key)
    if prepared is None:
        return _quantize_rows_checked(x, threshold, by_column, key)
    into = Activations.empty(x if x.dim() == 2 else flattened(x), threshold, by_column)
    with _on(index):
        # Marks are made in lists only.
        prepared.run(x, *into, into.info)
    return into


def _quantize_rows_checked(x: Tensor, threshold: float, by_column: bool, key: Any) -> tuple[Tensor, Tensor]:
    """What is looked at once for all calls of a kind."""
    check_quantize_rows(x, threshold, by_column)
    index, given = _index(x), x
    x = flattened(x)
    arch = architecture(index)
    if arch is None or not arch.instruction or x.numel() == 0:
        return quantize_rows(x, threshold, OUTLIER_POLICIES[by_column])
    if x.stride(1) != 1:
        x = x.contiguous()
    into = Activations.empty(x, threshold, by_column)
    m, k = x.shape
    policy = Policy.of(m, k, len(into.planes) - 1, threshold, by_column, arch)
    with _on(index):
        calls = launches(x, into, policy)
        # Of many rows the host's time does not matter, and there are many sizes.
        if key and len(calls) == 1 and m <= arch.planes_rows and x.data_ptr() == given.data_ptr():
            _prepare(key, calls[0])
        else:
            for call in calls:
                call.run()
    return into


def _quantized_linear(
    planes: Tensor,
    info: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    by_column: bool,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    index = _index(planes)
    places = planes.data_ptr() | info.data_ptr() | qweight.data_ptr() | scale.data_ptr()
    key = None
    if not (places if bias is None else places | bias.data_ptr()) % 16:
        with_bias = None if bias is None else (bias.device, bias.shape, bias.dtype, bias.stride())
        how = (threshold, by_column, activation, n0, n1, dtype)
        weight = (qweight.device, qweight.dtype, qweight.shape, qweight.stride())
        with_scale = (scale.device, scale.dtype, scale.shape, scale.stride())
        key = (planes.device, planes.shape, info.shape, weight, with_scale, with_bias, how)
    prepared = _prepared.get(key)
    x = Activations(planes, info)
    if prepared is None:
        return _quantized_linear_checked(x, qweight, scale, bias, threshold, by_column, activation, n0, n1, dtype, key)
    y = empty_result(planes, qweight, activation, n0, dtype)
    with _on(index):
        if bias is None:
            prepared.run(planes, info, qweight, scale, y)
        else:
            prepared.run(planes, info, qweight, scale, bias, y)
    return y


def _quantized_linear_checked(
    x: Activations,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    by_column: bool,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
    key: Any,
) -> Tensor:
    """What is looked at once for all calls of a kind."""
    check_quantized_linear(x, qweight, scale, bias, threshold, activation, n0, n1, dtype)
    (count, m, k), n = x.planes.shape, qweight.shape[0]
    index = _index(x.planes)
    arch = architecture(index)
    if arch is None or not arch.instruction or 0 in (m, n, k):
        return by_definition(*x, qweight, scale, bias, threshold, by_column, activation, n0, n1, dtype)
    given = (qweight, scale, bias)
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    policy = Policy.of(m, k, count - 1, threshold, by_column, arch)
    y = empty_result(x.planes, qweight, activation, n0, dtype)
    product = Product(x, qweight, scale, bias, y, activation, n0, n1, policy)
    configs = tables.candidates(arch, m, k, lists=policy.lists)
    if (qweight.data_ptr() | x.planes.data_ptr() | qweight.stride(0)) % 16:
        configs = tuple(config for config in configs if config.kernel != "tma_gemm")
    with _on(index):
        call = launch_of(product, autotune.choose(product, configs, multiprocessors(index), launch_of))
        if key and m <= arch.planes_rows and not policy.lists and all(map(operator.is_, given, (qweight, scale, bias))):
            _prepare(key, call)
        else:
            call.run()
    return y


def _linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str) -> Tensor:
    check("linear", x, qweight, scale, bias, (threshold, outliers))
    by_column = bool(OUTLIER_POLICIES.index(outliers))
    planes, info = _quantize_rows(x, threshold, by_column)
    y = _quantized_linear(planes, info, qweight, scale, bias, threshold, by_column, NONE, 0, 0, x.dtype)
    return y.reshape(*x.shape[:-1], qweight.shape[0])


def _batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, outliers: str
) -> Tensor:
    check("batched_linear", x, qweight, scale, bias, (threshold, outliers), batch_dims=1)
    biases = [None] * x.shape[0] if bias is None else list(bias)
    products = [_linear(*each, threshold, outliers) for each in zip(x, qweight, scale, biases, strict=True)]
    return torch.stack(products) if products else x.new_empty(0, x.shape[1], qweight.shape[1])


def _weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check("weight_only_linear", x, qweight, scale, bias, ())
    if architecture(_index(x)) is None:
        return reference.weight_only_linear(x, qweight, scale, bias)
    flat = flattened(x)
    m, n = flat.shape[0], qweight.shape[0]
    if m > MAX_ROWS or 0 in (*flat.shape, n):
        # The matrix product of 16 bit is as fast as it gets; a tile of floats from int8 would cost more than it saves.
        y = torch.nn.functional.linear(x, dequantize_weight(qweight, scale, x.dtype))
        return y if bias is None else (y.to(torch.float32) + bias.to(torch.float32)).to(x.dtype)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    y = x.new_empty(m, n)
    bias = None if bias is None else bias.contiguous()
    with _on(_index(x)):
        weight_only_launch(flat, qweight.contiguous(), scale.contiguous(), bias, y).run()
    return y.reshape(*x.shape[:-1], n)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "batched_linear": _batched_linear,
    "weight_only_linear": _weight_only_linear,
    "quantize_rows": _quantize_rows,
    "quantized_linear": _quantized_linear,
}
