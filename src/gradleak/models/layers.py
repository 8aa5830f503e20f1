"""Layers that more than one network uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Map inputs in [0, 1] to (x − mean) / std.

    Data stay inside their public bounds everywhere in gradleak, so the affine map that training
    likes belongs to the network. Mean and standard deviation are constants kept as buffers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float = 0.5, std: float = 0.25) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) / self.std
