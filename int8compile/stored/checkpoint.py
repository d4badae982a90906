"""`save()` and `load()`: int8 models as a folder of safetensors shards and an `int8compile.json` that describes them.

A folder is replaced as a whole, in one step of the file system, and nothing that a file holds is executed. Everything
that is read is checked: the description by a checksum of its own, each tensor by one that the description has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

from int8compile.atomic import put_in_place, remove_leftovers, sync, temporary_folder
from int8compile.checksum import THREADS, sha256
from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, ConfigError, first_line, listed
from int8compile.stored.convert import attach, describe, put_described
from int8compile.stored.modules import BUFFERS, Int8Module, share_rotations
from int8compile.version import __version__
from int8compile.weights import FREED

FORMAT = "int8compile"
# Version 1 had no rotations: what it describes has no `d` and runs without.
VERSION = 2
READABLE = (1, VERSION)
INDEX = "int8compile.json"

_SHARD = re.compile(r"int8compile-\d{5,}-of-\d{5,}\.safetensors")
# What safetensors can store, by the names in the description.
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    )
}
_AGAIN = "Copy the checkpoint again, or save it again from the model"
_CONFIG = "Have model_factory build the model, with the config, that was saved"

# Where a tensor is: its module and its name there.
_Place: TypeAlias = tuple[nn.Module, str]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor, as the description has it."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Index:
    """The description of a checkpoint: its int8 modules, tensors, their other names, and the shards' sizes in bytes."""

    modules: dict[str, dict[str, Any]]
    tensors: dict[str, _Entry]
    aliases: dict[str, str]
    shards: dict[str, int]


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 2**30, progress: bool = True
) -> None:
    """Saves an int8 model to a folder, which is either the old one or the new one whenever the process is killed.

    Saved are all parameters and persistent buffers, those in float too. A tied tensor is stored once.

    Args:
        model: A model that `quantize_` converted.
        folder: Where to. A checkpoint that is there is replaced.
        max_shard_bytes: The most bytes of tensors in one file; a larger tensor gets a file of its own.
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: The model is not int8 or has tensors that cannot be saved; or the folder holds other files, or
            cannot be written. A checkpoint that was there is still there then, whole.
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
    """Loads a model that `save` wrote, bit by bit the same.

    Args:
        folder: The checkpoint.
        model_factory: Returns the float model, e.g. `lambda: LlamaForCausalLM(config)`. Its parameters are created
            without data (on the meta device), so it can initialize but not read them; memory holds only int8 weights.
        device: Where the tensors go; None leaves them on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The factory's model, its modules in training or evaluation mode as the factory made them.

    Raises:
        CheckpointError: The checkpoint is damaged, cannot be read, is of a newer version or in float, does not fit the
            model, or was replaced meanwhile.
    """
    folder = Path(folder)
    index = _read_index(folder)
    with _unless_replaced(folder, index):
        _check_shards(folder, index)
    with _parameters_on_meta():
        model = model_factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model_factory returned {type(model).__name__}. It must return the float model")
    if done := list(describe(model)):
        raise CheckpointError(f"model_factory returned a model with int8 modules: {listed(done)}. Return it in float")
    put_described(model, index.modules, f"{_CONFIG}. If it does: {_AGAIN[0].lower()}{_AGAIN[1:]}")
    places = _places(model)
    _check_names(index, places)
    for name, entry in index.tensors.items():
        for each in _names(index, name):
            _check_fits(each, entry, places[each])
    total = sum(entry.nbytes for entry in index.tensors.values())
    bar = tqdm(total=total, desc="Loading", unit="B", unit_scale=True, disable=not progress or not total, leave=False)
    # In threads: hashing takes longer than reading, and leaves Python's lock alone.
    with _unless_replaced(folder, index), bar, ThreadPoolExecutor(max_workers=THREADS) as pool:
        read = pool.map(lambda item: _read_tensor(folder / item[1].shard, *item), index.tensors.items())
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
def _unless_replaced(folder: Path, index: _Index) -> Iterator[None]:
    """Name the cause where what is wrong with a checkpoint is that another save replaced it while it was read.

    Tensors of two checkpoints are never mixed: each is compared with the checksum that the description has.
    """
    try:
        yield
    except CheckpointError as error:
        replaced = True
        with contextlib.suppress(CheckpointError):
            replaced = _read_index(folder) != index
        if not replaced:
            raise
        raise CheckpointError(f"{folder} was replaced or removed while it was loaded. Load it again") from error


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn errors of the file system into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {first_line(error)}. Check that it exists and its permissions, or copy the "
            "checkpoint again"
        ) from error


def _places(model: nn.Module) -> dict[str, _Place]:
    """Where the tensors of a model's state dict are, by their names, all names of shared ones included."""
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
    """A model's tensors by name, and the other names that some have.

    Raises:
        CheckpointError: One cannot be saved.
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
        # By its memory: `.to(device)` and `.data` give a tied tensor several objects.
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
    if not plain or str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout}; safetensors takes dense "
            f"tensors of {', '.join(_DTYPES)}. Convert it before saving"
        )


def _write(
    new: Path,
    modules: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    aliases: dict[str, str],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Writes the files of a checkpoint so that they are on the disk, not only in its cache."""
    shards: list[list[str]] = []
    free = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > free:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= tensor.nbytes
    entries: dict[str, dict[str, Any]] = {}
    sizes = {}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(
        total=total, desc="Saving", unit="B", unit_scale=True, disable=not progress or not total, leave=False
    ) as bar:
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
    index["checksum"] = _index_checksum(index)
    (new / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    sync(new / INDEX)
    sync(new)


def _alone(tensor: Tensor, taken: set[int]) -> Tensor:
    """A tensor on the CPU, contiguous and with a storage of its own, which safetensors asks for.

    Args:
        tensor: The tensor.
        taken: The addresses of storages of other tensors in the file; gets this one's.
    """
    alone = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    storage = alone.untyped_storage()
    if storage.nbytes() != alone.nbytes or storage.data_ptr() in taken:
        alone = alone.clone()
    taken.add(alone.untyped_storage().data_ptr())
    return alone


def _index_checksum(index: dict[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Name a folder to save to")
    others = sorted(file.name for file in folder.iterdir() if not _is_ours(file.name)) if folder.exists() else []
    if others:
        raise CheckpointError(
            f"{folder} holds files that are no int8 checkpoint's: {listed(others)}. Saving replaces the whole folder; "
            "save to a new folder, or move them away"
        )


def _is_ours(file: str) -> bool:
    return file == INDEX or _SHARD.fullmatch(file) is not None


def _read_index(folder: Path) -> _Index:
    """The description of a checkpoint, checked.

    Raises:
        CheckpointError: There is none, or it is damaged, or of another version.
    """
    file = folder / INDEX
    with _readable(file):
        if not file.is_file():
            raise CheckpointError(_what_is_there(folder))
        content = file.read_bytes()
    try:
        index = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}): it is cut off or damaged. {_AGAIN}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{file} does not describe an int8 checkpoint: its 'format' is not {FORMAT!r}. {_AGAIN}")
    version = index.get("format_version")
    if type(version) is not int or version not in READABLE:
        newer = type(version) is int and version > VERSION
        what = "it was made by a newer version of int8compile, update it" if newer else "no version has written this"
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{file}: format_version is {version!r}, this version reads {known}: {what}")
    if index.get("checksum") != (found := _index_checksum(index)):
        raise CheckpointError(
            f"{file} was changed after it was written: the SHA-256 of its content is {found}, it names "
            f"{index.get('checksum')!r}. {_AGAIN}"
        )
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
            raise CheckpointError(f"{file}: {name} is a second name of {target!r}, which is no tensor. {_AGAIN}")
    return _Index(modules, {name: _entry(file, tensors, name, shards) for name in tensors}, aliases, shards)


def _what_is_there(folder: Path) -> str:
    """Why a folder has no description."""
    if not folder.exists():
        folder = folder.resolve()
        for old in folder.parent.glob(f".{folder.name}.old-*") if folder.parent.is_dir() else ():
            with contextlib.suppress(CheckpointError):
                _check_shards(old, _read_index(old))
                return (
                    f"{folder} does not exist. A save that was killed has left the checkpoint that was there, whole, "
                    f"in {old}: rename it to {folder.name}"
                )
        return f"{folder} does not exist. Name the folder that int8compile.save() wrote"
    if not folder.is_dir():
        return f"{folder} is a file. Name the folder that int8compile.save() wrote"
    files = sorted(file.name for file in folder.iterdir())
    if any(_is_ours(file) for file in files):
        return f"{folder} has shards but no {INDEX}: the checkpoint is not whole. {_AGAIN}"
    floats = [file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json"))]
    if floats:
        return (
            f"{folder} has no {INDEX}, so {listed(floats)} is no int8 checkpoint. Load the float model as usual (e.g. "
            "from_pretrained) and call int8compile.quantize_(model)"
        )
    return f"{folder} has no {INDEX} and is no int8 checkpoint. Name the folder that int8compile.save() wrote"


def _typed(file: Path, values: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = values.get(key)
    if type(value) is not kind:
        raise CheckpointError(f"{file}: {key!r} is {value!r:.60}; it must be of type {kind.__name__}. {_AGAIN}")
    return value


def _entry(file: Path, tensors: dict[str, Any], name: str, shards: dict[str, int]) -> _Entry:
    values = _typed(file, tensors, name, dict)
    shard, dtype, digest = (_typed(file, values, key, str) for key in ("shard", "dtype", "sha256"))
    shape = _typed(file, values, "shape", list)
    if shard not in shards:
        raise CheckpointError(f"{file}: {name} is in shard {shard!r}, which is not among its shards. {_AGAIN}")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; allowed are {', '.join(_DTYPES)}. {_AGAIN}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise CheckpointError(f"{file}: {name} has shape {shape}; sizes are whole numbers. {_AGAIN}")
    return _Entry(shard, _DTYPES[dtype], tuple(shape), digest)


def _check_shards(folder: Path, index: _Index) -> None:
    """Checks that the shards are there, are whole and hold the tensors they should; reads only their headers."""
    with _readable(folder):
        files = sorted(file.name for file in folder.iterdir())
    extra = [file for file in files if _SHARD.fullmatch(file) and file not in index.shards]
    if extra:
        raise CheckpointError(f"{folder} has shards that {INDEX} does not name: {listed(extra)}. {_AGAIN}")
    for shard, size in index.shards.items():
        file = folder / shard
        expected = [name for name, entry in index.tensors.items() if entry.shard == shard]
        with _readable(file):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; it holds {listed(expected)}. {_AGAIN}")
            found = file.stat().st_size
        if found != size:
            raise CheckpointError(
                f"{file} has {found} bytes, {INDEX} says {size}: it is cut off or was changed. It holds "
                f"{listed(expected)}. {_AGAIN}"
            )
        with _opened(file, expected) as opened:
            names = set(opened.keys())
        if lacking := [name for name in expected if name not in names]:
            raise CheckpointError(f"{file} lacks {listed(lacking)}, which {INDEX} says is in it. {_AGAIN}")
        if more := sorted(names.difference(expected)):
            raise CheckpointError(f"{file} holds {listed(more)}, which {INDEX} does not name there. {_AGAIN}")


@contextlib.contextmanager
def _opened(file: Path, names: list[str]) -> Iterator[Any]:
    try:
        with _readable(file), safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}). It holds {listed(names)}. {_AGAIN}") from error


class _OnMeta(threading.local):
    """Whether parameters that this thread registers lose their data, and what became of those that did."""

    known: WeakTensorKeyDictionary | None = None
    # Where those that lost their data were.
    devices: WeakTensorKeyDictionary | None = None


_ON_META = _OnMeta()


@functools.cache
def _watch_parameters() -> None:
    """Once, and for good: torch goes through these hooks whenever a parameter is registered, in any thread."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        known = _ON_META.known
        if known is None or parameter.is_meta or type(parameter) is not nn.Parameter:
            return None
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(known[parameter]).update(vars(parameter))
            assert _ON_META.devices is not None
            _ON_META.devices[known[parameter]] = parameter.device
        result: nn.Parameter = known[parameter]
        return result

    # torch's own annotation says that hooks return nothing.
    register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]


_watching = threading.Lock()
_DEVICE: Any = Tensor.device.__get__


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers lose their data; those registered in several places stay one.

    Buffers keep theirs: those that are not saved (rotary frequencies) are computed by the constructor. Meanwhile the
    parameters say that they are where they were, because constructors compute buffers on the device of a parameter.
    """
    with _watching:
        _watch_parameters()
    # Weakly, or memory would hold the float model.
    _ON_META.known, _ON_META.devices = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
    try:
        with _AsIfThereWereData(_ON_META.devices):
            yield
    finally:
        _ON_META.known = _ON_META.devices = None


class _AsIfThereWereData(TorchFunctionMode):
    """Leaves out random values of tensors without data, and answers for parameters where they would be.

    torch is slow to leave the former out itself: a millisecond for each parameter.
    """

    def __init__(self, devices: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]
        if func == _DEVICE and args[0] in self._devices:
            return self._devices[args[0]]
        return func(*args, **(kwargs or {}))


def _names(index: _Index, name: str) -> list[str]:
    """All names of a tensor."""
    return [name, *(alias for alias, target in index.aliases.items() if target == name)]


def _check_names(index: _Index, places: dict[str, _Place]) -> None:
    """Checks that the checkpoint has the tensors that the model has."""
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
                f" {_AGAIN}"
            )
    if missing := [name for name in places if name not in saved]:
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}, which the model has. {_CONFIG}")
    if unexpected := [name for name in saved if name not in places]:
        raise CheckpointError(f"the checkpoint has {listed(unexpected)}, which the model does not have. {_CONFIG}")


