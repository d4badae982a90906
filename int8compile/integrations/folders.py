"""Hugging Face folders of int8 models: reading, checking and writing, for all libraries."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from int8compile.checksum import sha256_of_all
from int8compile.errors import CheckpointError, first_line, listed
from int8compile.stored.bitsandbytes import check_layout
from int8compile.stored.convert import Made, Target, quantized_one_by_one
from int8compile.stored.modules import BUFFERS, Int8Module, bad_rotation, bad_scales

ADVICE = "Copy the checkpoint again, or quantize the float model again"
# diffusers may read the files of a model in several threads.
_arriving = threading.Lock()
# The dtypes of int8 tensors in safetensors files, by the last part of their names.
_STORED_AS = {"qweight": "I8", "scale": "F32", "d": "F32"}


def has_int8(model: nn.Module) -> bool:
    """Return whether a model has int8 modules."""
    return any(isinstance(module, Int8Module) for module in model.modules())


def is_offloaded(module: Any) -> bool:
    """Return whether accelerate keeps a module's tensors elsewhere and brings them for each call."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


class Arrivals:
    """Float weights that are read while a model is loaded, each kept until its whole group has been read.

    The linears of a group share one `d`, which is computed from all their weights. A checkpoint stores these near each
    other, so memory holds about one group in float.

    Args:
        targets: The weights that become int8, on the meta device.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        # The group of each weight by its name, in the order of the model.
        self._together: dict[str, list[Target]] = {}
        for each in _together(targets):
            self._together |= dict.fromkeys((target.name for target in each), each)
        # The names of weights that the checkpoint has and that are not read yet; the weights that are read, by name.
        self._expected: set[str] = set()
        self._weights: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._together

    def expect(self, name: str) -> None:
        """Record that the checkpoint has a weight, so that the others of its group wait for it."""
        self._expected.add(name)

    def add(self, name: str, weight: Tensor) -> list[tuple[Target, Tensor]]:
        """Keep a weight until the rest of its group that the checkpoint has is read.

        A weight whose shape is not the model's is not kept, and stays in float.

        Returns:
            The targets of a complete group with their weights, without those that the checkpoint lacks; an empty list
            while the group is not complete.
        """
        together = self._together[name]
        with _arriving:
            self._expected.discard(name)
            if weight.shape == next(target.weight.shape for target in together if target.name == name):
                self._weights[name] = weight
            else:
                del self._together[name]
            return [] if any(target.name in self._expected for target in together) else self._taken(together)

    def rest(self) -> Iterator[list[tuple[Target, Tensor]]]:
        """Yield the groups that still wait for a weight, because the library has left out one of the checkpoint."""
        while self._weights:
            yield self._taken(self._together[next(iter(self._weights))])

    def _taken(self, together: Sequence[Target]) -> list[tuple[Target, Tensor]]:
        # A tied weight is read under one name for all its targets.
        read = {id(each.weight): self._weights.pop(each.name) for each in together if each.name in self._weights}
        return [(target, read[id(target.weight)]) for target in together if id(target.weight) in read]


def _together(targets: Iterable[Target]) -> list[list[Target]]:
    """Return lists of targets that share a group or a weight, in their order."""
    found: dict[Hashable, list[Target]] = {}
    order: dict[int, int] = {}
    for target in targets:
        order[id(target)] = len(order)
        keys = [key for key in (target.group, id(target.weight)) if key is not None]
        first, *others = {id(found[key]): found[key] for key in keys if key in found}.values() or [[]]
        for other in others:
            first.extend(other)
            found |= {key: first for key, each in found.items() if each is other}
        first.append(target)
        found |= dict.fromkeys(keys, first)
    distinct = {id(each): each for each in found.values()}.values()
    return [sorted(each, key=lambda target: order[id(target)]) for each in distinct]


def quantized(
    read: Sequence[tuple[Target, Tensor]], rotate: Callable[[Sequence[Target]], None]
) -> Iterator[tuple[Target, Made]]:
    """Quantize weights that were read, like `int8compile.stored.convert.quantized_one_by_one`.

    Yields:
        The targets, with their weights in int8.
    """
    targets = [dataclasses.replace(target, weight=weight) for target, weight in read]
    for (target, _), (_, made) in zip(read, quantized_one_by_one(targets, rotate), strict=True):
        yield target, made


def tensors_of(module: Int8Module) -> list[str]:
    """Return the names of an int8 module's tensors in files; only a rotated weight has a `d`."""
    return [name for name in BUFFERS if getattr(module, name) is not None]


