from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gradleak.errors import InvalidInput
from gradleak.metrics import baselines, psnr_db
from gradleak.metrics.baselines import guess_labels
from gradleak.types import Batch, DataSpec

SPEC = DataSpec.image((1, 4, 4), 3)
GENERATOR = torch.Generator().manual_seed(0)
PUBLIC = Batch(
    torch.rand(30, 1, 4, 4, generator=GENERATOR), torch.tensor([0] * 15 + [1] * 10 + [2] * 5)
)
TRUTH = Batch(torch.rand(4, 1, 4, 4, generator=GENERATOR), torch.tensor([2, 0, 2, 1]))


def test_means_and_nearest() -> None:
    guesses = baselines(PUBLIC, TRUTH, labels_known=True, spec=SPEC)
    assert list(guesses) == ["mean_image", "class_mean", "nearest_public"]
    for guess in guesses.values():
        assert guess.inputs.shape == TRUTH.inputs.shape
        assert torch.equal(guess.labels, TRUTH.labels)
    assert torch.allclose(guesses["mean_image"].inputs[2], PUBLIC.inputs.mean(0))
    assert torch.allclose(guesses["class_mean"].inputs[0], PUBLIC.inputs[25:].mean(0))
    slow = [
        min(range(30), key=lambda j: float((PUBLIC.inputs[j] - x).square().sum()))
        for x in TRUTH.inputs
    ]
    assert torch.equal(guesses["nearest_public"].inputs, PUBLIC.inputs[slow])


def test_without_labels_only_the_oracle_depends_on_the_truth() -> None:
    other = Batch(1 - TRUTH.inputs, (TRUTH.labels + 1) % 3)
    ours, theirs = (baselines(PUBLIC, t, labels_known=False, spec=SPEC) for t in (TRUTH, other))
    assert "class_mean" not in ours
    assert torch.equal(ours["mean_image"].inputs, theirs["mean_image"].inputs)
    assert torch.equal(ours["mean_image"].labels, theirs["mean_image"].labels)
    assert not torch.equal(ours["nearest_public"].inputs, theirs["nearest_public"].inputs)


def test_a_class_without_public_examples_falls_back_to_the_mean() -> None:
    few = Batch(PUBLIC.inputs[:25], PUBLIC.labels[:25])
    guesses = baselines(few, TRUTH, labels_known=True, spec=SPEC)
    assert torch.allclose(guesses["class_mean"].inputs[0], few.inputs.mean(0))


def test_the_mean_is_the_best_constant_guess() -> None:
    everyone = Batch(PUBLIC.inputs, PUBLIC.labels)
    mean = baselines(PUBLIC, everyone, labels_known=False, spec=SPEC)["mean_image"]
    error = (mean.inputs - PUBLIC.inputs).square().mean()
    for shift in (-0.05, 0.05):
        assert error < (mean.inputs + shift - PUBLIC.inputs).square().mean()
    assert psnr_db(mean, everyone) > psnr_db(
        Batch(torch.zeros_like(mean.inputs), mean.labels), everyone
    )


def test_guessed_labels_have_the_largest_expected_overlap() -> None:
    count, share = 3, np.array([0.5, 1 / 3, 1 / 6])

    def expected(guess: tuple[int, ...]) -> float:
        total = 0.0
        for truth in itertools.product(range(3), repeat=count):
            overlap = sum(min(guess.count(c), truth.count(c)) for c in range(3))
            total += overlap * float(np.prod(share[list(truth)]))
        return total

    options = list(itertools.combinations_with_replacement(range(3), count))
    found = tuple(guess_labels(PUBLIC.labels, count, classes=3).tolist())
    assert expected(found) == pytest.approx(max(map(expected, options)))
    assert expected((0, 0, 0)) < expected(found), "planted fault: always the modal class"


def test_no_public_example_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one"):
        baselines(Batch(PUBLIC.inputs[:0], PUBLIC.labels[:0]), TRUTH, labels_known=False, spec=SPEC)