def _check_fits(name: str, entry: _Entry, place: _Place) -> None:
    module, last = place
    if last == "_extra_state":
        return  # What it is only its module knows.
    tensor = _at(place)
    exact = isinstance(module, Int8Module) and last in BUFFERS
    both_float = tensor.is_floating_point() and entry.dtype.is_floating_point
    if entry.dtype != tensor.dtype and (exact or not both_float):
        advice = _AGAIN if exact else _CONFIG
        raise CheckpointError(f"{name} is {entry.dtype} in the checkpoint, the model takes {tensor.dtype}. {advice}")
    if entry.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{name} has shape {list(entry.shape)} in the checkpoint, {list(tensor.shape)} in the model. {_CONFIG}"
        )


def _read_tensor(file: Path, name: str, entry: _Entry) -> Tensor:
    """Reads a tensor and checks it.

    Raises:
        CheckpointError: It is not what the description says.
    """
    # Opened for each tensor: what is read stays mapped, and in memory, until its file is closed.
    with _opened(file, [name]) as opened:
        mapped: Tensor = opened.get_tensor(name)
        if (mapped.dtype, tuple(mapped.shape)) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"{name} is {mapped.dtype} {list(mapped.shape)} in {file}, {INDEX} says {entry.dtype} "
                f"{list(entry.shape)}. {_AGAIN}"
            )
        tensor = mapped.clone()
    if (found := sha256(tensor)) != entry.sha256:
        raise CheckpointError(
            f"{name} in {file} is damaged: the SHA-256 of its bytes is {found}, {INDEX} says {entry.sha256}. {_AGAIN}"
        )
    return tensor


def _assign(tensor: Tensor, places: Iterable[_Place]) -> None:
    """Puts one tensor in all its places, as one object in those that take a parameter and one in those of buffers."""
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
