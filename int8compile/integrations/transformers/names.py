"""Names of modules and tensors in a checkpoint and in a model, and of tied weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from int8compile.stored.modules import BUFFERS, Int8Module


def spellings(path: str, model: Any) -> tuple[str, str, str]:
    """Return the names that a module of a checkpoint may have in a model: the same, or without or with a prefix."""
    prefix = f"{model.base_model_prefix}."
    return path, path.removeprefix(prefix), prefix + path


def fitted(modules: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, dict[str, Any]]:
    """Return the int8 modules of a checkpoint that a model has, by its names, with its dtype where none is given.

    The names in a model without the saved head, or with another one, lack the base model's prefix or have it.
    """
    known = {path for path, _ in model.named_modules()}
    dtype = str(model.dtype).removeprefix("torch.")
    fitted = {}
    for path, options in modules.items():
        parent = path.rpartition(".")[0] if options.get("source") == "experts" else path
        names = spellings(parent, model)
        found = next((name for name in names if name in known), None)
        if found is not None:
            fitted[found + path.removeprefix(parent)] = {"dtype": dtype, **options}
    return fitted


def fitted_names(digests: Mapping[str, str], model: Any) -> dict[str, str]:
    """Return the checksums of a checkpoint by the names of the tensors in a model."""
    known = {path for path, module in model.named_modules() if isinstance(module, Int8Module)}
    fitted = {}
    for name, digest in digests.items():
        path, _, last = name.rpartition(".")
        for spelling in spellings(path, model):
            if spelling in known:
                fitted[f"{spelling}.{last}"] = digest
                break
    return fitted


def guards(model: nn.Module) -> Iterator[str]:
    """Yield the names of the float weights that int8 modules replace."""
    for path, module in model.named_modules():
        if isinstance(module, Int8Module):
            yield path if module.source == "experts" else f"{path}.weight"


def guard_patterns(model: Any) -> list[str]:
    """Return patterns for the tensors that `get_state_dict_and_metadata` adds, also in a model with another head."""
    return [rf"^{re.escape(spelling)}$" for name in guards(model) for spelling in spellings(name, model)]


def rename_ties(model: Any, rotated: Mapping[str, bool]) -> None:
    """Tell transformers that tied weights are tied under other names.

    Args:
        model: The model.
        rotated: Whether each int8 weight is rotated, by the names in the float model.
    """

    def renamed(ties: Mapping[str, str]) -> dict[str, str]:
        result = {}
        for name, source in ties.items():
            if name in rotated and source in rotated:
                for buffer in BUFFERS if rotated[name] else BUFFERS[:2]:
                    result[name.removesuffix("weight") + buffer] = source.removesuffix("weight") + buffer
            else:
                result[name] = source
        return result

    model.all_tied_weights_keys = renamed(model.all_tied_weights_keys)
    if isinstance(model._tied_weights_keys, dict):
        model._tied_weights_keys = renamed(model._tied_weights_keys)


def rotated_weights(model: nn.Module) -> dict[str, bool]:
    """Return whether each int8 weight is rotated, by its name in the float model; shared modules under every path."""
    return {
        path if module.source == "experts" else f"{path}.weight": module.d is not None
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Int8Module)
    }
