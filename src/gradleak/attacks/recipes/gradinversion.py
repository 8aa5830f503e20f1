"""See through Gradients, known as GradInversion (Yin et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.labels.class_sets import RowMin
from gradleak.attacks.parts.distances import layer_norms
from gradleak.attacks.parts.drifts import GroupConsistency, langevin
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import known_statistics, squared_norm, total_variation
from gradleak.attacks.parts.search import Drift, Search, adam, warm_cosine
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.errors import NotApplicable
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class GradInversion(Recipe):
    """min over x of Σ_l ‖∇_l − u_l‖ / Σ_l ‖u_l‖ + α TV + β x² + γ R_BN, seeds side by side.

    An honest server names the classes by row minima and searches from several seeds, which are
    drawn to their registered mean; R_BN asks for the statistics of batch normalisation that it
    knows of, exact or running.

        labels ← classes of the b smallest row minima, unless granted
        repeat for every seed: Adam step; x ← x + rate · noise · N(0, 1)
            and, from a quarter of the steps on: x ← x − rate · group · (x − registered mean)
        keep the seed and the iterate with the lowest objective

    Args:
        steps: gradient evaluations per seed.
        learning_rate: Adam's, in units of the box, after a warm-up of 50 steps, by half a cosine.
        total_variation: α.
        norm: β, on mean x² around the centre of the box.
        batch_norm: γ where the batch's own statistics are known.
        running: γ where the running estimates stand in for them.
        first: factor on the first layer's statistics.
        noise: of Langevin, in steps.
        group: pull to the consensus, as a share of the distance at a rate of one.
        restarts: seeds of the group.
    """

    steps: int = 4000
    learning_rate: float = 0.1
    total_variation: float = 0.01
    norm: float = 1e-6
    batch_norm: float = 0.01
    running: float = 1e-3
    first: float = 10.0
    noise: float = 0.01
    group: float = 0.01
    restarts: int = 8

    about: ClassVar[About] = About(
        id="gradinversion",
        title="See through Gradients (GradInversion)",
        paper="Yin et al., See through Gradients: Image Batch Recovery via GradInversion, "
        "CVPR 2021",
        link="https://arxiv.org/abs/2104.07586",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="Laplace of the layers' residual norms",
        prior="total variation, L2 norm, batch-normalisation statistics where they are known",
        deviations=(
            "there is no published code: learning rate, warm-up, decay, noise, L2 weight and the "
            "factor on the first layer are those of the breaching library",
            "residuals are divided by the update's own size, so that weights carry over between "
            "networks; the weights were set by hand and tuned on nothing",
            "the group is registered by phase correlation, whole pixels (published: RANSAC-flow), "
            "and drawn together beside Adam's step, not by a term of the loss",
            "pictures of one class are matched between seeds; the paper has no class twice",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {
        "quick": {"steps": 400, "restarts": 2},
        "thorough": {"steps": 20000},
    }

    def compose(self, seen: Sequence[Observation]) -> Objective:
        fit = Matching(seen, layer_norms, dtype=self.dtype)
        low, high = seen[0].data.bounds
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=torch.stack([_labels(o) for o in seen]),
                boxed=True,
                mean=0.5,
                std=0.25,
                dtype=self.dtype,
            ),
            fit=fit,
            penalties=(
                (self.total_variation, total_variation),
                (self.norm, lambda x, targets: squared_norm(x - (low + high) / 2)),
                *known_statistics(
                    seen,
                    fit.state,
                    exact=self.batch_norm,
                    running=self.running,
                    first=self.first,
                ),
            ),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        low, high = objective.unknown.spec.bounds
        drifts: list[Drift] = []
        if self.group:
            pull = GroupConsistency(
                objective,
                weight=self.group / (high - low),
                begin=self.steps // 4,
                every=max(1, self.steps // 40),
                reach=0.25,
            )
            drifts.append(pull)
        if self.noise:
            drifts.append(langevin(objective, self.noise))
        return adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate * (high - low),
            schedule=warm_cosine,
            drifts=drifts,
        )


def _labels(seen: Observation) -> Tensor:
    """The labels granted, else the classes of the smallest row minima, (b,) int64 ascending."""
    if seen.knowledge.labels is not None:
        return seen.knowledge.labels
    # The rule draws nothing.
    counts = RowMin()(seen, generator=torch.Generator())
    size = seen.knowledge.batch_size or 1
    if int(counts.sum()) < size:
        raise NotApplicable(
            f"gradinversion: row minima name a class once, and {size} examples are more than "
            f"{len(counts)} classes"
        )
    return counts.nonzero().flatten()
