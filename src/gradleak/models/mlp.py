"""A perceptron with one hidden layer."""

from __future__ import annotations

import math

from torch import nn

from gradleak.models.layers import Normalize
from gradleak.types import DataSpec


def mlp(spec: DataSpec) -> nn.Module:
    """Build normalise → flatten → linear(128) → ReLU → linear(classes).

    Its first layer is fully connected, so one example's gradient holds that example exactly.
    """
    return nn.Sequential(
        Normalize(),
        nn.Flatten(),
        nn.Linear(math.prod(spec.shape), 128),
        nn.ReLU(),
        nn.Linear(128, spec.classes),
    )
