"""Norm clipping of the whole update: a scale, not a protection by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.wrapped import Mapped, norm
from gradleak.mechanisms.client import check_positive
from gradleak.types import Mechanism, Update


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
        return Mapped(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        sent = norm(after)
        if sent > self.norm * (1 + 1e-4):
            return f"claims norm {self.norm:g} and sends {{:.3g}}", sent
        return None

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale the update into the ball of radius `norm`."""
        length = torch.stack([(v**2).sum() for v in values.values()]).sum()
        factor = (self.norm / length.clamp(min=torch.finfo(length.dtype).tiny).sqrt()).clamp(max=1)
        return {k: v * factor for k, v in values.items()}
