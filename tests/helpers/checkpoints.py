"""Save, load, compare and damage checkpoints of small models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import int8compile
from int8compile.stored import checkpoint

ROOT = Path(__file__).parents[2]


def quantized(factory: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = factory()
    int8compile.quantize_(model, options, progress=False)
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> None:
    int8compile.save(model, folder, progress=False, **options)


def load(folder: Path, factory: Callable[[], nn.Module], **options: Any) -> nn.Module:
    return int8compile.load(folder, factory, progress=False, **options)


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Require the same names, bits and modules."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert str(actual) == str(expected)


def edit(change: Callable[[dict], object], *, sign: bool = True) -> Callable[[Path], None]:
    """Return a function that changes a checkpoint's description, and its checksum to reach the checks behind it."""

    def damage(folder: Path) -> None:
        file = folder / checkpoint.INDEX
        index = json.loads(file.read_text())
        change(index)
        if sign:
            index["checksum"] = checkpoint.index_checksum(index)
        file.write_text(json.dumps(index))

    return damage


def shard(folder: Path) -> Path:
    index = json.loads((folder / checkpoint.INDEX).read_text())
    return folder / index["tensors"]["layers.0.up.qweight"]["shard"]


def truncate(file: Path, nbytes: int) -> None:
    os.truncate(file, file.stat().st_size - nbytes)


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Return a function that renames a tensor in the description and in its shard."""

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
