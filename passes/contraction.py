"""Normalize every spelling of a matmul to an equation with a label for each dimension, as in einsum.

`F.linear(x, w)` with a 3-D x is `abk,nk->abn`, `x @ w` is `abk,kn->abn`, a batched matmul `bmk,bkn->bmn`. The
labels determine everything else: which dimensions are summed, how the weight becomes [N, K] or [B, N, K], and what to
permute around the operator. No spelling needs a rule of its own. The readers in `passes/vocabulary.py` write the
equations, and say there which labels they use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.fx import Node

Label = str
Labels = tuple[Label, ...]


class Contraction(NamedTuple):
    """A matmul as the graph writes it.

    Attributes:
        name: The name of the call in reports: "linear", "addmm", "einsum", ...
        operands: The two factors.
        labels: A label for each dimension of each factor.
        out: The labels of the result.
        weight_role: Whether the call has its second factor as a weight (linear, convolution). Such a factor that is not
            static is reported, and not counted as a matmul of two activations.
        addend: The tensor that is added to the product, None for none.
        addend_label: The label that a 1-D addend runs along.
        beta: Multiplies the addend.
        alpha: Multiplies the product.
        steps: Stride of the first factor along each label, for strided 1x1 convolutions.
        ones: Labels of dimensions of size 1 of the second factor, which convolution kernels have.
        refused: "" where the equation describes the whole call; otherwise why the call has no int8 counterpart.
    """

    name: str
    operands: tuple[Node, Node]
    labels: tuple[Labels, Labels]
    out: Labels
    weight_role: bool = False
    addend: Node | None = None
    addend_label: Label | None = None
    beta: Any = 1
    alpha: Any = 1
    steps: tuple[tuple[Label, int], ...] = ()
    ones: Labels = ()
    refused: str = ""


class Roles(NamedTuple):
    """The role of each label in the product of an activation x and a weight w.

    Attributes:
        batch: In x, w and the result: independent products.
        summed: In x and w only: K.
        rows: In x and the result only: M.
        outputs: In w and the result only: N.
    """

    batch: Labels
    summed: Labels
    rows: Labels
    outputs: Labels


def roles(x: Labels, w: Labels, out: Labels) -> Roles | None:
    """Return the labels by role, in x's order (outputs in w's).

    Returns:
        None where the equation is no matmul: a label repeats within an operand, is summed in one operand alone, or
        nothing is summed.
    """
    if any(len(set(labels)) != len(labels) for labels in (x, w, out)) or set(out) - set(x) - set(w):
        return None
    if any((label in x) != (label in w) and label not in out for label in (*x, *w)):
        return None
    found = Roles(
        batch=tuple(label for label in x if label in w and label in out),
        summed=tuple(label for label in x if label in w and label not in out),
        rows=tuple(label for label in x if label not in w),
        outputs=tuple(label for label in w if label not in x),
    )
    return found if found.summed else None


def permutation(source: Sequence[Label], target: Sequence[Label]) -> list[int]:
    """Return the argument of `permute` that brings dimensions labelled `source` into the order `target`."""
    return [source.index(label) for label in target]


def merged_size(sizes: dict[Label, Any], labels: Labels) -> int:
    """Return the size of static dimensions flattened into one."""
    return math.prod(int(sizes[label]) for label in labels)
