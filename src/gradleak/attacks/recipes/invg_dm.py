"""Inverting Gradients against clients of diffusion models, noise and times known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.known_noise import unlabelled
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import total_variation
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class InvGDM(Recipe):
    """min over x in the box of 1 − cos(∇ℓ(θ; x, ε, t), u) + α · TV(x), by Adam on signs.

    Inverting Gradients by a server that knows the noise and the times of its client.

        x ~ N(centre of the box, a quarter of its width)
        repeat: Adam step on the gradient's sign, rate ÷ 10 at 3/8, 5/8, 7/8; clip to the box
        keep the iterate with the lowest objective

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's first step, in units of the box.
        total_variation: α.
        restarts: independent starts; the objective chooses.
    """

    steps: int = 1000
    learning_rate: float = 0.1
    total_variation: float = 1e-4
    restarts: int = 1

    about: ClassVar[About] = About(
        id="invg-dm",
        title="Inverting Gradients of a diffusion model",
        paper="Inverting Gradients (Geiping et al., NeurIPS 2020) as the baseline of Huang, Hong, "
        "Roos & Chen, GIDM: Gradient Inversion of Federated Diffusion Models, ARES 2025",
        link="https://arxiv.org/abs/2405.20380",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.TIMESTEPS, Fact.NOISE}),
        likelihood="of directions (cosine)",
        prior="total variation in the box",
        deviations=(
            "steps, rates and start are those of Inverting Gradients as it is here",
            "the best iterate by the whole objective is kept (published: the last)",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {"quick": {"steps": 300}, "thorough": {"steps": 5000, "restarts": 4}}

    def compose(self, seen: Sequence[Observation]) -> Objective:
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=unlabelled(seen),
                boxed=True,
                mean=0.5,
                std=0.25,
                dtype=self.dtype,
            ),
            fit=Matching(seen, cosine, dtype=self.dtype),
            penalties=((self.total_variation, total_variation),),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        low, high = objective.unknown.spec.bounds
        rate = self.learning_rate * (high - low)
        return adam(objective, start, steps=self.steps, learning_rate=rate, signed=True)
