"""Nothing is known but the bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.priors.family import Fitted
from gradleak.seeding import child, normal
from gradleak.types import Batch, DataSpec


@dataclass(frozen=True, eq=False)
class SoftBox(Fitted):
    """log p(x) = Σ_i −dist(x_i, [low, high])² / (2 s²) − log(high − low + s √(2π))."""

    family: Box

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        outside = self.check(inputs) - inputs.clamp(*self.data.bounds)
        width, tails = self._masses
        constant = math.prod(self.data.shape) * inputs.shape[1] * math.log(width + tails)
        return -((outside / self.family.softness) ** 2).flatten(1).sum(1) / 2 - constant

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        low, high = self.data.bounds
        width, tails = self._masses
        shape = self.centre(labels).shape
        uniform = torch.rand(shape, generator=child(generator, "inside"), dtype=torch.float64)
        beyond = self.family.softness * normal(
            shape, generator=child(generator, "outside"), dtype=torch.float64
        )
        share = torch.rand(shape, generator=child(generator, "where"), dtype=torch.float64)
        outside = torch.where(beyond < 0, low, high) + beyond
        inside = low + width * uniform
        return torch.where(share * (width + tails) < tails, outside, inside)

    def mean(self, labels: Tensor | int) -> Tensor:
        return self.centre(labels)

    @property
    def _masses(self) -> tuple[float, float]:
        """Unnormalised mass of one entry inside the bounds and outside."""
        low, high = self.data.bounds
        return high - low, self.family.softness * math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Box:
    """Uniform within the bounds of the data, falling off like a Gaussian outside them.

    Args:
        softness: standard deviation of the fall-off, in units of the data.
    """

    softness: float = 0.05

    id: ClassVar[str] = "box"
    title: ClassVar[str] = "Uniform within bounds"
    proper: ClassVar[bool] = True
    fitted: ClassVar[type[Fitted]] = SoftBox

    def __post_init__(self) -> None:
        if not 0 < self.softness < math.inf:
            raise InvalidInput(f"softness={self.softness}: expected a positive number")

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> SoftBox:
        """Only the bounds matter."""
        return SoftBox(self, data)
