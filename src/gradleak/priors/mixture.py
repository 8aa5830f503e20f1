"""Examples come in kinds, which need not be the classes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.errors import InvalidInput
from gradleak.priors.components import Gaussians, floored, principal, shares_of
from gradleak.priors.family import Fitted, check_counts
from gradleak.types import Batch, DataSpec


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in the principal subspace, with one round Gaussian across it.

    A class weighs the components by how much of its public examples they explain.

    Args:
        components: Gaussians; fewer where there are fewer public examples.
        rank: dimensions of the subspace.
        ridge: added to every variance in the subspace, as a share of the mean variance of an entry;
            components of few examples overfit without it.
    """

    components: int = 10
    rank: int = 64
    ridge: float = 0.1

    id: ClassVar[str] = "mixture"
    title: ClassVar[str] = "Mixture of Gaussians"
    proper: ClassVar[bool] = True
    fitted: ClassVar[type[Fitted]] = Gaussians

    def __post_init__(self) -> None:
        check_counts(components=self.components, rank=self.rank)
        if not 0 <= self.ridge < math.inf:
            raise InvalidInput(f"ridge={self.ridge}: expected a number ≥ 0")

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Gaussians:
        """Expectation maximisation, from k-means."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        rows = public.inputs.flatten(1)
        if len(rows) < 2:
            raise InvalidInput("prior 'mixture' of one public example: expected at least 2")
        space = principal(rows, rank=self.rank, seed=seed)
        scores = ((rows - space.mean) @ space.axes.T).numpy()
        ridge = float(floored(rows.new_tensor(self.ridge * space.total / rows.shape[1]), data))
        model = GaussianMixture(
            min(self.components, len(rows)), reg_covar=ridge, random_state=seed % 2**32
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a likelihood that still climbs
            model.fit(scores)
        variances, turns = torch.linalg.eigh(torch.from_numpy(model.covariances_))
        explained = torch.from_numpy(model.predict_proba(scores))
        member = torch.nn.functional.one_hot(public.classes, data.classes).double()
        counts = member.sum(0)[:, None]
        own = member.T @ explained / counts.clamp(min=1)
        return Gaussians(
            self,
            data,
            means=space.mean + torch.from_numpy(model.means_) @ space.axes,
            axes=turns.mT @ space.axes,
            variances=floored(variances, data),
            rest=floored(rows.new_tensor(space.rest()), data),
            given_class=torch.where(counts > 0, own, explained.mean(0)),
            shares=shares_of(public.classes, data),
        )
