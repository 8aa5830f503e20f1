"""Deep Leakage from Gradients (Zhu, Liu & Han, NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradleak.attacks.parts.distances import squared_l2
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class DLG(Recipe):
    """min over x, y of Σ_l ‖∇_l ℓ(f(x), softmax(y)) − u_l‖², by L-BFGS.

    An honest server that knows only the batch size searches images and soft labels together,
    from normal starts, until the update it would cause equals the one received.

        x, y ~ N(0, 1)
        repeat L-BFGS on Σ_l ‖∇_l(x, softmax(y)) − u_l‖²
        keep the restart with the lowest objective

    Args:
        steps: accepted L-BFGS steps per restart.
        restarts: independent starts; the objective chooses.
        halving: drop the worse half of the restarts after …, 1/4 and 1/2 of the steps.
        tolerance: a target is solved at objective ≤ tolerance · ‖u‖².
    """

    steps: int = 1200
    restarts: int = 4
    halving: bool = False
    tolerance: float = 1e-20

    about: ClassVar[About] = About(
        id="dlg",
        title="Deep Leakage from Gradients",
        paper="Zhu, Liu & Han, Deep Leakage from Gradients, NeurIPS 2019",
        link="https://arxiv.org/abs/1906.08935",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="Gaussian (squared L2)",
        prior="none",
        deviations=(
            "float64 and a strong Wolfe line search (published: float32, fixed step 1)",
            "several restarts chosen by the objective (published code: one)",
            "the claim is clamped into the data's bounds at the end",
        ),
    )
    budgets: ClassVar = {
        "quick": {"steps": 200, "restarts": 2},
        "thorough": {"restarts": 16, "halving": True},
    }

    def compose(self, seen: Sequence[Observation]) -> Objective:
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=None,
                boxed=False,
                mean=0.0,
                std=1.0,
                dtype=self.dtype,
            ),
            fit=Matching(seen, squared_l2, dtype=self.dtype),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        norms = [objective.fit.norm(t) for t in range(len(objective.fit.received))]
        solved = [self.tolerance * norm**2 for norm in norms]
        return lbfgs(objective, start, steps=self.steps, solved=solved, halving=self.cuts)
