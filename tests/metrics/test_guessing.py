"""κ is never beaten by a guess, and is reached where it is claimed to be tight."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gradleak.metrics import SAME, best_guess, identified
from gradleak.metrics.align import squared_distances

BANK = torch.rand((12, 1, 3, 3), generator=torch.Generator().manual_seed(0)).double()
COPIES = torch.cat([BANK[:1], BANK[:1], BANK[:10]])
LABELS = torch.arange(12) % 3


def success(claims: Tensor, bank: Tensor) -> float:
    """Share of candidates that would be identified by any of the claims."""
    hits = [identified(claims[i : i + 1].expand_as(bank), bank, bank) for i in range(len(claims))]
    return float(torch.stack(hits).any(0).double().mean())


@pytest.mark.parametrize(("bank", "expected"), [(BANK, 1 / 12), (COPIES, 3 / 12)])
@pytest.mark.parametrize("guesses", [1, 2])
def test_no_claims_identify_more(bank: Tensor, expected: float, guesses: int) -> None:
    (kappa,) = best_guess(bank, [SAME], guesses=guesses)
    assert kappa == pytest.approx(guesses * expected)
    reached = max(success(bank[list(c)], bank) for c in itertools.combinations(range(12), guesses))
    assert reached <= kappa + 1e-12
    if guesses == 1:
        assert reached == pytest.approx(kappa)


@pytest.mark.parametrize("radius", [0.05, 0.2, 0.3, 0.5])
def test_no_claim_comes_within_a_radius_more_often(radius: float) -> None:
    """Against every candidate, every mean of two, and random claims: root mean square ≤ radius."""
    (kappa,) = best_guess(BANK, [(2 * radius) ** 2])
    pairs = torch.stack([(a + b) / 2 for a, b in itertools.product(BANK, BANK)])
    other = torch.rand((500, 1, 3, 3), generator=torch.Generator().manual_seed(1))
    claims = torch.cat([pairs, other])
    near = squared_distances(claims, BANK) <= radius**2
    assert float(near.double().mean(1).max()) <= kappa


def test_a_known_label_helps_the_guess() -> None:
    """Average over labels: classes / M. Knowing others narrows what is left."""
    assert best_guess(BANK, [SAME], labels=LABELS) == pytest.approx([3 / 12])
    assert best_guess(BANK, [SAME], others=3) == pytest.approx([1 / 9])
    assert best_guess(BANK, [SAME, 10.0], guesses=50) == [1.0, 1.0]
