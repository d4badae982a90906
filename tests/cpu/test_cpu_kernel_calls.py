"""Calls of the CPU kernel: several weights, layouts, threads, and the functions that reach it."""

from __future__ import annotations

import concurrent.futures
import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8compile import cpu
from int8compile.ops import SUPPORTED_DTYPES, c_parameters, pack_weight, packing, quantize_weight, reference, signatures
from tests.helpers.implementations import VARIANTS, every_variant, needs_kernel, operator, profiled, using
from tests.helpers.models import threads
from tests.helpers.operators import LAYOUTS, OPS, assert_bitwise, every_dtype, factors

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.kernel_inputs import (
    DTYPES,
    FINITE,
    ROTATIONS,
    SEEDS,
    SIZES,
    batch,
    both_products,
    rotation,
    run,
    weights,
)

pytestmark = needs_kernel


# Several weights at once


@every_variant
@settings(max_examples=60)
@given(SEEDS, SIZES, DTYPES, st.tuples(st.integers(0, 70), st.integers(0, 40)), st.booleans(), ROTATIONS)
def test_pair_and_triple_are_single_calls(
    by: str,
    seed: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    others: tuple[int, int],
    has_bias: bool,
    rotation_kind: str,
) -> None:
    torch.manual_seed(seed)
    M, K, N = sizes
    x, d = batch(M, K, dtype), rotation(rotation_kind, K)
    for name, outputs in (("pair", (others[0], N)), ("triple", (*others, N))):
        parts = [weights(n, K) for n in outputs]
        biases = [torch.randn(n, dtype=dtype) if has_bias else None for n in outputs]
        results = operator(f"packed_linear_{name}_no_grad", by)(
            x,
            torch.cat([pack_weight(qweight) for qweight, _ in parts]),
            torch.cat([scale for _, scale in parts]),
            d,
            torch.cat(biases) if has_bias else None,
            *outputs[:-1],
            2.5,
        )
        for y, (qweight, scale), bias in zip(results, parts, biases, strict=True):
            single = run("packed_linear_no_grad", by, x, pack_weight(qweight), scale, d, bias, 2.5)
            assert_bitwise(y, single)
            assert y.is_contiguous()
        starts = [y.untyped_storage().data_ptr() for y in results if y.numel()]
        assert len(set(starts)) == len(starts)  # No result keeps the memory of another alive.


@every_variant
def test_experts_are_single_calls(by: str) -> None:
    for dtype, d in itertools.product(SUPPORTED_DTYPES, (None, factors(80), factors(3, 80))):
        x, parts = batch(3 * 7, 80, dtype).view(3, 7, 80), [weights(20, 80) for _ in range(3)]
        qweight, scale = (torch.stack(each) for each in zip(*parts, strict=True))
        bias = torch.randn(3, 20)
        y = operator("packed_batched_linear", by)(x, pack_weight(qweight), scale, d, bias, 2.5)
        for b in range(3):
            its_d = reference.of_each(d, b)
            one = operator("packed_linear", by)(x[b], pack_weight(qweight[b]), scale[b], its_d, bias[b], 2.5)
            assert_bitwise(y[b], one)


# Layouts, threads, modes


@settings(max_examples=30)
@given(SEEDS, st.integers(0, 2), st.integers(0, 600), st.integers(0, 600))
def test_pack_weight_is_its_definition(seed: int, B: int, N: int, K: int) -> None:
    """Sizes are large enough for several threads; tests/ops/test_ops.py checks the formula."""
    torch.manual_seed(seed)
    qweight = torch.randint(-128, 128, (B, N, K) if B else (N, K), dtype=torch.int8)
    with threads(1 + seed % 3):
        assert torch.equal(pack_weight(qweight), packing.pack_weight(qweight))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "every other row": lambda x: torch.cat([x, x], -1).reshape(*x.shape[:-1], 2, x.shape[-1])[..., 0, :],
    "offset": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "negated lazily": lambda x: torch._neg_view(-x),
}


