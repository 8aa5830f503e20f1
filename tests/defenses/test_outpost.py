"""OUTPOST against its algorithm spelled out, with the statistics it claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import gradleak as gl
from gradleak.attacks import InvertingGradients, attack_all
from gradleak.defenses import Outpost, Sent, advanced, gathered
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.types import Exchange, Knowledge, Update
from tests.laws.small import SPEC, TwoTwins, batch_of, state_of, stream

ALPHA = 1e-6
STATE, BATCH = state_of(TwoTwins), batch_of(2)
CLEAN = FedSGD().mean(STATE, BATCH)


def spelled_out(rule: Outpost) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is left of every tensor, and where noise goes, as the published code has it."""
    fisher = {k: v.square().mean(0).numpy() for k, v in CLEAN.values.items()}
    least = np.percentile(np.concatenate([f.flatten() for f in fisher.values()]), 100 - rule.noisy)
    left, loud = {}, {}
    for k, v in CLEAN.values.items():
        g = v.numpy()
        left[k] = np.where(abs(g) < np.percentile(abs(g), rule.prune), 0, g)
        loud[k] = np.broadcast_to(fisher[k] >= least, g.shape)
    return left, loud


def test_the_first_round_is_the_published_algorithm_as_intended() -> None:
    """n = number of noisy coordinates of 200 rounds, chi-squared on their variance at ALPHA."""
    rule, generator = Outpost(), stream(1)
    left, loud = spelled_out(rule)
    scores = []
    for _ in range(200):
        sent = rule(FedSGD()).sample(STATE, BATCH, generator=generator).values
        for k, v in sent.items():
            noise = v.numpy() - left[k]
            # Their percentile interpolates, and a broadcast edge is one coordinate.
            assert (noise[~loud[k]] != 0).sum() <= 1
            std = 0.8 * min(1.0, float(STATE.params[k].var()))
            scores.append(noise[loud[k]] / std)
    z = np.concatenate(scores)
    low, high = stats.chi2.interval(1 - ALPHA, len(z))
    assert low < (z**2).sum() < high
    assert not low < (1.1 * z**2).sum() < high  # 5 % more noise is found
    assert stats.kstest(z, "norm").pvalue > ALPHA


def test_noise_is_fresh_in_every_round() -> None:
    client = Outpost()(FedSGD())
    first, second = (client.sample(STATE, BATCH, generator=stream(s)).values for s in (1, 2))
    noisy = [k for k, where in Outpost().loud(CLEAN.values).items() if where.any()]
    assert noisy
    assert all((first[k] != second[k]).any() for k in noisy)


@pytest.mark.parametrize("number", [0, 4, 8])
def test_perturbed_rounds_become_rare(number: int) -> None:
    """n = 400 coins with probability 1 / (1 + t / 8), exact binomial test at ALPHA."""
    client, memory = Outpost()(Sent(CLEAN)), {"round": torch.tensor(number)}
    touched = 0
    for seed in range(400):
        sent, kept = advanced(client, STATE, BATCH, memory, generator=stream(seed))
        assert int(kept["round"]) == number + 1
        touched += any((sent.values[k] != v).any() for k, v in CLEAN.values.items())
    assert stats.binomtest(touched, 400, 1 / (1 + number / 8)).pvalue > ALPHA
    assert stats.binomtest(touched, 400, 1 / (2 + number / 8)).pvalue < ALPHA


def test_the_clean_round_is_picked_and_predicted_as_it_is() -> None:
    rule = Outpost()
    client = rule(FedSGD())
    touched = client.sample(STATE, BATCH, generator=stream(0))
    seen = gl.observe(
        STATE, update=touched.values, data=SPEC, batch_size=2, mechanism=client, labels=BATCH.labels
    )
    rounds = tuple(Exchange(STATE, u) for u in (touched, CLEAN, touched))
    one = gathered(replace(seen, exchanges=rounds))
    assert one.exchanges == rounds[1:2]
    other = FedSGD().mean(STATE, batch_of(2, seed=9)).values
    predicted = client.predict(one.update, STATE, batch_of(2, seed=9)).values
    assert all(torch.equal(predicted[k], v) for k, v in other.items())


def test_targets_whose_clean_rounds_differ_are_attacked_together() -> None:
    client, states = Outpost()(FedSGD()), (STATE, state_of(TwoTwins, seed=1))
    seen = []
    for clean in (0, 1):
        rounds = []
        for number, state in enumerate(states):
            sent = FedSGD().mean(state, BATCH)
            if number != clean:
                sent = client.sample(state, BATCH, generator=stream(0))
            rounds.append(Exchange(state, sent))
        seen.append(gl.Observation(tuple(rounds), client, SPEC, Knowledge(2, BATCH.labels)))
    claims = attack_all(InvertingGradients(steps=2), seen)
    assert [len(c.batch) for c in claims] == [2, 2]


def test_what_was_neither_pruned_nor_noised_is_matched_exactly() -> None:
    client = Outpost(noisy=20)(FedSGD())
    received = client.sample(STATE, BATCH, generator=stream(0))
    predicted = client.predict(received, STATE, BATCH).values
    loud = Outpost(noisy=20).loud(CLEAN.values)
    for k, u in received.values.items():
        exact = (u != 0) & ~loud[k]
        torch.testing.assert_close(predicted[k][exact], u[exact])
        quiet = (u == 0) & ~loud[k]
        assert float(predicted[k][quiet].abs().sum()) == 0  # below the smallest kept


def test_pruning_that_leaves_something_else_is_doubted() -> None:
    rule = Outpost()
    sent = rule(FedSGD()).sample(STATE, BATCH, generator=stream(0))
    assert rule.doubt(CLEAN, sent) is None
    half = Update(
        {k: v * (v.abs() > v.abs().median()) for k, v in CLEAN.values.items()}, "gradient"
    )
    contradiction = rule.doubt(CLEAN, half)
    assert contradiction is not None
    assert "claims to prune 80%" in contradiction[0]


@pytest.mark.parametrize("field", ["scale", "prune", "noisy", "decay"])
def test_a_bad_setting_says_what_was_expected(field: str) -> None:
    with pytest.raises(InvalidInput, match=f"{field}=-1"):
        Outpost(**{field: -1.0})
