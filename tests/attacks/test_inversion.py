"""Model inversion: its parts against brute force, and whole attacks on a tiny classifier."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from gradleak import models, priors
from gradleak.attacks.inversion import (
    Classifier,
    DiffMI,
    LatentSearch,
    PixelAscent,
    most_confident,
    search_time,
    top_k_margin,
)
from gradleak.attacks.inversion.classifier import augmented
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.models.seeding import seeded
from gradleak.types import DataSpec, ModelState

DATA = DataSpec.image((1, 8, 8), 3)
TINY = DiffMI(
    chosen=8,
    width=8,
    pretraining=3,
    batch_size=4,
    tuning=1,
    tuned_at_once=3,
    tuning_times=2,
    steps=2,
    copies=2,
    precision="float32",
)


@pytest.fixture(scope="module")
def target() -> ModelState:
    return ModelState.of(models.build("convnet", DATA, seed=0))


@pytest.fixture(scope="module")
def linear() -> ModelState:
    with seeded(3):
        return ModelState.of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


@pytest.fixture(scope="module")
def public() -> Tensor:
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_features_are_what_the_head_reads(target: ModelState, public: Tensor) -> None:
    classifier = Classifier(target)
    logits, features = classifier(public)
    names = list(target.params)
    weight, bias = target.params[names[-2]], target.params[names[-1]]
    torch.testing.assert_close(features @ weight.T + bias, logits)
    torch.testing.assert_close(classifier.told(public)[1], features)


def test_a_network_without_a_head_has_no_features() -> None:
    with pytest.raises(NotApplicable, match="linear layer"):
        Classifier(ModelState.of(nn.Conv2d(1, 1, 3)))


def test_the_margin_is_minus_the_logit_plus_the_mean_of_the_largest_others() -> None:
    logits = torch.tensor([[1.0, 5, 3, 2], [0, -1, 4, 4]])
    labels = torch.tensor([1, 0])
    assert top_k_margin(logits, labels, 2).tolist() == [2.5 - 5, 4.0]
    assert top_k_margin(logits, labels, 1).tolist() == [-2, 4]
    assert top_k_margin(logits, labels, 0).tolist() == [-5, 0]
    assert top_k_margin(logits, labels, 99).tolist() == pytest.approx([2 - 5, 7 / 3])


def test_the_surest_images_of_every_class(public: Tensor) -> None:
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    found = most_confident(logits, 4)
    shares = logits.softmax(1)
    for c in range(3):
        assert shares[found[c], c].min() >= shares[:, c].sort(descending=True).values[3]
    with pytest.raises(InvalidInput, match="1 to 20"):
        most_confident(logits, 21)


def test_times_fall_from_the_range_to_its_end() -> None:
    times = [search_time(i, 30) for i in range(30)]
    assert times[0] == pytest.approx(200 + 800)
    assert times[15] == pytest.approx(200 + 800 / 30 * (10 + 5 * math.cos(45 / (10 * math.pi))))
    assert all(late < early for early, late in itertools.pairwise(times))
    assert 200 < times[-1] < 230


def test_augmentation_without_any_is_the_image_and_moves_by_whole_pixels() -> None:
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    stream = torch.Generator().manual_seed(0)
    still = augmented(images, generator=stream, shift=0, degrees=0, scale=0, jitter=0, blur=0)
    torch.testing.assert_close(still, images)
    blurred = augmented(
        torch.ones_like(images), generator=stream, shift=2, degrees=9, scale=0.1, jitter=0, blur=1
    )
    torch.testing.assert_close(blurred, torch.ones_like(images))


def test_equal_seeds_give_equal_images_within_bounds(target: ModelState, public: Tensor) -> None:
    prior = TINY.prior(target, public, DATA, seed=0)
    found = TINY.search(target, prior, public, images=2, seed=0)
    again = TINY(target, public, DATA, images=2, seed=0)
    assert found.shape == (3, 2, 1, 8, 8)
    assert torch.equal(found, again)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert not torch.equal(found, TINY.search(target, prior, public, images=2, seed=1))


def test_tuning_changes_embeddings_and_the_middle_alone(target: ModelState, public: Tensor) -> None:
    tuned = TINY.prior(target, public, DATA, seed=0).network
    plain = DiffMI(**{**vars(TINY), "tuning": 0}).prior(target, public, DATA, seed=0).network
    changed = {
        name.partition(".")[0] for name in plain if not torch.equal(plain[name], tuned[name])
    }
    assert changed == {"class_embedding", "middle"}


def test_pixels_and_latents_raise_the_class_that_was_asked_for(linear: ModelState) -> None:
    target = linear
    classifier, labels = Classifier(target), torch.arange(3).repeat_interleave(4)
    pixels = PixelAscent(steps=30, tv=0.0)(target, DATA, images=4, seed=0)
    hits = classifier(pixels.flatten(0, 1))[0].argmax(1) == labels
    assert bool(hits.all())
    assert pixels.shape == (3, 4, 1, 8, 8)
    family = priors.Gan(steps=1, latent=8, channels=8, batch_size=4)
    batch = TINY.pseudo_labelled(target, torch.rand(20, 1, 8, 8))
    drawn = priors.train(family, batch, DATA, seed=0)
    assert isinstance(drawn, priors.Generator)
    few, many = (
        LatentSearch(steps=s, nearness=0.0)(target, drawn, images=4, seed=0) for s in (1, 40)
    )
    margins = [
        float(top_k_margin(classifier(x.flatten(0, 1))[0], labels, 1).mean()) for x in (few, many)
    ]
    assert margins[1] < margins[0]


def test_the_search_raises_the_class_and_without_its_loss_it_does_not(
    linear: ModelState, public: Tensor
) -> None:
    """Planted fault: the classifier's gradient clipped to nothing leaves the prior alone."""
    state = linear
    settings = {**vars(TINY), "tuning": 0, "steps": 12, "last": 1}
    classifier, labels = Classifier(state), torch.arange(3).repeat_interleave(6)

    def margin(attack: DiffMI) -> float:
        prior = attack.prior(state, public, DATA, seed=0)
        found = attack.search(state, prior, public, images=6, seed=0)
        return float(top_k_margin(classifier(found.flatten(0, 1))[0], labels, 2).mean())

    assert margin(DiffMI(**settings)) < margin(DiffMI(**{**settings, "allowed": 1e-9})) - 0.05


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"memory": 1.0}, {"rate": 0.0}, {"last": 0}, {"sampler": 1001}, {"k": -1}],
)
def test_settings_without_meaning_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="diff-mi"):
        DiffMI(**fields)  # type: ignore[arg-type]
