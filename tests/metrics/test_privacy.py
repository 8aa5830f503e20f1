"""Ceilings against closed forms, and against the Bayes-optimal attack on canaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from gradleak.defenses import Clip, GaussianNoise
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.metrics import (
    clopper_pearson,
    dp_ceiling,
    epsilon,
    epsilon_curve,
    gaussian_ceiling,
)
from gradleak.types import Batch, ModelState

TRIALS = 600
CONFIDENCE = 0.998  # one-sided alpha = 0.001
CLIP = 0.7


def canary_hits(candidates: int, noise_multiplier: float) -> int:
    """How often the largest projection names the canary, through the real client.

    With a linear model and loss, one-hot inputs have orthogonal gradients longer than the clip.
    """
    state = ModelState.of(nn.Linear(candidates, 1, bias=False))
    client = GaussianNoise(std=noise_multiplier * CLIP)(
        Clip(norm=CLIP)(FedSGD(loss=lambda logits, _: logits.sum()))
    )
    generator = torch.Generator().manual_seed(candidates)
    canaries, hits = torch.eye(candidates), 0
    for trial in range(TRIALS):
        index = trial % candidates
        batch = Batch(canaries[index : index + 1], torch.tensor([0]))
        sent = client.sample(state, batch, generator=generator).values["weight"]
        hits += int(sent.argmax()) == index
    return hits


def exceeds(hits: int, ceiling: float) -> bool:
    return clopper_pearson(hits, TRIALS, confidence=CONFIDENCE).low > ceiling


def orthogonal_success(candidates: int, noise_multiplier: float) -> float:
    """P(the canary's projection is the largest) = ∫ φ(z − 1/m) Φ(z)^(K−1) dz."""
    density = stats.norm(1 / noise_multiplier).pdf
    return float(
        integrate.quad(lambda z: density(z) * stats.norm.cdf(z) ** (candidates - 1), -10, 20)[0]
    )


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("candidates", [10, 100])
def test_canaries_stay_below_the_ceiling(candidates: int, noise_multiplier: float) -> None:
    """H0: success ≤ ceiling; n = 600, Clopper–Pearson, alpha = 0.001. Planted fault: half the
    noise, at K = 100."""
    ceiling = gaussian_ceiling(1 / candidates, noise_multiplier=noise_multiplier)
    optimal = orthogonal_success(candidates, noise_multiplier)
    assert optimal <= ceiling
    hits = canary_hits(candidates, noise_multiplier)
    assert not exceeds(hits, ceiling)
    interval = clopper_pearson(hits, TRIALS, confidence=CONFIDENCE)
    assert interval.low <= optimal <= interval.high, "the attack is the optimal one"
    if candidates == 100:
        assert optimal >= 0.8 * ceiling, "nearly reached: the check has power"
        assert exceeds(canary_hits(candidates, noise_multiplier / 2), ceiling), "planted fault"


def test_steps_compose_like_one_step_of_less_noise() -> None:
    assert gaussian_ceiling(0.01, noise_multiplier=4.0, steps=16) == pytest.approx(
        gaussian_ceiling(0.01, noise_multiplier=1.0)
    )
    assert gaussian_ceiling(0.01, noise_multiplier=1e9) == pytest.approx(0.01)


@pytest.mark.parametrize("prior", [0.001, 0.1])
def test_a_curve_of_the_gaussian_mechanism_gives_its_trade_off(prior: float) -> None:
    """For μ = 1, δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ); the envelope of its lines is exact."""
    epsilons = np.linspace(-3, 8, 4001)
    delta = stats.norm.cdf(0.5 - epsilons) - np.exp(epsilons) * stats.norm.cdf(-0.5 - epsilons)

    def curve(target: float) -> float:
        return float(np.interp(-target, -delta, epsilons, left=-3, right=np.inf))

    assert dp_ceiling(prior, curve) == pytest.approx(
        gaussian_ceiling(prior, noise_multiplier=1.0), rel=1e-4
    )


def test_a_ceiling_is_a_probability() -> None:
    assert dp_ceiling(0.5, lambda _: np.inf) == 1.0
    assert dp_ceiling(0.01, lambda _: 0.0) == pytest.approx(0.01, rel=1e-3)


@pytest.fixture(scope="module")
def opacus() -> object:
    return pytest.importorskip("opacus", reason="Opacus is not installed")


@pytest.mark.parametrize("prior", [0.001, 0.1])
@pytest.mark.usefixtures("opacus")
def test_one_sampled_step_against_its_closed_form(prior: float) -> None:
    """One step of q: 1 − f(κ) = (1 − q) κ + q Φ(Φ⁻¹(κ) + 1/m), as the likelihood ratio of mixture
    and noise is monotone. The PRV ceiling is at most 2 % above, the RDP ceiling above that."""
    exact = 0.8 * prior + 0.2 * gaussian_ceiling(prior, noise_multiplier=1.0)
    prv, rdp = (
        dp_ceiling(
            prior,
            epsilon_curve(noise_multiplier=1.0, sample_rate=0.2, steps=1, accountant=accountant),
        )
        for accountant in ("prv", "rdp")
    )
    assert exact <= prv <= 1.02 * exact
    assert prv <= rdp <= 2 * exact


def sampled_hits(candidates: int, noise: float, rate: float, steps: int) -> int:
    """Bayes-optimal attack on sampled canaries: per candidate, the sum over steps of
    log (1 − q + q exp((2 y − 1) / 2m²)), y the projection in units of the clip."""
    rng = np.random.default_rng(0)
    y = noise * rng.standard_normal((TRIALS, steps, candidates))
    y[:, :, 0] += rng.random((TRIALS, steps)) < rate
    ratio = np.log1p(rate * np.expm1((2 * y - 1) / (2 * noise**2))).sum(1)
    return int((ratio.argmax(1) == 0).sum())


@pytest.mark.usefixtures("opacus")
def test_sampled_canaries_stay_below_the_ceiling() -> None:
    """q = 0.2, T = 20, m = 1, K = 100, n = 600, alpha = 0.001; planted fault: half the noise."""
    curve = epsilon_curve(noise_multiplier=1.0, sample_rate=0.2, steps=20)
    ceiling = dp_ceiling(0.01, curve)
    hits = sampled_hits(100, 1.0, 0.2, 20)
    assert not exceeds(hits, ceiling)
    assert hits / TRIALS > 0.6 * ceiling, "not far below"
    assert ceiling < gaussian_ceiling(0.01, noise_multiplier=1.0, steps=20), "sampling amplifies"
    assert exceeds(sampled_hits(100, 0.5, 0.2, 20), ceiling), "planted fault"


@pytest.mark.usefixtures("opacus")
def test_what_the_accountant_cannot_resolve_proves_nothing() -> None:
    curve = epsilon_curve(noise_multiplier=1.0, sample_rate=0.2, steps=1)
    assert curve(0.0) == np.inf
    assert curve(1e-13) == np.inf


@pytest.mark.usefixtures("opacus")
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 9])
def test_epsilon_in_closed_form_stands_below_what_opacus_bounds(noise: float, steps: int) -> None:
    """The definition at the root, and the curve of Renyi divergences above it."""
    found = epsilon(1e-5, noise_multiplier=noise, steps=steps)
    mu = steps**0.5 / noise
    first, second = stats.norm.cdf([mu / 2 - found / mu, -mu / 2 - found / mu])
    assert first - np.exp(found) * second == pytest.approx(1e-5, rel=1e-6)
    bound = epsilon(1e-5, noise_multiplier=noise, steps=steps, accountant="rdp")
    assert found <= bound <= 1.2 * found
    exact = gaussian_ceiling(0.01, noise_multiplier=noise, steps=steps)
    by_epsilon = dp_ceiling(0.01, lambda delta: epsilon(delta, noise_multiplier=noise, steps=steps))
    assert by_epsilon == pytest.approx(exact, rel=1e-3), "the curve says all that there is"


