"""The graph side of the GPU kernels, run on the CPU, where the same operators compute their definition."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from int8compile import Int8Config, backend, hardware, memory_footprint, ops, quantize_, triton_kernels
from int8compile.exporting.exporter import rewrite
from int8compile.ops import quantized, reference
from int8compile.passes import lower_gpu
from int8compile.passes.lower_gpu import Lowered
from int8compile.weights import STORE
from tests.helpers.lowered import Seen, by_operator, compiled, near
from tests.helpers.spellings import SPELLINGS, Weights

ERROR = 0.03  # int8's error, far above that of any model here.


class Parts(nn.Module):
    """Linears that read one input."""

    def __init__(self, *outputs: int, bias: bool = True) -> None:
        super().__init__()
        for i, n in enumerate(outputs):
            self.add_module(f"part{i}", nn.Linear(64, n, bias))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.children()]


@torch.no_grad()
def test_what_runs_on_another_stream_is_left_whole(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on another stream shares nothing with this one, such as counters of split sums, and stays on its stream."""
    # Inductor has no streams on the CPU.
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, fakes, **options: module.forward)
    parts, x = Parts(32, 17, 40), torch.randn(2, 64)
    here, there, rest = parts.children()

    def call(x: Tensor) -> list[Tensor]:
        y = here(x)
        with torch.Stream(device="cpu"):
            z, activated = there(x), F.relu(y)
            after_norm = rest(F.rms_norm(x, (64,)))
        return [y, z, activated, after_norm, rest(F.rms_norm(x, (64,)))]

    results = compiled(call)(x)
    assert (seen.lowered.products, seen.lowered.quantized, seen.lowered.norms) == (2, 2, 1)
    left = [node for node in seen.graph.graph.nodes if node.target is ops.linear.default]
    assert len(left) == 2
    assert all(node.meta["custom"] == {"stream": 0} for node in left)
    assert seen.activations() == [quantized.NONE] * 2
    for actual, expected in zip(results, call(x), strict=True):  # type: ignore[call-overload]
        assert (actual - expected).norm() <= ERROR * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_q_k_and_v_are_one_product(bias: bool, seen: Seen) -> None:
    parts, x = Parts(32, 17, 40, bias=bias), torch.randn(2, 5, 64)
    results = compiled(parts)(x)
    assert seen.lowered == Lowered(products=1, quantized=1)
    assert seen.parts() == [(32, 17)]
    for part, result in zip(parts.children(), results, strict=True):  # type: ignore[call-overload]
        assert result.is_contiguous()
        assert near(result, by_operator(part, x))


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 4, 5])
def test_more_or_fewer_than_three(count: int, seen: Seen) -> None:
    parts, x = Parts(*range(16, 16 + count)), torch.randn(3, 64)
    results = compiled(parts)(x)
    assert seen.lowered == Lowered(products=-(-count // 3), quantized=1)
    assert all(near(result, by_operator(part, x)) for part, result in zip(parts.children(), results, strict=True))  # type: ignore[call-overload]


class Gated(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 48, bias), nn.Linear(64, 48, bias)
        self.down = nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ["gate first", "up first", "product reversed"])
def test_gate_and_up_end_in_their_product(order: str, bias: bool, seen: Seen) -> None:
    model = Gated(bias)

    def forward(x: Tensor) -> Tensor:
        if order == "up first":
            up = model.up(x)
            return model.down(F.silu(model.gate(x)) * up)
        if order == "product reversed":
            return model.down(model.up(x) * F.silu(model.gate(x)))
        return model(x)

    x = torch.randn(5, 64)
    y = compiled(forward)(x)
    assert seen.lowered == Lowered(products=2, quantized=2)
    assert seen.activations() == [quantized.SILU_MUL, quantized.NONE]
    hidden = F.silu(by_operator(model.gate, x)) * by_operator(model.up, x)
    assert near(y, by_operator(model.down, hidden))  # type: ignore[arg-type]


NOT_GATED: dict[str, Callable[[Gated, Tensor], object]] = {
    "gate is read twice": lambda m, x: (F.silu(gate := m.gate(x)) * m.up(x), gate),
    "up is read twice": lambda m, x: (F.silu(m.gate(x)) * (up := m.up(x)), up),
    "silu is read twice": lambda m, x: ((silu := F.silu(m.gate(x))) * m.up(x), silu),
    "up reads another tensor": lambda m, x: F.silu(m.gate(x)) * m.up(x + 1),
    "up is no linear": lambda m, x: F.silu(m.gate(x)) * x[:, :48],
    "another function": lambda m, x: F.gelu(m.gate(x)) * m.up(x),
    "gate with itself": lambda m, x: F.silu(gate := m.gate(x)) * gate,
    "the weight is used again": lambda m, x: F.silu(m.gate(x)) * m.up(x) + m.up(x * 2),
}


@torch.no_grad()
@pytest.mark.parametrize("call", NOT_GATED.values(), ids=NOT_GATED.keys())
def test_what_is_not_a_gated_pair(call: Callable[[Gated, Tensor], object], seen: Seen) -> None:
    model, x = Gated(), torch.randn(5, 64)
    y = compiled(lambda x: call(model, x))(x)
    assert quantized.SILU_MUL not in seen.activations()
    for actual, expected in zip(
        *(each if isinstance(each, tuple) else (each,) for each in (y, call(model, x))), strict=True
    ):
        assert (actual - expected).norm() <= ERROR * expected.norm()


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, quantized.RELU),
    "torch.relu": (torch.relu, quantized.RELU),
    "method": (lambda y: y.relu(), quantized.RELU),
    "module": (nn.ReLU(), quantized.RELU),
    "in place": (nn.ReLU(inplace=True), quantized.RELU),
    "silu": (nn.SiLU(), quantized.SILU),
    "gelu": (nn.GELU(), quantized.GELU),
    "gelu by tanh": (nn.GELU(approximate="tanh"), quantized.GELU_TANH),
    "tanh": (torch.tanh, quantized.NONE),
}


