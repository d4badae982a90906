"""Modules that hold int8: what they compute, eagerly and compiled, and that nothing loads or casts them wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import int8compile
from int8compile import FreedWeightError, Int8Embedding, Int8Experts, Int8Linear, backend, ops
from int8compile.errors import CheckpointError, ConfigError, InputError, Int8WeightError
from int8compile.ops import column, reference
from int8compile.stored.modules import share_rotations
from tests.helpers.implementations import VARIANTS, needs_kernel, profiled
from tests.helpers.models import INT8_ERROR, relative_error


def int8_linear(
    k: int = 48, n: int = 24, *, bias: bool = True, rotated: bool = True, d: Tensor | None = None, **options: Any
) -> Int8Linear:
    weight = torch.randn(n, k)
    if d is None and rotated:
        d = ops.rotation_of(ops.input_scales([weight]))
    qweight, scale = ops.quantize_weight(weight, d)
    return Int8Linear(qweight, scale, nn.Parameter(torch.randn(n)) if bias else None, d=d, **options)


def int8_experts(rotated: str = "together", **options: Any) -> Int8Experts:
    weight = torch.randn(3, 24, 48)
    d = {
        "not": None,
        "together": ops.rotation_of(ops.input_scales(list(weight))),
        "each": torch.stack([ops.rotation_of(ops.input_scales([each])) for each in weight]),
    }[rotated]
    return Int8Experts(*ops.quantize_weight(weight, d), d=d, **options)


def int8_embedding(**options: Any) -> Int8Embedding:
    return Int8Embedding(*ops.quantize_weight(torch.randn(50, 16), None), **options)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": int8_linear,
    "linear, not rotated": lambda: int8_linear(rotated=False),
    "experts": int8_experts,
    "experts, each rotated": lambda: int8_experts("each"),
    "embedding": int8_embedding,
}
every_module = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODULES.items()])


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape)
    x[..., 3] = 30  # An outlier in both policies.
    return x.to(dtype)


def expected(module: Int8Linear, x: Tensor) -> Tensor:
    if module.weight_only:
        return reference.weight_only_linear(x, module.qweight, module.scale, module.d, module.bias)
    if module.outliers == "column":
        return column.column_linear(x, module.qweight, module.scale, module.bias, module.threshold)
    return reference.linear(x, module.qweight, module.scale, module.d, module.bias, module.threshold)


# What they compute


@pytest.mark.parametrize("dtype", ops.SUPPORTED_DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"weight_only": True}, {"threshold": 0.0}, {"rotated": False}, {"rotated": False, "weight_only": True}),
        {"rotated": False, "outliers": "column", "threshold": 4.0},
    ],
    ids=["default", "weight only", "no outliers", "not rotated", "weight only, not rotated", "column"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_reference(dtype: torch.dtype, options: dict[str, Any], bias: bool) -> None:
    module = int8_linear(bias=bias, **options)
    for shape in ((48,), (5, 48), (2, 3, 48), (0, 48)):
        x = activations(*shape, dtype=dtype) if 0 not in shape else torch.empty(shape, dtype=dtype)
        y = module(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected(module, x))


def test_linear_keeps_outliers() -> None:
    """Without a second digit, one large element of a row costs the others their bits."""
    module = int8_linear(512, 64, bias=False, rotated=False)
    plain = copy.deepcopy(module)
    plain.threshold = 0.0
    x = torch.randn(8, 512)
    x[:, 7] = 300
    exact = x @ module.dequantize().T
    assert (module(x) - exact).norm() < 0.05 * (plain(x) - exact).norm()


@pytest.mark.parametrize(("rotated", "threshold"), [(True, 12.0), (False, 6.0)])
@pytest.mark.parametrize("make", [int8_linear, lambda rotated: int8_experts("each" if rotated else "not")])
def test_the_threshold_that_is_not_given(make: Callable[..., Any], rotated: bool, threshold: float) -> None:
    module = make(rotated=rotated)
    assert (module.threshold, module.policy) == (threshold, f"row {threshold}")
    assert f"threshold={threshold:g}" in repr(module)
    assert ("rotation=16" in repr(module)) == rotated


@pytest.mark.parametrize("make", [int8_linear, int8_experts])
def test_thresholds_that_are_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"threshold=0\.5: it counts in mean magnitudes"):
        make(threshold=0.5)
    module = make(threshold=3)
    with pytest.raises(ConfigError, match=r"threshold=-1"):
        module.threshold = -1
    with pytest.raises(ConfigError, match=r"threshold=0\.5: it counts in mean magnitudes"):
        module.threshold = 0.5
    assert (module.threshold, module.policy) == (3.0, "row 3.0")
    module.threshold = None
    assert module.threshold == 12.0


def test_columns_are_of_weights_that_are_not_rotated() -> None:
    with pytest.raises(ConfigError, match=r"^Int8Linear: outliers='column' is for matrices that are not rotated"):
        int8_linear(outliers="column")
    module = int8_linear()
    module.path = "mlp.up"
    with pytest.raises(ConfigError, match=r"^mlp\.up: outliers='column' is for"):
        module.outliers = "column"
    assert module.policy == "row 12.0"
    with pytest.raises(ConfigError, match=r"^Int8Experts: outliers='column' is for matrices"):
        int8_experts("not").outliers = "column"
    assert int8_linear(rotated=False, outliers="column", threshold=0.5).policy == "column 0.5"


def test_gradients_reach_the_input_and_the_bias() -> None:
    module = int8_linear()
    x = torch.randn(5, 48, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 24) @ module.dequantize())
    assert torch.equal(module.bias.grad, torch.full((24,), 5.0))
    assert not module.qweight.requires_grad


def test_embedding() -> None:
    module, ids = int8_embedding(dtype=torch.bfloat16), torch.tensor([[3, 0], [49, 3]])
    assert torch.equal(module(ids), nn.functional.embedding(ids, module.dequantize()))
    assert module(ids).dtype == torch.bfloat16


def grouped(module: Int8Experts, x: Tensor, ends: list[int]) -> Tensor:
    y, begin = torch.zeros(x.shape[0], module.scale.shape[1], dtype=x.dtype), 0
    for expert, end in enumerate(ends):
        part, d = slice(begin, end), reference.of_each(module.d, expert)
        y[part] = reference.linear(x[part], module.qweight[expert], module.scale[expert], d, None, module.threshold)
        begin = end
    return y


@pytest.mark.parametrize("rotated", ["not", "together", "each"])
@pytest.mark.parametrize("ends", [[2, 5, 9], [0, 0, 9], [9, 9, 9], [0, 4, 6], [0, 0, 0]])
def test_experts(ends: list[int], rotated: str) -> None:
    """Each row by its expert; experts without rows, and rows of no expert, which give zeros."""
    module, x = int8_experts(rotated), activations(9, 48)
    assert torch.equal(module(x, torch.tensor(ends, dtype=torch.int32)), grouped(module, x, ends))


@pytest.mark.parametrize(
    ("ends", "message"), [([2, 1, 9], "must ascend"), ([2, 3, 10], "at most 9"), ([2, 9], r"ends is \[2\]")]
)
def test_experts_refuse_ends(ends: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        int8_experts()(torch.randn(9, 48), torch.tensor(ends, dtype=torch.int32))


def test_experts_pass_gradients_on() -> None:
    module, x = int8_experts(), torch.randn(9, 48, requires_grad=True)
    module(x, torch.tensor([2, 5, 8], dtype=torch.int32)).sum().backward()
    weights = module.dequantize()[torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])]
    torch.testing.assert_close(x.grad[:8], torch.einsum("sn,snk->sk", torch.ones(8, 24), weights))
    assert torch.equal(x.grad[8], torch.zeros(48))


def test_grouped_linear_is_a_complete_operator() -> None:
    module = int8_experts()
    x, ends = torch.randn(9, 48, requires_grad=True), torch.tensor([2, 5, 9], dtype=torch.int32)
    torch.library.opcheck(ops.grouped_linear.default, (x, module.qweight, module.scale, module.d, ends, 6.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, ends).dtype == torch.bfloat16


# Compiled


class Gated(nn.Module):
    """Linears that a graph could join: two of one activation, and one of what they make."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gate = int8_linear(64, 128, **options)
        self.up = int8_linear(64, 128, d=self.gate.d, **options)
        self.down = int8_linear(128, 64, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def called(graph: torch.fx.GraphModule) -> list[str]:
    return [node.target._opname for node in graph.graph.nodes if "int8compile" in str(node.target)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that the backend hands to Inductor."""
    found: list[torch.fx.GraphModule] = []
    compile_graph = backend._compile

    def spy(module: torch.fx.GraphModule, *args: Any) -> Any:
        found.append(copy.deepcopy(module))
        return compile_graph(module, *args)

    monkeypatch.setattr(backend, "_compile", spy)
    return found


@torch.no_grad()
@pytest.mark.parametrize("weight_only", [False, True])
def test_compiled_gives_the_bits_of_eager(graphs: list[torch.fx.GraphModule], weight_only: bool) -> None:
    # One linear alone: Inductor's exp differs from eager's by a bit.
    model, x = nn.Sequential(int8_linear(weight_only=weight_only)), activations(5, 48)
    y = model(x)
    assert torch.equal(torch.compile(model, backend="int8", fullgraph=True)(x), y)
    name = "weight_only_linear" if weight_only else "linear"
    assert called(graphs[0]) == [f"{name}_no_grad" if VARIANTS else name]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True)(x), y)
    assert len(graphs) == 1, "plain Inductor needs no backend of ours"


@needs_kernel
@torch.no_grad()
def test_weights_that_are_given_up_are_packed_and_joined(graphs: list[torch.fx.GraphModule]) -> None:
    model, x = Gated(), torch.randn(5, 64)
    kept, y = copy.deepcopy(model), model(x)
    before = int8compile.memory_footprint(model)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"free_weights": True})
    for _ in range(3):
        torch.testing.assert_close(compiled(x), y)
    assert called(graphs[0]) == ["packed_linear_pair_no_grad", "packed_linear_no_grad"]
    # Each weight is there once, packed, in sizes that need no padding here, and d as it is; of the scales that are
    # joined, modules keep theirs.
    assert int8compile.memory_footprint(model) == before + 4 * (128 + 128)
    with pytest.raises(FreedWeightError, match="free_weights=True"):
        model(x)
    with pytest.raises(FreedWeightError, match="free_weights=True"):
        torch.save(model.state_dict(), io.BytesIO())
    # A model that keeps its weights is served by the same code, and is not touched.
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(kept, backend="int8", fullgraph=True)(x), y)
    assert called(graphs[-1]) == ["linear_no_grad"] * 3
    assert int8compile.memory_footprint(kept) == before
    assert torch.equal(kept(x), y)


@torch.no_grad()
def test_one_graph_serves_many_modules(graphs: list[torch.fx.GraphModule]) -> None:
    for options in ({}, {"free_weights": True}):
        torch._dynamo.reset()
        graphs.clear()
        layers, x = [Gated() for _ in range(3)], torch.randn(5, 64)
        results = [layer(x) for layer in layers]
        for layer in layers:
            layer.compile(backend="int8", fullgraph=True, options=options)
        for _ in range(2):
            for layer, result in zip(layers, results, strict=True):
                torch.testing.assert_close(layer(x), result)
        # Newer versions of Dynamo compile again, once, when they see that a weight is gone.
        assert len(graphs) <= (2 if options else 1)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"free_weights": True}])
def test_operators_that_the_user_calls_are_left_alone(graphs: list[torch.fx.GraphModule], options: Any) -> None:
    """Their weights are inputs, or computed: nobody's to take over, nor to give up."""
    module, x, scale = int8_linear(), torch.randn(5, 48), torch.rand(24)
    qweight, head = module.qweight.clone(), nn.Linear(24, 24)

    def call(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        y = ops.linear.default(x, qweight, scale, None, None, 6.0)
        return head(y + ops.linear.default(x, qweight.roll(1, 0), scale, None, None, 6.0))

    expected = call(x, qweight, scale)
    compiled = torch.compile(call, backend="int8", fullgraph=True, options=options)
    for _ in range(2):
        assert relative_error(compiled(x, qweight, scale), expected) < INT8_ERROR
    assert called(graphs[0])[:2] == ["linear", "linear"]
    assert type(qweight) is Tensor


def test_compiled_with_gradients(graphs: list[torch.fx.GraphModule]) -> None:
    module, x = int8_linear(), torch.randn(5, 48, requires_grad=True)
    torch.compile(module, backend="int8", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 24) @ module.dequantize())
    torch.testing.assert_close(module.bias.grad, torch.full((24,), 5.0))
    assert called(graphs[0]) == ["linear"]


@torch.no_grad()
def test_changed_weights_are_noticed_when_they_are_packed() -> None:
    model, x = nn.Sequential(int8_linear()), torch.randn(5, 48)
    other = nn.Sequential(int8_linear())
    other.load_state_dict(other.state_dict() | {"0.qweight": model[0].qweight + 1, "0.scale": model[0].scale})
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))


