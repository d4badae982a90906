"""How kernels are launched, with a driver that records its arguments instead of using a GPU."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import triton

from benchmarks.gpu.standin import Driver
from int8compile.errors import InputError
from int8compile.ops import quantized, rotation_of
from int8compile.triton_kernels import operators
from int8compile.triton_kernels.launch import settle
from int8compile.triton_kernels.product import Product
from int8compile.triton_kernels.tables import ARCHITECTURES, Config

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets, nothing is started"
)


ROOT = pathlib.Path(__file__).parents[2]

# The launched kernels: name, grid and arguments. It is one list because Triton keeps compiled kernels and their
# launchers as long as the process lives.
STARTED: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []


class Launcher:
    """Records its launches."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *given: Any) -> None:
        # Three sizes of the grid, six values about the launch, the arguments.
        STARTED.append((self.name, given[:3], given[9:]))


def numbers(given: tuple[Any, ...]) -> list[Any]:
    """Return a kernel's arguments that are not tensors."""
    return [each for each in given if not isinstance(each, Tensor)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    driver = Driver(Launcher)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    monkeypatch.setattr(operators, "_index", lambda tensor: 0)
    monkeypatch.setattr(operators, "_on", lambda device: operators._HERE)
    monkeypatch.setattr(operators, "architecture", lambda device: ARCHITECTURES["sm_90"])
    monkeypatch.setattr(operators, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(operators, "_prepared", {})
    monkeypatch.setattr(operators, "_products", {})
    STARTED.clear()
    yield
    STARTED.clear()
    triton.runtime.driver._active = before


@pytest.fixture
def looked_up(driver: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the kernels that Triton looks up by their arguments, and "compiled" for each compilation."""
    names: list[str] = []

    def watch(method: str, note: str) -> None:
        original = getattr(triton.JITFunction, method)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(note or self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(triton.JITFunction, method, watched)

    watch("run", "")
    watch("_do_compile", "compiled")
    return names


def called(
    m: int,
    *,
    n: int = 64,
    k: int = 128,
    bias: bool = True,
    threshold: float = 6.0,
    rotated: bool = True,
    norm: bool = False,
    residual: bool = False,
) -> list[Any]:
    """Return the launches of one linear, with numbers for tensors and sizes for scratch memory."""
    STARTED.clear()
    qweight, scale = torch.zeros(n, k, dtype=torch.int8), torch.ones(n)
    addend = torch.zeros(n) if bias else None
    d = rotation_of(torch.ones(k)) if rotated else None
    x, added, weight = torch.zeros(m, k).bfloat16(), torch.zeros(m, k).bfloat16() if residual else None, torch.ones(k)
    if norm:
        total, *rows = operators._norm_quantize_rows(x, added, weight, None, d, quantized.RMS, 1e-6, threshold)
        assert total.shape == (x.shape if residual else (0,))
    else:
        total, rows = None, operators._quantize_rows(x, d, threshold)
    y = operators._quantized_linear(*rows, qweight, scale, addend, quantized.NONE, 0, 0, torch.bfloat16)
    assert y.shape == (m, n)
    tensors = [qweight, scale, addend, d, x, added, weight, total if residual else None, *rows, y]
    places = {tensor.data_ptr(): i for i, tensor in enumerate(tensors) if tensor is not None}

    def described(given: Any) -> Any:
        if isinstance(given, Tensor):
            return places.get(given.data_ptr(), given.shape)
        if hasattr(given, "block_shape"):  # A matrix for the copy engine.
            return places[given.base.data_ptr()], [*given.shape], [*given.strides], given.block_shape
        return given

    return [(name, grid, [described(each) for each in given]) for name, grid, given in STARTED]


# For every row of the table: full and partial tiles, multiples of 16 and others.
ROWS = (1, 2, 16, 17, 20, 64, 100, 256, 300, 512, 2000, 2048)


@pytest.mark.parametrize("kind", [{}, {"bias": False, "threshold": 0.0}, {"n": 256, "k": 4096}, {"norm": True}])
def test_a_prepared_call_is_what_triton_starts(
    kind: dict[str, Any], looked_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared call has the arguments and grid that Triton computes from all arguments."""
    for m in ROWS:
        called(m, **kind)
    for m in ROWS:
        looked_up.clear()
        prepared = called(m, **kind)
        assert not looked_up
        assert [name for name, _, _ in prepared][1:] == ["gemv" if m == 1 else prepared[1][0]]
        with monkeypatch.context() as nothing:
            nothing.setattr(operators, "_prepared", {})
            nothing.setattr(operators, "_products", {})
            assert called(m, **kind) == prepared
        assert looked_up == [name for name, _, _ in prepared]


@pytest.mark.parametrize("kind", [{}, {"n": 256, "k": 4096}, {"norm": True, "residual": True}])
def test_another_number_of_rows_starts_what_is_prepared(kind: dict[str, Any], looked_up: list[str]) -> None:
    """Triton is asked at the first call and for each configuration, the table once for each number of rows."""
    for m in range(1, 300):
        called(m, **kind)
    (products,) = operators._products.values()
    assert len([name for name in looked_up if name != "compiled"]) == 1 + len(products.by_config)
    looked_up.clear()
    called(300, **kind)
    products._choose = lambda m: pytest.fail(f"the table was asked for {m} again")
    for m in range(300, 0, -1):
        assert len(called(m, **kind)) == 2
    assert not looked_up


def test_no_row_starts_nothing(driver: None) -> None:
    for kind in ({}, {"norm": True, "residual": True}):
        assert len(called(2, **kind)) == 2
        assert called(0, **kind) == []


def test_profilers_are_told(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared calls are reported, too: Triton passes its hooks and the kernel's name to the launcher."""
    called(20)
    told: list[Any] = []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *given: told.append(given[6:9]))
    called(20)
    assert told == [(None, None, None)] * 2
    hook, profiler = triton.knobs.runtime.launch_enter_hook, told.append
    hook.add(profiler)
    try:
        called(20)
    finally:
        hook.remove(profiler)
    assert [(about.get()["name"], enter) for about, enter, _ in told[2:]] == [("quantize_rows", hook), ("gemm", hook)]


def test_numbers_of_rows_are_not_remembered_for_ever(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators._Products, "MOST", 5)
    for m in range(1, 40):
        called(m)
    (products,) = operators._products.values()
    assert len(products._by_rows) <= 5


def test_what_a_call_depends_on_is_prepared_apart(driver: None) -> None:
    kinds: list[dict[str, Any]] = [{}, {"bias": False}, {"threshold": 5.0}, {"rotated": False}, {"norm": True}]
    made = []
    for kind in [*kinds, {"norm": True, "residual": True}]:
        called(2, **kind)
        made.append((len(operators._prepared), len(operators._products)))
    # The quantization does not depend on the bias, nor the product on the source of its input.
    assert made == [(1, 1), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2)]


def test_partial_sums_have_memory_of_their_own(driver: None) -> None:
    for m in (20, 20, 30, 20):
        _, (_, grid, given) = called(m, n=256, k=4096)
        (splits, *rest), *others = [each for each in given if isinstance(each, torch.Size)]
        assert splits in grid
        assert splits > 1
        assert (rest, others) == ([m, 256], [])


def test_configurations_that_are_measured(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows is measured once; inside a CUDA graph this is impossible, so it is tried again outside."""
    asked: list[int] = []
    captured = True

    def choose(product: Product, configs: tuple[Config, ...], *_: Any) -> Config:
        asked.append(product.sizes[0])
        return configs[0] if captured else configs[-1]

    monkeypatch.setattr(operators.autotune, "choose", choose)
    monkeypatch.setattr(operators.autotune, "enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    first = called(20)[1]
    assert called(20)[1] == first
    assert asked == [20, 20]
    captured = False
    assert called(20)[1] != first
    for m in (20, 21, 21):
        called(m)
    assert asked == [20, 20, 20, 21]


def test_threads_share_no_arguments(driver: None) -> None:
    """Each call launches its own tensors with its own number of rows, whatever else is launched meanwhile."""
    d, qweight, scale = rotation_of(torch.ones(4096)), torch.zeros(256, 4096, dtype=torch.int8), torch.ones(256)

    def calls(begin: int) -> None:
        for m in range(begin, 200, 2):
            rows = operators._quantize_rows(torch.zeros(m, 4096, dtype=torch.bfloat16), d, 6.0)
            operators._quantized_linear(*rows, qweight, scale, None, quantized.NONE, 0, 0, torch.bfloat16)

    calls(2)
    STARTED.clear()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            list(threads.map(calls, (2, 3)))
    finally:
        sys.setswitchinterval(interval)
    assert len(STARTED) == 2 * 198
    for _, _, given in STARTED:
        matrices = [each for each in given if isinstance(each, Tensor) and each.dtype in (torch.int8, torch.bfloat16)]
        (m,) = {each.shape[-2] for each in matrices} - {256}
        assert m in numbers(given)


@pytest.mark.parametrize("which", [0, 1])
def test_tensors_that_begin_anywhere_are_not_prepared(which: int, driver: None) -> None:
    """Kernels are compiled for tensors that begin at multiples of 16 bytes."""
    given = [torch.zeros(1, 128, dtype=torch.bfloat16), torch.ones(128)]
    whole = given[which]
    given[which] = torch.ones(129, dtype=whole.dtype)[1:].view_as(whole)
    assert given[which].data_ptr() % 16
    operators._quantize_rows(*given, 6.0)
    assert not operators._prepared
    # The call is not mistaken for one prepared with another alignment.
    elsewhere = given[which]
    given[which] = whole
    operators._quantize_rows(*given, 6.0)
    assert len(operators._prepared) == 1
    given[which] = elsewhere
    operators._quantize_rows(*given, 6.0)
    assert any(each is elsewhere or getattr(each, "_base", None) is elsewhere._base for each in STARTED[-1][2])
    assert len(operators._prepared) == 1


def test_what_does_not_fit_is_refused(driver: None) -> None:
    """Calls with bad tensors are refused, also after the same call with others was prepared."""
    x, d, qweight, scale = torch.zeros(3, 128), torch.ones(128), torch.zeros(64, 128, dtype=torch.int8), torch.ones(64)
    rest = (qweight, scale, None, quantized.NONE, 0, 0, torch.float32)
    norm = (None, None, d, quantized.RMS, 1e-6, 6.0)
    q, rows, counters = operators._quantize_rows(x, d, 6.0)
    operators._norm_quantize_rows(x, x, *norm)
    operators._quantized_linear(q, rows, counters, *rest)
    with pytest.raises(InputError, match="rows are"):
        operators._quantized_linear(q, rows[:, :2].contiguous(), counters, *rest)
    with pytest.raises(InputError, match="counters"):
        operators._quantized_linear(q, rows, counters[:8], *rest)
    with pytest.raises(InputError, match="q is"):
        operators._quantized_linear(q.to(torch.int32), rows, counters, *rest)
    with pytest.raises(InputError, match="scale is"):
        operators._quantized_linear(q, rows, counters, qweight, scale.double(), *rest[2:])
    with pytest.raises(InputError, match="x is"):
        operators._quantize_rows(x.double(), d, 6.0)
    with pytest.raises(InputError, match="residual is"):
        operators._norm_quantize_rows(x, x[:1], *norm)
    with pytest.raises(InputError, match="residual is"):
        operators._norm_quantize_rows(x, x.double(), *norm)


def test_a_row_of_a_larger_tensor_has_no_stride_of_its_own(driver: None) -> None:
    """The last token of each prompt has the prompt's stride, which a single row does not need."""
    operators._quantize_rows(torch.zeros(1, 7, 128)[:, -1], None, 6.0)
    operators._quantize_rows(torch.zeros(20, 128), None, 6.0)
    (prepared,) = operators._prepared.values()
    assert 7 * 128 not in prepared._values


def test_rows_that_lie_apart(driver: None) -> None:
    """Separate rows are read in place; tensors without rows are copied."""
    wide, columns = torch.zeros(4, 3, 1000), torch.zeros(96, 256)
    strides = []
    for x in (wide[..., :96], wide[..., 96:192], wide[:, 0, :96], columns.mT):
        operators._quantize_rows(x, None, 6.0)
        (at,) = [each for each in STARTED[-1][2] if isinstance(each, Tensor) and each.is_floating_point()]
        assert (at.data_ptr() == x.data_ptr()) == (x.stride(-1) == 1)
        strides.append({1000, 3000} & {*numbers(STARTED[-1][2])})
    assert strides == [{1000}, {1000}, {3000}, set()]


def test_a_prepared_call_keeps_no_tensor(driver: None) -> None:
    for kind in ({"m": 20, "n": 256, "k": 4096}, {"m": 2048}, {"m": 20, "norm": True, "residual": True}):
        called(**kind)  # type: ignore[arg-type]
    calls = list(operators._prepared.values())
    for products in operators._products.values():
        calls += products.by_config.values()
    kept = [value for prepared in calls for value in prepared._values]
    kept += [value for prepared in calls for *_, about in prepared._matrices for value in about.values()]
    assert len(calls) == 6
    assert not [value for value in kept if isinstance(value, Tensor)]


@pytest.mark.slow
def test_the_benchmark_of_the_hosts_cost() -> None:
    """The benchmark runs in its own process, because it takes the CPU for a GPU."""
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert [line[0] for line in lines[2:]] == ["1", "16", "64", "256", "2048", "257 to 2047"]
    assert all(0.1 < float(cell) < 10_000 for line in lines[2:] for cell in line[1:])


@triton.jit
def innermost(x):
    return x * 2


@triton.jit
def inner(x):
    return innermost(x) + 1


@triton.jit
def outer(x):
    return inner(x) + innermost(x)


def test_a_kernels_key_is_made_after_those_of_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Triton 3.6 a key depended on the order, and so on earlier launches of the process."""
    made: list[str] = []
    key = triton.JITFunction.cache_key

    def watched(self: Any) -> str:
        if self.hash is None:
            made.append(self.fn.__name__)
        return str(key.fget(self))

    monkeypatch.setattr(triton.JITFunction, "cache_key", property(watched))
    settle(outer)
    assert made == ["innermost", "inner", "outer"]
    settle(outer)
    assert len(made) == 3
    settle(print)  # Any other object that a kernel names.
