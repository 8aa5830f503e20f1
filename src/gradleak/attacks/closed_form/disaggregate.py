"""Labels and head inputs of every example, from the averaged gradient of a linear head.

Two ways. The first needs ReLU features and is the more accurate one. With logits W h + b and
residuals e_i = p_i − onehot(y_i), the j-th column of ∂L/∂W is (1/B) Σ_i h_ij e_i with h_ij ≥ 0.
Where one example alone is active the column is parallel to that example's residual. So among
directions that columns repeat, those that are no mixture of the others are the residuals;
∂L/∂b = (1/B) Σ_i e_i gives their lengths, and least squares the h_i. The second way, for inputs of
any kind, asks for residuals that are the softmax of the inputs they imply (`factor`).

Exact for noise-free gradients, a bias, and fewer examples than classes. Outside that range no
batch explains the gradient, and none is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradleak.attacks.closed_form.factor import factored
from gradleak.attacks.parts.client import plain_client
from gradleak.attacks.parts.labels import sign_counts
from gradleak.types import Observation

_RADII = (1e-13, 1e-11, 1e-9, 1e-7, 1e-6, 1e-5)
"""Distances of unit columns at which they count as one direction, tried in order."""

_CANDIDATES = 64
_RECOUNTS = 12
_PROJECTED = 8
_TOLERANCE = 1e3
"""Residuals and features must explain the gradient within this many radii."""


@dataclass(frozen=True)
class Separated:
    """The head's inputs and errors, example by example.

    Attributes:
        residuals: (b, classes) p − onehot.
        features: (b, width) the head's inputs.
        rectified: whether these come from a ReLU, exactly zero where inactive.
    """

    residuals: Tensor
    features: Tensor
    rectified: bool = True

    @property
    def labels(self) -> Tensor:
        """(b,) int64."""
        return self.residuals.argmin(1)


def disaggregate(seen: Observation) -> Separated | str:
    """Separate the examples of a batch, or say why that cannot be done.

    Returns:
        In float64, whatever the precision of the update; in the order of the labels where these
        are granted, else in ascending order of label.
    """
    size = seen.knowledge.batch_size
    if size is None:
        return "the batch size is not granted"
    if size >= seen.data.classes:
        return (
            f"{size} residuals of {seen.data.classes} classes are linearly dependent: "
            f"expected at most {seen.data.classes - 1} examples"
        )
    client = plain_client(seen.mechanism)
    if client is None:
        return "the update is not the plain gradient of one batch"
    if client.loss is not cross_entropy:
        return "the client's loss is not cross-entropy"
    names = list(seen.state.params)[-2:]
    weight, bias = (seen.update.values[n].detach().double().cpu() for n in (names[0], names[-1]))
    if weight.ndim != 2 or bias.ndim != 1 or len(weight) != seen.data.classes:
        return "the network does not end in a linear layer of one unit a class, with a bias"
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return "the head's gradient holds non-finite values"
    if not weight.any():
        return "the head's gradient is zero"
    found = separate(weight, bias, size)
    if isinstance(found, str):
        factors = _factored(seen, names, weight, bias)
        if factors is None:
            return f"{found}; no residuals are the softmax of the inputs they imply"
        found = factors
    if seen.knowledge.labels is None:
        return found
    labels = seen.knowledge.labels.cpu()
    if not torch.equal(labels.sort().values, found.labels):
        return "the labels granted are not those of the examples that the head separates into"
    rank = labels.argsort(stable=True).argsort()
    return replace(found, residuals=found.residuals[rank], features=found.features[rank])


def _factored(
    seen: Observation, names: Sequence[str], weight: Tensor, bias: Tensor
) -> Separated | None:
    """The examples by the softmax, for the likeliest labels that the signs allow."""
    head = [seen.state.params[n].detach().double().cpu().numpy() for n in (names[0], names[-1])]
    given = seen.knowledge.labels
    likely = (sign_counts(seen) if given is None else given.cpu().sort().values).numpy()
    candidates = (
        [likely]
        if given is not None
        else [likely, *islice(_recounted(likely, bias.numpy()), _RECOUNTS)]
    )
    found = factored(weight.numpy(), bias.numpy(), head[0], head[1], candidates)
    if found is None:
        return None
    residuals, inputs = (torch.from_numpy(part) for part in found)
    return Separated(residuals, inputs, rectified=False)


def _recounted(
    labels: NDArray[np.int64], signal: NDArray[np.float64]
) -> Iterator[NDArray[np.int64]]:
    """The same with one of a repeated class given to another, that of the lowest signal first."""
    classes, counts = np.unique(labels, return_counts=True)
    for other in signal.argsort():
        for repeated in classes[counts > 1]:
            if repeated != other:
                moved = labels.copy()
                moved[np.flatnonzero(labels == repeated)[0]] = other
                yield np.sort(moved)


def separate(weight: Tensor, bias: Tensor, size: int) -> Separated | str:
    """The same for the head's gradients: weight (classes, width) and bias (classes,), float64."""
    length = weight.norm(dim=0)
    columns = weight[:, length > 1e-6 * length.max()]
    lengths = columns.norm(dim=0)
    directions = (columns / lengths).T.contiguous().numpy()
    count = 0
    for radius in _RADII:
        repeated = _repeated(directions, lengths.numpy(), radius)
        rays = _extreme(repeated, tolerance=max(1e-8, 10 * radius))
        count = max(count, len(rays))
        if len(rays) == size:
            found = _explained(weight, bias, rays, radius)
            if found is not None:
                return found
    return f"{count} directions repeat among the head's columns: expected {size}"