@pytest.mark.usefixtures("opacus")
def test_epsilon_of_sampled_rounds_is_that_of_the_accountants() -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    for name, kind in (("prv", PRVAccountant), ("rdp", RDPAccountant)):
        accountant = kind()
        accountant.history = [(1.1, 0.02, 500)]
        assert epsilon(
            1e-5, noise_multiplier=1.1, sample_rate=0.02, steps=500, accountant=name
        ) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-2)
    assert epsilon(0.5, noise_multiplier=4.0) == 0.0, "δ alone covers it"


def test_invalid_inputs_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for prior in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidInput, match=f"prior={prior}: expected"):
            gaussian_ceiling(prior, noise_multiplier=1.0)
    with pytest.raises(InvalidInput, match=r"noise_multiplier=0\.0: expected"):
        gaussian_ceiling(0.1, noise_multiplier=0.0)
    with pytest.raises(InvalidInput, match="steps=0: expected"):
        gaussian_ceiling(0.1, noise_multiplier=1.0, steps=0)
    with pytest.raises(InvalidInput, match=r"sample_rate=1\.5: expected"):
        epsilon_curve(noise_multiplier=1.0, sample_rate=1.5, steps=1)
    with pytest.raises(InvalidInput, match="gaussian_ceiling is exact"):
        epsilon_curve(noise_multiplier=1.0, sample_rate=1.0, steps=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"pip install 'gradleak\[dp\]'"):
        epsilon_curve(noise_multiplier=1.0, sample_rate=0.1, steps=1)
