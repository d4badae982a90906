"""Read and check the description of a checkpoint, `int8compile.json`, and the shards that it lists."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8compile.checksum import sha256
from int8compile.errors import CheckpointError, first_line, listed

FORMAT = "int8compile"
# Version 1 had no rotations: what it describes has no `d` and runs without.
VERSION = 2
READABLE = (1, VERSION)
INDEX = "int8compile.json"
_SHARD = re.compile(r"int8compile-\d{5,}-of-\d{5,}\.safetensors")
# The dtypes that safetensors can store, by their names in the description.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    )
}
AGAIN = "Copy the checkpoint again, or save it again from the model"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The description of a tensor."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Index:
    """The description of a checkpoint.

    Attributes:
        modules: The int8 modules by path, as `int8compile.stored.convert.describe` returns them.
        tensors: The tensors by name.
        aliases: Other names of tensors, with the names in `tensors`.
        shards: The sizes of the files in bytes, by name.
    """

    modules: dict[str, dict[str, Any]]
    tensors: dict[str, Entry]
    aliases: dict[str, str]
    shards: dict[str, int]


def index_checksum(index: dict[str, Any]) -> str:
    """Return the SHA-256 of a description without its own checksum."""
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_ours(file: str) -> bool:
    """Return whether a checkpoint may have a file of this name."""
    return file == INDEX or _SHARD.fullmatch(file) is not None


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn errors of the file system into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {first_line(error)}. Check that it exists and its permissions, or copy the "
            "checkpoint again"
        ) from error


def read_index(folder: Path) -> Index:
    """Return the checked description of a checkpoint.

    Raises:
        CheckpointError: There is none, or it is damaged or of another version.
    """
    file = folder / INDEX
    index = _read_json(folder, file)
    _check_version(file, index)
    modules, shards, tensors, aliases = (
        _typed(file, index, key, dict) for key in ("modules", "shards", "tensors", "aliases")
    )
    for name in modules:
        _typed(file, modules, name, dict)
    for name in shards:
        _typed(file, shards, name, int)
        if not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{file} names the shard {name!r}; shards are files in the same folder, called as "
                f"int8compile-00001-of-00001.safetensors. Do not trust this checkpoint; save it again from the model"
            )
    for name, target in aliases.items():
        if not isinstance(target, str) or target not in tensors or name in tensors:
            raise CheckpointError(f"{file}: {name} is a second name of {target!r}, which is not a tensor. {AGAIN}")
    return Index(modules, {name: _entry(file, tensors, name, shards) for name in tensors}, aliases, shards)


def _read_json(folder: Path, file: Path) -> dict[str, Any]:
    with readable(file):
        if not file.is_file():
            raise CheckpointError(_what_is_there(folder))
        content = file.read_bytes()
    try:
        index = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}): it is cut off or damaged. {AGAIN}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{file} does not describe an int8 checkpoint: its 'format' is not {FORMAT!r}. {AGAIN}")
    return index


def _check_version(file: Path, index: dict[str, Any]) -> None:
    """Check the version of a description, and that it was not changed."""
    version = index.get("format_version")
    if type(version) is not int or version not in READABLE:
        newer = type(version) is int and version > VERSION
        what = "it was made by a newer version of int8compile, update it" if newer else "no version has written this"
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{file}: format_version is {version!r}, this version reads {known}: {what}")
    if index.get("checksum") != (found := index_checksum(index)):
        raise CheckpointError(
            f"{file} was changed after it was written: the SHA-256 of its content is {found}, it names "
            f"{index.get('checksum')!r}. {AGAIN}"
        )


def _what_is_there(folder: Path) -> str:
    """Return a message that says why a folder has no description."""
    if not folder.exists():
        folder = folder.resolve()
        for old in folder.parent.glob(f".{folder.name}.old-*") if folder.parent.is_dir() else ():
            with contextlib.suppress(CheckpointError):
                check_shards(old, read_index(old))
                return (
                    f"{folder} does not exist. A save that was killed has left the previous checkpoint, whole, "
                    f"in {old}: rename it to {folder.name}"
                )
        return f"{folder} does not exist. Name the folder that int8compile.save() wrote"
    if not folder.is_dir():
        return f"{folder} is a file. Name the folder that int8compile.save() wrote"
    files = sorted(file.name for file in folder.iterdir())
    if any(is_ours(file) for file in files):
        return f"{folder} has shards but no {INDEX}: the checkpoint is not whole. {AGAIN}"
    floats = [file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json"))]
    if floats:
        return (
            f"{folder} has no {INDEX}, so {listed(floats)} is not an int8 checkpoint. Load the float model as usual "
            "(e.g. from_pretrained) and call int8compile.quantize_(model)"
        )
    return f"{folder} has no {INDEX} and is not an int8 checkpoint. Name the folder that int8compile.save() wrote"


def _typed(file: Path, values: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = values.get(key)
    if type(value) is not kind:
        raise CheckpointError(f"{file}: {key!r} is {value!r:.60}; it must be of type {kind.__name__}. {AGAIN}")
    return value


def _entry(file: Path, tensors: dict[str, Any], name: str, shards: dict[str, int]) -> Entry:
    values = _typed(file, tensors, name, dict)
    shard, dtype, digest = (_typed(file, values, key, str) for key in ("shard", "dtype", "sha256"))
    shape = _typed(file, values, "shape", list)
    if shard not in shards:
        raise CheckpointError(f"{file}: {name} is in shard {shard!r}, which is not among its shards. {AGAIN}")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; allowed are {', '.join(DTYPES)}. {AGAIN}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise CheckpointError(f"{file}: {name} has shape {shape}; sizes are whole numbers. {AGAIN}")
    return Entry(shard, DTYPES[dtype], tuple(shape), digest)


def check_shards(folder: Path, index: Index) -> None:
    """Check that the shards exist, are whole and hold the right tensors; only their headers are read."""
    with readable(folder):
        files = sorted(file.name for file in folder.iterdir())
    extra = [file for file in files if _SHARD.fullmatch(file) and file not in index.shards]
    if extra:
        raise CheckpointError(f"{folder} has shards that {INDEX} does not name: {listed(extra)}. {AGAIN}")
    for shard, size in index.shards.items():
        file = folder / shard
        expected = [name for name, entry in index.tensors.items() if entry.shard == shard]
        with readable(file):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; it holds {listed(expected)}. {AGAIN}")
            found = file.stat().st_size
        if found != size:
            raise CheckpointError(
                f"{file} has {found} bytes, {INDEX} says {size}: it is cut off or was changed. It holds "
                f"{listed(expected)}. {AGAIN}"
            )
        with _opened(file, expected) as opened:
            names = set(opened.keys())
        if lacking := [name for name in expected if name not in names]:
            raise CheckpointError(f"{file} lacks {listed(lacking)}, which {INDEX} says is in it. {AGAIN}")
        if more := sorted(names.difference(expected)):
            raise CheckpointError(f"{file} holds {listed(more)}, which {INDEX} does not name there. {AGAIN}")


@contextlib.contextmanager
def _opened(file: Path, names: list[str]) -> Iterator[Any]:
    try:
        with readable(file), safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}). It holds {listed(names)}. {AGAIN}") from error


def read_tensor(file: Path, name: str, entry: Entry) -> Tensor:
    """Return a tensor, checked against its description.

    Raises:
        CheckpointError: Its dtype, shape or values differ from the description.
    """
    # The file is opened for each tensor: until it is closed, every tensor that was read stays mapped and in memory.
    with _opened(file, [name]) as opened:
        mapped: Tensor = opened.get_tensor(name)
        if (mapped.dtype, tuple(mapped.shape)) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"{name} is {mapped.dtype} {list(mapped.shape)} in {file}, {INDEX} says {entry.dtype} "
                f"{list(entry.shape)}. {AGAIN}"
            )
        tensor = mapped.clone()
    if (found := sha256(tensor)) != entry.sha256:
        raise CheckpointError(
            f"{name} in {file} is damaged: the SHA-256 of its bytes is {found}, {INDEX} says {entry.sha256}. {AGAIN}"
        )
    return tensor