def _repeated(
    directions: NDArray[np.float64], lengths: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Directions shared by several columns, (found, classes), most frequent first."""
    points = directions
    if points.shape[1] > _PROJECTED:  # equal directions stay equal, others do not become so
        mixing = np.random.default_rng(0).standard_normal((points.shape[1], _PROJECTED))
        points = points @ mixing
    tree = cKDTree(points)
    near = tree.query_ball_point(points, radius * 4, return_length=True)
    free = near >= 2
    found: list[NDArray[np.float64]] = []
    for i in np.argsort(-near, kind="stable"):
        if not free[i]:
            continue
        if len(found) == _CANDIDATES:
            break
        members = np.asarray(tree.query_ball_point(points[i], radius * 4), dtype=np.intp)
        mean = lengths[members] @ directions[members]
        found.append(mean / np.linalg.norm(mean))
        around = np.linalg.norm(directions - directions[i], axis=1) < 100 * radius
        free[around] = False
    return np.array(found).reshape(len(found), directions.shape[1])


def _extreme(rays: NDArray[np.float64], *, tolerance: float) -> NDArray[np.float64]:
    """The rays that are no non-negative mixture of the others."""
    kept = list(range(len(rays)))
    for i in reversed(range(len(rays))):
        others = [j for j in kept if j != i]
        if others and nnls(rays[others].T, rays[i])[1] < tolerance:
            kept = others
    return rays[kept]


def _explained(
    weight: Tensor, bias: Tensor, rays: NDArray[np.float64], radius: float
) -> Separated | None:
    """Lengths and features for these directions, if they explain the whole gradient."""
    directions = torch.from_numpy(rays)
    size, close = len(rays), _TOLERANCE * radius
    scale = torch.linalg.lstsq(directions.T, bias[:, None], driver="gelsd").solution[:, 0]
    residuals = size * scale[:, None] * directions
    if (scale <= 0).any() or residuals.abs().max() > 1 + close:
        return None
    if ((residuals < -close).sum(1) != 1).any() or residuals.sum(1).abs().max() > close:
        return None
    features = torch.linalg.lstsq(residuals.T / size, weight, driver="gelsd").solution
    top = features.abs().max()
    gap = (residuals.T / size) @ features - weight
    bias_gap = residuals.mean(0) - bias
    if gap.norm() > close * weight.norm() or bias_gap.norm() > close * bias.norm():
        return None
    if features.min() < -close * top:
        return None
    noise = (-3 * features.min(1, keepdim=True).values).clamp(min=1e-10 * float(top))
    features = torch.where(features < noise, torch.zeros_like(features), features)
    order = residuals.argmin(1).argsort(stable=True)
    return Separated(residuals[order], features[order])
