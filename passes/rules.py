"""Which sites are rewritten. Every rule that leaves one in float says why: a `SkipReason` and what it found."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from int8compile import hardware
from int8compile.config import Int8Config
from int8compile.errors import InputError
from int8compile.ops import MAX_K, SUPPORTED_DTYPES
from int8compile.passes.contraction import Contraction, Labels, Roles, merged_size, permutation
from int8compile.passes.module_weights import ModuleWeight
from int8compile.passes.static import (
    ALIASES,
    SAME_VALUES,
    StaticWeight,
    WeightView,
    changed_in_graph,
    traced,
    weight_view,
)
from int8compile.report import SkipReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSite:
    """A matmul of an activation with something that plays the part of a weight.

    Attributes:
        node: The call in the graph.
        path: Module path.
        contraction: How the call is written.
        position: Position of the activation among the contraction's operands.
        roles: What each label is; None where the call is no plain matmul.
        static: The parameter behind the weight; None where the weight is no view of one.
        parameter: That parameter itself.
        held: What stands for the weight, where the parameter is one of an int8 module.
        problem: Why there is no static weight, where there is none.
        constant: Whether it is a matmul of two parameters, as in a merge of LoRA weights.
        sharing: The inputs and attributes of the graph that share the parameter's memory, that itself among them.
        tied: Whether an embedding of the graph reads the parameter too.
        grad_mode: Whether gradients are recorded where the call stands.
        transformed: Whether torch.func differentiates the call inside the graph.
    """

    node: Node
    path: str
    contraction: Contraction
    position: int
    roles: Roles | None
    static: StaticWeight | None
    parameter: Tensor | None
    held: ModuleWeight | None
    problem: SkipReason | None
    constant: bool
    sharing: Sequence[Node]
    tied: bool
    grad_mode: bool
    transformed: bool

    @property
    def x(self) -> Node:
        """The activation."""
        return self.contraction.operands[self.position]

    @property
    def x_labels(self) -> Labels:
        """A label for each of the activation's dimensions."""
        return self.contraction.labels[self.position]

    @property
    def weight(self) -> Node:
        """The weight operand."""
        return self.contraction.operands[1 - self.position]

    @property
    def weight_labels(self) -> Labels:
        """A label for each of the weight's dimensions."""
        return self.contraction.labels[1 - self.position]

    @property
    def is_lm_head(self) -> bool:
        """Whether it is the model's output projection: by its name, or because an embedding shares its weight."""
        return self.tied or matches("lm_head", self.path)

    def view(self) -> WeightView:
        """The weight as the operators take it: [N, K], or [B, N, K] where there are batch dimensions."""
        assert self.roles is not None
        assert self.static is not None
        batch, summed, _, outputs = self.roles
        sizes = self.sizes()
        shape = (merged_size(sizes, outputs), merged_size(sizes, summed))
        order = permutation(self.weight_labels, (*batch, *outputs, *summed, *self.contraction.ones))
        return weight_view(self.static.tensor, order, (merged_size(sizes, batch), *shape) if batch else shape)

    def sizes(self) -> dict[str, Any]:
        """The size of each label; symbolic where it changes from call to call."""
        sizes: dict[str, Any] = {}
        # The weight last: its sizes are numbers where the activation's may be symbols for the same.
        for operand, labels in ((self.x, self.x_labels), (self.weight, self.weight_labels)):
            for label, size in zip(labels, traced(operand).shape, strict=True):
                if label not in sizes or not (isinstance(size, int) and size == 1):  # A 1 may be broadcast.
                    sizes[label] = size
        return sizes


Verdict = tuple[SkipReason, str] | None
Rule = Callable[[LinearSite, Int8Config], Verdict]


def matches(pattern: str, path: str) -> bool:
    """Whether a glob pattern matches whole components of a module path."""
    return fnmatch.fnmatchcase(f".{path}.", f"*.{pattern}.*")


def skipped_by_name(site: LinearSite, config: Int8Config) -> Verdict:
    """`skip_modules`."""
    return by_name(site.path, config)


def by_name(path: str, config: Int8Config) -> Verdict:
    """The verdict of `skip_modules` on a module path."""
    matched = [pattern for pattern in config.skip_modules if matches(pattern, path)]
    return (SkipReason.NAME, f"pattern {matched[0]!r}") if matched else None


def lm_head(site: LinearSite, config: Int8Config) -> Verdict:
    """The output projection stays native, found by its name or by sharing its weight with the embedding."""
    if config.lm_head != "native" or not site.is_lm_head:
        return None
    return (SkipReason.LM_HEAD if matches("lm_head", site.path) else SkipReason.TIED), ""


def weight_only(site: LinearSite, config: Int8Config) -> bool:
    """Tell whether only the weight of a site becomes int8, and its activations keep 23 bits.

    Because the configuration asks for it, or because the GPU leaves no other way.
    """
    if site.held.weight_only if site.held else config.lm_head == "int8_weight" and site.is_lm_head:
        return True
    if site.parameter is None or site.roles is None or site.roles.batch:
        return False
    return _on_gpu_without_int8(site.parameter)