@every_variant
@every_dtype
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(by: str, dtype: torch.dtype, layout: str) -> None:
    x, (qweight, scale), bias = batch(9, 80, dtype, FINITE), weights(40, 80), torch.randn(40, dtype=dtype)
    x = STRIDES[layout](x)
    packed = pack_weight(STRIDES["transposed"](qweight))
    # Strided scales, d and biases, too.
    scale, d, bias = STRIDES["sliced"](scale), STRIDES["sliced"](factors(80)), STRIDES["offset"](bias)
    plain = (x.contiguous(), qweight, scale.contiguous(), d.contiguous(), bias.contiguous())
    expected = reference.linear(*plain, 2.5)
    assert_bitwise(operator("packed_linear_no_grad", by)(x, packed, scale, d, bias, 2.5), expected)
    y = operator("packed_weight_only_linear_no_grad", by)(x, packed, scale, d, bias)
    assert_bitwise(y, reference.weight_only_linear(*plain))
    y = operator("linear", by)(x, STRIDES["transposed"](qweight), scale, d, bias, 2.5)
    assert_bitwise(y, expected)
    # 4-D, with its middle dimensions swapped.
    many = x.expand(2, 3, 9, 80).transpose(1, 2)
    y = operator("packed_linear_no_grad", by)(many, packed, scale, d, bias, 2.5)
    assert_bitwise(y, reference.linear(many.contiguous(), *plain[1:], 2.5))


def test_a_packed_weight_that_is_not_contiguous_is_refused() -> None:
    x, packed = torch.randn(3, 128), pack_weight(torch.ones(32, 128, dtype=torch.int8))
    for view in (packed.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([packed, packed], -1)[..., 0]):
        assert view.shape == packed.shape
        with pytest.raises(RuntimeError, match=r"packed_linear: packed .* not contiguous"):
            torch.ops.int8compile.packed_linear_no_grad(x, view, torch.ones(32), None, None, 6.0)


@every_variant
@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 2048, 300), (3, 900, 1000), (70, 500, 130), (600, 300, 20), (33, 4096, 5)]
)
def test_threads_change_nothing(by: str, M: int, K: int, N: int) -> None:
    """The work is divided by outputs, by rows, by both, or not at all."""
    x, (qweight, scale), bias = batch(M, K, torch.float32), weights(N, K), torch.randn(N)
    packed, d = pack_weight(qweight), factors(K)
    calls = both_products(x, qweight, scale, d, bias)
    for name, policy, wanted in calls:
        for count in (1, 2, 3, 7):
            with threads(count):
                assert_bitwise(run(name, by, x, packed, scale, d, bias, *policy), wanted)


def _shapes() -> list[tuple[Any, ...]]:
    """Return calls of many shapes with their expected results."""
    found = []
    for i in range(50):
        M, K, N = 1 + i * 7 % 40, (1 + i * 37 % 700) * (1 if i % 2 else 16), 1 + i * 13 % 150
        x, (qweight, scale) = batch(M, K, SUPPORTED_DTYPES[i % 3]), weights(N, K)
        packed, d = pack_weight(qweight), factors(K)
        if i % 4 == 3:
            call: tuple[Any, ...] = ("packed_weight_only_linear_no_grad", x, packed, scale, d, None)
            expected = reference.weight_only_linear(x, qweight, scale, d, None)
        else:
            call = ("packed_linear_no_grad", x, packed, scale, d, None, 2.5)
            expected = reference.linear(x, qweight, scale, d, None, 2.5)
        found.append((call, expected))
    return found


def test_several_python_threads_at_once() -> None:
    """Eight threads make 50 calls each in different orders, while a ninth keeps changing the variant."""
    shapes, done, start = _shapes(), threading.Event(), threading.Barrier(9)
    before = cpu.variant()

    def call(worker: int) -> int:
        start.wait()
        wrong = 0
        for i in range(50):
            (name, *args), expected = shapes[(i * 7 + worker * 11) % 50]
            y = getattr(torch.ops.int8compile, name)(*args)
            wrong += not torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
        return wrong

    def change() -> int:
        start.wait()
        for changes in itertools.count():
            cpu.use_variant(VARIANTS[changes % len(VARIANTS)])
            if done.wait(1e-4):
                return changes
        return 0

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        changer = pool.submit(change)
        try:
            assert sum(pool.map(call, range(8))) == 0
        finally:
            done.set()
        assert changer.result() > len(VARIANTS)
    cpu.use_variant(before)


def test_torch_says_how_many_threads() -> None:
    """In a fresh process, one thread starts none, three start two more, which PyTorch's own loops use as well."""
    program = """
import os, torch
import int8compile
from int8compile import cpu, ops
assert cpu.available()
x, packed, scale = torch.randn(64, 4096), ops.pack_weight(torch.ones(4096, 4096, dtype=torch.int8)), torch.ones(4096)
def count():
    return len(os.listdir("/proc/self/task"))
def call():
    ops.packed_linear_no_grad(x, packed, scale, None, None, 6.0)
    return count()
torch.set_num_threads(1)
before = count()
assert call() == before, (call(), before)
torch.set_num_threads(3)
assert call() == before + 2, (call(), before)
torch.randn(10**6).sin_()
assert count() == before + 2, (count(), before)
torch.set_num_threads(1)
assert call() <= before + 2
"""
    if sys.platform != "linux":
        pytest.skip("counts threads through /proc")
    # pack_weight runs with one thread before the count, when the pool must not exist yet.
    subprocess.run(
        [sys.executable, "-c", program.replace("import os, torch", "import os, torch; torch.set_num_threads(1)")],
        check=True,
        timeout=120,
    )


