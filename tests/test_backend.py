"""torch.compile(model, backend="int8"): found by name, one graph, right numbers, in every mode of use."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8compile
from int8compile import cpu
from int8compile.ops import packed_shape
from int8compile.weights import STORE
from tests.helpers.models import (
    INT8_ERROR,
    CountingBackend,
    Stack,
    by_operator,
    reference,
    relative_error,
    rotation_from,
)

# The operator that runs a linear in a compiled graph without gradients, and its form of an [N, K] weight.
OPERATOR = "int8compile.packed_linear_no_grad" if cpu.available() else "int8compile.linear"


def weight_argument(n: int, k: int) -> tuple[str, str]:
    """Return the sizes and dtype of an int8 weight in the generated code."""
    return (str(packed_shape(n, k)), "uint8") if cpu.available() else (f"({n}, {k})", "int8")


INSTALLED = importlib.metadata.entry_points(group="torch_dynamo_backends", name="int8")


@pytest.mark.skipif(not INSTALLED, reason="int8compile is not installed here")
def test_found_by_name_without_importing_the_package() -> None:
    program = """
import sys, torch
model = torch.nn.Linear(32, 32).requires_grad_(False)
assert "int8compile" not in sys.modules
x = torch.randn(4, 32)
y = torch.compile(model, backend="int8", fullgraph=True)(x)
assert "int8compile" in sys.modules
error = ((y - model(x)).norm() / y.norm()).item()
assert 0 < error < 0.03, error
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_bare_checkout_registers_the_backend_when_imported() -> None:
    program = """
import importlib.metadata, torch
importlib.metadata.entry_points = lambda **_: importlib.metadata.EntryPoints()
import int8compile
assert "int8" in torch._dynamo.list_backends()
model = torch.nn.Linear(32, 32).requires_grad_(False)
torch.compile(model, backend="int8")(torch.randn(4, 32))
int8compile.backend.register()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.0, 2.0, 12.0])
def test_equals_the_operators_bit_by_bit(threshold: float | None, rotate: bool) -> None:
    """Options reach the operators, and Inductor's code around them changes nothing."""
    model, x = Stack(), torch.randn(6, 32)
    x[2, 3] = 90.0
    options = {"threshold": threshold, "rotate": rotate}
    actual = torch.compile(model, backend="int8", fullgraph=True, options=options)(x)
    rotated = None if rotate else dict.fromkeys(model.modules())
    assert torch.equal(actual, reference(model, x, threshold, rotated=rotated))
    # Without rotation and second digits, the outlier takes precision from the other elements.
    assert 0 < relative_error(actual[:2], model(x)[:2]) < INT8_ERROR
    if threshold == 2.0:
        assert not torch.equal(actual, reference(model, x, rotated=rotated))


