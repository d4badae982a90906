"""Checkpoints: bitwise round trips, and models that cannot be saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import int8compile
from int8compile import CheckpointError, Int8Embedding, Int8Experts, Int8Linear
from int8compile.stored import checkpoint
from tests.helpers.checkpoints import ROOT, assert_same, edit, load, quantized, save
from tests.helpers.models import Stack


class Tied(nn.Module):
    """An embedding and an output projection with one weight, a saved buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32, padding_idx=0)
        self.body = Stack(1)
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("shift", torch.arange(32) / 32, persistent=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.body(self.embed(ids) + self.shift)))


def transformers_model(kind: str) -> nn.Module:
    pytest.importorskip("transformers")
    from tests.helpers.architectures import CASES

    return CASES[kind].build().eval()


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "stack": Stack,
    "tied": Tied,
    **{kind: lambda kind=kind: transformers_model(kind) for kind in ("llama", "llama, tied", "gpt2", "mixtral")},
}

IDS = torch.arange(14).view(2, 7)


def run(model: nn.Module) -> Tensor:
    x = torch.linspace(-2, 2, 96).view(3, 32) if isinstance(model, Stack) else IDS
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, Tensor) else result.logits


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 5.0},
        {"lm_head": "int8_weight"},
        {"rotate": False},
        {"lm_head": "int8_weight", "outliers": "column"},
    ],
)
@pytest.mark.parametrize("name", FACTORIES)
def test_round_trip(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    factory = FACTORIES[name]
    model = quantized(factory, **options)
    rotated = [path for path, module in model.named_modules() if getattr(module, "d", None) is not None]
    assert bool(rotated) == (options.get("rotate", True) and "outliers" not in options)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", factory)
    assert_same(loaded, model)
    assert torch.equal(run(loaded), run(model))
    assert int8compile.memory_footprint(loaded) == int8compile.memory_footprint(model)
    assert {path: module.training for path, module in loaded.named_modules()} == {
        path: module.training for path, module in model.named_modules()
    }
    ours, theirs = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert {n: p.requires_grad for n, p in ours.items()} == {n: p.requires_grad for n, p in theirs.items()}
    # Each tensor has its own memory; none is a part of a mapped file.
    for tensor in loaded.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_linears_that_read_one_x_share_its_rotation(tmp_path: Path) -> None:
    """The rotation is stored once and loaded as one tensor, so x is rotated and quantized once for these linears."""
    save(quantized(FACTORIES["llama"]), tmp_path / "model")
    index = json.loads((tmp_path / "model" / checkpoint.INDEX).read_text())
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert index["aliases"] == {
        f"{attention}.k_proj.d": f"{attention}.q_proj.d",
        f"{attention}.v_proj.d": f"{attention}.q_proj.d",
        f"{mlp}.up_proj.d": f"{mlp}.gate_proj.d",
    }
    assert {options["rotation"] for options in index["modules"].values()} == {64, 128}
    layer = load(tmp_path / "model", FACTORIES["llama"]).model.layers[0]
    assert layer.self_attn.q_proj.d is layer.self_attn.k_proj.d is layer.self_attn.v_proj.d
    assert layer.mlp.gate_proj.d is layer.mlp.up_proj.d
    assert len({id(module.d) for module in layer.modules() if isinstance(module, Int8Linear)}) == 4


def as_version_1(folder: Path) -> None:
    """Rewrite the description of an unrotated model as version 1 wrote it."""

    def change(index: dict) -> None:
        index["format_version"] = 1
        for options in index["modules"].values():
            options.pop("rotation", None)
            if options["source"] != "embedding":
                options["outliers"] = "row"

    edit(change)(folder)


@pytest.mark.parametrize("lm_head", ["native", "int8_weight"])
@pytest.mark.parametrize("name", FACTORIES)
def test_a_checkpoint_of_version_1(name: str, lm_head: str, tmp_path: Path) -> None:
    """Its integers are those of current unrotated weights, and run like them."""
    model = quantized(FACTORIES[name], lm_head=lm_head, rotate=False)
    save(model, tmp_path / "model")
    as_version_1(tmp_path / "model")
    index = json.loads((tmp_path / "model" / checkpoint.INDEX).read_text())
    assert not any(entry.endswith(".d") for entry in index["tensors"])
    loaded = load(tmp_path / "model", FACTORIES[name])
    assert_same(loaded, model)
    int8 = [module for module in loaded.modules() if isinstance(module, Int8Linear | Int8Experts)]
    assert {module.d for module in int8} == {None}
    assert {module.threshold for module in int8} == {6.0}
    assert torch.equal(run(loaded), run(model))
    # Saved again, it has the current version.
    save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / checkpoint.INDEX).read_text())["format_version"] == checkpoint.VERSION
    assert_same(load(tmp_path / "again", FACTORIES[name]), model)


