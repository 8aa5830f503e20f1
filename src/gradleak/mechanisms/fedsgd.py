"""FedSGD: the client sends the gradient of one step (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy

from gradleak.errors import IntractableLikelihood
from gradleak.mechanisms.client import BatchNormMode, Local, Loss
from gradleak.mechanisms.likelihood import Likely
from gradleak.types import Batch, Likelihood, ModelState, Update, UpdateKind


@dataclass(frozen=True)
class FedSGD(Local, Likely):
    """u = ∇_θ (1/b) Σ_i ℓ(f_θ(x_i), y_i).

    Args:
        batch_norm: statistics the client normalises by, its batch's ("train") or the broadcast
            running ones ("eval").
        loss: mean loss over the batch.
    """

    batch_norm: BatchNormMode = "eval"
    loss: Loss = cross_entropy

    id: ClassVar[str] = "fedsgd"
    kind: ClassVar[UpdateKind] = "gradient"
    deterministic: ClassVar[bool] = True

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return Update(self.gradient(state, state.params, batch), "gradient")

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.mean(state, batch)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self.mean(state, batch)

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        return update

    def pooled(self, clients: int) -> FedSGD | None:
        """The mean of gradients of equal batches is the gradient of their union."""
        return self if self.batch_norm == "eval" else None

    def likelihood(self, *, batch_size: int) -> Likelihood:
        raise IntractableLikelihood("fedsgd is deterministic: it has no density")
