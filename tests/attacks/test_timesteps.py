"""Times in closed form: exact without noise, worse with it, gone once nothing shows them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak import defenses
from gradleak.attacks.closed_form.timesteps import recovered_times, time_inputs
from gradleak.denoising import UNet
from gradleak.errors import NotApplicable
from gradleak.mechanisms import Denoising, DenoisingAvg
from gradleak.models import build
from gradleak.types import Exchange, Mechanism, ModelState, Observation
from tests.laws.small import stream

DIGITS = gl.data.load("digits")


@cache
def small() -> ModelState:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelState.of(UNet(1, width=8, multipliers=(1, 2)))


TABLE = torch.randn((1000, 10), generator=stream(3))


class Own(nn.Module):
    """Somebody's own network: a table of times, an image's layer before the time's."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.time = nn.Linear(64, 12), nn.Linear(10, 12)
        self.head = nn.Linear(12, 64)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h = self.image(x.flatten(1)) + self.time(TABLE[times.long()])
        found: Tensor = self.head(torch.tanh(h)).view_as(x)
        return found


def drawn(
    seed: int, size: int, state: ModelState | None = None, mechanism: Mechanism | None = None
) -> tuple[Observation, set[int]]:
    scenario = gl.Scenario(DIGITS, state or small(), mechanism or Denoising(), batch_size=size)
    seen, truth = gl.simulate(scenario, generator=stream(seed))
    assert truth.draws is not None
    assert truth.draws.times is not None
    return seen, set(truth.draws.times.flatten().tolist())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layers", ["first", "all"])
def test_times_are_exact_without_noise(size: int, layers: str) -> None:
    """Chance: 1 in 1000 a time. The next best set explains less by a factor of a million."""
    for seed in range(3):
        seen, times = drawn(seed, size)
        found = recovered_times(seen, layers=layers)  # type: ignore[arg-type]
        assert set(found.distinct) == times
        assert found.margin > 1e6


def test_they_are_on_a_diffusers_network_and_on_somebodys_own() -> None:
    pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        own = ModelState.of(Own())
    for state in (ModelState.of(build("unet-diffusers", DIGITS.spec, seed=0)), own):
        seen, times = drawn(5, 2, state)
        assert set(recovered_times(seen).distinct) == times
    assert list(time_inputs(own, DIGITS.spec.shape, 1000)) == ["time"]


def test_equal_times_are_found_once_and_shared() -> None:
    found = recovered_times(drawn(0, 3, mechanism=Denoising(timestep=123))[0])
    assert found.distinct == (123,)
    assert found.assigned(3) == [(123, 123, 123)]
    assert replace(found, distinct=(1, 2)).assigned(3) == [(1, 1, 2), (1, 2, 2)]


def test_local_steps_leave_the_first_layer_exact() -> None:
    """Two visits of either image: four times in one difference of weights."""
    client = DenoisingAvg(epochs=2, minibatch_size=1, learning_rate=0.1)
    seen, times = drawn(2, 2, small().to(torch.float64), client)
    assert set(recovered_times(seen).distinct) == times


def test_too_many_draws_are_refused() -> None:
    with pytest.raises(NotApplicable, match="more than the time's layers tell apart"):
        recovered_times(drawn(0, 8)[0], layers="first")  # 8 waves cannot tell 8 times
    seen, times = drawn(0, 8)
    assert set(recovered_times(seen).distinct) == times  # the wider layers can


def test_the_first_layer_withheld_is_not_enough_and_all_of_them_are() -> None:
    names = list(time_inputs(small(), DIGITS.spec.shape, 1000))
    assert names[0] == "time_embedding.linear_1"
    first = defenses.PartialSharing(withheld=names[0])(Denoising())
    seen, times = drawn(1, 2, mechanism=first)
    assert set(recovered_times(seen).distinct) == times
    with pytest.raises(NotApplicable, match="no gradient of a layer"):
        recovered_times(seen, layers="first")
    every = defenses.PartialSharing(withheld="/".join(names))(Denoising())
    with pytest.raises(NotApplicable, match="no gradient of a layer"):
        recovered_times(drawn(1, 2, mechanism=every)[0])


def test_a_frozen_layer_is_none_that_was_sent() -> None:
    state = small()
    names = [
        f"{n}.{p}" for n in time_inputs(state, DIGITS.spec.shape, 1000) for p in ("weight", "bias")
    ]
    fixed = {n: state.params[n] for n in names}
    left = replace(
        state,
        params={k: v for k, v in state.params.items() if k not in fixed},
        buffers={**state.buffers, **fixed},
    )
    with pytest.raises(NotApplicable, match="no gradient of a layer"):
        recovered_times(drawn(1, 1, left)[0])


def test_noise_hides_them_in_the_end() -> None:
    """Share of 12 single times found falls from all to about chance (1 in 1000)."""
    found = []
    for ratio in (0.1, 1e4):
        hits = 0
        for seed in range(12):
            seen, times = drawn(seed, 1)
            values = {
                k: v
                + ratio * v.square().mean().sqrt() * torch.randn(v.shape, generator=stream(seed))
                for k, v in seen.update.values.items()
            }
            noisy = replace(
                seen, exchanges=(Exchange(seen.state, replace(seen.update, values=values)),)
            )
            with suppress(NotApplicable):  # it holds noise only
                hits += set(recovered_times(noisy).distinct) == times
        found.append(hits)
    assert found[0] == 12
    assert found[1] <= 1  # P(≥ 2 of 12 by chance) < 1e-4


def test_a_client_of_a_classifier_has_no_times() -> None:
    state = ModelState.of(build("lenet-tiny", DIGITS.spec, seed=0))
    seen, _ = gl.simulate(gl.Scenario(DIGITS, state, gl.FedSGD()), generator=stream(0))
    with pytest.raises(NotApplicable, match="diffusion model"):
        recovered_times(seen)
