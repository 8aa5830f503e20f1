"""Noise by risk against brute force: widths, draws, density and what an attacker compares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy import stats

from gradleak.defenses import Memory, RiskNoise, advanced, build, informed
from gradleak.defenses.risk_noise import RiskNoised
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Batch, Mechanism, Update
from tests.laws.small import TwoTwins, batch_of, state_of, stream

PUBLIC = batch_of(40, seed=9)


def told(rule: RiskNoise, mechanism: Mechanism | None = None) -> RiskNoised:
    found = informed(rule(mechanism or FedSGD()), PUBLIC)
    assert isinstance(found, RiskNoised)
    return found


def widths(client: RiskNoised) -> dict[str, float]:
    return client.stds(state_of(TwoTwins))


def test_no_other_widths_of_equal_power_tell_less() -> None:
    """The trace of the Fisher information by Jacobian, minimised numerically over widths."""
    state, batch = state_of(TwoTwins), batch_of(1)

    def gradient(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(FedSGD().mean(state, Batch(x, batch.labels)).values)

    slopes = torch.func.jacrev(gradient)(batch.inputs)
    risks = {k: float(j.norm()) for k, j in slopes.items()}
    sizes = np.array([p.numel() for p in state.params.values()])
    found = RiskNoise(std=0.3).allotted([risks[k] for k in state.params], state)
    power = 0.09 * sizes.sum()
    own = np.array([found[k] ** 2 for k in state.params])
    assert sizes @ own == pytest.approx(power)

    def trace(variances: np.ndarray) -> float:
        return float(
            sum(
                (slopes[k].square().sum() / v).item()
                for k, v in zip(state.params, variances, strict=True)
            )
        )

    def of(logs: np.ndarray) -> np.ndarray:
        free: np.ndarray = np.exp(logs) * power / (sizes @ np.exp(logs))
        return free

    best = scipy.optimize.minimize(lambda z: trace(of(z)), np.zeros(len(sizes)), tol=1e-12)
    assert trace(own) == pytest.approx(best.fun, rel=1e-6)
    assert trace(own) < 0.99 * trace(np.full(len(sizes), 0.09))


def test_every_tensor_gets_its_own_noise() -> None:
    """n = 200 updates; a standard error of 1/√(2n) per width, 5 of them."""
    client, state, batch = told(RiskNoise(std=0.3)), state_of(TwoTwins), batch_of(2)
    clean, expected = FedSGD().mean(state, batch).values, widths(client)
    draws = [client.sample(state, batch, generator=stream(s)).values for s in range(200)]
    for name, std in expected.items():
        gap = torch.stack([d[name] - clean[name] for d in draws])
        measured = float(gap.square().mean().sqrt())
        assert measured == pytest.approx(std, rel=5 / math.sqrt(2 * gap.numel()))
    assert max(expected.values()) > 1.2 * min(expected.values())


def test_without_examples_it_is_plain_noise() -> None:
    client = RiskNoise(std=0.3)(FedSGD())
    assert isinstance(client, RiskNoised)
    assert widths(client) == pytest.approx(dict.fromkeys(state_of(TwoTwins).params, 0.3))


def test_a_tensor_without_risk_is_not_sent_as_it_is() -> None:
    state = state_of(TwoTwins)
    found = RiskNoise(std=0.3).allotted([1.0] + [0.0] * (len(state.params) - 1), state)
    assert min(found.values()) > 0
    still = RiskNoise(std=0.3).allotted([0.0] * len(state.params), state)
    assert still == pytest.approx(dict.fromkeys(state.params, 0.3))


@pytest.mark.parametrize(
    "core", [FedSGD(), FedAvg(0.1, steps=2), build("top-k:fraction=0.5")(FedSGD())]
)
def test_the_density_is_gaussian_with_those_widths(core: Mechanism) -> None:
    client, state, batch = told(RiskNoise(std=0.3), core), state_of(TwoTwins), batch_of(1)
    update = client.sample(state, batch, generator=stream(0))
    mean = core.mean(state, batch).values
    expected = sum(
        stats.norm.logpdf((update.values[k] - mean[k]).numpy(), scale=std).sum()
        for k, std in widths(client).items()
    )
    assert float(client.log_prob(update, state, batch)) == pytest.approx(expected, rel=1e-12)


def test_gaps_are_compared_by_their_widths() -> None:
    client, state, batch = told(RiskNoise(std=0.3)), state_of(TwoTwins), batch_of(1)
    received = client.sample(state, batch, generator=stream(0))
    claims = [batch_of(1, seed=s) for s in (1, 2)]
    gaps, nats = [], []
    for claim in claims:
        found = client.predict(received, state, claim).values
        gaps.append(sum(float((found[k] - v).square().sum()) for k, v in received.values.items()))
        nats.append(-float(client.log_prob(received, state, claim)))
    least = min(widths(client).values())
    assert (gaps[0] - gaps[1]) / (2 * least**2) == pytest.approx(nats[0] - nats[1], rel=1e-9)


def test_a_client_keeps_its_risks_until_they_are_due() -> None:
    """Equal draws of noise, so that a tensor's noise shows its width."""
    client, batch = told(RiskNoise(refresh=2)), batch_of(1)
    memory: Memory = {}
    states = [state_of(TwoTwins, seed=s) for s in range(3)]
    used = []
    for state in states:
        update, memory = advanced(client, state, batch, memory, generator=stream(0))
        clean = FedSGD().mean(state, batch).values
        used.append({k: float((v - clean[k]).norm()) for k, v in update.values.items()})
    assert used[1] == pytest.approx(used[0])
    assert used[2] != pytest.approx(used[0], rel=1e-3)


def test_what_it_claims_is_checked() -> None:
    state, batch = state_of(TwoTwins), batch_of(1)
    before = FedSGD().mean(state, batch)
    honest = told(RiskNoise(std=0.1))
    for seed in range(20):
        after = honest.sample(state, batch, generator=stream(seed))
        assert honest.rule.doubt(before, after) is None
    louder = told(RiskNoise(std=0.2)).sample(state, batch, generator=stream(0))
    assert "adds" in honest.rule.doubt(before, louder)[0]  # type: ignore[index]
    silent = Update(dict(before.values), before.kind)
    assert honest.rule.doubt(before, silent) is not None
