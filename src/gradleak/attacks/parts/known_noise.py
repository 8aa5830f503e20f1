"""What attacks share that know the noise and the times of a diffusion model's client.

With ε and t given, the update is a deterministic function of the images alone: matching it is
gradient inversion as of a classifier, whose targets are known and whose labels play no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.lifting import FORGIVEN, lift, liftable
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.defenses import undefended
from gradleak.mechanisms import Diffusing
from gradleak.priors import Denoiser
from gradleak.seeding import child, normal
from gradleak.types import Batch, Observation

Optimiser = Literal["lbfgs", "adam"]

ONE_IMAGE = 0.3
"""Share of progress of searches from one image, where many at once may follow."""
_STUCK = 1e-4
"""Objective from which a trial counts as stuck, beside noise."""
_ALONE = 100
"""Steps on the best of many images, before the noise is held to what it was."""
_BALANCE = 0.5
"""β of the distance that many images minimise."""
_LIFTING = 0.8
"""Their share of the rescue's progress."""
_HISTORY, _LEAST_HISTORY, _COORDINATES = 500, 100, 4_000_000
"""Curvature pairs of L-BFGS, as far as memory is cheap: near the truth the squared distance is a
quadratic in few pixels, and more pairs know it better."""


def unlabelled(seen: Sequence[Observation]) -> Tensor:
    """Labels that claims carry, (targets, b): those granted, or else zeros."""
    return torch.stack([known_or_recovered(o) for o in seen])


@dataclass(frozen=True)
class Drawn(Images):
    """Images, or in the first phase of a search the latents that a diffusion prior draws them of.

    Variables are either `latents` (trials, b, *shape) or `inputs`, as `Images` has them.

    Attributes:
        prior: the diffusion prior.
        sampling: steps of DDIM.
    """

    prior: Denoiser
    sampling: int

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        shape = (self.batch_size, *self.spec.shape)
        streams = [child(generator, f"start/{restart}") for restart in range(restarts)]
        draws = [normal(shape, generator=stream, dtype=self.dtype) for stream in streams]
        return {"latents": torch.stack(draws)}

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        if "latents" in variables:
            variables = {"inputs": self.drawn(variables["latents"])}
        return super().decode(variables, targets)

    def drawn(self, latents: Tensor) -> Tensor:
        """The images (trials, b, *shape) of latents of the same shape."""
        images = self.prior.images(latents.flatten(0, 1), steps=self.sampling)
        return images.view_as(latents)

    def project_(self, variables: Variables) -> None:
        if "latents" not in variables:
            super().project_(variables)


def pixel_phase(
    objective: Objective,
    start: Variables,
    *,
    steps: int,
    optimiser: Optimiser,
    learning_rate: float,
    tolerance: float,
) -> Search:
    """Descend from images on the squared distance over ‖u‖².

    Args:
        objective: of images; its fit is the squared distance.
        start: images, `inputs` (trials, b, *shape).
        steps: of the optimiser.
        optimiser: which one.
        learning_rate: of Adam, constant.
        tolerance: L-BFGS ends a target at this objective; float32 updates carry rounding of
            about 1e-12.
    """
    if optimiser == "adam":
        return adam(objective, start, steps=steps, learning_rate=learning_rate, schedule=_constant)
    solved = [tolerance] * len(objective.fit.received)
    pixels = start["inputs"][0].numel()
    history = max(_LEAST_HISTORY, min(_HISTORY, _COORDINATES // pixels))
    return lbfgs(objective, start, steps=steps, history=history, solved=solved)


def rescued(
    objective: Objective,
    found: Search,
    candidates: Callable[[int, torch.Generator], Tensor],
    refine: Callable[[Objective, Variables], Search],
    *,
    steps: int,
) -> Search:
    """Go on, from many images at once, with the trials that explain their update badly.

    Args:
        objective: of images; its fit is the squared distance.
        found: by a search from one image each; changed in place.
        candidates: (trial, stream) → images (b, P, *shape) that begin.
        refine: the search that follows, from one image each.
        steps: of all candidates together at most.
    """
    core = undefended(objective.fit.mechanism)
    if not isinstance(core, Diffusing) or core.draws is None:
        return found
    times, noise = core.draws.times, core.draws.noise
    stuck = [t for t in range(len(found.values)) if _stuck(objective, found, t)]
    if not stuck or times is None or noise is None or not liftable(objective.fit.seen[0]):
        return found
    rows = []
    for number, trial in enumerate(stuck):
        stream = child(objective.streams[objective.targets[trial]], f"lifting/{trial}")
        share = (_LIFTING * (number + i) / len(stuck) for i in (0, 1))
        rows.append(
            lift(
                objective.fit.seen[objective.targets[trial]],
                candidates(trial, child(stream, "images")),
                times[:, 0],
                noise=noise[:, 0],
                generator=stream,
                steps=steps,
                alone=min(_ALONE, steps),
                balance=_BALANCE,
                progress=part(objective, *share).progress,
            )
        )
    targets = tuple(objective.targets[t] for t in stuck)
    start = {"inputs": torch.stack([r.images for r in rows]).to(objective.fit.dtype)}
    led = refine(replace(part(objective, _LIFTING, 1), targets=targets), start)
    for place, trial in enumerate(stuck):
        found.evaluations[trial] += rows[place].evaluations + led.evaluations[place]
        found.history[trial] += led.history[place]
        if float(led.values[place]) < float(found.values[trial]):
            found.variables["inputs"][trial] = led.variables["inputs"][place]
            found.values[trial] = led.values[place]
            found.status[trial] = led.status[place]
    return found


def _stuck(objective: Objective, found: Search, trial: int) -> bool:
    """Whether a claim leaves more of the update unexplained than noise would."""
    target = objective.targets[trial]
    inputs, labels = objective.unknown.decode(
        {"inputs": found.variables["inputs"][[trial]]}, [target]
    )
    stream = child(objective.streams[target], f"noise/{trial}")
    noise = objective.fit.noise(Batch(inputs[0], labels[0]), target, generator=stream)
    return not float(found.values[trial]) <= _STUCK + FORGIVEN * objective.fit_weight * noise


def relative(fit: Matching) -> float:
    """What makes the squared distance one in units of ‖u‖², of the first target."""
    square = fit.norm(0) ** 2
    return 1 / square if 0 < square < math.inf else 1.0


def part(objective: Objective, low: float, high: float) -> Objective:
    """The same objective as a part of a longer search, from one share of it to another."""
    return replace(objective, progress=lambda s: objective.progress(low + s * (high - low)))


def followed(first: Search, second: Search) -> Search:
    """Two phases as one search: what it spent on both, and the claim of the second."""
    return replace(
        second,
        evaluations=[a + b for a, b in zip(first.evaluations, second.evaluations, strict=True)],
        history=[a + b for a, b in zip(first.history, second.history, strict=True)],
    )


def _constant(step: int, steps: int) -> float:
    return 1.0
