"""Weights that `quantize_` may convert, and the rules that decide which of them become int8."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from int8compile.config import Int8Config, matches
from int8compile.explaining import looks_fused, multiplies
from int8compile.groups import group_of, reads_tokens
from int8compile.passes.rules import (
    Rule,
    first_verdict,
    lm_head,
    no_batch_by_column,
    plain_tensor,
    rotation_of,
    size,
    skipped_by_name,
    supported_dtypes,
)
from int8compile.passes.static import WeightView
from int8compile.sites import SkipReason, Verdict
from int8compile.stored.libraries import LIBRARIES
from int8compile.stored.modules import Int8Linear, Int8Module, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A weight of a model that a matmul reads, or that is tied to such a weight.

    Attributes:
        path: The path of the module, or for experts of the parameter.
        module: The module that holds the weight.
        source: The kind of layer, as `Int8Module.source`. (`Site.source` of a report is a line of code.)
        weight: The weight, in float or in int8; it may be on the meta device.
        weight_only: Whether activations will not be quantized.
        rotation: The number of inputs that are mixed with each other; 1 where it is not rotated.
        reason: Why it stays in float, None where it becomes int8.
        detail: What was found.
    """

    path: str
    module: nn.Module
    source: Source
    weight: Tensor
    weight_only: bool = False
    rotation: int = 1
    reason: SkipReason | None = None
    detail: str = ""

    @property
    def name(self) -> str:
        """The weight's name in the state dict of the float model."""
        return self.path if self.source == "experts" else f"{self.path}.weight"

    @property
    def transposed(self) -> bool:
        """True if the float weight is [..., K, N]."""
        return self.source == "conv1d" or (self.source == "experts" and bool(getattr(self.module, "is_transposed", 0)))

    @property
    def shape(self) -> tuple[int, ...]:
        """N and K, after the number of experts."""
        if is_lazy(self.weight):
            return ()
        *batch, n, k = self.weight.shape
        # An int8 weight is not transposed any more.
        return (*batch, k, n) if self.transposed and self.weight.is_floating_point() else (*batch, n, k)

    @property
    def view(self) -> WeightView:
        """The weight as a view [..., N, K] of the parameter."""
        weight = self.weight.mT if self.transposed else self.weight
        return WeightView(tuple(weight.shape), weight.stride(), 0, self.shape)

    @property
    def group(self) -> Hashable:
        """A value that weights with a common d share; None for a weight that is not rotated."""
        if self.rotation == 1:
            return None
        if isinstance(self.module, Int8Module):
            return id(self.module.d)
        return group_of(self.path, own=self.source == "experts"), self.shape[-1], self.weight.device

    @property
    def rotates_each(self) -> bool:
        """True if each matrix has a d of its own, as for weights of experts that do not read the tokens themselves."""
        return self.source == "experts" and not reads_tokens(self.path)


