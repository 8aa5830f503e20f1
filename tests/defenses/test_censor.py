"""CENSOR: what its update keeps of the gradient, and what its choice among trials adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

import gradleak as gl
from gradleak.defenses import Censor, Sent, advanced, gathered
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Exchange, Update
from tests.laws.small import SPEC, TwoTwins, batch_of, state_of, stream

ALPHA = 1e-6
STATE, BATCH = state_of(TwoTwins), batch_of(2)
CLEAN = FedSGD().mean(STATE, BATCH)


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


@pytest.mark.parametrize("core", [FedSGD(), FedAvg(steps=2, learning_rate=0.1)])
def test_every_tensor_keeps_its_norm_and_nothing_of_its_direction(core: FedSGD | FedAvg) -> None:
    clean = core.mean(STATE, BATCH).values
    sent = Censor(trials=3)(core).sample(STATE, BATCH, generator=stream(0)).values
    for k, u in clean.items():
        assert float(sent[k].norm()) == pytest.approx(float(u.norm()), rel=1e-12)
        assert abs(float((sent[k] * u).sum() / u.norm() ** 2)) < 1e-12


def cosines(scale: float, projection: str) -> Tensor:
    """Of every tensor of 60 candidates with a gradient of norm `scale`."""
    rule = Censor(projection=projection)  # type: ignore[arg-type]
    values = {k: scale * v / v.norm() for k, v in CLEAN.values.items()}
    found, generator = [], stream(2)
    for _ in range(60):
        turned = rule.turned(values, generator)
        found.append(torch.stack([(turned[k] * v).sum() / scale**2 for k, v in values.items()]))
    return torch.stack(found)


def test_the_published_projection_is_orthogonal_for_norm_one_alone() -> None:
    """Long gradients leave along themselves, up to a sign: mean |cos| of 60 candidates."""
    assert float(cosines(1.0, "published").abs().max()) < 1e-12
    assert float(cosines(0.1, "published").abs().mean()) > 0.1
    assert float(cosines(100.0, "published").abs().mean()) > 0.9
    for scale in (0.1, 1.0, 100.0):
        assert float(cosines(scale, "exact").abs().max()) < 1e-12


def descent(projection: str, *, trials: int) -> Tensor:
    """⟨sent, gradient⟩ / ‖gradient‖² of 30 clients with a long gradient."""
    steep = Update({k: 100 * v for k, v in CLEAN.values.items()}, "gradient")
    client = Censor(trials=trials, projection=projection)(Sent(steep))  # type: ignore[arg-type]
    clean, generator = flat(steep), stream(3)
    sent = [flat(client.sample(STATE, BATCH, generator=generator)) for _ in range(30)]
    return torch.stack([(s * clean).sum() / clean.norm() ** 2 for s in sent])


def test_choosing_by_loss_gives_the_published_update_the_sign_of_descent() -> None:
    """n = 30, t-test of mean 0 at ALPHA: found with 8 trials, not with one, never if exact."""
    assert stats.ttest_1samp(descent("published", trials=8), 0).pvalue < ALPHA
    assert float(descent("published", trials=8).mean()) > 0.5
    assert stats.ttest_1samp(descent("published", trials=1), 0).pvalue > ALPHA
    assert float(descent("exact", trials=8).abs().max()) < 1e-12


def test_what_is_predicted_misses_by_norms_and_by_what_is_not_orthogonal() -> None:
    client, claim = Censor()(FedSGD()), batch_of(2, seed=9)
    received = client.sample(STATE, BATCH, generator=stream(0))
    for k, v in client.predict(received, STATE, BATCH).values.items():
        torch.testing.assert_close(v, received.values[k])
    predicted = client.predict(received, STATE, claim).values
    for k, c in FedSGD().mean(STATE, claim).values.items():
        u = received.values[k]
        wanted = (c.norm() - u.norm()) ** 2 + ((c * u).sum() / u.norm()) ** 2
        torch.testing.assert_close((predicted[k] - u).square().sum(), wanted)


def test_norms_tell_the_batch_from_others() -> None:
    """Of 40 batches the true one fits best; by chance 1 in 40."""
    client = Censor()(FedSGD())
    received = client.sample(STATE, BATCH, generator=stream(0))
    misses = []
    for claim in (BATCH, *(batch_of(2, seed=s) for s in range(50, 89))):
        predicted = client.predict(received, STATE, claim).values
        misses.append(sum(float((predicted[k] - u).norm()) for k, u in received.values.items()))
    assert misses[0] < min(misses[1:])


def test_rounds_after_the_protected_ones_are_plain_and_picked() -> None:
    rule = Censor(trials=2, rounds=1)
    client = rule(FedSGD())
    first, memory = advanced(client, STATE, BATCH, {}, generator=stream(0))
    second, _ = advanced(client, STATE, BATCH, memory, generator=stream(0))
    assert torch.equal(flat(second), flat(CLEAN))
    seen = gl.observe(
        STATE, update=first.values, data=SPEC, batch_size=2, mechanism=client, labels=BATCH.labels
    )
    both = replace(seen, exchanges=(Exchange(STATE, first), Exchange(STATE, second)))
    assert gathered(both).mechanism == FedSGD()
    assert gathered(both).update is second
    assert gathered(replace(both, mechanism=Censor()(FedSGD()))).mechanism == Censor()(FedSGD())


def test_an_update_that_is_not_turned_is_doubted() -> None:
    rule = Censor()
    sent = rule(FedSGD()).sample(STATE, BATCH, generator=stream(0))
    assert rule.doubt(CLEAN, sent) is None
    for fault, clue in ((CLEAN.values, "orthogonal"), (_doubled(sent), "keep norm")):
        contradiction = rule.doubt(CLEAN, Update(fault, "gradient"))
        assert contradiction is not None
        assert clue in contradiction[0]


def _doubled(update: Update) -> dict[str, Tensor]:
    return {k: 2 * v for k, v in update.values.items()}


@pytest.mark.parametrize("settings", [{"trials": 0}, {"rounds": 0}, {"projection": "no"}])
def test_a_bad_setting_says_what_was_expected(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        Censor(**settings)  # type: ignore[arg-type]
