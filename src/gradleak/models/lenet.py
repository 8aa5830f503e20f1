"""The smooth networks of Deep Leakage from Gradients: sigmoids and wide uniform weights."""

from __future__ import annotations

from torch import nn

from gradleak.types import DataSpec


def lenet(spec: DataSpec) -> nn.Module:
    """Build DLG's LeNet: three 5×5 convolutions of 12 channels and one linear layer.

    Every weight and bias is U(−0.5, 0.5). Strides 2, 2, 1 with padding 2 divide a side by four,
    rounding up, so any image size fits.

    Source: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, section 4, and its code.
    """
    channels, height, width = spec.shape
    network = nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * -(-height // 4) * -(-width // 4), spec.classes),
    )
    return uniform(network)


def lenet_tiny(spec: DataSpec) -> nn.Module:
    """Build a LeNet for very small images: two 3×3 convolutions of 8 channels, strides 1 and 2.

    Sigmoids and U(−0.5, 0.5) as in `lenet`; on 8×8 digits the linear layer is 128 → classes.
    """
    channels, height, width = spec.shape
    network = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8 * -(-height // 2) * -(-width // 2), spec.classes),
    )
    return uniform(network)


def uniform(network: nn.Module) -> nn.Module:
    """Draw every weight and bias from U(−0.5, 0.5)."""
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return network
