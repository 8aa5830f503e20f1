"""One-to-one matching of claimed examples to true ones."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.types import Batch

MISSING = -1
"""Index that `align` gives to a true example for which nothing usable was claimed."""

_FORBIDDEN = 1e30


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference per entry between all pairs, in float64.

    Args:
        first: (m, *shape).
        second: (n, *shape).

    Returns:
        (m, n); computed from differences, so that near-equal pairs keep their precision.
    """
    x, y = (v.detach().to("cpu", torch.float64).flatten(1) for v in (first, second))
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / x.shape[1]


def align(claim: Batch, truth: Batch) -> Tensor:
    """Match claims to truths one to one, minimising the total squared error.

    A gradient does not depend on the order of its batch, so neither may a score. A claim with a
    non-finite entry is no claim; surplus claims are left unmatched.

    Args:
        claim: (m, *shape), in any order; m may differ from b.
        truth: (b, *shape).

    Returns:
        (b,) int64: the claim's row for each truth, `MISSING` where there is none.

    Raises:
        InvalidInput: the examples differ in shape.

    Source: Kuhn 1955 (the Hungarian method).
    """
    if claim.inputs.shape[1:] != truth.inputs.shape[1:]:
        raise InvalidInput(
            f"claimed examples of shape {tuple(claim.inputs.shape[1:])}: "
            f"expected {tuple(truth.inputs.shape[1:])}"
        )
    chosen = torch.full((len(truth),), MISSING, dtype=torch.int64)
    usable = claim.inputs.detach().cpu().flatten(1).isfinite().all(1).nonzero().flatten()
    if len(usable):
        cost = squared_distances(truth.inputs, claim.inputs.detach().cpu()[usable])
        rows, columns = linear_sum_assignment(cost.nan_to_num(_FORBIDDEN, _FORBIDDEN).numpy())
        chosen[torch.as_tensor(rows)] = usable[torch.as_tensor(columns)]
    return chosen


def matched(claim: Batch, truth: Batch, *, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Order the claims like the truths, clamp them to the bounds and fill the gaps.

    Returns:
        Inputs (b, *shape) in float64, the middle of the bounds where nothing was claimed, and
        (b,) bool: whether something was claimed.

    Raises:
        InvalidInput: the examples differ in shape.
    """
    low, high = bounds
    order = align(claim, truth)
    present = order != MISSING
    ordered = torch.full(truth.inputs.shape, (low + high) / 2, dtype=torch.float64)
    claimed = claim.inputs.detach().to("cpu", torch.float64)
    ordered[present] = claimed[order[present]].clamp(low, high)
    return ordered, present
