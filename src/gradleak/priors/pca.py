"""All examples lie near one subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.priors.components import Gaussians, floored, principal, shares_of
from gradleak.priors.family import Fitted, check_counts
from gradleak.types import Batch, DataSpec


@dataclass(frozen=True)
class Pca:
    """Probabilistic PCA (Tipping & Bishop, 1999): x = μ + W z + noise, whatever the class.

    One Gaussian with the leading variances along the principal axes and the mean of the others
    across them, which is the maximum of the likelihood.

    Args:
        rank: most axes.
    """

    rank: int = 64

    id: ClassVar[str] = "pca"
    title: ClassVar[str] = "Probabilistic PCA"
    proper: ClassVar[bool] = True
    fitted: ClassVar[type[Fitted]] = Gaussians

    def __post_init__(self) -> None:
        check_counts(rank=self.rank)

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Gaussians:
        """Maximum likelihood."""
        rows = public.inputs.flatten(1)
        found = principal(rows, rank=self.rank, seed=seed)
        return Gaussians(
            self,
            data,
            means=found.mean[None],
            axes=found.axes[None],
            variances=floored(found.variances, data)[None],
            rest=floored(rows.new_tensor(found.rest()), data),
            given_class=torch.ones(data.classes, 1, dtype=torch.float64),
            shares=shares_of(public.classes, data),
        )