def test_ties_stay_ties(tmp_path: Path) -> None:
    model = quantized(Tied, lm_head="int8_weight")
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", Tied)
    assert isinstance(loaded.embed, Int8Embedding)
    assert isinstance(loaded.lm_head, Int8Linear)
    assert loaded.lm_head.weight_only
    assert loaded.lm_head.qweight is loaded.embed.qweight
    assert loaded.lm_head.scale is loaded.embed.scale
    index = json.loads((tmp_path / "model" / checkpoint.INDEX).read_text())
    assert index["aliases"] == {"lm_head.qweight": "embed.qweight", "lm_head.scale": "embed.scale"}
    # Float ties stay ties, too.
    save(quantized(Tied), tmp_path / "float")
    loaded = load(tmp_path / "float", Tied)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_ties_that_only_the_memory_shows(tmp_path: Path) -> None:
    """`.data` and moves between devices split a tied tensor into several objects."""
    model = quantized(Tied, lm_head="int8_weight")
    model.embed.qweight = model.embed.qweight.view_as(model.embed.qweight)
    assert model.embed.qweight is not model.lm_head.qweight
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", Tied)
    assert loaded.lm_head.qweight is loaded.embed.qweight


def test_every_source_comes_back_as_it_was(tmp_path: Path) -> None:
    save(quantized(FACTORIES["gpt2"]), tmp_path / "gpt2")
    loaded = load(tmp_path / "gpt2", FACTORIES["gpt2"])
    assert loaded.transformer.h[0].attn.c_attn.source == "conv1d"
    save(quantized(FACTORIES["mixtral"]), tmp_path / "mixtral")
    loaded = load(tmp_path / "mixtral", FACTORIES["mixtral"])
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, Int8Experts)
    int8compile.dequantize_(loaded)
    assert run(loaded).isfinite().all()


def test_parameters_have_no_data_before_they_are_loaded(tmp_path: Path) -> None:
    """Memory never holds the float model; buffers that are not saved are computed."""
    save(quantized(Tied), tmp_path / "model")
    made = []

    def factory() -> nn.Module:
        # Registered twice before torch's hook sees it; it must stay one parameter.
        weight = nn.Parameter(torch.randn(64, 32))
        model = Tied()
        model.embed.weight = model.lm_head.weight = weight
        made.extend(parameter.is_meta for parameter in model.parameters())
        assert model.embed.weight is model.lm_head.weight
        assert not model.shift.is_meta
        return model

    load(tmp_path / "model", factory)
    assert made
    assert all(made)
    assert not nn.Linear(2, 2).weight.is_meta


