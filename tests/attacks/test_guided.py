"""Diffusion priors against classifiers: guided sampling and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import priors
from gradleak.attacks.parts.memory import Limit
from gradleak.attacks.recipes.gradient_guided_diffusion import GradientGuidedDiffusion
from gradleak.attacks.recipes.guided_sampling import GuidedSampling, _Noised, _Step, _turned
from gradleak.denoising import ddim
from gradleak.errors import InvalidInput
from gradleak.priors import Denoiser
from gradleak.types import Batch, DataSpec, Observation
from tests.laws.small import SMALL_PRIORS, SPEC, TwoTwins, batch_of, state_of, stream

TINY = DataSpec.image((1, 2, 2), 3)


@cache
def small_prior(data: DataSpec = SPEC) -> Denoiser:
    shape = (30, *data.shape)
    public = Batch(torch.rand(shape, generator=stream(7)), torch.arange(30) % data.classes)
    found = priors.fit(SMALL_PRIORS["diffusion"], public, data, seed=0)
    assert isinstance(found, Denoiser)
    return found


@cache
def seen_of(seed: int = 3) -> Observation:
    """Two pictures through a small smooth network, under noise."""
    private = batch_of(2, seed=seed)
    private = Batch(private.inputs.float(), private.labels)
    client = gl.defenses.build("gaussian-noise:std=0.01")(gl.FedSGD())
    update = client.sample(STATE, private, generator=stream(0))
    return gl.observe(
        STATE, update=update.values, data=SPEC, batch_size=2, mechanism=client,
        labels=private.labels, prior=small_prior(),
    )  # fmt: skip


STATE = state_of(TwoTwins).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Exact(Denoiser):
    """The denoiser of N(0, COVARIANCE), in [−1, 1]."""

    def output(self, noised: Tensor, times: Tensor, *_: object, **__: object) -> Tensor:
        alpha = self.schedule.alphas[int(times[0])].item()
        spread = alpha * COVARIANCE + (1 - alpha) * torch.eye(4, dtype=torch.float64)
        gain = math.sqrt(alpha) * COVARIANCE @ torch.linalg.inv(spread)
        clean = (noised.flatten(1) @ gain.T.to(noised)).reshape(noised.shape)
        found: Tensor = (noised - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
        return found


_ROOT = torch.randn((4, 4), generator=stream(1), dtype=torch.float64) * 0.1
COVARIANCE = _ROOT @ _ROOT.T + 0.002 * torch.eye(4, dtype=torch.float64)
MAP = torch.randn((3, 4), generator=stream(2), dtype=torch.float64)
SEEN = torch.tensor([0.1, -0.2, 0.15], dtype=torch.float64)
NOISE = 0.1


@dataclass(frozen=True)
class Linear:
    """Σ ‖MAP x − SEEN‖² / (2 NOISE²) over a batch, x in [−1, 1]; and what a search asks for."""

    unknown: _Noised
    targets: tuple[int, ...] = (0,)
    streams: tuple[torch.Generator, ...] = ()
    limit: Limit = field(default_factory=Limit)

    def progress(self, share: float) -> None:
        assert 0 < share <= 1

    def scores(self, variables: dict[str, Tensor], targets: object) -> Tensor:
        rest = (2 * variables["inputs"].flatten(2) - 1) @ MAP.T - SEEN
        return (rest**2).flatten(1).sum(1) / (2 * NOISE**2)

    def value_and_gradient(
        self, variables: dict[str, Tensor], trials: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = variables["inputs"].detach().requires_grad_()
        values = self.scores({"inputs": inputs}, trials)
        (gradient,) = torch.autograd.grad(values.sum(), inputs)
        return values.detach(), {"inputs": gradient}


def linear(count: int) -> Linear:
    """A batch of independent problems that are all the same."""
    family = priors.Diffusion(width=8, timesteps=300, conditional=False, steps=1)
    weights = {k: torch.zeros(s) for k, s in family.shapes(TINY).items()}
    settings = vars_of(small_prior(TINY)) | {"family": family, "weights": weights}
    prior = Exact(**settings)  # type: ignore[arg-type]
    labels = torch.zeros((1, count), dtype=torch.int64)
    unknown = _Noised(
        TINY, count, labels, torch.float64, boxed=False, mean=0.5, std=0.5, prior=prior
    )
    return Linear(unknown, streams=(stream(5),))


def vars_of(prior: Denoiser) -> dict[str, object]:
    return {name: getattr(prior, name) for name in prior.__dataclass_fields__}


def test_samples_of_a_linear_gaussian_problem_have_its_posterior() -> None:
    """Means of 2000 lie within 6 standard errors (4 means: α < 1e-8) and 3 % of the prior's spread
    of the posterior's; with too few conjugate gradients, and without likelihood, they do not."""
    count = 2000
    precision = torch.linalg.inv(COVARIANCE) + MAP.T @ MAP / NOISE**2
    spread = torch.linalg.inv(precision)
    mean = spread @ MAP.T @ SEEN / NOISE**2
    error = 6 * (spread.diagonal() / count).sqrt() + 0.03 * COVARIANCE.diagonal().sqrt()

    def samples(recipe: GuidedSampling) -> Tensor:
        problem = linear(count)
        start = problem.unknown.start(stream(6), restarts=1)
        found = recipe.search(problem, start)  # type: ignore[arg-type]
        return 2 * found.variables["inputs"].flatten(2)[0] - 1

    exact = GuidedSampling(method="moments", inner=4, steps=40)
    found = samples(exact)
    assert bool(((found.mean(0) - mean).abs() < error).all())
    # Steps that take E[x_0 | x_t] for x_0 lose its spread; the fewer they are, the more.
    share = torch.cov(found.T).diagonal() / spread.diagonal()
    assert bool(((share > 0.4) & (share < 1.1)).all())
    for other in (replace(exact, inner=1), replace(exact, method="gradient", rate=0.0)):
        assert bool(((samples(other).mean(0) - mean).abs() > error).any())


