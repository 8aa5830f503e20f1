from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.errors import InvalidInput
from gradleak.metrics import MISSING, align, matched
from gradleak.types import Batch


def batch(inputs: torch.Tensor) -> Batch:
    return Batch(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def random_batch(seed: int, b: int) -> torch.Tensor:
    return torch.rand(b, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_a_shuffled_truth_is_recovered(seed: int, b: int) -> None:
    truth = random_batch(seed, b)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed + 1))
    found = align(batch(truth[order] + 1e-3), batch(truth))
    assert torch.equal(order[found], torch.arange(b))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_no_permutation_is_closer(seed: int, b: int) -> None:
    claim, truth = random_batch(seed, b), random_batch(seed + 1, b)

    def cost(order: tuple[int, ...] | list[int]) -> float:
        return float((claim[list(order)] - truth).square().sum())

    best = min(cost(order) for order in itertools.permutations(range(b)))
    assert cost(align(batch(claim), batch(truth)).tolist()) == pytest.approx(best)


def test_greedy_matching_would_be_worse() -> None:
    """Planted fault: nearest-first matching pairs 0.4 with 0.5 and pays 1.5 for the rest."""
    claim = batch(torch.tensor([[0.4], [1.5]]))
    truth = batch(torch.tensor([[0.5], [0.0]]))
    assert 0.1**2 + 1.5**2 > 0.4**2 + 1.0**2
    assert align(claim, truth).tolist() == [1, 0]


def test_missing_and_surplus_claims() -> None:
    truth = random_batch(0, 4)
    assert align(batch(truth[[2, 0]]), batch(truth)).tolist() == [1, MISSING, 0, MISSING]
    surplus = torch.cat([random_batch(1, 3), truth.flip(0)])
    assert align(batch(surplus), batch(truth)).tolist() == [6, 5, 4, 3]
    assert align(batch(truth[:0]), batch(truth)).tolist() == [MISSING] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_claim_is_no_claim(value: float) -> None:
    truth = random_batch(0, 3)
    claim = truth.clone()
    claim[1, 0, 0, 0] = value
    assert align(batch(claim), batch(truth)).tolist() == [0, MISSING, 2]
    inputs, present = matched(batch(claim), batch(truth), bounds=(0.0, 1.0))
    assert present.tolist() == [True, False, True]
    assert bool((inputs[1] == 0.5).all())


def test_other_shape_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"expected \(2, 3, 3\)"):
        align(batch(torch.zeros(1, 1, 3, 3)), batch(random_batch(0, 1)))
