"""`quantize_()` and `dequantize_()`: a model's linears become modules that hold int8, and linears again."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from int8compile import ops
from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, ConfigError, Int8Warning, ModelError
from int8compile.explaining import looks_fused, multiplies
from int8compile.groups import group_of, reads_tokens
from int8compile.passes.rules import by_name, by_size, matches
from int8compile.passes.static import WeightView
from int8compile.report import Report, Site, SkipReason
from int8compile.stored.libraries import LIBRARIES, Integration, experts_implementation
from int8compile.stored.modules import Int8Embedding, Int8Experts, Int8Linear, Int8Module, Source
from int8compile.weights import STORE, quantize_checked

# A weight in int8, its scales and its d.
Made: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A weight of a model that is a matmul's, or tied to one.

    Attributes:
        path: The module's, or for experts the parameter's.
        module: The module that holds the weight.
        source: What it is.
        weight: The weight, in float or in int8; it may be on the meta device.
        weight_only: Whether activations will not be quantized.
        rotation: How many inputs are mixed with each other; 1 where it is not rotated.
        reason: Why it stays in float, None where it becomes int8.
        detail: What the reason found.
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
        """Whether the float weight is [..., K, N]."""
        return self.source == "conv1d" or (self.source == "experts" and bool(getattr(self.module, "is_transposed", 0)))

    @property
    def shape(self) -> tuple[int, ...]:
        """N and K, behind the number of experts."""
        if is_lazy(self.weight):
            return ()
        *batch, n, k = self.weight.shape
        # What is int8 already is not transposed any more.
        return (*batch, k, n) if self.transposed and self.weight.is_floating_point() else (*batch, n, k)

    @property
    def view(self) -> WeightView:
        """The weight as a view [..., N, K] of the parameter."""
        weight = self.weight.mT if self.transposed else self.weight
        return WeightView(tuple(weight.shape), weight.stride(), 0, self.shape)

    @property
    def group(self) -> Hashable:
        """Equal for weights that are rotated by one d; None for one that is not rotated."""
        if self.rotation == 1:
            return None
        if isinstance(self.module, Int8Module):
            return id(self.module.d)
        return group_of(self.path, own=self.source == "experts"), self.shape[-1], self.weight.device

    @property
    def rotates_each(self) -> bool:
        """True if each of several matrices has a d of its own: those of experts that read what each has made."""
        return self.source == "experts" and not reads_tokens(self.path)


def quantize_(
    model: nn.Module, config: Int8Config | Mapping[str, Any] | None = None, *, progress: bool = True
) -> Report:
    """Makes a model's linear layers int8 in memory, in place.

    nn.Linear, transformers' Conv1D and its fused experts become `Int8Linear` and `Int8Experts`. Each float weight is
    given up before the next is quantized. The model runs as it is, and under torch.compile with backend "int8" or any
    other. Calling it again changes nothing.

    Args:
        model: The model. On the meta device it becomes a skeleton, to load int8 weights into.
        config: `threshold`, `outliers`, `rotate`, `skip_modules`, `lm_head` and `min_features`; the other fields are
            for torch.compile. With `lm_head` other than "native" a tied embedding shares the output projection's
            weight, which is not rotated then.
        progress: Whether to show a progress bar.

    Returns:
        What became int8, and what did not and why.

    Raises:
        BadWeightError: A weight has NaN or Inf. What comes before it has been converted.
        ConfigError: An option is unknown or has a value that is not allowed.
    """
    if not isinstance(config, Int8Config):
        config = Int8Config.from_options(config)
    targets = plan(model, config)
    chosen = [target for target in targets if target.reason is None and not isinstance(target.module, Int8Module)]
    found = _report(targets, config)  # Before the weights are gone.
    converter = Converter(model, config)
    del targets
    with tqdm(total=len(chosen), desc="Quantizing", disable=not progress or not chosen, leave=False) as bar:
        for target, made in quantized_in_groups(chosen):
            bar.set_postfix_str(target.path, refresh=False)
            converter.put(target, *made)
            bar.update()
            del target  # Which holds a float weight.
    attach(model, config)
    warn_if_all_float(found, "quantize_()")
    return found


def report(model: nn.Module, config: Int8Config) -> Report:
    """What is int8 in a model, and why the rest is not under a config."""
    return _report(plan(model, config), config)


def _report(targets: list[Target], config: Int8Config) -> Report:
    unused = [pattern for pattern in config.skip_modules if not any(matches(pattern, t.path) for t in targets)]
    # The bytes of a d that several weights share count with the first one's.
    first: dict[Hashable, int] = {}
    for target in targets:
        if target.reason is None:
            first.setdefault(target.group, id(target.weight))
    rows = [_row(target, with_d=first.get(target.group) == id(target.weight)) for target in targets]
    return Report(sites=rows, unused_patterns=tuple(unused))


def warn_if_all_float(found: Report, what: str) -> None:
    """Warns where a model has linears and none of them is int8."""
    if found.sites and not found.rewritten:
        message = f"{what} left all {len(found.sites)} linears in float. {found.first_reasons()}"
        warnings.warn(message, Int8Warning, stacklevel=3)


def plan(model: nn.Module, config: Int8Config) -> list[Target]:
    """Every weight that `quantize_` may convert, with its verdict."""
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
            sharing = owners[id(target.weight)]
            tied = any(isinstance(owner, nn.Embedding) for owner in sharing)
            is_head = tied or module is head or matches("lm_head", path)
            reason, detail = _verdict(target, config, is_head, sharing)
            if reason is None and id(module) in in_float and not isinstance(module, Int8Module):
                reason, detail = SkipReason.SAVED_IN_FLOAT, in_float[id(module)]
            if reason is None and isinstance(module, Int8Linear):
                weight_only = module.weight_only
            else:
                weight_only = is_head and config.lm_head == "int8_weight"
            rotation = _rotation_size(target, config, tied=tied)
            found = dataclasses.replace(target, rotation=rotation, weight_only=weight_only)
            targets.append(dataclasses.replace(found, reason=reason, detail=detail))
    targets = _experts_together(targets)
    # Embeddings that are tied to a projection which becomes int8.
    converted = {id(target.weight) for target in targets if target.reason is None}
    targets += [
        Target(path=path, module=module, source="embedding", weight=module.weight)
        for path, module in modules.items()
        if isinstance(module, nn.Embedding) and id(module.weight) in converted
    ]
    return targets


def _rotation_size(target: Target, config: Int8Config, *, tied: bool) -> int:
    """Return by how many inputs a weight is rotated, or will be; a table that is read by rows, too, is not."""
    if isinstance(target.module, Int8Module):
        return target.module.rotation
    return ops.rotation_size(target.shape[-1]) if config.rotates and not tied and target.shape else 1


def _saved_in_float(model: nn.Module) -> dict[int, str]:
    """The modules that a library saves and loads by itself, in float only: their ids and its name.

    PEFT does so with adapters (LoRA and the like, trained copies of layers), sentence-transformers with the layers that
    follow a model.
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
    """The classes, by their modules and names, whose modules are imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if kind is not None)


def _experts_together(targets: list[Target]) -> list[Target]:
    """The weights of one module of experts are int8 all or none: one forward pass reads them."""
    kept = {id(target.module): target for target in targets if target.source == "experts" and target.reason}

    def with_others(target: Target) -> Target:
        other = kept.get(id(target.module))
        if target.source != "experts" or target.reason or other is None:
            return target
        return dataclasses.replace(target, reason=other.reason, detail=f"{other.path}: {other.detail}")

    return [with_others(target) for target in targets]


def output_projection(model: nn.Module) -> nn.Module | None:
    """What a transformers model calls its output embeddings."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):  # Models without one.
        return None