def test_turned_noise_keeps_its_length() -> None:
    noise, towards = (torch.randn((5, 2, 1, 4, 4), generator=stream(s)) for s in (1, 2))
    for rate in (0.0, 0.2, 1.0):
        found = _turned(noise, towards, rate)
        length = torch.linalg.vector_norm(found.flatten(1), dim=1)
        assert torch.allclose(length, torch.full((5,), math.sqrt(32)), rtol=1e-5)
    along = torch.cosine_similarity(_turned(noise, towards, 1.0).flatten(1), towards.flatten(1))
    assert torch.allclose(along, torch.ones(5))
    same = torch.cosine_similarity(_turned(noise, towards, 0.0).flatten(1), noise.flatten(1))
    assert torch.allclose(same, torch.ones(5))


def test_the_norm_constrained_step_is_as_long_as_the_diffusion_s_own_noise() -> None:
    """And goes downhill: J after it is lower than after the plain step, over 5 trials."""
    objective = replace(
        GuidedSampling().compose([seen_of()]), targets=5 * (0,), streams=(stream(0),)
    )
    x, noise = (torch.randn((5, 2, 1, 4, 4), generator=stream(s)) for s in (3, 4))
    pair = (12, 8)

    def moved(recipe: GuidedSampling, noise: Tensor) -> Tensor:
        return _Step(recipe, objective, range(5)).moved(x, noise, pair)[0]

    alphas = small_prior().schedule.alphas[list(pair)]
    now, after = alphas.tolist()
    sigma = math.sqrt((1 - after) / (1 - now) * (1 - now / after))
    middle = moved(GuidedSampling(method="gradient", rate=0.0), torch.zeros_like(noise))
    plain, turned = (moved(GuidedSampling(rate=r), noise) - middle for r in (0.0, 0.5))
    length = torch.linalg.vector_norm(turned.flatten(1), dim=1)
    assert torch.allclose(length, torch.full((5,), sigma * math.sqrt(32)), rtol=1e-4)
    step = _Step(GuidedSampling(), objective, range(5))
    towards = [
        step.slope(step.clean(middle + move, pair[1]).detach())[0] for move in (turned, plain)
    ]
    assert bool((towards[0] < towards[1]).all())