@dataclasses.dataclass(frozen=True)
class ModuleSite:
    """A weight that a module holds, as the rules see it. It is a `int8compile.passes.rules.Candidate`.

    Attributes:
        target: The weight.
        owners: The modules that hold it.
        head: The model's output projection, if it names one.
        library: The library that saves the module in float only; "" if none does.
    """

    target: Target
    owners: Sequence[nn.Module]
    head: nn.Module | None
    library: str

    @property
    def path(self) -> str:
        """Module path."""
        return self.target.path

    @property
    def tied(self) -> bool:
        """True if an embedding holds the weight too."""
        return any(isinstance(owner, nn.Embedding) for owner in self.owners)

    @property
    def is_lm_head(self) -> bool:
        """True if it is the model's output projection."""
        return self.tied or self.target.module is self.head or matches("lm_head", self.path)

    @property
    def subclass(self) -> str:
        """The name of the weight's class if it is not `nn.Parameter`, whose place an int8 tensor can take."""
        kind = type(self.target.weight)
        return "" if kind is nn.Parameter else kind.__name__

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype of the weight."""
        return (self.target.weight.dtype,)

    @property
    def batched(self) -> bool:
        """True if the weight is several matrices."""
        return len(self.target.shape) > 2

    @property
    def features(self) -> tuple[int, int]:
        """K and N."""
        *_, n, k = self.target.shape
        return k, n

    def weight_only(self, config: Int8Config) -> bool:
        """Return whether only the weight becomes int8."""
        return self.is_lm_head and config.lm_head == "int8_weight"


def initialized(site: ModuleSite, config: Int8Config) -> Verdict:
    """Require a weight that is not lazy."""
    return (SkipReason.UNINITIALIZED, "") if is_lazy(site.target.weight) else None


def replaceable(site: ModuleSite, config: Int8Config) -> Verdict:
    """Require modules whose place an int8 module can take: those that hold the weight compute a linear with it."""
    module = site.target.module
    if not site.path:
        return SkipReason.MODULE, "it is the model itself; quantize a module that holds it"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Bilinear):
        return SkipReason.FORM, type(module).__name__
    if site.target.source == "linear" and not _is_plain_linear(module):
        return SkipReason.MODULE, type(module).__name__
    others = sorted({type(owner).__name__ for owner in site.owners})
    shared = any(not _is_replaceable(owner) for owner in site.owners)
    return (SkipReason.MODULE, f"it is shared with {', '.join(others)}") if shared else None


def not_hooked(site: ModuleSite, config: Int8Config) -> Verdict:
    """Leave modules in float that have hooks, which another module would not have."""
    return (SkipReason.HOOKED, "") if _is_hooked(site.target.module) else None


def saved_in_int8(site: ModuleSite, config: Int8Config) -> Verdict:
    """Leave modules in float that a library saves in float only."""
    return (SkipReason.SAVED_IN_FLOAT, site.library) if site.library else None


# As in `int8compile.passes.rules`, the first rule with a verdict gives the reason.
RULES: tuple[Rule, ...] = (
    skipped_by_name,
    initialized,
    lm_head,
    replaceable,
    not_hooked,
    plain_tensor,
    supported_dtypes,
    no_batch_by_column,
    size,
    saved_in_int8,
)


def plan(model: nn.Module, config: Int8Config) -> list[Target]:
    """Return every weight that `quantize_` may convert, with its verdict."""
    modules = dict(model.named_modules())
    owners: dict[int, list[nn.Module]] = collections.defaultdict(list)
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(module)
    head = output_projection(model)
    in_float = _saved_in_float(model)
    targets = []
    for path, module in modules.items():
        for target in _targets(path, module):
            site = ModuleSite(target, owners[id(target.weight)], head, in_float.get(id(module), ""))
            targets.append(_planned(site, config))
    targets = _experts_together(targets)
    # Embeddings that are tied to a projection become int8 with it.
    converted = {id(target.weight) for target in targets if target.reason is None}
    targets += [
        Target(path=path, module=module, source="embedding", weight=module.weight)
        for path, module in modules.items()
        if isinstance(module, nn.Embedding) and id(module.weight) in converted
    ]
    return targets


def _planned(site: ModuleSite, config: Int8Config) -> Target:
    """Return the target of a site with its verdict."""
    target, module, config = site.target, site.target.module, config.of(site.path)
    if isinstance(module, Int8Module):
        weight_only = module.weight_only if isinstance(module, Int8Linear) else site.weight_only(config)
        return dataclasses.replace(target, rotation=module.rotation, weight_only=weight_only)
    reason, detail = first_verdict(RULES, site, config) or (None, "")
    rotation = rotation_of(target.shape[-1], config, tied=site.tied) if target.shape else 1
    weight_only = site.weight_only(config)
    return dataclasses.replace(target, rotation=rotation, weight_only=weight_only, reason=reason, detail=detail)


def _saved_in_float(model: nn.Module) -> dict[int, str]:
    """Return the ids of modules that a library saves and loads itself, in float only, with the library's name.

    PEFT saves adapters so (LoRA and the like, trained copies of layers), sentence-transformers the layers that follow a
    model.
    """
    adapters = _kinds(("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper"))
    layers = _kinds(("sentence_transformers.base.modules.module", "Module"))
    models = _kinds(*(library.base for library in LIBRARIES.values()))
    found: dict[int, str] = {}
    within: set[int] = set()
    for module in model.modules() if adapters or layers else ():
        if isinstance(module, adapters):
            held = [getattr(module, name, None) for name in module.adapter_layer_names]
            found |= {id(inner): "PEFT" for part in held if isinstance(part, nn.Module) for inner in part.modules()}
        elif isinstance(module, models):
            within |= {id(inner) for inner in module.modules()}
        elif isinstance(module, layers):
            found |= {id(inner): "sentence-transformers" for inner in module.modules() if id(inner) not in found}
    return {key: library for key, library in found.items() if library == "PEFT" or key not in within}


def _kinds(*names: tuple[str, str]) -> tuple[type[Any], ...]:
    """Return those of some classes, given by module and name, whose modules are imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if kind is not None)


def _experts_together(targets: list[Target]) -> list[Target]:
    """Leave all weights of a module of experts in float if one of them stays in float: one forward pass reads them."""
    kept = {id(target.module): target for target in targets if target.source == "experts" and target.reason}

    def with_others(target: Target) -> Target:
        other = kept.get(id(target.module))
        if target.source != "experts" or target.reason or other is None:
            return target
        return dataclasses.replace(target, reason=other.reason, detail=f"{other.path}: {other.detail}")

    return [with_others(target) for target in targets]


def output_projection(model: nn.Module) -> nn.Module | None:
    """Return the module that a transformers model calls its output embeddings."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):  # Models without one.
        return None


def conv1d() -> type[Any] | None:
    """Return transformers' Conv1D, if it is imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _targets(path: str, module: nn.Module) -> Iterator[Target]:
    if isinstance(module, Int8Module):
        if module.source != "embedding":
            yield Target(path=path, module=module, source=module.source, weight=module.qweight)
        return
    kind = conv1d()
    if kind is not None and type(module) is kind:
        weight: Any = module.weight
        yield Target(path=path, module=module, source="conv1d", weight=weight)
        return
    experts = _expert_weights(module)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if is_lazy(parameter):
            if isinstance(module, nn.Linear) and name == "weight":
                yield Target(path=path, module=module, source="linear", weight=parameter)
        elif name in experts:
            yield Target(path=f"{path}.{name}".lstrip("."), module=module, source="experts", weight=parameter)
        elif multiplies(module, parameter) or looks_fused(module, parameter):
            plain = isinstance(module, nn.Linear) and name == "weight"
            yield Target(
                path=path if plain else f"{path}.{name}".lstrip("."), module=module, source="linear", weight=parameter
            )


def _expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the weights of a module with transformers' interface for experts (`use_experts_implementation`)."""
    if not hasattr(module, "has_gate") or not hasattr(getattr(module, "config", None), "_experts_implementation"):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is nn.Linear itself: subclasses may compute more, or other code may read their weight."""
    return type(module) is nn.Linear


def _is_hooked(module: nn.Module) -> bool:
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
        *(module._state_dict_hooks, module._state_dict_pre_hooks),
        *(module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks),
    )
    return "forward" in vars(module) or any(hooks)  # accelerate gives the module a forward of its own.


def _is_replaceable(module: nn.Module) -> bool:
    kind = conv1d()
    return (
        _is_plain_linear(module)
        or (type(module) is nn.Embedding and module.max_norm is None)
        or (kind is not None and type(module) is kind)
        or bool(_expert_weights(module))
    )