@torch.no_grad()
@pytest.mark.parametrize(("function", "number"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activation_functions(function: Callable[[Tensor], Tensor], number: int, seen: Seen) -> None:
    layer, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
    y = compiled(lambda x: function(layer(x)) * 2)(x)
    assert seen.activations() == [number]
    assert near(y, function(by_operator(layer, x)) * 2)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_linear_that_others_read_keeps_its_value(seen: Seen) -> None:
    layer, x = nn.Linear(64, 48), torch.randn(5, 64)
    y = compiled(lambda x: F.relu(before := layer(x)) + before)(x)
    assert seen.activations() == [quantized.NONE]
    assert near(y, F.relu(by_operator(layer, x)) + by_operator(layer, x))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_write_between_readers(seen: Seen) -> None:
    """A quantized activation is not used after a write to the activation."""
    first, second = nn.Linear(64, 48), nn.Linear(64, 48)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1
        before = first(x)
        x.add_(1)
        return before, second(x)

    x = torch.randn(5, 64)
    before, after = compiled(call)(x)  # type: ignore[misc]
    assert seen.lowered == Lowered(products=2, quantized=2)
    assert near(before, by_operator(first, x))
    assert near(after, by_operator(second, x + 1))


@torch.no_grad()
def test_readers_that_are_not_one_product_share_the_quantization(seen: Seen) -> None:
    """A weight that is used twice stays alone; linears with and without bias are not joined."""
    first, second, third = nn.Linear(64, 48), nn.Linear(64, 48, bias=False), nn.Linear(64, 48)
    x = torch.randn(5, 64)
    compiled(lambda x: (first(x), second(x), third(x), third(x * 2)))(x)
    assert seen.lowered == Lowered(products=4, quantized=2)


EARLIER: dict[str, Callable[[Gated, nn.Linear, Tensor], list[Tensor]]] = {
    "another linear first": lambda m, other, x: [other(x), F.silu(m.gate(x)) * m.up(x)],
    "another linear between": lambda m, other, x: [F.silu(m.gate(x)) * m.up(x), other(x)],
    "up, another, gate": lambda m, other, x: [(up := m.up(x)), other(x), F.silu(m.gate(x)) * up][1:],
}


@torch.no_grad()
@pytest.mark.parametrize("call", EARLIER.values(), ids=EARLIER.keys())
def test_what_shares_an_activation_with_a_gated_pair(
    call: Callable[[Gated, nn.Linear, Tensor], list[Tensor]], seen: Seen
) -> None:
    """The activation is quantized before its first reader, and once per d where linears of several parents read it."""
    model, other, x = Gated(), nn.Linear(64, 32), torch.randn(5, 64)
    compiled(lambda x: call(model, other, x))(x)
    assert seen.lowered == Lowered(products=2, quantized=2)
    model, other = Gated(), nn.Linear(64, 32)
    model.other = other
    results = compiled(lambda x: call(model, model.other, x))(x)
    assert seen.lowered == Lowered(products=2, quantized=1)
    by = {"gate": by_operator(model.gate, x), "up": by_operator(model.up, x), "other": by_operator(other, x)}
    hidden = F.silu(by["gate"]) * by["up"]
    for result in results:  # type: ignore[attr-defined]
        assert near(result, by["other"] if result.shape[-1] == 32 else hidden)


@torch.no_grad()
def test_two_gated_pairs_of_one_activation(seen: Seen) -> None:
    first, second, x = Gated(), Gated(), torch.randn(5, 64)

    def call(x: Tensor) -> list[Tensor]:
        late_up = second.up(x)
        one = F.silu(first.gate(x)) * first.up(x)
        return [one, F.silu(second.gate(x)) * late_up]

    results = compiled(call)(x)
    assert seen.lowered == Lowered(products=2, quantized=1)
    for model, result in zip((first, second), results, strict=True):  # type: ignore[call-overload]
        assert near(result, F.silu(by_operator(model.gate, x)) * by_operator(model.up, x))


def add_one(x: Tensor) -> None:
    x.add_(1)


@torch.no_grad()
@pytest.mark.parametrize("written_as", ["packet", "overload"])
def test_an_operator_that_writes_is_a_barrier(written_as: str, seen: Seen) -> None:
    """Dynamo's graph holds a packet of overloads: its schema says that it writes, its name does not."""
    with torch.library._scoped_library("int8compile_test", "FRAGMENT") as library:
        library.define("bump(Tensor(a!) x) -> ()")
        library.impl("bump", add_one, "CompositeExplicitAutograd")
        torch.library.register_fake("int8compile_test::bump", lambda x: None, lib=library)
        bump = torch.ops.int8compile_test.bump
        first, second, x = nn.Linear(64, 48), nn.Linear(64, 48), torch.randn(5, 64)

        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x * 1
            before = first(x)
            (bump if written_as == "packet" else bump.default)(x)
            return before, second(x)

        before, after = compiled(call)(x)  # type: ignore[misc]
    assert seen.lowered == Lowered(products=2, quantized=2)
    assert near(before, by_operator(first, x))
    assert near(after, by_operator(second, x + 1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(64), nn.Linear(64, 48), nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.norm(x)))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"threshold": 0.0}, {"threshold": 2.0}, {"rotate": False}], ids=str)
