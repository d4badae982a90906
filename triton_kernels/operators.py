"""Implementations of the operators of `int8compile.ops` on GPUs, with Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from int8compile import hardware
from int8compile.ops import portable, reference
from int8compile.ops.declaration import Declaration
from int8compile.ops.linears import grouped_by_definition
from int8compile.ops.quantized import (
    NONE,
    NormQuantizeRows,
    QuantizedLinear,
    QuantizeRows,
    empty_result,
    empty_rows,
    empty_sum,
    flattened,
)
from int8compile.triton_kernels import autotune, loading, tables
from int8compile.triton_kernels.gemm.launch import gemm_launch
from int8compile.triton_kernels.gemv.launch import gemv_launch
from int8compile.triton_kernels.grouped_gemm.launch import grouped_gemm_launch
from int8compile.triton_kernels.launch import TENSORS, Launch, Prepared
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.quantize.launch import in_chunks, norm_launch, quantize_launch
from int8compile.triton_kernels.tables import Architecture, Config
from int8compile.triton_kernels.weight_only.launch import weight_only_launches

# Builders of products' calls by `Config.kernel`.
_LAUNCHES: dict[str, Callable[[Product, Config], Launch]] = {"gemm": gemm_launch, "gemv": gemv_launch}
if not loading.gluon_failure():
    from int8compile.triton_kernels.gluon_gemm.launch import gluon_gemm_launch

    _LAUNCHES["gluon_gemm"] = gluon_gemm_launch

_library: torch.library.Library | None = None


class _Products:
    """The prepared calls of one product, for any number of rows; the number decides on the configuration.

    Args:
        choose: Returns the table's configuration for a number of rows.
    """

    MOST = 4096

    def __init__(self, choose: Callable[[int], Config]) -> None:
        self.by_config: dict[Config, Prepared] = {}
        self._by_rows: dict[int, Prepared] = {}
        self._choose = choose

    def of(self, m: int) -> Prepared | None:
        """Return the call for M rows; None if its configuration is not prepared, or not measured yet."""
        prepared = self._by_rows.get(m)
        if prepared is None and not autotune.enabled():
            prepared = self.by_config.get(self._choose(m))
            if prepared is not None:
                self.remember(m, prepared)
        return prepared

    def remember(self, m: int, prepared: Prepared) -> None:
        """Store the call for M rows, so that no configuration has to be chosen again."""
        if len(self._by_rows) >= self.MOST:
            self._by_rows.clear()
        self._by_rows[m] = prepared


# Keys hold all that calls depend on, except the number of rows and the values. Kernels are compiled for tensors that
# begin at multiples of 16 bytes; only views of other tensors begin elsewhere.
_prepared: dict[Any, Prepared] = {}
_products: dict[Any, _Products] = {}


@functools.cache
def architecture(index: int) -> Architecture | None:
    """Return the tables of this machine's GPU with this index; None if there are no kernels for it."""
    family = hardware.kernel_family(hardware.of(torch.device("cuda", index)).isa)
    return tables.ARCHITECTURES.get(family)


@functools.cache
def multiprocessors(index: int) -> int:
    """Return the number of multiprocessors of this machine's GPU with this index."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def register() -> None:
    """Register the kernels for the dispatch key CUDA, which is ROCm's too, once."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("int8compile", "IMPL")
    for name, function in _OPERATORS.items():
        _library.impl(name, function, "CUDA")


def launch_of(product: Product, config: Config) -> Launch:
    """Return the kernel call that computes a product with a configuration."""
    return _LAUNCHES[config.kernel](product, config)


