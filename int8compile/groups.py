"""Which linears are rotated alike: those that may read one x, which is quantized once for all of them.

Any grouping is right, since each weight is rotated by the d that its x is; a good one is nearer to float, and lets q, k
and v be one product. The same rules serve `torch.compile`, `quantize_` and models that are loaded in int8. A
calibration knows better (`int8compile.calibrate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int8compile.ops import input_scales, rotation_of

# Their x is what another module made of those that stand beside them.
_OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "to_out"}
# Weights of experts that read the tokens; what others read each expert has made.
_OF_TOKENS = ("gate", "up", "w1", "w3")


def group_of(path: str, *, own: bool = False) -> str:
    """Return the name of a linear's group, which those share that stand in one module and have one K.

    Args:
        path: The module's path, or for a bare parameter the parameter's.
        own: Whether it stands alone: a bare parameter, or the weights of several experts.
    """
    parent, _, name = path.rpartition(".")
    # Numbered ones lie in a container, one behind the other.
    return path if own or name in _OUTPUT_PROJECTIONS or name.isdecimal() else f"{parent}."


def reads_tokens(path: str) -> bool:
    """Return whether all experts of a weight [E, N, K] read the same rows, by its name; they have one d then."""
    return path.rpartition(".")[2].startswith(_OF_TOKENS)


def make_d(weights: Sequence[Tensor], *, each: bool = False) -> Tensor:
    """Return what rotates the x of some linears, from their weights alone.

    Args:
        weights: [N, K] each, or [E, N, K].
        each: Whether each of the E matrices has its own.

    Shapes:
        result: [K] float32, or [E, K].
    """
    if each:
        (weight,) = weights
        return torch.stack([make_d([matrix]) for matrix in weight]) if len(weight) else weight.new_empty(0, 0)
    c = input_scales([weight.flatten(0, -2) for weight in weights])
    # Weights with NaN or Inf are refused by name when they are quantized; others of the group must not suffer.
    return rotation_of(c if c.isfinite().all() else torch.ones_like(c))