@torch.no_grad()
def test_explain_lists_them() -> None:
    model = nn.Sequential(int8_linear(64, 96), int8_linear(96, 64, weight_only=True), nn.Linear(64, 64))
    report = int8compile.explain(model, torch.randn(5, 64), config={"skip_modules": ["2"]})
    assert [(site.path, site.runs_in) for site in report.sites] == [("0", "int8"), ("1", "int8 weight"), ("2", "float")]
    assert [site.shape for site in report.rewritten] == [("5", "64", "96"), ("5", "96", "64")]
    assert [site.bytes_after for site in report.rewritten] == [64 * 96 + 4 * (96 + 64)] * 2


@needs_kernel
def test_eager_runs_the_kernel() -> None:
    """The definition is made of PyTorch operators; the kernel calls none."""
    module, x = int8_linear(), torch.randn(5, 48)
    with torch.no_grad():
        names = profiled(lambda: module(x))
    assert names["int8compile::linear"] == 1
    assert not any("mm" in name for name in names), names


# Copied, moved, cast


@every_module
def test_weight_tells_what_it_would_be(make: Callable[[], nn.Module]) -> None:
    """Readers of its values are in test_module_weight.py."""
    module = make()
    weight = module.weight
    assert (weight.shape, weight.dtype) == (module.qweight.shape, torch.float32)
    assert (weight.device, weight.ndim, weight.numel()) == (torch.device("cpu"), weight.dim(), module.qweight.numel())
    assert isinstance(weight, Tensor)
    with pytest.raises(Int8WeightError, match="would write to its weight"):
        weight.zero_()
    assert "Int8Weight" in repr(weight)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.ones(2, 48, dtype=torch.float64), r"torch\.float64 \[2, 48\]"),
        (torch.ones(2, 48, dtype=torch.int64), r"torch\.int64 \[2, 48\]"),
        (torch.ones(2, 47), r"torch\.float32 \[2, 47\]"),
        (torch.tensor(1.0), r"torch\.float32 \[\]"),
        (torch.ones(2, 48).to_sparse(), r"a torch\.sparse_coo tensor"),
    ],
)
def test_a_wrong_input_names_the_module(x: Tensor, found: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(48, 32)}).requires_grad_(False)
    int8compile.quantize_(model, progress=False)
    for run in (model["up"], torch.compile(model["up"], backend="int8")):
        with pytest.raises(InputError, match=rf"^up: its input is {found}; give a dense tensor \[\.\.\., 48\] of"):
            run(x)


