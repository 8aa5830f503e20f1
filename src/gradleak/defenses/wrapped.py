"""What every protection that wraps a mechanism shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradleak.errors import IntractableLikelihood
from gradleak.types import Batch, Mechanism, ModelState, Update, UpdateKind


@dataclass(frozen=True)
class Wrapped:
    """A mechanism around another one: a layer of the onion."""

    inner: Mechanism

    @property
    def kind(self) -> UpdateKind:
        return self.inner.kind

    @property
    def deterministic(self) -> bool:
        return self.inner.deterministic

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        return self.inner.as_gradient(update, batch_size=batch_size)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self.inner.predict(received, state, batch)

    def log_prob(self, update: Update, state: ModelState, batch: Batch) -> Tensor:
        raise IntractableLikelihood(f"{type(self).__name__}: no exact density is known")


def undefended(mechanism: Mechanism) -> Mechanism:
    """Peel every protection off: what an attacker unaware of them believes."""
    while isinstance(mechanism, Wrapped):
        mechanism = mechanism.inner
    return mechanism