@pytest.mark.parametrize("threshold", [None, 2.0])
def test_columns_are_those_of_the_operator(threshold: float | None) -> None:
    """Results have the operator's bits; nothing is rotated."""
    model, x = Stack(), torch.randn(6, 32)
    x[2, 3] = 9.0
    options = {"outliers": "column", "threshold": threshold}
    actual = torch.compile(model, backend="int8", fullgraph=True, options=options)(x)
    assert torch.equal(actual, reference(model, x, threshold, columns=True))
    assert 0 < relative_error(actual, model(x)) < INT8_ERROR
    for parameter in model.parameters():
        assert all(weight.d is None for weight in STORE.weights(parameter).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model, x = Stack().to(dtype), torch.randn(6, 32, dtype=dtype)
    actual = torch.compile(model, backend="int8", fullgraph=True)(x)
    assert actual.dtype == dtype
    assert relative_error(actual.float(), model.float()(x.float())) < INT8_ERROR


def test_row_policy_results_do_not_depend_on_the_batch() -> None:
    """Changing a row leaves the bits of all other rows; a row alone gives its bits from the batch."""
    model, x = Stack(), torch.randn(8, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    before = compiled(x)
    for value in (100.0, float("nan"), float("inf")):
        changed = x.clone()
        changed[3, 5] = value
        after = compiled(changed)
        rest = torch.arange(8) != 3
        assert torch.equal(after[rest], before[rest])
        assert not torch.equal(after[3], before[3])
    assert torch.equal(torch.cat([compiled(row[None]) for row in x]), before)


def test_nan_and_inf_give_what_float_gives() -> None:
    model, x = Stack(1), torch.randn(4, 32)
    x[1, 0], x[2, 0] = float("nan"), float("inf")
    actual, expected = torch.compile(model, backend="int8", fullgraph=True)(x), model(x)
    assert actual[1].isnan().all()
    assert expected[1].isnan().all()
    assert not actual[2].isfinite().any()
    assert actual[[0, 3]].isfinite().all()


def test_one_recompile_when_the_sequence_changes_and_nothing_is_quantized_again() -> None:
    model, backend = Stack(), CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(torch.randn(2, 5, 32))
    assert (backend.graphs, quantized := STORE.quantized) == (1, STORE.quantized)
    for length in (7, 9, 11, 64, 3):
        x = torch.randn(2, length, 32)
        assert torch.equal(compiled(x), reference(model, x))
    assert backend.graphs == 2
    assert STORE.quantized == quantized


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(context: Callable) -> None:
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    with context():
        assert torch.equal(compiled(x), reference(model, x))


def test_parameters_made_in_inference_mode() -> None:
    """Such parameters have no version counter."""
    with torch.inference_mode():
        model = Stack()
        x = torch.randn(4, 32)
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        with pytest.warns(int8compile.Int8Warning, match=r"made in inference mode .* call int8compile.refresh"):
            assert torch.equal(compiled(x), reference(model, x))
        model.layers[0].up.weight.mul_(2)
        int8compile.refresh(model)
        with pytest.warns(int8compile.Int8Warning):
            assert torch.equal(compiled(x), reference(model, x))


def test_train_and_eval_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack()
            self.dropout = nn.Dropout(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.stack(x))

    model, x = Model(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert torch.equal(compiled.train()(x), torch.zeros(4, 32))
    assert torch.equal(compiled.eval()(x), reference(model.stack, x))


def test_gradients_reach_the_input() -> None:
    """grad_x = grad_y @ dequantized W through both linears, as autograd gives for the operators in eager mode."""
    model = Stack()
    x = torch.randn(4, 32, requires_grad=True)
    torch.compile(model, backend="int8", fullgraph=True)(x).square().sum().backward()
    actual, x.grad = x.grad, None
    reference(model, x).square().sum().backward()
    # The same products in another order: Inductor compiles the backward pass.
    assert torch.allclose(actual, x.grad, rtol=1e-5, atol=1e-5)
    assert relative_error(actual, x.grad) < 1e-6


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(inside: bool) -> None:
    model, x = nn.Linear(32, 64).requires_grad_(False), torch.randn(4, 32)

    def call(x: Tensor) -> Tensor:
        if not inside:
            return model(x)
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(call, backend="int8", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        actual = compiled(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, by_operator(model, x.bfloat16(), rotation_from(model.weight)))


def test_autocast_with_an_addend() -> None:
    """The addend takes the product's dtype, as in addmm under autocast."""
    weight, addend, x = nn.Parameter(torch.randn(32, 48), requires_grad=False), torch.randn(4, 48), torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.compile(lambda x: torch.addmm(addend, x, weight, beta=0.5), backend="int8")(x)
        expected = torch.addmm(addend, x, weight, beta=0.5)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected.float()) < INT8_ERROR


def test_a_convolution_can_be_viewed_as_before() -> None:
    """1x1 convolutions are computed channels-last, but readers expect the original layout."""
    model, x = nn.Conv2d(8, 16, 1).requires_grad_(False), torch.randn(2, 8, 3, 5)

    def inside(x: Tensor) -> Tensor:
        return model(x).view(2, -1)

    def across(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return y.view(2, -1)

    options = {"min_features": 8}
    for call in (inside, across):
        assert relative_error(torch.compile(call, backend="int8", options=options)(x), call(x)) < INT8_ERROR


def test_sizes_that_depend_on_data() -> None:
    """A mask chooses the rows, as for experts: their number is unknown while the graph is rewritten."""
    model, x = nn.Linear(32, 48).requires_grad_(False), torch.randn(8, 32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = torch.compile(lambda x: model(x[x[:, 0] > 0]), backend="int8", fullgraph=True)
        actual = call(x)
    assert torch.equal(actual, by_operator(model, x[x[:, 0] > 0], rotation_from(model.weight)))


def test_a_graph_without_inputs() -> None:
    assert torch.equal(torch.compile(lambda: torch.arange(3) * 2, backend="int8")(), torch.tensor([0, 2, 4]))


def test_several_graphs_after_a_graph_break() -> None:
    first, second = Stack(1), Stack(1)

    def model(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    x, backend = torch.randn(4, 32), CountingBackend()
    assert torch.equal(torch.compile(model, backend=backend)(x), reference(second, reference(first, x)))
    assert backend.graphs == 2


@pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="torch 2.11 crashes when it compiles again after several threads have compiled, with backend='eager' too",
)
def test_threads() -> None:
    """Eight threads start with the first call at once: weights are quantized once, and results are right."""
    model, quantized = Stack(4), STORE.quantized
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=True)
    inputs = [torch.randn(2 + i, 32) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(compiled, inputs))
    assert all(torch.equal(y, reference(model, x)) for x, y in zip(inputs, outputs, strict=True))
    assert STORE.quantized - quantized == 8


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_reach_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch._inductor.compile_fx.compile_fx

    def record(*args: object, config_patches: dict | None = None, **kwargs: object) -> object:
        if config_patches is not None:  # compile_fx calls itself without patches once they are applied.
            seen.append(config_patches)
        return original(*args, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", record)
    model, x = Stack(1), torch.randn(4, 32)
    assert torch.equal(torch.compile(model, backend="int8", mode=mode, fullgraph=True)(x), reference(model, x))
    assert seen == [{} if mode == "default" else torch._inductor.list_mode_options(mode)]


def test_inductor_options_reach_inductor() -> None:
    from torch._inductor.utils import run_and_get_code

    def generated(options: dict) -> str:
        torch._dynamo.reset()
        compiled = torch.compile(Stack(1), backend="int8", options=options)
        return run_and_get_code(compiled, torch.randn(4, 32))[1][0]

    assert OPERATOR in generated({})
    debug = generated({"inductor": {"profiler_mark_wrapper_call": True, "fx_graph_cache": False}})
    assert "record_function" in debug


def test_the_compiled_code_has_no_float_weight_and_no_symbolic_weight() -> None:
    """In the generated code the int8 weight has fixed sizes, and the float weight is not an argument."""
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(Stack(1), backend="int8", dynamic=True, options={"inductor": {"fx_graph_cache": False}})
    code = run_and_get_code(compiled, torch.randn(4, 32))[1][0]
    arguments = re.findall(r"arg\d+_1 = rand_strided\((\(.*?\)), .*dtype=torch\.(\w+)\)", code)
    assert sorted(arguments) == sorted(
        [
            ("(4, 32)", "float32"),  # x.
            # up: int8, scale, d, bias.
            *(weight_argument(64, 32), ("(64, )", "float32"), ("(32, )", "float32"), ("(64, )", "float32")),
            # down.
            *(weight_argument(32, 64), ("(32, )", "float32"), ("(64, )", "float32"), ("(32, )", "float32")),
        ]
    )
    # x's rows are a symbol; the weights' sizes are numbers.
    assert "assert_size_stride(arg2_1, (s" in code
    assert re.search(rf"assert_size_stride\(arg\d+_1, {re.escape(weight_argument(64, 32)[0])}", code)


BAD_INPUTS: list[tuple[str, type[Exception], dict, str]] = [
    ("unknown option", int8compile.ConfigError, {"treshold": 3}, "did you mean 'threshold'"),
    ("negative threshold", int8compile.ConfigError, {"threshold": -3}, "threshold=-3: give a finite number"),
    ("small threshold", int8compile.ConfigError, {"threshold": 0.5}, "threshold=0.5: it counts in mean magnitudes"),
    ("rotate", int8compile.ConfigError, {"rotate": "yes"}, "rotate='yes': give True or False"),
    ("NaN threshold", int8compile.ConfigError, {"threshold": float("nan")}, "threshold=nan: give a finite number"),
    ("unknown Inductor option", int8compile.ConfigError, {"inductor": {"freezin": 1}}, "did you mean 'freezing'"),
]


@pytest.mark.parametrize(
    ("error", "options", "says"), [row[1:] for row in BAD_INPUTS], ids=[row[0] for row in BAD_INPUTS]
)
def test_bad_options(error: type[Exception], options: dict, says: str) -> None:
    model, x = Stack(), torch.randn(4, 32)
    with pytest.raises(error, match=says):
        torch.compile(model, backend="int8", options=options)(x)
    assert torch.equal(torch.compile(model, backend="int8")(x), reference(model, x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weight_is_named_and_the_model_is_as_it_was(bad: float) -> None:
    model, x = Stack(), torch.randn(4, 32)
    model.layers[1].down.weight[3, 4:6] = bad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        int8compile.BadWeightError, match=r"layers.1.down: its weight \[32, 64\] has 2 NaN or Inf of 2048"
    ):
        torch.compile(model, backend="int8")(x)
    assert all(torch.equal(before[name].nan_to_num(), value.nan_to_num()) for name, value in model.state_dict().items())
    (site,) = int8compile.explain(model, x).skipped
    assert (site.path, site.reason, site.detail) == ("layers.1.down", int8compile.SkipReason.BAD_VALUES, "2 of 2048")
    options = {"skip_modules": ["layers.1.down"]}
    torch.compile(model, backend="int8", options=options)(x)


def test_meta_weight() -> None:
    model = Stack().to("meta")
    with pytest.raises(
        int8compile.BadWeightError, match=r"layers.0.up: .* is on the meta device and has no data. Load"
    ):
        torch.compile(model, backend="int8")(torch.randn(4, 32, device="meta"))


def test_integer_input() -> None:
    with pytest.raises(int8compile.InputError, match=r"layers.0.up: its input is torch.int32 .* Convert the input"):
        torch.compile(Stack(), backend="int8")(torch.ones(4, 32, dtype=torch.int32))


def test_shape_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="reduction dim"):
        torch.compile(Stack(), backend="int8")(torch.randn(4, 5))


def test_nothing_rewritten_is_a_warning_with_the_remedy() -> None:
    model = Stack().requires_grad_(True)
    with pytest.warns(int8compile.Int8Warning, match=r"none of the 4 linears.*torch.no_grad\(\)"):
        torch.compile(model, backend="int8")(torch.randn(4, 32))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        torch.compile(model, backend="int8")(torch.randn(4, 32))


def test_each_graph_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="int8compile"):
        torch.compile(Stack(), backend="int8")(torch.randn(4, 32))
    assert any("4 of 4 linears in int8" in record.message for record in caplog.records)


INSIDE_VMAP: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "functional": lambda linear, x: torch.vmap(lambda row: F.linear(row, linear.weight, linear.bias))(x),
    "operator": lambda linear, x: torch.vmap(lambda row: row @ linear.weight.t())(x),
    "module": lambda linear, x: torch.vmap(linear)(x.view(2, 3, 32)),
    "two": lambda linear, x: torch.vmap(lambda row: linear(torch.tanh(linear(row))))(x),
}


@pytest.mark.parametrize("call", INSIDE_VMAP.values(), ids=INSIDE_VMAP.keys())
def test_a_linear_inside_vmap_stays_in_float(call: Callable[[nn.Linear, Tensor], Tensor]) -> None:
    linear, x = nn.Linear(32, 32).requires_grad_(False), torch.randn(6, 32)
    with pytest.warns(int8compile.Int8Warning, match="not an ordinary dense tensor"):
        actual = torch.compile(lambda x: call(linear, x), backend="int8", fullgraph=True)(x)
    torch.testing.assert_close(actual, call(linear, x))


def test_only_what_is_inside_vmap_stays_in_float() -> None:
    model, x = Stack(1), torch.randn(6, 32)

    def run(x: Tensor) -> Tensor:
        block = model.layers[0]
        return torch.vmap(block.up)(x) + block.up(x)

    actual = torch.compile(run, backend="int8", fullgraph=True)(x)
    up = model.layers[0].up
    expected = by_operator(up, x, rotation_from(up.weight))
    torch.testing.assert_close(actual, up(x) + expected)
    sites = int8compile.explain(run, x).sites
    assert [site.reason for site in sites] == [int8compile.SkipReason.ACTIVATION, None]
    assert sites[0].detail == "it is inside torch.vmap"


def jagged(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(length, 32) for length in lengths], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:NestedTensor does not implement")  # AOTAutograd copies them for its cache.
def test_a_linear_of_a_nested_tensor_stays_in_float() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16)).requires_grad_(False), jagged(3, 5)
    with pytest.warns(int8compile.Int8Warning, match="it is a nested tensor"):
        actual = torch.compile(model, backend="int8")(x)
    torch.testing.assert_close(actual.values(), model(x).values())


@pytest.mark.filterwarnings("ignore:NestedTensor does not implement")
@pytest.mark.parametrize("weight_only", [False, True])
def test_a_quantized_model_takes_nested_tensors(weight_only: bool) -> None:
    """Each row has the result that it has alone."""
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).requires_grad_(False), jagged(3, 1, 5)
    int8compile.quantize_(model, progress=False)
    for module in model:
        if isinstance(module, int8compile.Int8Linear):
            module.weight_only = weight_only
    y = model(x)
    assert [part.shape for part in y.unbind()] == [(3, 16), (1, 16), (5, 16)]
    assert torch.equal(y.values(), model(x.values()))
    assert (y + model(x)).shape == y.shape  # Of the same ragged size.
    compiled = torch.compile(model, backend="int8")
    assert torch.equal(compiled(x).values(), y.values())


