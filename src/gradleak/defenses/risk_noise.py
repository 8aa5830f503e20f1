"""Gaussian noise on the whole update, shared out over its tensors by their leakage risk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.noise import GaussianNoise
from gradleak.defenses.public_risk import OnPublicRisk, held
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Memory, Unbiased, advanced, difference, undefended
from gradleak.errors import IntractableLikelihood
from gradleak.mechanisms.client import check_positive
from gradleak.types import Batch, Density, Likelihood, Mechanism, ModelState, Update

_LEAST = 1e-6


@dataclass(frozen=True)
class RiskNoise(OnPublicRisk):
    """ũ = u + N(0, σ_l²) on every coordinate of tensor l, σ_l² ∝ R_l / √n_l.

    R_l² is the mean of ‖∂g_l/∂x‖_F² over public examples and n_l the size of tensor l, so that
    Σ_l R_l² / σ_l², the trace of the Fisher information that the update carries of its input, is
    least at the power of noise Σ_l n_l σ_l² = `std`² Σ_l n_l (Cauchy–Schwarz). There is nothing
    for the server to undo. A client that was told of no examples counts all coordinates alike,
    and so adds plain Gaussian noise. Without clipping there is no (ε, δ): it is not DP.

    Args:
        std: root mean square of the noise over all coordinates, in units of the update.
        refresh: rounds for which a client keeps the risks.
    """

    std: float = 0.01
    refresh: int = 500

    id: ClassVar[str] = "risk-noise"
    title: ClassVar[str] = "Gaussian noise by leakage risk"
    sheet: ClassVar[Sheet] = Sheet(
        paper="gradleak, this package",
        link="https://github.com/wangjunxiao/GradDefense",
        promises="of noise that costs the server alike, what tells least of the input to first "
        "order; nothing is exact, nothing secret but the draws. Not differential privacy",
        broken_by="the Gaussian likelihood with a prior (`posterior`, `bayes`): leakage falls "
        "gradually, and averages over rounds of the same batch",
        cost="accuracy, as Gaussian noise of equal power; risk every `refresh` rounds",
    )

    def __post_init__(self) -> None:
        check_positive(std=self.std, refresh=self.refresh)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return RiskNoised(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        gaps = difference(after, before).values.values()
        powers = [(float(v.double().square().sum()), v.numel()) for v in gaps]
        total = sum(p for p, _ in powers)
        measured = math.sqrt(total / sum(n for _, n in powers))
        # Var Σ e² = Σ 2 n σ⁴, with every tensor's share of Σ n σ² as it is measured. 5 of them.
        error = math.sqrt(sum(2 * p**2 / n for p, n in powers)) / (2 * total) if total else 0.0
        if abs(measured - self.std) <= self.std * (5 * error + 1e-3):
            return None
        return f"claims std {self.std:g} and adds {{:.3g}}", measured

    def risks(self, state: ModelState, core: Mechanism) -> tuple[float, ...]:
        """R_l of every tensor, in the state's order."""
        if self.public is None:
            return tuple(math.sqrt(p.numel()) for p in state.params.values())
        return self.measured(state, core)

    def allotted(self, risks: Sequence[float], state: ModelState) -> dict[str, float]:
        """σ_l of every tensor; of one without any risk, that of a millionth of the largest."""
        sizes = [p.numel() for p in state.params.values()]
        shares = [r / math.sqrt(n) for r, n in zip(risks, sizes, strict=True)]
        least = _LEAST * max(shares) or 1.0
        shares = [max(s, least) for s in shares]
        unit = sum(sizes) / sum(n * s for n, s in zip(sizes, shares, strict=True))
        return {
            k: self.std * math.sqrt(unit * s) for k, s in zip(state.params, shares, strict=True)
        }


@dataclass(frozen=True)
class RiskNoised(Unbiased):
    rule: RiskNoise

    def stds(self, state: ModelState) -> dict[str, float]:
        """σ_l of every tensor."""
        return self.rule.allotted(self.rule.risks(state, undefended(self.inner)), state)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        return _noisy(clean, self.stds(state), generator)

    def advance(
        self, state: ModelState, batch: Batch, memory: Memory, *, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Keep the risks for `refresh` rounds."""
        clean, inside = advanced(self.inner, state, batch, memory, generator=generator)
        core = undefended(self.inner)
        risks, _, kept = held(
            self.rule.id, memory, self.rule.refresh, lambda: self.rule.risks(state, core)
        )
        update = _noisy(clean, self.rule.allotted(risks, state), generator)
        return update, {**inside, **kept}

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """As received, moved towards the claim by the least σ over σ_l: gaps count by 1/σ_l."""
        clean = self.inner.predict(received, state, batch).values
        stds = self.stds(state)
        least = min(stds.values())
        weighed = {k: v + (clean[k] - v) * (least / stds[k]) for k, v in received.values.items()}
        return Update(weighed, received.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        if not self.inner.deterministic:
            raise IntractableLikelihood(f"{self.rule.id} on a random update: no exact density")
        return Likelihood(self.inner, _ByTensor(self))


@dataclass(frozen=True)
class _ByTensor:
    """−log p of noise of every tensor's own width, at some state."""

    layer: RiskNoised
    stds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def at(self, state: ModelState) -> Density:
        """The density for one broadcast, on which the widths depend."""
        return replace(self, stds=self.layer.stds(state))

    def __call__(self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensor:
        terms = [
            GaussianNoise(std).log_density(update[k] - centre[k]).sum()
            for k, std in self.stds.items()
        ]
        return -torch.stack(terms).sum()


def _noisy(clean: Update, stds: Mapping[str, float], generator: torch.Generator) -> Update:
    noisy = {k: v + GaussianNoise(stds[k]).draw(v, generator) for k, v in clean.values.items()}
    return Update(noisy, clean.kind)