def test_peak_memory(tmp_path: Path) -> None:
    """Loading takes at most the int8 model, its largest tensor, and a small margin."""
    program = """
import sys, torch, int8compile
from torch import nn
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
build = lambda layers, size: nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
int8compile.load(sys.argv[2], lambda: build(1, 32), progress=False)
before = peak()
model = int8compile.load(sys.argv[1], lambda: build(24, 2048), progress=False)
print((peak() - before) / int8compile.memory_footprint(model))
"""
    with torch.device("meta"):
        large = quantized(lambda: nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24))))
    save(large.to_empty(device="cpu"), tmp_path / "large")
    save(quantized(lambda: nn.Sequential(nn.Linear(32, 32))), tmp_path / "small")
    command = [sys.executable, "-c", program, tmp_path / "large", tmp_path / "small"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    # 24 equal layers: one more tensor makes 1.04, the float model would make 4, a whole mapped file 2.
    assert 0.9 < float(done.stdout) < 1.25


def test_a_new_process_computes_the_same(tmp_path: Path) -> None:
    model = quantized(FACTORIES["llama"], lm_head="int8_weight")
    save(model, tmp_path / "model", max_shard_bytes=2**15)
    program = (
        "import sys, torch, int8compile\n"
        "from tests.stored.test_checkpoint import FACTORIES, run\n"
        "model = int8compile.load(sys.argv[1], FACTORIES['llama'], progress=False)\n"
        "torch.save(run(model), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "model", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), run(model))


def test_shards(tmp_path: Path) -> None:
    model = quantized(Stack)
    save(model, tmp_path / "model", max_shard_bytes=2100)
    # There are four weights of 2048 bytes. Only a bias or a scale fits beside one in 2100 bytes.
    files = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert len(files) > 5
    assert files[-1] == checkpoint.INDEX
    assert files[0] == f"int8compile-00001-of-{len(files) - 1:05}.safetensors"
    for file in files[:-1]:
        tensors = safetensors.torch.load_file(tmp_path / "model" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 2100
    assert_same(load(tmp_path / "model", Stack), model)
    # Tensors larger than the limit get files of their own.
    save(model, tmp_path / "model", max_shard_bytes=1)
    assert len(list((tmp_path / "model").iterdir())) == len(model.state_dict()) + 1
    assert_same(load(tmp_path / "model", Stack), model)
    for bad in (0, 2.5, True):
        with pytest.raises(int8compile.ConfigError, match="max_shard_bytes"):
            save(model, tmp_path / "model", max_shard_bytes=bad)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = quantized(FACTORIES["llama"])
    save(model, tmp_path / "first", max_shard_bytes=2**14)
    save(load(tmp_path / "first", FACTORIES["llama"]), tmp_path / "second", max_shard_bytes=2**14)
    first, second = (
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in sorted(tmp_path.iterdir())
    )
    assert first == second


def test_views_and_other_dtypes(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        model = Stack().to(torch.bfloat16)
        for name, tensor in buffers.items():
            model.register_buffer(name, torch.zeros_like(tensor))
        return model

    flat = torch.arange(64.0)
    buffers = {
        "slice": flat[8:16],
        "overlapping": flat[10:20],
        "strided": flat[::3],
        "transposed": flat.view(8, 8).t(),
        "whole": flat,
        "reshaped": flat.view(8, 8),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3),
        "other_empty": torch.empty(0, 3),
        "scalar": torch.tensor(2, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]).conj(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    model = quantized(factory)
    for name, tensor in buffers.items():
        setattr(model, name, tensor)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", factory)
    for name, tensor in buffers.items():
        assert torch.equal(
            getattr(loaded, name).view(torch.uint8) if name == "float8" else getattr(loaded, name),
            tensor.view(torch.uint8) if name == "float8" else tensor,
        ), name
    assert loaded.layers[0].up.dtype == torch.bfloat16
    # A model built in another precision takes the checkpoint's precision.
    model = quantized(Stack)
    save(model.half(), tmp_path / "half")
    loaded = load(tmp_path / "half", Stack)
    assert loaded.layers[0].up.bias.dtype == loaded.layers[0].up.dtype == torch.float16


class WithState(Stack):
    """A module with extra state, as a tensor or another object."""

    state: object = None

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_extra_state(tmp_path: Path) -> None:
    model = quantized(WithState)
    model.state = torch.arange(3)
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", WithState).state, torch.arange(3))


def test_device(tmp_path: Path) -> None:
    """All tensors move to the device, including those that are not saved; "cpu" exists on every machine."""
    save(quantized(Tied, lm_head="int8_weight"), tmp_path / "model")
    loaded = load(tmp_path / "model", Tied, device="cpu")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert loaded.lm_head.qweight is loaded.embed.qweight


@pytest.mark.gpu
def test_device_gpu(tmp_path: Path) -> None:
    model = quantized(Tied, lm_head="int8_weight").cuda()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", Tied, device="cuda")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    assert loaded.lm_head.qweight is loaded.embed.qweight
    assert_same(loaded, model)


def test_a_compiled_model_is_saved_as_the_model(tmp_path: Path) -> None:
    model = quantized(Stack)
    save(torch.compile(model, backend="int8"), tmp_path / "model")
    assert_same(load(tmp_path / "model", Stack), model)


def freed() -> nn.Module:
    model = nn.Sequential(Stack(), nn.Linear(32, 32).requires_grad_(False))
    int8compile.quantize_(model, {"skip_modules": ["1"]}, progress=False)
    with torch.no_grad():
        torch.compile(model[1], backend="int8", options={"free_weights": True})(torch.randn(4, 32))
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return quantized(Stack)


def with_hook() -> nn.Module:
    model = quantized(Stack)

    def drop(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
        del state["layers.1.up.scale"]

    model.register_state_dict_post_hook(drop)
    return model


def with_state() -> nn.Module:
    model = quantized(WithState)
    model.state = {"steps": 3}
    return model


def with_buffer(tensor: Tensor) -> nn.Module:
    model = quantized(Stack)
    model.register_buffer("odd", tensor)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(Stack, r"Stack has no int8 module\. Call int8compile\.quantize_\(model\) first", id="float"),
        pytest.param(lambda: quantized(Stack).layers[0].up, "is a single Int8Linear", id="one int8 module"),
        pytest.param(on_meta, r"layers\.0\.up\.bias is on the meta device", id="meta"),
        pytest.param(freed, r"1\.weight is a weight whose memory free_weights=True has given back", id="freed"),
        pytest.param(with_state, "_extra_state is dict; only tensors can be saved", id="extra state"),
        pytest.param(with_hook, r"layers\.1\.up\.scale: a hook of state_dict", id="hook"),
        pytest.param(lambda: with_buffer(torch.eye(3).to_sparse()), "odd is a Tensor of torch.float32", id="sparse"),
        pytest.param(
            lambda: with_buffer(torch.ones(3).to(torch.complex128)), r"odd is a Tensor of torch\.complex128", id="dtype"
        ),
    ],
)
def test_models_that_cannot_be_saved(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    model = build()
    with pytest.raises(CheckpointError, match=message):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_factory_are_its_own(tmp_path: Path) -> None:
    save(quantized(Stack), tmp_path / "int8")

    def factory() -> nn.Module:
        raise FileNotFoundError("vocab.txt")

    with pytest.raises(FileNotFoundError, match=r"vocab\.txt"):
        load(tmp_path / "int8", factory)


class OnTheDeviceOfAParameter(Stack):
    """A module that builds its tables as timm's Swin-V2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(4), persistent=False)
        self.table.copy_(torch.arange(4.0, device=self.layers[0].up.weight.device))


def test_buffers_that_a_constructor_makes_on_the_device_of_a_parameter(tmp_path: Path) -> None:
    save(quantized(OnTheDeviceOfAParameter), tmp_path / "int8")
    again = load(tmp_path / "int8", OnTheDeviceOfAParameter)
    assert torch.equal(again.get_buffer("table"), torch.arange(4.0))
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))


def test_settings_of_some_modules_come_back(tmp_path: Path) -> None:
    model = Stack()
    int8compile.quantize_(model, {"modules": {"up": {"rotate": False}, "down": {"threshold": 3.0}}})
    int8compile.save(model, tmp_path / "saved")
    loaded = int8compile.load(tmp_path / "saved", Stack)
    assert (loaded.layers[0].up.rotation, loaded.layers[0].up.threshold) == (1, 6.0)
    assert (loaded.layers[0].down.rotation, loaded.layers[0].down.threshold) == (64, 3.0)
    x = torch.randn(4, 32)
    assert torch.equal(loaded(x), model(x))
