"""ROG: few pixels, made large, and what an autoencoder makes of the claim."""

from __future__ import annotations

import pytest
import torch

import gradleak as gl
from gradleak import priors
from gradleak.attacks import ROG
from gradleak.attacks.recipes.rog import SmallImages, tenth_cosine
from gradleak.data import Dataset, load, split
from gradleak.defenses import build
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.priors import Manifold
from gradleak.types import DataSpec, Fact, Mechanism, Prior
from tests.laws.small import SMALL_PRIORS, stream

DIGITS = load("digits")


def smooth(count: int) -> Dataset:
    """Digits that are enlargements of 4 x 4 pixels."""
    images = DIGITS.batch(torch.arange(count)).inputs
    small = torch.nn.functional.interpolate(images, size=(4, 4), mode="area")
    large = torch.nn.functional.interpolate(small, size=(8, 8), mode="bicubic")
    return Dataset.of("smooth", large.clamp(0, 1), DIGITS.labels[:count], classes=10)


def test_the_rate_falls_to_a_tenth() -> None:
    assert [tenth_cosine(s, 100) for s in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 7, 9)])
def test_small_images_become_large_and_small_again(shape: tuple[int, int, int]) -> None:
    unknown = SmallImages(
        DataSpec.image(shape, 10),
        batch_size=2,
        labels=torch.zeros((3, 2), dtype=torch.int64),
        boxed=False,
        mean=0.5,
        std=0.25,
        dtype=torch.float64,
    )
    start = unknown.start(stream(0), restarts=3)
    assert start["inputs"].shape == (3, 2, shape[0], -(-shape[1] // 4), -(-shape[2] // 4))
    inputs, labels = unknown.decode(start, [0, 1, 2])
    assert inputs.shape == (3, 2, *shape)
    assert labels.shape == (3, 2)
    flat = gl.Batch(torch.full((2, *shape), 0.3), torch.zeros(2, dtype=torch.int64))
    again, _ = unknown.decode(unknown.encode([flat]), [0])
    torch.testing.assert_close(again, torch.full_like(again, 0.3))


def attacked(client: Mechanism, *, prior: Prior | None = None) -> tuple[float, float]:
    """PSNR of the claim, and of the mean picture, for one smooth digit."""
    data = smooth(40)
    knows = {Fact.MECHANISM, Fact.BATCH_SIZE, Fact.LABELS} | ({Fact.PRIOR} if prior else set())
    scenario = gl.Scenario(
        data,
        gl.models.build("lenet-tiny", data.spec, seed=0),
        client,
        threat=gl.ThreatModel(knows=frozenset(knows)),
        indices=torch.tensor([5]),
        prior=prior,
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    claim = ROG(steps=150, factor=2)(seen, generator=stream(1))
    mean = gl.Batch(data.images.mean(0, keepdim=True), truth.batch.labels)
    return gl.metrics.psnr_db(claim.batch, truth.batch), gl.metrics.psnr_db(mean, truth.batch)


@pytest.mark.parametrize(
    "client",
    [
        FedSGD(),
        build("quantize:norm=max,levels=16")(FedSGD()),
        FedAvg(learning_rate=0.003, steps=2),
    ],
    ids=["plain", "quantised", "local steps"],
)
def test_it_recovers_what_few_pixels_can_show(client: Mechanism) -> None:
    found, guess = attacked(client)
    assert found > guess + 10


def test_an_autoencoder_has_the_last_word() -> None:
    public = DIGITS.batch(split(DIGITS, 0).public)
    prior = priors.fit(SMALL_PRIORS["autoencoder"], public, DIGITS.spec, seed=0)
    assert isinstance(prior, Manifold)
    unknown = SmallImages(
        DIGITS.spec, 1, None, torch.float32, False, 0.5, 0.25, factor=2, manifold=prior
    )
    x = public.inputs[:1]
    claim = unknown.claimed(x, public.labels[:1])
    torch.testing.assert_close(claim.inputs, prior.reproduced(x).clamp(0, 1))


def test_a_bad_factor_says_what_was_expected() -> None:
    with pytest.raises(InvalidInput, match="factor"):
        ROG(factor=0)
