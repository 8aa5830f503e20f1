"""Mixtures of Gaussians that are full along a few axes and round across the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.priors.family import Fitted
from gradleak.seeding import child, normal
from gradleak.types import DataSpec


@dataclass(frozen=True, eq=False)
class Gaussians(Fitted):
    """p(x | y) = Σ_k p(k | y) N(x; μ_k, U_kᵀ diag(λ_k) U_k + δ (I − U_kᵀ U_k)).

    With d entries of an example and r axes, a density costs d·r and not d². Components may share
    their axes and variances: then m = 1, else m = k.

    Attributes:
        means: μ, (k, d).
        axes: U, orthonormal rows, (m, r, d).
        variances: λ, (m, r).
        rest: δ, ().
        given_class: p(k | y), (classes, k).
        shares: p(y), (classes,).
    """

    means: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor
    given_class: Tensor
    shares: Tensor

    def __post_init__(self) -> None:
        k, (m, r, _) = len(self.means), self.axes.shape
        d = math.prod(self.data.shape)
        expected = {
            "means": (k, d),
            "axes": (k if m > 1 else 1, r, d),
            "variances": (m, r),
            "rest": (),
            "given_class": (self.data.classes, k),
            "shares": (self.data.classes,),
        }
        for name, value in self.tensors.items():
            if tuple(value.shape) != expected[name] or not bool(value.isfinite().all()):
                raise InvalidInput(
                    f"prior {self.id!r}, {name} {tuple(value.shape)}: "
                    f"expected {expected[name]} finite numbers"
                )

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        axes, variances, rest = (v.to(inputs) for v in (self.axes, self.variances, self.rest))
        centre, offsets, shift = (v.to(inputs) for v in self._places)
        m, r, d = axes.shape
        away = self.check(inputs).flatten(2) - centre  # (trials, b, d)
        squares = (away**2).sum(-1, keepdim=True) - 2 * away @ offsets.mT + (offsets**2).sum(-1)
        along = (away @ axes.flatten(0, 1).mT).reshape(*away.shape[:2], m, r) - shift
        distance = squares / rest + (along**2 * (1 / variances - 1 / rest)).sum(-1)
        volume = variances.log().sum(1) + (d - r) * rest.log() + d * math.log(2 * math.pi)
        weights = self._weights(labels, self.given_class.to(inputs), self.shares.to(inputs))
        known = weights > 0  # the gradient of log 0 is kept out of the graph
        logs = torch.where(known, torch.where(known, weights, 1.0).log(), -math.inf)
        return torch.logsumexp(logs - (distance + volume) / 2, -1).sum(1)

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        weights = self._rows(labels).double().cpu()
        n, (_, r, d) = len(weights), self.axes.shape
        chosen = weights.multinomial(1, generator=child(generator, "component"))[:, 0]
        across = normal((n, d), generator=child(generator, "across"), dtype=torch.float64)
        along = normal((n, r), generator=child(generator, "along"), dtype=torch.float64)
        drawn = self.means.double().cpu()[chosen]
        for component in set(chosen.tolist()):
            here = chosen == component
            axes, variances = (
                value[component % len(value)].double().cpu()
                for value in (self.axes, self.variances)
            )
            drawn[here] += self.rest.double().cpu().sqrt() * (
                across[here] - across[here] @ axes.mT @ axes
            )
            drawn[here] += (along[here] * variances.sqrt()) @ axes
        return drawn.reshape(n, *self.data.shape).to(self.means)

    def mean(self, labels: Tensor | int) -> Tensor:
        means = self._rows(labels) @ self.means
        return means.reshape(len(means), *self.data.shape)

    @property
    def precision(self) -> Tensor:
        """Σ_k p(k) Σ_k⁻¹, (d, d) in float64.

        With one covariance it is the inverse covariance, Fisher's information about the location.
        With several it bounds the information from above (that of a mixture is at most the mean
        of its components'), so a van Trees floor made with it stays a floor.
        """
        axes, rest = self.axes.double(), self.rest.double()
        shares = (self.shares @ self.given_class).double().reshape(len(axes), -1).sum(1)
        excess = shares[:, None] * (1 / self.variances.double() - 1 / rest)
        factors = axes.flatten(0, 1)
        eye = torch.eye(axes.shape[2], dtype=torch.float64, device=axes.device)
        return eye / rest + factors.mT @ (excess.flatten()[:, None] * factors)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the means (d,), the means about it (k, d) and along the axes (k, r)."""
        centre = self.means.mean(0)
        offsets = self.means - centre
        shared = self.axes.expand(len(offsets), -1, -1)
        return centre, offsets, torch.einsum("kd,krd->kr", offsets, shared)

    def _rows(self, labels: Tensor | int) -> Tensor:
        """p(k | label) for every example, (n, k)."""
        if isinstance(labels, int):
            weights = self._weights(None, self.given_class, self.shares)
            return weights.expand(labels, -1)
        return self._weights(labels.to(self.means.device), self.given_class, self.shares)

    @staticmethod
    def _weights(labels: Tensor | None, given_class: Tensor, shares: Tensor) -> Tensor:
        """p(k | labels), (..., k)."""
        if labels is None:
            return shares @ given_class
        if labels.is_floating_point():
            return labels.to(given_class) @ given_class
        return given_class[labels]


@dataclass(frozen=True)
class Axes:
    """Principal axes of some rows about their mean.

    Attributes:
        mean: (d,).
        axes: (r, d), orthonormal rows.
        variances: (r,), with denominator n, as maximum likelihood has it.
        total: the sum of all d variances.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    total: float

    def rest(self) -> float:
        """Mean variance across the axes; one where nothing is left."""
        r, d = self.axes.shape
        return max(self.total - float(self.variances.sum()), 0.0) / (d - r) if d > r else 1.0


def principal(rows: Tensor, *, rank: int, seed: int) -> Axes:
    """Find the leading principal axes, at most `rank` and at most what n rows can show.

    Args:
        rows: (n, d) float64.
        rank: most axes.
        seed: of scikit-learn's randomised solver, which it takes for large matrices.
    """
    from sklearn.decomposition import PCA

    n, d = rows.shape
    r = min(rank, n - 1, d)
    mean = rows.mean(0)
    total = float(rows.var(0, correction=0).sum())
    if r < 1 or total == 0:
        return Axes(mean, torch.eye(1, d).to(rows), rows.new_zeros(1), total)
    found = PCA(r, random_state=seed % 2**32).fit(rows.numpy())
    return Axes(
        mean,
        torch.from_numpy(found.components_.copy()),
        torch.from_numpy(found.explained_variance_ * (n - 1) / n),
        total,
    )


def floored(variances: Tensor, data: DataSpec) -> Tensor:
    """Variances no smaller than that of rounding to 256 levels, (step²)/12: none is zero."""
    low, high = data.bounds
    return variances.clamp(min=((high - low) / 255) ** 2 / 12)


def shares_of(labels: Tensor, data: DataSpec) -> Tensor:
    """Share of every class, (classes,) float64."""
    return torch.bincount(labels, minlength=data.classes).double() / len(labels)