def test_weight_of_a_compiled_module() -> None:
    """There its dtype is a constant, and where its values are asked for they are there."""
    module, x = int8_linear(), torch.randn(5, 48)

    def cast(x: Tensor) -> Tensor:
        return module(x.to(module.weight.dtype))

    with torch.no_grad():
        assert torch.equal(torch.compile(cast, fullgraph=True)(x.double()), module(x))


@every_module
def test_names(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert list(dict(module.named_buffers())) == ["qweight", "scale", "d"][: 2 + (module.d is not None)]
    assert "weight" not in dict(module.named_parameters())
    assert not [name for name in module.state_dict() if name.endswith("weight") and name != "qweight"]
    assert "int8" in repr(module)


@every_module
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.bfloat16(),
        lambda module: module.type(torch.bfloat16),
        lambda module: module.to("cpu", torch.bfloat16),
    ],
    ids=["to", "bfloat16", "type", "to device and dtype"],
)
def test_casts_leave_int8_and_scales_alone(make: Callable[[], nn.Module], cast: Any) -> None:
    module = make()
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module = cast(module)
    assert module.dtype == torch.bfloat16
    assert module.weight.dtype == torch.bfloat16
    for name, tensor in module.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


@every_module
def test_a_tensor_stays_the_same_object(make: Callable[[], nn.Module]) -> None:
    """A tie is one, and moving the one module moves the other's."""
    module = make()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in module.named_buffers()}
    module._apply(torch.clone)  # A move to another device is that.
    for name, (tensor, address) in before.items():
        assert getattr(module, name) is tensor
        assert tensor.data_ptr() != address


