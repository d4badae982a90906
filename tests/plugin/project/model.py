"""A model that gets another layer where the environment says so."""

import os

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(512, 1024)
        self.down = nn.Linear(1024, 512)
        # Fewer than min_features outputs: it stays in float.
        self.gate = nn.Linear(512, 4) if "WITH_GATE" in os.environ else None
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y if self.gate is None else y * self.gate(y).sum(-1, keepdim=True)
