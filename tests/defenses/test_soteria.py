"""Soteria against brute force: its mask, its muted prediction, and what muting recovers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.recipes.dlg import DLG
from gradleak.data import load
from gradleak.defenses import GaussianNoise, Soteria, TopK, build, norm, undefended
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models import build as build_model
from gradleak.run.preflight import preflight
from gradleak.threat import ThreatModel
from gradleak.types import Batch, Fact, Mechanism, ModelState, Update
from tests.laws.small import OneWeight, TwoTwins, batch_of, state_of, stream

HEAD = "head.weight"


def features_of(state: ModelState, x: Tensor) -> Tensor:
    """What TwoTwins' head reads, spelled out."""
    p = state.params
    h = torch.tanh(x.flatten(1) @ p["first.weight"].T + p["first.bias"])
    h = torch.tanh(h @ p["twin.weight"].T + p["twin.bias"])
    return torch.tanh(h @ p["other_twin.weight"].T + p["other_twin.bias"])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rate", [1.0, 30.0, 50.0, 80.0])
def test_the_mask_is_that_of_feature_by_feature_differentiation(rate: float, size: int) -> None:
    state, batch = state_of(TwoTwins), batch_of(size)
    scores = np.zeros(4)
    for i in range(size):
        for f in range(4):
            x = batch.inputs[i : i + 1].clone().requires_grad_()
            r = features_of(state, x)[0, f]
            slope = torch.autograd.grad(r, x)[0]
            scores[f] += float(slope.norm() / (r.detach().abs() + 0.1))
    expected = torch.tensor(~(scores < np.percentile(scores, rate)))
    assert torch.equal(Soteria(rate).kept(state, batch.inputs), expected)
    clean = FedSGD().mean(state, batch).values
    sent = dict(Soteria(rate)(FedSGD()).mean(state, batch).values)
    assert torch.equal(sent.pop(HEAD), clean[HEAD] * expected)
    assert all(torch.equal(v, clean[k]) for k, v in sent.items())


@pytest.mark.parametrize("rate", [10.0, 50.0, 80.0])
def test_the_share_of_masked_features_is_the_prune_rate(rate: float) -> None:
    digits = load("digits")
    state = ModelState.of(build_model("lenet-tiny", digits.spec, seed=0))
    kept = Soteria(rate).kept(state, digits.batch([0]).inputs)
    assert int((~kept).sum()) == pytest.approx(rate / 100 * len(kept), abs=1)


def test_another_layer_can_be_defended() -> None:
    state, batch = state_of(TwoTwins), batch_of(1)
    sent = Soteria(50, layer="twin")(FedSGD()).mean(state, batch).values
    clean = FedSGD().mean(state, batch).values
    assert [k for k in sent if not torch.equal(sent[k], clean[k])] == ["twin.weight"]


def test_silent_columns_are_muted_and_the_rest_is_compared() -> None:
    state, batch, other = state_of(TwoTwins), batch_of(1), batch_of(1, seed=1)
    mechanism = Soteria(50)(FedSGD())
    received = mechanism.mean(state, batch)
    wrong = mechanism.predict(received, state, other).values
    silent = ~Soteria(50).kept(state, batch.inputs)
    assert int(silent.sum()) == 2
    assert torch.equal((wrong[HEAD] == received.values[HEAD]).all(0), silent)
    assert all(not torch.equal(v, received.values[k]) for k, v in wrong.items() if k != HEAD)


def test_noise_over_the_zeros_mutes_the_whole_layer() -> None:
    state, batch, other = state_of(TwoTwins), batch_of(1), batch_of(1, seed=1)
    mechanism = GaussianNoise(0.1)(Soteria(50)(FedSGD()))
    received = mechanism.sample(state, batch, generator=stream(0))
    wrong = mechanism.predict(received, state, other).values
    assert torch.equal(wrong[HEAD], received.values[HEAD])


