"""Sampling a diffusion prior under the guidance of an update's likelihood (DPS and relatives)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from gradleak.attacks.parts.granted import granted
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.likelihood import data_term
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.denoising import grid
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.priors import Denoiser
from gradleak.seeding import child, normal
from gradleak.types import About, Fact, Observation, Status

_REACH = 0.01
"""Root mean square of the step, in units of [−1, 1], over which slopes are differenced."""
_TOGETHER = 64
"""Images that pass through the prior's network at once."""
_TINY = 1e-30


@dataclass(frozen=True)
class GuidedSampling(Recipe):
    """x_{t−1} ~ p(x_{t−1} | x_t) p(u | x_t): draws from the posterior of a diffusion prior.

    An honest server with a diffusion model of public pictures denoises noise, and at every time
    bends what the model thinks of the clean picture, x̂ = E[x_0 | x_t], towards the update.

        x_T ~ N(0, 1); for t = T … 0:
            J(x̂) = −log p(u | x̂), the likelihood of the protection believed in
            norm:     the noise of the step is turned towards −∇_{x_t} J, its length √n kept
            moments:  x̂ ← x̂ − (∇²J + C⁻¹)⁻¹ ∇J, C = Cov[x_0 | x_t] = (1 − ᾱ)/√ᾱ · ∂x̂/∂x_t
            gradient: x̂ ← x̂ − ζ (1 − ᾱ)/√ᾱ ∇_{x_t} √(2J)
            x_{t−1} from x̂ as DDIM does
        the claim is the mean of the samples, or the sample with the lowest J

    Args:
        steps: times of the diffusion, each an evaluation of the network and its derivative.
        restarts: samples.
        method: "norm" (Yang et al., ICML 2024), "moments" (Rozet et al., NeurIPS 2024) or
            "gradient" (Chung et al., ICLR 2023).
        inner: conjugate gradients of "moments" at every time.
        rate: how far "norm" turns, from 0 to 1; ζ of "gradient".
        eta: randomness of the steps: 0 is DDIM, 1 the diffusion's own.
        classes: weight of classifier-free guidance towards the labels.
        estimate: "mean" of the samples, which minimises the expected squared error, or "best".
    """

    steps: int = 100
    restarts: int = 4
    method: Literal["norm", "moments", "gradient"] = "norm"
    inner: int = 6
    rate: float = 0.2
    eta: float = 1.0
    classes: float = 0.0
    estimate: Literal["mean", "best"] = "mean"

    about: ClassVar[About] = About(
        id="guided-sampling",
        title="Guided sampling of a diffusion model",
        paper="Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, ICLR "
        "2023; Yang et al., Guidance with Spherical Gaussian Constraint for Conditional Diffusion, "
        "ICML 2024",
        link="https://arxiv.org/abs/2209.14687",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE, Fact.PRIOR}),
        likelihood="the protection's own",
        prior="a diffusion model",
        deviations=(
            "both papers' problems are of restoration: updates of a client are ours",
            "several samples, of which the mean is claimed",
            "method=moments, conjugate gradients under the model's own covariance, is of Rozet et "
            "al., Learning Diffusion Priors from Observations, NeurIPS 2024",
            "diffusion models are small ones of ours",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 3000  # activations of the prior's network
    budgets: ClassVar = {"quick": {"steps": 50}, "thorough": {"steps": 200, "restarts": 8}}

    def __post_init__(self) -> None:
        if self.method not in ("moments", "gradient", "norm"):
            raise InvalidInput(f"method={self.method}: expected moments, gradient or norm")
        if self.estimate not in ("mean", "best"):
            raise InvalidInput(f"estimate={self.estimate}: expected mean or best")
        if self.inner < 1:
            raise InvalidInput(f"inner={self.inner}: expected at least 1")
        if self.method == "norm" and not 0 <= self.rate <= 1:
            raise InvalidInput(f"rate={self.rate}: expected a share in [0, 1] for method=norm")
        if self.method == "norm" and self.eta == 0:
            raise InvalidInput("eta=0: method=norm turns the noise of the steps, expected some")
        if not 0 <= self.eta <= 1:
            raise InvalidInput(f"eta={self.eta}: expected a share in [0, 1]")

    def compose(self, seen: Sequence[Observation]) -> Objective:
        prior = granted(seen, Denoiser, trained="diffusion")
        labels = labels_to_match(seen)
        if labels is None:
            raise NotApplicable("guided-sampling: the labels can neither be read nor recovered")
        term = data_term(seen, dtype=self.dtype)
        return Objective(
            unknown=_Noised(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=labels,
                boxed=False,
                mean=0.5,
                std=0.5,
                dtype=self.dtype,
                prior=prior,
            ),
            fit=term.fit,
            fit_weight=term.weight,
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        unknown = objective.unknown
        assert isinstance(unknown, _Noised)
        prior = unknown.prior
        low, high = unknown.spec.bounds
        # N(mean, std²) of the box is N(0, 1) of [−1, 1].
        x = prior.scaled(start["inputs"])
        streams = _streams(objective)
        alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
        spent = len(x) * [0]
        history: list[list[float]] = [[] for _ in spent]
        times = grid(prior.schedule, min(self.steps, prior.schedule.timesteps))
        rows = max(1, _TOGETHER // unknown.batch_size)
        for place, (time, following) in enumerate(zip(times, [*times[1:], None], strict=True)):
            noise = torch.stack(
                [normal(x.shape[1:], generator=s, dtype=x.dtype) for s in streams]
            ).to(x)

            def step(
                part: slice, x: Tensor = x, noise: Tensor = noise, pair: _Pair = (time, following)
            ) -> tuple[Tensor, Tensor, int]:
                trials = list(range(len(x)))[part]
                return _Step(self, objective, trials).moved(x[part], noise[part], pair)

            parts = objective.limit.in_parts(step, len(x), most=rows)
            moved = torch.cat([p[0] for p in parts])
            values = torch.cat([p[1] for p in parts])
            alive &= moved.flatten(1).isfinite().all(1) & values.isfinite()
            x = torch.where(_along(alive, x), moved, x)
            for trial, value in enumerate(values.tolist()):
                spent[trial] += parts[0][2]
                history[trial].append(value)
            objective.progress((place + 1) / len(times))
        found = prior.unscaled(x).clamp(low, high)
        return self._claimed(objective, {"inputs": found}, alive.tolist(), spent, history)

    def _claimed(
        self,
        objective: Objective,
        variables: Variables,
        alive: list[bool],
        spent: list[int],
        history: list[list[float]],
    ) -> Search:
        """The samples, or in their places the mean of those of the same target."""
        found, notes = variables["inputs"], {}
        low, high = objective.unknown.spec.bounds
        for target in dict.fromkeys(objective.targets):
            own = [t for t, o in enumerate(objective.targets) if o == target and alive[t]]
            if len(own) < 2:
                continue
            samples = found[own]
            spread = samples.std(0).square().mean().sqrt().item() / (high - low)
            if self.estimate == "mean":
                found = found.index_copy(
                    0, torch.tensor(own).to(found.device), samples.mean(0).expand_as(samples)
                )
            told = "mean" if self.estimate == "mean" else "best"
            notes[target] = (
                f"{told} of {len(own)} samples, {spread:.3f} of the box apart (root mean square)"
            )
        values = objective.scores({"inputs": found}, objective.targets).double().cpu()
        status: list[Status] = ["exhausted" if a else "diverged" for a in alive]
        values = torch.where(torch.tensor(alive) & values.isfinite(), values, math.inf)
        return Search({"inputs": found}, values, status, spent, history, notes)

    def refine(self, objective: Objective, start: Variables) -> Search:
        """Sample from the prior's own start: a claim says nothing to a diffusion."""
        streams = objective.streams
        starts = [objective.unknown.start(s, restarts=1)["inputs"] for s in streams]
        return self.search(objective, {"inputs": torch.cat(starts).to(start["inputs"])})


_Pair = tuple[int, int | None]
"""A time and the next one; None after the last."""


@dataclass(frozen=True)
class _Noised(Images):
    """Images, with the prior that they are drawn from."""

    prior: Denoiser


@dataclass(frozen=True)
class _Step:
    """One time of the diffusion, for some trials."""

    recipe: GuidedSampling
    objective: Objective
    trials: Sequence[int]

    def moved(self, x: Tensor, noise: Tensor, pair: _Pair) -> tuple[Tensor, Tensor, int]:
        """x (n, b, *shape) at the next time, J of x̂ (n,), and gradients of J spent."""
        recipe, prior = self.recipe, self.prior
        time, following = pair
        now = prior.schedule.alphas[time].item()
        after = 1.0 if following is None else prior.schedule.alphas[following].item()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            clean = self.clean(x, time)
        values, slope = self.slope(clean.detach())

        def covariance(v: Tensor, *, again: bool) -> Tensor:
            (found,) = torch.autograd.grad(clean, x, v, retain_graph=again)
            return found * ((1 - now) / math.sqrt(now))

        spent, better = 1, clean.detach()
        sigma = recipe.eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        if recipe.method == "moments":
            spent += recipe.inner
            better = better + self.correction(better, slope, covariance)
        elif recipe.method == "gradient":
            length = (2 * values.clamp(min=_TINY)).sqrt()
            shift = covariance(slope, again=False) / _along(length, slope)
            better = better - recipe.rate * shift
        else:
            noise = _turned(noise, -covariance(slope, again=False), recipe.rate)
        better = better.clamp(-1, 1)
        x = x.detach()
        if following is None:
            return better, values, spent
        left = (x - math.sqrt(now) * better) / math.sqrt(1 - now)
        x = math.sqrt(after) * better + math.sqrt(max(0.0, 1 - after - sigma**2)) * left
        return x + sigma * noise, values, spent

    @property
    def prior(self) -> Denoiser:
        unknown = self.objective.unknown
        assert isinstance(unknown, _Noised)
        return unknown.prior

    def clean(self, x: Tensor, time: int) -> Tensor:
        """x̂ = E[x_0 | x_t] in [−1, 1] but for the network's errors."""
        prior, labels = self.prior, self.objective.unknown.labels
        assert labels is not None
        flat = x.flatten(0, 1)
        times = torch.full((len(flat),), time, device=x.device)
        classes = None
        if not labels.is_floating_point():
            own = [self.objective.targets[t] for t in self.trials]
            classes = labels[own].flatten().to(x.device)
        output = prior.output(flat, times, classes, guidance=self.recipe.classes)
        return prior.schedule.clean(flat, output, times).reshape(x.shape)

    def slope(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """J and ∇J of images in [−1, 1]."""
        inputs = self.prior.unscaled(clean)
        values, gradients = self.objective.value_and_gradient({"inputs": inputs}, self.trials)
        low, high = self.objective.unknown.spec.bounds
        return values, gradients["inputs"] * ((high - low) / 2)

    def correction(self, clean: Tensor, slope: Tensor, covariance: _Covariance) -> Tensor:
        """−(∇²J + C⁻¹)⁻¹ ∇J by conjugate gradients preconditioned by C.

        C⁻¹ is never applied: of every direction d its C⁻¹ d is known. Negative curvature of J,
        which the expected information has not, counts as none.
        """
        rounds = self.recipe.inner
        delta = torch.zeros_like(clean)
        rest = -slope
        ahead = covariance(rest, again=rounds > 1)
        along, weighed = ahead, rest
        product = _dot(rest, ahead).clamp(min=0)
        for last in range(rounds - 1, -1, -1):
            size = along.flatten(1).square().mean(1).sqrt().clamp(min=_TINY)
            reach = _along(_REACH / size, along)
            bent = (self.slope(clean + reach * along)[1] - slope) / reach
            curvature = _dot(along, bent).clamp(min=0) + _dot(along, weighed).clamp(min=0)
            length = _along(product / curvature.clamp(min=_TINY), along)
            delta = delta + length * along
            if not last:
                break
            rest = rest - length * (bent + weighed)
            ahead = covariance(rest, again=last > 1)
            fresh = _dot(rest, ahead).clamp(min=0)
            turn = _along(fresh / product.clamp(min=_TINY), along)
            along, weighed, product = ahead + turn * along, rest + turn * weighed, fresh
        return delta


class _Covariance(Protocol):
    """(v, again=) → C v; the graph is kept where it is asked for again."""

    def __call__(self, v: Tensor, *, again: bool) -> Tensor: ...


def _turned(noise: Tensor, towards: Tensor, rate: float) -> Tensor:
    """Noise of length √n per trial, turned by a share `rate` of the way towards a direction."""
    length = math.sqrt(noise[0].numel())
    goal = _along(length / _norm(towards), towards) * towards
    mixed = noise + rate * (goal - noise)
    return _along(length / _norm(mixed), mixed) * mixed


def _streams(objective: Objective) -> list[torch.Generator]:
    """A stream of steps for every trial, the same alone as in company."""
    numbers: dict[int, int] = {}
    found = []
    for target in objective.targets:
        numbers[target] = numbers.get(target, -1) + 1
        found.append(child(objective.streams[target], f"steps/{numbers[target]}"))
    return found


def _norm(v: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return found.clamp(min=_TINY)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
