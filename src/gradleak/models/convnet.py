"""A plain convolutional network without batch normalisation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gradleak.models.layers import Normalize
from gradleak.types import DataSpec


def convnet(spec: DataSpec, *, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Build four 3×3 convolutions (16, 32, 64, 64 channels, strides 1, 2, 2, 1), then linear.

    Args:
        spec: form of the data.
        activation: follows every convolution.
    """
    channels, height, width = spec.shape
    return nn.Sequential(
        Normalize(),
        nn.Conv2d(channels, 16, 3, padding=1),
        activation(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(64, 64, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(64 * -(-height // 4) * -(-width // 4), spec.classes),
    )