def test_siblings_share_a_rotation() -> None:
    """Through moves, casts and copies; and again once they have loaded tensors of their own."""
    q = int8_linear()
    model = nn.ModuleDict({"q": q, "k": int8_linear(d=q.d), "o": int8_linear(d=2 * q.d)})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for changed in (model._apply(torch.clone), model.to(torch.bfloat16), copy.deepcopy(model)):
        assert changed["q"].d is changed["k"].d is not changed["o"].d
        assert changed["q"].d.dtype == torch.float32
    assert int8compile.memory_footprint(model) == sum(t.nbytes for t in model.parameters()) + 3 * 24 * 48 + 4 * (
        3 * 24 + 2 * 48
    )
    model.load_state_dict(state)
    assert model["q"].d is model["k"].d
    model.load_state_dict({name: t * 2 if name[1:] == ".d" else t for name, t in state.items()})
    assert model["q"].d is not model["k"].d
    for module in (model, model):
        share_rotations(module)
        assert model["q"].d is model["k"].d is not model["o"].d
    assert torch.equal(model["o"].d, 2 * state["o.d"])
    share_rotations(model.to("meta"))


@every_module
def test_moves(make: Callable[[], nn.Module]) -> None:
    module = make().to("meta")
    assert {tensor.device.type for tensor in module.buffers()} == {"meta"}
    assert [tensor.dtype for tensor in module.buffers()] == [torch.int8, torch.float32, torch.float32][
        : 2 + (module.d is not None)
    ]
    empty = module.to_empty(device="cpu")
    assert {tensor.device.type for tensor in empty.buffers()} == {"cpu"}


