"""User-level inversion with a diffusion prior (Li et al., arXiv 2409.07291)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.parts.carried import Wanted, carried
from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.granted import granted
from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import Penalty
from gradleak.attacks.parts.search import Search, adam, warm_cosine
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.denoising import ddim
from gradleak.errors import IntractableLikelihood, InvalidInput, NotApplicable
from gradleak.mechanisms import FedSGD
from gradleak.priors import Denoiser
from gradleak.seeding import normal
from gradleak.types import About, Batch, Fact, Mechanism, Observation

_SETTLED = 0.1
"""Share of the steps at the end for which time and noise stay as they are."""
_WARMUP = 10


@dataclass(frozen=True)
class UserLevelDiffusion(Recipe):
    """min over x in the box of 1 − cos(∇ℓ(f(x), y), u) + λ · mean (ε − ε̂(√ᾱ x + √(1−ᾱ) ε, t))².

    An honest server looks for *one* picture that stands for a whole batch of one user: what the
    user's pictures share, a face say, and no single picture of them. ε̂ denoises public pictures.

        x ~ N(centre of the box, a quarter of its width)
        repeat: t falls from `first` to `last`, evenly; ε ~ N(0, 1) anew
                Adam step along the gradient of both terms; clip to box
        the last tenth: t = `last` and ε stay; keep the iterate with the lowest objective
        where `refinement` > 0: noise x to that time and denoise it by ten steps of DDIM

    The claim is x as often as the batch has examples, with y the most frequent label of those
    granted or recovered. By default the prior's gradient is that of score distillation, along
    λ (ε̂ − ε), which does not pass through ε̂ (Poole et al., ICLR 2023).

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's largest, in units of the box.
        prior_weight: λ.
        first, last: t at the start and at the end, as shares of the prior's T.
        through: whether the prior's gradient passes through its network instead.
        refinement: time of the refinement, as a share of T; 0 for none.
        restarts: independent starts; the objective chooses.
    """

    steps: int = 400
    learning_rate: float = 0.05
    prior_weight: float = 0.1
    first: float = 0.7
    last: float = 0.05
    through: bool = False
    refinement: float = 0.0
    restarts: int = 1

    about: ClassVar[About] = About(
        id="user-level-diffusion",
        title="User-level inversion with a diffusion prior",
        paper="Li et al., Exploring User-level Gradient Inversion with a Diffusion Prior, 2024",
        link="https://arxiv.org/abs/2409.07291",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.PRIOR}),
        likelihood="of directions (cosine)",
        prior="error of a denoising network",
        deviations=(
            "constants are ours, chosen on public people: the paper's were not available",
            "the prior is a small U-Net of ours",
            "labels that are not granted are recovered by iDLG (one example) or by sign counts; "
            "the most frequent one is the user's",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {"quick": {"steps": 200}, "thorough": {"steps": 1200, "restarts": 3}}

    def __post_init__(self) -> None:
        if not 0 <= self.last <= self.first <= 1:
            raise InvalidInput(
                f"first={self.first}, last={self.last}: expected shares of T, 0 <= last <= first"
                " <= 1"
            )
        if not 0 <= self.refinement <= 1:
            raise InvalidInput(f"refinement={self.refinement}: expected a share of T in [0, 1]")

    def compose(self, seen: Sequence[Observation]) -> Objective:
        prior = granted(seen, Denoiser, trained="diffusion").to(self.dtype)
        assert isinstance(prior, Denoiser)
        if prior.data.shape != seen[0].data.shape:
            raise NotApplicable(
                f"a prior of images {prior.data.shape}: expected {seen[0].data.shape}"
            )
        count = seen[0].knowledge.batch_size or 1
        labels = torch.stack([known_or_recovered(o).mode().values.expand(count) for o in seen])
        return Objective(
            unknown=_Representative(
                seen[0].data,
                count,
                labels=labels,
                boxed=True,
                mean=0.5,
                std=0.25,
                dtype=self.dtype,
                rows=1 if _averages(seen[0].mechanism) else count,
            ),
            fit=Matching(seen, cosine, dtype=self.dtype),
            penalties=self._penalties(prior, 1, 0),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        prior = granted(objective.fit.seen, Denoiser, trained="diffusion").to(self.dtype)
        assert isinstance(prior, Denoiser)

        def path(step: int, steps: int) -> Objective:
            done = step / ((1 - _SETTLED) * steps)
            if done >= 1:
                return objective
            return replace(objective, penalties=self._penalties(prior, done, step + 1))

        low, high = objective.unknown.spec.bounds
        found = adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate * (high - low),
            schedule=lambda step, steps: warm_cosine(step, steps, warmup=_WARMUP),
            path=path if self.prior_weight else None,
        )
        return self._refined(objective, prior, found) if self.refinement else found

    def _penalties(
        self, prior: Denoiser, done: float, draw: int
    ) -> tuple[tuple[float, Penalty], ...]:
        """The prior's, at the share `done` of t's way down."""
        if not self.prior_weight:
            return ()
        share = self.first + (self.last - self.first) * done
        time = round(share * (prior.schedule.timesteps - 1))
        return ((self.prior_weight, self._distilled(prior, time, draw)),)

    def _distilled(self, prior: Denoiser, time: int, draw: int) -> Penalty:
        """mean (ε − ε̂(x_t, t))² per trial, with the gradient that `through` says.

        Args:
            prior: ε̂.
            time: t.
            draw: which ε; equal for all trials, so that their values compare.
        """

        def penalty(inputs: Tensor, targets: Sequence[int]) -> Tensor:
            shape = inputs.shape[2:]
            stream = torch.Generator().manual_seed(draw)
            noise = normal(shape, generator=stream, dtype=inputs.dtype).to(inputs)
            times = torch.full((inputs.shape[0] * inputs.shape[1],), time, device=inputs.device)
            alike = noise.expand(len(times), *shape)

            def of(x: Tensor) -> Tensor:
                return prior.anomaly(x.flatten(0, 1), times, alike).reshape(x.shape[:2]).mean(1)

            if self.through:
                return of(inputs)

            def evaluate(
                x: Tensor, labels: Tensor, wanted: Wanted
            ) -> tuple[Tensor, list[Tensor | None]]:
                flat = x.flatten(0, 1)
                noised = prior.schedule.noised(prior.scaled(flat), alike, times)
                output = prior.output(noised, times)
                gap = prior.schedule.noise(noised, output, times) - alike
                gap = gap.reshape(x.shape)
                low, high = prior.data.bounds
                slope = gap * (4 / ((high - low) * gap[0].numel()))
                return (gap**2).flatten(1).mean(1), [slope, None]

            return carried(evaluate, inputs, inputs.new_zeros(len(inputs)))

        return penalty

    def _refined(self, objective: Objective, prior: Denoiser, found: Search) -> Search:
        """The search's outcome, noised and denoised, with the objective there."""
        schedule = prior.schedule
        time = max(1, round(self.refinement * (schedule.timesteps - 1)))
        clean = prior.scaled(found.variables["inputs"].flatten(0, 1))
        stream = torch.Generator().manual_seed(0)
        noise = normal(clean.shape[1:], generator=stream, dtype=clean.dtype).to(clean)
        times = torch.full((len(clean),), time, device=clean.device)
        with torch.no_grad():
            noised = schedule.noised(clean, noise.expand_as(clean), times)
            drawn = ddim(schedule, prior.output, noised, steps=min(10, time + 1), start=time)
        inputs = prior.unscaled(drawn).reshape(found.variables["inputs"].shape)
        finite = inputs.flatten(1).isfinite().all(1)
        kept = [s != "diverged" and bool(f) for s, f in zip(found.status, finite, strict=True)]
        if any(kept):
            variables = {"inputs": found.variables["inputs"].clone()}
            variables["inputs"][kept] = inputs[kept]
            values = objective.scores(variables, objective.targets).double().cpu()
            found = replace(found, variables=variables, values=values)
        return found


@dataclass(frozen=True)
class _Representative(Images):
    """One image for the whole batch.

    Attributes:
        rows: as often a claim shows it to the client.
    """

    rows: int

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        return Images.start(replace(self, batch_size=1), generator, restarts=restarts)

    def encode(self, claims: Sequence[Batch]) -> Variables:
        means = [Batch(c.inputs.mean(0, keepdim=True), c.labels[:1]) for c in claims]
        return super().encode(means)

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, labels = super().decode(variables, targets)
        return inputs.expand(-1, self.rows, *inputs.shape[2:]), labels[:, : self.rows]

    def claimed(self, inputs: Tensor, labels: Tensor) -> Batch:
        count = self.batch_size
        return Batch(
            inputs[:1].expand(count, *inputs.shape[1:]).clone(), labels[:1].expand(count).clone()
        )


def _averages(mechanism: Mechanism) -> bool:
    """Whether a client does to one example what it does to many equal ones, but for noise."""
    if not mechanism.deterministic:
        try:
            mechanism = mechanism.likelihood(batch_size=1).centre
        except IntractableLikelihood:
            return False
    return isinstance(mechanism, FedSGD) and mechanism.batch_norm == "eval"
