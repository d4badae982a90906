"""`save()` and `load()`: int8 models as a folder of safetensors shards and an `int8compile.json` that describes them.

A folder is replaced as a whole, in one step of the file system. Nothing in a file is executed. Everything that is read
is checked: the description has a checksum of its own, and one for each tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from int8compile.atomic import put_in_place, remove_leftovers, sync, temporary_folder
from int8compile.checksum import THREADS, sha256
from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, ConfigError, first_line, listed
from int8compile.progress import progress_bar
from int8compile.stored.convert import attach, describe, put_described
from int8compile.stored.description import (
    AGAIN,
    DTYPES,
    FORMAT,
    INDEX,
    VERSION,
    Entry,
    Index,
    check_shards,
    index_checksum,
    is_ours,
    read_index,
    read_tensor,
)
from int8compile.stored.meta import parameters_on_meta
from int8compile.stored.modules import BUFFERS, Int8Module, share_rotations
from int8compile.version import __version__
from int8compile.weights import FREED

_CONFIG = "Have model_factory build the model, with the config, that was saved"
# The module that holds a tensor, and its name there.
_Place: TypeAlias = tuple[nn.Module, str]


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 2**30, progress: bool = True
) -> None:
    """Save an int8 model to a folder. If the process is killed, the folder is the old checkpoint or the new one.

    All parameters and persistent buffers are saved, also those in float. A tied tensor is stored once.

    Args:
        model: A model that `quantize_` converted.
        folder: The folder. An existing checkpoint is replaced.
        max_shard_bytes: The most bytes of tensors in one file; a larger tensor gets a file of its own.
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: The model is not int8 or has tensors that cannot be saved; or the folder holds other files, or
            cannot be written. An existing checkpoint is then unchanged.
        ConfigError: `max_shard_bytes` is not allowed.
    """
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes!r}: give a whole number of at least 1")
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod  # Its names would begin with `_orig_mod.`.
    modules = describe(model)
    if not modules:
        raise CheckpointError(
            f"{type(model).__name__} has no int8 module. Call int8compile.quantize_(model) first, or save a float "
            "model with safetensors or save_pretrained"
        )
    if "" in modules:
        raise CheckpointError(
            f"the model is a single {type(model).__name__}, which load() could not put in the place of another. Save a "
            "module that holds it, e.g. nn.Sequential(model)"
        )
    tensors, aliases = _tensors_of(model)
    folder = Path(os.path.realpath(folder))
    try:
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as new:
            _write(new, modules, tensors, aliases, max_shard_bytes, progress)
            _check_replaceable(folder)  # Again: writing takes a while.
            put_in_place(new, folder)
        remove_leftovers(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written: {first_line(error)}. Make room or name another folder, and save again"
        ) from error


def load(
    folder: str | os.PathLike[str],
    model_factory: Callable[[], nn.Module],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Load a model that `save` wrote, bit for bit the same.

    Args:
        folder: The checkpoint.
        model_factory: Returns the float model, e.g. `lambda: LlamaForCausalLM(config)`. Its parameters are created
            without data (on the meta device), so it can initialize but not read them. Memory holds only int8 weights.
        device: The device of the tensors; None is the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The factory's model. Its modules stay in training or evaluation mode as the factory made them.

    Raises:
        CheckpointError: The checkpoint is damaged, cannot be read, is of a newer version or in float, does not fit the
            model, or was replaced meanwhile.
    """
    folder = Path(folder)
    index = read_index(folder)
    with _unless_replaced(folder, index):
        check_shards(folder, index)
    with parameters_on_meta():
        model = model_factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model_factory returned {type(model).__name__}. It must return the float model")
    if done := list(describe(model)):
        raise CheckpointError(f"model_factory returned a model with int8 modules: {listed(done)}. Return it in float")
    put_described(model, index.modules, f"{_CONFIG}. If it does: {AGAIN[0].lower()}{AGAIN[1:]}")
    places = _places(model)
    _check_names(index, places)
    for name, entry in index.tensors.items():
        for each in _names(index, name):
            _check_fits(each, entry, places[each])
    total = sum(entry.nbytes for entry in index.tensors.values())
    bar = progress_bar(total=total, desc="Loading", unit="B", unit_scale=True, shown=progress and total > 0)
    # In threads: hashing takes longer than reading, and releases Python's lock.
    with _unless_replaced(folder, index), bar, ThreadPoolExecutor(max_workers=THREADS) as pool:
        read = pool.map(lambda item: read_tensor(folder / item[1].shard, *item), index.tensors.items())
        for (name, entry), tensor in zip(index.tensors.items(), read, strict=True):
            _assign(tensor.to(device or "cpu"), [places[each] for each in _names(index, name)])
            bar.update(entry.nbytes)
    for name, left in (*model.named_parameters(), *model.named_buffers()):
        if left.is_meta:
            raise CheckpointError(
                f"{name} has no data: it is not in the checkpoint, and model_factory made it on the meta device or "
                "from a parameter. Compute it from other values in model_factory, or make it persistent and save again"
            )
    share_rotations(model)
    attach(model, Int8Config())
    return model if device is None else model.to(device)  # Buffers that are not saved are not there yet.


