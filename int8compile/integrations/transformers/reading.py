"""Int8 modules while transformers loads a model, and a check of the files that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from int8compile.errors import CheckpointError, listed
from int8compile.integrations.folders import ADVICE, check_files, int8_tensors, tensors_of
from int8compile.integrations.transformers.names import spellings
from int8compile.stored.bitsandbytes import int8_weight
from int8compile.stored.modules import BUFFERS, Int8Module


def as_parameters(module: Int8Module) -> None:
    """Register int8 weights as parameters while a model is loaded.

    accelerate offloads parameters, but keeps buffers on the device by default.
    """
    for name in tensors_of(module):
        tensor = module._buffers.pop(name)
        assert tensor is not None
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def as_buffers(module: Int8Module, known: dict[int, Tensor]) -> None:
    """Register int8 weights as buffers again; a parameter that several modules share becomes one shared buffer."""
    for name in tensors_of(module):
        parameter = module._parameters.pop(name)
        assert parameter is not None
        module._buffers[name] = known.setdefault(id(parameter), parameter.data)


def is_loaded(tensor: Tensor) -> bool:
    """Return whether transformers has filled a tensor with the data of a checkpoint."""
    return not tensor.is_meta and bool(getattr(tensor, "_is_hf_initialized", False))


def tie(model: Any) -> None:
    """Tie the weights of a model without data; its own `tie_weights` does nothing while it is being loaded."""
    for name, source in model.all_tied_weights_keys.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))


def check_checkpoint(model: Any, files: Iterable[str]) -> dict[str, str]:
    """Check that the int8 layers of a checkpoint are those of a model.

    transformers itself only reports tensors that a checkpoint lacks, and initializes them at random.

    Returns:
        The file of each tensor, by the tensor's name in the model.

    Raises:
        CheckpointError: A layer is int8 on one side only, its tensors have a wrong dtype or an unknown layout, or a
            file cannot be read.
    """
    found = check_files(model, files, lambda path: spellings(path, model))
    # Names of bitsandbytes are changed into these while its checkpoints are loaded.
    renamed = {
        f"{path}.{name}"
        for path, _, last in (name.rpartition(".") for name in found)
        if last == "SCB"
        for name in BUFFERS
    }
    tied = {name.removesuffix("weight") for name in model.all_tied_weights_keys}
    missing = [
        name
        for name, _, _ in int8_tensors(model)
        if name not in found and name not in renamed and name.rpartition(".")[0] + "." not in tied
    ]
    if found and missing:
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}. {ADVICE}")
    return found


def rescale(model: nn.Module) -> None:
    """Turn the `SCB` of bitsandbytes, which is 127 times the scale, into scales."""
    done = set()
    for path, module in model.named_modules():
        if isinstance(module, Int8Module) and id(module.scale) not in done:
            module.scale.copy_(int8_weight(path, module.qweight, module.scale)[1])
            done.add(id(module.scale))
