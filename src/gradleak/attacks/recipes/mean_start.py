"""The control of attacks with a generative prior: begin at the mean public image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.unknowns import Variables
from gradleak.attacks.recipes.dlg_dm import DLGDM
from gradleak.errors import NotApplicable
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class MeanStart(DLGDM):
    """min over x of ‖∇ℓ(θ; x, ε, t) − u‖² / ‖u‖², from the mean public image.

    GIDM's second phase without its first: what it does better than this is due to the diffusion
    prior, the rest to the pixels alone. It needs no more of a prior than its mean.

    Args:
        steps: of the optimiser.
        optimiser: of the pixels.
        learning_rate: of Adam, constant.
        tolerance: L-BFGS ends at this objective.
        restarts: trials, which start alike.
    """

    about: ClassVar[About] = About(
        id="mean-start",
        title="Gradient matching from the mean image",
        paper="A control of GIDM (Huang et al., ARES 2025), ours",
        link="https://arxiv.org/abs/2405.20380",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.TIMESTEPS, Fact.NOISE, Fact.PRIOR}),
        likelihood="Gaussian (squared L2)",
        prior="the mean of public images, as a start",
        deviations=("not a paper",),
    )

    def compose(self, seen: Sequence[Observation]) -> Objective:
        if any(o.knowledge.prior is None for o in seen):
            raise NotApplicable("mean-start needs a prior, whose mean it starts from")
        return super().compose(seen)

    def starts(self, objective: Objective, generators: Sequence[torch.Generator]) -> Variables:
        means = []
        for seen in objective.fit.seen:
            assert seen.knowledge.prior is not None
            mean = seen.knowledge.prior.mean(objective.unknown.batch_size)
            means.extend([mean.to(self.dtype)] * self.restarts)
        return {"inputs": torch.stack(means)}
