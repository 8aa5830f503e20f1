"""FedAvg: the client trains locally and sends the change (McMahan et al., AISTATS 2017, Alg. 1)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import cross_entropy

from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms.client import BatchNormMode, Local, Loss, check_positive
from gradleak.mechanisms.likelihood import Likely
from gradleak.mechanisms.unroll import Params, Visit, unroll
from gradleak.types import Batch, Likelihood, ModelState, Update, UpdateKind

Order = tuple[tuple[int, ...], ...]
"""Example indices of each local step, in order."""

_MOST_ORDERS = 64


@dataclass(frozen=True)
class FedAvg(Local, Likely):
    """u = θ_T − θ_0 with θ_{t+1} = θ_t − η ∇ℓ(θ_t; minibatch t), unrolled differentiably.

    Args:
        learning_rate: local η.
        epochs: passes over the client's batch.
        steps: local steps; overrides `epochs` (step t takes minibatch t modulo their number).
        minibatch_size: examples per step; None takes the whole batch.
        order: "sequential" visits the batch as it lies; "shuffled" draws a permutation per epoch.
        fixed_order: indices of every step, where the visiting order is known.
        batch_norm: statistics the client normalises by.
        loss: mean loss over a minibatch.
    """

    learning_rate: float = 0.01
    epochs: int = 1
    steps: int | None = None
    minibatch_size: int | None = None
    order: Literal["sequential", "shuffled"] = "sequential"
    fixed_order: Order | None = None
    batch_norm: BatchNormMode = "eval"
    loss: Loss = cross_entropy

    id: ClassVar[str] = "fedavg"
    kind: ClassVar[UpdateKind] = "delta"

    def __post_init__(self) -> None:
        check_positive(learning_rate=self.learning_rate, epochs=self.epochs)
        if self.steps is not None:
            check_positive(steps=self.steps)
        if self.minibatch_size is not None:
            check_positive(minibatch_size=self.minibatch_size)

    @property
    def ordered(self) -> bool:
        """Whether the visiting order is no secret draw."""
        return self.fixed_order is not None or self.order == "sequential"

    @property
    def deterministic(self) -> bool:
        return self.ordered

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if self.ordered:
            return self._train(state, batch, self.fixed_order or self._order(len(batch)))
        orders = self._all_orders(len(batch))
        deltas = [self._train(state, batch, order).values for order in orders]
        total = {k: torch.stack([d[k] for d in deltas]).mean(0) for k in state.params}
        return Update(total, "delta")

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self._train(state, batch, self.draw_order(len(batch), generator=generator))

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """Train in the known order, or as the batch lies: an unknown order is a relabelling of
        the claim within one epoch, and an approximation over several."""
        return self._train(state, batch, self.fixed_order or self._order(len(batch)))

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        scale = -1.0 / (self.learning_rate * self.local_steps(batch_size))
        return Update({k: v * scale for k, v in update.values.items()}, "gradient")

    def likelihood(self, *, batch_size: int) -> Likelihood:
        raise IntractableLikelihood("fedavg has no density: its only randomness is an order")

    def local_steps(self, batch_size: int) -> int:
        """Steps of one round of local training."""
        return len(self._order(batch_size))

    def unseen_orders(self, batch_size: int) -> int:
        """Whole epochs of unknown visiting order; 1 where an order is known or changes nothing.

        Within one epoch an order is a relabelling of the batch.
        """
        per_epoch = -(-batch_size // self._minibatch(batch_size))
        if self.ordered or per_epoch == 1:
            return 1
        return max(1, self.local_steps(batch_size) // per_epoch)

    def determined(self, batch_size: int) -> bool:
        return self.unseen_orders(batch_size) == 1

    def copied(self, batch_size: int) -> Order:
        """Visits of every step if whole epoch e had examples of its own, from e · b on.

        They are visited as they lie; an epoch cut short visits those of the first.
        """
        whole = self.unseen_orders(batch_size)
        first = [e * batch_size if e < whole else 0 for e in range(self._epochs_needed(batch_size))]
        return self._order(batch_size, [list(range(i, i + batch_size)) for i in first])

    def draw_order(self, batch_size: int, *, generator: torch.Generator) -> Order:
        """Draw the visiting order of one round of local training."""
        if self.ordered:
            return self.fixed_order or self._order(batch_size)
        permutations = [
            torch.randperm(batch_size, generator=generator).tolist()
            for _ in range(self._epochs_needed(batch_size))
        ]
        return self._order(batch_size, permutations)

    def _minibatch(self, batch_size: int) -> int:
        size = self.minibatch_size or batch_size
        if size > batch_size:
            raise InvalidInput(f"minibatch_size={size}: expected at most the batch, {batch_size}")
        return size

    def _epochs_needed(self, batch_size: int) -> int:
        per_epoch = -(-batch_size // self._minibatch(batch_size))
        return self.epochs if self.steps is None else -(-self.steps // per_epoch)

    def _order(self, batch_size: int, permutations: list[list[int]] | None = None) -> Order:
        size = self._minibatch(batch_size)
        epochs = permutations or [list(range(batch_size))] * self._epochs_needed(batch_size)
        order = [tuple(p[i : i + size]) for p in epochs for i in range(0, batch_size, size)]
        return tuple(order[: self.steps])

    def _all_orders(self, batch_size: int) -> set[Order]:
        size = self._minibatch(batch_size)
        epochs = self._epochs_needed(batch_size)
        if size == batch_size:
            return {self._order(batch_size)}
        if batch_size > 5:
            raise IntractableLikelihood(f"fedavg: too many orders of {batch_size} examples")
        single = list(itertools.permutations(range(batch_size)))
        if len(single) ** epochs > _MOST_ORDERS**2:
            raise IntractableLikelihood(f"fedavg: too many orders over {epochs} epochs")
        orders = {
            tuple(tuple(sorted(step)) for step in self._order(batch_size, [list(p) for p in ps]))
            for ps in itertools.product(single, repeat=epochs)
        }
        if len(orders) > _MOST_ORDERS:
            raise IntractableLikelihood(f"fedavg: {len(orders)} orders, at most {_MOST_ORDERS}")
        return orders

    def _train(self, state: ModelState, batch: Batch, order: Order) -> Update:
        def step(params: Params, batch: Batch, visit: Visit) -> Params:
            if visit != tuple(range(len(batch))):
                index = torch.tensor(visit, device=batch.inputs.device)
                batch = Batch(batch.inputs[index], batch.labels[index])
            gradient = self.gradient(state, params, batch)
            return {k: p - self.learning_rate * gradient[k] for k, p in params.items()}

        params = unroll(step, dict(state.params), batch, order)
        return Update({k: params[k] - state.params[k] for k in params}, "delta")
