"""A small vision transformer to measure with, not one of the library's models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.types import DataSpec


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each after layer normalisation and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(tokens)).chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(mixed)
        wide: Tensor = self.narrow(F.gelu(self.wide(self.between(tokens))))
        return tokens + wide


class VisionTransformer(nn.Module):
    """Patches with positions and a class token, `depth` blocks, a linear head on the token."""

    def __init__(
        self, spec: DataSpec, *, patch: int = 4, width: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        channels, height, across = spec.shape
        count = (height // patch) * (across // patch)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, count + 1, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, spec.classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        token = self.token.expand(len(images), -1, -1)
        tokens = torch.cat([token, patches], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits


def small(spec: DataSpec) -> nn.Module:
    """Build the transformer: patch 4, width 64, three blocks of four heads."""
    return VisionTransformer(spec)