def _index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def _on(device: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a device is the current one, on which Triton launches."""
    return _HERE if device == torch.cuda.current_device() else torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def _key(*tensors: Tensor | None) -> Any:
    """Return the properties of tensors that kernels depend on; None if one does not begin at a multiple of 16 bytes."""
    places = 0
    kinds: list[Any] = []
    for tensor in tensors:
        if tensor is not None:
            places |= tensor.data_ptr()
            kinds += (tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        else:
            kinds.append(None)
    return None if places % 16 else (*kinds,)


def _key_of_rows(x: Tensor) -> Any:
    """Return the same for x, whose rows are contiguous, without the number of rows."""
    k = x.shape[-1] if x.dim() else 0
    return None if x.data_ptr() % 16 else (x.device, x.dtype, k, k if x.is_contiguous() else x.stride(0))


def _with_rows(x: Tensor) -> Tensor:
    """Return x itself if it is contiguous, otherwise as [M, K] with contiguous rows."""
    if x.is_contiguous():
        return x
    x = flattened(x)
    return x if x.stride(1) == 1 else x.contiguous()


def _matrix(x: Tensor) -> Tensor:
    """Return a result of `_with_rows` as [M, K]; a single row has a stride of K too."""
    return x.view(-1).view(-1, x.shape[-1]) if x.is_contiguous() else x


def _in_chunks(x: Tensor) -> bool:
    k = x.shape[-1]
    return k > 0 and in_chunks(x.numel() // k, k)


def _contiguous(*tensors: Tensor | None) -> Iterator[Any]:
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def _quantizing(index: int) -> Architecture | None:
    """Return the tables of a GPU; None if it has no kernels for quantized activations."""
    arch = architecture(index)
    return arch if arch is not None and arch.matrix_instruction else None


def _start(call: Launch, key: Any, op: str) -> None:
    """Run a call, and keep it for later ones if there is a key."""
    prepared = call.prepare(TENSORS[op])
    if prepared is not None and key is not None:
        _prepared[key] = prepared


def _quantize_rows(x: Tensor, d: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    index, x, d = _index(x), _with_rows(x), None if d is None else d.contiguous()
    of_x, of_d = _key_of_rows(x), _key(d)
    key = (of_x, of_d, threshold, _in_chunks(x)) if of_x and of_d else None
    prepared = _prepared.get(key)
    if prepared is None or x.numel() == 0:
        call = QuantizeRows(x, d, threshold)
        if x.numel() == 0 or not _quantizing(index):
            return call.compute()
    made = empty_rows(x, threshold)
    with _on(index):
        if prepared is not None:
            prepared.run(made[0].shape[1], (x, d, *made))
        else:
            _start(quantize_launch(_matrix(x), d, threshold, *made), key, "quantize_rows")
    return made


def _norm_quantize_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d: Tensor | None,
    kind: int,
    eps: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, given = _index(x), (x, residual, weight, bias, d, kind, eps, threshold)
    fits = residual is None or residual.shape == x.shape
    x, residual = _with_rows(x), None if residual is None else _with_rows(residual)
    weight, bias, d = _contiguous(weight, bias, d)
    of_rows = (_key_of_rows(x), True if residual is None else _key_of_rows(residual))
    fixed = _key(weight, bias, d)
    key = (of_rows, residual is None, fixed, kind, eps, threshold) if fits and fixed and all(of_rows) else None
    prepared = _prepared.get(key)
    if prepared is None or x.numel() == 0:
        call = NormQuantizeRows(*given)
        if x.numel() == 0 or not _quantizing(index):
            return call.compute()
    total = empty_sum(given[0], residual)
    made = empty_rows(x, threshold)
    with _on(index):
        if prepared is not None:
            prepared.run(made[0].shape[1], (x, residual, weight, bias, d, total, *made))
        else:
            added = None if residual is None else _matrix(residual)
            launch = norm_launch(_matrix(x), added, weight, bias, d, kind, eps, threshold, total, *made)
            _start(launch, key, "norm_quantize_rows")
    return total, *made


def _quantized_linear(
    q: Tensor,
    rows: Tensor,
    counters: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    n0: int,
    n1: int,
    dtype: torch.dtype,
) -> Tensor:
    index, (of_q, of_rows) = _index(q), (q.shape, rows.shape)
    key, fixed = None, _key(qweight, scale, bias)
    places = q.data_ptr() | rows.data_ptr() | counters.data_ptr()
    whole = q.is_contiguous() and rows.is_contiguous() and counters.is_contiguous()
    if fixed and whole and not places % 16 and len(of_q) == 3 and of_q[1:2] == of_rows[1:]:
        of_x = (q.device, q.dtype, of_q[0], of_q[2], rows.dtype, of_rows[0], counters.dtype, counters.shape)
        key = (of_x, fixed, activation, n0, n1, dtype)
    products = _products.get(key)
    prepared = products.of(of_q[1]) if products is not None and of_q[1] else None
    if prepared is None:
        return _first_product(key, q, rows, counters, qweight, scale, bias, activation, n0, n1, dtype)
    y = empty_result(q, qweight, activation, n0, dtype)
    with _on(index):
        prepared.run(of_q[1], (q, rows, counters, qweight, scale, bias, y))
    return y


def _first_product(key: Any, *given: Any) -> Tensor:
    """Compute `quantized_linear` without a prepared call, and prepare one if there is a key."""
    call = QuantizedLinear(*given)
    q, rows, counters, qweight, scale, bias, activation, n0, n1, dtype = given
    (_, m, k), n = q.shape, qweight.shape[0]
    index = _index(q)
    arch = _quantizing(index)
    if arch is None or 0 in (m, n, k):
        return call.compute()
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    scale, bias, q, rows, counters = _contiguous(scale, bias, q, rows, counters)
    if not (qweight is given[3] and scale is given[4] and bias is given[5]):
        key = None
    y = empty_result(q, qweight, activation, n0, dtype)
    product = Product(q, rows, counters, qweight, scale, bias, y, activation, n0, n1)
    aligned = (qweight.data_ptr() | q.data_ptr() | qweight.stride(0)) % 16 == 0
    sms = multiprocessors(index)

    def configs(m: int) -> tuple[Config, ...]:
        return tables.candidates(arch, m, k, aligned=aligned)

    with _on(index):
        config = autotune.choose(product, configs(m), sms, launch_of)
        products = _products.get(key)
        if products is None:
            products = _Products(lambda m: tables.choose(configs(m), m, n, k, sms))
        prepared = products.by_config.get(config)
        if prepared is not None:
            prepared.run(m, (q, rows, counters, qweight, scale, bias, y))
        else:
            prepared = launch_of(product, config).prepare(TENSORS["quantized_linear"])
    if key is not None and prepared is not None:
        products.by_config[config] = prepared
        # Nothing can be measured during capture of a graph; the first call outside of one measures.
        if not (autotune.enabled() and torch.cuda.is_current_stream_capturing()):
            products.remember(m, prepared)
        _products[key] = products
    return y


def _linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    y = _quantized_linear(*_quantize_rows(x, d, threshold), qweight, scale, bias, NONE, 0, 0, x.dtype)
    return y.reshape(*x.shape[:-1], qweight.shape[0])


def _batched_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    if not _quantizing(_index(x)) or 0 in (*x.shape, qweight.shape[1]):
        return reference.each_of(_linear, x, qweight, scale, d, bias, threshold)
    return _groups(x.flatten(0, 1), qweight, scale, d, bias, threshold, None, x.shape[1]).view(*x.shape[:2], -1)


def _grouped_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, ends: Tensor, threshold: float
) -> Tensor:
    """Multiply rows with the weight of their expert.

    `ends` is not read on the host, so it is not checked: if it does not ascend, results are NaN and nothing is raised.
    """
    if not _quantizing(_index(x)) or 0 in (*x.shape, *qweight.shape):
        return grouped_by_definition(x, qweight, scale, d, ends, threshold)
    return _groups(x, qweight, scale, d, None, threshold, ends.to(x.device), 0)


def _groups(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    ends: Tensor | None,
    rows_per_group: int,
) -> Tensor:
    """Multiply groups of rows of x [M, K] with their weights; groups end at `ends` or have equal sizes."""
    index, x = _index(x), _matrix(_with_rows(x))
    d, bias, ends, qweight, scale = _contiguous(d, bias, ends, qweight, scale)
    q, rows, counters = empty_rows(x, threshold)
    y = x.new_empty(x.shape[0], qweight.shape[1])
    with _on(index):
        quantize_launch(x, d, threshold, q, rows, counters, ends, rows_per_group).run()
        grouped_gemm_launch(Product(q, rows, counters, qweight, scale, bias, y), ends, rows_per_group).run()
    return y


def _weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, d: Tensor | None, bias: Tensor | None) -> Tensor:
    flat, n = flattened(x), qweight.shape[0]
    arch = architecture(_index(x))
    if arch is None or 0 in (*flat.shape, n):
        return reference.weight_only_linear(x, qweight, scale, d, bias)
    if not arch.matrix_instruction:
        return portable.weight_only_linear(x, qweight, scale, d, bias)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    d, bias, qweight, scale = _contiguous(d, bias, qweight, scale)
    with _on(_index(x)):
        for call in weight_only_launches(flat, d, qweight, scale, bias, y.view(-1, n)):
            call.run()
    return y


_OPERATORS: dict[str, Callable[..., Any]] = {
    "linear": Declaration("linear", _linear).implementation,
    "batched_linear": Declaration("batched_linear", _batched_linear, batch_dims=1).implementation,
    "grouped_linear": Declaration("grouped_linear", _grouped_linear, grouped=True).implementation,
    "weight_only_linear": Declaration("weight_only_linear", _weight_only_linear, quantizes=False).implementation,
    "quantize_rows": _quantize_rows,
    "norm_quantize_rows": _norm_quantize_rows,
    "quantized_linear": _quantized_linear,
}
