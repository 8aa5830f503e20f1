"""Deep gradient compression against its algorithm spelled out, and what its rounds give away."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import gradleak as gl
from gradleak.attacks import DLG
from gradleak.defenses import DGC, Memory, TopK, advanced, gathered
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD, Vertical
from gradleak.types import Batch, Exchange, Mechanism, Update
from tests.laws.small import SPEC, TwoTwins, batch_of, state_of, stream

STATE = state_of(TwoTwins)
Arrays = dict[str, np.ndarray]


def played(rule: DGC, batches: list[Batch]) -> tuple[list[Update], Memory]:
    sent, memory = [], dict[str, torch.Tensor]()
    for batch in batches:
        update, memory = advanced(rule(FedSGD()), STATE, batch, memory, generator=stream(0))
        sent.append(update)
    return sent, memory


def spelled_out(rule: DGC, gradients: list[Arrays]) -> list[Arrays]:
    """Lin et al., Alg. 4, a coordinate at a time."""
    u = {k: np.zeros(v.size) for k, v in gradients[0].items()}
    v = {k: np.zeros(g.size) for k, g in gradients[0].items()}
    rounds = []
    for number, gradient in enumerate(gradients):
        length = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        scale = min(1.0, (rule.norm or math.inf) / length)
        share = rule.fraction ** min(1.0, (number + 1) / (rule.warm_up + 1))
        sent = {}
        for k, g in gradient.items():
            for j in range(g.size):
                u[k][j] = rule.momentum * u[k][j] + scale * g.flat[j]
                v[k][j] += u[k][j]
            least = sorted(abs(v[k]))[-math.ceil(share * g.size)]
            sent[k] = np.zeros(g.size)
            for j in range(g.size):
                if abs(v[k][j]) >= least:
                    sent[k][j], v[k][j], u[k][j] = v[k][j], 0.0, 0.0
            sent[k] = sent[k].reshape(g.shape)
        rounds.append(sent)
    return rounds


@pytest.mark.parametrize(
    "rule",
    [
        DGC(0.05, momentum=0.9, warm_up=2, norm=0.3),
        DGC(0.1, momentum=0.0, warm_up=0),
        DGC(0.2, momentum=0.5, warm_up=8),
    ],
)
def test_rounds_are_those_of_the_published_algorithm(rule: DGC) -> None:
    batches = [batch_of(2, seed=s) for s in range(7)]
    sent, _ = played(rule, batches)
    gradients = [{k: v.numpy() for k, v in FedSGD().mean(STATE, b).values.items()} for b in batches]
    for found, wanted in zip(sent, spelled_out(rule, gradients), strict=True):
        for k, w in wanted.items():
            np.testing.assert_allclose(found.values[k].numpy(), w, rtol=1e-12, atol=1e-16)
    fault = spelled_out(replace(rule, momentum=rule.momentum + 0.01), gradients)
    assert any((fault[-1][k] != v.numpy()).any() for k, v in sent[-1].values.items())


def lost(rule: DGC) -> float:
    """Σ gradients − Σ sent − residual, relative."""
    batches = [batch_of(2, seed=s) for s in range(6)]
    sent, memory = played(rule, batches)
    gaps, sizes = [], []
    for k in STATE.params:
        whole = torch.stack([FedSGD().mean(STATE, b).values[k] for b in batches]).sum(0)
        there = torch.stack([u.values[k] for u in sent]).sum(0) + memory[f"residual/{k}"]
        gaps.append(float((whole - there).norm()))
        sizes.append(float(whole.norm()))
    return max(gaps) / max(sizes)


def test_without_momentum_nothing_is_lost() -> None:
    assert lost(DGC(0.05, momentum=0.0, warm_up=2)) < 1e-14
    assert lost(DGC(0.05, momentum=0.3, warm_up=2)) > 0.1


def test_the_first_round_is_top_k_and_the_warm_up_is_the_published_one() -> None:
    first = DGC(0.1, warm_up=0, scope="global")(FedSGD()).mean(STATE, batch_of(2))
    wanted = TopK(0.1)(FedSGD()).mean(STATE, batch_of(2))
    assert all(torch.equal(first.values[k], v) for k, v in wanted.values.items())
    published = [0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001]
    for number, share in enumerate(published):
        assert DGC().top(number).fraction == pytest.approx(share, rel=0.02)


def seen_over(rule: DGC, rounds: int, *, core: Mechanism | None = None) -> gl.Observation:
    batch = batch_of(1)
    updates, _ = played(rule, [batch] * rounds)
    seen = gl.observe(
        STATE,
        update=updates[0].values,
        data=SPEC,
        batch_size=1,
        mechanism=rule(core or FedSGD()),
        labels=batch.labels,
    )
    return replace(seen, exchanges=tuple(Exchange(STATE, u) for u in updates))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounds_of_one_batch_divide_out_to_its_gradient(momentum: float) -> None:
    rule = DGC(0.05, momentum=momentum, warm_up=0)
    clean = FedSGD().mean(STATE, batch_of(1)).values
    shares = []
    for rounds in (1, 4, 12):
        found = gathered(seen_over(rule, rounds)).update.values
        shares.append(sum(int(v.count_nonzero()) for v in found.values()))
        for k, v in found.items():
            torch.testing.assert_close(v[v != 0], clean[k][v != 0], rtol=1e-12, atol=0)
    assert shares[0] < shares[1] < shares[2]


def test_a_search_takes_all_rounds_into_account() -> None:
    seen = seen_over(DGC(0.05, warm_up=0), 8)
    latest = replace(seen, exchanges=seen.exchanges[-1:])
    assert DLG().fit(seen)(batch_of(1)) < 1e-20
    assert DLG().fit(latest)(batch_of(1)) > 1e-6  # the value of several rounds, taken for one


def test_rounds_of_other_batches_are_left_alone() -> None:
    rule = DGC(0.05, warm_up=0)
    seen = seen_over(rule, 2, core=Vertical(rounds=2, round_size=1))
    assert gathered(seen) is seen
    plain = replace(seen, mechanism=FedSGD())
    assert gathered(plain) is plain


@pytest.mark.parametrize(
    ("settings", "clue"),
    [
        ({"momentum": 1.0}, "[0, 1)"),
        ({"warm_up": -1}, "rounds"),
        ({"fraction": 0.0}, "(0, 1]"),
        ({"norm": 0.0}, "positive"),
    ],
)
def test_a_bad_setting_says_what_was_expected(settings: dict[str, float], clue: str) -> None:
    with pytest.raises(InvalidInput) as error:
        DGC(**settings)  # type: ignore[arg-type]
    assert clue in str(error.value)
