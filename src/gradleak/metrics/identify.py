"""Picking the true example out of a bank of candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics.align import squared_distances

SAME = 1e-10
"""Mean squared difference below which two candidates are one (an 8-bit step in one of 3072
entries gives 5e-9)."""


def identified(claim: Tensor, truth: Tensor, bank: Tensor) -> Tensor:
    """Whether the candidate nearest to each claim is the true example.

    Under a claim that is independent of the truth, a bank of M exchangeable candidates gives a
    share of 1/M, and at most b/M where the claims of a batch were matched to its truths first.
    Ties count as misses; copies of the truth in the bank count as the truth.

    Args:
        claim: (b, *shape), aligned with the truth.
        truth: (b, *shape).
        bank: (M, *shape), the truths among them.

    Returns:
        (b,) bool.

    Raises:
        InvalidInput: shapes differ, a truth is not in the bank, or the bank holds nothing else.
    """
    if claim.shape != truth.shape or bank.shape[1:] != truth.shape[1:]:
        raise InvalidInput(
            f"claims {tuple(claim.shape)} and bank {tuple(bank.shape)}: expected examples of "
            f"shape {tuple(truth.shape[1:])}, one claim per truth"
        )
    same = squared_distances(truth, bank) < SAME
    if not bool(same.any(1).all()):
        raise InvalidInput("a true example is not in the bank: expected the truths among M")
    if not bool((~same).any(1).all()):
        raise InvalidInput("the bank holds only the true example: expected other candidates")
    distance = squared_distances(claim, bank)
    nearest_true = distance.masked_fill(~same, torch.inf).amin(1)
    nearest_other = distance.masked_fill(same, torch.inf).amin(1)
    return nearest_true < nearest_other
