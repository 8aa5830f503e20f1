"""Attacks on clients of diffusion models whose noise and times the server knows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import priors
from gradleak.attacks import build
from gradleak.attacks.recipes.dlg_dm import DLGDM
from gradleak.attacks.recipes.gidm import GIDM
from gradleak.attacks.recipes.invg_dm import InvGDM
from gradleak.attacks.recipes.mean_start import MeanStart
from gradleak.denoising import UNet
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import Denoising, DenoisingAvg
from gradleak.types import Batch, DataSpec, Fact, Mechanism, ModelState, Observation, Prior
from tests.laws.small import stream

SPEC = DataSpec.image((1, 8, 8), 3)
DRAWS = frozenset({Fact.TIMESTEPS, Fact.NOISE})
KNOWS = DRAWS | {Fact.MECHANISM, Fact.BATCH_SIZE, Fact.PRIOR}


def blobs(count: int, *, seed: int) -> Tensor:
    """Smooth pictures (count, 1, 8, 8) in the box."""
    coarse = torch.rand((count, 1, 4, 4), generator=stream(seed))
    return torch.nn.functional.interpolate(coarse, 8, mode="bilinear")


@cache
def prior_of(spec: str = "diffusion:steps=4,width=8,conditional=false,timesteps=50") -> Prior:
    return priors.fit(spec, Batch(blobs(60, seed=9), torch.arange(60) % 3), SPEC, seed=0)


def state_of(width: int = 8) -> ModelState:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelState.of(UNet(1, width=width, multipliers=(1,)))


def play(
    mechanism: Mechanism,
    *,
    size: int = 1,
    knows: frozenset[Fact] = KNOWS,
    prior: Prior | None = None,
) -> tuple[Observation, Tensor]:
    data = gl.data.Dataset.of("blobs", blobs(size, seed=3), torch.arange(size) % 3)
    scenario = gl.Scenario(
        replace(data, spec=SPEC),
        state_of(),
        mechanism,
        gl.ThreatModel(knows),
        batch_size=size,
        indices=torch.arange(size),
        prior=prior or (prior_of() if Fact.PRIOR in knows else None),
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return seen, truth.batch.inputs


def psnr(claim: Tensor, truth: Tensor) -> float:
    return float(-10 * ((claim.double() - truth.double()) ** 2).mean().log10())


@pytest.mark.parametrize(
    ("mechanism", "size"),
    [
        (Denoising(timestep=300), 1),
        (Denoising(timestep=300, prediction="v_prediction"), 1),
        (Denoising(timestep=300), 2),
        (DenoisingAvg(timestep=300, steps=2, learning_rate=0.1), 1),
        (gl.defenses.build("gaussian-noise:std=1e-9")(Denoising(timestep=300)), 1),
    ],
    ids=["one", "v", "two", "fedavg", "protected"],
)
def test_gidm_recovers_blobs_where_a_guess_does_not(mechanism: Mechanism, size: int) -> None:
    """Above 40 dB; the mean of 60 public blobs has about 13 dB."""
    seen, truth = play(mechanism, size=size)
    claim = GIDM(steps=100, candidates=2, latent_steps=2, sampling=1, tolerance=1e-6)(
        seen, generator=stream(1)
    )
    assert psnr(prior_of().mean(size), truth) < 18
    assert psnr(claim.batch.inputs, truth) > 40
    assert not claim.batch.labels.any()


def test_baselines_and_the_control_recover_an_easy_blob() -> None:
    seen, truth = play(Denoising(timestep=300))
    for attack in (DLGDM(steps=40), MeanStart(steps=40), InvGDM(steps=80)):
        claim = attack(seen, generator=stream(1))
        assert psnr(claim.batch.inputs, truth) > 25, attack


def test_the_latent_gradient_agrees_with_finite_differences() -> None:
    """Through sampler, client and distance at once, in float64; the step is 1e-5."""
    seen, _ = play(Denoising(timestep=50))
    objective = GIDM(sampling=3).compose([seen])
    prior = seen.knowledge.prior
    assert isinstance(prior, priors.Denoiser)
    unknown = replace(objective.unknown, dtype=torch.float64)
    fit = type(objective.fit)([seen], objective.fit.distance, dtype=torch.float64)
    objective = replace(objective, unknown=unknown, fit=fit)
    z = 0.3 * torch.randn((1, 1, 1, 8, 8), generator=stream(5), dtype=torch.float64)
    _, gradient = objective.value_and_gradient({"latents": z}, [0])
    for seed in range(3):
        along = torch.randn(z.shape, generator=stream(seed), dtype=torch.float64)
        ends = [objective.scores({"latents": z + s * 1e-5 * along}, [0]) for s in (1, -1)]
        slope = float(ends[0] - ends[1]) / 2e-5
        assert float((gradient["latents"] * along).sum()) == pytest.approx(slope, rel=1e-4)


def test_a_search_without_pixels_claims_what_the_prior_draws() -> None:
    seen, _ = play(Denoising(timestep=50))
    attack = GIDM(steps=0, candidates=2, latent_steps=2, sampling=2)
    claim = attack(seen, generator=stream(1))
    objective = attack.objective(seen)(claim.batch)
    assert claim.evaluations == 2
    # Claims are clamped into the box, DDIM's images are in it already.
    assert claim.objective == pytest.approx(objective, rel=1e-3)


def test_the_control_starts_at_the_mean_of_any_prior() -> None:
    gaussian = prior_of("gaussian")
    seen, _ = play(Denoising(timestep=50), prior=gaussian)
    attack = MeanStart()
    start = attack.starts(attack.compose([seen]), [stream(0)])["inputs"]
    assert torch.allclose(start[0].double(), gaussian.mean(1).double(), atol=1e-6)


@pytest.mark.parametrize("attack", [GIDM(), DLGDM(), MeanStart(), InvGDM()])
def test_what_is_missing_is_said_in_one_line(attack: gl.types.Attack) -> None:
    name = attack.about.id
    for without in DRAWS:
        seen, _ = play(Denoising(timestep=50), knows=KNOWS - {without})
        with pytest.raises(NotApplicable, match=f"needs {without}.*--knows {without}"):
            attack(seen, generator=stream(0))
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    update = {k: torch.ones_like(v) for k, v in head.named_parameters()}
    other = gl.observe(head, update=update, data=SPEC, batch_size=1, prior=prior_of())
    with pytest.raises(NotApplicable, match=f"{name} attacks clients that train a diffusion"):
        attack(other, generator=stream(0))


def test_gidm_needs_a_diffusion_prior() -> None:
    seen, _ = play(Denoising(timestep=50), prior=prior_of("gaussian"))
    with pytest.raises(NotApplicable, match="family 'diffusion'"):
        GIDM()(seen, generator=stream(0))
    with pytest.raises(InvalidInput, match="latent_steps"):
        GIDM(latent_steps=0)


@pytest.mark.parametrize(
    "spec",
    ["dlg:steps=3", "inverting-gradients:steps=3", "continuation:steps=3", "idlg:steps=3",
     "gradinversion:steps=3", "rog:steps=3", "posterior:steps=3", "linear-layer", "spear",
     "cocktail-party", "r-gap", "april", "sme:steps=3", "fedavg-leakage:steps=3",
     "lone-rows", "blind-mask:steps=3", "bayes:steps=3", "gias:steps=3"],
)  # fmt: skip
@pytest.mark.parametrize("knows", [KNOWS, KNOWS - DRAWS], ids=["known", "private"])
def test_attacks_on_classifiers_work_or_say_why_not(spec: str, knows: frozenset[Fact]) -> None:
    seen, _ = play(Denoising(timestep=50), knows=knows, prior=prior_of("gaussian"))
    try:
        claim = build(spec)(seen, generator=stream(1))
    except NotApplicable:
        return
    assert claim.batch.inputs.isfinite().all()


def test_the_published_constants_are_those_of_the_released_code() -> None:
    """run.py and src/diffusion_inversion.py: 2501 and 5001 steps of Adam at 0.01, plain squares."""
    attack = GIDM.published()
    assert (attack.latent_steps, attack.steps) == (2501, 5001)
    assert (attack.candidates, attack.sampling) == (1, 16)
    assert (attack.latent_rate, attack.learning_rate) == (0.01, 0.01)
    assert (attack.latent_fit, attack.optimiser) == ("squared_l2", "adam")
    client = Denoising(
        schedule="sigmoid_alphas",
        timesteps=16,
        prediction="v_prediction",
        timestep=1,
        bounds=(-1, 1),
    )
    assert math.isclose(float(client.noise_schedule.alphas[1]), 0.947, abs_tol=5e-4)
    seen, _ = play(client)
    short = replace(attack, latent_steps=2, steps=2)
    assert short(seen, generator=stream(0)).evaluations == 4
