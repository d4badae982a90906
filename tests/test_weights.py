"""The weight store: quantized once per parameter, again when the parameter changes; and freed weights."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import io
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import int8compile
from int8compile import cpu, weights
from int8compile.ops import input_scales, pack_weight, quantize_weight, rotation_of
from int8compile.passes import WeightView
from int8compile.weights import STORE, FreedWeight, WeightStore
from tests.helpers.models import (
    Attention,
    CountingBackend,
    Stack,
    by_operator,
    reference,
    rotation_from,
    rotations,
    threads,
)


def test_one_compile_serves_thirty_layers_each_with_its_own_weights() -> None:
    """Regional compilation calls one compiled graph with the parameters of every layer."""
    model, x, backend, quantized = Stack(30), torch.randn(4, 32), CountingBackend(), STORE.quantized
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    assert torch.equal(model(x), reference(model, x))
    assert backend.graphs == 1
    assert STORE.quantized - quantized == 60
    assert torch.equal(model(x), reference(model, x))
    assert STORE.quantized - quantized == 60


def test_two_compiled_copies_of_a_model_share_the_bytes() -> None:
    model, x = Stack(), torch.randn(4, 32)
    gc.collect()
    before = STORE.nbytes()
    torch.compile(model, backend="int8")(x)
    once = STORE.nbytes() - before
    # Weights are held as the graph takes them, packed or not, never both.
    lay_out = pack_weight if cpu.available() else Tensor.char
    weights = [weight for weight in model.parameters() if weight.dim() == 2]
    # Scales, and a d for each weight: none has a sibling with equally many inputs.
    assert once == sum(lay_out(weight.char()).nbytes + 4 * sum(weight.shape) for weight in weights)
    torch._dynamo.reset()
    torch.compile(model, backend="int8", options={"threshold": 3.0})(x)
    assert STORE.nbytes() - before == once


@pytest.mark.parametrize("other", [{"rotate": False}, {"outliers": "column"}], ids=["not rotated", "columns"])
def test_two_compiled_copies_that_rotate_otherwise(other: dict[str, Any]) -> None:
    """Each is right in turns; once both have their weights, nothing is quantized again."""
    model, x = Stack(), torch.randn(4, 32).clamp(-2, 2)
    first = torch.compile(model, backend="int8", fullgraph=True)
    expected = reference(model, x)
    assert torch.equal(first(x), expected)
    torch._dynamo.reset()
    second = torch.compile(model, backend="int8", fullgraph=True, options=other)
    plain = reference(model, x, rotated=dict.fromkeys(model.modules()), columns="outliers" in other)
    assert torch.equal(second(x), plain)
    torch._dynamo.reset()
    first, quantized = torch.compile(model, backend="int8", fullgraph=True), STORE.quantized
    for _ in range(2):
        assert torch.equal(first(x), expected)
    assert STORE.quantized == quantized


def test_tied_weights_are_quantized_once() -> None:
    model, x, quantized = Stack(), torch.randn(4, 32), STORE.quantized
    model.layers[1].up.weight = model.layers[0].up.weight
    assert torch.equal(torch.compile(model, backend="int8")(x), reference(model, x))
    assert STORE.quantized - quantized == 3


def test_int8_weights_go_with_the_model() -> None:
    gc.collect()
    before = STORE.nbytes()
    model = Stack()
    torch.compile(model, backend="int8")(torch.randn(4, 32))
    assert STORE.nbytes() > before
    del model
    torch._dynamo.reset()
    gc.collect()
    assert STORE.nbytes() == before


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in-place": lambda weight: weight.mul_(2),
    "copy_": lambda weight: weight.copy_(torch.randn_like(weight)),
    "one element": lambda weight: weight[3, 4].fill_(9),
    "replaced .data": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
}


# Changes that PyTorch does not count. A whole tensor changes, as in a merge, an average or a step.
UNCOUNTED: dict[str, Callable[[nn.Parameter], object]] = {
    "data.copy_": lambda weight: weight.data.copy_(torch.randn_like(weight)),
    "data +=": lambda weight: weight.data.add_(torch.randn_like(weight)),
    "numpy": lambda weight: weight.detach().numpy().__imul__(2),
    "fused optimizer": lambda weight: torch._fused_sgd_(
        [weight],
        [torch.randn_like(weight)],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.5,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "its storage": lambda weight: weight.untyped_storage().copy_(torch.randn_like(weight).untyped_storage()),
}


@pytest.mark.parametrize("change", [*CHANGES.values(), *UNCOUNTED.values()], ids=[*CHANGES, *UNCOUNTED])
def test_stale_weights_are_replaced(change: Callable[[nn.Parameter], object]) -> None:
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    (weight,) = STORE.weights(model.layers[1].up.weight).values()
    before, quantized = (weight.qweight.clone(), weight.scale.clone()), STORE.quantized
    rotated = rotations(model)
    change(model.layers[1].up.weight)
    # The weight keeps its d, which was partly made from other weights.
    assert torch.equal(compiled(x), reference(model, x, rotated=rotated))
    assert STORE.quantized - quantized == 1
    (after,) = STORE.weights(model.layers[1].up.weight).values()
    assert after.d is weight.d
    qweight, scale = quantize_weight(model.layers[1].up.weight, weight.d)
    assert torch.equal(after.qweight, pack_weight(qweight) if cpu.available() else qweight)
    assert torch.equal(after.scale, scale)
    # A thread that computes with the old tensors can go on.
    assert torch.equal(weight.qweight, before[0])
    assert torch.equal(weight.scale, before[1])


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (lambda weight: weight.mul_(2), True),
        (lambda weight: weight.data.mul_(2), True),
        (STORE.forget, True),
        (lambda weight: setattr(weight, "data", torch.randn_like(weight)), False),
    ],
    ids=["counted", "uncounted", "refresh", "new data"],
)
def test_addresses_stay_where_graphs_hold_them(
    change: Callable[[nn.Parameter], object], stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a CUDA graph sees changes in place of a float weight, but keeps a weight that is replaced."""
    monkeypatch.setattr(weights, "IN_PLACE", ("cpu",))
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    (before,) = STORE.weights(model.layers[1].up.weight).values()
    address, quantized, rotated = before.qweight.data_ptr(), STORE.quantized, rotations(model)
    change(model.layers[1].up.weight)
    assert torch.equal(compiled(x), reference(model, x, rotated=rotated))
    assert STORE.quantized - quantized == 1
    (after,) = STORE.weights(model.layers[1].up.weight).values()
    assert (after.qweight.data_ptr() == address) is stays


