"""Neighbouring pixels are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.priors.family import Fitted
from gradleak.types import Batch, DataSpec


@dataclass(frozen=True, eq=False)
class Variation(Fitted):
    """log p(x) = −weight · Σ |x_i − x_j| over neighbours i, j, up to a constant.

    Attributes:
        weight: (), in nats per unit of variation.
    """

    family: TotalVariation
    weight: Tensor

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        variation = torch.stack(
            [d.flatten(1).sum(1) for d in self.family.terms(self.check(inputs))]
        )
        return -self.weight.to(inputs) * variation.sum(0)

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        raise InvalidInput("prior 'tv' is improper, it cannot be sampled: expected a proper one")

    def mean(self, labels: Tensor | int) -> Tensor:
        return self.centre(labels)


@dataclass(frozen=True)
class TotalVariation:
    """Differences of neighbouring pixels are small; improper, for brightness is free.

    Args:
        weight: nats per unit of variation; None fits it to the public images as if differences
            were independent (Laplace for "absolute", Gaussian for "squared").
        differences: "absolute", or "squared" and wrapping around the edges, as in the code
            released with Balunović et al., "Bayesian Framework for Gradient Leakage", ICLR 2022.
    """

    weight: float | None = None
    differences: Literal["absolute", "squared"] = "absolute"

    id: ClassVar[str] = "tv"
    title: ClassVar[str] = "Total variation"
    proper: ClassVar[bool] = False
    fitted: ClassVar[type[Fitted]] = Variation

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise InvalidInput(f"weight={self.weight}: expected a positive number")

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Variation:
        """weight = 1 / mean |Δ|, or 1 / (2 mean Δ²), if it is not given.

        Raises:
            InvalidInput: the data are no images, or all public images are constant.
        """
        if data.modality != "image":
            raise InvalidInput(f"prior 'tv' of {data.modality} data: expected images")
        weight = self.weight
        if weight is None:
            found = torch.cat([d.flatten() for d in self.terms(public.inputs.double())]).mean()
            if not found > 0:
                raise InvalidInput("prior 'tv': public images are constant, expected a weight")
            weight = 1 / float(found) / (1 if self.differences == "absolute" else 2)
        return Variation(self, data, torch.tensor(weight, dtype=torch.float64))

    def terms(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """|x_i − x_j| along height and along width, or their squares."""
        if self.differences == "absolute":
            return images.diff(dim=-2).abs(), images.diff(dim=-1).abs()
        return (images - images.roll(-1, -2)) ** 2, (images - images.roll(-1, -1)) ** 2
