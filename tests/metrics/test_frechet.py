"""The Fréchet distance against a matrix root, and on Gaussians whose distance is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics import frechet_distance


def _features(n: int, d: int, seed: int) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    mixed = torch.randn(d, d, generator=stream, dtype=torch.float64)
    shift = torch.randn(d, generator=stream, dtype=torch.float64)
    return torch.randn(n, d, generator=stream, dtype=torch.float64) @ mixed + shift


def _by_matrix_root(a: Tensor, b: Tensor) -> float:
    """As the published FID code has it."""
    one, other = a.numpy(), b.numpy()
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    apart = float(((one.mean(0) - other.mean(0)) ** 2).sum())
    return apart + float(np.trace(first + second - 2 * sqrtm(first @ second).real))


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 2), (30, 30, 8), (200, 100, 20)])
def test_it_is_what_the_matrix_root_gives(n: int, m: int, d: int) -> None:
    a, b = _features(n, d, 0), _features(m, d, 1)
    assert frechet_distance(a, b) == pytest.approx(_by_matrix_root(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def _exactly(mean: Tensor, deviations: Tensor) -> Tensor:
    """Two features whose sample mean and (diagonal) covariance are these."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    return mean + signs * deviations * math.sqrt(3 / 4)


def test_gaussians_whose_distance_is_known() -> None:
    means = torch.tensor([[0.0, 0], [3, 4]], dtype=torch.float64)
    roots = torch.tensor([[1.0, 2], [3, 0.5]], dtype=torch.float64)
    a, b = _exactly(means[0], roots[0]), _exactly(means[1], roots[1])
    # Commuting covariances: ‖μ − ν‖² + Σ (σ_i − τ_i)².
    assert frechet_distance(a, b) == pytest.approx(25 + 4 + 2.25, rel=1e-12)
    assert frechet_distance(a, a + means[1]) == pytest.approx(25, rel=1e-12)


def test_equal_features_are_at_distance_zero_even_where_covariances_are_singular() -> None:
    few = _features(5, 20, 3)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    still = torch.ones(4, 3)
    assert frechet_distance(still, still + 2) == pytest.approx(12, rel=1e-9)


def test_a_cloud_that_lost_its_spread_is_far() -> None:
    """A fault the mean alone would miss: every example the same."""
    cloud = _features(100, 6, 4)
    collapsed = cloud.mean(0).expand_as(cloud)
    assert frechet_distance(cloud, collapsed) == pytest.approx(
        float(torch.cov(cloud.T).trace()), rel=1e-6
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2)),
        (torch.zeros(3, 2), torch.zeros(3, 4)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.full((3, 2), math.nan), torch.zeros(3, 2)),
    ],
)
def test_what_is_no_cloud_is_refused(a: Tensor, b: Tensor) -> None:
    with pytest.raises(InvalidInput):
        frechet_distance(a, b)
