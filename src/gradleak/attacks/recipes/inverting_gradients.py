"""Inverting Gradients (Geiping, Bauermeister, Dröge & Moeller, NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import known_statistics, total_variation
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class InvertingGradients(Recipe):
    """min over x in the box of 1 − cos(∇ℓ(f(x), y), u) + α · TV(x), by Adam on signs.

    An honest server matches the direction of the update and not its length, which a trained
    network makes small, and asks for a piecewise smooth image.

        x ~ N(centre of the box, a quarter of its width)
        repeat: g = sign(∂/∂x [1 − cos + α TV]); Adam step, rate ÷ 10 at 3/8, 5/8, 7/8; clip to box
        keep the iterate with the lowest objective

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's first step, in units of the box.
        total_variation: α.
        batch_norm: weight of the penalty on batch-normalisation statistics, where the batch's
            own are granted.
        running: its weight where the running estimates stand in for them.
        restarts: independent starts; the objective chooses.
        halving: drop the worse half of the restarts after …, 1/4 and 1/2 of the steps.
    """

    steps: int = 4800
    learning_rate: float = 0.1
    total_variation: float = 0.003
    batch_norm: float = 0.1
    running: float = 1e-3
    restarts: int = 1
    halving: bool = False

    about: ClassVar[About] = About(
        id="inverting-gradients",
        title="Inverting Gradients",
        paper="Geiping et al., Inverting Gradients: How Easy Is It to Break Privacy in Federated "
        "Learning?, NeurIPS 2020",
        link="https://arxiv.org/abs/2003.14053",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="of directions (cosine)",
        prior="total variation in the box",
        deviations=(
            "images are searched in pixel units, normalisation being part of the network",
            "total-variation weight 0.003, chosen on public images (published code: 0.1)",
            "labels that are not granted are recovered by iDLG (one example) or by sign counts",
            "the best iterate by the whole objective is kept (published: the last)",
            "a batch-normalisation penalty where its statistics are granted (Huang et al., NeurIPS "
            "2021), its weight chosen on public images",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {"quick": {"steps": 400}, "thorough": {"steps": 24000, "restarts": 4}}

    def compose(self, seen: Sequence[Observation]) -> Objective:
        fit = Matching(seen, cosine, dtype=self.dtype)
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=labels_to_match(seen),
                boxed=True,
                mean=0.5,
                std=0.25,
                dtype=self.dtype,
            ),
            fit=fit,
            penalties=(
                (self.total_variation, total_variation),
                *known_statistics(seen, fit.state, exact=self.batch_norm, running=self.running),
            ),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        low, high = objective.unknown.spec.bounds
        rate = self.learning_rate * (high - low)
        return adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=rate,
            signed=True,
            halving=self.cuts,
        )
