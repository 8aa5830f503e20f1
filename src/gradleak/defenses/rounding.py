"""Rounding to a grid of fixed step, to the nearest point or by a coin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.dithered import Dithered, misplaced
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Mapped, Noise, Separable, log_mass, noise_inside
from gradleak.mechanisms.client import check_positive
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update

_LEAST = 1e-3


@dataclass(frozen=True)
class Round:
    """ũ_j = step · round(u_j / step): the update shows the cell that each coordinate lies in.

    Args:
        step: width of the grid, in units of the update.
        rounding: "nearest", or "stochastic" to one of the two neighbours with mean u_j.
    """

    step: float = 0.001
    rounding: Literal["nearest", "stochastic"] = "nearest"

    id: ClassVar[str] = "round"
    title: ClassVar[str] = "Rounding to a grid"
    sheet: ClassVar[Sheet] = Sheet(
        paper="no paper: fixed-point transport",
        link="",
        promises="Nothing; digits below the grid do not leave the client.",
        broken_by="the interval that each value stands for",
        cost="none for fine grids; saves bytes",
    )

    def __post_init__(self) -> None:
        check_positive(step=self.step)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return (_Nearest if self.rounding == "nearest" else _Coins)(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        most = 0.5 if self.rounding == "nearest" else 1.0
        return misplaced(before, after, self.steps(after.values), most=most)

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round to the nearest; the gradient is that of no rounding, a direction to search in."""
        return {
            k: self.step * (v / self.step).detach().round() + (v - v.detach())
            for k, v in values.items()
        }

    def steps(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Width of the grid for every tensor."""
        return {k: torch.full((), self.step).to(v) for k, v in values.items()}


@dataclass(frozen=True)
class _Nearest(Mapped):
    rule: Round

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """What was received, plus the way from its cell to the claim: nothing inside the cell."""
        clean = self.inner.predict(received, state, batch)
        half = self.rule.step / 2
        cells = {k: (received.values[k] - half, received.values[k] + half) for k in clean.values}
        outside = {
            k: received.values[k] + (v - torch.clamp(v, *cells[k])) for k, v in clean.values.items()
        }
        return Update(outside, clean.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        """Probability of the cells, against counting measure on the grid."""
        if self.deterministic:
            return super().likelihood(batch_size=batch_size)
        centre, noise = noise_inside(self.inner, batch_size=batch_size)
        return Likelihood(centre, _Cells(noise, self.rule.step))


@dataclass(frozen=True)
class _Cells(Separable):
    """P(c_j + noise within half a step of u_j), for updates on the grid."""

    noise: Noise
    step: float

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        half = self.step / 2
        return {
            k: log_mass(self.noise, update[k] - half - c, update[k] + half - c)
            for k, c in centre.items()
        }


@dataclass(frozen=True)
class _Coins(Dithered):
    rule: Round

    def likelihood(self, *, batch_size: int) -> Likelihood:
        """Probability of the points, against counting measure on the grid."""
        if not self.inner.deterministic:
            return super().likelihood(batch_size=batch_size)
        return Likelihood(self.inner, _Points(self.rule.step))


@dataclass(frozen=True)
class _Points(Separable):
    """1 − |u_j − c_j| / step on the two neighbours of c_j, for updates on the grid.

    Below a thousandth the logarithm goes on as its tangent, for a search to find its way back from
    claims that cannot be: the sum of probabilities is one to within a thousandth.
    """

    step: float

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        left = {k: 1 - (update[k] - c).abs() / self.step for k, c in centre.items()}
        return {
            k: v.clamp(min=_LEAST).log() + (v - _LEAST).clamp(max=0) / _LEAST
            for k, v in left.items()
        }