@every_module
def test_copies(make: Callable[[], nn.Module]) -> None:
    module = make()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert repr(copied) == repr(module)
        assert copied.dtype == module.dtype
        for name, tensor in copied.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[name])
            assert tensor.data_ptr() != module.state_dict()[name].data_ptr()


# Loading


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_float_state_dict_is_refused(strict: bool, assign: bool) -> None:
    """PyTorch would report it as missing, and with strict=False say nothing."""
    model = nn.Sequential(int8_linear())
    with pytest.raises(RuntimeError, match=r"0\.weight is torch\.float32, but this layer is int8"):
        model.load_state_dict(nn.Sequential(nn.Linear(48, 24)).state_dict(), strict=strict, assign=assign)


def test_an_int8_state_dict_is_refused_by_a_float_layer() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight".*\n.*"0.qweight", "0.scale"'):
        nn.Sequential(nn.Linear(48, 24)).load_state_dict(nn.Sequential(int8_linear()).state_dict())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("0.qweight", lambda t: t.float(), "0.qweight is torch.float32; it must be torch.int8"),
        ("0.scale", lambda t: t.bfloat16(), "0.scale is torch.bfloat16; it must be torch.float32"),
        ("0.qweight", lambda t: t[:, :-1], "size mismatch for 0.qweight"),
        ("0.scale", lambda t: t[:-1], "size mismatch for 0.scale"),
        ("0.scale", None, 'Missing key.*"0.scale"'),
    ],
)
def test_wrong_tensors_are_refused(name: str, change: Any, message: str, assign: bool) -> None:
    model = nn.Sequential(int8_linear())
    state = dict(nn.Sequential(int8_linear()).state_dict())
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)


