"""Sample quality tells real images from noise, and says what it cannot compare."""

from __future__ import annotations

import pytest
import torch

from gradleak.data import load
from gradleak.denoising import Schedule
from gradleak.errors import InvalidInput
from gradleak.run.sample_quality import drawn_images, sample_quality


def test_real_images_are_near_and_noise_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images the extractor never saw, as many as the floor's, differ from it by draws alone.

    Planted: every second image noise, or not a number.
    """
    monkeypatch.setattr("gradleak.run.sample_quality._STEPS", 60)
    digits = load("digits")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    taught, half, drawn = order[:600], order[600:1600], order[1600:1790]
    images = digits.batch(drawn).inputs
    near = sample_quality(images, digits, taught, seed=0, half=half)
    assert (near.samples, near.real) == (190, 810)
    assert near.extractor_accuracy > 0.5
    assert near.frechet < 3 * near.floor
    noise, broken = images.clone(), images.clone()
    noise[::2] = torch.rand(95, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    broken[::2] = float("nan")
    for bad in (noise, broken):
        assert sample_quality(bad, digits, taught, seed=0, half=half).frechet > 5 * near.floor
    with pytest.raises(InvalidInput, match="990 samples beside 1000 real images"):
        sample_quality(torch.zeros(990, 1, 8, 8), digits, taught, seed=0, half=half)


def test_a_perfect_denoiser_draws_its_one_image() -> None:
    """ε̂ = (x_t − √ᾱ x_0) / √(1 − ᾱ) leads every latent to x_0, in the data's bounds."""
    schedule, spec = Schedule(timesteps=40), load("digits").spec
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)

    def denoise(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        a = schedule.alpha(times, x)
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    generator = torch.Generator().manual_seed(0)
    drawn = drawn_images(schedule, denoise, spec, count=3, generator=generator)
    torch.testing.assert_close(drawn, ((image + 1) / 2).expand(3, 1, 8, 8), atol=1e-4, rtol=0)
