"""Candidates that explain an update together."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import gradleak as gl
from gradleak.attacks.parts.distances import relative_squares
from gradleak.attacks.parts.lifting import Lifted, _strongest, lift, liftable
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.recipes.gidm import GIDM
from gradleak.defenses import rebased
from gradleak.mechanisms import Denoising, DenoisingAvg, FedSGD
from gradleak.mechanisms.denoising import carry
from gradleak.metrics import psnr_db
from gradleak.types import Batch, Fact, Mechanism, Observation
from tests.attacks.test_gidm_plus import DIGITS, played, small
from tests.laws.small import stream


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_freed_client_has_the_gradient_of_its_residual(prediction: str) -> None:
    """Against the squared error itself, and linear: twice the residual is twice the update."""
    state = small().to(torch.float64)
    client = Denoising(prediction=prediction)  # type: ignore[arg-type]
    batch = DIGITS.batch(torch.tensor([1, 5]))
    batch = Batch(batch.inputs.double(), batch.labels)
    draws = client.draw(batch, generator=stream(0))
    carried, carrying = client.carrying(batch, draws)
    wanted = carried.mean(state, carrying).values
    assert draws.times is not None
    assert draws.noise is not None
    times, noise = draws.times[:, 0], draws.noise[:, 0]
    schedule, clean = client.noise_schedule, batch.inputs * 2 - 1
    noised = schedule.noised(clean, noise, times)
    network = state.model.double()
    network.load_state_dict({**state.params, **state.buffers})
    residual = network(noised, times).detach() - schedule.target(clean, noise, times)
    freed = rebased(client, carried=True, freed=True)
    for factor in (1.0, 2.0):
        given = carry(Batch(noised, batch.labels), type(draws)(draws.times, residual[:, None]))
        given.inputs[:, 1] *= factor
        found = freed.mean(state, given).values
        for name, value in wanted.items():
            assert torch.allclose(found[name], factor * value, rtol=1e-9, atol=1e-14)


def lifted(seen: Observation, times: list[int], *, each: int = 4, steps: int = 150) -> Lifted:
    images = torch.rand((len(times), each, 1, 8, 8), generator=stream(2))
    return lift(
        seen,
        images,
        torch.tensor(times),
        noise=None,
        generator=stream(0),
        steps=steps,
        alone=20,
        balance=0.5,
    )


@pytest.mark.parametrize("client", [Denoising(timestep=300), DenoisingAvg(timestep=300)])
def test_one_of_many_candidates_is_the_image(client: Mechanism) -> None:
    seen, truth = played(client)
    found = lifted(seen, [300])
    assert found.value < 3e-3
    assert psnr_db(Batch(found.images.clamp(0, 1), truth.labels), truth) > 20


def test_a_wrong_time_is_not_explained() -> None:
    """What the search reports of itself tells success from failure."""
    seen, _ = played(Denoising(timestep=300))
    assert lifted(seen, [900], each=2, steps=50).value > 3e-3


def test_noise_that_is_known_is_kept() -> None:
    seen, truth = played(Denoising(timestep=100), Fact.TIMESTEPS, Fact.NOISE)
    known = seen.mechanism.draws  # type: ignore[attr-defined]
    found = lift(
        seen,
        torch.rand((1, 4, 1, 8, 8), generator=stream(2)),
        known.times[:, 0],
        noise=known.noise[:, 0],
        generator=stream(0),
        steps=150,
        alone=20,
        balance=0.5,
    )
    assert torch.allclose(found.noise, known.noise[:, 0].float())
    assert psnr_db(Batch(found.images.clamp(0, 1), truth.labels), truth) > 20


def test_the_strongest_of_every_group_and_then_the_rest() -> None:
    far = torch.eye(6)
    weights = torch.tensor([1.0, 5.0, 4.0, 3.0, 2.0, 0.1])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert _strongest(weights, far, groups, 2).tolist() == [1, 3]
    assert _strongest(weights, far, groups, 3).tolist() == [1, 2, 3]
    twin = far.clone()
    twin[2] = twin[1] * 1.01
    assert _strongest(weights, twin, groups, 3).tolist() == [1, 3, 4], "a twin waits"
    assert len(_strongest(weights, twin, groups, 6)) == 6


def test_clients_that_are_not_one_squared_error() -> None:
    assert liftable(played(Denoising())[0])
    assert liftable(played(gl.defenses.GaussianNoise(std=0.1)(Denoising()))[0])
    assert liftable(played(DenoisingAvg())[0])
    assert not liftable(played(DenoisingAvg(epochs=2, minibatch_size=1))[0])
    scenario = gl.Scenario(DIGITS, gl.models.build("mlp", DIGITS.spec, seed=0), FedSGD())
    assert not liftable(gl.simulate(scenario, generator=stream(0))[0])


def test_the_published_constants_know_nothing_of_it() -> None:
    assert GIDM.published().lifting == 0


def squares(seen: Observation) -> float:
    return sum(float((v**2).sum()) for v in seen.update.values.values())


def test_noise_that_the_client_adds_is_forgiven() -> None:
    """A claim can be no better than the noise: the search ends there, and does not go on for it."""
    client = Denoising(timestep=300)
    plain, _ = played(client)
    count = sum(v.numel() for v in plain.update.values.values())
    std = (0.05 * squares(plain) / count) ** 0.5
    seen, truth = played(gl.defenses.GaussianNoise(std=std)(client))
    told, _ = played(seen.mechanism, Fact.TIMESTEPS, Fact.NOISE)
    fit = Matching([told], relative_squares, dtype=torch.float32)
    left = fit.noise(truth, 0, generator=stream(1))
    assert left == pytest.approx(std**2 * count / squares(told), rel=0.05)
    certain = Matching([plain], relative_squares, dtype=torch.float32)
    assert certain.noise(truth, 0, generator=stream(1)) == 0
    found = lifted(seen, [300], steps=400)
    weighted = Matching([told], partial(relative_squares, balance=0.5), dtype=torch.float32)
    left = weighted.noise(truth, 0, generator=stream(1))
    assert 0.8 * left < found.value < 1.2 * left
    assert found.evaluations < 300
    assert psnr_db(Batch(found.images.clamp(0, 1), truth.labels), truth) > 15
