"""QSGD: unbiased, within its bound of variance, and its levels' probability given the grid."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from gradleak.attacks.parts.likelihood import data_term
from gradleak.defenses import GaussianNoise, Quantize, Round, Sent
from gradleak.defenses.dithered import Dithered
from gradleak.errors import IntractableLikelihood
from gradleak.mechanisms import FedSGD
from gradleak.types import Batch, Mechanism, Update
from tests.attacks.test_objective import observations
from tests.laws.small import TwoTwins, batch_of, state_of, stream

ALPHA = 1e-6
STATE, BATCH = state_of(TwoTwins), batch_of(2)
CLEAN = FedSGD().mean(STATE, BATCH).values


def z_of_the_mean(client: Mechanism, *, draws: int) -> float:
    """Largest |z| of the mean error along 32 random directions."""
    generator, errors = stream(1), []
    for _ in range(draws):
        sent = client.sample(STATE, BATCH, generator=generator).values
        errors.append(torch.cat([(sent[k] - v).flatten() for k, v in CLEAN.items()]))
    along = torch.stack(errors) @ torch.randn(
        (len(errors[0]), 32), generator=stream(2), dtype=torch.float64
    )
    return float((along.mean(0) / (along.std(0).clamp(min=1e-12) / draws**0.5)).abs().max())


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("levels", [1, 4, 16])
def test_it_is_unbiased_and_within_its_bound(levels: int, norm: str) -> None:
    """n = 300 draws, z-tests at ALPHA; the bound is that of Lemma 3.1, for the L2 norm."""
    rule, generator = Quantize(levels, norm), stream(3)  # type: ignore[arg-type]
    client = rule(Sent(Update(CLEAN, "gradient")))
    assert z_of_the_mean(client, draws=300) < stats.norm.isf(ALPHA / 64)
    steps = rule.steps(CLEAN)
    for k, v in CLEAN.items():
        above = (v / steps[k]) % 1
        exact = float((steps[k] ** 2 * above * (1 - above)).sum())
        n = v.numel()
        if norm == "l2":
            assert exact <= min(n / levels**2, math.sqrt(n) / levels) * float(v.norm()) ** 2
        draws = [client.sample(STATE, BATCH, generator=generator).values[k] - v for _ in range(60)]
        squares = torch.stack(draws).square().flatten(1).sum(1)
        error = float(squares.std()) / 60**0.5
        assert abs(float(squares.mean()) - exact) <= stats.norm.isf(ALPHA / 16) * error + 1e-15


def test_rounding_to_the_nearest_level_would_be_found() -> None:
    step = float(torch.cat([v.flatten() for v in CLEAN.values()]).norm()) / 4
    assert z_of_the_mean(Round(step)(Sent(Update(CLEAN, "gradient"))), draws=20) > stats.norm.isf(
        ALPHA / 64
    )


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_the_update_shows_its_grid(norm: str) -> None:
    rule = Quantize(16, norm)  # type: ignore[arg-type]
    sent = rule(FedSGD()).sample(STATE, BATCH, generator=stream(4)).values
    shown, true = rule.shown(sent), rule.steps(CLEAN)
    for k in CLEAN:
        times = float(shown[k] / true[k])
        assert times == pytest.approx(round(times), rel=1e-9)
    assert float(shown["first.weight"]) == pytest.approx(float(true["first.weight"]), rel=1e-9)
    silent = {"w": torch.zeros(3)}
    assert float(rule.shown(silent)["w"]) > 0


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_levels_have_a_probability_given_the_grid(norm: str) -> None:
    client = Quantize(4, norm)(FedSGD())  # type: ignore[arg-type]
    assert isinstance(client, Dithered)
    density = client.given_grid().density
    u = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64)
    for c in (0.0, 0.1, 0.25, 0.6, -0.3):
        total = 0.0
        for level in range(-4, 5):
            sent = torch.cat([u, torch.tensor([0.25 * level], dtype=torch.float64)])
            centre = torch.cat([u, torch.tensor([c], dtype=torch.float64)])
            total += math.exp(-float(density({"w": centre}, {"w": sent})))
        assert total == pytest.approx(1, abs=5e-3)
    with pytest.raises(IntractableLikelihood):
        Quantize(4)(GaussianNoise()(FedSGD())).given_grid()


def test_a_matched_search_uses_it() -> None:
    (seen,) = observations(Quantize(2)(FedSGD()), 1, network=TwoTwins)
    term = data_term([seen], dtype=torch.float64)

    def at(batch: Batch) -> float:
        return float(term.fit(batch.inputs[None], batch.labels[None], [0]))

    assert term.weight == 1.0
    assert at(batch_of(2, seed=0)) < at(batch_of(2, seed=9))