def test_local_training_and_noise_compose() -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    delta = Soteria(50)(FedAvg(steps=2)).mean(state, batch)
    assert delta.kind == "delta"
    assert int((delta.values[HEAD] == 0).all(0).sum()) == 2
    noisy = GaussianNoise(0.1)(Soteria(50)(FedSGD()))
    update = noisy.sample(state, batch, generator=stream(0))
    centre = noisy.mean(state, batch).values
    gap = {**centre, HEAD: update.values[HEAD]}
    value = noisy.log_prob(Update(gap, "gradient"), state, batch)
    residual = (update.values[HEAD] - centre[HEAD]) / 0.1
    count = sum(v.numel() for v in gap.values())
    expected = -(residual**2).sum() / 2 - count * np.log(0.1 * np.sqrt(2 * np.pi))
    torch.testing.assert_close(value, expected)


def test_a_network_without_the_layer_is_refused_in_one_line() -> None:
    with pytest.raises(NotApplicable, match="linear layer"):
        Soteria()(FedSGD()).mean(state_of(OneWeight), batch_of(1, classes=2))
    with pytest.raises(NotApplicable, match="'hed'"):
        Soteria(layer="hed")(FedSGD()).mean(state_of(TwoTwins), batch_of(1))
    with pytest.raises(InvalidInput, match="percentage"):
        build("soteria:prune_rate=100")


@dataclass(frozen=True)
class Idle(Soteria):
    """A fault: masks a single feature whatever its rate."""

    def kept(self, state: ModelState, inputs: Tensor, *, mode: str = "eval") -> Tensor:
        kept = super().kept(state, inputs, mode=mode)
        return torch.arange(len(kept)) > 0


@dataclass(frozen=True)
class Greedy(Soteria):
    """A fault: masks everything."""

    def kept(self, state: ModelState, inputs: Tensor, *, mode: str = "eval") -> Tensor:
        return torch.zeros_like(super().kept(state, inputs, mode=mode))


def doubts(rule: Soteria) -> list[str]:
    digits = load("digits")
    state = ModelState.of(build_model("lenet-tiny", digits.spec, seed=0))
    scenario = gl.Scenario(digits, state, rule(FedSGD()), indices=torch.tensor([0]))
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return [d.text for d in preflight(scenario, seen, truth, generator=stream(0))]


def test_what_it_claims_is_checked() -> None:
    assert doubts(Soteria(50)) == []
    assert "masks" in doubts(Idle(50))[0]
    assert "changes" in doubts(Greedy(50))[0]
    state, batch = state_of(TwoTwins), batch_of(1)
    before = FedSGD().mean(state, batch)
    everywhere = TopK(0.5)(FedSGD()).mean(state, batch)
    assert Soteria(50).doubt(before, everywhere) is not None


class Dead(nn.Module):
    """Four features of which three never fire: nothing is left to mask at 50 %."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 4), nn.Linear(4, 3)
        with torch.no_grad():
            self.first.bias[:3] = -100.0
            self.first.bias[3] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.first(x.flatten(1))))
        return logits


def test_just_outside_its_range_it_does_nothing() -> None:
    """More features are silent than are masked: the percentile is zero and nothing is below."""
    state, batch = state_of(Dead), batch_of(1)
    clean, sent = (m.mean(state, batch).values for m in (FedSGD(), Soteria(50)(FedSGD())))
    assert all(torch.equal(clean[k], sent[k]) for k in clean)


def psnr(believed: Mechanism, seen: gl.Observation, truth: Batch) -> float:
    claim = DLG(steps=60, restarts=1)(replace(seen, mechanism=believed), generator=stream(1))
    return float(gl.metrics.psnr_db(claim.batch, truth))


def test_muting_undoes_it_and_believing_in_nothing_does_not() -> None:
    """One digit, DLG: a random guess scores about 8 dB."""
    digits = load("digits")
    state = ModelState.of(build_model("lenet-tiny", digits.spec, seed=0)).to(torch.float64)
    threat = ThreatModel(knows=frozenset({Fact.MECHANISM, Fact.BATCH_SIZE}))
    mechanism = Soteria(50)(FedSGD())
    scenario = gl.Scenario(digits, state, mechanism, threat, indices=torch.tensor([1]))
    seen, truth = gl.simulate(scenario, generator=stream(0))
    assert norm(seen.update) > 0
    assert psnr(mechanism, seen, truth.batch) > 60
    assert psnr(undefended(mechanism), seen, truth.batch) < 20
