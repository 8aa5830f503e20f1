"""A claim on a batch of which only some examples were found."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.errors import NotApplicable
from gradleak.types import Batch, Observation, Reconstruction


def claimed(
    seen: Observation,
    found: Tensor,
    message: str,
    *,
    rule: Callable[[Observation], Tensor] = known_or_recovered,
) -> Reconstruction:
    """Claim the examples found, and the middle of the box for the rest of the batch.

    Labels are those granted or recovered, as a multiset: nothing here ties one to an example.

    Args:
        seen: the observation.
        found: (k, *shape), the surest first; more than the batch holds are left out.
        message: one line of diagnosis.
        rule: labels of the batch.
    """
    size = seen.knowledge.batch_size or 1
    low, high = seen.data.bounds
    inputs = torch.full((size, *seen.data.shape), (low + high) / 2)
    kept = found[:size].detach().cpu().to(inputs).clamp(low, high)
    inputs[: len(kept)] = kept
    try:
        labels = rule(seen).cpu()
    except NotApplicable:
        labels = torch.zeros(size, dtype=torch.int64)
    batch = Batch(inputs, labels)
    if not len(kept):
        return Reconstruction(batch, math.nan, "no_solution", message=message)
    return Reconstruction(batch, math.nan, "solved", message=message)


def inside(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Which examples (n, *shape) lie in the box, but for rounding: (n,) bool."""
    low, high = bounds
    slack = 0.01 * (high - low)
    flat = images.flatten(1)
    return flat.isfinite().all(1) & (flat > low - slack).all(1) & (flat < high + slack).all(1)
