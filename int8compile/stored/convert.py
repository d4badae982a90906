"""Convert a model's linears to int8 modules, and what belongs to it.

- Converting: `quantize_`, and its parts `Converter` and `quantized_one_by_one`, which loading uses too.
- Describing int8 modules so that a checkpoint can make them again: `describe`, `put_described`.
- Hooks that make models of transformers and diffusers save as int8: `attach`, `saving_models`.
- Sizes: `memory_footprint`, and the bytes in reports.
- Converting back: `dequantize_`.

Words:
    target: A weight that may be converted, see `Target`.
    d: The factors of a weight's rotation, [K] float32, or [B, K] for experts with a rotation each.
    group: The weights that share a d, because they read the same activations.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from int8compile import ops
from int8compile.config import Int8Config, matches
from int8compile.errors import CheckpointError, ConfigError, Int8Warning, ModelError
from int8compile.progress import progress_bar
from int8compile.report import Report
from int8compile.sites import Site
from int8compile.stored.libraries import LIBRARIES, Integration, experts_implementation
from int8compile.stored.modules import Int8Embedding, Int8Experts, Int8Linear, Int8Module, Source
from int8compile.stored.targets import Target as Target
from int8compile.stored.targets import plan as plan
from int8compile.weights import STORE, quantize_checked

# An int8 weight [..., N, K], its scales [..., N], and its d; None without a rotation.
Made: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


def quantize_(
    model: nn.Module, config: Int8Config | Mapping[str, Any] | None = None, *, progress: bool = True
) -> Report:
    """Convert a model's linear layers to int8 modules, in place.

    nn.Linear and transformers' Conv1D become `Int8Linear`, its fused experts `Int8Experts`. Embeddings that are tied to
    a converted weight become `Int8Embedding`. Each float weight is released before the next is quantized, except for
    tied weights, which are released at the end. The model runs eagerly, and under torch.compile with any backend. A
    second call with the same config changes nothing.

    Args:
        model: The model. On the meta device it becomes a skeleton, to load int8 weights into.
        config: `threshold`, `outliers`, `rotate`, `skip_modules`, `modules`, `lm_head` and `min_features`; the other
            fields are for torch.compile. With `lm_head` other than "native" a tied embedding shares the output
            projection's weight, which is not rotated then.
        progress: Whether to show a progress bar.

    Returns:
        A row for each linear: whether it became int8, and why not.

    Raises:
        BadWeightError: A weight has NaN or Inf. The modules before it have been converted.
        ConfigError: An option is unknown or has a value that is not allowed.
    """
    config = Int8Config.from_options(config)
    targets = plan(model, config)
    chosen = [target for target in targets if target.reason is None and not isinstance(target.module, Int8Module)]
    found = _report(targets, config)  # Before the weights are gone.
    converter = Converter(model, config)
    del targets
    with progress_bar(total=len(chosen), desc="Quantizing", shown=progress and bool(chosen)) as bar:
        for target, made in quantized_one_by_one(chosen):
            bar.set_postfix_str(target.path, refresh=False)
            converter.put(target, *made)
            bar.update()
            del target  # It holds a float weight.
    attach(model, config)
    warn_if_all_float(found, "quantize_()")
    return found


def report(model: nn.Module, config: Int8Config) -> Report:
    """Return a report on a model's linears: which are int8, and why the others are not under a config."""
    return _report(plan(model, config), config)


def _report(targets: list[Target], config: Int8Config) -> Report:
    unused = [pattern for pattern in config.patterns if not any(matches(pattern, t.path) for t in targets)]
    # The weights of a group share one d. Its bytes are counted once, with the first of them.
    first: dict[Hashable, int] = {}
    for target in targets:
        if target.reason is None:
            first.setdefault(target.group, id(target.weight))
    rows = [_row(target, with_d=first.get(target.group) == id(target.weight)) for target in targets]
    return Report(sites=rows, unused_patterns=tuple(unused))


