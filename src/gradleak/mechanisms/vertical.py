"""Vertical federated learning: parties hold slices of the features of the same examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy

from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms.client import (
    BatchNormMode,
    Local,
    Loss,
    check_positive,
    normalises,
)
from gradleak.mechanisms.fedavg import Order
from gradleak.mechanisms.likelihood import Likely
from gradleak.mechanisms.unroll import Visit
from gradleak.types import Batch, Likelihood, ModelState, Update, UpdateKind


@dataclass(frozen=True)
class Vertical(Local, Likely):
    """u_t = ∇_θ (1/b) Σ_{i∈S_t} ℓ(f_θ(x_i), y_i), for rounds t over one set of private examples.

    Every round the server names b examples S_t; each party passes its slice of them through its
    part of the network and sends the gradient of that part, summed over the round. The parts and
    the slices are the network's (`cafe`), and the gradients of all parts are that of the whole.
    A batch is the whole private set, and an update is that of one round.

    Args:
        rounds: rounds that are seen.
        round_size: b, drawn without replacement every round; None takes all examples.
        learning_rate: of the server's step between rounds; 0 leaves the weights where they are.
        fixed_order: examples of every round (the batch indices), where they are known.
        batch_norm: statistics that are normalised by.
        loss: mean loss over the round's examples.
    """

    rounds: int = 1
    round_size: int | None = None
    learning_rate: float = 0.0
    fixed_order: Order | None = None
    batch_norm: BatchNormMode = "eval"
    loss: Loss = cross_entropy

    id: ClassVar[str] = "vertical"
    kind: ClassVar[UpdateKind] = "gradient"

    def __post_init__(self) -> None:
        check_positive(rounds=self.rounds)
        if self.round_size is not None:
            check_positive(round_size=self.round_size)
        if not 0 <= self.learning_rate < float("inf"):
            raise InvalidInput(f"learning_rate={self.learning_rate}: expected zero or more")

    @property
    def deterministic(self) -> bool:
        return self.fixed_order is not None or self.round_size is None

    def mean(self, state: ModelState, batch: Batch) -> Update:
        """The gradient of the latest round, or of all examples where it is not known."""
        if not self.deterministic and self.batch_norm == "train" and normalises(state.model):
            raise IntractableLikelihood("vertical: batch statistics of an unknown round")
        return self.predict(Update(state.params, self.kind), state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self._gradient(state, batch, self.draw_order(len(batch), generator=generator)[-1])

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """`mean`, or the gradient of all examples where that has no form."""
        visit = self.fixed_order[-1] if self.fixed_order else tuple(range(len(batch)))
        return self._gradient(state, batch, visit)

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        return update

    def likelihood(self, *, batch_size: int) -> Likelihood:
        raise IntractableLikelihood("vertical has no density: its only randomness is a choice")

    def draw_order(self, batch_size: int, *, generator: torch.Generator) -> Order:
        """Draw the examples of every round."""
        if self.fixed_order is not None:
            return self.fixed_order
        size = self.round_size or batch_size
        if size > batch_size:
            raise InvalidInput(f"round_size={size}: expected at most the batch, {batch_size}")
        if size == batch_size:
            return (tuple(range(size)),) * self.rounds
        draws = (torch.randperm(batch_size, generator=generator) for _ in range(self.rounds))
        return tuple(tuple(sorted(draw[:size].tolist())) for draw in draws)

    def after(self, state: ModelState, update: Update) -> ModelState:
        """What the server broadcasts in the round after `update`."""
        if not self.learning_rate:
            return state
        moved = {k: p - self.learning_rate * update.values[k] for k, p in state.params.items()}
        return replace(state, params=moved)

    def _gradient(self, state: ModelState, batch: Batch, visit: Visit) -> Update:
        if visit != tuple(range(len(batch))):
            index = torch.tensor(visit, device=batch.inputs.device)
            batch = Batch(batch.inputs[index], batch.labels[index])
        return Update(self.gradient(state, state.params, batch), self.kind)
