"""The Bayes-optimal adversary (Balunović, Dimitrov, Staab & Vechev, ICLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.attacks.parts.annealing import annealed
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.likelihood import DataTerm, data_term, noise_variance
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import wrapped_variation
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class Bayes(Recipe):
    """max over x of log p(u | x) + log p(x), by Adam with the likelihood faded in.

    An honest server who knows the protection maximises the posterior that it leaves. With p the
    protection's own density this is the adversary no other can beat as its ball shrinks (Eq. 3);
    matching by squared L2, L1 or cosine are other densities put in its place.

        x ~ N(0, 1) per pixel
        for t < steps: Adam step of rate · decay^t on −f_t log p(u | x) + w · TV(x), where f_t grows
            geometrically from min(fade · σ², 1) to 1 over the first half, in stages
        keep the iterate with the lowest objective

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's first step.
        decay: of the rate at every step.
        total_variation: w, on Σ (∂x)² with wrap-around.
        fade: of the start of f, σ² being the variance of the protection's noise per coordinate;
            a very large one does not anneal.
        restarts: independent starts; the posterior chooses.
        halving: drop the worse half of the restarts after …, 1/4 and 1/2 of the steps, by the
            objective that they share there.
    """

    steps: int = 200
    learning_rate: float = 0.5
    decay: float = 0.97
    total_variation: float = 1.0
    fade: float = 1.0
    restarts: int = 1
    halving: bool = False

    about: ClassVar[About] = About(
        id="bayes",
        title="Bayes-optimal adversary",
        paper="Balunović et al., Bayesian Framework for Gradient Leakage, ICLR 2022",
        link="https://arxiv.org/abs/2111.04706",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="the protection's own",
        prior="squared variation",
        deviations=(
            "the published search evaluates the ball's centre alone, so this is the maximum a "
            "posteriori; so does ours",
            "weights are the caller's: the published ones were tuned on the truth",
            "log-likelihoods that are no norms of a residual are not scaled by f: their noise is "
            "widened by 1/√f, which is the same for Gaussian noise",
            "an update without noise counts as Gaussian of a thousandth of its size",
            "where a protection has no density: its mean, and the variance it shows when played",
            "the best iterate by the whole objective is kept (published: the last)",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {"thorough": {"steps": 1000, "decay": 0.994, "restarts": 4}}

    def data_term(self, seen: Sequence[Observation]) -> DataTerm:
        """−log p(u | x)."""
        return data_term(seen, dtype=self.dtype)

    def compose(self, seen: Sequence[Observation]) -> Objective:
        term = self.data_term(seen)
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=labels_to_match(seen),
                boxed=False,
                mean=0.0,
                std=1.0,
                dtype=self.dtype,
            ),
            fit=term.fit,
            fit_weight=term.weight,
            penalties=((self.total_variation, wrapped_variation),),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        return adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=lambda step, steps: self.decay**step,
            path=annealed(
                objective,
                first=self.fade * noise_variance(objective.fit.seen[0]),
                share=0.5,
                soft=False,
            ),
            halving=self.cuts,
        )
