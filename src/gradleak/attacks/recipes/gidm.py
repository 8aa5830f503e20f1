"""GIDM: gradient inversion of diffusion models by a diffusion prior (Huang et al., ARES 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from gradleak.attacks.parts.distances import cosine, squared_l2
from gradleak.attacks.parts.granted import granted
from gradleak.attacks.parts.known_noise import (
    ONE_IMAGE,
    Drawn,
    Optimiser,
    followed,
    part,
    pixel_phase,
    relative,
    rescued,
    unlabelled,
)
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Variables
from gradleak.attacks.recipe import Recipe
from gradleak.errors import InvalidInput
from gradleak.priors import Denoiser
from gradleak.seeding import child
from gradleak.types import About, Fact, Observation

LatentFit = Literal["cosine", "squared_l2"]


@dataclass(frozen=True)
class GIDM(Recipe):
    """min over z, then over x from DDIM(z*), of ‖∇ℓ(θ; x, ε, t) − u‖² / ‖u‖².

    A server that dealt out noise and times to its client, and has a diffusion model of public
    images, first looks for the image that it can draw which explains the update best, and then
    lets the pixels go where the prior cannot. `GIDM.published()` has the published constants.

        z ~ N(0, 1), one number per pixel; of several, the one that explains the update best
        Adam on z, through every step of a deterministic sampler
        x = DDIM(z*); L-BFGS on x
        where that ends far from explaining the update: many images of the prior at once, until
        one of them explains it alone (`parts.lifting`); L-BFGS on it
        keep the restart with the lowest objective

    Args:
        steps: of the search for x; 0 leaves it at DDIM(z*).
        candidates: latents drawn per restart, of which the best begins.
        latent_steps: gradient evaluations of the search for z.
        latent_rate: of Adam on z, constant.
        latent_fit: what z minimises: 1 − cos, or the squared distance.
        sampling: steps of DDIM.
        optimiser: of the pixels.
        learning_rate: of Adam on the pixels, constant.
        tolerance: L-BFGS ends at this objective.
        restarts: independent z; the objective chooses.
        lifting: steps of L-BFGS on many images at most; 0 for none.
    """

    steps: int = 500
    candidates: int = 16
    latent_steps: int = 25
    latent_rate: float = 0.1
    latent_fit: LatentFit = "cosine"
    sampling: int = 4
    optimiser: Optimiser = "lbfgs"
    learning_rate: float = 0.01
    tolerance: float = 1e-10
    restarts: int = 1
    lifting: int = 800

    about: ClassVar[About] = About(
        id="gidm",
        title="GIDM: latent of a diffusion prior, then pixels",
        paper="Huang, Hong, Roos & Chen, GIDM: Gradient Inversion of Federated Diffusion Models, "
        "ARES 2025",
        link="https://arxiv.org/abs/2405.20380",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.TIMESTEPS, Fact.NOISE, Fact.PRIOR}),
        likelihood="Gaussian (squared L2)",
        prior="a diffusion model's range, as a start",
        deviations=(
            "the best of 16 latents, 25 steps on the cosine, 4 of DDIM, L-BFGS in the pixels; "
            "GIDM.published() has the published one latent, 2501 and 5001 steps of Adam at 0.01 "
            "and 16 of DDIM",
            "the distance is divided by ‖u‖², which Adam does not notice but for its ε of 1e-8",
            "where the pixels end far from explaining the update, many images of the prior explain "
            "it together first",
            "the best iterate is kept (published: the last)",
            "the prior is a small U-Net of ours (published: 64 channels, trained on CelebA-HQ)",
            "the claim is clamped into the data's bounds at the end",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 2000  # up to 500 curvature pairs
    budgets: ClassVar = {"quick": {"steps": 150}, "thorough": {"steps": 1000, "restarts": 4}}

    @property
    def crowd(self) -> int:  # type: ignore[override]
        return self.candidates + 1 if self.lifting else 1

    def __post_init__(self) -> None:
        if min(self.candidates, self.latent_steps) < 1 or min(self.steps, self.lifting) < 0:
            raise InvalidInput(
                f"candidates={self.candidates}, latent_steps={self.latent_steps}, "
                f"steps={self.steps}, lifting={self.lifting}: expected at least 1, 1, 0 and 0"
            )

    @classmethod
    def published(cls) -> Self:
        """The published constants: all that the released code sets.

        The client beside it is `Denoising(schedule="sigmoid_alphas", timesteps=16,
        prediction="v_prediction", timestep=1, bounds=(-1, 1))`.
        """
        return cls(
            candidates=1,
            latent_steps=2501,
            latent_rate=0.01,
            latent_fit="squared_l2",
            sampling=16,
            steps=5001,
            optimiser="adam",
            learning_rate=0.01,
            lifting=0,
        )

    def compose(self, seen: Sequence[Observation]) -> Objective:
        fit = Matching(seen, squared_l2, dtype=self.dtype)
        return Objective(
            unknown=Drawn(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=unlabelled(seen),
                boxed=False,
                mean=0.0,
                std=1.0,
                dtype=self.dtype,
                prior=granted(seen, Denoiser, trained="diffusion"),
                sampling=self.sampling,
            ),
            fit=fit,
            fit_weight=relative(fit),
        )

    def starts(self, objective: Objective, generators: Sequence[torch.Generator]) -> Variables:
        latent, best = self._latent(objective), []
        for target, stream in enumerate(generators):
            for restart in range(self.restarts):
                own = child(stream, f"candidates/{restart}")
                drawn = objective.unknown.start(own, restarts=self.candidates)["latents"]
                drawn = drawn.to(objective.fit.device)
                scores = latent.scores({"latents": drawn}, [target] * self.candidates)
                best.append(drawn[int(scores.nan_to_num(torch.inf).argmin())])
        return {"latents": torch.stack(best)}

    def _latent(self, objective: Objective) -> Objective:
        if self.latent_fit == "squared_l2":
            return objective
        return replace(objective, fit=objective.fit.comparing(cosine), fit_weight=1.0)

    def search(self, objective: Objective, start: Variables) -> Search:
        unknown = objective.unknown
        assert isinstance(unknown, Drawn)
        share = self.latent_steps / (self.latent_steps + self.steps)
        drawn = adam(
            self._latent(part(objective, 0, share)),
            start,
            steps=self.latent_steps,
            learning_rate=self.latent_rate,
            schedule=lambda step, steps: 1.0,
        )
        with torch.no_grad():
            images = {"inputs": unknown.drawn(drawn.variables["latents"])}
        if not self.steps:
            scores = objective.scores(images, objective.targets)
            return replace(drawn, variables=images, values=scores.double().cpu())
        share, end = (p * (ONE_IMAGE if self.lifting else 1) for p in (share, 1))
        found = followed(drawn, self.refine(part(objective, share, end), images))
        if not self.lifting:
            return found

        def candidates(trial: int, stream: torch.Generator) -> Tensor:
            seen = objective.fit.seen[objective.targets[trial]]
            prior = granted([seen], Denoiser, trained="diffusion")
            own = images["inputs"][trial]
            more = prior.sample(len(own) * self.candidates, generator=stream).to(own)
            return torch.cat([own[:, None], more.view(len(own), -1, *own.shape[1:])], 1)

        rest = part(objective, end, 1)
        return rescued(rest, found, candidates, self.refine, steps=self.lifting)

    def refine(self, objective: Objective, start: Variables) -> Search:
        return pixel_phase(
            objective,
            start,
            steps=self.steps,
            optimiser=self.optimiser,
            learning_rate=self.learning_rate,
            tolerance=self.tolerance,
        )
