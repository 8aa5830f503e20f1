"""ROG: a low-resolution image through obfuscated gradients (Yue et al., USENIX Security 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradleak.attacks.parts.distances import squared_l2
from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.mechanisms.client import check_positive
from gradleak.priors import Manifold
from gradleak.seeding import child, normal
from gradleak.types import About, Batch, Fact, Observation


def tenth_cosine(step: int, steps: int) -> float:
    """From 1 to 0.1 by half a cosine."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class SmallImages(Images):
    """Images of fewer pixels, made large by bicubic interpolation.

    Attributes:
        factor: pixels of a side that one searched pixel stands for.
        manifold: what the claims are passed through in the end; None leaves them.
    """

    factor: int = 4
    manifold: Manifold | None = None

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        low, high = self.spec.bounds
        sides = [-(-side // self.factor) for side in self.spec.shape[1:]]
        shape = (self.batch_size, self.spec.shape[0], *sides)
        drawn = [
            normal(shape, generator=child(generator, f"start/{r}"), dtype=self.dtype)
            for r in range(restarts)
        ]
        return {"inputs": low + (high - low) * (self.mean + self.std * torch.stack(drawn))}

    def encode(self, claims: Sequence[Batch]) -> Variables:
        inputs = torch.stack([c.inputs for c in claims]).to(self.dtype)
        sides = [-(-side // self.factor) for side in self.spec.shape[1:]]
        small = interpolate(inputs.flatten(0, 1), size=sides, mode="area")
        return {"inputs": small.reshape(*inputs.shape[:2], *small.shape[1:])}

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        small, labels = super().decode(variables, targets)
        size = tuple(self.spec.shape[1:])
        large = interpolate(small.flatten(0, 1), size=size, mode="bicubic", align_corners=False)
        return large.reshape(*small.shape[:2], *large.shape[1:]), labels

    def claimed(self, inputs: Tensor, labels: Tensor) -> Batch:
        if self.manifold is not None:
            inputs = self.manifold.to(inputs.dtype).reproduced(inputs).clamp(*self.spec.bounds)
        return Batch(inputs, labels)


@dataclass(frozen=True)
class ROG(Recipe):
    """min over small z of ‖∇ℓ(f(U(z)), y) − u‖², U bicubic enlargement.

    An honest server searches few pixels, which what survives of an obfuscated update determines,
    and leaves the detail to a model of pictures, an autoencoder if one is granted.

        z ~ N(centre of the box, a quarter of its width), a side 1/factor of the image's
        repeat: Adam step, its rate falling to a tenth by a cosine
        claim U(z), or A(U(z)) where an autoencoder A is granted

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's first step, in units of the box.
        factor: of enlargement.
        restarts: independent starts; the objective chooses.
    """

    steps: int = 100
    learning_rate: float = 0.05
    factor: int = 4
    restarts: int = 1

    about: ClassVar[About] = About(
        id="rog",
        title="Reconstruction from obfuscated gradients",
        paper="Yue et al., Gradient Obfuscation Gives a False Sense of Security in Federated "
        "Learning, USENIX Security 2023",
        link="https://github.com/KAI-YUE/rog",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="Gaussian (squared L2)",
        prior="images of few pixels; an autoencoder where granted",
        deviations=(
            "the published enhancement, the mean of a conditional generator and of a denoiser with "
            "super-resolution trained on ImageNet, is replaced by the granted autoencoder, or none",
            "small images, where the published pictures have 128 pixels a side",
            "an aware server predicts through the protection (published: compares with the "
            "decompressed update)",
            "labels that are not granted are recovered by iDLG (one example) or by sign counts",
            "the best iterate is kept (published: the last)",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {"thorough": {"steps": 1000, "restarts": 4}}

    def __post_init__(self) -> None:
        check_positive(factor=self.factor)

    def compose(self, seen: Sequence[Observation]) -> Objective:
        prior = seen[0].knowledge.prior
        return Objective(
            unknown=SmallImages(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=torch.stack([known_or_recovered(o) for o in seen]),
                boxed=False,
                mean=0.5,
                std=0.25,
                dtype=self.dtype,
                factor=self.factor,
                manifold=prior if isinstance(prior, Manifold) else None,
            ),
            fit=Matching(seen, squared_l2, dtype=self.dtype),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        low, high = objective.unknown.spec.bounds
        return adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate * (high - low),
            schedule=tenth_cosine,
            epsilon=1e-16,  # deltas are short, and their squares shorter
        )