def warn_if_all_float(found: Report, what: str) -> None:
    """Warn if a model has linears and none of them is int8."""
    if found.sites and not found.rewritten:
        message = f"{what} left all {len(found.sites)} linears in float. {found.first_reasons()}"
        warnings.warn(message, Int8Warning, stacklevel=3)


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
        # Tied modules have one weight.
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
    """Replaces targets by int8 modules, one at a time.

    Args:
        model: The model that holds them.
        config: The options.
    """

    def __init__(self, model: nn.Module, config: Int8Config) -> None:
        self._config = config
        self._places = places_of(model)

    def put(self, target: Target, qweight: Tensor, scale: Tensor, d: Tensor | None) -> Int8Module:
        """Replace a target by an int8 module with a quantized weight, which is rotated if there is a d."""
        module, config = target.module, self._config.of(target.path)
        options: dict[str, Any] = {"dtype": target.weight.dtype}
        if target.source == "embedding":
            assert isinstance(module, nn.Embedding)
            return self._replace(target, Int8Embedding(qweight, scale, padding_idx=module.padding_idx, **options))
        options |= {"threshold": config.threshold, "d": d}
        if target.source == "experts":
            name = target.path.rpartition(".")[2]
            new: Int8Module = Int8Experts(qweight, scale, transposed=target.transposed, **options)
            new.path = target.path
            replace([(module, name)], new.train(module.training))
            return new
        options |= {"outliers": config.outliers, "weight_only": target.weight_only, "source": target.source}
        bias = module._parameters.get("bias")
        return self._replace(target, Int8Linear(qweight, scale, bias, **options))

    def holds(self, target: Target) -> bool:
        """Return whether a target is still to be converted."""
        if target.source == "experts":
            return target.path.rpartition(".")[2] in target.module._parameters
        return id(target.module) in self._places

    def _replace(self, target: Target, new: Int8Module) -> Int8Module:
        new.path = target.path
        new.train(target.module.training)
        replace(self._places.pop(id(target.module)), new)
        return new


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return a description of each int8 module, by path, from which it can be made again, given its tensors."""
    return {path: _description(module) for path, module in model.named_modules() if isinstance(module, Int8Module)}


# Attributes of int8 modules that a description lists. Each class has some of them.
_OPTIONS = ("threshold", "outliers", "weight_only", "transposed", "padding_idx")


def _description(module: Int8Module) -> dict[str, Any]:
    options = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
    dtype = str(module.dtype).removeprefix("torch.")
    return {"source": module.source, "dtype": dtype, "rotation": module.rotation, **options}


def put_described(model: nn.Module, described: Mapping[str, Mapping[str, Any]], advice: str) -> list[Target]:
    """Replace the modules of a float model that a description lists by int8 modules without data.

    Args:
        model: The float model.
        described: The result of `describe` for the model that is to be loaded.
        advice: The remedy if the two do not fit, for messages.

    Returns:
        The targets that were replaced.

    Raises:
        CheckpointError: The description is damaged or of another model.
    """
    modules = dict(model.named_modules())
    # Everything that can be int8. The description lists the actual int8 modules.
    targets = {target.path: target for target in plan(model, Int8Config(lm_head="int8", min_features=1))}
    converters: dict[tuple[float | None, str], Converter] = {}
    put = []
    for path, said in described.items():
        options = {**said, "rotation": said.get("rotation") or 1}  # Older versions did not rotate.
        if options.get("source") == "embedding" and type(embedding := modules.get(path)) is nn.Embedding:
            # It is tied to a projection only when both have the checkpoint's tensor.
            targets[path] = Target(path=path, module=embedding, source="embedding", weight=embedding.weight)
        target = _described_target(path, options, targets.get(path), modules.get(path), advice)
        given = {name: options[name] for name in ("threshold", "outliers") if name in options}
        try:
            config = Int8Config(**given)
        except ConfigError as error:
            raise CheckpointError(f"{path} has an option that is not allowed: {error}. {advice}") from error
        key = (config.threshold, config.outliers)
        if key not in converters:
            converters[key] = Converter(model, config)
        never = target.source == "embedding" or config.outliers == "column"
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
        # The dtype of the saved module, which may differ from the model's.
        new.dtype = getattr(torch, options["dtype"])
        if (made := _description(new)) != options:
            raise CheckpointError(f"{path}: the checkpoint was saved with {options}, the model has {made}. {advice}")
        put.append(target)
    return put


def _described_target(
    path: str, options: Mapping[str, Any], target: Target | None, module: nn.Module | None, advice: str
) -> Target:
    """Return the target of a described module. Raise `CheckpointError` if it cannot be such a module."""
    source, dtype = options.get("source"), getattr(torch, str(options.get("dtype")), None)
    if source not in get_args(Source) or dtype not in ops.SUPPORTED_DTYPES:
        raise CheckpointError(
            f"{path}: source={source!r}, dtype={options.get('dtype')!r} describe no int8 module. {advice}"
        )
    if target is None or target.source != source:
        found = target.source if target else type(module).__name__ if module is not None else "nothing"
        raise CheckpointError(f"{path} is an int8 {source} in the checkpoint, in the model {found}. {advice}")
    if target.reason is not None:
        why = target.reason.why(target.detail)
        raise CheckpointError(f"{path} is int8 in the checkpoint, but cannot be in the model: {why}. {advice}")
    if source == "experts" and options.get("outliers") == "column":
        raise CheckpointError(
            f"{path} is int8 by columns in the checkpoint, which experts cannot be any more. Quantize the float "
            "model again"
        )
    return target


def make_rotations(group: Sequence[Target]) -> None:
    """Compute the rotation d of one group from all of its weights.

    The weight store keeps it with each parameter; `quantized` gets it there.
    """
    if group and group[0].rotation > 1 and not group[0].weight.is_meta:
        members = [(target.weight, target.view) for target in group]
        for member in members:
            STORE.share([member], among=members, each=group[0].rotates_each)


def quantized_one_by_one(
    targets: list[Target], rotate: Callable[[Sequence[Target]], None] = make_rotations
) -> Iterator[tuple[Target, Made]]:
    """Quantize weights one after the other, each on its device. A weight that several targets share is quantized once.

    The rotation is chosen once per group, before its first weight.

    Args:
        targets: The targets, which are removed from the list: a caller that keeps no float weight then needs memory
            for one at a time.
        rotate: Chooses the rotation of the targets of one group.

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
    """Return a target's weight in int8, its scales and its d; they have no data if the weight has none.

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

    For each library that is imported, its integration is imported too, even if the module holds none of its models.
    Importing it registers int8 with the library and replaces `save_pretrained` of the library's models: the module may
    be a part of such a model, which is saved as a whole later.

    Returns:
        Path, model and the integration of its library; outer models come before inner models.
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
    """Make every model of transformers or diffusers inside a module, or the module itself, save and load as int8.

    Args:
        model: A module with int8 modules. Models inside it that have none stay as they are.
        config: The options with which it was converted.
    """
    outer: list[str] = []
    for path, inner, integration in saving_models(model):
        if any(isinstance(module, Int8Module) for module in inner.modules()):
            nested = any(not above or path.startswith(f"{above}.") for above in outer)
            integration.attach(inner, config, nested=nested)
            outer.append(path)


def without_data(target: Target) -> Made:
    """Return the qweight, scale and d of a target as tensors on the meta device."""
    # The dtypes are explicit, because transformers sets the default dtype while it loads a model.
    scale = torch.empty(target.shape[:-1], dtype=torch.float32, device="meta")
    d = None if target.rotation == 1 else torch.empty(_d_shape(target), dtype=torch.float32, device="meta")
    return torch.empty(target.shape, dtype=torch.int8, device="meta"), scale, d


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the parents of each module, with its names there; a module may have several parents."""
    places: dict[int, list[tuple[nn.Module, str]]] = collections.defaultdict(list)
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                places[id(child)].append((module, name))
    return places


