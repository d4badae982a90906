"""Checkpoints: bitwise round trips, what is refused, and processes killed while they save."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import int8compile
from int8compile import CheckpointError, Int8Embedding, Int8Experts, Int8Linear, atomic
from int8compile.stored import checkpoint
from tests.helpers.checkpoint_saver import SHARD_BYTES, version
from tests.helpers.models import Stack

ROOT = Path(__file__).parents[2]


class Tied(nn.Module):
    """An embedding and an output projection with one weight, a buffer, and one that is not saved."""

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
    from tests.integrations.test_transformers import CASES

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


def quantized(factory: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = factory()
    int8compile.quantize_(model, options, progress=False)
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> None:
    int8compile.save(model, folder, progress=False, **options)


def load(folder: Path, factory: Callable[[], nn.Module], **options: Any) -> nn.Module:
    return int8compile.load(folder, factory, progress=False, **options)


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Same names, bits and modules."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert str(actual) == str(expected)


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
    # Each with a memory of its own, not a part of a mapped file.
    for tensor in loaded.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_linears_that_read_one_x_share_its_rotation(tmp_path: Path) -> None:
    """Stored once, and one tensor again after loading: x is rotated and quantized once for them."""
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
    """Rewrites the description of an unrotated model as the version before wrote it."""

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
    """Its integers are those of today's weights that are not rotated, and run as these."""
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
    # Saved again, it is of this version.
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
    # In float, too.
    save(quantized(Tied), tmp_path / "float")
    loaded = load(tmp_path / "float", Tied)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_ties_that_only_the_memory_shows(tmp_path: Path) -> None:
    """`.data` and moves between devices give a tied tensor several objects."""
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
        # Registered twice before it is known: it stays one.
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
    """At most the int8 model and its largest tensor, which is read, and a little for the rest."""
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
    # 24 equal layers: one tensor more is 1.04, the float model would be 4, a whole mapped file 2.
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
    # Four weights of 2048 bytes that nothing fits beside but a bias or scale, or fit together with none.
    files = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert len(files) > 5
    assert files[-1] == checkpoint.INDEX
    assert files[0] == f"int8compile-00001-of-{len(files) - 1:05}.safetensors"
    for file in files[:-1]:
        tensors = safetensors.torch.load_file(tmp_path / "model" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 2100
    assert_same(load(tmp_path / "model", Stack), model)
    # Larger than allowed: in files of their own.
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
    # A model built in another precision gets the checkpoint's.
    model = quantized(Stack)
    save(model.half(), tmp_path / "half")
    loaded = load(tmp_path / "half", Stack)
    assert loaded.layers[0].up.bias.dtype == loaded.layers[0].up.dtype == torch.float16


class WithState(Stack):
    """Has a state of its own, as a tensor or not."""

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
    """All tensors go there, also those that are not saved; here with the one device that every machine has."""
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


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save(quantized(Stack), folder)
    (folder / "config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"holds files that are no int8 checkpoint's: config\.json"):
        save(quantized(Stack), folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]
    # Loading does not mind.
    load(folder, Stack)
    with pytest.raises(CheckpointError, match=r"config\.json is a file"):
        save(quantized(Stack), folder / "config.json")


def test_save_replaces_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for seed in (0, 1, 0):
        model = version(seed)
        save(model, folder, max_shard_bytes=SHARD_BYTES[seed])
        assert_same(load(folder, Stack), model)
        assert list(folder.parent.iterdir()) == [folder]
    folder = tmp_path / "empty"
    folder.mkdir()
    save(version(0), folder)
    assert_same(load(folder, Stack), version(0))
    # Through a link, what it points to.
    (tmp_path / "link").symlink_to(folder)
    save(version(1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(load(folder, Stack), version(1))


def test_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback in two renames, and what a process that dies between them leaves."""
    folder = tmp_path / "model"
    save(version(0), folder)
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    save(version(1), folder)
    assert_same(load(folder, Stack), version(1))
    assert list(tmp_path.iterdir()) == [folder]
    rename = os.rename

    def fails_once(source: Path, target: Path) -> None:
        if target == folder and not folder.exists() and ".tmp-" in source.name:
            raise OSError(errno.EIO, "of the test")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails_once)
        with pytest.raises(CheckpointError, match="of the test"):
            save(version(0), folder)
    assert_same(load(folder, Stack), version(1))
    assert list(tmp_path.iterdir()) == [folder]
    # As a killed process leaves it: its number is no process's.
    old = tmp_path / f".model.old-{dead_process()}-0123abcd"
    folder.rename(old)
    with pytest.raises(CheckpointError, match=rf"does not exist.*whole, in {old}: rename it to model"):
        load(folder, Stack)
    save(version(0), folder)
    assert list(tmp_path.iterdir()) == [folder]


def dead_process() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    kept = [
        tmp_path / f".model.tmp-{os.getpid()}-0123abcd",  # In use.
        tmp_path / f".other.tmp-{dead_process()}-0123abcd",  # Another checkpoint's.
        tmp_path / ".model.tmp-mine",
    ]
    dead = [tmp_path / f".model.{kind}-{dead_process()}-0123abcd" for kind in ("tmp", "old")]
    for folder in (*kept, *dead):
        folder.mkdir()
        (folder / "file").touch()
    save(version(0), tmp_path / "model")
    assert sorted(tmp_path.iterdir()) == sorted((*kept, tmp_path / "model"))


def test_a_folder_in_use_by_a_process_that_is_not_visible_is_kept(tmp_path: Path) -> None:
    """Containers that share a disk do not see each other's processes: the lock tells."""
    with atomic.temporary_folder(tmp_path / "model") as used:
        hidden = used.rename(used.with_name(f".model.tmp-{dead_process()}-0123abcd"))
        save(version(0), tmp_path / "model")
        assert hidden.exists()
    save(version(0), tmp_path / "model")
    assert not hidden.exists()


# Starts a process that saves to a folder in a loop, and dies before a given step (0: at none).
Start: TypeAlias = Callable[[Path, int], tuple[int, Callable[[], None]]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Gives the number of a process that saves, and a function that waits for its end (see `checkpoint_saver`)."""
    command = [sys.executable, "-m", "tests.helpers.checkpoint_saver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(line: str) -> str:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        def begin(folder: Path, step: int) -> tuple[int, Callable[[], None]]:
            def wait() -> None:
                assert ask("wait") == "ended"

            return int(ask(f"{step} {folder}")), wait

        yield begin
        process.stdin.close()


def which_version(folder: Path, versions: list[nn.Module]) -> int:
    """Loads a checkpoint and says which version it is; it must be one of them, bit by bit."""
    state = load(folder, Stack).state_dict()
    same = [all(torch.equal(state[name], tensor) for name, tensor in v.state_dict().items()) for v in versions]
    assert sum(same) == 1
    return same.index(True)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, start: Start, tmp_path: Path) -> None:
    """The folder is one version or the other, whole, and what is left beside it disturbs nothing."""
    folder, versions, chance = tmp_path / "model", [version(0), version(1)], random.Random(0)
    save(versions[0], folder)
    found, left = [], 0
    for _ in range(kills):
        child, wait = start(folder, 0)
        time.sleep(chance.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        wait()
        left += len(list(tmp_path.glob(".model.tmp-*")))
        found.append(which_version(folder, versions))
    # They were killed while they saved, not between saves.
    assert left > 0
    assert kills < 50 or set(found) == {0, 1}
    save(versions[1], folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_killed_before_each_step(start: Start, tmp_path: Path) -> None:
    """Not at random: before each file that two saves open, rename or delete."""
    folder, versions = tmp_path / "model", [version(0), version(1)]
    save(versions[0], folder)
    found = []
    for step in range(1, 61):
        for file in tmp_path.iterdir():
            shutil.rmtree(file)
        save(versions[0], folder, max_shard_bytes=SHARD_BYTES[0])
        _, wait = start(folder, step)
        wait()
        found.append(which_version(folder, versions))
    # The child saves version 1, then version 0: both replacements are among the steps.
    assert [which for which, _ in itertools.groupby(found)][:3] == [0, 1, 0]


def edit(change: Callable[[dict], object], *, sign: bool = True) -> Callable[[Path], None]:
    """Changes the description of a checkpoint, and its checksum as well, to get to the checks behind it."""

    def damage(folder: Path) -> None:
        file = folder / checkpoint.INDEX
        index = json.loads(file.read_text())
        change(index)
        if sign:
            index["checksum"] = checkpoint._index_checksum(index)
        file.write_text(json.dumps(index))

    return damage


def edit_shard(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of the shard with `layers.0.up.qweight`; the description gets its new size."""

    def damage(folder: Path) -> None:
        file = shard(folder)
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)
        edit(lambda index: index["shards"].update({file.name: file.stat().st_size}))(folder)

    return damage


def shard(folder: Path) -> Path:
    index = json.loads((folder / checkpoint.INDEX).read_text())
    return folder / index["tensors"]["layers.0.up.qweight"]["shard"]


def flip_a_bit(folder: Path) -> None:
    file = shard(folder)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(file: Path, nbytes: int) -> None:
    os.truncate(file, file.stat().st_size - nbytes)


def damage_header(folder: Path) -> None:
    file = shard(folder)
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"!" + data[9:])


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Renames a tensor, in the description and in its shard."""

    def damage(folder: Path) -> None:
        file = folder / json.loads((folder / checkpoint.INDEX).read_text())["tensors"][old]["shard"]
        tensors = safetensors.torch.load_file(file)
        tensors[new] = tensors.pop(old)
        safetensors.torch.save_file(tensors, file)

        def change(index: dict) -> None:
            index["tensors"][new] = index["tensors"].pop(old)
            index["shards"][file.name] = file.stat().st_size

        edit(change)(folder)

    return damage


def retype(folder: Path) -> None:
    """A float weight in the place of an int8 one, in both files and with its right checksum."""
    tensor = torch.randn(64, 32)
    edit_shard(lambda tensors: tensors.update({"layers.0.up.qweight": tensor}))(folder)
    sha256 = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    edit(lambda index: index["tensors"]["layers.0.up.qweight"].update(dtype="float32", sha256=sha256))(folder)


def only_float(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    safetensors.torch.save_file(Stack().state_dict(), folder / "model.safetensors")


def smaller() -> nn.Module:
    model = Stack()
    model.layers[0].up = nn.Linear(32, 48).requires_grad_(False)
    return model


def without_bias() -> nn.Module:
    model = Stack()
    model.layers[1].down = nn.Linear(64, 32, bias=False).requires_grad_(False)
    return model


def other_module() -> nn.Module:
    model = Stack()
    model.layers[1].down = nn.Embedding(64, 32).requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = Stack()
    model.layers[1].down.register_forward_hook(lambda *_: None)
    return model


def from_a_parameter() -> nn.Module:
    model = Stack()
    model.register_buffer("total", model.layers[0].up.weight.sum(), persistent=False)
    return model


def extra_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("more", torch.zeros(2))
    return model


UP = r"layers\.0\.up"
SHARD = r"int8compile-0000\d-of-0000\d\.safetensors"


def nothing(folder: Path) -> None: ...


@pytest.mark.parametrize(
    ("damage", "factory", "message"),
    [
        # The shards.
        pytest.param(flip_a_bit, Stack, rf"{UP}\.\w+ in .*{SHARD} is damaged: the SHA-256", id="flipped bit"),
        pytest.param(
            lambda folder: truncate(shard(folder), 10),
            Stack,
            rf"{SHARD} has \d+ bytes, int8compile\.json says \d+: it is cut off.*{UP}\.qweight",
            id="truncated shard",
        ),
        pytest.param(damage_header, Stack, rf"{SHARD} is damaged .*{UP}\.qweight", id="damaged header"),
        pytest.param(
            lambda folder: shard(folder).unlink(),
            Stack,
            rf"{SHARD} is missing; it holds .*{UP}\.qweight",
            id="no shard",
        ),
        pytest.param(
            lambda folder: shutil.copy(shard(folder), folder / "int8compile-00009-of-00009.safetensors"),
            Stack,
            r"does not name: int8compile-00009-of-00009\.safetensors",
            id="extra shard",
        ),
        pytest.param(
            edit_shard(lambda tensors: tensors.pop("layers.0.up.qweight")),
            Stack,
            rf"{SHARD} lacks {UP}\.qweight",
            id="missing tensor",
        ),
        pytest.param(
            edit_shard(lambda tensors: tensors.update(more=torch.ones(3))),
            Stack,
            f"{SHARD} holds more",
            id="extra tensor",
        ),
        pytest.param(
            edit_shard(lambda tensors: tensors.update({"layers.0.up.qweight": torch.zeros(64, 32)})),
            Stack,
            rf"{UP}\.qweight is torch\.float32 \[64, 32\] in .*{SHARD}, int8compile\.json says torch\.int8 \[64, 32\]",
            id="wrong dtype in the shard",
        ),
        pytest.param(
            edit_shard(
                lambda tensors: tensors.update(
                    {"layers.0.up.qweight": tensors["layers.0.up.qweight"].t()[:8].contiguous()}
                )
            ),
            Stack,
            rf"{UP}\.qweight is torch\.int8 \[8, 64\] in .*{SHARD}, int8compile\.json says torch\.int8 \[64, 32\]",
            id="wrong shape in the shard",
        ),
        # The description.
        pytest.param(
            lambda folder: truncate(folder / checkpoint.INDEX, 10),
            Stack,
            r"int8compile\.json is no JSON",
            id="cut JSON",
        ),
        pytest.param(
            lambda folder: (folder / checkpoint.INDEX).write_text("[" * 200_000), Stack, "is no JSON", id="deep JSON"
        ),
        pytest.param(
            lambda folder: (folder / checkpoint.INDEX).write_text("[1]"), Stack, "'format' is not", id="JSON of a list"
        ),
        pytest.param(
            edit(lambda index: index.update(format="gguf")), Stack, "'format' is not 'int8compile'", id="format"
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(threshold=9.0), sign=False),
            Stack,
            r"int8compile\.json was changed after it was written",
            id="edited JSON",
        ),
        pytest.param(
            edit(lambda index: index.update(format_version=3)),
            Stack,
            r"format_version is 3, this version reads 1 and 2: it was made by a newer version",
            id="newer version",
        ),
        pytest.param(
            edit(lambda index: index.update(format_version="1")),
            Stack,
            "format_version is '1', this version reads 1 and 2: no version has written this",
            id="version of another type",
        ),
        pytest.param(edit(lambda index: index.pop("tensors")), Stack, "'tensors' is None; it must be", id="no tensors"),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(shape="64")),
            Stack,
            "'shape' is '64'; it must be of type list",
            id="shape of another type",
        ),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(shape=[-64])),
            Stack,
            rf"{UP}\.bias has shape \[-64\]",
            id="negative shape",
        ),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(dtype="object")),
            Stack,
            rf"{UP}\.bias has dtype 'object'; allowed are float32",
            id="unknown dtype",
        ),
        pytest.param(
            edit(lambda index: index["shards"].update({"../../x.safetensors": 3})),
            Stack,
            r"names the shard '\.\./\.\./x\.safetensors'; shards are files in the same folder",
            id="path escape",
        ),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(shard="/etc/passwd")),
            Stack,
            rf"{UP}\.bias is in shard '/etc/passwd', which is not among its shards",
            id="path escape of a tensor",
        ),
        pytest.param(
            edit(lambda index: index["aliases"].update(a="b")),
            Stack,
            "a is a second name of 'b'",
            id="alias of nothing",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(threshold=-1)),
            Stack,
            rf"{UP} has an option that is not allowed: threshold=-1",
            id="bad threshold",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(weight_only="yes")),
            Stack,
            rf"{UP}: the checkpoint was saved with .*'weight_only': 'yes'",
            id="bad weight_only",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(source="os.system")),
            Stack,
            rf"{UP}: source='os\.system'",
            id="unknown source",
        ),
        # float and int8.
        pytest.param(
            rename("layers.0.up.qweight", "layers.0.up.weight"),
            Stack,
            rf"{UP}\.weight is torch\.int8, but {UP} is int8 and takes {UP}\.qweight and {UP}\.scale",
            id="float for int8",
        ),
        pytest.param(
            retype,
            Stack,
            rf"{UP}\.qweight is torch\.float32 in the checkpoint, the model takes torch\.int8",
            id="retyped",
        ),
        pytest.param(
            edit(lambda index: index["modules"].pop("layers.0.up")),
            Stack,
            rf"{UP}\.qweight is torch\.int8, but {UP} is not among the int8 modules .*takes {UP}\.weight",
            id="int8 for float",
        ),
        # Rotations.
        pytest.param(
            rename("layers.0.up.d", "layers.0.up.e"), Stack, rf"the checkpoint lacks {UP}\.d, which", id="no rotation"
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].pop("rotation")),
            Stack,
            rf"the checkpoint has {UP}\.d, which the model does not have",
            id="a rotation of a weight that is not rotated",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(rotation=16)),
            Stack,
            rf"{UP} has the rotation 16 in the checkpoint; what it can have is 1 or 32",
            id="another rotation",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(outliers="column")),
            Stack,
            rf"{UP} has the rotation 32 in the checkpoint; what it can have is 1\.",
            id="columns of a rotated weight",
        ),
        pytest.param(only_float, Stack, r"model\.safetensors is no int8 checkpoint\. Load the float model", id="float"),
        # The model.
        pytest.param(
            rename("layers.0.up.bias", "layers.0.up.bios"),
            Stack,
            rf"the checkpoint lacks {UP}\.bias, which the model has",
            id="missing in the checkpoint",
        ),
        pytest.param(
            nothing,
            lambda: extra_buffer(Stack()),
            "the checkpoint lacks more, which the model has",
            id="extra in the model",
        ),
        pytest.param(
            nothing,
            lambda: Stack(1),
            r"layers\.1\.up is an int8 linear in the checkpoint, in the model nothing",
            id="depth",
        ),
        pytest.param(nothing, lambda: Stack(9), r"lacks layers\.2\.up.* and 25 more \(28 in all\)", id="greater depth"),
        pytest.param(
            nothing,
            without_bias,
            r"has layers\.1\.down\.bias, which the model does not have",
            id="missing in the model",
        ),
        pytest.param(
            nothing,
            smaller,
            rf"{UP}\.\w+ has shape \[64(, 32)?\] in the checkpoint, \[48(, 32)?\] in the model",
            id="shape",
        ),
        pytest.param(
            nothing,
            other_module,
            r"layers\.1\.down is an int8 linear in the checkpoint, in the model Embedding",
            id="kind",
        ),
        pytest.param(nothing, hooked, r"layers\.1\.down is int8 .* cannot be in the model: .*hooks", id="hooks"),
        pytest.param(nothing, from_a_parameter, "total has no data: it is not in the checkpoint", id="meta buffer"),
        pytest.param(nothing, lambda: quantized(Stack), rf"returned a model with int8 modules: {UP}", id="int8 model"),
        pytest.param(nothing, dict, "model_factory returned dict", id="no model"),
        # The folder.
        pytest.param(shutil.rmtree, Stack, "model does not exist. Name the folder", id="no folder"),
        pytest.param(
            lambda folder: (shutil.rmtree(folder), folder.touch()), Stack, "model is a file. Name the folder", id="file"
        ),
        pytest.param(
            lambda folder: (shutil.rmtree(folder), folder.mkdir()), Stack, r"is no int8 checkpoint\. Name", id="empty"
        ),
        pytest.param(
            lambda folder: (folder / checkpoint.INDEX).unlink(),
            Stack,
            r"has shards but no int8compile\.json",
            id="no JSON",
        ),
    ],
)
def test_bad_checkpoints(
    damage: Callable[[Path], object], factory: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save(version(0), folder, max_shard_bytes=2**12)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, factory)
    # It says what to do.
    advice = r"again|Load|Name|rename|update|Have model_factory|Return|Compute|must return|no version"
    assert re.search(advice, str(caught.value))


def test_a_buffer_of_another_kind_is_refused(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        model = Stack()
        model.register_buffer("steps", torch.zeros(2, dtype=dtype))
        return model

    dtype = torch.int64
    save(quantized(factory), tmp_path / "model")
    dtype = torch.int32
    with pytest.raises(CheckpointError, match=r"steps is torch\.int64 in the checkpoint, the model takes torch\.int32"):
        load(tmp_path / "model", factory)


def test_files_that_appear_while_it_is_written_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is at the name goes when the folders are exchanged."""
    model = Stack()
    int8compile.quantize_(model, progress=False)
    folder = tmp_path / "model"
    int8compile.save(model, folder, progress=False)
    write = checkpoint._write

    def meanwhile(*args: Any) -> None:
        (folder / "thesis.txt").write_text("mine")
        write(*args)

    monkeypatch.setattr(checkpoint, "_write", meanwhile)
    with pytest.raises(CheckpointError, match=r"holds files that are no int8 checkpoint's: thesis\.txt"):
        int8compile.save(model, folder, progress=False)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_loading_in_several_threads(tmp_path: Path) -> None:
    """torch goes through the same hooks in all threads whenever a parameter is registered."""
    model = Stack()
    int8compile.quantize_(model, progress=False)
    int8compile.save(model, tmp_path / "model", progress=False)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(int8compile.load, tmp_path / "model", Stack, progress=False) for _ in range(80)]
        others = [pool.submit(Stack) for _ in range(80)]
    for load in loads:
        for name, tensor in load.result().state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
    assert not any(parameter.is_meta for other in others for parameter in other.result().parameters())


# What the file system does


class Disk:
    """Calls of the file system that fail with an error number, for files whose name has a part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def fail(self, owner: Any, name: str, number: int, part: str = "") -> None:
        original = getattr(owner, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if any(part in str(arg) for arg in args if isinstance(arg, str | Path)):
                raise OSError(number, os.strerror(number), *map(str, args[:1]))
            return original(*args, **kwargs)

        self._patch.setattr(owner, name, failing)


def full_for_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", failing)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("break_", "message"),
    [
        pytest.param(full_for_safetensors, "I/O error: No space left on device", id="disk full, shards"),
        pytest.param(
            lambda patch: Disk(patch).fail(Path, "write_text", errno.ENOSPC, checkpoint.INDEX),
            "No space left on device",
            id="disk full, index",
        ),
        pytest.param(
            lambda patch: Disk(patch).fail(checkpoint, "sync", errno.EIO), "Input/output error", id="sync fails"
        ),
        pytest.param(
            lambda patch: Disk(patch).fail(os, "rename", errno.EACCES), "Permission denied", id="rename refused"
        ),
        pytest.param(
            lambda patch: Disk(patch).fail(Path, "mkdir", errno.EROFS), "Read-only file system", id="read-only"
        ),
    ],
)
def test_a_disk_that_fails_while_saving(
    break_: Callable[[pytest.MonkeyPatch], None], message: str, before: bool, tmp_path: Path
) -> None:
    """Nothing is left of the new checkpoint, and what was there is still there."""
    model, folder = quantized(Stack), tmp_path / "int8"
    if before:
        save(model, folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        break_(patch)
        with pytest.raises(CheckpointError, match=rf"/int8 cannot be written: .*{message}.*Make room or name another"):
            save(quantized(Stack), folder)
    assert [path.name for path in tmp_path.iterdir()] == (["int8"] if before else [])
    if before:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
        assert_same(load(folder, Stack), model)


def circle(file: Path) -> None:
    file.symlink_to(file)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        pytest.param(lambda folder: folder.write_text(""), "is a file. Name a folder", id="a file"),
        pytest.param(circle, "int8 cannot be written: .*Not a directory", id="links in a circle"),
        pytest.param(
            lambda folder: folder.parent.joinpath("up").write_text(""),
            r"/up/int8 cannot be written: .*",
            id="up a file",
        ),
    ],
)
def test_folders_that_cannot_be_saved_to(put: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    put(tmp_path / "int8")
    folder = tmp_path / "up" / "int8" if (tmp_path / "up").exists() else tmp_path / "int8"
    with pytest.raises(CheckpointError, match=message):
        save(quantized(Stack), folder)


def replaced_by(new: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(file: Path) -> None:
        file.unlink()
        new(file)

    return replace


UNREADABLE = {
    "a folder": replaced_by(Path.mkdir),
    "a link to nothing": replaced_by(lambda file: file.symlink_to("nothing")),
    "a link to itself": replaced_by(circle),
    "a pipe": replaced_by(os.mkfifo),
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: truncate(file, 10),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe\x00{"),
    "of zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("which", ["index", "shard"])
@pytest.mark.parametrize("how", UNREADABLE)
def test_unreadable_files(how: str, which: str, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    save(quantized(Stack), folder, max_shard_bytes=5000)
    file = shard(folder) if which == "shard" else folder / checkpoint.INDEX
    UNREADABLE[how](file)
    with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
        load(folder, Stack)


@pytest.mark.parametrize(
    ("owner", "name"), [(Path, "read_bytes"), (Path, "iterdir"), (checkpoint, "safe_open"), (Path, "stat")]
)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_disk_that_fails_while_loading(
    owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "int8"
    save(quantized(Stack), folder)
    Disk(monkeypatch).fail(owner, name, number, str(folder))
    with pytest.raises(CheckpointError, match=rf"{folder}.* cannot be read: .*{os.strerror(number)}"):
        load(folder, Stack)


def other() -> nn.Module:
    torch.manual_seed(1)
    return Stack()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: save(quantized(other), folder), id="replaced"),
        pytest.param(lambda folder: save(quantized(other), folder, max_shard_bytes=5000), id="replaced, other shards"),
        pytest.param(shutil.rmtree, id="removed"),
    ],
)
@pytest.mark.parametrize("when", ["_check_shards", "_check_names"])
def test_a_folder_that_changes_while_it_is_loaded(
    change: Callable[[Path], object], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of two checkpoints are not mixed."""
    folder = tmp_path / "int8"
    save(quantized(Stack), folder)
    original = getattr(checkpoint, when)

    def changing(*args: Any) -> Any:
        change(folder)
        return original(*args)

    monkeypatch.setattr(checkpoint, when, changing)
    with pytest.raises(CheckpointError, match=f"{folder} was replaced or removed while it was loaded. Load it again"):
        load(folder, Stack)


def test_errors_of_the_factory_are_its_own(tmp_path: Path) -> None:
    save(quantized(Stack), tmp_path / "int8")

    def factory() -> nn.Module:
        raise FileNotFoundError("vocab.txt")

    with pytest.raises(FileNotFoundError, match=r"vocab\.txt"):
        load(tmp_path / "int8", factory)


class OnTheDeviceOfAParameter(Stack):
    """As timm's Swin-V2 makes its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(4), persistent=False)
        self.table.copy_(torch.arange(4.0, device=self.layers[0].up.weight.device))


def test_buffers_that_a_constructor_makes_on_the_device_of_a_parameter(tmp_path: Path) -> None:
    save(quantized(OnTheDeviceOfAParameter), tmp_path / "int8")
    again = load(tmp_path / "int8", OnTheDeviceOfAParameter)
    assert torch.equal(again.get_buffer("table"), torch.arange(4.0))
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