# Inductor's freezing, which guides for CPUs recommend


@pytest.fixture
def freezing() -> Iterator[None]:
    with torch._inductor.config.patch(freezing=True):
        yield


@pytest.mark.usefixtures("freezing")
def test_freezing_makes_parameters_int8_and_freezes_nothing() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    model.append(nn.BatchNorm1d(4).eval())
    x = torch.randn(3, 4, 64)
    report = int8compile.explain(model, x)
    assert [(site.path, site.reason) for site in report.sites] == [("1", None), ("3", None)]
    quantized = STORE.quantized
    with torch.no_grad():
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        assert 0 < relative_error(compiled(x), model(x)) < INT8_ERROR
        assert STORE.quantized == quantized + 2
        for change in (
            lambda: model[1].weight.mul_(-2),
            lambda: model[0].weight.mul_(-2),
            lambda: model[4].running_mean.add_(2),
            lambda: setattr(model[1].weight, "data", torch.randn(96, 64)),
            lambda: setattr(model[3], "weight", nn.Parameter(torch.randn(64, 96))),
        ):
            before = model(x)
            change()
            assert relative_error(before, model(x)) > 0.1
            assert 0 < relative_error(compiled(x), model(x)) < INT8_ERROR


@pytest.mark.usefixtures("freezing")
def test_freezing_of_a_quantized_model() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval().requires_grad_(False)
    int8compile.quantize_(model, progress=False)
    x = torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        model[0].scale.mul_(2)
        assert torch.equal(compiled(x), model(x))


def test_settings_of_some_modules() -> None:
    model, x = Stack(), torch.randn(8, 32) ** 5
    modules = {"layers.0": {"rotate": False}, "layers.*.down": {"threshold": 2.0}}
    d = {
        part: None if path.startswith("layers.0") else rotation_from(part.weight)
        for path, part in model.named_modules()
        if isinstance(part, nn.Linear)
    }
    expected = x
    for layer in model.layers:
        hidden = torch.relu(by_operator(layer.up, expected, d[layer.up]))
        expected = expected + by_operator(layer.down, hidden, d[layer.down], 2.0)
    compiled = torch.compile(model, backend="int8", options={"modules": modules}, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