def conv1d() -> type[Any] | None:
    """Transformers' Conv1D, if anybody has imported it."""
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
    """The parameters of a module that follows transformers' interface for experts (`use_experts_implementation`)."""
    if not hasattr(module, "has_gate") or not hasattr(getattr(module, "config", None), "_experts_implementation"):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _verdict(
    target: Target, config: Int8Config, is_head: bool, sharing: list[nn.Module]
) -> tuple[SkipReason | None, str]:
    module, weight = target.module, target.weight
    if isinstance(module, Int8Module):
        return None, ""
    if named := by_name(target.path, config):
        return named
    if is_lazy(weight):
        return SkipReason.UNINITIALIZED, ""
    if is_head and config.lm_head == "native":
        return (SkipReason.TIED if len(sharing) > 1 else SkipReason.LM_HEAD), ""
    if not target.path:
        return SkipReason.MODULE, "it is the model itself; quantize a module that holds it"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Bilinear):
        return SkipReason.FORM, type(module).__name__
    if target.source == "linear" and not _is_plain_linear(module):
        return SkipReason.MODULE, type(module).__name__
    if any(not _is_replaceable(owner) for owner in sharing):
        return SkipReason.MODULE, "it is shared with " + ", ".join(sorted({type(owner).__name__ for owner in sharing}))
    if _is_hooked(module):
        return SkipReason.HOOKED, ""
    if type(weight) is not nn.Parameter:
        return SkipReason.SUBCLASS, type(weight).__name__
    if weight.dtype not in ops.SUPPORTED_DTYPES:
        return SkipReason.DTYPE, f"it is {weight.dtype}"
    *batch, n, k = target.shape
    if batch and config.outliers == "column":
        return SkipReason.COLUMN_BATCHED, ""
    return by_size(k, n, config) or (None, "")


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear itself: subclasses may compute more, or have others read their weight."""
    return type(module) is nn.Linear


def _is_hooked(module: nn.Module) -> bool:
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
        *(module._state_dict_hooks, module._state_dict_pre_hooks),
        *(module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks),
    )
    return "forward" in vars(module) or any(hooks)  # accelerate's take the place of forward.


def _is_replaceable(module: nn.Module) -> bool:
    kind = conv1d()
    return (
        _is_plain_linear(module)
        or (type(module) is nn.Embedding and module.max_norm is None)
        or (kind is not None and type(module) is kind)
        or bool(_expert_weights(module))
    )


def _row(target: Target, *, with_d: bool) -> Site:
    if is_lazy(target.weight):
        return Site(
            path=target.path,
            op=type(target.module).__name__,
            source="",
            shape=(),
            weight=str(id(target.weight)),
            weight_bytes=0,
            bytes_before=0,
            bytes_after=0,
            reason=target.reason,
            detail=target.detail,
        )
    *batch, n, k = target.shape
    numel = target.weight.numel()
    after = numel + 4 * (numel // k if k else 0)
    if with_d and target.rotation > 1:
        after += 4 * math.prod(_d_shape(target))
    dtype = target.module.dtype if isinstance(target.module, Int8Module) else target.weight.dtype
    before = numel * dtype.itemsize
    return Site(
        path=target.path,
        op=type(target.module).__name__,
        source="",
        shape=tuple(map(str, (*batch, "M", k, n))),
        # Tied: one weight, whatever reads it.
        weight=str(id(target.weight)),
        weight_bytes=before,
        bytes_before=before,
        bytes_after=before if target.reason else after,
        reason=target.reason,
        detail=target.detail,
        weight_only=target.weight_only or target.source == "embedding",
        rotation=1 if target.reason else target.rotation,
    )


def _d_shape(target: Target) -> tuple[int, ...]:
    if isinstance(target.module, Int8Module) and target.module.d is not None:
        return tuple(target.module.d.shape)
    *batch, _, k = target.shape
    return (*batch, k) if target.rotates_each else (k,)


class Converter:
    """Puts int8 modules in the place of targets, one at a time.

    Args:
        model: The model that holds them.
        config: The options.
    """

    def __init__(self, model: nn.Module, config: Int8Config) -> None:
        self._config = config
        self._places = _places(model)

    def put(self, target: Target, qweight: Tensor, scale: Tensor, d: Tensor | None) -> Int8Module:
        """Puts a weight that is quantized already, and rotated where there is a d, in the place of a target's."""
        module = target.module
        options: dict[str, Any] = {"dtype": target.weight.dtype}
        if target.source == "embedding":
            assert isinstance(module, nn.Embedding)
            return self._replace(target, Int8Embedding(qweight, scale, padding_idx=module.padding_idx, **options))
        options |= {"threshold": self._config.threshold, "d": d}
        if target.source == "experts":
            name = target.path.rpartition(".")[2]
            new: Int8Module = Int8Experts(qweight, scale, transposed=target.transposed, **options)
            delattr(module, name)
            new.path = target.path
            module.add_module(name, new.train(module.training))
            use_int8_experts(module)
            return new
        options |= {"outliers": self._config.outliers, "weight_only": target.weight_only, "source": target.source}
        bias = module._parameters.get("bias")
        return self._replace(target, Int8Linear(qweight, scale, bias, **options))

    def holds(self, target: Target) -> bool:
        """Whether a target is still to be converted."""
        if target.source == "experts":
            return target.path.rpartition(".")[2] in target.module._parameters
        return id(target.module) in self._places

    def _replace(self, target: Target, new: Int8Module) -> Int8Module:
        new.path = target.path
        new.train(target.module.training)
        replace(self._places.pop(id(target.module)), new)
        return new


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What it takes to make the int8 modules of a model again, besides their tensors, by their paths."""
    return {path: _description(module) for path, module in model.named_modules() if isinstance(module, Int8Module)}


# The attributes of int8 modules that a description lists; each class has some of them.
_OPTIONS = ("threshold", "outliers", "weight_only", "transposed", "padding_idx")


def _description(module: Int8Module) -> dict[str, Any]:
    options = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
    dtype = str(module.dtype).removeprefix("torch.")
    return {"source": module.source, "dtype": dtype, "rotation": module.rotation, **options}


def put_described(model: nn.Module, described: Mapping[str, Mapping[str, Any]], advice: str) -> list[Target]:
    """Puts int8 modules without data where a description has them.

    Args:
        model: The float model.
        described: What `describe` made of the model that is to be loaded.
        advice: What to do where the two do not fit, for messages.

    Returns:
        What was replaced.

    Raises:
        CheckpointError: The description is damaged or of another model.
    """
    modules = dict(model.named_modules())
    # What could be int8 at all; which of them are, the description says.
    targets = {target.path: target for target in plan(model, Int8Config(lm_head="int8", min_features=1))}
    converters: dict[tuple[float | None, str], Converter] = {}
    put = []
    for path, said in described.items():
        options = {**said, "rotation": said.get("rotation") or 1}  # Older versions rotated nothing.
        source, dtype = options.get("source"), getattr(torch, str(options.get("dtype")), None)
        if source not in get_args(Source) or dtype not in ops.SUPPORTED_DTYPES:
            raise CheckpointError(
                f"{path}: source={source!r}, dtype={options.get('dtype')!r} describe no int8 module. {advice}"
            )
        if source == "embedding" and type(embedding := modules.get(path)) is nn.Embedding:
            # Not tied to a projection yet; it is once both have the checkpoint's tensor.
            targets[path] = Target(path=path, module=embedding, source="embedding", weight=embedding.weight)
        if (target := targets.get(path)) is None or target.source != source:
            found = target.source if target else type(modules[path]).__name__ if path in modules else "nothing"
            raise CheckpointError(f"{path} is an int8 {source} in the checkpoint, in the model {found}. {advice}")
        if target.reason is not None:
            why = f"{target.reason.value} {f'({target.detail})' if target.detail else ''}".strip()
            raise CheckpointError(f"{path} is int8 in the checkpoint, but cannot be in the model: {why}. {advice}")
        if source == "experts" and options.get("outliers") == "column":
            raise CheckpointError(
                f"{path} is int8 by columns in the checkpoint, which experts cannot be any more. Quantize the float "
                "model again"
            )
        given = {name: options[name] for name in ("threshold", "outliers") if name in options}
        try:
            config = Int8Config(**given)
        except ConfigError as error:
            raise CheckpointError(f"{path} has an option that is not allowed: {error}. {advice}") from error
        key = (config.threshold, config.outliers)
        if key not in converters:
            converters[key] = Converter(model, config)
        never = source == "embedding" or options.get("outliers") == "column"
        allowed = dict.fromkeys((1, 1 if never else ops.rotation_size(target.shape[-1])))
        if options["rotation"] not in allowed:
            raise CheckpointError(
                f"{path} has the rotation {options['rotation']!r} in the checkpoint; what it can have is "
                f"{' or '.join(map(str, allowed))}. {advice}"
            )
        target = dataclasses.replace(
            target, weight_only=options.get("weight_only") is True, rotation=options["rotation"]
        )
        new = converters[key].put(target, *without_data(target))
        # What was cast before it was saved comes back so, whatever the model is made of.
        new.dtype = dtype
        if (made := _description(new)) != options:
            raise CheckpointError(f"{path}: the checkpoint was saved with {options}, the model has {made}. {advice}")
        put.append(target)
    return put


def make_rotations(group: Sequence[Target]) -> None:
    """Make what rotates the targets of one `group`, from the weights of all of them; `quantized` looks it up."""
    if group and group[0].rotation > 1 and not group[0].weight.is_meta:
        members = [(target.weight, target.view) for target in group]
        for member in members:
            STORE.share([member], members, each=group[0].rotates_each)


def quantized_in_groups(
    targets: list[Target], rotate: Callable[[Sequence[Target]], None] = make_rotations
) -> Iterator[tuple[Target, Made]]:
    """Quantize weights, one after the other and each on its device, a weight that several targets share once.

    Args:
        targets: What to quantize, which is taken out of the list: a caller that keeps no float weight needs no memory
            for all.
        rotate: Decides what targets of one `group` are rotated with, before the first of them is quantized.

    Yields:
        The targets in their order, with their weights in int8.

    Raises:
        BadWeightError: A weight has NaN or Inf.
    """
    groups: dict[Hashable, list[Target]] = collections.defaultdict(list)
    for target in targets:
        groups[target.group].append(target)
    sharing = collections.Counter(id(target.weight) for target in targets)
    shared: dict[int, Made] = {}
    targets.reverse()
    while targets:
        target = targets.pop()
        rotate(groups.pop(target.group, ()))
        key = id(target.weight)
        made = shared.get(key) or quantized(target)
        if sharing[key] > 1:
            shared[key] = made
        yield target, made
        del target


def quantized(target: Target) -> Made:
    """Return a target's weight in int8, its scales and its d; without data where the weight has none.

    Raises:
        BadWeightError: The weight has NaN or Inf.
    """
    if target.weight.is_meta:
        return without_data(target)
    member, d = (target.weight, target.view), None
    if target.rotation > 1:
        d = STORE.share([member], each=target.rotates_each)
    return *quantize_checked(*member, target.path, d), d


def saving_models(model: nn.Module) -> list[tuple[str, nn.Module, Integration]]:
    """Return the models inside a module, itself included, that save themselves with `save_pretrained`.

    The integration of a library that is imported is imported here, even if the module holds no model of that library:
    the module may be a part of one, which is found when the whole model is saved.

    Returns:
        Path, model and the integration of its library; outer models before inner ones.
    """
    kinds: dict[type[Any], Integration] = {}
    for library in LIBRARIES.values():
        module, name = library.base
        kind = getattr(sys.modules.get(module), name, None)
        if kind is None:
            continue
        try:
            kinds[kind] = library.integration()
        except ImportError:  # A version of the library that is not supported, which matters only for its models.
            if any(isinstance(inner, kind) for inner in model.modules()):
                raise
    return [
        (path, inner, integration)
        for path, inner in model.named_modules()
        for kind, integration in kinds.items()
        if isinstance(inner, kind)
    ]


def attach(model: nn.Module, config: Int8Config) -> None:
    """Have every model of transformers or diffusers inside a module, or the module itself, save and load as int8.

    Args:
        model: A module with int8 modules; models inside it that have none stay as they are.
        config: The options that led to it.
    """
    outer: list[str] = []
    for path, inner, integration in saving_models(model):
        if any(isinstance(module, Int8Module) for module in inner.modules()):
            nested = any(not above or path.startswith(f"{above}.") for above in outer)
            integration.attach(inner, config, nested=nested)
            outer.append(path)


def without_data(target: Target) -> Made:
    """Return tensors on the meta device like those of a target in int8: qweight, scale and d."""
    # With dtypes: while transformers loads a model, the default is the model's.
    scale = torch.empty(target.shape[:-1], dtype=torch.float32, device="meta")
    d = None if target.rotation == 1 else torch.empty(_d_shape(target), dtype=torch.float32, device="meta")
    return torch.empty(target.shape, dtype=torch.int8, device="meta"), scale, d


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module of a model is: a module may have several parents."""
    places: dict[int, list[tuple[nn.Module, str]]] = collections.defaultdict(list)
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                places[id(child)].append((module, name))
    return places


