"""The six convolutions that R-GAP was shown on (Zhu & Blaschko, ICLR 2021)."""

from __future__ import annotations

from torch import nn

from gradleak.models.layers import Normalize
from gradleak.types import DataSpec

_CONVOLUTIONS = (
    (12, 4, 2, 2),
    (36, 3, 2, 1),
    (36, 3, 1, 1),
    (36, 3, 1, 1),
    (64, 3, 2, 1),
    (128, 3, 1, 1),
)
"""Channels, kernel, stride and padding."""


def cnn6(spec: DataSpec, *, second: int = 36, logistic: bool = False) -> nn.Module:
    """Build six convolutions and a linear head without biases, LeakyReLU with slope 0.2.

    Args:
        spec: form of the data.
        second: channels of the second convolution; 20 makes it rank-deficient, as published.
        logistic: one output, as published, instead of one a class.
    """
    channels, *size = spec.shape
    layers: list[nn.Module] = [Normalize()]
    for number, (outs, kernel, stride, padding) in enumerate(_CONVOLUTIONS):
        outs = second if number == 1 else outs
        layers += [
            nn.Conv2d(channels, outs, kernel, stride=stride, padding=padding, bias=False),
            nn.LeakyReLU(0.2),
        ]
        channels = outs
        size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
    outputs = 1 if logistic else spec.classes
    head = nn.Linear(channels * size[0] * size[1], outputs, bias=False)
    return nn.Sequential(*layers, nn.Flatten(), head)
