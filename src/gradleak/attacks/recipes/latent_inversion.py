"""Image and latent noise together, against variational bottlenecks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import squared_norm, total_variation
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.defenses.none import NoDefense
from gradleak.defenses.precode import Latent
from gradleak.defenses.wrapped import Wrapped
from gradleak.errors import IntractableLikelihood, NotApplicable
from gradleak.types import About, Batch, Fact, ModelState, Observation, Update


@dataclass(frozen=True)
class LatentInversion(Recipe):
    """min over x in the box and ε of 1 − cos(g(x, ε), u) + α · TV(x) + β · mean ε², signed Adam.

    An honest server that knows of a variational bottleneck varies the noise that its client drew
    as it varies the image; β keeps the noise as long as normal draws are.

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's first step, in units of the box and of the noise alike.
        total_variation: α.
        noise: β.
        restarts: independent starts; the objective chooses.
    """

    steps: int = 4800
    learning_rate: float = 0.1
    total_variation: float = 0.003
    noise: float = 1e-4
    restarts: int = 1

    about: ClassVar[About] = About(
        id="latent-inversion",
        title="Inversion of image and latent noise",
        paper="Inverting Gradients (Geiping et al., NeurIPS 2020) with the latent noise among the "
        "unknowns, as suggested by Balunović et al., ICLR 2022, against PRECODE",
        link="https://arxiv.org/abs/2111.04706",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="of directions (cosine)",
        prior="total variation in the box, normal latent noise",
        deviations=("all tensors are compared, the bottleneck's included",),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {"quick": {"steps": 800}, "thorough": {"steps": 24000, "restarts": 4}}

    def compose(self, seen: Sequence[Observation]) -> Objective:
        client, first = seen[0].mechanism, seen[0]
        size = first.knowledge.batch_size or 1
        if not isinstance(client, Latent):
            raise NotApplicable("latent-inversion: the client is not known to draw a latent")
        unknown = _WithLatent(
            first.data,
            size,
            labels=labels_to_match(seen),
            boxed=True,
            mean=0.5,
            std=0.25,
            dtype=self.dtype,
            latent=client.latent_shape(first.state, batch_size=size)[1:],
        )
        asked = [replace(o, mechanism=_Given(o.mechanism, NoDefense(), unknown)) for o in seen]
        return Objective(
            unknown=unknown,
            fit=Matching(asked, cosine, dtype=self.dtype),
            penalties=(
                (self.total_variation, lambda x, _: total_variation(unknown.image(x))),
                (self.noise, lambda x, _: squared_norm(unknown.noise(x))),
            ),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        return adam(
            objective, start, steps=self.steps, learning_rate=self.learning_rate, signed=True
        )


@dataclass(frozen=True)
class _WithLatent(Images):
    """Images and, behind each of them in one row, the noise that it met."""

    latent: tuple[int, ...]

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        found = super().start(generator, restarts=restarts)
        shape = (*found["inputs"].shape[:2], *self.latent)
        return found | {"latent": torch.zeros(shape, dtype=self.dtype)}

    def encode(self, claims: Sequence[Batch]) -> Variables:
        found = super().encode(claims)
        flat = found["inputs"]
        return found | {"inputs": self.image(flat), "latent": self.noise(flat)}

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, labels = super().decode(variables, targets)
        return torch.cat([inputs.flatten(2), variables["latent"].flatten(2)], 2), labels

    def searched(self, claim: Batch) -> Batch:
        blank = claim.inputs.new_zeros((len(claim), math.prod(self.latent)))
        return Batch(torch.cat([claim.inputs.flatten(1), blank], 1), claim.labels)

    def claimed(self, inputs: Tensor, labels: Tensor) -> Batch:
        return Batch(self.image(inputs), labels)

    def image(self, flat: Tensor) -> Tensor:
        """(…, b, pixels + noise) → (…, b, *shape)."""
        return flat[..., : math.prod(self.spec.shape)].reshape(*flat.shape[:-1], *self.spec.shape)

    def noise(self, flat: Tensor) -> Tensor:
        """(…, b, pixels + noise) → (…, b, *latent)."""
        return flat[..., math.prod(self.spec.shape) :].reshape(*flat.shape[:-1], *self.latent)


@dataclass(frozen=True)
class _Given(Wrapped):
    """A client whose claim brings the noise along."""

    split: _WithLatent

    @property
    def deterministic(self) -> bool:
        return True

    def mean(self, state: ModelState, batch: Batch) -> Update:
        raise IntractableLikelihood("a client whose noise is part of the claim has no mean")

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.inner.sample(state, batch, generator=generator)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        client, flat = self.inner, batch.inputs
        assert isinstance(client, Latent)
        images = Batch(self.split.image(flat), batch.labels)
        return client.predict_given(received, state, images, self.split.noise(flat))

    def spent(self, state: ModelState) -> frozenset[str]:
        """None: with its noise known, every tensor says something."""
        return frozenset()
