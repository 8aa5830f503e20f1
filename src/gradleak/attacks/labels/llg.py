"""LLG: labels from gradients, a negative share at a time (Wainakh et al., PoPETs 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.labels.rule import Dummies, Head, RuleAbout
from gradleak.attacks.parts.labels import greedy
from gradleak.errors import NotApplicable
from gradleak.types import Observation

_PAPER = (
    "Wainakh, Ventola, Müßig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Mühlhäuser, "
    "User-Level Label Leakage from Gradients in Federated Learning, PoPETs 2022"
)
_LINK = "https://arxiv.org/abs/2105.09369"


@dataclass(frozen=True)
class LLG:
    """Σ_j ∂L/∂W_cj falls by m for every example of class c, m = (1 + 1/K)/b · Σ of the negative."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="llg",
        title="LLG, from the gradient alone",
        paper=_PAPER,
        link=_LINK,
        claims="counts",
        assumes="non-negative features; predictions near uniform",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        classes = len(head.sums)
        return greedy(head.sums, _negative(head.sums) * (1 + 1 / classes) / head.size, head.size)


@dataclass(frozen=True)
class BiasLLG:
    """The same of ∂L/∂b, where the size of the features plays no part; m without the 1/K."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="bias-llg",
        title="LLG on the head's bias",
        paper=f"{_PAPER}; on the bias as in breaching (Geiping et al.)",
        link=_LINK,
        claims="counts",
        assumes="a bias; predictions near uniform",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        return greedy(head.errors, _negative(head.errors) / head.size, head.size)


@dataclass(frozen=True)
class LLGStar:
    """LLG*: impact and offset of every class from the attacker's own inputs.

    Σ_j ∂L/∂W_cj = offset_c + k_c m_c for k_c examples of class c, where with σ the sum of the
    features of an input and p its prediction offset_c = mean of σ p_c and m_c = −mean of σ / b.
    """

    about: ClassVar[RuleAbout] = RuleAbout(
        id="llg-star",
        title="LLG*, impact and offset from the broadcast network",
        paper=_PAPER,
        link=_LINK,
        claims="counts",
        assumes="the attacker's inputs excite the head as the client's do",
        deviations=(
            "impact and offset are means over 64 random fields in closed form; the paper averages "
            "gradients of dummy batches of one label each",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head, own = Head.of(seen), Dummies.of(seen, generator=generator)
        lengths = own.features.sum(1)
        offset = (lengths[:, None] * own.predictions).mean(0)
        impact = -lengths.mean() / head.size
        if not impact < 0:
            raise NotApplicable(
                "llg-star labels: the features of random inputs have no positive sum"
            )
        return greedy(head.sums - offset, impact, head.size)


@dataclass(frozen=True)
class BiasCounts:
    """Ours: ∂L/∂b_c = mean of p_c − k_c/b, so that one example is exactly 1/b."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="bias-counts",
        title="Negative shares of the head's bias, 1/b an example",
        paper=f"gradleak, this package; {_PAPER}",
        link=_LINK,
        claims="counts",
        assumes="a bias; predictions alike in all classes",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        return greedy(head.errors, torch.tensor(-1.0 / head.size, dtype=torch.float64), head.size)


def _negative(signal: Tensor) -> Tensor:
    """The sum of the negative entries.

    Raises:
        NotApplicable: there is none.
    """
    total = signal[signal < 0].sum()
    if not total < 0:
        raise NotApplicable("llg labels: no class pulls its entry below zero")
    return total