@pytest.mark.parametrize("method", ["norm", "moments", "gradient"])
def test_a_target_in_company_is_attacked_as_it_is_alone(method: str) -> None:
    recipe = GuidedSampling(steps=3, restarts=2, method=method, inner=2)  # type: ignore[arg-type]
    group = [seen_of(), seen_of(4)]
    both = recipe.on_group(group, generators=[stream(1), stream(2)], engine="loop")
    alone = recipe.on_group(group[1:], generators=[stream(2)], engine="loop")
    assert torch.allclose(both[1].batch.inputs, alone[0].batch.inputs, atol=1e-4)
    assert "mean of 2 samples" in alone[0].message
    assert alone[0].evaluations == 2 * 3 * (3 if method == "moments" else 1)


def test_settings_without_meaning_are_refused() -> None:
    for settings in (
        {"method": "x"}, {"estimate": "x"}, {"inner": 0}, {"rate": 1.5}, {"eta": 2.0}, {"eta": 0.0},
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=next(iter(settings))):
            GuidedSampling(**settings)
    with pytest.raises(InvalidInput, match="sampling"):
        GradientGuidedDiffusion(sampling=0)


def test_a_taught_model_begins_with_what_it_drew_and_checkpoints_change_nothing() -> None:
    recipe, prior = GradientGuidedDiffusion(sampling=3), small_prior()
    objective = replace(recipe.compose([seen_of()]), targets=(0, 0))
    start = objective.unknown.start(stream(1), restarts=2)
    labels = seen_of().knowledge.labels
    assert labels is not None
    drawn = [prior.images(x, labels, steps=3) for x in start["latents"]]
    assert torch.allclose(objective.unknown.decode(start, [0, 0])[0], torch.stack(drawn))
    value, slopes = objective.value_and_gradient(start, [0, 1])
    assert not slopes["latents"].any()

    name = "last.weight"
    own = start[name][0].clone().requires_grad_()

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        return prior.output(x, times, labels, weights={**prior.network, name: own})

    images = prior.unscaled(ddim(prior.schedule, denoise, start["latents"][0], steps=3))
    alone: Callable[..., Tensor] = objective.fit
    plain = objective.fit_weight * alone(images[None], labels[None], [0])
    (wanted,) = torch.autograd.grad(plain.sum(), own)
    assert torch.allclose(value[0], plain[0], rtol=1e-4)
    assert torch.allclose(slopes[name][0], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_teaching_lowers_the_objective_and_keeps_the_latents() -> None:
    recipe = GradientGuidedDiffusion(steps=12, sampling=2, restarts=2, learning_rate=1e-2)
    objective = replace(recipe.compose([seen_of()]), targets=(0, 0))
    start = objective.unknown.start(stream(1), restarts=2)
    first = objective.value_and_gradient(start, [0, 1])[0]
    found = recipe.search(objective, start)
    assert bool((found.values < 0.9 * first).all())
    assert torch.equal(found.variables["latents"], start["latents"])
    assert not torch.equal(found.variables["last.weight"][0], found.variables["last.weight"][1])


def test_latents_of_a_claim_lead_back_to_it() -> None:
    """Of pictures that the model drew, DDIM backwards finds latents that draw nearly the same."""
    unknown = GradientGuidedDiffusion(sampling=10).compose([seen_of()]).unknown
    labels = seen_of().knowledge.labels
    assert labels is not None
    drawn = small_prior().images(torch.randn((2, 1, 4, 4), generator=stream(8)), labels, steps=10)
    again = unknown.decode(unknown.encode([Batch(drawn, labels)]), [0])[0][0]
    other = unknown.decode(unknown.start(stream(9), restarts=1), [0])[0][0]
    assert float((again - drawn).square().mean()) < 0.2 * float((other - drawn).square().mean())
