"""The control of attacks with a generative prior: begin at the mean public image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.parts.known_noise import ONE_IMAGE, part, rescued
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Variables
from gradleak.attacks.recipes.dlg_dm import DLGDM
from gradleak.errors import NotApplicable
from gradleak.seeding import normal
from gradleak.types import About, Fact, Observation

_SPREAD = 0.25


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
        lifting: steps of L-BFGS on many images at most, where one ends far from explaining the
            update, as of GIDM; 0 for none.
        candidates: how many images, the mean and noise of a quarter of the bounds' width each.
    """

    lifting: int = 800
    candidates: int = 16

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

    @property
    def crowd(self) -> int:  # type: ignore[override]
        return self.candidates if self.lifting else 1

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

    def refine(self, objective: Objective, start: Variables) -> Search:
        return super().search(objective, start)

    def search(self, objective: Objective, start: Variables) -> Search:
        share = ONE_IMAGE if self.lifting else 1
        found = self.refine(part(objective, 0, share), start)
        if not self.lifting:
            return found
        low, high = objective.unknown.spec.bounds

        def candidates(trial: int, stream: torch.Generator) -> Tensor:
            mean = start["inputs"][trial][:, None]
            size = (len(mean), self.candidates, *mean.shape[2:])
            drawn = normal(size, generator=stream, dtype=mean.dtype).to(mean.device)
            return mean + _SPREAD * (high - low) * drawn

        rest = part(objective, share, 1)
        return rescued(rest, found, candidates, self.refine, steps=self.lifting)