def test_the_library_brings_no_thread_pool_of_its_own() -> None:
    library = cpu.load()
    assert library is not None
    if not shutil.which("readelf"):
        pytest.skip("no readelf here")
    listed = subprocess.run(["readelf", "-d", str(library.path)], check=True, capture_output=True, text=True).stdout
    needed = [line.rsplit("[", 1)[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert not [name for name in needed if "omp" in name or "tbb" in name]


@every_variant
def test_inference_mode(by: str) -> None:
    """Inputs may be made inside or outside inference mode, and results can be used in either."""
    d = factors(80)
    qweight, scale = quantize_weight(torch.randn(40, 80), d)
    outside = torch.randn(5, 80)
    with torch.inference_mode():
        x, packed, bias = outside * 1, pack_weight(qweight), torch.randn(40, dtype=torch.float16)
        assert packed.is_inference()
        y = operator("packed_linear_no_grad", by)(x, packed, scale, d, bias, 6.0)
        assert_bitwise(y, reference.linear(x, qweight, scale, d, bias, 6.0))
    assert y.is_inference()
    assert_bitwise(operator("packed_linear_no_grad", by)(outside, packed, scale, d, bias, 6.0), y.clone())


# The path taken


def test_the_dispatcher_has_the_kernel_for_every_operator() -> None:
    for name in {*OPS, "pack_weight", "quantize_weight"} - {"column_linear"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"int8compile::{name}", "CPU")


# The operators that the definition may multiply with.
FLOAT_PRODUCTS = {"aten::mm", "aten::matmul", "aten::bmm", "aten::addmm", "mkldnn::_linear_pointwise", "aten::linear"}


@every_variant
def test_the_operator_runs_in_the_kernel(by: str) -> None:
    d = factors(80)
    qweight, scale = quantize_weight(torch.randn(40, 80), d)
    packed, x = pack_weight(qweight), torch.randn(5, 80)
    with using(by):
        names = profiled(lambda: torch.ops.int8compile.packed_linear(x, packed, scale, d, None, 6.0))
    assert names["int8compile::packed_linear"] == 1
    assert not FLOAT_PRODUCTS & set(names)
    names = profiled(lambda: operator("packed_linear", "definition")(x, packed, scale, d, None, 6.0))
    assert FLOAT_PRODUCTS & set(names), "the profiler shows no product: the test shows nothing"


def test_c_functions_of_packages_follow_from_the_schemas() -> None:
    """A definition in C++ with other parameters than the header's would not compile."""
    op = torch.ops.int8compile.packed_linear_pair_no_grad.default
    tensor = "AtenTensorHandle"
    assert c_parameters(op) == (
        f"{tensor} x, {tensor} packed, {tensor} scale, {tensor}* d, {tensor}* bias, int64_t n0, double threshold, "
        f"{tensor}* y0, {tensor}* y1"
    )
    header = signatures.header()
    names = "x, packed, scale, d, bias, n0, threshold, y0, y1"
    assert f"FUNCTION({op._opname}, packed_linear_pair, ({c_parameters(op)}), ({names}))" in header
    assert "OPERATOR(packed_linear_pair_no_grad, packed_linear_pair)" in header
    assert (
        "std::tuple<Tensor, Tensor> packed_linear_pair(const Tensor& x, const Tensor& packed, const Tensor& scale, "
        "const Maybe& d, const Maybe& bias, int64_t n0, double threshold);"
    ) in header


@pytest.mark.parametrize(
    ("grad", "expected"),
    [
        (False, {"int8compile::packed_linear_no_grad": 1, "int8compile::packed_weight_only_linear_no_grad": 1}),
        (True, {"int8compile::packed_linear": 1, "int8compile::packed_weight_only_linear": 1}),
    ],
)
def test_a_compiled_model_runs_in_the_kernel(grad: bool, expected: dict[str, int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lm_head = nn.Linear(32, 48), nn.Linear(48, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(torch.relu(self.inner(x)))

    model, x = Model().requires_grad_(False), torch.randn(5, 32, requires_grad=grad)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"lm_head": "int8_weight"})
    compiled(x)
    names = profiled(lambda: compiled(x))
    assert {name: count for name, count in names.items() if name.startswith("int8compile::")} == expected
    assert not FLOAT_PRODUCTS & set(names)