def int8_tensors(model: nn.Module) -> Iterator[tuple[str, Int8Module, Tensor]]:
    """Yield the tensors of a model's int8 modules, with their names in files and their modules."""
    for path, module in model.named_modules():
        if isinstance(module, Int8Module):
            for name in tensors_of(module):
                yield f"{path}.{name}", module, getattr(module, name)


def _in_memory(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's int8 modules by name, without offloaded tensors and tensor subclasses."""
    return {
        name: tensor
        for name, _, tensor in int8_tensors(model)
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    }


def checksums(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of the tensors of a model's int8 modules that are in memory, by name.

    Tensors that are offloaded to a disk have none, and are not checked when the folder is loaded.
    """
    return sha256_of_all(_in_memory(model))


def check_loaded(model: nn.Module, expected: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Check that the tensors of int8 modules have the bytes with which they were saved.

    Tensors that are offloaded to a disk are not checked, because that would read them.

    Args:
        model: The loaded model.
        expected: The SHA-256 of the tensors, by their names in the model. A folder of an older version has none.
        files: The files of the tensors, by the same names.

    Raises:
        CheckpointError: A scale is negative or not finite, a d is 0 or not finite, or the bytes of a tensor have
            changed.
    """
    tensors = _in_memory(model)
    checks = {"scale": bad_scales, "d": bad_rotation}
    for name, tensor in tensors.items():
        check = checks.get(name.rpartition(".")[2])
        if check is not None and (why := check(tensor)):
            raise CheckpointError(f"{name}{_where(files.get(name))} {why}. {ADVICE}")
    found = sha256_of_all({name: tensor for name, tensor in tensors.items() if name in expected})
    changed = [name for name, digest in found.items() if digest != expected[name]]
    if changed:
        name = changed[0]
        more = f" The same goes for {listed(changed[1:])}." if changed[1:] else ""
        raise CheckpointError(
            f"{name}{_where(files.get(name))} is damaged or of another checkpoint: the SHA-256 of its bytes is "
            f"{found[name]}, the quantization_config says {expected[name]}.{more} {ADVICE}"
        )


def _where(file: str | None) -> str:
    return f" in {file}" if file else ""


@contextlib.contextmanager
def opened(file: str) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        CheckpointError: It does not exist, cannot be read, or is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({first_line(error)}): it is missing or damaged. {ADVICE}"
        ) from error


def check_tensor(key: str, name: str, module: Int8Module, tensors: Any) -> None:
    """Check an int8 module's tensor in an open safetensors file.

    Raises:
        CheckpointError: Its dtype is wrong, or it rotates a weight that is not rotated.
    """
    if name == "d" and module.d is None:
        raise CheckpointError(
            f"{key} of the checkpoint rotates a weight that by its config.json is not rotated. {ADVICE}"
        )
    dtype = tensors.get_slice(key).get_dtype()
    if name in _STORED_AS and dtype != _STORED_AS[name]:
        raise CheckpointError(f"{key} of the checkpoint is {dtype}; it must be {_STORED_AS[name]}. {ADVICE}")


def check_files(
    model: nn.Module, files: Iterable[str], spellings: Callable[[str], Sequence[str]] | None = None
) -> dict[str, str]:
    """Check the int8 tensors in the safetensors files of a checkpoint against a model.

    Args:
        model: The model, with its int8 modules in place.
        files: The files of the checkpoint; others than safetensors are not read.
        spellings: Returns the names that a module of the checkpoint may have in the model. None where the names are the
            same; the model must then have every int8 module of the checkpoint.

    Returns:
        The file of each tensor, by the tensor's name in the model.

    Raises:
        CheckpointError: A layer is int8 in the checkpoint and float in the model, its tensors have a wrong dtype or an
            unknown layout, or a file cannot be read.
    """
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is not a dictionary
                path, _, name = key.rpartition(".")
                if spellings is not None:
                    path = next((spelling for spelling in spellings(path) if spelling in modules), path)
                module = modules.get(path)
                found[f"{path}.{name}".lstrip(".")] = file
                if isinstance(module, Int8Module):
                    check_tensor(key, name, module, tensors)
                elif name == "qweight" and (module is not None or spellings is None):
                    raise CheckpointError(
                        f"{key} of the checkpoint is int8, but by its config.json {path} is float. {ADVICE}"
                    )
                if name == "weight_format":
                    check_layout(path, tensors.get_tensor(key))
    return found


# The files that transformers and diffusers write for a model.
_OURS = re.compile(r"(generation_)?config\.json|.*\.(safetensors|bin)|.*\.(safetensors|bin)\.index\.json")


@contextlib.contextmanager
def written(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the file system while a folder is written into `CheckpointError`, and remove new files.

    Files that existed before stay, but may have been overwritten.
    """
    path = Path(folder)
    before = set(path.iterdir()) if path.is_dir() else set()
    is_new = not path.exists()
    try:
        yield
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            for new in set(path.iterdir()) - before:
                if _OURS.fullmatch(new.name):  # Other programs may write to the folder.
                    new.unlink()
            if is_new:
                path.rmdir()  # Fails if it is not empty.
        kept = " Files that were there may be overwritten, so do not load from it." if before else ""
        raise CheckpointError(
            f"{path} cannot be written: {first_line(error)}.{kept} Make room or name another folder, and save again"
        ) from error


# One model is saved at a time: models may share configs, which change while a model is saved.
_saving = threading.RLock()


def describe_when_saved(kind: type[Any], described: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Have a class's `save_pretrained` describe the int8 modules of the model that is saved.

    `quantize_` updates the models inside its argument. A model around that argument is found only when it is saved,
    because a part does not know the model that holds it.

    Args:
        kind: The base class of models that save themselves.
        described: Returns the context in which a model is saved, also one that no longer has int8 modules.
    """
    original = kind.save_pretrained
    parameters = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs).arguments
        with _saving, contextlib.ExitStack() as stack:
            if has_int8(self):
                _check_given(self, given.get("state_dict"))
                # Errors of a network are not errors of the folder, which is then whole.
                if not (given.get("push_to_hub") or given.get("kwargs", {}).get("push_to_hub")):
                    stack.enter_context(written(given["save_directory"]))
            stack.enter_context(described(self))
            return original(self, *args, **kwargs)

    kind.save_pretrained = save_pretrained


def _check_given(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> None:
    """Raise `CheckpointError` for a state dict with other tensors than the model's, which would not be saved."""
    given = state_dict or {}
    own = model.state_dict() if given else {}
    others = [name for name, tensor in given.items() if name not in own or not _is_same(tensor, own[name])]
    if others:
        raise CheckpointError(
            f"save_pretrained was given a state_dict with other tensors than the model's: {listed(others)}. An int8 "
            "model is saved as it is; change it with load_state_dict, then save it"
        )


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    if (tensor.shape, tensor.dtype, tensor.is_meta) != (other.shape, other.dtype, other.is_meta):
        return False
    # A state dict has copies of a d that several modules share.
    return tensor.data_ptr() == other.data_ptr() or torch.equal(tensor, other.to(tensor.device))


def is_others(quantizer: Any, ours: type[Any]) -> bool:
    """Return whether a model has the quantizer of another library."""
    return quantizer is not None and not isinstance(quantizer, ours)


def check_quantizer(model: Any, ours: type[Any]) -> None:
    """Raise `CheckpointError` where another library has quantized a part of a model with int8 modules."""
    other = getattr(model, "hf_quantizer", None)
    if is_others(other, ours):
        raise CheckpointError(
            f"{type(model).__name__} is quantized by {type(other).__name__}, too, and a folder can name one "
            "method only. Load the float model, quantize all of it with int8compile, and save that"
        )
