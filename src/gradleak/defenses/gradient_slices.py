"""Noise on randomly chosen slices of the update, of equal leakage risk (Wang et al., 2022)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.compensation import filtered, padded_shape, published_shape
from gradleak.defenses.noise import GaussianNoise
from gradleak.defenses.public_risk import OnPublicRisk, held
from gradleak.defenses.risk import cumulative, greedy
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import (
    Memory,
    Noise,
    Unbiased,
    advanced,
    difference,
    noise_inside,
    undefended,
)
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.mechanisms.client import check_positive, normalises
from gradleak.types import Batch, Density, Likelihood, Mechanism, ModelState, Update

_MOST_SUBSETS = 20_000


@dataclass(frozen=True)
class GradientSlices(OnPublicRisk):
    """ũ_j = u_j + N(0, std²) on `chosen` of `slices` slices of the flat update, u_j on the others.

    Slices follow the order of parameters and are of equal leakage risk, measured on public
    examples; a client that was told of none counts every coordinate alike. The server filters the
    mean update by the Marchenko–Pastur law. Slices that are not chosen leave the client as they
    are, and mostly determine the input: the adaptive attack compares those that fit best.

    `as-published` follows the authors' code: risk by a probe of ones, which is zero for the last
    layer; greedy slices that overlap; a filter told K² times the variance, K clients, that keeps
    both sides of the bulk. `corrected`: Hutchinson's estimator of the Frobenius norm; slices of
    equal cumulative risk; the variance of the mean; only what lies above the bulk.

    Source: Wang, Guo, Xie & Qi, "Protect Privacy from Gradient Leakage Attack in Federated
    Learning", INFOCOM 2022; details as in the code it was released with.

    Args:
        slices: number of slices; by "layer", one for every tensor.
        chosen: slices that get noise.
        std: of the noise, in units of the update (published code: 0.0005).
        mode: which formulas.
        by: slices of equal risk, or tensors.
        clip: bound on the norm of a chosen slice of one example's gradient (published code: std);
            only directly around fedsgd.
        compensate: whether the server filters the mean.
        aspect: rows per column of the matrix that it filters.
        seed: of a pattern that is part of the library, and so known to everybody (published code:
            0); None lets the client draw it.
        refresh: rounds for which a client keeps its slices.
    """

    slices: int = 10
    chosen: int = 5
    std: float = 0.1
    mode: Literal["as-published", "corrected"] = "corrected"
    by: Literal["risk", "layer"] = "risk"
    clip: float | None = None
    compensate: bool = True
    aspect: float = 6.0
    seed: int | None = None
    refresh: int = 500

    id: ClassVar[str] = "gradient-slices"
    title: ClassVar[str] = "Noise on random gradient slices"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Wang, Guo, Xie & Qi, Protect Privacy from Gradient Leakage Attack in Federated "
        "Learning, INFOCOM 2022",
        link="https://github.com/wangjunxiao/GradDefense",
        promises="a random pattern of noise that cannot be muted, at little cost in accuracy",
        broken_by="the slices that fit best: those without noise determine the input",
        cost="accuracy by the noise, and nearly all of it by the corrected filter at the server "
        "(compensate=false leaves it out); an evaluation of risk every `refresh` rounds",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.slices:
            raise InvalidInput(f"chosen={self.chosen}: expected 1 to slices={self.slices}")
        check_positive(std=self.std, aspect=self.aspect, refresh=self.refresh)
        if self.clip is not None:
            check_positive(clip=self.clip)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        if self.clip is not None and not isinstance(mechanism, FedSGD):
            raise InvalidInput(f"{self.id}:clip: expected it first, and fedsgd as training")
        return Sliced(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        gap = torch.cat([v.flatten() for v in difference(after, before).values.values()])
        changed = gap[gap != 0].double()
        if not len(changed):
            return None
        if len(changed) == len(gap) and self.chosen < self.slices and self.by == "risk":
            return "claims to spare some slices and changes {:.0%} of the coordinates", 1.0
        measured = float(changed.square().mean().sqrt())
        allowed = self.std * (5 / math.sqrt(2 * len(changed)) + 0.05)
        if self.clip is None and abs(measured - self.std) > allowed:
            return f"claims std {self.std:g} and adds {{:.3g}}", measured
        return None

    def compensated(self, values: Mapping[str, Tensor], *, clients: int) -> dict[str, Tensor]:
        """The mean of the updates of some clients, filtered."""
        if not self.compensate:
            return dict(values)
        flat = _flat(values)
        share = self.chosen / self.slices
        if self.mode == "as-published":
            mean = filtered(
                flat,
                variance=clients * share * self.std**2,
                shape=published_shape(len(flat), self.aspect),
                keep="outside",
            )
        else:
            mean = filtered(
                flat,
                variance=share * self.std**2 / clients,
                shape=padded_shape(len(flat), self.aspect),
                keep="above",
            )
        return _shaped(mean, values)

    def cut(self, risks: Sequence[float], sizes: list[int]) -> tuple[Tensor, ...]:
        """Coordinates of every slice of the flat update, for given risks of the tensors."""
        if self.by == "layer":
            return torch.split(torch.arange(sum(sizes)), sizes)
        return _cut(self.mode, tuple(risks), tuple(sizes), self.slices)

    def risks(self, state: ModelState, core: Mechanism) -> tuple[float, ...]:
        """Leakage risk of every tensor, in the state's order."""
        if self.public is None or self.by == "layer":
            return tuple(float(p.numel()) for p in state.params.values())
        return self.measured(state, core, published=self.mode == "as-published")

    def pattern(self, count: int, generator: torch.Generator, *, earlier: int = 0) -> list[int]:
        """Which of `count` slices get noise.

        Args:
            count: number of slices.
            generator: the client's.
            earlier: rounds that a known pattern has gone through.
        """
        if self.seed is not None:
            return self.known(count, earlier=earlier)
        return torch.randperm(count, generator=generator)[: self.chosen].tolist()

    def known(self, count: int, *, earlier: int = 0) -> list[int]:
        """The pattern of a known seed, by reservoir sampling from Python's generator."""
        stream = random.Random(self.seed)
        taken: list[int] = []
        for _ in range(earlier + 1):
            taken = list(range(min(self.chosen, count)))
            for item in range(self.chosen, count):
                place = stream.randint(1, item + 1)
                if place <= self.chosen:
                    taken[place - 1] = item
        return taken


