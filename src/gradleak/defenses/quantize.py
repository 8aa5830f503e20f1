"""Stochastic quantisation of every tensor by its norm (QSGD, Alistarh et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.dithered import Dithered, misplaced
from gradleak.defenses.sheet import Sheet
from gradleak.errors import InvalidInput
from gradleak.types import Mechanism, Update


@dataclass(frozen=True)
class Quantize:
    """ũ_j = ‖u‖₂ sign(u_j) ξ_j, ξ_j one of 0, 1/levels, ..., 1 with mean |u_j| / ‖u‖₂ (Eq. 3-4).

    The norm is that of each tensor. It leaves the client exactly, so only noise after it gives a
    density: two atoms around each coordinate of the claim, on the grid of the claim's own norm.

    Args:
        levels: positive points of the grid.
    """

    levels: int = 16

    id: ClassVar[str] = "quantize"
    title: ClassVar[str] = "Stochastic quantisation"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Alistarh et al., QSGD, NeurIPS 2017",
        link="https://arxiv.org/abs/1610.02132",
        promises="Few bits of every coordinate leave the client.",
        broken_by=(
            "the interval that each level stands for: a claim is compared with what would be "
            "rounded to the levels received"
        ),
        cost="variance at few levels; saves bytes",
    )

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise InvalidInput(f"levels={self.levels}: expected at least 1")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return Dithered(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        return misplaced(before, after, self.steps(before.values), most=1.0)

    def steps(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """‖u‖₂ / levels for every tensor."""
        squares = {k: (v**2).sum() for k, v in values.items()}
        tiny = {k: torch.finfo(v.dtype).tiny for k, v in values.items()}
        return {k: s.clamp(min=tiny[k]).sqrt() / self.levels for k, s in squares.items()}
