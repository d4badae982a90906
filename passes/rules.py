"""Rules that decide which linears become int8. Every rule that leaves one in float returns a `SkipReason`.

`torch.compile` judges the calls in a graph, `quantize_` the modules of a model. Rules for both take a `Candidate`, so
the same linear is judged alike; rules about graphs are here, rules about modules in `int8compile.stored.targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.fx import Node

from int8compile.config import Int8Config, matches
from int8compile.errors import InputError
from int8compile.ops import MAX_K, SUPPORTED_DTYPES, rotation_size
from int8compile.passes.linear_site import LinearSite
from int8compile.passes.static import ALIASES, SAME_VALUES, changed_in_graph, traced
from int8compile.sites import SkipReason, Verdict

__all__ = ["RULES", "Candidate", "LinearSite", "Rule", "Verdict", "finite", "first_verdict", "rotation_of"]


class Candidate(Protocol):
    """A linear that may become int8, whether it was found as a call in a graph or as a module.

    Attributes:
        path: Module path.
        is_lm_head: Whether it is the model's output projection.
        tied: Whether an embedding reads its weight too.
        subclass: The name of the weight's class where that class is in the way, otherwise "".
        dtypes: The dtypes that must be supported.
        batched: Whether its weight is several matrices.
        features: K and N.
    """

    path: str
    is_lm_head: bool
    tied: bool
    subclass: str
    dtypes: tuple[torch.dtype, ...]
    batched: bool
    features: tuple[int, int]

    def weight_only(self, config: Int8Config) -> bool:
        """Return whether only its weight becomes int8."""


Rule = Callable[[Any, Int8Config], Verdict]


def first_verdict(rules: Iterable[Callable[..., Verdict]], *subject: Any) -> Verdict:
    """Return the first verdict that a rule has on a subject, None where all let it pass."""
    return next((found for rule in rules if (found := rule(*subject))), None)


def rotation_of(k: int, config: Int8Config, *, tied: bool) -> int:
    """Return how many of the K inputs of a linear are mixed with each other, 1 for none.

    A weight that an embedding reads by rows, too, is never rotated.
    """
    return rotation_size(k) if config.rotates and not tied else 1


def skipped_by_name(site: Candidate, config: Int8Config) -> Verdict:
    """Apply `skip_modules`."""
    matched = [pattern for pattern in config.skip_modules if matches(pattern, site.path)]
    return (SkipReason.NAME, f"pattern {matched[0]!r}") if matched else None


def lm_head(site: Candidate, config: Int8Config) -> Verdict:
    """Leave the output projection in float unless the configuration asks for it."""
    if config.lm_head != "native" or not site.is_lm_head:
        return None
    return (SkipReason.TIED if site.tied else SkipReason.LM_HEAD), ""


def plain_tensor(site: Candidate, config: Int8Config) -> Verdict:
    """Require a weight that is an ordinary tensor."""
    return (SkipReason.SUBCLASS, site.subclass) if site.subclass else None


def supported_dtypes(site: Candidate, config: Int8Config) -> Verdict:
    """Require float dtypes that the operators take."""
    wrong = [dtype for dtype in site.dtypes if dtype not in SUPPORTED_DTYPES]
    return (SkipReason.DTYPE, f"it is {wrong[0]}") if wrong else None


def no_batch_by_column(site: Candidate, config: Int8Config) -> Verdict:
    """Leave batched weights in float with outliers="column", which LLM.int8() defines for a single matrix only."""
    by_column = config.outliers == "column" and not site.weight_only(config)
    return (SkipReason.COLUMN_BATCHED, "") if site.batched and by_column else None


def size(site: Candidate, config: Int8Config) -> Verdict:
    """Require a K whose sums are exact in int32, and K and N large enough to pay."""
    k, n = site.features
    if k > MAX_K:
        return SkipReason.LARGE, f"K={k}"
    if min(k, n) < config.min_features:
        return SkipReason.SMALL, f"K={k}, N={n}, min_features={config.min_features}"
    return None


def plain_matmul(site: LinearSite, config: Int8Config) -> Verdict:
    """Require a call that is a matmul and nothing else."""
    call = site.contraction
    if call.refused:
        return SkipReason.FORM, call.refused
    if site.roles is None:
        return SkipReason.FORM, f"{','.join(map('.'.join, call.labels))}->{'.'.join(call.out)} is not a plain matmul"
    if isinstance(call.alpha, Node) or isinstance(call.beta, Node):
        return SkipReason.FORM, "its alpha or beta is computed"
    if site.batched and site.weight_only(config):
        return SkipReason.FORM, "lm_head='int8_weight' has no batched form"
    return None


def not_transformed(site: LinearSite, config: Int8Config) -> Verdict:
    """Leave calls in float that torch.func differentiates: lowered operators do not take its wrapped tensors."""
    return (SkipReason.TRANSFORMED, "") if site.transformed else None


def dense_activation(site: LinearSite, config: Int8Config) -> Verdict:
    """Require an activation that is an ordinary tensor: the operators take rows of numbers and nothing else."""
    x = traced(site.x)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return SkipReason.ACTIVATION, "it is inside torch.vmap"
    if x.is_nested:
        return SkipReason.ACTIVATION, "it is a nested tensor"
    return (SkipReason.ACTIVATION, f"its layout is {x.layout}") if x.layout != torch.strided else None


def static_parameter(site: LinearSite, config: Int8Config) -> Verdict:
    """Require a weight that is a parameter, or a view of one, that the graph does not write to."""
    if site.problem is not None:
        return site.problem, ""
    assert site.static is not None
    if site.constant:
        return SkipReason.COMPUTED, "both factors are parameters"
    if site.held is not None:
        # The weight as the module holds it is read where the product stands. A copy has the values from before the
        # write, and other views are taken before the graph runs.
        copied = any(node.target in SAME_VALUES - ALIASES for node in site.static.chain)
        as_it_is = not copied and site.roles is not None and site.held.is_all(site.view())
        return (SkipReason.CHANGED, "") if site.held.is_changed() and not as_it_is else None
    return (SkipReason.CHANGED, "") if changed_in_graph(site.static, site.sharing) else None


def float_activation(site: LinearSite, config: Int8Config) -> Verdict:
    """Refuse integer activations with a float weight.

    Raises:
        InputError: The activation is of integers. Eager mode refuses that too, but the fake tensors that graphs are
            captured with do not, so it would come out of Inductor as an internal error.
    """
    assert site.parameter is not None
    x = traced(site.x)
    if site.parameter.is_floating_point() and not x.is_floating_point() and not x.is_complex():
        raise InputError(
            f"{site.path}: its input is {x.dtype} and its weight {site.parameter.dtype}. Convert the input, "
            f"e.g. x.to({site.parameter.dtype})"
        )
    return None


def not_trained(site: LinearSite, config: Int8Config) -> Verdict:
    """Leave weights in float that may be waiting for a gradient, which int8 weights do not get."""
    assert site.parameter is not None
    return (SkipReason.TRAINED, "") if site.grad_mode and site.parameter.requires_grad else None


def finite(site: LinearSite, config: Int8Config) -> Verdict:
    """Require a weight without NaN or Inf. Only `explain` asks: when compiling, the weight store raises."""
    assert site.static is not None
    assert site.parameter is not None
    if site.parameter.is_meta or site.held is not None:
        return None
    weight = site.static.of(site.parameter)
    bad = weight.numel() - int(weight.isfinite().sum())
    return (SkipReason.BAD_VALUES, f"{bad} of {weight.numel()}") if bad else None


# The first rule with a verdict gives the reason, so the options that the user set come first.
RULES: tuple[Rule, ...] = (
    skipped_by_name,
    lm_head,
    plain_matmul,
    not_transformed,
    dense_activation,
    static_parameter,
    plain_tensor,
    float_activation,
    supported_dtypes,
    not_trained,
    no_batch_by_column,
    size,
)
