"""Networks of the benchmarks: every registered one, and variants of `convnet`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gradleak import models
from gradleak.errors import InvalidInput, nearest
from gradleak.models.layers import Normalize
from gradleak.models.seeding import seeded
from gradleak.types import DataSpec

Layer = Callable[[], nn.Module]

ACTIVATIONS: dict[str, Layer] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
POOLS: dict[str, Layer] = {
    "maxpool": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "meanpool": lambda: nn.AvgPool2d(2, ceil_mode=True),
}
VARIANTS = {f"convnet-{part}": part for part in (*ACTIVATIONS, *POOLS)}


def convnet(spec: DataSpec, *, activation: Layer = nn.ReLU, pool: Layer | None = None) -> nn.Module:
    """Build the four convolutions of `gradleak.models.convnet` with another activation or pool.

    Args:
        spec: form of the data.
        activation: follows every convolution.
        pool: 2×2, after the second and third activation, in place of their stride of two.
    """
    channels, height, width = spec.shape
    layers: list[nn.Module] = [Normalize()]
    for ins, outs, stride in ((channels, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        halved = pool is not None and stride == 2
        layers += [nn.Conv2d(ins, outs, 3, stride=1 if halved else stride, padding=1), activation()]
        if pool is not None and halved:
            layers.append(pool())
    features = 64 * -(-height // 4) * -(-width // 4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, spec.classes))


def build(name: str, spec: DataSpec, *, seed: int) -> nn.Module:
    """Build a registered network or a variant of `VARIANTS`; equal seeds give equal weights.

    Raises:
        InvalidInput: unknown name.
    """
    if name in VARIANTS:
        part = VARIANTS[name]
        with seeded(seed):
            if part in POOLS:
                return convnet(spec, pool=POOLS[part])
            return convnet(spec, activation=ACTIVATIONS[part])
    if name not in models.MODELS:
        raise InvalidInput(
            f"unknown network {name!r}: {nearest(name, [*models.MODELS, *VARIANTS])}"
        )
    return models.build(name, spec, seed=seed)