def replace(places: list[tuple[nn.Module, str]], new: nn.Module) -> None:
    """Puts a module in all places where another was."""
    for parent, name in places:
        parent._modules[name] = new


def use_int8_experts(module: Any) -> None:
    """Has a module of experts run int8 weights; the others of its model, and the model's config, stay as they are."""
    name = experts_implementation()
    if module.config._experts_implementation != name:
        config = copy.copy(module.config)
        config._experts_implementation = name
        config._float_experts = module.config
        module.config = config


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes the int8 modules of a model ordinary ones again, in place, with the values that int8 stands for.

    Ties are kept, and a model of transformers saves and loads as a float one again.

    Args:
        model: A model that `quantize_` converted, or that was loaded in int8.
        dtype: Of the float weights; None takes that of the model before it was quantized, or of a `.to(dtype)` since.

    Raises:
        ModelError: Parts of the model are offloaded, so their weights are not in memory. Nothing is changed then.
    """
    int8 = {path: module for path, module in model.named_modules() if isinstance(module, Int8Module)}
    for path, module in int8.items():
        if module.qweight.is_meta and "forward" in vars(module):
            raise ModelError(f"{path} is offloaded, so its weight is not here. Load the model without offloading first")
    places = _places(model)
    weights: dict[int, nn.Parameter] = {}
    for module in int8.values():
        key = id(module.qweight)
        if key not in weights:
            weight = ops.dequantize_weight(module.qweight, module.scale, module.d, dtype or module.dtype)
            weights[key] = nn.Parameter(weight.mT.contiguous() if module.is_transposed else weight)
        if isinstance(module, Int8Experts):
            for parent, name in places[id(module)]:
                delattr(parent, name)
                parent.register_parameter(name, weights[key])
                parent.config = getattr(parent.config, "_float_experts", parent.config)
        else:
            replace(places[id(module)], _float_module(module, weights[key]))
    for _, inner, integration in saving_models(model) if int8 else ():
        integration.detach(inner)


def _float_module(module: Any, weight: nn.Parameter) -> nn.Module:
    """The module that an int8 module was made from, with a weight given."""
    new: nn.Module
    with torch.device("meta"):  # Nothing to initialize.
        if isinstance(module, Int8Embedding):
            new = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        elif module.source == "conv1d":
            from transformers.pytorch_utils import Conv1D

            new = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        else:
            new = nn.Linear(module.in_features, module.out_features)
    new.weight = weight
    if "bias" in module._parameters:
        new.register_parameter("bias", module.bias)
    return new.train(module.training)


def memory_footprint(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers take, and the int8 weights that compiled graphs keep of them.

    What is shared counts once, a float weight that was freed not at all; tensors on the meta device count as if they
    had data.
    """
    sizes: dict[int, int] = collections.defaultdict(int)
    limits: dict[int, int] = {}
    seen = set()

    def add(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        limits[storage._cdata] = storage.nbytes()
        view = (storage._cdata, tensor.storage_offset(), tensor.shape)
        if view not in seen:
            seen.add(view)
            sizes[storage._cdata] += tensor.numel() * tensor.element_size()

    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if is_lazy(tensor):
            continue
        add(tensor)
        for weight in STORE.weights(tensor).values():
            for kept in (weight.qweight, weight.scale, weight.d):
                if kept is not None:
                    add(kept)
    return sum(min(size, limits[storage]) for storage, size in sizes.items())