def test_a_vector_that_is_changed_and_assigned_again() -> None:
    """Evolution strategies do this: `.data` is replaced by views of the same memory."""
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    vector, rotated = nn.utils.parameters_to_vector(model.parameters()).detach(), rotations(model)
    for factor in (1, -2, 0.5):
        nn.utils.vector_to_parameters(vector.mul_(factor), model.parameters())
        assert torch.equal(compiled(x), reference(model, x, rotated=rotated))


def one_element(weight: Tensor) -> None:
    weight.data[3, 5] += 1


def test_an_element_that_leaves_no_trace_is_seen_when_something_is_compiled() -> None:
    """Without compiling, unread elements are not noticed; `refresh` helps."""
    model, x = Stack(1), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    before, quantized, rotated = compiled(x), STORE.quantized, rotations(model)
    one_element(model.layers[0].up.weight)
    assert torch.equal(compiled(x), before)
    torch._dynamo.reset()
    again = torch.compile(model, backend="int8", fullgraph=True)
    assert torch.equal(again(x), reference(model, x, rotated=rotated))
    assert not torch.equal(again(x), before)
    # Nothing else was quantized for it.
    assert STORE.quantized - quantized == 1
    one_element(model.layers[0].up.weight)
    int8compile.refresh(model)
    assert torch.equal(again(x), reference(model, x, rotated=rotated))