def test_options_reach_the_operators(options: dict[str, object], seen: Seen) -> None:
    model, x = Normed(), torch.randn(5, 64)
    y = compiled(model, **options)(x)
    threshold = options.get("threshold", 12.0 if "rotate" not in options else 6.0)
    given = [
        node.args[-1:] + node.args[1:2] if node.target is ops.quantize_rows.default else node.args[-1:] + node.args[4:5]
        for node in seen.graph.graph.nodes
        if node.target in (ops.norm_quantize_rows.default, ops.quantize_rows.default)
    ]
    assert [each for each, _ in given] == [threshold] * 2
    assert [d is None for _, d in given] == ["rotate" in options] * 2
    assert len({d for _, d in given}) == (1 if "rotate" in options else 2)
    assert (y - model(x)).norm() <= ERROR * model(x).norm()  # type: ignore[operator]


@torch.no_grad()
def test_the_column_policy_stays_one_operator(seen: Seen) -> None:
    model, x = Normed(), torch.randn(5, 64)
    y = compiled(model, outliers="column")(x)
    assert seen.lowered == Lowered()
    assert (y - model(x)).norm() <= ERROR * model(x).norm()  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_any_number_of_rows_without_recompiling(threshold: float, seen: Seen) -> None:
    model = Gated()
    call = torch.compile(model, backend="int8", fullgraph=True, dynamic=True, options={"threshold": threshold})
    for rows in (5, 2, 129, 600):
        x = torch.randn(2, rows, 64)
        assert (call(x) - model(x)).norm() <= ERROR * model(x).norm()
    assert seen.graphs == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_autocast(dtype: torch.dtype, threshold: float, seen: Seen) -> None:
    model, x = Normed(), torch.randn(5, 64)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    y = compiled(call, threshold=threshold)(x)
    assert y.dtype == dtype  # type: ignore[attr-defined]
    assert (y - call(x)).float().norm() <= ERROR * call(x).float().norm()  # type: ignore[operator]
    assert seen.lowered.products == 2


