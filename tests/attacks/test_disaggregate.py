"""Separating a batch at its head: exact in its range, an honest refusal just outside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.closed_form.disaggregate import Separated, disaggregate
from gradleak.attacks.parts.labels import sign_counts
from gradleak.data import load
from gradleak.defenses import ATS, GaussianNoise, Soteria
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models import build
from gradleak.types import Mechanism, ModelState, Observation
from tests.laws.small import stream


def network(activation: type[nn.Module] = nn.ReLU, *, bias: bool = True) -> nn.Sequential:
    """Two convolutions and a head for digits, 4096 features."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            activation(),
            nn.Conv2d(16, 64, 3, padding=1),
            activation(),
            nn.Flatten(),
            nn.Linear(4096, 10, bias=bias),
        )


def seen_batch(
    indices: list[int],
    model: nn.Module | None = None,
    mechanism: Mechanism | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Observation, Tensor, Tensor, nn.Module]:
    digits = load("digits")
    model = model or network()
    state = ModelState.of(model).to(dtype)
    scenario = gl.Scenario(
        digits, state, mechanism or FedSGD(), batch_size=len(indices), indices=torch.tensor(indices)
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return seen, truth.batch.inputs, truth.batch.labels, model


def truth_at_the_head(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """p − onehot and features of every example, in ascending order of label."""
    whole = model.double()
    assert isinstance(whole, nn.Sequential)
    with torch.no_grad():
        features = whole[:-1](inputs.double())
        residuals = whole(inputs.double()).softmax(1)
    residuals[range(len(labels)), labels] -= 1
    return residuals, features


def repeated(size: int) -> list[int]:
    """Indices of digits of which some share a label: the first of 5 classes, over and over."""
    labels = load("digits").labels
    wanted = [0, 0, 3, 3, 3, 7, 1, 9][:size]
    chosen: list[int] = []
    for label in wanted:
        rows = torch.nonzero(labels == label)[:, 0].tolist()
        chosen.append(next(r for r in rows if r not in chosen))
    return chosen


def assert_separates(found: Separated | str, residuals: Tensor, features: Tensor) -> None:
    """One-to-one, every residual and every feature to 1e-8."""
    assert isinstance(found, Separated), found
    order = torch.cdist(residuals, found.residuals).argmin(1)
    assert sorted(order.tolist()) == list(range(len(residuals)))
    torch.testing.assert_close(found.residuals[order], residuals, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.features[order], features, rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_labels_and_features_are_exact_with_repeated_labels(size: int) -> None:
    seen, inputs, labels, model = seen_batch(repeated(size))
    found = disaggregate(seen)
    assert_separates(found, *truth_at_the_head(model, inputs, labels))
    assert isinstance(found, Separated)
    assert torch.equal(found.labels, labels.sort().values)


def test_a_gradient_in_single_precision_gives_every_label() -> None:
    seen, _, labels, _ = seen_batch(repeated(4), dtype=torch.float32)
    found = disaggregate(seen)
    assert isinstance(found, Separated), found
    assert torch.equal(found.labels, labels.sort().values)


def test_dark_corners_shared_by_all_pictures_are_no_example() -> None:
    """Where pictures are equally dark, columns repeat the mean residual: a mixture, not a ray."""
    model = network()
    seen, inputs, labels, model = seen_batch(repeated(4), model)
    shadow = inputs.clone()
    shadow[..., :, :4] = 0.0
    state = ModelState.of(model).to(torch.float64)
    update = FedSGD().mean(state, gl.Batch(shadow, labels))
    darker = gl.observe(state, update=update.values, data=seen.data, batch_size=4)
    assert_separates(disaggregate(darker), *truth_at_the_head(model, shadow, labels))


@pytest.mark.parametrize("kind", [nn.GELU, nn.Tanh, nn.Sigmoid])
def test_dense_features_separate_by_the_softmax(kind: type[nn.Module]) -> None:
    """Of distinct classes to 1e-8; no column of the head's gradient is one example's alone."""
    seen, inputs, labels, model = seen_batch([0, 1, 2, 3], network(kind))
    found = disaggregate(seen)
    assert isinstance(found, Separated), found
    assert not found.rectified
    assert_separates(found, *truth_at_the_head(model, inputs, labels))


def test_dense_features_of_one_class_separate_too() -> None:
    """Nearly equal predictions amplify rounding, so 1e-4 here; a swap would be off by 1."""
    seen, inputs, labels, model = seen_batch(repeated(4), network(nn.GELU))
    found = disaggregate(seen)
    assert isinstance(found, Separated), found
    assert torch.equal(found.labels, labels.sort().values)
    _, features = truth_at_the_head(model, inputs, labels)
    order = torch.cdist(features, found.features).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    gap = (found.features[order] - features).norm() / features.norm()
    assert gap < 1e-4


def test_average_pooled_features_separate() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        layers = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.Sequential(*layers, nn.Linear(32, 10))
    seen, inputs, labels, model = seen_batch([0, 1, 2], model)
    assert_separates(disaggregate(seen), *truth_at_the_head(model, inputs, labels))


def test_miscounted_labels_are_recounted() -> None:
    """Class 7 is predicted anyway: the signal hides that it is there, the softmax does not."""
    model = network(nn.GELU)
    labels = load("digits").labels
    with torch.no_grad():
        model[-1].bias[7] = 3.0
    chosen = [*torch.nonzero(labels == 1)[:2, 0].tolist(), int(torch.nonzero(labels == 7)[0])]
    seen, _, wanted, _ = seen_batch(chosen, model)
    assert not torch.equal(sign_counts(seen), wanted.sort().values)
    found = disaggregate(seen)
    assert isinstance(found, Separated), found
    assert torch.equal(found.labels, wanted.sort().values)


def test_no_solution_without_a_bias() -> None:
    seen, *_ = seen_batch(repeated(4), network(bias=False))
    assert "with a bias" in str(disaggregate(seen))


def test_no_solution_under_noise() -> None:
    seen, *_ = seen_batch(repeated(4))
    values = {
        k: v + 1e-2 * v.norm() / v.numel() ** 0.5 * torch.randn(v.shape, generator=stream(1))
        for k, v in seen.update.values.items()
    }
    exchange = replace(seen.exchanges[0], update=replace(seen.update, values=values))
    assert "no residuals are the softmax" in str(disaggregate(replace(seen, exchanges=(exchange,))))


@pytest.mark.parametrize("size", [10, 12])
def test_no_solution_with_as_many_examples_as_classes(size: int) -> None:
    seen, *_ = seen_batch(list(range(size)))
    assert "linearly dependent" in str(disaggregate(seen))


@pytest.mark.parametrize(
    ("mechanism", "why"),
    [
        (FedAvg(steps=2, learning_rate=0.1), "plain gradient"),
        (Soteria(50)(FedSGD()), "plain gradient"),
        (GaussianNoise(0.01)(FedSGD()), "directions repeat"),
    ],
    ids=["fedavg", "soteria", "noise"],
)
def test_no_solution_for_anything_but_one_plain_gradient(mechanism: Mechanism, why: str) -> None:
    seen, *_ = seen_batch(repeated(2), mechanism=mechanism)
    assert why in str(disaggregate(seen))


def test_a_protection_that_leaves_the_gradient_plain_is_looked_through() -> None:
    """What the client trained on is what separates, transformed or not."""
    seen, *_ = seen_batch(repeated(2), mechanism=ATS()(FedSGD()))
    assert isinstance(disaggregate(seen), Separated)


def test_no_solution_for_a_zero_or_a_non_finite_gradient() -> None:
    seen, *_ = seen_batch(repeated(2))
    for fill, why in ((0.0, "zero"), (torch.nan, "non-finite")):
        values = {k: torch.full_like(v, fill) for k, v in seen.update.values.items()}
        exchange = replace(seen.exchanges[0], update=replace(seen.update, values=values))
        assert why in str(disaggregate(replace(seen, exchanges=(exchange,))))


def test_the_built_in_convnet_separates_too() -> None:
    digits = load("digits")
    seen, _, labels, _ = seen_batch(repeated(4), build("convnet", digits.spec, seed=2))
    found = disaggregate(seen)
    assert isinstance(found, Separated), found
    assert torch.equal(found.labels, labels.sort().values)
