"""Additive noise on the whole update. Without clipping it has no (ε, δ): it is not DP."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Noise, Unbiased, difference, noised, norm, undefended
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms import FedSGD, summed
from gradleak.seeding import normal
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update


@dataclass(frozen=True)
class AdditiveNoise(ABC):
    """ũ = u + independent noise of standard deviation `std` on every coordinate."""

    std: float = 0.01
    scope: Literal["update", "example"] = "update"

    id: ClassVar[str]
    title: ClassVar[str]
    sheet: ClassVar[Sheet]
    kurtosis: ClassVar[float]

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise InvalidInput(f"std={self.std}: expected a number ≥ 0")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        if self.scope == "example" and not isinstance(undefended(mechanism), FedSGD):
            raise InvalidInput(f"{self.id}:scope=example: expected fedsgd as training")
        return _Noised(mechanism, self) if self.std > 0 else mechanism

    @abstractmethod
    def averaged(self, batch_size: int) -> Self:
        """Noise on the update that amounts to this noise on every example.

        Raises:
            IntractableLikelihood: it has another law.
        """

    @abstractmethod
    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Noise for one tensor."""

    @abstractmethod
    def log_density(self, residual: Tensor) -> Tensor:
        """Log-density of noise at every coordinate, in nats."""

    @abstractmethod
    def log_cdf(self, x: Tensor) -> Tensor:
        """Log-probability of noise below x at every coordinate, in nats."""

    def widened(self, factor: float) -> Self:
        """The same law, `factor` times as wide."""
        return replace(self, std=factor * self.std)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        n = sum(v.numel() for v in after.values.values())
        measured = norm(difference(after, before)) / math.sqrt(n)
        std = self.std
        if self.scope == "example" and measured > 0:  # as over the nearest number of examples
            std /= math.sqrt(max(1, round((std / measured) ** 2)))
        # Standard error of a root mean square: std/2 · √((kurtosis − 1) / n); 5 of them, P < 1e-6.
        allowed = 5 * std / 2 * math.sqrt((self.kurtosis - 1) / n) + 1e-3 * std
        if abs(measured - std) <= allowed:
            return None
        return f"claims std {std:g} and adds {{:.3g}}", measured


@dataclass(frozen=True)
class GaussianNoise(AdditiveNoise):
    """ũ = u + N(0, std²) on every coordinate.

    Args:
        std: standard deviation, in units of the update.
        scope: by "example", every example's gradient gets noise of its own before the mean over
            examples: std/√b on the update.
    """

    id: ClassVar[str] = "gaussian-noise"
    title: ClassVar[str] = "Gaussian noise"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019, section 5",
        link="https://arxiv.org/abs/1906.08935",
        promises=(
            "Single coordinates drown in noise. Without clipping it has no (ε, δ): it is not "
            "differential privacy."
        ),
        broken_by=(
            "the Gaussian likelihood with a prior (`bayes`): leakage falls gradually, and "
            "averages over rounds of the same batch"
        ),
        cost="accuracy, growing with the noise; no bytes, no time",
    )
    kurtosis: ClassVar[float] = 3.0

    def averaged(self, batch_size: int) -> Self:
        return replace(self, std=self.std / math.sqrt(batch_size), scope="update")

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return (self.std * normal(like.shape, generator=generator, dtype=like.dtype)).to(
            like.device
        )

    def log_density(self, residual: Tensor) -> Tensor:
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -((residual / self.std) ** 2) / 2 - constant

    def log_cdf(self, x: Tensor) -> Tensor:
        # By hand, for `log_ndtr` has no rule for `vmap` (seen in 2.13).
        z = torch.where(x < 0, -x, x) / (self.std * math.sqrt(2))
        beyond = torch.special.erfcx(z).log() - z**2 - math.log(2)
        return torch.where(x < 0, beyond, torch.log1p(-beyond.exp()))


@dataclass(frozen=True)
class LaplaceNoise(AdditiveNoise):
    """ũ = u + Laplace(std/√2) on every coordinate, comparable to Gaussian noise at equal std.

    Args:
        std: standard deviation, in units of the update.
        scope: by "example", every example's gradient gets noise of its own before the mean over
            examples, which is no longer Laplace: no likelihood above one example.
    """

    id: ClassVar[str] = "laplace-noise"
    title: ClassVar[str] = "Laplace noise"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019, section 5",
        link="https://arxiv.org/abs/1906.08935",
        promises="As Gaussian noise, with heavier tails; no (ε, δ) either.",
        broken_by=(
            "its likelihood, an L1 distance (`bayes`), beats the squared distance that most "
            "evaluations use"
        ),
        cost="accuracy, growing with the noise; no bytes, no time",
    )
    kurtosis: ClassVar[float] = 6.0

    @property
    def scale(self) -> float:
        """Laplace's b, the mean absolute deviation."""
        return self.std / math.sqrt(2)

    def averaged(self, batch_size: int) -> Self:
        if batch_size > 1:
            raise IntractableLikelihood(f"mean of {batch_size} Laplace draws: not Laplace")
        return replace(self, scope="update")

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
        tail = torch.log1p(-2 * uniform.abs().clamp(max=0.5 - 2**-54))
        return (-self.scale * uniform.sign() * tail).to(like)

    def log_density(self, residual: Tensor) -> Tensor:
        return -residual.abs() / self.scale - math.log(2 * self.scale)

    def log_cdf(self, x: Tensor) -> Tensor:
        beyond = torch.where(x < 0, x, -x) / self.scale - math.log(2)
        return torch.where(x < 0, beyond, torch.log1p(-beyond.exp()))


@dataclass(frozen=True)
class _Noised(Unbiased):
    rule: AdditiveNoise

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        draws = len(batch) if self.rule.scope == "example" else 1
        noisy = {
            k: v + sum(self.rule.draw(v, generator) for _ in range(draws)) / draws
            for k, v in clean.values.items()
        }
        return Update(noisy, clean.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        rule = self.rule
        return noised(self.inner, rule.averaged(batch_size) if rule.scope == "example" else rule)

    def pooled(self, clients: int) -> Mechanism | None:
        """Noise of n clients averages to std/√n; by example it does so with the joint batch."""
        if not isinstance(self.rule, GaussianNoise):
            return None
        rule = self.rule
        if rule.scope == "update":
            rule = rule.averaged(clients)
        return _Noised(summed(self.inner, clients), rule)

    def noised(self, noise: Noise) -> Likelihood:
        own = self.rule
        if (
            isinstance(noise, GaussianNoise)
            and isinstance(own, GaussianNoise)
            and own.scope == "update"
        ):
            return noised(self.inner, GaussianNoise(math.hypot(noise.std, own.std)))
        raise IntractableLikelihood("two kinds of noise on one update: no exact density")
