"""What a search varies, and how it becomes a claim."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradleak.priors import Generator
from gradleak.seeding import child, normal
from gradleak.types import Batch, DataSpec

_LEAST = 1e-4
"""Probability of a class that a claim excludes: softmax never gives zero."""

Variables = dict[str, Tensor]
"""Named tensors whose leading axis is the trial."""


@dataclass(frozen=True)
class Unknown(ABC):
    """What a search varies.

    Attributes:
        spec: public form of the data.
        batch_size: images per claim.
        labels: (targets, b) int64, or soft (targets, b, classes), where known or recovered
            beforehand; None searches jointly.
        dtype: precision of the search.
    """

    spec: DataSpec
    batch_size: int
    labels: Tensor | None
    dtype: torch.dtype

    @abstractmethod
    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        """Draw the starts of one target's restarts, (restarts, ...) each."""

    @abstractmethod
    def encode(self, claims: Sequence[Batch]) -> Variables:
        """Variables that decode to these claims, or as near as they can, one trial each."""

    @abstractmethod
    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs (trials, b, *shape) and labels (trials, b) or (trials, b, classes)."""

    def searched(self, claim: Batch) -> Batch:
        """A claim in the form that is searched for."""
        return claim

    def claimed(self, inputs: Tensor, labels: Tensor) -> Batch:
        """The claim of one trial: inputs (b, *shape) and labels as decoded."""
        return Batch(inputs, labels)

    def project_(self, variables: Variables) -> None:  # noqa: B027
        """Bring the variables back to where they decode to valid claims, in place."""


@dataclass(frozen=True)
class Images(Unknown):
    """Images in the data's box, with labels known or searched for as softmax(logits).

    Attributes:
        boxed: whether every step is projected into the bounds.
        mean, std: start ~ N(mean, std²), as shares of the bounds' width above the lower bound.
    """

    boxed: bool
    mean: float
    std: float

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        """Draw the starts of one target's restarts: (restarts, b, *shape), (restarts, b, k)."""
        low, high = self.spec.bounds
        shape = (self.batch_size, *self.spec.shape)
        draws, logits = [], []
        for restart in range(restarts):
            stream = child(generator, f"start/{restart}")
            draws.append(normal(shape, generator=stream, dtype=self.dtype))
            size = (self.batch_size, self.spec.classes)
            logits.append(normal(size, generator=child(stream, "labels"), dtype=self.dtype))
        inputs = low + (high - low) * (self.mean + self.std * torch.stack(draws))
        variables = {"inputs": inputs}
        if self.labels is None:
            variables["logits"] = torch.stack(logits)
        self.project_(variables)
        return variables

    def encode(self, claims: Sequence[Batch]) -> Variables:
        claims = [self.searched(claim) for claim in claims]
        variables = {"inputs": torch.stack([c.inputs for c in claims]).to(self.dtype)}
        if self.labels is None:
            rows = [
                one_hot(c.labels, self.spec.classes) if c.labels.ndim == 1 else c.labels
                for c in claims
            ]
            variables["logits"] = torch.stack(rows).to(self.dtype).clamp(min=_LEAST).log()
        return variables

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self.labels is None:
            return variables["inputs"], variables["logits"].softmax(-1)
        labels = self.labels[list(targets)].to(variables["inputs"].device)
        soft = labels.is_floating_point()
        return variables["inputs"], labels.to(self.dtype) if soft else labels

    def project_(self, variables: Variables) -> None:
        if self.boxed:
            variables["inputs"].clamp_(*self.spec.bounds)


@dataclass(frozen=True)
class Latents(Unknown):
    """Images that a generator draws: z ~ N(0, 1) per image, or z and a generator of its own each.

    Labels are known or recovered beforehand.

    Attributes:
        generator: a prior of public data.
        reach: bound on every |z|.
    """

    generator: Generator
    reach: float = math.inf

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        shape = (self.batch_size, self.generator.latent)
        streams = [child(generator, f"start/{restart}") for restart in range(restarts)]
        variables = {
            "latents": torch.stack(
                [normal(shape, generator=stream, dtype=self.dtype) for stream in streams]
            )
        }
        self.project_(variables)
        return variables

    def encode(self, claims: Sequence[Batch]) -> Variables:
        wanted = torch.stack([c.inputs for c in claims]).to(self.dtype)
        return {"latents": self.generator.nearest(wanted)}

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        own = {k: v for k, v in variables.items() if k != "latents"}
        assert self.labels is not None
        inputs = self.generator.images(variables["latents"], own or None)
        return inputs, self.labels[list(targets)].to(inputs.device)

    def project_(self, variables: Variables) -> None:
        variables["latents"].clamp_(-self.reach, self.reach)

    def with_weights(self, variables: Variables) -> Variables:
        """The same images, each drawn by a copy of the generator."""
        ahead = variables["latents"].shape[:-1]
        copies = {
            k: v.to(variables["latents"]).expand(*ahead, *v.shape).clone()
            for k, v in self.generator.weights.items()
        }
        return {"latents": variables["latents"], **copies}


@dataclass(frozen=True)
class GeneratorWeights(Latents):
    """The weights of one generator per image, whose latent stays as it is."""

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        still = variables["latents"].detach()
        return super().decode(variables | {"latents": still}, targets)
