"""Gradient-guided diffusion (Meng, Huang, Chen & Li, 2024): the model is taught the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradleak.attacks.parts.granted import granted
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.likelihood import data_term
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search, adam, warm_cosine
from gradleak.attacks.parts.unknowns import Unknown, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.denoising import ddim, grid
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.priors import Denoiser
from gradleak.seeding import child, normal
from gradleak.types import About, Batch, Fact, Observation

_WARM = 10
"""The rate rises over one step of so many."""


@dataclass(frozen=True)
class GradientGuidedDiffusion(Recipe):
    """min over φ of −log p(u | DDIM(x_T; φ)), x_T fixed.

    An honest server teaches a copy of a diffusion model to draw, from noise that stays as it is,
    a picture that explains the update. It starts from the model's own weights and stays near them
    as far as few steps do.

        x_T ~ N(0, 1)
        repeat: x = DDIM of a few steps from x_T under φ; Adam on φ
        keep the φ with the highest likelihood

    Args:
        steps: gradient evaluations per restart.
        sampling: steps of DDIM.
        learning_rate: Adam's largest, reached after a tenth of the steps; falls by a cosine.
        restarts: latents, each with its copy of the model; the likelihood chooses.
    """

    steps: int = 400
    sampling: int = 4
    learning_rate: float = 0.01
    restarts: int = 1

    about: ClassVar[About] = About(
        id="gradient-guided-diffusion",
        title="Fine-tuning a diffusion model",
        paper="Meng et al., Is Diffusion Model Safe? Severe Data Leakage via Gradient-Guided "
        "Diffusion Model, 2024",
        link="https://arxiv.org/abs/2406.09484",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.PRIOR}),
        likelihood="the protection's own",
        prior="a diffusion model's neighbourhood",
        deviations=(
            "steps, rate and schedule are ours",
            "the likelihood of the protection in the place of a squared distance",
            "diffusion models are small ones of ours",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 3000  # a model's weights are many pictures' worth
    budgets: ClassVar = {"quick": {"steps": 150}, "thorough": {"steps": 1600, "restarts": 2}}

    def __post_init__(self) -> None:
        if self.sampling < 1:
            raise InvalidInput(f"sampling={self.sampling}: expected at least 1 step")

    def compose(self, seen: Sequence[Observation]) -> Objective:
        prior = granted(seen, Denoiser, trained="diffusion")
        labels = labels_to_match(seen)
        if labels is None:
            raise NotApplicable(f"{self.about.id}: the labels can neither be read nor recovered")
        term = data_term(seen, dtype=self.dtype)
        return Objective(
            unknown=_Taught(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=labels,
                dtype=self.dtype,
                prior=prior,
                sampling=min(self.sampling, prior.schedule.timesteps),
            ),
            fit=term.fit,
            fit_weight=term.weight,
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        return adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=partial(warm_cosine, warmup=max(1, self.steps // _WARM)),
        )


@dataclass(frozen=True)
class _Taught(Unknown):
    """The weights of one diffusion model per trial, whose latents stay as they are.

    Attributes:
        prior: whose network is copied.
        sampling: steps of DDIM.
    """

    prior: Denoiser
    sampling: int

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        shape = (self.batch_size, *self.spec.shape)
        streams = [child(generator, f"start/{restart}") for restart in range(restarts)]
        draws = [normal(shape, generator=stream, dtype=self.dtype) for stream in streams]
        return self._copied(torch.stack(draws))

    def encode(self, claims: Sequence[Batch]) -> Variables:
        """Latents that DDIM, run backwards, finds for the claims."""
        schedule, times = self.prior.schedule, grid(self.prior.schedule, self.sampling)[::-1]
        latents = []
        for claim in claims:
            x = self.prior.scaled(claim.inputs.to(self.dtype))
            labels = claim.labels if claim.labels.ndim == 1 else None
            with torch.no_grad():
                for before, time in zip(times, [*times[1:], times[-1]], strict=True):
                    moments = torch.full((len(x),), before, device=x.device)
                    output = self.prior.output(x, moments, labels)
                    clean = schedule.clean(x, output, moments).clamp(-1, 1)
                    noise = schedule.noise(x, output, moments)
                    x = schedule.noised(clean, noise, torch.full_like(moments, time))
            latents.append(x)
        return self._copied(torch.stack(latents))

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        assert self.labels is not None
        labels = self.labels[list(targets)]
        latents = variables["latents"].detach()
        weights = {k: v for k, v in variables.items() if k != "latents"}
        drawn = [
            self._drawn(x, y, {k: v[row] for k, v in weights.items()})
            for row, (x, y) in enumerate(zip(latents, labels, strict=True))
        ]
        soft = labels.is_floating_point()
        return torch.stack(drawn), labels.to(latents) if soft else labels.to(latents.device)

    def _copied(self, latents: Tensor) -> Variables:
        copies = {
            k: v.to(latents).expand(len(latents), *v.shape).clone()
            for k, v in self.prior.network.items()
        }
        return {"latents": latents, **copies}

    def _drawn(self, latents: Tensor, labels: Tensor, weights: Variables) -> Tensor:
        """The images of one trial; backward passes hold one step of DDIM at a time."""
        classes = None if labels.is_floating_point() else labels.to(latents.device)

        def output(x: Tensor, times: Tensor) -> Tensor:
            return self.prior.output(x, times, classes, weights=weights)

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output(x, times)
            found: Tensor = checkpoint(
                output, x, times, use_reentrant=False, preserve_rng_state=False
            )
            return found

        drawn = ddim(self.prior.schedule, denoise, latents, steps=self.sampling)
        return self.prior.unscaled(drawn)
