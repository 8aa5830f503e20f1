"""Schedules, samplers and networks of diffusion models, against diffusers where it is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradleak.denoising import SCHEDULES, Schedule, UNet, ddim, denoises, grid, guided_output
from gradleak.errors import InvalidInput
from gradleak.models import build
from gradleak.types import DataSpec
from tests.laws.small import SmallDenoiser, TwoTwins, stream

SHARED = ("linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2")


def images(seed: int, n: int = 3) -> Tensor:
    return torch.randn((n, 1, 4, 4), generator=stream(seed), dtype=torch.float64)


@pytest.mark.parametrize("timesteps", [16, 1000])
@pytest.mark.parametrize("name", SHARED)
def test_schedules_are_those_of_diffusers(name: str, timesteps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=name)
    ours = Schedule(name, timesteps).alphas
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)


def test_the_schedule_of_gidm_starts_where_its_code_does() -> None:
    """ᾱ falls as a sigmoid from −3 to 3: closed form at every step."""
    alphas = Schedule("sigmoid_alphas", 16).alphas
    edge = torch.tensor(-3.0, dtype=torch.float64).sigmoid()
    at = torch.linspace(-3, 3, 17, dtype=torch.float64)[1:].sigmoid()
    wanted = (1 - edge - at) / (1 - 2 * edge)
    torch.testing.assert_close(alphas[:-1], wanted[:-1])
    assert 0 < float(alphas[-1]) < 1e-3
    assert set(SCHEDULES) == {*SHARED, "sigmoid_alphas"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_perfect_output_gives_image_and_noise_back(prediction: str, whole: bool) -> None:
    schedule = Schedule("linear", 100, prediction)  # type: ignore[arg-type]
    times = torch.tensor([0, 40, 99]) if whole else torch.tensor([0.0, 40.25, 98.5]).double()
    clean, noise = images(0), images(1)
    noised, output = schedule.noised(clean, noise, times), schedule.target(clean, noise, times)
    torch.testing.assert_close(schedule.clean(noised, output, times), clean)
    torch.testing.assert_close(schedule.noise(noised, output, times), noise)


def test_noising_and_targets_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    clean, noise, times = images(0), images(1), torch.tensor([0, 500, 999])
    theirs = diffusers.DDPMScheduler(prediction_type="v_prediction")
    ours = Schedule(prediction="v_prediction")
    options = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        ours.noised(clean, noise, times), theirs.add_noise(clean, noise, times), **options
    )
    torch.testing.assert_close(
        ours.target(clean, noise, times), theirs.get_velocity(clean, noise, times), **options
    )


def test_times_between_whole_ones_are_interpolated_and_differentiable() -> None:
    schedule, like = Schedule(timesteps=100), images(0, 1)
    known = schedule.alphas
    times = torch.tensor([7.25], dtype=torch.float64, requires_grad=True)
    found = schedule.alpha(times, like)
    assert float(found.detach()) == pytest.approx(float(0.75 * known[7] + 0.25 * known[8]))
    (slope,) = torch.autograd.grad(found.sum(), times)
    assert float(slope) == pytest.approx(float(known[8] - known[7]))
    whole = schedule.alpha(torch.tensor([99.0]).double(), like)
    assert float(whole) == pytest.approx(float(known[99]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "lineer"}, "did you mean 'linear'"),
        ({"timesteps": 1}, "at least 2"),
        ({"prediction": "x0"}, "v_prediction"),
    ],
)
def test_impossible_schedules_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Schedule(**fields)  # type: ignore[arg-type]


def denoiser() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallDenoiser().double()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_is_that_of_diffusers_step_by_step(prediction: str) -> None:
    """On a grid of whole strides, which theirs needs; clipped estimates change ε, as theirs do."""
    diffusers = pytest.importorskip("diffusers")
    network, latents = denoiser(), 2 * images(2)
    theirs = diffusers.DDIMScheduler(
        num_train_timesteps=101, clip_sample=True, prediction_type=prediction
    )
    schedule = Schedule(timesteps=101, prediction=prediction)  # type: ignore[arg-type]
    times = grid(schedule, 5)
    assert times == [100, 75, 50, 25, 0]
    theirs.num_inference_steps = 4  # its stride is T over that, rounded down
    with torch.no_grad():
        ours, x = ddim(schedule, network, latents, steps=5), latents
        for time in times:
            output = network(x, torch.full((3,), time))
            x = theirs.step(output, time, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_ddim_is_deterministic_and_differentiable_without_eta() -> None:
    schedule, network = Schedule(timesteps=50), denoiser()
    latents = (0.3 * images(3, 1)).requires_grad_()
    drawn = ddim(schedule, network, latents, steps=3)
    (slope,) = torch.autograd.grad(drawn.square().sum(), latents)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().sum()) > 0
    noisy = [
        ddim(schedule, network, latents.detach(), steps=3, eta=1.0, generator=stream(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_a_grid_ends_at_zero_and_has_no_more_steps_than_times() -> None:
    schedule = Schedule(timesteps=16)
    assert grid(schedule, 16) == list(range(15, -1, -1))
    assert grid(schedule, 3, start=8) == [8, 4, 0]
    with pytest.raises(InvalidInput, match="1 to 16"):
        grid(schedule, 17)
    a, b = images(0), images(1)
    assert torch.equal(guided_output(a, b, 0.0), a)


@pytest.mark.parametrize("sides", [(8, 8), (7, 9), (5, 5)])
def test_the_unet_keeps_every_size(sides: tuple[int, int]) -> None:
    network = UNet(2, width=8)
    x = torch.randn((2, 2, *sides), generator=stream(0))
    assert network(x, torch.tensor([0, 3])).shape == x.shape


def test_the_unet_is_differentiable_twice_in_images_and_times() -> None:
    network = UNet(1, width=8, classes=2).double()
    x = images(0, 1).requires_grad_()
    times = torch.tensor([3.5], dtype=torch.float64, requires_grad=True)
    loss = network(x, times, torch.tensor([1])).square().mean()
    gradient = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
    assert all(float(g.detach().abs().sum()) > 0 for g in gradient[:4])  # nothing starts at zero
    size = torch.stack([g.square().sum() for g in gradient]).sum()
    for slope in torch.autograd.grad(size, (x, times)):
        assert bool(slope.isfinite().all())
        assert float(slope.abs().sum()) > 0


def test_no_label_is_the_class_of_no_class() -> None:
    network, x, times = UNet(1, width=8, classes=2), images(0, 2).float(), torch.tensor([1, 2])
    assert torch.equal(network(x, times), network(x, times, torch.tensor([2, 2])))
    assert not torch.equal(network(x, times), network(x, times, torch.tensor([0, 1])))
    with pytest.raises(InvalidInput, match="multiple of 8"):
        UNet(1, width=12)


def test_networks_tell_what_they_do() -> None:
    class Optional(TwoTwins):
        def forward(self, x: Tensor, times: Tensor | None = None) -> Tensor:
            return super().forward(x)

    assert denoises(UNet(1, width=8))
    assert denoises(SmallDenoiser())
    assert not denoises(TwoTwins())
    assert not denoises(Optional())
    assert not denoises(nn.Sequential(nn.Flatten()))


def test_the_unet_of_diffusers_is_called_as_ours_and_differentiable_twice() -> None:
    pytest.importorskip("diffusers")
    network = build("unet-diffusers", DataSpec.image((1, 8, 8), 3), seed=0)
    assert denoises(network)
    x = torch.rand((1, 1, 8, 8), generator=stream(0), requires_grad=True)
    out = network(x, torch.tensor([5]))
    assert out.shape == x.shape
    some = [p for p in network.parameters() if p.requires_grad][:4]
    gradient = torch.autograd.grad(out.square().mean(), some, create_graph=True)
    (slope,) = torch.autograd.grad(sum(g.square().sum() for g in gradient), x)
    assert float(slope.abs().sum()) > 0
