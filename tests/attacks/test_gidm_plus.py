"""Image, noise and time of a diffusion model's client, all private."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import priors
from gradleak.attacks.parts.distances import relative_squares, squared_l2
from gradleak.attacks.parts.lifting import Lifted, lift
from gradleak.attacks.recipes.gidm_plus import GIDMPlus, WithDraws, denoised
from gradleak.denoising import Schedule, UNet
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import Denoising, DenoisingAvg
from gradleak.types import Fact, Mechanism, ModelState, Observation
from tests.laws.small import stream

DIGITS = gl.data.load("digits")


@cache
def small() -> ModelState:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelState.of(UNet(1, width=16, multipliers=(1, 2)))


def played(mechanism: Mechanism, *facts: Fact, size: int = 1) -> tuple[Observation, gl.Batch]:
    threat = gl.ThreatModel(gl.ThreatModel().knows | set(facts))
    scenario = gl.Scenario(DIGITS, small(), mechanism, threat=threat, batch_size=size)
    seen, truth = gl.simulate(scenario, generator=stream(3))
    return seen, truth.batch


def test_a_digit_is_recovered_from_private_noise_and_time() -> None:
    """The middle of the box gives 10 dB or less; a start in another basin would as well."""
    seen, truth = played(Denoising(timestep=300))
    claim = GIDMPlus(steps=60, candidates=4)(seen, generator=stream(0))
    assert gl.metrics.psnr_db(claim.batch, truth) > 40
    assert claim.objective < 1e-6


def test_the_objective_vanishes_at_the_truth_of_every_form_of_time() -> None:
    for size in (1, 2):
        threat = gl.ThreatModel()
        scenario = gl.Scenario(
            DIGITS, small().to(torch.float64), Denoising(), threat=threat, batch_size=size
        )
        seen, truth = gl.simulate(scenario, generator=stream(5))
        assert truth.draws is not None
        assert truth.draws.times is not None
        assert truth.draws.noise is not None
        order = truth.draws.times[:, 0].argsort()
        known = {
            "inputs": truth.batch.inputs[order][None].double(),
            "noise": truth.draws.noise[order][None].double(),
        }
        for times in ("closed-form", "relaxed"):
            attack = GIDMPlus(times=times, restarts=1)
            objective = attack.compose([seen])
            found = attack.starts(objective, [stream(0)])
            if times == "relaxed":
                logits = torch.full((1, size, 1000), -1e3, dtype=torch.float64)
                known["logits"] = logits.scatter(2, truth.draws.times[order][None], 0.0)
            else:
                known["times"] = found["times"]
            rows = {k: v for k, v in known.items() if k in found}
            assert float(objective.values(rows, [0])) < 1e-18
            assert float(objective.values(found, [0])) > 1e-3


def test_relaxed_times_have_a_gradient() -> None:
    seen, _ = played(Denoising(timestep=300))
    attack = GIDMPlus(times="relaxed", restarts=1)
    objective = attack.compose([seen])
    start = attack.starts(objective, [stream(0)])
    _, gradients = objective.value_and_gradient(start, [0])
    assert gradients["logits"].abs().max() > 0
    claim = GIDMPlus(times="relaxed", order="alternate", steps=6, restarts=2)(
        seen, generator=stream(0)
    )
    assert claim.batch.inputs.shape == (1, 1, 8, 8)


def test_granted_times_and_noise_are_used_as_they_are() -> None:
    seen, _ = played(Denoising(), Fact.TIMESTEPS, Fact.NOISE)
    unknown = GIDMPlus().compose([seen]).unknown
    assert isinstance(unknown, WithDraws)
    start = unknown.start(stream(0), restarts=1)
    assert set(start) == {"inputs", "times"}
    assert int(start["times"]) == int(seen.mechanism.draws.times)  # type: ignore[attr-defined]


def test_what_it_is_not_for_is_said() -> None:
    with pytest.raises(NotApplicable, match="granted timesteps"):
        GIDMPlus()(played(DenoisingAvg(epochs=2, minibatch_size=1))[0], generator=stream(0))
    with pytest.raises(InvalidInput, match="closed-form or relaxed"):
        GIDMPlus(times="argmax")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="joint or alternate"):
        GIDMPlus(order="none")  # type: ignore[arg-type]


class OnePicture:
    """The prior of somebody who knows the picture: ε̂ = (x_t − √ᾱ μ) / √(1 − ᾱ)."""

    schedule = Schedule()

    def __init__(self, picture: Tensor) -> None:
        self.picture = self.scaled(picture)

    def output(self, noised: Tensor, times: Tensor) -> Tensor:
        alpha = self.schedule.alpha(times, noised)
        return (noised - alpha.sqrt() * self.picture) / (1 - alpha).sqrt()

    def scaled(self, inputs: Tensor) -> Tensor:
        return inputs * 2 - 1

    def unscaled(self, clean: Tensor) -> Tensor:
        return (clean + 1) / 2


def test_the_prior_takes_noise_from_an_estimate_and_leaves_a_clean_one() -> None:
    picture = DIGITS.batch(torch.tensor([7])).inputs
    prior: Any = OnePicture(picture)
    unknown = GIDMPlus().compose([played(Denoising())[0]]).unknown
    noisy = picture + 0.2 * torch.randn(picture.shape, generator=stream(1))
    found = denoised(prior, noisy[None], unknown)
    assert found is not None
    assert torch.allclose(found[0], picture, atol=1e-4)
    assert denoised(prior, picture[None], unknown) is None


def test_a_granted_prior_has_its_turns() -> None:
    public = DIGITS.batch(torch.arange(100))
    prior = priors.fit("diffusion:steps=2,width=8", public, DIGITS.spec, seed=0)
    threat = gl.ThreatModel(gl.ThreatModel().knows | {Fact.PRIOR})
    scenario = gl.Scenario(DIGITS, small(), Denoising(timestep=700), threat=threat, prior=prior)
    seen, _ = gl.simulate(scenario, generator=stream(3))
    with_prior = GIDMPlus(steps=9, candidates=0)(seen, generator=stream(0))
    without = GIDMPlus(steps=9, candidates=0, denoised=0)(seen, generator=stream(0))
    assert with_prior.batch.inputs.isfinite().all()
    assert not torch.equal(with_prior.batch.inputs, without.batch.inputs)


def test_shares_of_one_time_are_that_time() -> None:
    schedule, like = Schedule(), torch.zeros((2, 1, 2, 2), dtype=torch.float64)
    times = torch.tensor([3, 700])
    shares = torch.nn.functional.one_hot(times, 1000).double()
    assert torch.equal(schedule.alpha(shares, like), schedule.alpha(times, like))


def test_weighted_squares_are_one_at_zero_and_plain_without_balance() -> None:
    received = {"a": torch.randn(5, generator=stream(0)), "b": torch.randn(9, generator=stream(1))}
    nothing = {k: torch.zeros_like(v) for k, v in received.items()}
    for balance in (0.0, 0.5, 1.0):
        value = relative_squares(nothing, received, balance=balance)
        assert value == pytest.approx(1.0, rel=1e-5)
    other = {k: v + 1 for k, v in received.items()}
    whole = sum(v.square().sum() for v in received.values())
    expected = float(squared_l2(other, received) / whole)
    assert float(relative_squares(other, received)) == pytest.approx(expected, rel=1e-5)


def test_relaxed_times_run_one_by_one_whoever_asks() -> None:
    seen, _ = played(Denoising(timestep=300))
    assert GIDMPlus(times="relaxed", restarts=2).settle_engine([seen]) == "loop"


def test_stuck_candidates_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one attempt is not stuck, or there are no more; the best of all goes on."""
    seen, _ = played(Denoising(timestep=30))
    made: list[Lifted] = []

    def lifted(values: list[float], *given: Any, **named: Any) -> Lifted:
        value = values[len(made)]
        made.append(replace(lift(*given, **named), value=value, stuck=value > 1))
        return made[-1]

    for values, count in (([0.5], 1), ([3.0, 0.5], 2), ([4.0, 2.0, 3.0], 3)):
        made.clear()
        monkeypatch.setattr("gradleak.attacks.recipes.gidm_plus.lift", partial(lifted, values))
        attack = GIDMPlus(steps=2, models=0, candidates=2, lifting=2, attempts=3)
        claim = attack(seen, generator=stream(1))
        assert len(made) == count
        assert not any(torch.equal(a.images, b.images) for a, b in pairwise(made))
        assert claim.evaluations > sum(m.evaluations for m in made)
