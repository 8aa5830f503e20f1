from __future__ import annotations

import math

import pytest
import torch

from gradleak.metrics import label_accuracy
from gradleak.types import Batch


def labelled(labels: list[int] | torch.Tensor) -> Batch:
    given = torch.as_tensor(labels)
    return Batch(torch.zeros(len(given), 1), given)


@pytest.mark.parametrize(
    ("claim", "truth", "share"),
    [
        ([3, 1, 1], [1, 3, 1], 1.0),
        ([1, 1, 1], [1, 2, 3], 1 / 3),
        ([4], [5], 0.0),
        ([1], [1, 1], 0.5),
        ([0, 1, 2, 3], [2], 0.25),
    ],
)
def test_overlap_of_multisets(claim: list[int], truth: list[int], share: float) -> None:
    assert label_accuracy(labelled(claim), labelled(truth)) == pytest.approx(share)


def test_soft_labels_count_as_their_most_probable_class() -> None:
    soft = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    assert label_accuracy(labelled(soft), labelled([0, 1])) == 1.0
    soft[1, 1] = math.nan
    assert label_accuracy(labelled(soft), labelled([0, 1])) == 0.5