def test_what_autograd_records_stays_one_operator(seen: Seen) -> None:
    layer = nn.Linear(64, 48).requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    y = compiled(layer)(x)
    assert seen.lowered == Lowered()
    y.sum().backward()  # type: ignore[attr-defined]
    (weight,) = STORE.weights(layer.weight).values()
    assert x.grad is not None
    dequantized = reference.dequantize_weight(weight.qweight, weight.scale, weight.d, torch.float32)
    assert torch.allclose(x.grad, dequantized.sum(dim=0).expand(5, 64), atol=1e-5)


@torch.no_grad()
def test_weights_are_held_once_and_refreshed(seen: Seen) -> None:
    """Weights are held once, even if their rows are interleaved and another graph takes one of them alone."""
    model, x = Gated(), torch.randn(5, 64)
    both, alone = compiled(model), torch.compile(model.gate, backend="int8", fullgraph=True)
    both(x)
    (gate,) = STORE.weights(model.gate.weight).values()
    (up,) = STORE.weights(model.up.weight).values()
    assert gate.qweight.untyped_storage().data_ptr() == up.qweight.untyped_storage().data_ptr()
    assert gate.qweight.stride() == (128, 1)
    assert near(alone(x), by_operator(model.gate, x))
    assert gate.qweight.stride() == (64, 1)
    model.gate.weight.mul_(-2)
    assert near(alone(x), by_operator(model.gate, x))
    hidden = F.silu(by_operator(model.gate, x)) * by_operator(model.up, x)
    assert near(both(x), by_operator(model.down, hidden))  # type: ignore[arg-type]
    # A graph compiled for a single weight still finds its layout, whichever graph ran in between.
    assert near(alone(x), by_operator(model.gate, x))
    assert near(both(x), by_operator(model.down, hidden))  # type: ignore[arg-type]
    # Interleaved for one graph, consecutive for the next, and back.
    other = torch.compile(lambda x: (model.gate(x), model.up(x)), backend="int8", fullgraph=True)
    for _ in range(2):
        assert near(other(x)[1], by_operator(model.up, x))
        assert near(alone(x), by_operator(model.gate, x))
        assert near(both(x), by_operator(model.down, hidden))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_weight_taken_alone_before_it_is_interleaved(seen: Seen) -> None:
    """The first graph was compiled for consecutive rows, and gets them."""
    model, x = Gated(), torch.randn(5, 64)
    alone = torch.compile(model.gate, backend="int8", fullgraph=True)
    both = compiled(model)
    for _ in range(2):
        alone(x), both(x)
        hidden = F.silu(by_operator(model.gate, x)) * by_operator(model.up, x)
        assert near(alone(x), by_operator(model.gate, x))
        assert near(both(x), by_operator(model.down, hidden))  # type: ignore[arg-type]


def test_with_and_without_gradients_in_turns(seen: Seen) -> None:
    """Training adapters on a frozen base: the training graph takes gate and up separately."""
    model, x = Gated().requires_grad_(False), torch.randn(5, 64)
    call = compiled(model)
    call(x)
    hidden = F.silu(by_operator(model.gate, x)) * by_operator(model.up, x)
    expected = by_operator(model.down, hidden)  # type: ignore[arg-type]
    for _ in range(2):
        y = call(x.clone().requires_grad_())
        y.sum().backward()  # type: ignore[attr-defined]
        assert near(y.detach(), expected)  # type: ignore[attr-defined]
        with torch.no_grad():
            assert near(call(x), expected)


@pytest.mark.parametrize(("isa", "expected"), [("sm_75", False), ("sm_80", True), ("sm_90", True), ("gfx1100", False)])
def test_which_gpus_have_int8_kernels(isa: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "of", lambda device: hardware.gpu("a GPU", isa))
    assert lower_gpu.has_int8_kernels(torch.device("cuda")) == expected
    assert not lower_gpu.has_int8_kernels(torch.device("cpu"))


@pytest.mark.parametrize(
    ("failure", "isa", "message"),
    [
        ("Triton is not installed", "sm_90", "cannot be used: Triton is not installed"),
        ("", "sm_60", "cannot be used: Triton has none for cuda:0"),
        ("", "sm_90", ""),
    ],
)
def test_a_gpu_without_kernels_is_warned_of(
    failure: str, isa: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "failure", lambda: failure)
    monkeypatch.setattr(triton_kernels, "load", lambda: not failure)
    monkeypatch.setattr(hardware, "of", lambda device: hardware.gpu("a GPU", isa))
    backend.warn_once.cache_clear()

    class OnGpu:
        device = torch.device("cuda", 0)

    parameters: dict[Node, Tensor] = {torch.fx.Graph().placeholder("w"): OnGpu()}  # type: ignore[dict-item]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert backend._gpu_kernels(parameters) == (not failure)
    assert len(caught) == bool(message)
    assert all(message in str(warning.message) for warning in caught)


