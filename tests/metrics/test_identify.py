from __future__ import annotations

import pytest
import torch
from scipy.stats import binom

from gradleak.errors import InvalidInput
from gradleak.metrics import identified

CANDIDATES = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_truth_is_picked_and_a_swap_is_not() -> None:
    truth = CANDIDATES[[3, 7]]
    assert identified(truth + 0.01, truth, CANDIDATES).tolist() == [True, True]
    assert identified(truth.flip(0), truth, CANDIDATES).tolist() == [False, False]


def test_a_tie_is_a_miss_and_a_copy_is_the_truth() -> None:
    bank = torch.tensor([[0.0], [1.0], [5.0]])
    assert identified(torch.tensor([[0.5]]), bank[:1], bank).tolist() == [False]
    copied = torch.tensor([[0.0], [0.0], [5.0]])
    assert identified(torch.tensor([[0.1]]), bank[:1], copied).tolist() == [True]


def test_precision_of_the_bank_does_not_matter() -> None:
    truth = CANDIDATES[:2].double()
    assert identified(truth, truth, CANDIDATES.float()).tolist() == [True, True]


@pytest.mark.parametrize("b", [1, 4])
def test_chance(b: int) -> None:
    """H0: claims independent of the truth give b/M at most; n = 3000 claims, alpha = 1e-6."""
    generator = torch.Generator().manual_seed(1)
    hits = n = 0
    for _ in range(3000 // b):
        rows = torch.randperm(20, generator=generator)[:b]
        claim = CANDIDATES[torch.randperm(20, generator=generator)[:b]]
        hits += int(identified(claim, CANDIDATES[rows], CANDIDATES).sum())
        n += b
    assert hits <= binom.isf(1e-6, n, 1 / 20), "without alignment the share is 1/M"
    assert hits >= binom.ppf(1e-6, n, 1 / 20)


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        (CANDIDATES[5:], "not in the bank"),
        (CANDIDATES[:1], "only the true example"),
        (torch.zeros(20, 1, 5, 5), r"shape \(1, 4, 4\)"),
    ],
)
def test_a_useless_bank_is_refused(bank: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        identified(CANDIDATES[:1], CANDIDATES[:1], bank)
