"""Groups of linears that share a rotation: linears that may read one x, which is quantized once for all of them.

Any grouping gives correct results, because a weight is rotated by the d that its x is rotated by. A good grouping is
nearer to float, and lets q, k and v be one product. The same rules serve `torch.compile`, `quantize_` and models that
are loaded in int8. A calibration finds the groups by the activations themselves (`int8compile.calibrate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int8compile.ops import input_scales, rotation_of

# Their x is computed from the results of the linears beside them.
_OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "to_out"}
# Weights of experts that read the tokens. Other weights read what their own expert has computed.
_OF_TOKENS = ("gate", "up", "w1", "w3")


def group_of(path: str, *, own: bool = False) -> str:
    """Return the name of a linear's group. Linears of one module with the same K share a group.

    Args:
        path: The module's path, or for a bare parameter the parameter's.
        own: Whether it is a group of its own: a bare parameter, or the weights of several experts.
    """
    parent, _, name = path.rpartition(".")
    # Numbered modules are in a container, which calls them in sequence.
    return path if own or name in _OUTPUT_PROJECTIONS or name.isdecimal() else f"{parent}."


def reads_tokens(path: str) -> bool:
    """Return whether all experts of a weight [E, N, K] read the same rows, and so share a d, by its name."""
    return path.rpartition(".")[2].startswith(_OF_TOKENS)


def make_d(weights: Sequence[Tensor], *, each: bool = False) -> Tensor:
    """Return the d of some linears, computed from their weights alone.

    Args:
        weights: [N, K] each, or [E, N, K].
        each: Whether each of the E matrices has a d of its own.

    Shapes:
        result: [K] float32, or [E, K].
    """
    if each:
        (weight,) = weights
        return torch.stack([make_d([matrix]) for matrix in weight]) if len(weight) else weight.new_empty(0, 0)
    c = input_scales([weight.flatten(0, -2) for weight in weights])
    # Weights with NaN or Inf are refused by name when they are quantized. The rest of the group gets a usable d.
    return rotation_of(c if c.isfinite().all() else torch.ones_like(c))