def test_a_recompile_compares_the_weights() -> None:
    model, x = Stack(1), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=False)
    compiled(x)
    rotated = rotations(model)
    one_element(model.layers[0].up.weight)
    longer = torch.randn(7, 32)
    assert torch.equal(compiled(longer), reference(model, longer, rotated=rotated))
    assert torch.equal(compiled(x), reference(model, x, rotated=rotated))


def test_threads_get_results_of_the_old_weights_or_of_the_new() -> None:
    """Another thread replaces `.data`, like a server that takes new weights; eager float behaves the same."""
    with threads(1):
        model, x = nn.Linear(256, 256, bias=False).requires_grad_(False), torch.randn(2, 256)
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        weights = [model.weight.clone(), torch.randn(256, 256)]
        expected = []
        for weight in weights:
            model.weight.data = weight.clone()
            expected.append(compiled(x))
        until, found = time.time() + 1.5, [0, 0, 0]

        def read() -> None:
            while time.time() < until:
                y = compiled(x)
                found[next((i for i, each in enumerate(expected) if torch.equal(y, each)), 2)] += 1

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            turn = 0
            while time.time() < until:
                turn ^= 1
                model.weight.data = weights[turn].clone()
                compiled(x)
            for reader in readers:
                reader.result()
    assert found[2] == 0
    assert min(found[:2]) > 0


@pytest.mark.parametrize("swap", [False, True], ids=["new data", "swapped"])
def test_a_model_can_be_converted_after_compiling(swap: bool) -> None:
    """`.to()` replaces parameters' data, or swaps parameters, which weak references to them must not prevent."""
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8")
    compiled(x)
    rotated = rotations(model)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = x.to(torch.bfloat16)
    # Swapped parameters are new, and so is their d.
    assert torch.equal(compiled(x), reference(model, x, rotated=None if swap else rotated))


