"""Agreement of claimed labels with the true ones."""

from __future__ import annotations

import torch

from gradleak.types import Batch


def label_accuracy(claim: Batch, truth: Batch) -> float:
    """Share of labels recovered as a multiset: Σ_c min(claimed_c, true_c) / max(m, b).

    Soft labels count as their most probable class, rows with a non-finite entry as no label.
    Dividing by the larger batch keeps an attacker from gaining by claiming every class.
    """
    labels = claim.labels.detach().cpu()
    classes = claim.classes.detach().cpu()
    if labels.ndim == 2:
        classes = classes[labels.isfinite().all(1)]
    true = truth.classes.detach().cpu()
    overlap = sum(
        min(int((classes == c).sum()), int((true == c).sum())) for c in torch.unique(true).tolist()
    )
    return overlap / max(len(claim), len(truth), 1)
