"""Norm clipping of the whole update: a scale, not a protection by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.wrapped import Wrapped, norm
from gradleak.errors import IntractableLikelihood
from gradleak.mechanisms.client import check_positive
from gradleak.types import Batch, Mechanism, ModelState, Update


@dataclass(frozen=True)
class Clip:
    """ũ = u · min(1, norm / ‖u‖₂), over all tensors together.

    Args:
        norm: largest L2 norm that leaves the client.
    """

    norm: float = 1.0

    id: ClassVar[str] = "clip"
    title: ClassVar[str] = "Norm clipping"

    def __post_init__(self) -> None:
        check_positive(norm=self.norm)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Clipped(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        sent = norm(after)
        if sent > self.norm * (1 + 1e-4):
            return f"claims norm {self.norm:g} and sends {{:.3g}}", sent
        return None

    def scale(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale the update into the ball of radius `norm`."""
        length = torch.stack([(v**2).sum() for v in values.values()]).sum()
        factor = (self.norm / length.clamp(min=torch.finfo(length.dtype).tiny).sqrt()).clamp(max=1)
        return {k: v * factor for k, v in values.items()}


@dataclass(frozen=True)
class _Clipped(Wrapped):
    rule: Clip

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if not self.inner.deterministic:
            raise IntractableLikelihood("clipping a random update: its mean has no closed form")
        clean = self.inner.mean(state, batch)
        return Update(self.rule.scale(clean.values), clean.kind)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        return Update(self.rule.scale(clean.values), clean.kind)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        clean = self.inner.predict(received, state, batch)
        return Update(self.rule.scale(clean.values), clean.kind)
