"""Soft labels of one example in closed form (after Wang et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.labels.rule import Head, RuleAbout
from gradleak.errors import NotApplicable
from gradleak.types import Observation

_GRID, _ZOOMS = 20_000, 4
_RANK = 1e-4
_FAR = 3.0


@dataclass(frozen=True)
class SoftLabels:
    """y = p − (∂L/∂W) ê/λ with the head's input e = λ ê, p = softmax(λ W ê + b), for one example.

    ∂L/∂W = (p − y) eᵀ gives the direction ê. With a bias |λ| = ‖∂L/∂W‖ / ‖∂L/∂b‖, its sign by
    ∂L/∂W ≈ ∂L/∂b eᵀ: exact for any label. Without one, λ > 0 is where y looks most like a mixture
    of two classes, or like one smoothed class: a grid over six decades, closer and closer.

    Args:
        kind: what a label is without a bias: "mixup" or "smoothing".
    """

    kind: str = "mixup"

    about: ClassVar[RuleAbout] = RuleAbout(
        id="soft-labels",
        title="Soft labels in closed form",
        paper="Wang, Hu, Zhang, Wang, Ma, Zhu, Tao, Towards Eliminating Hard Label Constraints in "
        "Gradient Inversion Attacks, ICLR 2024",
        link="https://arxiv.org/abs/2402.03124",
        claims="soft",
        assumes="one example; without a bias, non-negative features and a known form of label",
        deviations=("a grid of λ instead of the published search; the bias is used where it is",),
    )

    def __post_init__(self) -> None:
        if self.kind not in _UNLIKE:
            raise NotApplicable(f"soft labels of kind {self.kind!r}: expected mixup or smoothing")

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        if head.size != 1:
            raise NotApplicable(f"soft-labels: the rule holds for one example, not {head.size}")
        left, strengths, right = torch.linalg.svd(head.weight_gradient, full_matrices=False)
        if len(strengths) > 1 and strengths[1] > _RANK * strengths[0]:
            raise NotApplicable("soft-labels: the head's gradient is not that of one example")
        scaled, direction = left[:, 0] * strengths[0], right[0]
        offset = 0.0 if head.bias is None else head.bias
        logits = head.weight @ direction
        if head.bias_gradient is not None:
            length = scaled @ head.bias_gradient / (head.bias_gradient @ head.bias_gradient)
            predicted: Tensor = (length * logits + offset).softmax(0)
            return (predicted - head.bias_gradient)[None]
        if direction.sum() < 0:
            scaled, logits = -scaled, -logits

        def labels(lengths: Tensor) -> Tensor:
            found: Tensor = (lengths[:, None] * logits + offset).softmax(1)
            found -= scaled / lengths[:, None]
            return found

        low, high = -_FAR, _FAR
        for _ in range(_ZOOMS):
            exponents = torch.linspace(low, high, _GRID, dtype=torch.float64)
            best = int(_UNLIKE[self.kind](labels(10**exponents)).argmin())
            low, high = (float(exponents[max(0, min(_GRID - 1, best + d))]) for d in (-2, 2))
        return labels(10 ** exponents[best : best + 1])


def _unlike_mixup(labels: Tensor) -> Tensor:
    """What is left beside the two largest entries, and what is negative."""
    rest = labels.sort(1).values[:, :-2]
    return (rest**2).sum(1) + (labels.clamp(max=0) ** 2).sum(1)


def _unlike_smoothing(labels: Tensor) -> Tensor:
    """Spread of all entries but the largest, and what is negative."""
    rest = labels.sort(1).values[:, :-1]
    return rest.var(1) + (labels.clamp(max=0) ** 2).sum(1)


_UNLIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "mixup": _unlike_mixup,
    "smoothing": _unlike_smoothing,
}
