"""Deep Leakage from Gradients against clients of diffusion models, noise and times known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.attacks.parts.distances import squared_l2
from gradleak.attacks.parts.known_noise import (
    Optimiser,
    pixel_phase,
    relative,
    unlabelled,
)
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class DLGDM(Recipe):
    """min over x of ‖∇ℓ(θ; x, ε, t) − u‖² / ‖u‖², from noise.

    A server that knows the noise and the times of its client, because it dealt them out, matches
    the update by the pixels alone. `optimiser=adam,steps=5001` is what GIDM's code does without a
    prior.

        x ~ N(0, 1)
        repeat L-BFGS, or Adam, on the squared distance
        keep the restart with the lowest objective

    Args:
        steps: of the optimiser, per restart.
        optimiser: of the pixels.
        learning_rate: of Adam, constant.
        tolerance: L-BFGS ends at this objective.
        restarts: independent starts; the objective chooses.
    """

    steps: int = 500
    optimiser: Optimiser = "lbfgs"
    learning_rate: float = 0.01
    tolerance: float = 1e-10
    restarts: int = 1

    about: ClassVar[About] = About(
        id="dlg-dm",
        title="Gradient matching of a diffusion model",
        paper="Deep Leakage from Gradients (Zhu et al., NeurIPS 2019) as the baseline of Huang, "
        "Hong, Roos & Chen, GIDM: Gradient Inversion of Federated Diffusion Models, ARES 2025",
        link="https://arxiv.org/abs/2405.20380",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.TIMESTEPS, Fact.NOISE}),
        likelihood="Gaussian (squared L2)",
        prior="none",
        deviations=(
            "L-BFGS with a strong Wolfe line search (published code: Adam, 5001 steps)",
            "the best iterate is kept (published: the last)",
            "the claim is clamped into the data's bounds at the end",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 2000  # up to 500 curvature pairs
    budgets: ClassVar = {"quick": {"steps": 150}, "thorough": {"steps": 1000, "restarts": 4}}

    def compose(self, seen: Sequence[Observation]) -> Objective:
        fit = Matching(seen, squared_l2, dtype=self.dtype)
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=unlabelled(seen),
                boxed=False,
                mean=0.0,
                std=1.0,
                dtype=self.dtype,
            ),
            fit=fit,
            fit_weight=relative(fit),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        return pixel_phase(
            objective,
            start,
            steps=self.steps,
            optimiser=self.optimiser,
            learning_rate=self.learning_rate,
            tolerance=self.tolerance,
        )
