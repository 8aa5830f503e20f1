"""Rules that name the classes present, not how often: signs, row minima, separating vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from gradleak.attacks.labels.rule import Head, RuleAbout
from gradleak.errors import NotApplicable
from gradleak.types import Observation

_RANK = 1e-6


@dataclass(frozen=True)
class Signs:
    """{c: Σ_j ∂L/∂W_cj < 0}: with features e ≥ 0 only a class that is present can be negative."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="signs",
        title="iDLG's sign rule, for batches",
        paper="Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020",
        link="https://arxiv.org/abs/2001.02610",
        claims="set",
        assumes="non-negative features; a confident network turns the sum of a present class up",
        deviations=("the paper treats one example; the rule is applied to a batch as it stands",),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        negative = int((head.sums < 0).sum())
        return _set(head.sums.argsort(stable=True)[: min(head.size, negative)], head)


@dataclass(frozen=True)
class RowMin:
    """The b classes of the smallest min_j ∂L/∂W_cj (Yin et al., CVPR 2021, Eq. 6)."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="row-min",
        title="Row minima",
        paper="Yin et al., See through Gradients: Image Batch Recovery via GradInversion, "
        "CVPR 2021",
        link="https://arxiv.org/abs/2104.07586",
        claims="set",
        assumes="non-negative features; no class twice; at most as many examples as classes",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        return _set(head.weight_gradient.amin(1).argsort(stable=True)[: head.size], head)


@dataclass(frozen=True)
class Separating:
    """RLG: {c: a vector q has ⟨u_c, q⟩ < 0 < ⟨u_k, q⟩ for all k ≠ c}, u_c the rows of U.

    ∂L/∂W = U S Vᵀ has rank b, and every p_i − y_i is a mixture of the columns of U: negative in
    the class of the example alone. A linear programme per class decides whether such a mixture
    exists. It holds for features of any sign, and may find a mixture that is no example's.
    """

    about: ClassVar[RuleAbout] = RuleAbout(
        id="rlg",
        title="Separating vectors of the head's gradient (RLG)",
        paper="Dang, Thakkar, Ramaswamy, Mathews, Chin, Beaufays, Revealing and Protecting Labels "
        "in Distributed Training, NeurIPS 2021",
        link="https://arxiv.org/abs/2111.00556",
        claims="set",
        assumes="fewer examples than classes, linearly independent errors",
        deviations=(
            "the linear programme is solved for every class, without the published perceptron "
            "that sorts out some before it",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        classes = len(head.weight_gradient)
        if head.size >= classes:
            raise NotApplicable(
                f"rlg labels: {head.size} examples of {classes} classes: every class is separable"
            )
        left, strengths, _ = torch.linalg.svd(head.weight_gradient, full_matrices=False)
        rank = int((strengths[: head.size] > _RANK * strengths[0]).sum())
        rows = left[:, :rank].numpy()
        found = [c for c in range(classes) if _separable(rows, c)]
        return _set(torch.tensor(found, dtype=torch.int64), head)


def _separable(rows: np.ndarray[tuple[int, int], np.dtype[np.float64]], chosen: int) -> bool:
    """Whether some q is negative on one row and positive on all others."""
    signs = np.ones(len(rows))
    signs[chosen] = -1.0
    scale = np.abs(rows).max()
    outcome = linprog(
        np.zeros(rows.shape[1]),
        A_ub=-signs[:, None] * rows / scale,
        b_ub=-np.ones(len(rows)),
        bounds=(None, None),
        method="highs",
    )
    return bool(outcome.status == 0)


def _set(classes: Tensor, head: Head) -> Tensor:
    """One of each, and no more than there are examples."""
    counts = torch.zeros(len(head.weight_gradient), dtype=torch.int64)
    counts[classes[: head.size]] = 1
    return counts