@torch.no_grad()
def test_weights_of_int8_modules_are_not_joined(seen: Seen) -> None:
    """Joining would hold them twice in memory. The activation is quantized once all the same."""
    everything, x = nn.ModuleList([Parts(32, 17, 40), Gated(bias=True)]), torch.randn(2, 5, 64)
    quantize_(everything, progress=False)
    parts, model = everything
    expected = [*parts(x), model.gate(x), model.up(x), model(x)]
    held, before = dict(everything.named_buffers()), STORE.quantized
    results = compiled(lambda x: [*parts(x), model.gate(x), model.up(x), model(x)])(x)
    # The linears of each parent share a d.
    assert seen.lowered == Lowered(products=8, quantized=3)
    assert seen.parts() == [(0, 0)] * 8
    assert STORE.quantized == before
    assert not any(STORE.weights(buffer) for buffer in held.values())
    assert all(map(near, results, expected))


@torch.no_grad()
def test_weights_that_int8_modules_give_up_are_joined(seen: Seen) -> None:
    model, x = nn.Sequential(Gated(bias=True)), torch.randn(2, 5, 64)
    quantize_(model, progress=False)
    expected, before = model(x), memory_footprint(model)
    call = compiled(model, free_weights=True)
    for _ in range(2):
        assert near(call(x), expected)
    assert seen.lowered == Lowered(products=2, quantized=2)
    assert seen.activations() == [quantized.SILU_MUL, quantized.NONE]
    assert memory_footprint(model) == before + 4 * 2 * 48  # The joined scales.


def lowered_calls(graph: GraphModule) -> list[tuple[str, tuple[object, ...]]]:
    """Return the quantizations and products of a graph, with their arguments that are not tensors."""
    ours = (ops.norm_quantize_rows.default, ops.quantize_rows.default, ops.quantized_linear.default)
    return [
        (str(node.target), tuple(each for each in node.args if not isinstance(each, Node)))
        for node in graph.graph.nodes
        if node.target in ours
    ]


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    "gate and up": Gated,
    "gate and up, with a bias": lambda: Gated(bias=True),
    "norm": Normed,
    "relu": lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU()),
    "silu": lambda: nn.Sequential(nn.Linear(64, 48), nn.SiLU()),
    "gelu": lambda: nn.Sequential(nn.Linear(64, 48), nn.GELU()),
    "gelu by tanh": lambda: nn.Sequential(nn.Linear(64, 48), nn.GELU("tanh")),
    "attention": lambda: nn.TransformerDecoderLayer(64, 4, 48, batch_first=True),
}


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_graphs_are_lowered_alike(name: str, threshold: float, seen: Seen) -> None:
    """torch.export writes ATen operators where Dynamo keeps the model's own calls."""
    model = EXPORTED[name]().eval()
    args = (torch.randn(2, 5, 64),) * (2 if name == "attention" else 1)
    with torch.no_grad():
        compiled(model, threshold=threshold)(*args)
        module = torch.export.export(model, args, strict=False).module(check_guards=False)
        rewrite(module, Int8Config(threshold=threshold), for_gpu=True)
    found = lowered_calls(module)
    assert found == lowered_calls(seen.graph)
    assert found


class Spelled(nn.Module):
    """A linear in every spelling that one operation has."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.models = nn.ModuleList(Weights(call) for _, spelled, call in SPELLINGS if spelled == op)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.models]


@torch.no_grad()
@pytest.mark.parametrize("op", sorted({op for _, op, _ in SPELLINGS}))
def test_every_spelling_is_lowered(op: str, seen: Seen) -> None:
    model, x = Spelled(op), torch.randn(2, 5, 32)
    results = compiled(model, min_features=5)(x)
    assert not [node for node in seen.graph.graph.nodes if node.target is ops.linear.default]
    for actual, expected in zip(results, model(x), strict=True):  # type: ignore[call-overload]
        assert (actual - expected).norm() <= ERROR * expected.norm()
