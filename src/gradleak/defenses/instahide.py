"""InstaHide: blends under random signs (Huang, Song, Li & Arora, ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.encoded import Encoded, mixture, soft_labels
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import OnPublic
from gradleak.errors import InvalidInput
from gradleak.seeding import normal
from gradleak.types import Batch, Mechanism, ModelState, Update

MIDDLE = 0.5
"""The value that signs turn pixels about: zero after the usual normalisation of [0, 1]."""


@dataclass(frozen=True)
class InstaHide(OnPublic):
    """x' = ½ + σ ⊙ (Σ_j λ_j x_j − ½), σ uniform in {−1, 1}^d, λ = |N(0, 1)|^k, normalised.

    Of the k images `private` are of the batch, the image itself first, the others public; λ is
    drawn again until no weight exceeds `most` and those of private images sum to `least`. The label
    is the private images', by weight. The published code multiplies normalised pixels by the
    signs; about ½ that keeps encodings in [0, 1]. Without public images, or in a batch too small,
    what is missing comes from the other side; a batch of one without public images is only signed.

    Source: Huang, Song, Li & Arora, "InstaHide: Instance-hiding Schemes for Private Distributed
    Learning", ICML 2020, the cross-dataset scheme; weights as in its code. Partners differ from
    the image (published: a permutation may keep it), labels are scaled to sum to one.

    Args:
        images: k.
        private: of them.
        most: bound of one weight.
        least: least sum of the private images' weights.
    """

    images: int = 4
    private: int = 2
    most: float = 0.65
    least: float = 0.3

    id: ClassVar[str] = "instahide"
    title: ClassVar[str] = "InstaHide"
    mixes_labels: ClassVar[bool] = True
    sheet: ClassVar[Sheet] = Sheet(
        paper="Huang, Song, Li & Arora, InstaHide: Instance-hiding Schemes for Private Distributed "
        "Learning, ICML 2020",
        link="https://arxiv.org/abs/2010.02772",
        promises="the server inverts the gradient to signed blends that show no private image",
        broken_by="ordinary gradient inversion with soft labels gives the encodings; encodings of "
        "the same images from many rounds give the images (Carlini et al., S&P 2021; `decode`)",
        cost="none in bytes or time; accuracy falls with k",
    )

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InvalidInput(f"images={self.images}: expected at least 1")
        if not 1 <= self.private <= self.images:
            raise InvalidInput(f"private={self.private}: expected 1 to images={self.images}")
        if not 0.6 <= self.most <= 1:
            raise InvalidInput(f"most={self.most}: expected 0.6 to 1")
        if not 0 <= self.least <= 0.5:
            raise InvalidInput(f"least={self.least}: expected 0 to 0.5")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return Encoded(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """It claims nothing of the update's statistics."""
        return None

    def encode(self, state: ModelState, batch: Batch, generator: torch.Generator) -> Batch:
        """The encodings that the client trains on."""
        own = min(self.images if self.public is None else self.private, len(batch))
        k = own if self.public is None else self.images
        weights = torch.stack([self._weights(k, own, generator) for _ in range(len(batch))])
        mine, public = Batch(batch.inputs, soft_labels(state, batch)), self.public
        if public is not None:  # their labels are not used
            public = Batch(
                public.inputs, mine.labels.new_zeros((len(public), mine.labels.shape[1]))
            )
        inputs, labels = mixture(mine, weights, public, own=own, generator=generator)
        signs = torch.randint(2, inputs.shape, generator=generator).to(inputs) * 2 - 1
        shares = weights[:, :own].to(labels)
        shares = shares / shares.sum(1, keepdim=True)
        return Batch(
            MIDDLE + signs * (inputs - MIDDLE), (shares[..., None] * labels[:, :own]).sum(1)
        )

    def _weights(self, k: int, own: int, generator: torch.Generator) -> Tensor:
        """λ (k,); two weights or fewer are bound by what they can reach."""
        while True:
            drawn = normal((k,), generator=generator, dtype=torch.float64).abs()
            drawn = drawn / drawn.sum()
            if k == 1 or (drawn.max() <= self.most and drawn[:own].sum() >= self.least):
                return drawn
