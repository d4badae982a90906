"""Modules that hold int8, when they are copied, moved, cast, or loaded from a state dict."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8compile
from int8compile.errors import CheckpointError, InputError, Int8WeightError
from int8compile.stored.modules import share_rotations
from tests.helpers.int8_modules import int8_embedding, int8_experts, int8_linear

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": int8_linear,
    "linear, not rotated": lambda: int8_linear(rotated=False),
    "experts": int8_experts,
    "experts, each rotated": lambda: int8_experts("each"),
    "embedding": int8_embedding,
}

every_module = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODULES.items()])


# Copied, moved, cast


@every_module
def test_weight_tells_what_it_would_be(make: Callable[[], nn.Module]) -> None:
    """test_module_weight.py tests readers of its values."""
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
    """In a compiled module the dtype is a constant, and the values are available."""
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
    """Ties stay ties: moving one module moves the tensor of the other."""
    module = make()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in module.named_buffers()}
    module._apply(torch.clone)  # This is how modules move to another device.
    for name, (tensor, address) in before.items():
        assert getattr(module, name) is tensor
        assert tensor.data_ptr() != address


def test_siblings_share_a_rotation() -> None:
    """Moves, casts and copies keep the sharing; loading tensors of their own restores it."""
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
    """PyTorch would report the weight as missing, or nothing with strict=False."""
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
    """A module without d receives one, a module with d loses it, as the loaded weight needs; the threshold follows."""
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
    # A threshold set by the user stays.
    module = loaded(int8_linear(bias=False, rotated=before, threshold=9.0), source.state_dict(), assign=assign)
    assert module.threshold == 9.0


def test_a_rotation_that_siblings_share_is_saved_for_each() -> None:
    """safetensors refuses a tensor under two names, and its `save_model` drops one of the names."""
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
    with pytest.raises(CheckpointError, match=r"0\.weight and 0\.SCB are not an 8 bit layer"):
        model.load_state_dict({**state, "0.weight": qweight.float()})
