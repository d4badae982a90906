"""Tensors of layers that bitsandbytes saved in 8 bit, as those of int8 modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from int8compile import ops
from int8compile.errors import CheckpointError


def renamed(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a state dict in which the tensors of one layer of bitsandbytes are those of an int8 module."""
    path = prefix.removesuffix(".")
    if f"{prefix}weight_format" in state_dict:
        check_layout(path, state_dict[f"{prefix}weight_format"])
    qweight, scale = int8_weight(path, state_dict.get(f"{prefix}weight"), state_dict[f"{prefix}SCB"])
    theirs = {f"{prefix}{name}" for name in ("weight", "SCB", "weight_format")}
    rest = {key: value for key, value in state_dict.items() if key not in theirs}
    return {**rest, f"{prefix}qweight": qweight, f"{prefix}scale": scale}


def int8_weight(path: str, weight: Tensor | None, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 weight and scales of a layer that bitsandbytes saved (`Linear8bitLt._save_to_state_dict`).

    Args:
        path: The path of the module, for messages.
        weight: [N, K] int8.
        absmax: `SCB`, [N]: the largest element of each row, 127 times the scale.

    Raises:
        CheckpointError: They have another dtype or shape.
    """
    if weight is None or weight.dtype != torch.int8 or absmax.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{path}.weight and {path}.SCB are not an 8 bit layer of bitsandbytes, which has int8 [N, K] and float32 "
            "[N]"
        )
    return weight, absmax.to(torch.float32) / ops.QMAX


def check_layout(path: str, layout: Tensor) -> None:
    """Check `weight_format` of bitsandbytes; 0 stands for rows.

    Raises:
        CheckpointError: It is a layout for Turing or Ampere, which older versions wrote.
    """
    if int(layout) != 0:
        raise CheckpointError(
            f"{path}.weight_format is {int(layout)}, a layout of older versions of bitsandbytes. Save the model with "
            "bitsandbytes 0.45 or newer, which writes rows"
        )