@lru_cache(maxsize=64)
def _cut(
    mode: str, risks: tuple[float, ...], sizes: tuple[int, ...], slices: int
) -> tuple[Tensor, ...]:
    divide = greedy if mode == "as-published" else cumulative
    return tuple(divide(list(sizes), list(risks), slices))


@dataclass(frozen=True)
class Sliced(Unbiased):
    """A client under gradient slices.

    Attributes:
        suspects: slices that an attacker believes to hold noise; None lets every claim choose.
    """

    rule: GradientSlices
    suspects: tuple[int, ...] | None = None

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if self.rule.clip is None:
            return self.inner.mean(state, batch)
        slices = self.slices(state)
        if self.rule.seed is not None:
            return self._clipped(state, batch, slices, self.rule.known(len(slices)))
        if sum(map(len, slices)) > sum(p.numel() for p in state.params.values()):
            raise IntractableLikelihood("gradient-slices: clipped slices overlap, no mean")
        plain = self.inner.mean(state, batch).values
        clipped = self._clipped(state, batch, slices, range(len(slices))).values
        share = min(self.rule.chosen, len(slices)) / len(slices)
        return Update({k: v + share * (clipped[k] - v) for k, v in plain.items()}, self.kind)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        return self._noised(clean, state, batch, self.slices(state), generator=generator)

    def advance(
        self, state: ModelState, batch: Batch, memory: Memory, *, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Keep the risks for `refresh` rounds."""
        clean, inside = advanced(self.inner, state, batch, memory, generator=generator)
        core = undefended(self.inner)
        risks, rounds, kept = held(
            self.rule.id, memory, self.rule.refresh, lambda: self.rule.risks(state, core)
        )
        slices = self.rule.cut(risks, [p.numel() for p in state.params.values()])
        update = self._noised(clean, state, batch, slices, earlier=rounds, generator=generator)
        return update, {**inside, **kept}

    def slices(self, state: ModelState) -> tuple[Tensor, ...]:
        """Coordinates of every slice of the flat update."""
        risks = self.rule.risks(state, undefended(self.inner))
        return self.rule.cut(risks, [p.numel() for p in state.params.values()])

    def _noised(
        self,
        clean: Update,
        state: ModelState,
        batch: Batch,
        slices: Sequence[Tensor],
        *,
        earlier: int = 0,
        generator: torch.Generator,
    ) -> Update:
        noisy = self.rule.pattern(len(slices), generator, earlier=earlier)
        if self.rule.clip is not None and isinstance(self.inner, FedSGD):
            client, given = self.inner.settled(batch, generator=generator)
            clean = self._clipped(state, given, slices, noisy, client=client)
        flat = _flat(clean.values)
        index = torch.cat([slices[j] for j in sorted(noisy)])
        noise = self.rule.std * torch.randn(index.shape, generator=generator)
        flat = flat.index_add(0, index.to(flat.device), noise.to(flat))
        return Update(_shaped(flat, clean.values), clean.kind)

    def _clipped(
        self,
        state: ModelState,
        batch: Batch,
        slices: Sequence[Tensor],
        chosen: Sequence[int],
        *,
        client: FedSGD | None = None,
    ) -> Update:
        """Mean of examples' gradients with every chosen slice of each inside the bound.

        Args:
            client: that has drawn, where the batch carries its draws.
        """
        inner = client or self.inner
        if getattr(self.inner, "batch_norm", "eval") == "train" and normalises(state.model):
            raise InvalidInput("gradient-slices:clip: expected --batch-norm eval")
        bound = self.rule.clip or math.inf

        def one(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            values = inner.mean(state, Batch(x[None], y[None])).values
            flat = _flat(values)
            for j in sorted(chosen):
                length = flat[slices[j]].square().sum().clamp(min=torch.finfo(flat.dtype).tiny)
                scale = torch.ones_like(flat)
                scale[slices[j]] = (bound / length.sqrt()).clamp(max=1)
                flat = flat * scale
            return _shaped(flat, values)

        each = torch.func.vmap(one)(batch.inputs, batch.labels)
        return Update({k: v.mean(0) for k, v in each.items()}, self.kind)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """As received on the slices that are believed to hold noise.

        These are the suspects, or those of a known seed, or else the `chosen` ones whose
        coordinates the claim fits worst.
        """
        clean = self.inner.predict(received, state, batch)
        slices = self.slices(state)
        own, sent = _flat(clean.values), _flat(received.values)
        if (suspects := self.believed(slices)) is not None:
            noisy = torch.zeros(len(slices), dtype=torch.bool, device=own.device)
            noisy[list(suspects)] = True
        else:
            noisy = self._worst(own.detach() - sent, slices)
        covered = _spread(noisy, slices, own)
        return Update(_shaped(torch.where(covered, sent, own), clean.values), clean.kind)

    def believed(self, slices: Sequence[Tensor]) -> tuple[int, ...] | None:
        """Slices that hold noise, as far as that does not depend on a claim."""
        if self.suspects is not None or self.rule.seed is None:
            return self.suspects
        return tuple(self.rule.known(len(slices)))

    def misfits(self, received: Update, state: ModelState, batch: Batch) -> Tensor:
        """Mean square of what a claim leaves unexplained on every slice, (slices,)."""
        clean = self.inner.predict(received, state, batch)
        gap = _flat(difference(clean, received).values)
        return _mean_squares(gap, self.slices(state))

    def _worst(self, gap: Tensor, slices: Sequence[Tensor]) -> Tensor:
        """(slices,) bool."""
        order = _mean_squares(gap, slices).argsort(descending=True)
        rank = order.argsort()
        return rank < self.rule.chosen

    def likelihood(self, *, batch_size: int) -> Likelihood:
        if self.inner.deterministic:
            raise IntractableLikelihood("gradient-slices without other noise: the rest is exact")
        centre, noise = noise_inside(self.inner, batch_size=batch_size)
        return self._mixture(centre, noise)

    def noised(self, noise: Noise) -> Likelihood:
        if not self.inner.deterministic:
            return super().noised(noise)
        return self._mixture(self.inner, noise)

    def _mixture(self, centre: Mechanism, noise: Noise) -> Likelihood:
        if not isinstance(noise, GaussianNoise) or noise.scope != "update" or self.rule.clip:
            raise IntractableLikelihood("gradient-slices: exact with Gaussian noise alone")
        return Likelihood(centre, _Mixture(self, noise.std))


@dataclass(frozen=True)
class _Mixture:
    """−log of the mean of Π_j N(r_j; 0, σ² + m_j std²) over all patterns, at some state.

    m_j counts the chosen slices that hold coordinate j, and σ is that of the noise everywhere.
    """

    layer: Sliced
    std: float
    slices: tuple[Tensor, ...] = field(default=(), compare=False)

    def at(self, state: ModelState) -> Density:
        """The density for one broadcast, on which the slices depend."""
        return replace(self, slices=self.layer.slices(state))

    def __call__(self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensor:
        gap = _flat(update) - _flat({k: centre[k] for k in update})
        patterns = self._patterns(gap)
        held = torch.stack(
            [
                _spread(one, self.slices, gap)
                for one in torch.eye(len(self.slices), dtype=torch.bool, device=gap.device)
            ]
        ).to(gap)
        alone = held.sum(0) <= 1
        extra = self.layer.rule.std**2
        quiet = _log_normal(gap, self.std**2)
        gain = torch.where(alone, _log_normal(gap, self.std**2 + extra) - quiet, 0.0)
        total = quiet.sum() + patterns @ (held @ gain)
        shared = torch.nonzero(~alone).flatten()
        if len(shared):
            counts = patterns @ held[:, shared]
            noisy = _log_normal(gap[shared], self.std**2 + extra * counts)
            total = total + (noisy - quiet[shared]).sum(1)
        return math.log(len(patterns)) - total.logsumexp(0)

    def _patterns(self, like: Tensor) -> Tensor:
        """(patterns, slices) of zeros and ones."""
        n = len(self.slices)
        if (known := self.layer.believed(self.slices)) is None:
            return _subsets(n, min(self.layer.rule.chosen, n)).to(like)
        table = torch.zeros(1, n, dtype=like.dtype, device=like.device)
        table[0, list(known)] = 1
        return table


@lru_cache(maxsize=8)
def _subsets(n: int, k: int) -> Tensor:
    """Every k of n, (subsets, n) of zeros and ones."""
    if math.comb(n, k) > _MOST_SUBSETS:
        raise IntractableLikelihood(f"gradient-slices: {math.comb(n, k)} patterns are too many")
    chosen = torch.tensor(list(itertools.combinations(range(n), k)))
    return torch.zeros(len(chosen), n).scatter(1, chosen, 1.0)


def _log_normal(x: Tensor, variance: Tensor | float) -> Tensor:
    scale = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
    return -(x**2) / (2 * scale) - (2 * math.pi * scale).log() / 2


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in values.values()])


def _shaped(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split_with_sizes([v.numel() for v in like.values()])
    return {k: p.view(v.shape) for (k, v), p in zip(like.items(), parts, strict=True)}


def _mean_squares(gap: Tensor, slices: Sequence[Tensor]) -> Tensor:
    return torch.stack([gap[i].square().sum() / max(1, len(i)) for i in slices])


def _spread(noisy: Tensor, slices: Sequence[Tensor], like: Tensor) -> Tensor:
    """Which coordinates lie in a noisy slice, as `like` is shaped."""
    covered = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for flag, index in zip(noisy, slices, strict=True):
        inside = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        inside[index] = True
        covered = covered | (inside & flag)
    return covered
