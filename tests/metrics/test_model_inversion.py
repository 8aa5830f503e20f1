"""Attack accuracy and feature distance against brute force."""

from __future__ import annotations

import pytest
import torch

from gradleak.errors import InvalidInput
from gradleak.metrics.model_inversion import named, nearest_distances


def test_a_class_is_named_where_so_few_logits_are_as_large() -> None:
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=stream)
    labels = torch.randint(7, (50,), generator=stream)
    for k in (1, 3, 7):
        brute = [
            int(y) in row.argsort(descending=True)[:k].tolist() for row, y in zip(logits, labels)
        ]
        assert named(logits, labels, k=k).tolist() == brute
    assert bool(named(logits, labels, k=7).all())


def test_a_network_that_says_nothing_names_no_class() -> None:
    """Ties would otherwise make a dead evaluation network agree with every claim."""
    assert not bool(named(torch.zeros(4, 10), torch.arange(4), k=5).any())


def test_distances_are_to_the_nearest_private_image_of_the_same_class() -> None:
    stream = torch.Generator().manual_seed(1)
    claims, private = (torch.randn(n, 4, generator=stream).double() for n in (9, 30))
    meant, labels = torch.arange(9) % 3, torch.arange(30) % 3
    found = nearest_distances(claims, meant, private, labels)
    for row, y in enumerate(meant):
        brute = min(((claims[row] - p) ** 2).sum().item() for p in private[labels == y])
        assert found[row].item() == pytest.approx(brute, rel=1e-9)
    exact = nearest_distances(private, labels, private, labels)
    assert exact.max().item() == pytest.approx(0, abs=1e-12)
    # Of another class, the same features are not near.
    assert nearest_distances(private, (labels + 1) % 3, private, labels).min().item() > 1e-3


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InvalidInput, match="k from 1"):
        named(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), k=4)
    with pytest.raises(InvalidInput, match="class 2"):
        nearest_distances(
            torch.zeros(1, 2), torch.tensor([2]), torch.zeros(1, 2), torch.tensor([0])
        )
    with pytest.raises(InvalidInput, match="features"):
        nearest_distances(
            torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 3), torch.tensor([0])
        )
