"""A small U-Net without attention, differentiable twice at every size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.errors import InvalidInput

_GROUPS = 8


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time, through two linear layers."""

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.linear_1, self.linear_2 = nn.Linear(sinusoids, width), nn.Linear(width, width)

    def forward(self, times: Tensor) -> Tensor:
        half = self.sinusoids // 2
        weight = self.linear_1.weight
        rates = torch.exp(-math.log(1e4) * torch.arange(half, device=weight.device) / half)
        angles = times.to(weight.dtype)[:, None] * rates.to(weight.dtype)
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        found: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return found


class Block(nn.Module):
    """Two convolutions with group normalisation, the time between them, and a way around."""

    def __init__(self, before: int, after: int, width: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(_GROUPS, before), _convolution(before, after)
        self.time = nn.Linear(width, after)
        self.norm_2, self.conv_2 = nn.GroupNorm(_GROUPS, after), _convolution(after, after)
        self.around = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x))) + self.time(time)[:, :, None, None]
        found: Tensor = self.around(x) + self.conv_2(F.silu(self.norm_2(h)))
        return found


class UNet(nn.Module):
    """(x_t (b, c, h, w), times (b,), labels (b,) or None) → (b, c, h, w).

    Nothing starts at zero: at zero weights most gradients of a first round would be zero, and
    an audit of them would mistake that for protection.

    Args:
        channels: c.
        width: channels of the first level, a multiple of 8.
        multipliers: channels of every level, over `width`; sides halve from level to level.
        classes: of a conditional network; label `classes`, or None, stands for no class.
    """

    def __init__(
        self, channels: int, *, width: int, multipliers: Sequence[int] = (1, 2, 2), classes: int = 0
    ) -> None:
        super().__init__()
        if width < _GROUPS or width % _GROUPS:
            raise InvalidInput(f"width={width} of a U-Net: expected a multiple of {_GROUPS}")
        levels = [width * m for m in multipliers]
        embedded = 4 * width
        self.classes = classes
        self.time_embedding = TimeEmbedding(width, embedded)
        if classes:
            self.class_embedding = nn.Embedding(classes + 1, embedded)
        self.first = _convolution(channels, width)
        befores = [width, *levels[:-1]]
        self.down = nn.ModuleList(
            Block(b, a, embedded) for b, a in zip(befores, levels, strict=True)
        )
        self.shrink = nn.ModuleList(_convolution(c, c, stride=2) for c in levels[:-1])
        self.middle = Block(levels[-1], levels[-1], embedded)
        self.up = nn.ModuleList(
            Block(below + own, own, embedded)
            for below, own in zip([levels[-1], *levels[:0:-1]], levels[::-1], strict=True)
        )
        self.grow = nn.ModuleList(_convolution(c, c) for c in levels[:0:-1])
        self.norm, self.last = nn.GroupNorm(_GROUPS, width), _convolution(width, channels)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        time = self.time_embedding(times)
        if self.classes:
            if labels is None:
                labels = torch.full((len(x),), self.classes, device=x.device)
            time = time + self.class_embedding(labels)
        time = F.silu(time)
        h, kept = self.first(x), []
        for level, block in enumerate(self.down):
            h = block(h, time)
            kept.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle(h, time)
        for level, block in enumerate(self.up):
            beside = kept.pop()
            if level:
                grown = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.grow[level - 1](grown[..., : beside.shape[-2], : beside.shape[-1]])
            h = block(torch.cat([h, beside], 1), time)
        found: Tensor = self.last(F.silu(self.norm(h)))
        return found


def _convolution(before: int, after: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1)
