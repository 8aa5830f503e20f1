"""Every class is a Gaussian, all of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.errors import InvalidInput
from gradleak.priors.components import Gaussians, floored, principal, shares_of
from gradleak.priors.family import Fitted, check_counts
from gradleak.types import Batch, DataSpec


@dataclass(frozen=True)
class Gaussian:
    """p(x | y) = N(x; μ_y, (1 − a) S + a (tr S / d) I), S the covariance within classes.

    S is shared: with a few hundred examples per class it foretells unseen images better than one
    covariance for each. Beyond `rank` axes the mean of the variances is kept; this changes
    nothing where rank ≥ min(n, d).

    Args:
        shrinkage: a in [0, 1]; None estimates it (Ledoit & Wolf, 2004).
        rank: most axes kept.
    """

    shrinkage: float | None = None
    rank: int = 512

    id: ClassVar[str] = "gaussian"
    title: ClassVar[str] = "Gaussian per class, shared covariance"
    proper: ClassVar[bool] = True
    fitted: ClassVar[type[Fitted]] = Gaussians

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise InvalidInput(f"shrinkage={self.shrinkage}: expected a share in [0, 1]")
        check_counts(rank=self.rank)

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Gaussians:
        """Maximum likelihood, shrunk; a class without examples has the mean of all."""
        from sklearn.covariance import ledoit_wolf_shrinkage

        rows, classes = public.inputs.flatten(1), public.classes
        means = rows.mean(0).repeat(data.classes, 1)
        for c in set(classes.tolist()):
            means[c] = rows[classes == c].mean(0)
        within = rows - means[classes]
        found = principal(within, rank=self.rank, seed=seed)
        a = self.shrinkage
        if a is None:
            spread = found.total > 0
            a = float(ledoit_wolf_shrinkage(within.numpy(), assume_centered=True)) if spread else 0
        level = a * found.total / rows.shape[1]
        return Gaussians(
            self,
            data,
            means=means,
            axes=found.axes[None],
            variances=floored((1 - a) * found.variances + level, data)[None],
            rest=floored(rows.new_tensor((1 - a) * found.rest() + level), data),
            given_class=torch.eye(data.classes, dtype=torch.float64),
            shares=shares_of(classes, data),
        )
