"""Signs alone: one bit for every coordinate (signSGD, Bernstein et al., ICML 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Mapped, Noise, Separable, noise_inside
from gradleak.errors import IntractableLikelihood
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update

_NOTHING = 1e-6
"""Mean magnitude of a tensor, as a share of the largest, below which it counts as nothing."""


@dataclass(frozen=True)
class Sign:
    """ũ_j = sign(u_j), or sign(u_j) times the mean of |u| over its tensor.

    Args:
        scaled: send the mean magnitude of every tensor too.
    """

    scaled: bool = False

    id: ClassVar[str] = "sign"
    title: ClassVar[str] = "Signs alone"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Bernstein et al., signSGD, ICML 2018",
        link="https://arxiv.org/abs/1802.04434",
        promises="One bit of every coordinate leaves the client.",
        broken_by="a comparison of signs alone, in units of the mean size of each tensor",
        cost="accuracy on some networks; saves bytes, 32 times",
    )

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Signs(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        pairs = [(v, after.values[k]) for k, v in before.values.items()]
        size = sum(v.numel() for v, _ in pairs)
        flipped = sum(int((v.sign() != s.sign()).sum()) for v, s in pairs)
        if flipped:
            return "sends another sign than the update has on {:.2%} of it", flipped / size
        sizes = [s[s != 0].abs() for _, s in pairs if s.any()]
        spread = max((float((s.max() - s.min()) / s.max()) for s in sizes), default=0.0)
        if spread > 1e-3:
            return "sends magnitudes that differ by {:.2%} within a tensor", spread
        return None

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take signs; the gradient is that of u over its mean size, a direction to search in."""
        return {k: self._signs(v) for k, v in values.items()}

    def _signs(self, value: Tensor) -> Tensor:
        size = mean_size(value)
        unit = value / size
        signs = value.sign() + (unit - unit.detach())
        return size * signs if self.scaled else signs


def mean_size(value: Tensor) -> Tensor:
    """Mean magnitude of a tensor, floored to be divided by."""
    return value.abs().mean().clamp(min=torch.finfo(value.dtype).tiny)


@dataclass(frozen=True)
class _Signs(Mapped):
    rule: Sign

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """The signs received, plus what the claim has of the other sign, in units of its mean size.

        Without that unit, claims with small gradients would seem to fit.
        """
        clean = self.inner.predict(received, state, batch)
        sizes = {k: mean_size(v) for k, v in clean.values.items()}
        # A tensor of rounding errors alone has signs, and no size to measure them in.
        least = _NOTHING * torch.stack(list(sizes.values())).amax()
        found = {}
        for k, v in clean.values.items():
            signs, size = received.values[k].sign(), sizes[k]
            wrong = torch.where(signs == 0, v, signs * (signs * v).clamp(max=0))
            unit = torch.maximum(size, least)
            found[k] = size * signs + wrong if self.rule.scaled else signs + wrong / unit
        return Update(found, clean.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        """Probability of the signs, against counting measure."""
        if self.deterministic:
            return super().likelihood(batch_size=batch_size)
        if self.rule.scaled:
            raise IntractableLikelihood("sign:scaled of a random update: no exact density")
        centre, noise = noise_inside(self.inner, batch_size=batch_size)
        return Likelihood(centre, _Halves(noise))


@dataclass(frozen=True)
class _Halves(Separable):
    """P(c_j + noise has the sign u_j), for updates of ±1."""

    noise: Noise

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            k: self.noise.log_cdf(update[k].sign() * c).masked_fill(update[k] == 0, -math.inf)
            for k, c in centre.items()
        }
