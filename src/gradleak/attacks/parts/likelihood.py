"""The data term of a posterior: −log p(update | claim) for whatever client is believed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gradleak.attacks.parts.client import plain_client
from gradleak.attacks.parts.distances import Distance, l1, squared_l2
from gradleak.attacks.parts.matching import Matching
from gradleak.defenses import GaussianNoise, LaplaceNoise, NoDefense, Wrapped
from gradleak.defenses.dithered import Dithered
from gradleak.defenses.noise import AdditiveNoise
from gradleak.defenses.wrapped import Around, Mapped, Separable, Through
from gradleak.errors import IntractableLikelihood
from gradleak.mechanisms.likelihood import density_at
from gradleak.types import Batch, Density, ModelState, Observation, Update

_EXACT = 1e-3
_DRAWS = 16
_TINY = 1e-30


@dataclass(frozen=True)
class DataTerm:
    """−log p(u_t | x_t) = weight · fit(x_t), up to a constant of the update.

    Attributes:
        fit: compares what a claim predicts with the update.
        weight: nats per unit of `fit`.
    """

    fit: Matching
    weight: float


def data_term(seen: Sequence[Observation], *, dtype: torch.dtype) -> DataTerm:
    """The likelihood of the mechanism believed in, for observations that share it.

    Where it has no density, quantised updates count by the probability of their levels given the
    grid, and others as Gaussian around the mean, with the variance that the attacker finds by
    playing the client himself.
    """
    first = seen[0]
    try:
        if isinstance(first.mechanism, Dithered):
            known = first.mechanism.given_grid()
        else:
            known = first.mechanism.likelihood(batch_size=first.knowledge.batch_size or 1)
    except IntractableLikelihood:
        return DataTerm(Matching(seen, squared_l2, dtype=dtype), 1 / (2 * variance(first)))
    centre, density = known.centre, density_at(known, first.state)
    while isinstance(centre, Mapped) and isinstance(density, Separable):
        density = Through(density, centre.rule)
        centre = centre.inner  # engines know plain clients
    distance, weight = _as_distance(density)
    client = plain_client(centre) or _Centre(centre, NoDefense())
    fit = Matching(seen, distance, dtype=dtype).through(first.state, mechanism=client)
    return DataTerm(fit, weight)


def noise_variance(seen: Observation) -> float:
    """Variance of the noise on what the client computes; of the update where that is not known.

    Signs of a noisy update, say, vary in other units than the noise does.
    """
    try:
        known = seen.mechanism.likelihood(batch_size=seen.knowledge.batch_size or 1)
    except IntractableLikelihood:
        return variance(seen)
    stds = list(_stds(known.density))
    return min(stds) ** 2 if stds else variance(seen)


def _stds(density: Density) -> Iterator[float]:
    if isinstance(density, Separable):
        for part in vars(density).values():
            yield from [part.std] if isinstance(part, AdditiveNoise) else _stds(part)


def variance(seen: Observation) -> float:
    """Mean variance of an update's coordinates for a grey batch, as the attacker plays the client.

    At least (a thousandth of the update's root mean square)², which stands in for no noise at all.
    """
    values = list(seen.update.values.values())
    count = sum(v.numel() for v in values)
    least = _EXACT**2 * sum(float((v.double() ** 2).sum()) for v in values) / count
    if seen.mechanism.deterministic:
        return max(least, _TINY)
    low, high = seen.data.bounds
    size = seen.knowledge.batch_size or 1
    like = next(iter(seen.state.params.values()))
    grey = torch.full((size, *seen.data.shape), (low + high) / 2).to(like)
    labels = seen.knowledge.labels
    if labels is None:
        labels = torch.zeros(size, dtype=torch.int64)
    stream = torch.Generator().manual_seed(0)
    draws = [
        seen.mechanism.sample(
            seen.state, Batch(grey, labels.to(like.device)), generator=stream
        ).values
        for _ in range(_DRAWS)
    ]
    spread = sum(float(torch.stack([d[k] for d in draws]).var(0).sum()) for k in draws[0])
    return max(least, spread / count, _TINY)


def _as_distance(density: Density) -> tuple[Distance, float]:
    """A distance that engines have closed forms for, where there is one, and nats per unit."""
    match density:
        case Around(GaussianNoise(std=std)):
            return squared_l2, 1 / (2 * std**2)
        case Around(LaplaceNoise() as noise):
            return l1, 1 / noise.scale
    return density, 1.0


class _Centre(Wrapped):
    """The centre of a likelihood, compared as it is: nothing read off the update."""

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.inner.mean(state, batch)

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)
