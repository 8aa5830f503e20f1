"""Additive noise on the whole update. Without clipping it has no (ε, δ): it is not DP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.wrapped import Wrapped, difference, norm
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.seeding import normal
from gradleak.types import Batch, Mechanism, ModelState, Update


@dataclass(frozen=True)
class GaussianNoise:
    """ũ = u + N(0, std²) on every coordinate.

    Args:
        std: standard deviation, in units of the update.
    """

    std: float = 0.01

    id: ClassVar[str] = "gaussian-noise"
    title: ClassVar[str] = "Gaussian noise"

    def __post_init__(self) -> None:
        _check_std(self.std)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Noised(mechanism, self) if self.std > 0 else mechanism

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return (self.std * normal(like.shape, generator=generator, dtype=like.dtype)).to(
            like.device
        )

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        return _doubt_std(before, after, std=self.std, kurtosis=3.0)

    def log_density(self, residual: Tensor) -> Tensor:
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -((residual / self.std) ** 2).sum() / 2 - residual.numel() * constant


@dataclass(frozen=True)
class LaplaceNoise:
    """ũ = u + Laplace(std/√2) on every coordinate, comparable to Gaussian noise at equal std.

    Args:
        std: standard deviation, in units of the update.
    """

    std: float = 0.01

    id: ClassVar[str] = "laplace-noise"
    title: ClassVar[str] = "Laplace noise"

    def __post_init__(self) -> None:
        _check_std(self.std)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Noised(mechanism, self) if self.std > 0 else mechanism

    @property
    def scale(self) -> float:
        """Laplace's b, the mean absolute deviation."""
        return self.std / math.sqrt(2)

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
        tail = torch.log1p(-2 * uniform.abs().clamp(max=0.5 - 2**-54))
        return (-self.scale * uniform.sign() * tail).to(like)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        return _doubt_std(before, after, std=self.std, kurtosis=6.0)

    def log_density(self, residual: Tensor) -> Tensor:
        return -residual.abs().sum() / self.scale - residual.numel() * math.log(2 * self.scale)


@dataclass(frozen=True)
class _Noised(Wrapped):
    rule: GaussianNoise | LaplaceNoise

    @property
    def deterministic(self) -> bool:
        return False

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        noisy = {k: v + self.rule.draw(v, generator) for k, v in clean.values.items()}
        return Update(noisy, clean.kind)

    def log_prob(self, update: Update, state: ModelState, batch: Batch) -> Tensor:
        if not self.inner.deterministic:
            raise IntractableLikelihood(f"{self.rule.id} on a random update: no exact density")
        mean = self.inner.mean(state, batch).values
        terms = [self.rule.log_density(update.values[k] - mean[k]) for k in mean]
        return torch.stack(terms).sum()


def _check_std(std: float) -> None:
    if not 0 <= std < math.inf:
        raise InvalidInput(f"std={std}: expected a number ≥ 0")


def _doubt_std(
    before: Update, after: Update, *, std: float, kurtosis: float
) -> tuple[str, float] | None:
    """Compare the root mean square of the noise with its claim, at 5 standard errors (P < 1e-6)."""
    n = sum(v.numel() for v in after.values.values())
    measured = norm(difference(after, before)) / math.sqrt(n)
    # Standard error of a root mean square: std/2 · sqrt((kurtosis − 1) / n).
    allowed = 5 * std / 2 * math.sqrt((kurtosis - 1) / n) + 1e-3 * std
    if abs(measured - std) <= allowed:
        return None
    return f"claims std {std:g} and adds {{:.3g}}", measured
