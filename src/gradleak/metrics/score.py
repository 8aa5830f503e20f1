"""All scores of one claim about one batch."""

from __future__ import annotations

from torch import Tensor

from gradleak.metrics.align import matched
from gradleak.metrics.identify import identified
from gradleak.metrics.image import METRICS
from gradleak.metrics.labels import label_accuracy
from gradleak.types import Batch, DataSpec


def score(
    claim: Batch, truth: Batch, *, bank: Tensor, spec: DataSpec, original: Batch | None = None
) -> dict[str, list[float]]:
    """Score a claim against the truth after one-to-one alignment.

    A true example for which nothing was claimed is scored as a mid-grey claim that identifies
    nobody: it stays in the denominator.

    Args:
        claim: (m, *shape), any order.
        truth: (b, *shape).
        bank: (M, *shape) candidates for identification, the truths among them.
        spec: form of the data; its bounds define peak 1.
        original: (b, *shape) the examples to identify, where the truth was made from them.

    Returns:
        A list of b values for each of `METRICS` and "identified" (0 or 1), in the order of the
        truth, and "label_accuracy" with one value.

    Raises:
        InvalidInput: shapes differ, or the bank lacks a truth.
    """
    inputs, present = matched(claim, truth, bounds=spec.bounds)
    scores = {
        name: metric.each(inputs, truth.inputs, spec.bounds).tolist()
        for name, metric in METRICS.items()
        if spec.modality == "image" or not metric.images_only
    }
    known = identified(inputs, (original or truth).inputs, bank) & present
    scores["identified"] = known.double().tolist()
    scores["label_accuracy"] = [label_accuracy(claim, truth)]
    return scores
