"""Distances between a claim and the truth, example by example and averaged over a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from gradleak.errors import InvalidInput
from gradleak.metrics.align import matched
from gradleak.types import Batch

PSNR_CEILING_DB = 200.0
"""PSNR of an exact claim: errors below 1e-20 in the mean square are rounding, not leakage."""

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per example that says how close a claim is to the truth.

    Attributes:
        id: key in scores and results.
        title: name for readers.
        unit: unit of the values, "" if they have none.
        higher_leaks: whether a larger value means more leakage.
        limits: smallest and largest value possible.
        images_only: whether examples must be (channels, height, width).
        each: (claim (b, *shape), truth (b, *shape), bounds) -> (b,), claims already aligned.
    """

    id: str
    title: str
    unit: str
    higher_leaks: bool
    limits: tuple[float, float]
    images_only: bool
    each: Callable[[Tensor, Tensor, Bounds], Tensor]


def _unit(inputs: Tensor, bounds: Bounds) -> Tensor:
    """Map inputs from their bounds to [0, 1] in float64, clamped."""
    low, high = bounds
    return ((inputs.detach().to("cpu", torch.float64) - low) / (high - low)).clamp(0.0, 1.0)


def mse_each(claim: Tensor, truth: Tensor, bounds: Bounds) -> Tensor:
    """Mean squared error of each example on the [0, 1] scale, (b,)."""
    return (_unit(claim, bounds) - _unit(truth, bounds)).square().flatten(1).mean(1)


def psnr_each(claim: Tensor, truth: Tensor, bounds: Bounds) -> Tensor:
    """PSNR of each example in dB, (b,): −10 log10(MSE) with peak 1 on [0, 1], claims clamped.

    An exact claim reads `PSNR_CEILING_DB`, so that every score is finite.
    """
    floor = 10 ** (-PSNR_CEILING_DB / 10)
    return -10 * mse_each(claim, truth, bounds).clamp_min(floor).log10()


def ssim_window(height: int, width: int) -> Tensor:
    """Gaussian window of SSIM for images of this size, 1-dimensional with sum 1.

    Eleven taps of standard deviation 1.5 as published. An image whose shorter side is below 11
    gets the largest odd number of taps that fits, and the deviation shrinks in proportion
    (8x8: 7 taps, 0.95).
    """
    side = min(11, height, width)
    taps = side - 1 + side % 2
    offset = torch.arange(taps, dtype=torch.float64) - taps // 2
    weight = (-(offset**2) / (2 * (1.5 * taps / 11) ** 2)).exp()
    return weight / weight.sum()


def ssim_each(claim: Tensor, truth: Tensor, bounds: Bounds) -> Tensor:
    """Structural similarity of each image, (b,), in [−1, 1].

    Mean over the channels and over every position where the whole window fits, with
    K1 = 0.01, K2 = 0.03, peak 1 and population (not sample) moments.

    Args:
        claim: (b, channels, height, width).
        truth: (b, channels, height, width).
        bounds: smallest and largest value of an entry.

    Raises:
        InvalidInput: the examples are not (channels, height, width).

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, equations 13 to 17.
    """
    if truth.ndim != 4:
        raise InvalidInput(
            f"SSIM of examples {tuple(truth.shape[1:])}: expected (channels, height, width)"
        )
    b, channels, height, width = truth.shape
    window = ssim_window(height, width)
    x = _unit(claim, bounds).reshape(b * channels, 1, height, width)
    y = _unit(truth, bounds).reshape(b * channels, 1, height, width)

    def local_mean(values: Tensor) -> Tensor:
        return conv2d(conv2d(values, window.reshape(1, 1, -1, 1)), window.reshape(1, 1, 1, -1))

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x**2
    variance_y = local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.reshape(b, -1).mean(1)


def mse(claim: Batch, truth: Batch, *, bounds: Bounds = (0.0, 1.0)) -> float:
    """Mean squared error after alignment on the [0, 1] scale, averaged over the batch."""
    return _mean(mse_each, claim, truth, bounds)


def psnr_db(claim: Batch, truth: Batch, *, bounds: Bounds = (0.0, 1.0)) -> float:
    """PSNR after alignment in dB (peak 1 on [0, 1], claims clamped), averaged over the batch."""
    return _mean(psnr_each, claim, truth, bounds)


def ssim(claim: Batch, truth: Batch, *, bounds: Bounds = (0.0, 1.0)) -> float:
    """Structural similarity after alignment, averaged over the batch."""
    return _mean(ssim_each, claim, truth, bounds)


def _mean(
    each: Callable[[Tensor, Tensor, Bounds], Tensor], claim: Batch, truth: Batch, bounds: Bounds
) -> float:
    ordered, _ = matched(claim, truth, bounds=bounds)
    return float(each(ordered, truth.inputs, bounds).mean())


METRICS: dict[str, Metric] = {
    metric.id: metric
    for metric in (
        Metric("psnr_db", "PSNR", "dB", True, (0.0, PSNR_CEILING_DB), False, psnr_each),
        Metric("ssim", "SSIM", "", True, (-1.0, 1.0), True, ssim_each),
        Metric("mse", "MSE", "", False, (0.0, 1.0), False, mse_each),
    )
}
