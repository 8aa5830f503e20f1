"""Labels of a head that separates into its examples, the exact rule of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.closed_form.disaggregate import disaggregate
from gradleak.attacks.labels.rule import Head, RuleAbout
from gradleak.errors import NotApplicable
from gradleak.types import Observation


@dataclass(frozen=True)
class SeparatedHead:
    """Ours: residuals p_i − y_i of every example, at any stage of training; see `disaggregate`."""

    about: ClassVar[RuleAbout] = RuleAbout(
        id="separated-head",
        title="Residuals of every example",
        paper="gradleak, this package",
        link="",
        claims="counts",
        assumes="a bias, the plain gradient, fewer examples than classes",
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        head = Head.of(seen)
        found = disaggregate(seen)
        if isinstance(found, str):
            raise NotApplicable(f"separated-head labels: {found}")
        return found.labels.bincount(minlength=len(head.weight))
