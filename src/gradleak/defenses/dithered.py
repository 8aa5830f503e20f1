"""Stochastic rounding to a grid, whatever sets its width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradleak.defenses.wrapped import Defense, Noise, Separable, Unbiased
from gradleak.errors import IntractableLikelihood
from gradleak.types import Batch, Likelihood, ModelState, Update

_LEAST = 1e-3


class Grid(Defense, Protocol):
    """A protection that rounds to multiples of a step."""

    def steps(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Width of the grid for every tensor, 0-dimensional and positive."""
        ...

    def shown(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same, read off what was sent."""
        ...


@dataclass(frozen=True)
class Dithered(Unbiased):
    """ũ_j = s (⌊u_j/s⌋ + coin) with P(coin = 1) = u_j/s − ⌊u_j/s⌋, so that E ũ = u.

    The attacker compares with the mean, which is the update before rounding.
    """

    rule: Grid

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        rounded = {}
        for k, step in self.rule.steps(clean.values).items():
            low, above = _below(clean.values[k], step)
            coins = torch.rand(above.shape, generator=generator, dtype=torch.float64)
            rounded[k] = step * (low + (coins.to(above.device) < above))
        return Update(rounded, clean.kind)

    def given_grid(self) -> Likelihood:
        """Probability of the points given the grid, against counting measure on it.

        Raises:
            IntractableLikelihood: what is rounded is random itself.
        """
        if not self.inner.deterministic:
            raise IntractableLikelihood(f"{self.rule.id} of a random update: no exact density")
        return Likelihood(self.inner, _Points(self.rule))

    def noised(self, noise: Noise) -> Likelihood:
        if not self.inner.deterministic:
            return super().noised(noise)
        return Likelihood(self.inner, _TwoAtoms(self.rule, noise))


@dataclass(frozen=True)
class _Points(Separable):
    """1 − |u_j − c_j| / step on the two neighbours of c_j, for updates on the grid.

    Below a thousandth the logarithm goes on as its tangent, for a search to find its way back from
    claims that cannot be: the sum of probabilities is one to within a thousandth.
    """

    rule: Grid

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        steps = self.rule.shown(update)
        left = {k: 1 - (update[k] - c).abs() / steps[k] for k, c in centre.items()}
        return {
            k: v.clamp(min=_LEAST).log() + (v - _LEAST).clamp(max=0) / _LEAST
            for k, v in left.items()
        }


@dataclass(frozen=True)
class _TwoAtoms(Separable):
    """(1 − w) n(u_j − low) + w n(u_j − low − s): noise on the two neighbours of c_j."""

    rule: Grid
    noise: Noise

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        found = {}
        for k, step in self.rule.steps(centre).items():
            low, above = _below(centre[k], step)
            tiny = torch.finfo(above.dtype).tiny
            found[k] = torch.logaddexp(
                (1 - above).clamp(min=tiny).log() + self.noise.log_density(update[k] - step * low),
                above.clamp(min=tiny).log() + self.noise.log_density(update[k] - step * (low + 1)),
            )
        return found


def _below(value: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The grid point below, in steps, and how far above it the value lies, in [0, 1)."""
    scaled = value / step
    low = scaled.detach().floor()
    return low, scaled - low


def misplaced(
    before: Update, after: Update, steps: Mapping[str, Tensor], *, most: float
) -> tuple[str, float] | None:
    """Doubt values that moved by more than `most` steps, or lie off the multiples of their step."""
    scaled = {k: v / steps[k] for k, v in after.values.items()}
    off = max(float((s - s.round()).abs().max()) for s in scaled.values())
    if off > 1e-2:
        return "sends values off its grid, by {:.2g} of a step", off
    moved = max(float((s - before.values[k] / steps[k]).abs().max()) for k, s in scaled.items())
    if moved > most + 1e-2:
        return f"claims to move by {most:g} steps at most and moves by {{:.3g}}", moved
    return None
