"""The path to a posterior: where it ends, and what its density and network become on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak import models
from gradleak.attacks import Posterior
from gradleak.attacks.parts import smoothing
from gradleak.attacks.parts.annealing import annealed
from gradleak.attacks.parts.likelihood import noise_variance
from gradleak.data import load
from gradleak.types import Batch, Observation
from tests.attacks.test_posterior import MASKED, build, decibels, digits_from_the_prior, gain

SECRET = "random-mask:share=0.5+gaussian-noise:std=0.03"
QUANTISED = "quantize:levels=16+gaussian-noise:std=0.03"
SIGNS = "gaussian-noise:std=0.03+sign"
CELLS = "gaussian-noise:std=0.03+round:step=0.05"


@pytest.mark.parametrize("spec", [MASKED, SECRET, QUANTISED, SIGNS, CELLS])
def test_a_density_widens_as_if_its_noise_had_been_wider(spec: str) -> None:
    wide, narrow = build(spec.replace("std=0.03", "std=0.3")), build(spec)
    seen, images = digits_from_the_prior(narrow, 1)
    batch = Batch(images[:1], seen[0].knowledge.labels)  # type: ignore[arg-type]
    narrow_law, wide_law = (m.likelihood(batch_size=1) for m in (narrow, wide))
    centre = narrow_law.centre.mean(seen[0].state, batch).values
    widened = narrow_law.density.widened(10.0)  # type: ignore[attr-defined]
    expected = float(wide_law.density(centre, seen[0].update.values))
    assert float(widened(centre, seen[0].update.values)) == pytest.approx(expected, rel=1e-6)
    assert noise_variance(seen[0]) == pytest.approx(0.0009)


def test_a_density_without_noise_is_not_widened() -> None:
    law = build("round:step=0.05,rounding=stochastic").likelihood(batch_size=1)
    assert law.density.widened(10.0) is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", ["gaussian-noise:std=0.03", SIGNS])
def test_the_path_ends_at_the_objective_and_gets_there_gradually(spec: str) -> None:
    seen, _ = digits_from_the_prior(build(spec), 1)
    objective = Posterior().compose(seen)
    path = annealed(objective, first=noise_variance(seen[0]))
    x = {"inputs": torch.full((1, 1, 1, 8, 8), 0.4)}
    values = [float(path(step, 100).values(x, [0])) for step in (0, 20, 40, 60)]
    assert path(75, 100) is path(99, 100) is objective
    assert path(50, 100) is path(51, 100)
    assert len(set(values)) == 4
    assert values[0] < float(objective.values(x, [0]))


def test_dividing_the_outputs_of_a_network_divides_them() -> None:
    spec = load("digits").spec
    network = smoothing.swapped(models.build("mlp", spec, seed=0))
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    before = network(x)
    smoothing.divide_outputs(network, 2.0)
    assert torch.equal(network(x), before / 2)


def excess(attack: Posterior, seen: list[Observation], images: Tensor) -> np.ndarray:
    """Objective of every claim over that of the truth, in nats."""
    truths = [Batch(x[None], o.knowledge.labels) for x, o in zip(images, seen, strict=True)]  # type: ignore[arg-type]
    claims = gl.attack_all(attack, seen)
    rows = zip(claims, truths, seen, strict=True)
    return np.array([c.objective - attack.objective(o)(t) for c, t, o in rows])


@pytest.mark.parametrize("spec", [QUANTISED, SIGNS])
def test_steep_likelihoods_are_climbed_to_the_truths_level(spec: str) -> None:
    """n = 6 targets; the same search without wide noise and soft units does not get there."""
    seen, images = digits_from_the_prior(build(spec), 6)
    attack = Posterior(restarts=1, steps=200)
    assert np.median(excess(attack, seen, images)) < -10
    assert np.median(excess(replace(attack, naive=True), seen, images)) > -10


@pytest.mark.slow
@pytest.mark.parametrize("spec", [MASKED, SECRET, QUANTISED, SIGNS])
def test_few_claims_stay_above_the_truth(spec: str) -> None:
    """n = 60 targets: the share that is worse by more than a nat."""
    seen, images = digits_from_the_prior(build(spec), 60)
    assert (excess(Posterior(restarts=1, steps=600), seen, images) > 1).mean() <= 0.05


def hidden_layer_of_100() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


@pytest.mark.slow
def test_failures_on_a_trained_network_were_the_searches_own(tmp_path: Path) -> None:
    """n = 100 clients, 500 steps of training, noise 0.01; what naive search reports and what is."""
    report = gl.audit(
        data="digits",
        model=f"{__name__}:hidden_layer_of_100",
        stage="500",
        attacks=["posterior", "posterior:naive=true,restarts=1"],
        defenses="gaussian-noise:std=0.01",
        knows="labels,prior",
        targets=100,
        budget="quick",
        seed=0,
        workers=0,
        out=tmp_path,
    )
    noisy = [f for f in report.findings if f["defense"] == "gaussian-noise"]
    found, naive = noisy if "naive" in noisy[1]["attack_spec"] else noisy[::-1]
    short = [f["missed"]["optimiser_limited"] / f["trials"]["run"] for f in (found, naive)]
    gained = [
        t["scores"]["psnr_db"][0] - n["scores"]["psnr_db"][0]
        for t, n in zip(found["targets"], naive["targets"], strict=True)
    ]
    assert short[0] <= 0.2
    assert short[1] >= 0.8
    assert np.mean(gained) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("mask", [1, 2, 3])
def test_a_secret_mask_costs_about_a_decibel_and_a_half(mask: int) -> None:
    """n = 100 targets per mask, paired; no search ends above the truth, whatever it costs."""
    known, images = digits_from_the_prior(build(MASKED.replace("seed=1", f"seed={mask}")), 100)
    blind = [replace(o, mechanism=build(SECRET)) for o in known]
    attack = Posterior(restarts=1, steps=200)
    mean, error = gain(decibels(attack, known, images), decibels(attack, blind, images))
    assert mean - 1.96 * error <= 1.5
    assert (excess(attack, blind, images) < 1).mean() >= 0.98
