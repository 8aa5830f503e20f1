"""Clipping and noise of every example's gradient against a loop over examples."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from gradleak.defenses import Clip, GaussianNoise, LaplaceNoise, build
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Batch, Update
from tests.laws.small import Normalised, TwoTwins, batch_of, state_of, stream

STATE, BATCH = state_of(TwoTwins), batch_of(4)


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def alone(batch: Batch) -> Tensor:
    """Every example's gradient, (b, coordinates)."""
    singles = [Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1]) for i in range(len(batch))]
    return torch.stack([flat(FedSGD().mean(STATE, single)) for single in singles])


def looped(batch: Batch, norm: float) -> Tensor:
    gradients = alone(batch)
    return (gradients * (norm / gradients.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)


@pytest.mark.parametrize("soft", [False, True])
def test_clipping_by_example_is_a_loop_over_examples(soft: bool) -> None:
    norm = float(alone(BATCH).norm(dim=1).median())  # clips some and not others
    labels = torch.eye(3, dtype=torch.float64)[BATCH.labels] if soft else BATCH.labels
    inputs = BATCH.inputs.clone().requires_grad_()
    found = flat(Clip(norm, scope="example")(FedSGD()).mean(STATE, Batch(inputs, labels)))
    wanted = looped(Batch(inputs, labels), norm)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=stream(0), dtype=torch.float64)
    slopes = [torch.autograd.grad(v @ weights, inputs)[0] for v in (found, wanted)]
    torch.testing.assert_close(*slopes)
    whole = flat(Clip(norm)(FedSGD()).mean(STATE, BATCH))
    assert float((whole - found.detach()).norm() / whole.norm()) > 1e-3


def test_a_norm_that_clips_nothing_leaves_the_mean() -> None:
    found = flat(Clip(1e6, scope="example")(FedSGD()).mean(STATE, BATCH))
    torch.testing.assert_close(found, flat(FedSGD().mean(STATE, BATCH)))


def test_clipping_by_example_needs_gradients_of_examples() -> None:
    with pytest.raises(InvalidInput, match="fedsgd"):
        Clip(scope="example")(FedAvg())
    with pytest.raises(InvalidInput, match="fedsgd"):
        GaussianNoise(scope="example")(FedAvg())
    mixed = Clip(scope="example")(FedSGD(batch_norm="train"))
    with pytest.raises(InvalidInput, match="eval"):
        mixed.mean(state_of(Normalised), BATCH)
    mixed.mean(STATE, BATCH)  # no batch normalisation: train mode means nothing


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise], ids=lambda k: k.id)
def test_noise_by_example_averages_out(kind: type[GaussianNoise] | type[LaplaceNoise]) -> None:
    """n = 79 x 100; the sample variance's relative error is sqrt((kappa - 1) / n); alpha = 1e-6."""
    mechanism, generator = kind(0.2, scope="example")(FedSGD()), stream(1)
    clean = flat(mechanism.mean(STATE, BATCH))
    noise = torch.cat(
        [flat(mechanism.sample(STATE, BATCH, generator=generator)) - clean for _ in range(100)]
    )
    kurtosis = 3 + (kind.kurtosis - 3) / len(BATCH)
    tolerance = stats.norm.isf(5e-7) * ((kurtosis - 1) / len(noise)) ** 0.5
    assert float(noise.var() / (0.2**2 / len(BATCH))) == pytest.approx(1, abs=tolerance)
    assert float(noise.var() / 0.2**2) != pytest.approx(1, abs=tolerance)


def test_the_likelihood_of_averaged_noise() -> None:
    gaussian = GaussianNoise(0.2, scope="example")(FedSGD())
    update = gaussian.sample(STATE, BATCH, generator=stream(2))
    residual = (flat(update) - flat(gaussian.mean(STATE, BATCH))).numpy()
    wanted = stats.norm(scale=0.1).logpdf(residual).sum()
    assert float(gaussian.log_prob(update, STATE, BATCH)) == pytest.approx(wanted)
    laplace = LaplaceNoise(0.2, scope="example")(FedSGD())
    with pytest.raises(IntractableLikelihood, match="mean of 4"):
        laplace.likelihood(batch_size=4)
    assert laplace.likelihood(batch_size=1) == LaplaceNoise(0.2)(FedSGD()).likelihood(batch_size=1)
    with pytest.raises(IntractableLikelihood, match="two kinds"):
        build("gaussian-noise:scope=example+gaussian-noise")(FedSGD()).likelihood(batch_size=2)
