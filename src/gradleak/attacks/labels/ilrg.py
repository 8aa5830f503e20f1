"""iLRG: instance-wise labels from the embedding each class implies (Ma et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from gradleak.attacks.labels.rule import Head, RuleAbout, apportioned
from gradleak.errors import NotApplicable
from gradleak.types import Observation

_SILENT = 1e-12


@dataclass(frozen=True)
class ILRG:
    """Counts k that mix the predictions of class embeddings into the bias's gradient.

        ê_c = ∂L/∂W_c / ∂L/∂b_c          p̂_c = softmax(W ê_c + b)
        Σ_c k_c = b                       Σ_c k_c p̂_c − k = b ∂L/∂b

    ê_c is the mean input of class c where others hardly predict c.
    """

    about: ClassVar[RuleAbout] = RuleAbout(
        id="ilrg",
        title="Instance-wise labels (iLRG)",
        paper="Ma, Sun, Cui, Li, Guo, Liu, Instance-wise Batch Label Restoration via Gradients in "
        "Federated Learning, ICLR 2023",
        link="https://openreview.net/forum?id=FIrQfNSOoTr",
        claims="counts",
        assumes="a bias; many classes, or inputs of the head alike within a class",
        deviations=(
            "least squares within 0 ≤ k ≤ b instead of a pseudo-inverse clipped afterwards, which "
            "leaves that range where classes are few",
            "a class whose bias has no gradient takes the mean of the other embeddings",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        errors = head.errors
        silent = errors.abs() < _SILENT
        if silent.all() or head.bias is None:
            raise NotApplicable("ilrg labels: the gradient of the head's bias is zero")
        embedded = head.weight_gradient / torch.where(silent, 1.0, errors)[:, None]
        embedded[silent] = embedded[~silent].mean(0)
        predicted = (embedded @ head.weight.T + head.bias).softmax(1)
        classes = len(errors)
        system = np.vstack([predicted.T.numpy() - np.eye(classes), np.ones((1, classes))])
        wanted = head.size * np.append(errors.numpy(), 1.0)
        found = lsq_linear(system, wanted, bounds=(0, head.size))
        return apportioned(torch.from_numpy(found.x), head.size)
