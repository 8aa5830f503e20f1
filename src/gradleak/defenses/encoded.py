"""What protections share that train on something else than the client's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradleak.defenses.wrapped import Defense, Wrapped, undefended
from gradleak.denoising import denoises
from gradleak.errors import IntractableLikelihood
from gradleak.mechanisms import Diffusing
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import Batch, Mechanism, ModelState, Update


class Encoding(Defense, Protocol):
    """A protection that draws what the client trains on in place of its batch."""

    @property
    def mixes_labels(self) -> bool:
        """Whether what is trained on has soft labels that no class describes."""
        ...

    def encode(self, state: ModelState, batch: Batch, generator: torch.Generator) -> Batch:
        """What the client trains on instead."""
        ...


@dataclass(frozen=True)
class Encoded(Wrapped):
    """u = g(E(x, y)) with E drawn for every batch.

    The update is an ordinary gradient of E(x, y), so an attack needs no change and claims E(x, y).
    A client that trains a diffusion model uses no labels: they stay as they are.
    """

    rule: Encoding

    @property
    def deterministic(self) -> bool:
        return False

    def mean(self, state: ModelState, batch: Batch) -> Update:
        raise IntractableLikelihood(f"{self.rule.id}: no closed form of the mean over its draws")

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        encoded = self._encoded(state, batch, generator)
        return self.inner.sample(state, encoded, generator=generator)

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        encoded = self._encoded(state, batch, generator)
        return self.inner.trained_on(state, encoded, generator=generator)

    def _encoded(self, state: ModelState, batch: Batch, generator: torch.Generator) -> Batch:
        encoded = self.rule.encode(state, batch, generator)
        return Batch(encoded.inputs, batch.labels) if denoises(state.model) else encoded


def mixes_labels(mechanism: Mechanism) -> bool:
    """Whether clients train on soft labels that no class describes."""
    if isinstance(undefended(mechanism), Diffusing):
        return False
    while isinstance(mechanism, Wrapped):
        if isinstance(mechanism, Encoded) and mechanism.rule.mixes_labels:
            return True
        mechanism = mechanism.inner
    return False


def soft_labels(state: ModelState, batch: Batch) -> Tensor:
    """The labels as rows of probabilities (b, classes); classes are the network's outputs.

    For a network that denoises they are rows of one zero, which nobody reads.
    """
    if batch.labels.ndim == 2:
        return batch.labels
    if denoises(state.model):
        return batch.inputs.new_zeros((len(batch), 1))
    model = template(state.model, "eval")
    numbers = dict(state.params), own_buffers(model, state)
    first = batch.inputs[:1].to(next(iter(state.params.values())))
    with torch.no_grad():
        logits = torch.func.functional_call(model, numbers, (first,))
    return one_hot(batch.labels, logits.shape[1]).to(batch.inputs)


def mixture(
    batch: Batch, weights: Tensor, public: Batch | None, *, own: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every example with `own` − 1 others of its batch, and public ones for what is left.

    Args:
        batch: (b, *shape) with soft labels (b, classes).
        weights: (b, k) rows that sum to one, the example itself first.
        public: with soft labels; unused where own = k.
        own: examples of the batch in every mixture, at most b; no two alike.
        generator: source of the partners.

    Returns:
        Mixed inputs (b, *shape), and the labels of what was mixed (b, k, classes).
    """
    order = torch.randperm(len(batch), generator=generator)
    turned = order.argsort()[:, None] + torch.arange(own)
    partners = order[turned % len(batch)].to(batch.labels.device)
    inputs, labels = batch.inputs[partners], batch.labels[partners]
    left = weights.shape[1] - own
    if left and public is not None:
        drawn = torch.randint(len(public), (len(batch), left), generator=generator)
        inputs = torch.cat([inputs, public.inputs[drawn].to(inputs)], 1)
        labels = torch.cat([labels, public.labels[drawn].to(labels)], 1)
    shares = weights.to(inputs).reshape(*weights.shape, *[1] * (batch.inputs.ndim - 1))
    return (shares * inputs).sum(1), labels