def replace(places: Iterable[tuple[Any, str]], new: nn.Module | nn.Parameter) -> None:
    """Put a module, or the float weight of experts, in all places of another.

    A module of experts runs its int8 weights from the first on, and float weights once it has no other.
    """
    for parent, name in places:
        if isinstance(new, nn.Parameter):
            parent._modules.pop(name, None)
            parent.register_parameter(name, new)
            if not any(isinstance(module, Int8Experts) for module in parent.children()):
                parent.config = getattr(parent.config, "_float_experts", parent.config)
            continue
        if isinstance(new, Int8Experts):
            parent._parameters.pop(name, None)
            _use_int8_experts(parent)
        parent._modules[name] = new


def _use_int8_experts(module: Any) -> None:
    """Make a module of experts run int8 weights. Other modules, and the model's config, stay as they are."""
    name = experts_implementation()
    if module.config._experts_implementation != name:
        config = copy.copy(module.config)
        config._experts_implementation = name
        config._float_experts = module.config
        module.config = config


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Convert the int8 modules of a model back to float modules, in place, with the values that int8 stands for.

    Ties are kept, and a model of transformers saves and loads in float again.

    Args:
        model: A model that `quantize_` converted, or that was loaded in int8.
        dtype: The dtype of the float weights. None takes the model's dtype before it was quantized, or that of a
            `.to(dtype)` since.

    Raises:
        ModelError: Parts of the model are offloaded, so their weights are not in memory. Nothing is changed then.
    """
    int8 = {path: module for path, module in model.named_modules() if isinstance(module, Int8Module)}
    for path, module in int8.items():
        # accelerate has hooked a module that has a `forward` of its own.
        if module.qweight.is_meta and "forward" in vars(module):
            raise ModelError(f"{path} is offloaded, so its weight is not here. Load the model without offloading first")
    places = places_of(model)
    weights: dict[int, nn.Parameter] = {}
    for module in int8.values():
        key = id(module.qweight)
        if key not in weights:
            weight = ops.dequantize_weight(module.qweight, module.scale, module.d, dtype or module.dtype)
            weights[key] = nn.Parameter(weight.mT.contiguous() if module.is_transposed else weight)
        is_weight = isinstance(module, Int8Experts)
        replace(places[id(module)], weights[key] if is_weight else _float_module(module, weights[key]))
    for _, inner, integration in saving_models(model) if int8 else ():
        integration.detach(inner)


def _float_module(module: Any, weight: nn.Parameter) -> nn.Module:
    """Return the float module that an int8 module was made from, with a given weight."""
    new: nn.Module
    with torch.device("meta"):  # This skips the initialization.
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
    """Return the bytes of a model's parameters and buffers, and of the int8 weights that compiled graphs use.

    Shared memory counts once, and freed float weights do not count. Tensors on the meta device count as if they had
    data.
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

    # The storage of a freed float weight has 0 bytes, which is its limit below.
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if is_lazy(tensor):
            continue
        add(tensor)
        for weight in STORE.weights(tensor).values():
            for kept in (weight.qweight, weight.scale, weight.d):
                if kept is not None:
                    add(kept)
    return sum(min(size, limits[storage]) for storage, size in sizes.items())