@contextlib.contextmanager
def _unless_replaced(folder: Path, index: Index) -> Iterator[None]:
    """Name the cause of an error where another save replaced the checkpoint while it was read.

    Tensors of two checkpoints are never mixed: each is compared with its checksum in the description.
    """
    try:
        yield
    except CheckpointError as error:
        replaced = True
        with contextlib.suppress(CheckpointError):
            replaced = read_index(folder) != index
        if not replaced:
            raise
        raise CheckpointError(f"{folder} was replaced or removed while it was loaded. Load it again") from error


def _places(model: nn.Module) -> dict[str, _Place]:
    """Return the places of the tensors of a model's state dict, under every name of a shared tensor."""
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        names = [name for name in (*module._parameters, *buffers) if getattr(module, name) is not None]
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            names.append("_extra_state")
        places.update({f"{path}.{name}".lstrip("."): (module, name) for name in names})
    return places


def _at(place: _Place) -> Any:
    module, name = place
    return module.get_extra_state() if name == "_extra_state" else getattr(module, name)


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's tensors by name, and the other names of tensors that have several.

    Raises:
        CheckpointError: A tensor cannot be saved.
    """
    places = _places(model)
    odd = sorted(places.keys() ^ model.state_dict(keep_vars=True).keys())
    if odd:
        raise CheckpointError(
            f"{listed(odd)}: a hook of state_dict() adds or removes names, and load() could not tell where they "
            "belong. Remove the hook while saving"
        )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name, place in places.items():
        tensor = _at(place)
        _check_savable(name, tensor)
        # Tensors are compared by memory: `.to(device)` and `.data` make several objects of a tied tensor.
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (*memory, isinstance(tensor, nn.Parameter)) if tensor.numel() else (id(tensor),)
        if names.setdefault(key, name) == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = names[key]
    return tensors, aliases


def _check_savable(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{name} is {type(tensor).__name__}; only tensors can be saved. Have get_extra_state() return a tensor"
        )
    if isinstance(tensor, FREED):
        raise CheckpointError(
            f"{name} is a weight whose memory free_weights=True has given back. Save before compiling, or compile "
            "without free_weights"
        )
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no data. Load the weights before saving")
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout}; safetensors takes dense "
            f"tensors of {', '.join(DTYPES)}. Convert it before saving"
        )


def _write(
    new: Path,
    modules: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    aliases: dict[str, str],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Write the files of a checkpoint to the disk, not only to its cache."""
    shards = _shards(tensors, max_shard_bytes)
    entries: dict[str, dict[str, Any]] = {}
    sizes = {}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress_bar(total=total, desc="Saving", unit="B", unit_scale=True, shown=progress and total > 0) as bar:
        for number, names in enumerate(shards, 1):
            file = f"int8compile-{number:05}-of-{len(shards):05}.safetensors"
            taken: set[int] = set()
            group = {name: _alone(tensors[name], taken) for name in names}
            for name, tensor in group.items():
                entries[name] = {
                    "shard": file,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "sha256": sha256(tensor),
                }
            save_file(group, new / file, metadata={"format": "pt"})
            sync(new / file)
            sizes[file] = (new / file).stat().st_size
            bar.update(sum(tensor.nbytes for tensor in group.values()))
    index: dict[str, Any] = {"format": FORMAT, "format_version": VERSION, "package_version": __version__}
    index |= {"modules": modules, "shards": sizes, "tensors": entries, "aliases": aliases}
    index["checksum"] = index_checksum(index)
    (new / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    sync(new / INDEX)
    sync(new)


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Return the names of the tensors of each file, in order."""
    shards: list[list[str]] = []
    free = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > free:
            shards.append([])
            free = max_bytes
        shards[-1].append(name)
        free -= tensor.nbytes
    return shards


def _alone(tensor: Tensor, taken: set[int]) -> Tensor:
    """Return a tensor on the CPU, contiguous and with a storage of its own, as safetensors requires.

    Args:
        tensor: The tensor.
        taken: Addresses of the storages of other tensors in the file; the result's is added.
    """
    alone = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    storage = alone.untyped_storage()
    if storage.nbytes() != alone.nbytes or storage.data_ptr() in taken:
        alone = alone.clone()
    taken.add(alone.untyped_storage().data_ptr())
    return alone


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Name a folder to save to")
    others = sorted(file.name for file in folder.iterdir() if not is_ours(file.name)) if folder.exists() else []
    if others:
        raise CheckpointError(
            f"{folder} holds files that do not belong to an int8 checkpoint: {listed(others)}. Saving replaces the "
            "whole folder; save to a new folder, or move them away"
        )


def _names(index: Index, name: str) -> list[str]:
    """Return all names of a tensor."""
    return [name, *(alias for alias, target in index.aliases.items() if target == name)]


def _check_names(index: Index, places: dict[str, _Place]) -> None:
    """Check that a checkpoint has the tensors of the model, and no others."""
    saved = {**index.tensors, **{alias: index.tensors[name] for alias, name in index.aliases.items()}}
    for name, entry in saved.items():
        path, _, last = name.rpartition(".")
        layer = name if index.modules.get(name, {}).get("source") == "experts" else path
        if layer in index.modules and name not in places and (layer == name or last == "weight"):
            raise CheckpointError(
                f"{name} is {entry.dtype}, but {layer} is int8 and takes {layer}.qweight and {layer}.scale. Load the "
                f"float model and call int8compile.quantize_(model)"
            )
        if path not in index.modules and name not in places and last == "qweight":
            raise CheckpointError(
                f"{name} is {entry.dtype}, but {path} is not among the int8 modules of {INDEX} and takes {path}.weight."
                f" {AGAIN}"
            )
    if missing := [name for name in places if name not in saved]:
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}, which the model has. {_CONFIG}")
    if unexpected := [name for name in saved if name not in places]:
        raise CheckpointError(f"the checkpoint has {listed(unexpected)}, which the model does not have. {_CONFIG}")


def _check_fits(name: str, entry: Entry, place: _Place) -> None:
    module, last = place
    if last == "_extra_state":
        return  # Only its module knows what it must be.
    tensor = _at(place)
    exact = isinstance(module, Int8Module) and last in BUFFERS
    both_float = tensor.is_floating_point() and entry.dtype.is_floating_point
    if entry.dtype != tensor.dtype and (exact or not both_float):
        advice = AGAIN if exact else _CONFIG
        raise CheckpointError(f"{name} is {entry.dtype} in the checkpoint, the model takes {tensor.dtype}. {advice}")
    if entry.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{name} has shape {list(entry.shape)} in the checkpoint, {list(tensor.shape)} in the model. {_CONFIG}"
        )


def _assign(tensor: Tensor, places: Iterable[_Place]) -> None:
    """Put a tensor in all its places: one parameter in all places of parameters, one tensor in those of buffers."""
    parameter: nn.Parameter | None = None
    for module, name in places:
        if name == "_extra_state":
            module.set_extra_state(tensor)
        elif name in module._buffers:
            module._buffers[name] = tensor
        else:
            if parameter is None:
                parameter = nn.Parameter(tensor, requires_grad=getattr(module, name).requires_grad)
            module._parameters[name] = parameter
