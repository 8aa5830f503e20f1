"""What a secure sum shows: the mean of several clients' updates, and nothing of its terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms.client import check_positive
from gradleak.mechanisms.fedavg import FedAvg
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.mechanisms.likelihood import Likely
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update, UpdateKind


@dataclass(frozen=True)
class Aggregate(Likely):
    """ū = (1/n) Σ_i u_i with u_i ~ inner(state, batch_i), independently.

    A batch holds the examples of all clients, b of each, client after client; weights are equal,
    which is what weighting by examples comes to here. For `FedSGD` in evaluation mode ū is the
    gradient of one batch of n·b; after several local steps it is not. A mechanism is best made by
    `summed`, which knows of such equalities.

    Args:
        inner: what every client runs, its protections included.
        clients: n.
    """

    inner: Mechanism
    clients: int = 1

    def __post_init__(self) -> None:
        check_positive(clients=self.clients)

    @property
    def kind(self) -> UpdateKind:
        return self.inner.kind

    @property
    def deterministic(self) -> bool:
        return self.inner.deterministic

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return mean(
            self.inner.sample(state, part, generator=stream)
            for part, stream in zip(parts(batch, self.clients), self._streams(generator))
        )

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        return joined(
            self.inner.trained_on(state, part, generator=stream)
            for part, stream in zip(parts(batch, self.clients), self._streams(generator))
        )

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return mean(self.inner.mean(state, part) for part in parts(batch, self.clients))

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """The mean of what every client's predictor says.

        A sum shows no client's own support or signs. Where clients are deterministic their means
        are exact and the predictors lend their derivatives alone, which some means lack.
        """
        plain = isinstance(self.inner, FedSGD | FedAvg)
        predicted = []
        for part in parts(batch, self.clients):
            update = self.inner.predict(received, state, part)
            if self.deterministic and not plain:
                exact = self.inner.mean(state, part).values
                update = Update(
                    {k: v + (exact[k] - v).detach() for k, v in update.values.items()}, update.kind
                )
            predicted.append(update)
        return mean(predicted)

    def spent(self, state: ModelState) -> frozenset[str]:
        return self.inner.spent(state)

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        return self.inner.as_gradient(update, batch_size=batch_size // self.clients)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        one = summed(self.inner, self.clients)
        if isinstance(one, Aggregate):
            raise IntractableLikelihood(f"a sum of {self.clients} clients: no exact density")
        return one.likelihood(batch_size=batch_size)

    def _streams(self, generator: torch.Generator) -> list[torch.Generator]:
        """A stream for every client; a single one draws from the generator itself."""
        seeds = torch.randint(2**62, (self.clients - 1,), generator=generator).tolist()
        return [generator, *(torch.Generator().manual_seed(seed) for seed in seeds)]


@runtime_checkable
class Pooling(Protocol):
    """A mechanism that may know what the mean of several of its kind is as one client."""

    def pooled(self, clients: int) -> Mechanism | None:
        """The client with the examples of all whose update has the law of their mean, if any."""
        ...


def summed(mechanism: Mechanism, clients: int) -> Mechanism:
    """What a server believes of the mean of n clients' updates, in the simplest equal form.

    One client is the mechanism itself; a FedSGD mean is FedSGD on the joint batch; independent
    Gaussian noise averages to Gaussian noise of std/√n. An attack that knows these forms needs to
    know nothing of sums.
    """
    check_positive(clients=clients)
    if clients == 1:
        return mechanism
    known = mechanism.pooled(clients) if isinstance(mechanism, Pooling) else None
    return Aggregate(mechanism, clients) if known is None else known


def parts(batch: Batch, clients: int) -> list[Batch]:
    """The batch of every client, in order."""
    size, rest = divmod(len(batch), clients)
    if rest or not size:
        raise InvalidInput(f"{len(batch)} examples of {clients} clients: expected as many of each")
    return [
        Batch(batch.inputs[i : i + size], batch.labels[i : i + size])
        for i in range(0, len(batch), size)
    ]


def joined(batches: Iterable[Batch]) -> Batch:
    """Inverse of `parts`."""
    each = list(batches)
    if len(each) == 1:
        return each[0]
    return Batch(torch.cat([b.inputs for b in each]), torch.cat([b.labels for b in each]))


def mean(updates: Iterable[Update]) -> Update:
    """(1/n) Σ_i u_i, tensor by tensor."""
    each = list(updates)
    if len(each) == 1:
        return each[0]
    values = {k: torch.stack([u.values[k] for u in each]).mean(0) for k in each[0].values}
    return Update(values, each[0].kind)


def without(total: Update, known: Sequence[Update], *, clients: int) -> Update:
    """The mean of the other clients' updates, (n ū − Σ_known u_i) / (n − k)."""
    if not known:
        return total
    left = clients - len(known)
    return Update(
        {
            k: (clients * v - sum(u.values[k] for u in known)) / left
            for k, v in total.values.items()
        },
        total.kind,
    )
