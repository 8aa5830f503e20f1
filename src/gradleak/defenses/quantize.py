"""Stochastic quantisation of every tensor by its norm (QSGD, Alistarh et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.dithered import Dithered, misplaced
from gradleak.defenses.sheet import Sheet
from gradleak.errors import InvalidInput
from gradleak.types import Mechanism, Update

_TRIED = 16
"""Levels that the smallest value sent may stand at: nearly always the first."""
_ROUNDING = 1e-2


@dataclass(frozen=True)
class Quantize:
    """ũ_j = ‖u‖ sign(u_j) ξ_j, ξ_j one of 0, 1/levels, ..., 1 with mean |u_j| / ‖u‖ (Eq. 3-4).

    This is QSGD. The norm is that of each tensor. It leaves the client exactly, so only noise after
    it gives a density: two atoms around each coordinate of the claim, on the grid of the claim's
    own norm. Without noise the levels have a probability given the grid, which the update shows.

    Args:
        levels: positive points of the grid.
        norm: "l2", or "max" as in ROG's code: a finer grid, with fewer zeros.
    """

    levels: int = 16
    norm: Literal["l2", "max"] = "l2"

    id: ClassVar[str] = "quantize"
    title: ClassVar[str] = "Stochastic quantisation"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Alistarh et al., QSGD, NeurIPS 2017",
        link="https://arxiv.org/abs/1610.02132",
        promises="Few bits of every coordinate leave the client.",
        broken_by=(
            "plain matching, as the expectation is the update; the probability of every level "
            "given the grid, for searches that use it"
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
        """‖u‖ / levels for every tensor."""
        tiny = {k: torch.finfo(v.dtype).tiny for k, v in values.items()}
        if self.norm == "max":
            return {k: v.abs().amax().clamp(min=tiny[k]) / self.levels for k, v in values.items()}
        squares = {k: (v**2).sum() for k, v in values.items()}
        return {k: s.clamp(min=tiny[k]).sqrt() / self.levels for k, s in squares.items()}

    def shown(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step that each tensor shows: the largest that all its values are multiples of."""
        return {k: self._shown(v) for k, v in update.items()}

    def _shown(self, sent: Tensor) -> Tensor:
        tiny = torch.finfo(sent.dtype).tiny
        if self.norm == "max":
            return sent.abs().amax().clamp(min=tiny) / self.levels
        least = sent.abs().masked_fill(sent == 0, torch.inf).amin()
        least = torch.where(least.isfinite(), least, torch.ones_like(least)).clamp(min=tiny)
        steps = least / torch.arange(1, min(self.levels, _TRIED) + 1).to(sent)
        scaled = sent.flatten() / steps[:, None]
        fits = (scaled - scaled.round()).abs().amax(1) < _ROUNDING
        return steps.gather(0, fits.to(torch.uint8).argmax(0, keepdim=True))[0]