def loaded(module: nn.Module, state: dict[str, Tensor], **options: Any) -> nn.Module:
    model = nn.Sequential(module)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, **options)
    return module


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("on", ["cpu", "meta"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_rotation_is_loaded_with_its_weight(before: bool, after: bool, on: str, assign: bool) -> None:
    """Also into a module that has none, and gone where the weight that is loaded has none; with its threshold."""
    source, x = int8_linear(bias=False, rotated=after), torch.randn(5, 48)
    module, state = int8_linear(bias=False, rotated=before).to(on), source.state_dict()
    if on == "cpu" or assign:
        loaded(module, state, assign=assign)
        assert torch.equal(module(x), source(x))
        assert not after or (module.d.data_ptr() == state["d"].data_ptr()) == assign
    else:
        with pytest.warns(UserWarning, match="which is a no-op"):
            loaded(module, source.state_dict())
        assert not after or module.d.is_meta
    assert module.threshold == source.threshold
    assert (module.d is None) == (source.d is None)
    # What somebody chose stays.
    module = loaded(int8_linear(bias=False, rotated=before, threshold=9.0), source.state_dict(), assign=assign)
    assert module.threshold == 9.0


def test_a_rotation_that_siblings_share_is_saved_for_each() -> None:
    """safetensors refuses a tensor under two names, and its `save_model` leaves one name out."""
    q = int8_linear()
    model = nn.ModuleDict({"q": q, "k": int8_linear(d=q.d)})
    state = model.state_dict()
    assert torch.equal(state["q.d"], state["k.d"])
    assert len({state["q.d"].data_ptr(), state["k.d"].data_ptr(), q.d.data_ptr()}) == 3
    assert model.state_dict(keep_vars=True)["k.d"] is q.d


def test_a_rotation_is_not_written_into_that_of_a_sibling() -> None:
    q = int8_linear()
    model = nn.ModuleDict({"q": q, "k": int8_linear(d=q.d)})
    other = nn.ModuleDict({"q": int8_linear(), "k": int8_linear()})
    model.load_state_dict(other.state_dict())
    for name in other:
        assert torch.equal(model[name].d, other[name].d)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (int8_linear, lambda d: d.bfloat16(), r"0\.d is torch\.bfloat16; it must be torch\.float32"),
        (int8_linear, lambda d: d[:-1], r"0\.d has the shape \[47\]; it must be \[48\]$"),
        (int8_experts, lambda d: d.expand(2, 48), r"0\.d has the shape \[2, 48\]; it must be \[48\] or \[3, 48\]$"),
        (int8_linear, lambda d: d * 0, r"0\.d holds 48 NaN, Inf or 0 of 48 entries: the file is damaged"),
        (
            lambda: int8_linear(40, rotated=False),
            lambda d: d[:40],
            r"0\.d is there, but a weight of 40 inputs with outliers='row' is never rotated",
        ),
        (
            lambda: int8_linear(rotated=False, outliers="column"),
            lambda d: d,
            r"0\.d is there, but a weight of 48 inputs with outliers='column' is never rotated",
        ),
    ],
)
def test_rotations_that_do_not_fit_are_refused(
    make: Callable[[], Any], change: Any, message: str, assign: bool
) -> None:
    module = make()
    state = {**module.state_dict(), "d": change(int8_linear().d)}
    before = module.d
    with pytest.raises(RuntimeError, match=message):
        loaded(module, state, assign=assign)
    assert module.d is before


@pytest.mark.parametrize("strict", [True, False])
def test_rotations_without_a_rotated_weight_are_refused(strict: bool) -> None:
    with pytest.raises(RuntimeError, match=r"0\.d is there without the 0\.qweight"):
        loaded(int8_linear(), {"d": torch.ones(48)}, strict=strict)
    with pytest.raises(RuntimeError, match=r"0\.d is there, but a table of embeddings is never rotated"):
        loaded(int8_embedding(), {**int8_embedding().state_dict(), "d": torch.ones(16)}, strict=strict)