def test_two_parameters_are_swapped() -> None:
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8")
    compiled(x)
    torch.utils.swap_tensors(model.layers[0].up.weight, model.layers[1].up.weight)
    # Each weight moves with its d.
    assert torch.equal(compiled(x), reference(model, x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_steps_are_noticed(optimizer: type, fused: bool) -> None:
    """Fused optimizers update a parameter without increasing its version."""
    model, x = Stack(1).requires_grad_(True), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        rotated = rotations(model)
    model(x).square().sum().backward()
    optimizer(model.parameters(), lr=1.0, fused=fused).step()
    with torch.no_grad():
        assert torch.equal(compiled(x), reference(model, x, rotated=rotated))


def test_optimizers_are_watched_from_the_first_quantized_weight_on() -> None:
    """Importing the package leaves PyTorch's hooks alone; one hook serves all weights."""
    code = """
import torch, int8compile
from torch.optim import optimizer
from int8compile.weights import STORE
from int8compile.passes import WeightView

hooks = optimizer._global_optimizer_post_hooks
counts = [len(hooks)]
weights = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(2)]
for weight in weights:
    STORE.get(weight, WeightView((16, 16), (16, 1), 0, (16, 16)), "a")
    counts.append(len(hooks))
print(counts)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[0, 1, 1]"


def test_a_new_storage_at_an_old_address_is_noticed() -> None:
    """Offloading frees the data and allocates it again, often at the same address."""
    model, x = nn.Linear(256, 256).requires_grad_(False), torch.randn(4, 256)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    d = rotation_from(model.weight)
    for _ in range(20):
        compiled(x)
        model.weight.data = torch.empty(0)
        model.weight.data = torch.randn(256, 256)
        assert torch.equal(compiled(x), by_operator(model, x, d))


def test_weights_quantized_in_inference_mode_serve_every_mode() -> None:
    """Inference tensors can be neither refreshed outside inference mode nor saved for a backward pass."""
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    with torch.inference_mode():
        compiled(x)
    with torch.no_grad():
        model.layers[0].up.weight.mul_(2)  # A power of two changes no d.
    assert torch.equal(compiled(x), reference(model, x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_after_compiling(assign: bool) -> None:
    model, other, x = Stack(), Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    # Parameters keep their d; assigned parameters are new.
    kept = dict(zip(other.modules(), map(rotations(model).get, model.modules()), strict=True))
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(compiled(x), reference(other, x, rotated=None if assign else kept))


def test_a_weight_that_turns_bad_is_refused_at_the_next_call() -> None:
    model, x = Stack(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    model.layers[0].up.weight[0, 0] = float("nan")
    with pytest.raises(int8compile.BadWeightError, match=r"layers\.0\.up"):
        compiled(x)


def held(part: nn.Module) -> weights.QuantizedWeight:
    """Return the store's weight for a linear."""
    (weight,) = STORE.weights(part.weight).values()
    return weight


@pytest.mark.parametrize("names", ["qk", "qkv"])
@pytest.mark.parametrize("first", [["q"], ["q", "k"]], ids=str)
def test_graphs_that_group_weights_otherwise_share_a_d(names: str, first: list[str]) -> None:
    """The oldest d becomes the common d, and weights with another d are quantized again; then each graph is right."""
    model, x = Attention(names), torch.randn(4, 32)
    alone = [torch.compile(model.get_submodule(name), backend="int8", fullgraph=True) for name in first]
    for name, compiled in zip(first, alone, strict=True):
        part = model.get_submodule(name)
        assert torch.equal(compiled(x), by_operator(part, x, rotation_from(part.weight)))
    together = torch.compile(model, backend="int8", fullgraph=True)
    d = rotation_from(model.q.weight)
    expected = [by_operator(part, x, d) for part in model.children()]
    quantized = STORE.quantized
    for _ in range(2):
        assert all(map(torch.equal, together(x), expected))
        assert all(torch.equal(compiled(x), expected[i]) for i, compiled in enumerate(alone))
    assert STORE.quantized - quantized == len(names) - 1
    assert len({id(held(part).d) for part in model.children()}) == 1


def test_weights_that_were_rotated_apart_and_freed_cannot_share_a_d() -> None:
    model, x, options = Attention(), torch.randn(4, 32), {"free_weights": True}
    for part in (model.q, model.k):
        torch.compile(part, backend="int8", options=options)(x)
    with pytest.raises(
        int8compile.FreedWeightError, match=r"rotated differently and then freed\. Compile them together"
    ):
        torch.compile(model, backend="int8", options=options)(x)
    # A freed weight keeps working, and gives its d to others.
    expected = by_operator(model.v, x, held(model.k).d)
    del model.q
    assert torch.equal(torch.compile(model, backend="int8", options=options)(x)[1], expected)


@pytest.mark.parametrize("change", ["values", "d"])
def test_a_weight_that_has_changed_is_not_kept_when_another_graph_frees_its_parameter(change: str) -> None:
    """A graph with the former weight must report it: it would compute with old values, or wait for a common d."""
    model, x = Attention(), torch.randn(4, 32)
    rows = WeightView((16, 32), (32, 1), 0, (16, 32))
    before = torch.compile(lambda x: (F.linear(x, model.q.weight[:16]), model.k(x)), backend="int8", fullgraph=True)
    after = torch.compile(model.q, backend="int8", fullgraph=True, options={"free_weights": True})
    before(x)
    if change == "values":
        model.q.weight.mul_(2)
    else:
        STORE.calibrate([(model.q.weight, rows)], rotation_of(torch.ones(32)))
    after(x)
    assert isinstance(model.q.weight, FreedWeight)
    assert len(STORE.weights(model.q.weight)) == 1
    with pytest.raises(int8compile.FreedWeightError, match="before this view of it was taken"):
        before(x)


def test_a_calibrated_d_takes_the_place_of_another() -> None:
    """The calibrated d is used at the next call, without compiling again."""
    model, x = Attention(), torch.randn(4, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    members = [(part.weight, view) for part in model.children() for view, *_ in STORE.weights(part.weight)]
    d = rotation_of(input_scales([part.weight for part in model.children()], torch.rand(32)))
    STORE.calibrate(members, d)
    quantized = STORE.quantized
    assert all(map(torch.equal, compiled(x), [by_operator(part, x, d) for part in model.children()]))
    assert STORE.quantized - quantized == 3
    assert STORE.share(members) is d
    # A changed weight keeps its d, and so does its group when another graph asks for one of its weights.
    model.q.weight.copy_(torch.randn(48, 32))
    assert all(map(torch.equal, compiled(x), [by_operator(part, x, d) for part in model.children()]))
    again = torch.compile(model.q, backend="int8", fullgraph=True)
    assert torch.equal(again(x), by_operator(model.q, x, d))


def test_one_calibrated_member_gives_its_group_its_d() -> None:
    model, x = Attention(), torch.randn(4, 32)
    d = rotation_of(torch.rand(32) + 0.5)
    STORE.calibrate([(model.k.weight, WeightView((48, 32), (32, 1), 0, (48, 32)))], d)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert all(map(torch.equal, compiled(x), [by_operator(part, x, d) for part in model.children()]))


def test_what_rotates_a_parameter_is_in_no_file_of_it() -> None:
    """The file must load without int8compile. The loaded model may then be compiled."""
    model, x = Attention(), torch.randn(4, 32)
    torch.compile(model, backend="int8")(x)
    d = held(model.q).d
    file = io.BytesIO()
    torch.save({"weights": list(model.parameters()), "state": model.state_dict(keep_vars=True)}, file)
    for _ in range(2):
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["state"]
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.items())
        other = Attention()
        other.load_state_dict(loaded, assign=True)
        other.k.weight.copy_(torch.randn(48, 32))
        torch.compile(other, backend="int8")(x)
        assert not torch.equal(held(other.q).d, d)
        file = io.BytesIO()
        torch.save({"state": other.state_dict(keep_vars=True)}, file)
        model = other
        d = held(other.q).d


def test_a_store_does_not_keep_parameters_alive() -> None:
    store = WeightStore()
    parameter = nn.Parameter(torch.randn(16, 16))
    view = WeightView((16, 16), (16, 1), 0, (16, 16))
    store.get(parameter, view, "weight")
    assert store.nbytes() == 16 * 16 + 4 * 16
    store.get(parameter, view, "weight", group=[(parameter, view)])
    assert store.nbytes() == 2 * (16 * 16 + 4 * 16) + 4 * 16
    del parameter
    gc.collect()
    assert store.nbytes() == 0


class TestFreedWeights:
    options: ClassVar[dict] = {"free_weights": True}

    @pytest.mark.parametrize("assign", [False, True])
    def test_scales_of_a_quantized_model_can_be_loaded(self, assign: bool) -> None:
        """The int8 weights are kept only in the graph's layout; the module still has the scales."""
        model = Stack()
        int8compile.quantize_(model, progress=False)
        other, x = copy.deepcopy(model), torch.randn(4, 32)
        compiled = torch.compile(model, backend="int8", options=self.options)
        for _ in range(2):
            assert torch.equal(compiled(x), other(x))
        scales = {name: value * 3 for name, value in other.state_dict().items() if name.endswith("scale")}
        for each in (model, other):
            each.load_state_dict(copy.deepcopy(scales), strict=False, assign=assign)
        assert torch.equal(compiled(x), other(x))

    def test_memory_is_given_back_and_results_stay(self) -> None:
        model, x = Stack(), torch.randn(4, 32)
        expected = reference(model, x)
        compiled = torch.compile(model, backend="int8", fullgraph=True, options=self.options)
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        assert all(isinstance(weight, FreedWeight) for weight in weights)
        assert sum(weight.untyped_storage().nbytes() for weight in weights) == 0
        assert "FreedWeight(shape=[64, 32]" in repr(weights[0])
        biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        assert not any(isinstance(bias, FreedWeight) for bias in biases)

    def test_other_shapes_still_compile(self) -> None:
        model, x = Stack(), torch.randn(9, 32)
        expected = reference(model, x)
        compiled = torch.compile(model, backend="int8", fullgraph=True, options=self.options)
        for length in (2, 3, 5):
            compiled(torch.randn(length, 32))
        assert torch.equal(compiled(x), expected)

    def test_regional_compilation(self) -> None:
        """Two compilations, for float and for freed parameters; never one per layer."""
        model, x, backend = Stack(20), torch.randn(4, 32), CountingBackend(**self.options)
        expected = reference(model, x)
        for layer in model.layers:
            layer.compile(backend=backend, fullgraph=True)
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert backend.graphs <= 2  # One where Dynamo's guards do not check the parameter's class.

    @pytest.mark.parametrize(
        "use",
        [
            lambda model, x: model(x),
            lambda model, x: model.state_dict(),
            lambda model, x: copy.deepcopy(model),
            lambda model, x: model.to(torch.float64),
            lambda model, x: model.layers[0].up.weight + 1,
            lambda model, x: model.layers[0].up.weight.sum(),
            lambda model, x: model.layers[0].up.weight.data,
            lambda model, x: model.layers[0].up.weight.tolist(),
        ],
    )
    def test_any_other_use_raises(self, use: Callable[[nn.Module, Tensor], object]) -> None:
        model, x = Stack(), torch.randn(4, 32)
        torch.compile(model, backend="int8", options=self.options)(x)
        with pytest.raises(
            int8compile.FreedWeightError, match=r"free_weights=True has given back\. Use the compiled model"
        ):
            use(model, x)

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    def test_another_backend_raises(self, backend: str) -> None:
        model, x = Stack(), torch.randn(4, 32)
        torch.compile(model, backend="int8", options=self.options)(x)
        with pytest.raises(Exception, match="free_weights=True has given back"):
            torch.compile(model, backend=backend)(x)

    @pytest.mark.parametrize(
        "take", [lambda w: w.t(), lambda w: w.T, lambda w: w.chunk(2)[0].mT], ids=["t", "T", "chunk"]
    )
    def test_a_weight_that_is_used_through_a_view(self, take: Callable[[Tensor], Tensor]) -> None:
        model, x = nn.Linear(32, 32).requires_grad_(False), torch.randn(4, 32)
        compiled = torch.compile(lambda x: x @ take(model.weight), backend="int8", options=self.options)
        assert torch.equal(compiled(x), compiled(x))
        assert isinstance(model.weight, FreedWeight)

    def test_a_weight_that_is_also_used_in_float_is_kept(self) -> None:
        model, x = nn.Linear(32, 32).requires_grad_(False), torch.randn(4, 32)
        compiled = torch.compile(lambda x: model(x) + model.weight.sum(), backend="int8", options=self.options)
        assert torch.equal(compiled(x), compiled(x))
        assert not isinstance(model.weight, FreedWeight)

    def test_a_later_graph_that_needs_the_float_weight_raises(self) -> None:
        model, x = nn.Linear(32, 32).requires_grad_(False), torch.randn(4, 32)
        torch.compile(model, backend="int8", options=self.options)(x)
        compiled = torch.compile(lambda x: model(x) + model.weight.sum(), backend="int8")
        with pytest.raises(int8compile.FreedWeightError, match="needed in float here"):
            compiled(x)

    def test_loading_new_weights(self) -> None:
        model, other, x = Stack(), Stack(), torch.randn(4, 32)
        compiled = torch.compile(model, backend="int8", fullgraph=True, options=self.options)
        compiled(x)
        with pytest.raises(RuntimeError, match="free_weights=True has given back"):
            model.load_state_dict(other.state_dict())
        expected = reference(other, x)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        assert torch.equal(compiled(x), expected)

    def test_a_storage_shared_with_others_is_left_to_them(self) -> None:
        """In a file mapped as a whole, freeing one weight must not take the others' memory."""
        flat = torch.randn(2 * 32 * 32)
        first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        first.weight = nn.Parameter(flat[: 32 * 32].view(32, 32), requires_grad=False)
        second.weight = nn.Parameter(flat[32 * 32 :].view(32, 32), requires_grad=False)
        x, expected = torch.randn(4, 32), second.weight.clone()
        torch.compile(first, backend="int8", options=self.options)(x)
        assert isinstance(first.weight, FreedWeight)
        assert torch.equal(second.weight, expected)
