"""Random pruning: each coordinate is dropped by a coin of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Masked, Noise, Separable, Wrapped, noised, separable
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.seeding import child
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update


@dataclass(frozen=True)
class RandomMask:
    """ũ_j = m_j u_j with m_j = 0 with probability `share`, else 1; kept values are not rescaled.

    Noise before a secret mask leaves the zeros in sight; noise after it hides them, and each
    coordinate is a mixture of two laws (soft pruning of Balunović et al., ICLR 2022).

    Args:
        share: probability that a coordinate is dropped, in [0, 1).
        seed: of a mask that is part of the protocol, and so known to everybody; None lets every
            client draw its own and keep it.
    """

    share: float = 0.5
    seed: int | None = None

    id: ClassVar[str] = "random-mask"
    title: ClassVar[str] = "Random pruning"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Balunović et al., Bayesian Framework for Gradient Leakage, ICLR 2022",
        link="https://arxiv.org/abs/2111.04706",
        promises="A random part of the coordinates does not leave the client.",
        broken_by=(
            "a comparison on the support received; under noise that covers the zeros, the mixture"
            " of both cases as likelihood (`bayes`)"
        ),
        cost="accuracy, through larger variance of the mean update; saves bytes",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InvalidInput(f"share={self.share}: expected a share in [0, 1)")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        if self.share == 0:
            return mechanism
        return _Secret(mechanism, self) if self.seed is None else Masked(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        sizes = [int(v.count_nonzero()) for v in before.values.values()]
        kept = sum(int(v.count_nonzero()) for v in after.values.values())
        n = sum(sizes)
        # Standard error of a binomial share, 5 of them, and a coin's worth for few coordinates.
        allowed = 5 * math.sqrt(self.share * (1 - self.share) / n) + 1 / n
        if abs(1 - kept / n - self.share) <= allowed:
            return None
        return f"claims to drop {self.share:.3%} and drops {{:.3%}}", 1 - kept / n

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the known mask, which depends on the seed, the tensor's name and shape alone."""
        seed = self.seed or 0
        return {k: v * _kept(self.share, seed, k, v.shape).to(v) for k, v in values.items()}

    def drop(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Apply a mask drawn now."""
        coins = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        return value * (coins >= self.share).to(value)


@lru_cache(maxsize=256)
def _kept(share: float, seed: int, name: str, shape: torch.Size) -> Tensor:
    """The known mask of one tensor; drawn by NumPy, as `vmap` forbids draws inside its programs."""
    stream = child(torch.Generator().manual_seed(seed), name)
    return torch.from_numpy(np.random.default_rng(stream.initial_seed()).random(shape) >= share)


@dataclass(frozen=True)
class _Secret(Wrapped):
    rule: RandomMask

    @property
    def deterministic(self) -> bool:
        return False

    def mean(self, state: ModelState, batch: Batch) -> Update:
        clean = self.inner.mean(state, batch)
        return Update({k: (1 - self.rule.share) * v for k, v in clean.values.items()}, clean.kind)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        return Update(
            {k: self.rule.drop(v, generator) for k, v in clean.values.items()}, clean.kind
        )

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """On the support received; the mean where noise has covered every zero."""
        clean = self.inner.predict(received, state, batch)
        sent = {k: received.values[k] != 0 for k in clean.values}
        covered = torch.stack([s.all() for s in sent.values()]).all()
        kept = {
            k: v * torch.where(covered, 1 - self.rule.share, sent[k].to(v))
            for k, v in clean.values.items()
        }
        return Update(kept, clean.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        """Density against Lebesgue measure plus a unit mass at 0, on every coordinate."""
        if self.inner.deterministic:
            raise IntractableLikelihood("random-mask without noise: what is kept is exact")
        centre, density = separable(self.inner, batch_size=batch_size)
        return Likelihood(centre, _Dropped(density, self.rule.share))

    def noised(self, noise: Noise) -> Likelihood:
        known = noised(self.inner, noise)
        if not isinstance(known.density, Separable):
            return super().noised(noise)
        return Likelihood(known.centre, _Covered(known.density, self.rule.share, noise))


@dataclass(frozen=True)
class _Dropped(Separable):
    """(1 − share) p(u_j | c) off zero, and the probability `share` at zero."""

    density: Separable
    share: float

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            k: torch.where(update[k] != 0, math.log1p(-self.share) + kept, math.log(self.share))
            for k, kept in self.density.terms(centre, update).items()
        }


@dataclass(frozen=True)
class _Covered(Separable):
    """(1 − share) p(u_j | c) + share n(u_j): sent or dropped, and noise on both."""

    density: Separable
    share: float
    noise: Noise

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            k: torch.logaddexp(
                math.log1p(-self.share) + kept,
                math.log(self.share) + self.noise.log_density(update[k]),
            )
            for k, kept in self.density.terms(centre, update).items()
        }
