"""How often a guess without the update succeeds: κ, on which every ceiling stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.metrics.align import squared_distances

_ROWS = 256
"""Candidates compared with all others at a time."""


def best_guess(
    bank: Tensor,
    spans: Sequence[float],
    *,
    labels: Tensor | None = None,
    guesses: int = 1,
    others: int = 0,
) -> list[float]:
    """κ: the most that claims made without the update can hit a private example of the bank.

    A claim covers the candidates that it would be a hit for, and they lie within a span of each
    other: of copies for identification, of 2δ for a reconstruction within δ (whatever the claim,
    by the triangle inequality). No claim covers more than the densest candidate has neighbours.

    Args:
        bank: (M, *shape); the private example is any of them, equally likely.
        spans: mean squared distances per entry.
        labels: (M,), where the attacker knows the label of the example; κ is then its average.
        guesses: claims, of which the auditor takes the best.
        others: examples of the bank that are known not to be the one.

    Returns:
        κ in (0, 1] for each span.
    """
    inputs = bank.flatten(1)
    classes = torch.zeros(len(bank), dtype=torch.int64) if labels is None else labels
    total = [0.0] * len(spans)
    for c in set(classes.tolist()):
        same = inputs[classes == c]
        densest = [0] * len(spans)
        for start in range(0, len(same), _ROWS):
            distance = squared_distances(same[start : start + _ROWS], same)
            densest = [
                max(most, int((distance <= s).sum(1).max())) for most, s in zip(densest, spans)
            ]
        left = max(len(same) - others, 1)
        for i, most in enumerate(densest):
            total[i] += len(same) / len(bank) * min(1.0, guesses * most / left)
    return total
