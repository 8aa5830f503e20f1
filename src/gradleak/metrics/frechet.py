"""How far two clouds of features lie apart, each taken for a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import InvalidInput


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features (n, d) and (m, d).

        ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a^½ Σ_b Σ_a^½)^½

    Covariances are unbiased. The FID is this on the features of one Inception network; on other
    features it is another number, comparable only within those features. It is biased upwards
    at few examples (fewer than d: strongly), so compare at equal n alone.

    Raises:
        InvalidInput: fewer than two examples, features of different sizes, or not finite.

    Source: Dowson and Landau 1982; Heusel et al., NeurIPS 2017, equation 6.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InvalidInput(
            f"features {tuple(a.shape)} and {tuple(b.shape)}: expected (n, d) and (m, d), "
            "at least two examples each"
        )
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise InvalidInput("features are not finite: no Gaussian fits them")
    (mean_a, root), (mean_b, other) = _rooted(a), _rooted(b)
    # tr (Σ_a^½ Σ_b Σ_a^½)^½ is the sum of the singular values of Σ_b^½ Σ_a^½.
    shared = torch.linalg.svdvals(other @ root).sum()
    apart = (mean_a - mean_b).square().sum()
    found = apart + root.square().sum() + other.square().sum() - 2 * shared
    return float(found.clamp(min=0))


def _rooted(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and the symmetric root of the covariance (d, d), in float64."""
    known = features.detach().cpu().double()
    mean = known.mean(0)
    centred = known - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(known) - 1))
    return mean, vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)
