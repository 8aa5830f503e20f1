"""Norm clipping of the update or of every example's gradient: scales, not a protection by itself.

What is clipped keeps its direction, so an attack that compares directions loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Mapped, norm
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.mechanisms.client import check_positive, normalises
from gradleak.types import Batch, Mechanism, ModelState, Update


@dataclass(frozen=True)
class Clip:
    """ũ = u · min(1, norm / ‖u‖₂), over all tensors together.

    By example, ũ = (1/b) Σ_i clip(g_i), as in DP-SGD without its noise
    (Abadi et al., CCS 2016, Alg. 1): large gradients lose weight against small ones.

    Args:
        norm: largest L2 norm that leaves the client, of the update or of one example's gradient.
        scope: what is clipped; by "example" only directly around fedsgd.
    """

    norm: float = 1.0
    scope: Literal["update", "example"] = "update"

    id: ClassVar[str] = "clip"
    title: ClassVar[str] = "Norm clipping"
    sheet: ClassVar[Sheet] = Sheet(
        paper=(
            "Abadi et al., Deep Learning with Differential Privacy, CCS 2016, Algorithm 1 without"
            " its noise"
        ),
        link="https://arxiv.org/abs/1607.00133",
        promises=(
            "No update, or no example, weighs more than its bound. By itself it hides nothing."
        ),
        broken_by="a comparison of directions; by example, clipping inside the comparison",
        cost="slower training where it bites; by example also time",
    )

    def __post_init__(self) -> None:
        check_positive(norm=self.norm)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        if self.scope == "update":
            return Mapped(mechanism, self)
        if not isinstance(mechanism, FedSGD):
            raise InvalidInput("clip:scope=example: expected it first, and fedsgd as training")
        return _ByExample(mechanism, self)

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


@dataclass(frozen=True)
class _ByExample(Mapped):
    inner: FedSGD

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if not self.deterministic:
            return super().mean(state, batch)
        return self._clipped(state, *self.inner.foreseen(batch))

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self._clipped(state, *self.inner.settled(batch, generator=generator))

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self._clipped(state, *self.inner.foreseen(batch))

    def _clipped(self, state: ModelState, client: FedSGD, batch: Batch) -> Update:
        if client.batch_norm == "train" and normalises(state.model):
            raise InvalidInput(
                "clip:scope=example: expected --batch-norm eval, for in train mode "
                "an example has no gradient of its own"
            )

        def clipped(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return self.rule.map(client.mean(state, Batch(x[None], y[None])).values)

        each = torch.func.vmap(clipped)(batch.inputs, batch.labels)
        return Update({k: v.mean(0) for k, v in each.items()}, self.kind)