def _on_gpu_without_int8(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda" and hardware.weight_only(hardware.of(parameter.device).isa)


def plain_matmul(site: LinearSite, config: Int8Config) -> Verdict:
    """The call must be a matmul and nothing else."""
    call = site.contraction
    if call.form:
        return SkipReason.FORM, call.form
    if site.roles is None:
        return SkipReason.FORM, f"{','.join(map('.'.join, call.labels))}->{'.'.join(call.out)} is no plain matmul"
    if isinstance(call.alpha, Node) or isinstance(call.beta, Node):
        return SkipReason.FORM, "its alpha or beta is computed"
    if site.roles.batch and weight_only(site, config):
        return SkipReason.FORM, "lm_head='int8_weight' has no batched form"
    return None


def not_transformed(site: LinearSite, config: Int8Config) -> Verdict:
    """Leave in float what torch.func differentiates: lowered operators do not take tensors that wrap others."""
    return (SkipReason.TRANSFORMED, "") if site.transformed else None


def dense_activation(site: LinearSite, config: Int8Config) -> Verdict:
    """The activation must be an ordinary tensor: what the operator takes has rows of numbers and nothing else."""
    x = traced(site.x)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return SkipReason.ACTIVATION, "it is inside torch.vmap"
    if x.is_nested:
        return SkipReason.ACTIVATION, "it is a nested tensor"
    return (SkipReason.ACTIVATION, f"its layout is {x.layout}") if x.layout != torch.strided else None


def static(site: LinearSite, config: Int8Config) -> Verdict:
    """The weight must be a parameter, or a view of one, that the graph does not write to."""
    if site.problem is not None:
        return site.problem, ""
    assert site.static is not None
    if site.constant:
        return SkipReason.COMPUTED, "both factors are parameters"
    if site.held is not None:
        # As it is, it is read where the product stands. A copy has the values of before, and other views are taken
        # before the graph runs.
        copied = any(node.target in SAME_VALUES - ALIASES for node in site.static.chain)
        as_it_is = not copied and site.roles is not None and site.held.is_all(site.view())
        return (SkipReason.CHANGED, "") if site.held.is_changed() and not as_it_is else None
    return (SkipReason.CHANGED, "") if changed_in_graph(site.static, site.sharing) else None


def plain_tensor(site: LinearSite, config: Int8Config) -> Verdict:
    """The weight must be an ordinary tensor."""
    if site.held is not None:
        return None
    # Transformers and our own FreedWeight subclass Parameter in Python; only __torch_dispatch__ changes what data is.
    dispatch = getattr(type(site.parameter), "__torch_dispatch__", None)
    if dispatch is not None and dispatch is not torch.Tensor.__torch_dispatch__:
        return SkipReason.SUBCLASS, type(site.parameter).__name__
    return None


def dtypes(site: LinearSite, config: Int8Config) -> Verdict:
    """Activation and weight must be of a float dtype that the operators take.

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
    for dtype in (traced(site.x).dtype, site.parameter.dtype):
        if dtype not in SUPPORTED_DTYPES:
            return SkipReason.DTYPE, f"it is {dtype}"
    return None


def not_trained(site: LinearSite, config: Int8Config) -> Verdict:
    """int8 weights get no gradient, so a weight that could be waiting for one stays in float."""
    assert site.parameter is not None
    return (SkipReason.TRAINED, "") if site.grad_mode and site.parameter.requires_grad else None


def size(site: LinearSite, config: Int8Config) -> Verdict:
    """K must be exact in int32, and K and N large enough to pay."""
    assert site.roles is not None
    sizes = site.sizes()
    return by_size(merged_size(sizes, site.roles.summed), merged_size(sizes, site.roles.outputs), config)


def no_batch_by_column(site: LinearSite, config: Int8Config) -> Verdict:
    """Which columns have outliers depends on all rows; what that means for several weights LLM.int8() leaves open."""
    assert site.roles is not None
    by_column = config.outliers == "column" and not weight_only(site, config)
    return (SkipReason.COLUMN_BATCHED, "") if site.roles.batch and by_column else None


def by_size(k: int, n: int, config: Int8Config) -> Verdict:
    """The verdict on a weight of K inputs and N outputs."""
    if k > MAX_K:
        return SkipReason.LARGE, f"K={k}"
    if min(k, n) < config.min_features:
        return SkipReason.SMALL, f"K={k}, N={n}, min_features={config.min_features}"
    return None


def finite(site: LinearSite, config: Int8Config) -> Verdict:
    """The weight must hold no NaN or Inf. Only `explain` asks: when compiling, the weight store raises."""
    assert site.static is not None
    assert site.parameter is not None
    if site.parameter.is_meta or site.held is not None:
        return None
    weight = site.static.of(site.parameter)
    bad = weight.numel() - int(weight.isfinite().sum())
    return (SkipReason.BAD_VALUES, f"{bad} of {weight.numel()}") if bad else None


# The first rule with a verdict is the reason given, so what the user asked for comes first.
RULES: tuple[Rule, ...] = (
    skipped_by_name,
    lm_head,
    plain_matmul,
    not_transformed,
    dense_activation,
    static,
    plain_tensor,
    dtypes,
    not_trained,
    no_batch_by_column,
    size,
)
