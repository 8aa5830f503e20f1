"""ZLG: class counts in closed form from mean predictions (Geng et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.labels.rule import Dummies, Head, RuleAbout, apportioned
from gradleak.errors import NotApplicable
from gradleak.types import Observation

_PAPER = (
    "Geng, Mou, Li, Li, Beyan, Decker, Rong, Towards General Deep Leakage in Federated Learning, "
    "2021"
)
_LINK = "https://arxiv.org/abs/2110.09074"


@dataclass(frozen=True)
class ZLG:
    """k_c = b (p̄_c − s_c / ō), s the row sums of ∂L/∂W; p̄ and ō from the attacker's inputs.

    p̄ is their mean prediction and ō the mean sum of their features.
    """

    about: ClassVar[RuleAbout] = RuleAbout(
        id="zlg",
        title="Zero-shot label counts",
        paper=_PAPER,
        link=_LINK,
        claims="counts",
        assumes="the attacker's inputs excite the head and are predicted as the client's are",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head, own = Head.of(seen), Dummies.of(seen, generator=generator)
        scale = own.features.sum(1).mean()
        if not scale > 0:
            raise NotApplicable("zlg labels: the features of random inputs have no positive sum")
        shares = own.predictions.mean(0) - head.sums / scale
        return apportioned(head.size * shares, head.size)


@dataclass(frozen=True)
class BiasZLG:
    """k_c = b (p̄_c − ∂L/∂b_c): exact where p̄ is the client's mean prediction."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="bias-zlg",
        title="Zero-shot label counts from the head's bias",
        paper=_PAPER,
        link=_LINK,
        claims="counts",
        assumes="a bias; the attacker's inputs are predicted as the client's are",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head, own = Head.of(seen), Dummies.of(seen, generator=generator)
        return apportioned(head.size * (own.predictions.mean(0) - head.errors), head.size)
