"""Pack int8 weights for the CPU kernels: a permutation of their bytes, with padding.

    packed[n // 16, k // 4, n % 16, k % 4] = qweight[n, k] + 128

K is padded to a multiple of 64 and N to a multiple of 16. A cache line holds 4 inputs of 16 outputs: vpdpbusd
multiplies one line per instruction, AMX a tile of 16 lines. All instruction sets use the same bytes, so a packed weight
does not depend on the machine. The offset makes the weights unsigned, as one factor of those instructions must be.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16
GROUP = 4
K_STEP = 64
OFFSET = 128


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """Return the shape of a packed [N, K] weight."""
    return -(-n // LANES), -(-k // K_STEP) * (K_STEP // GROUP), LANES, GROUP


def pack_weight(qweight: Tensor) -> Tensor:
    """Pack an int8 weight.

    Shapes:
        qweight: [..., N, K] int8; result: [..., ceil(N / 16), ceil(K / 64) * 16, 16, 4] uint8.
    """
    *batch, n, k = qweight.shape
    panels, groups, _, _ = packed_shape(n, k)
    padded = qweight.new_zeros(*batch, panels * LANES, groups * GROUP)
    padded[..., :n, :k] = qweight
    signed = padded.view(*batch, panels, LANES, groups, GROUP).transpose(-3, -2).contiguous()
    return signed.view(torch.uint8) ^ OFFSET  # Adding 128 flips the highest bit.


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """Unpack a weight, the inverse of `pack_weight`.

    Shapes:
        packed: [..., ceil(N / 16), ceil(K / 64) * 16, 16, 4] uint8; result: [..., N, K] int8.
    """
    *batch, panels, groups, _, _ = packed.shape
    signed = (packed ^ OFFSET).view(torch.int8).transpose(-3, -2)
    return signed.reshape(*batch, panels * LANES, groups * GROUP)[..., :n, :k]