def test_tensors_of_bitsandbytes() -> None:
    model, absmax = nn.Sequential(int8_linear()), torch.rand(24) + 1
    qweight = torch.randint(-127, 128, (24, 48), dtype=torch.int8)
    state = {"0.weight": qweight, "0.SCB": absmax, "0.weight_format": torch.tensor(0), "0.bias": torch.randn(24)}
    model.load_state_dict(state)
    assert torch.equal(model[0].qweight, qweight)
    assert torch.equal(model[0].scale, absmax / 127)
    assert (model[0].d, model[0].threshold) == (None, 6.0)
    with pytest.raises(CheckpointError, match=r"0\.weight_format is 2"):
        model.load_state_dict({**state, "0.weight_format": torch.tensor(2)})
    with pytest.raises(CheckpointError, match=r"0\.weight and 0\.SCB are no 8 bit layer"):
        model.load_state_dict({**state, "0.weight": qweight.float()})


# Derivatives: those of the product with the dequantized weight


def models() -> tuple[nn.Module, nn.Module, nn.Module]:
    """One in int8, the float one that it stands for, and the float one that it was made from."""
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 24)).eval().requires_grad_(False)
    other = copy.deepcopy(model)
    int8compile.quantize_(other, progress=False)
    dequantized = copy.deepcopy(other)
    int8compile.dequantize_(dequantized)
    return other, dequantized.requires_grad_(False), model


def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.cos(),))[1],
    "dual numbers": forward_mode,
    "grad": lambda model, x: torch.func.grad(loss(model))(x),
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](x[:, :24].cos())[0],
    "jacrev": lambda model, x: torch.func.jacrev(model)(x[0]),
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x[0]),
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "grad of each": lambda model, x: torch.func.vmap(torch.func.grad(loss(model)))(x),
    "hessian": lambda model, x: torch.func.hessian(loss(model))(x[0]),
    "grad of grad": lambda model, x: torch.func.grad(lambda x: torch.func.grad(loss(model))(x).square().sum())(x),
    "forward over forward": lambda model, x: torch.func.jacfwd(torch.func.jacfwd(loss(model)))(x[0]),
    "with respect to a bias": lambda model, x: torch.func.grad(
        lambda bias: torch.func.functional_call(model, {"0.bias": bias}, (x,)).square().sum()
    )(torch.ones(48)),
    "along a bias": lambda model, x: torch.func.jvp(
        lambda bias: torch.func.functional_call(model, {"0.bias": bias}, (x,)), (torch.ones(48),), (torch.ones(48),)
    )[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str) -> None:
    model, dequantized, _ = models()
    x = torch.randn(5, 48)
    transform = TRANSFORMS[name]
    # They differ by how activations are rounded, which derivatives see through the tanh only.
    assert relative_error(transform(model, x), transform(dequantized, x)) < INT8_ERROR


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
@pytest.mark.parametrize("name", ["jvp", "grad", "vmap", "grad of each"])
def test_torch_func_in_a_compiled_function(name: str) -> None:
    x = torch.randn(5, 48)
    transform = TRANSFORMS[name]
    for model in models():
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, model=model: transform(model, x), backend="int8")
        assert relative_error(compiled(x), transform(model, x)) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"rotated": False}, {"rotated": False, "outliers": "column"}, {"weight_only": True}]
)
def test_tangents_are_those_of_the_dequantized_product(options: dict[str, Any]) -> None:
    module, (x, along) = int8_linear(**options), torch.randn(2, 5, 48)
    y, tangent = torch.func.jvp(module, (x,), (along,))
    assert torch.equal(y, module(x))
    torch.testing.assert_close(tangent, along @ module.dequantize().mT)
    batched = torch.func.vmap(module)(x[:, None])
    assert torch.equal(batched, torch.stack([module(row) for row in x[:, None]]))


def test_tangents_of_experts() -> None:
    module, (x, along) = int8_experts(), torch.randn(2, 5, 48)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    tangent = torch.func.jvp(lambda x: module(x, ends), (x,), (along,))[1]
    weights = module.dequantize()
    torch.testing.assert_close(tangent[:2], along[:2] @ weights[0].mT)
    torch.testing.assert_close(tangent[2:4], along[2:4] @ weights[2].mT)
    assert not tangent[4:].any()
