from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.errors import InvalidInput
from gradleak.metrics import METRICS, PSNR_CEILING_DB, mse, psnr_db, ssim
from gradleak.metrics.image import ssim_each, ssim_window
from gradleak.types import Batch


def batch(inputs: torch.Tensor) -> Batch:
    return Batch(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def random_images(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()


def slow_ssim(x: np.ndarray, y: np.ndarray, *, taps: int, sigma: float, k1: float = 0.01) -> float:
    """SSIM of one image by its definition: one window at a time, two-dimensional weights."""
    centre = taps // 2
    weight = np.array(
        [
            [
                math.exp(-((i - centre) ** 2 + (j - centre) ** 2) / (2 * sigma**2))
                for j in range(taps)
            ]
            for i in range(taps)
        ]
    )
    weight /= weight.sum()
    c1, c2 = k1**2, 0.03**2
    values = []
    for channel in range(x.shape[0]):
        for i in range(x.shape[1] - taps + 1):
            for j in range(x.shape[2] - taps + 1):
                a = x[channel, i : i + taps, j : j + taps]
                b = y[channel, i : i + taps, j : j + taps]
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                var_a = (weight * (a - mean_a) ** 2).sum()
                var_b = (weight * (b - mean_b) ** 2).sum()
                cov = (weight * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                values.append(luminance * (2 * cov + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("error", [0.5, 0.1, 1e-2, 1e-4, 1e-8])
def test_psnr_closed_form(error: float) -> None:
    truth = torch.full((3, 1, 4, 4), 0.25, dtype=torch.float64)
    found = psnr_db(batch(truth + error), batch(truth))
    assert found == pytest.approx(-20 * math.log10(error), rel=1e-6)
    assert abs(found - (-20 * math.log10(error / 255))) > 48, "planted fault: peak 255"


def test_an_exact_claim_reads_the_ceiling() -> None:
    truth = random_images(0, 2, 1, 4, 4)
    assert psnr_db(batch(truth), batch(truth)) == PSNR_CEILING_DB
    assert mse(batch(truth), batch(truth)) == 0.0


def test_claims_are_clamped_to_the_bounds() -> None:
    truth = torch.ones(1, 1, 4, 4)
    assert psnr_db(batch(truth * 7), batch(truth)) == PSNR_CEILING_DB
    assert psnr_db(batch(truth * -7), batch(truth)) == pytest.approx(0.0)


def test_the_width_of_the_bounds_is_the_peak() -> None:
    claim, truth = random_images(1, 2, 3, 12, 12), random_images(2, 2, 3, 12, 12)
    for score in (mse, psnr_db, ssim):
        wide = score(batch(claim * 4 - 2), batch(truth * 4 - 2), bounds=(-2.0, 2.0))
        assert wide == pytest.approx(score(batch(claim), batch(truth)))


@pytest.mark.parametrize(
    ("shape", "taps"),
    [((1, 8, 8), 7), ((1, 28, 28), 11), ((3, 16, 13), 11), ((3, 5, 9), 5), ((1, 2, 2), 1)],
)
def test_ssim_equals_its_definition(shape: tuple[int, int, int], taps: int) -> None:
    window = ssim_window(*shape[1:])
    assert len(window) == taps
    assert float(window.sum()) == pytest.approx(1.0)
    truth = random_images(3, 2, *shape)
    claim = (truth + 0.2 * random_images(4, 2, *shape)).clamp(0, 1)
    found = ssim_each(claim, truth, (0.0, 1.0))
    for i in range(2):
        reference = slow_ssim(claim[i].numpy(), truth[i].numpy(), taps=taps, sigma=1.5 * taps / 11)
        assert float(found[i]) == pytest.approx(reference, abs=1e-10)


def test_the_definition_tells_a_wrong_constant() -> None:
    """Planted faults: another K1, another window."""
    truth, claim = random_images(5, 1, 1, 16, 16) * 0.1, random_images(6, 1, 1, 16, 16) * 0.1
    found = ssim(batch(claim), batch(truth))
    x, y = claim[0].numpy(), truth[0].numpy()
    assert abs(found - slow_ssim(x, y, taps=11, sigma=1.5, k1=0.1)) > 1e-3
    assert abs(found - slow_ssim(x, y, taps=7, sigma=1.5)) > 1e-3


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    truth, claim = random_images(7, 1, 3, 32, 32), random_images(8, 1, 3, 32, 32)
    reference = metrics.structural_similarity(
        claim[0].numpy(),
        truth[0].numpy(),
        data_range=1.0,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(batch(claim), batch(truth)) == pytest.approx(reference, abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(sorted(METRICS)))
def test_limits_symmetry_and_identity(seed: int, b: int, name: str) -> None:
    metric = METRICS[name]
    x, y = random_images(seed, b, 1, 8, 8), random_images(seed + 1, b, 1, 8, 8)
    forth, back = metric.each(x, y, (0.0, 1.0)), metric.each(y, x, (0.0, 1.0))
    assert torch.allclose(forth, back)
    low, high = metric.limits
    assert bool(((forth >= low) & (forth <= high)).all())
    same = metric.each(x, x, (0.0, 1.0))
    best = high if metric.higher_leaks else low
    assert same.tolist() == pytest.approx([best] * b)


def test_ssim_of_a_table_row_is_refused() -> None:
    with pytest.raises(InvalidInput, match="channels, height, width"):
        ssim(batch(torch.zeros(2, 5)), batch(torch.zeros(2, 5)))
