"""ResNet-18 as it is trained on small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.models.layers import Normalize
from gradleak.types import DataSpec


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, added to a shortcut."""

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


def resnet18(spec: DataSpec) -> nn.Module:
    """Build ResNet-18 with a 3×3 stem, no initial pooling and global average pooling.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning", CVPR 2016; the stem is the usual one for
    32×32 images.
    """
    blocks: list[nn.Module] = []
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks.append(ResidualBlock(channels, width, stride=stride))
        blocks.append(ResidualBlock(width, width, stride=1))
        channels = width
    return nn.Sequential(
        Normalize(),
        nn.Conv2d(spec.shape[0], 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, spec.classes),
    )
