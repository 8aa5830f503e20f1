"""MixUp as a protection: train on convex combinations of examples (Zhang et al., ICLR 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.defenses.encoded import Encoded, mixture, soft_labels
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import OnPublic
from gradleak.errors import InvalidInput
from gradleak.types import Batch, Mechanism, ModelState, Update


@dataclass(frozen=True)
class MixUp(OnPublic):
    """x'_i = Σ_j λ_ij x_π_j(i), y' alike, λ_i ~ Dirichlet(first, 1, …, 1), π_0(i) = i.

    Partners are other examples of the batch; where it has too few, public ones fill up. Without
    those, fewer are mixed, and a batch of one stays as it is.

    Source: Zhang, Cisse, Dauphin & Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR
    2018; as a protection in Huang et al., "Evaluating Gradient Inversion Attacks and Defenses in
    Federated Learning", NeurIPS 2021, whose Dirichlet weights these are. With images=2, first=1 it
    is Zhang's with Beta(1, 1).

    Args:
        images: k, examples in a mixture.
        first: concentration of an example's own weight.
    """

    images: int = 4
    first: float = 3.0

    id: ClassVar[str] = "mixup"
    title: ClassVar[str] = "MixUp"
    mixes_labels: ClassVar[bool] = True
    sheet: ClassVar[Sheet] = Sheet(
        paper="Zhang, Cisse, Dauphin & Lopez-Paz, mixup: Beyond Empirical Risk Minimization, "
        "ICLR 2018; as a protection Huang et al., NeurIPS 2021",
        link="https://arxiv.org/abs/1710.09412",
        promises="the server inverts the gradient to blends, not to examples",
        broken_by="ordinary gradient inversion with soft labels gives the blends; blends of the "
        "same examples from several rounds give the examples by least squares (`decode`)",
        cost="none in bytes or time; labels are soft, so training needs more steps",
    )

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InvalidInput(f"images={self.images}: expected at least 1")
        if not 0 < self.first < math.inf:
            raise InvalidInput(f"first={self.first}: expected a positive number")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return Encoded(mechanism, self) if self.images > 1 else mechanism

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """It claims nothing of the update's statistics."""
        return None

    def encode(self, state: ModelState, batch: Batch, generator: torch.Generator) -> Batch:
        """The blends that the client trains on."""
        own = min(self.images, len(batch))
        public = self.public
        k = own if public is None else self.images
        # Dirichlet as normalised Gamma draws: Gamma(1) by inversion, Gamma(first) by torch.
        concentration = torch.ones((len(batch), k), dtype=torch.float64)
        concentration[:, 0] = self.first
        weights = torch._standard_gamma(concentration, generator=generator)
        weights = weights / weights.sum(1, keepdim=True)
        mine = Batch(batch.inputs, soft_labels(state, batch))
        if public is not None and k > own:
            public = Batch(public.inputs, soft_labels(state, public))
        inputs, labels = mixture(mine, weights, public, own=own, generator=generator)
        return Batch(inputs, (weights.to(labels)[..., None] * labels).sum(1))
