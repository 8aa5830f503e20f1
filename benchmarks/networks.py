"""Networks of the benchmarks: every registered one, and variants of `convnet`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gradleak import models
from gradleak.errors import InvalidInput, nearest
from gradleak.models.layers import Normalize
from gradleak.models.seeding import seeded
from gradleak.types import DataSpec

Layer = Callable[[], nn.Module]

VARIANTS: dict[str, dict[str, Any]] = {
    "convnet-gelu": {"activation": nn.GELU},
    "convnet-silu": {"activation": nn.SiLU},
    "convnet-tanh": {"activation": nn.Tanh},
    "convnet-sigmoid": {"activation": nn.Sigmoid},
    "convnet-maxpool": {"pool": lambda: nn.MaxPool2d(2, ceil_mode=True)},
    "convnet-meanpool": {"pool": lambda: nn.AvgPool2d(2, ceil_mode=True)},
    "convnet-x2": {"width": 2},
    "convnet-x4": {"width": 4},
}
"""Arguments of `convnet` by name."""


def convnet(
    spec: DataSpec, *, activation: Layer = nn.ReLU, pool: Layer | None = None, width: int = 1
) -> nn.Module:
    """Build the four convolutions of `gradleak.models.convnet` with something changed.

    Args:
        spec: form of the data.
        activation: follows every convolution.
        pool: 2×2, after the second and third activation, in place of their stride of two.
        width: multiplies the channels.
    """
    channels, height, width_px = spec.shape
    layers: list[nn.Module] = [Normalize()]
    ins = channels
    for base, stride in ((16, 1), (32, 2), (64, 2), (64, 1)):
        outs = base * width
        pooled = pool if stride == 2 else None
        layers += [nn.Conv2d(ins, outs, 3, stride=1 if pooled else stride, padding=1), activation()]
        if pooled is not None:
            layers.append(pooled())
        ins = outs
    features = ins * -(-height // 4) * -(-width_px // 4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, spec.classes))


def build(name: str, spec: DataSpec, *, seed: int) -> nn.Module:
    """Build a registered network or a variant of `VARIANTS`; equal seeds give equal weights.

    Raises:
        InvalidInput: unknown name.
    """
    if name in VARIANTS:
        with seeded(seed):
            return convnet(spec, **VARIANTS[name])
    if name not in models.MODELS:
        raise InvalidInput(
            f"unknown network {name!r}: {nearest(name, [*models.MODELS, *VARIANTS])}"
        )
    return models.build(name, spec, seed=seed)
