"""Label smoothing: no example is wholly of its class (Szegedy et al., CVPR 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradleak.defenses.encoded import soft_labels
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import (
    Noise,
    Wrapped,
    check_classifies,
    noised,
    rebased,
    undefended,
)
from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import Loss
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update


@dataclass(frozen=True)
class LabelSmoothing:
    """u = g(x, (1 − share) y + share / K).

    Nothing is drawn: an attacker who knows it smooths the classes of his claim alike. A claim with
    soft labels is taken for what the client trained on.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.

    Args:
        share: of the label's mass that all K classes share.
    """

    share: float = 0.1

    id: ClassVar[str] = "label-smoothing"
    title: ClassVar[str] = "Label smoothing"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR "
        "2016",
        link="https://arxiv.org/abs/1512.00567",
        promises="soft labels that rules for hard ones misread, and that matching gets wrong",
        broken_by="smoothing the claim's labels alike: the client draws nothing",
        cost="none",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InvalidInput(f"share={self.share}: expected a number in [0, 1)")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        check_classifies(self.id, mechanism, why="which no label reaches")
        return _Smoothed(mechanism, self) if self.share > 0 else mechanism

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """It claims nothing of the update's statistics."""
        return None


@dataclass(frozen=True)
class _Smoothed(Wrapped):
    rule: LabelSmoothing

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, self._smooth(state, batch))

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.inner.sample(state, self._smooth(state, batch), generator=generator)

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        smooth = self._smooth(state, batch)
        return self.inner.trained_on(state, smooth, generator=generator)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self.inner.predict(received, state, self._smooth(state, batch))

    def seen_through(self) -> Mechanism | None:
        loss = getattr(undefended(self.inner), "loss", None)
        if loss is None:
            return None
        return rebased(self.inner, loss=SmoothedLoss(loss, self.rule.share))

    def likelihood(self, *, batch_size: int) -> Likelihood:
        known = self.inner.likelihood(batch_size=batch_size)
        return Likelihood(_Smoothed(known.centre, self.rule), known.density)

    def noised(self, noise: Noise) -> Likelihood:
        known = noised(self.inner, noise)
        return Likelihood(_Smoothed(known.centre, self.rule), known.density)

    def _smooth(self, state: ModelState, batch: Batch) -> Batch:
        if batch.labels.ndim == 2:
            return batch
        return Batch(batch.inputs, smoothed(soft_labels(state, batch), self.rule.share))


@dataclass(frozen=True)
class SmoothedLoss:
    """ℓ(z, (1 − share) y + share / K) for classes y; soft labels are taken as they are."""

    loss: Loss
    share: float

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1:
            labels = smoothed(one_hot(labels, logits.shape[1]).to(logits), self.share)
        return self.loss(logits, labels)


def smoothed(rows: Tensor, share: float) -> Tensor:
    """Rows of class probabilities, `share` of their mass spread evenly."""
    return (1 - share) * rows + share / rows.shape[1]
