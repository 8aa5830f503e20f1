"""Top-k sparsification: only the largest coordinates leave the client (Aji & Heafield, 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Mapped, Noise, log_mass, noise_inside
from gradleak.errors import InvalidInput
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update


@dataclass(frozen=True)
class TopK:
    """ũ_j = u_j if |u_j| is among the ⌈fraction · P⌉ largest, else 0.

    The zeros show which coordinates were kept, so the adaptive attack compares on those alone.

    Args:
        fraction: share of coordinates kept, in (0, 1].
        scope: rank over the whole update ("global") or within every tensor ("tensor").
    """

    fraction: float = 0.1
    scope: Literal["global", "tensor"] = "global"

    id: ClassVar[str] = "top-k"
    title: ClassVar[str] = "Top-k sparsification"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Aji, Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017",
        link="https://arxiv.org/abs/1704.05021",
        promises="Small coordinates do not leave the client.",
        broken_by=(
            "a comparison on the support received, which the zeros give away, and what the claim "
            "has beyond the smallest magnitude sent"
        ),
        cost="accuracy at strong sparsity; saves bytes",
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InvalidInput(f"fraction={self.fraction}: expected a share in (0, 1]")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Sparse(mechanism, self) if self.fraction < 1 else mechanism

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        size = sum(v.numel() for v in after.values.values())
        kept = sum(int(v.count_nonzero()) for v in after.values.values())
        if kept <= math.ceil(self.fraction * size) + len(after.values):
            return None
        return f"claims to keep {self.fraction:.3%} and keeps {{:.3%}}", kept / size

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero all but the largest coordinates."""
        if self.scope == "tensor":
            return {k: self._keep(v.flatten()).reshape(v.shape) for k, v in values.items()}
        flat = self._keep(torch.cat([v.flatten() for v in values.values()]))
        parts = torch.split(flat, [v.numel() for v in values.values()])
        return {k: p.reshape(v.shape) for (k, v), p in zip(values.items(), parts, strict=True)}

    def thresholds(self, sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The smallest magnitude kept, for every tensor."""
        least = {k: v.abs().masked_fill(v == 0, math.inf).amin() for k, v in sent.items()}
        if self.scope == "global":
            return dict.fromkeys(least, torch.stack(list(least.values())).amin())
        return least

    def _keep(self, flat: Tensor) -> Tensor:
        kept = flat.detach().abs().topk(math.ceil(self.fraction * flat.numel())).indices
        return torch.zeros_like(flat).scatter(0, kept, flat.gather(0, kept))


@dataclass(frozen=True)
class _Sparse(Mapped):
    rule: TopK

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """On the support received; elsewhere, what exceeds the smallest magnitude kept."""
        clean = self.inner.predict(received, state, batch)
        kept = {k: v * (received.values[k] != 0) for k, v in clean.values.items()}
        sent, own = self.rule.thresholds(received.values), self.rule.thresholds(kept)
        found = {}
        for k, v in clean.values.items():
            # A layer outside may have scaled what was sent, never the claim's own order.
            most = torch.maximum(sent[k], own[k])
            beyond = v.sign() * (v.abs() - most).clamp(min=0)
            found[k] = torch.where(received.values[k] != 0, v, beyond)
        return Update(found, clean.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        """Density of support and values: Lebesgue on what is kept, counting measure on supports."""
        if self.deterministic:
            return super().likelihood(batch_size=batch_size)
        centre, noise = noise_inside(self.inner, batch_size=batch_size)
        return Likelihood(centre, _Largest(noise, self.rule))


@dataclass(frozen=True)
class _Largest:
    """Π n(u_j − c_j) over what is kept times Π P(|c_j + noise| < τ) over the rest.

    τ is the smallest magnitude kept. That is the whole density: given what is kept, the support
    is what it is exactly if every other coordinate stays below τ, and they are independent.
    """

    noise: Noise
    rule: TopK

    def __call__(self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensor:
        most = self.rule.thresholds(update)
        terms = [
            torch.where(
                update[k] != 0,
                self.noise.log_density(update[k] - c),
                log_mass(self.noise, -most[k] - c, most[k] - c),
            ).sum()
            for k, c in centre.items()
        ]
        return -torch.stack(terms).sum()
