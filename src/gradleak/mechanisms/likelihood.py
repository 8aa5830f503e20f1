"""What mechanisms share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gradleak.types import Batch, Density, Likelihood, ModelState, Update


@runtime_checkable
class Placed(Protocol):
    """A density that depends on what the server broadcast."""

    def at(self, state: ModelState) -> Density:
        """The density for one broadcast."""
        ...


def density_at(known: Likelihood, state: ModelState) -> Density:
    """The density of what clients of this state send."""
    return known.density.at(state) if isinstance(known.density, Placed) else known.density


class Likely:
    """A mechanism whose `log_prob` follows from its `likelihood`, and that trains on its batch."""

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        """The batch whose gradient `sample` takes with an equal generator."""
        return batch

    def spent(self, state: ModelState) -> frozenset[str]:
        """Tensors that `predict` has used up."""
        return frozenset()

    @abstractmethod
    def likelihood(self, *, batch_size: int) -> Likelihood:
        """The density of what is sent for a batch of this size."""

    def log_prob(self, update: Update, state: ModelState, batch: Batch) -> Tensor:
        """Log-density of `update` in nats, 0-dimensional; raises as `likelihood` does."""
        known = self.likelihood(batch_size=len(batch))
        return -density_at(known, state)(known.centre.mean(state, batch).values, update.values)
