"""Improved Deep Leakage from Gradients (Zhao, Mopuri & Bilen, 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gradleak.attacks.parts.labels import idlg
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.recipes.dlg import DLG
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class IDLG(DLG):
    """min over x of Σ_l ‖∇_l ℓ(f(x), c) − u_l‖², c the one class whose head gradient is negative.

    The label of a single example is read off the sign of the head's gradient, so that only the
    image is left to search.

        c = argmin_i ∂L/∂b_i                     (row sums of ∂L/∂W without a bias)
        x ~ N(0, 1); L-BFGS on Σ_l ‖∇_l(x, c) − u_l‖²

    Args:
        steps: accepted L-BFGS steps per restart.
        restarts: independent starts; the objective chooses.
        halving: drop the worse half of the restarts after …, 1/4 and 1/2 of the steps.
        tolerance: a target is solved at objective ≤ tolerance · ‖u‖².
    """

    about: ClassVar[About] = About(
        id="idlg",
        title="Improved Deep Leakage from Gradients",
        paper="Zhao, Mopuri & Bilen, iDLG: Improved Deep Leakage from Gradients, 2020",
        link="https://arxiv.org/abs/2001.02610",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="Gaussian (squared L2), the label settled first",
        prior="none",
        deviations=DLG.about.deviations,
    )

    def compose(self, seen: Sequence[Observation]) -> Objective:
        objective = super().compose(seen)
        labels = torch.stack([idlg(observation) for observation in seen])
        return replace(objective, unknown=replace(objective.unknown, labels=labels))
