"""OUTPOST: prune, add noise where Fisher information is high, ever less often (INFOCOM 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.sparsify import TopK
from gradleak.defenses.wrapped import Counted
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.seeding import normal
from gradleak.types import Batch, Exchange, Mechanism, ModelState, Observation, Update


@dataclass(frozen=True)
class Outpost:
    """ũ = top(u) + mask ⊙ N(0, (scale · min(1, var θ_l))²) with probability 1 / (1 + decay · t).

    t is the number of the round from 0; `sample` is round 0, which is always perturbed. top keeps
    the 100 − prune % largest values of every tensor. The mask is of columns, mean_0 of u² taken as
    their Fisher information: the `noisy` % of highest information in the whole update.

    The published code computes all this and returns the gradient that it was given, and draws from
    one seed at every call; here the intended update is sent, with fresh noise.

    Source: Wang et al., "More than Enough is Too Much: Adaptive Defenses against Gradient
    Leakage in Production Federated Learning", INFOCOM 2023, and its code.

    Args:
        scale: of the noise.
        prune: percentage of every tensor's values that is dropped, in [0, 100).
        noisy: percentage of columns that get noise, in (0, 100].
        decay: of the probability, per round.
    """

    scale: float = 0.8
    prune: float = 80.0
    noisy: float = 40.0
    decay: float = 0.125

    id: ClassVar[str] = "outpost"
    title: ClassVar[str] = "OUTPOST"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Wang et al., More than Enough is Too Much: Adaptive Defenses against Gradient "
        "Leakage in Production Federated Learning, INFOCOM 2023",
        link="https://github.com/TL-System/plato",
        promises="protection where and when it is needed, hence less loss of accuracy",
        broken_by="waiting for a round whose coin left the update alone; before, matching what was "
        "neither pruned nor noised",
        cost="one pass over the update",
    )

    def __post_init__(self) -> None:
        for name, value, ok in (
            ("scale", self.scale, self.scale >= 0),
            ("prune", self.prune, 0 <= self.prune < 100),
            ("noisy", self.noisy, 0 < self.noisy <= 100),
            ("decay", self.decay, self.decay >= 0),
        ):
            if not ok:
                raise InvalidInput(f"{name}={value}: expected 0 or more, percentages below 100")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Perturbed(mechanism, self)

    @property
    def top(self) -> TopK:
        """What pruning leaves."""
        return TopK(1 - self.prune / 100, "tensor")

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        kept = self.top.map(before.values)
        wrong = size = 0
        for k, v in after.values.items():
            exact = (v == before.values[k]) | (v == 0)
            wrong += int((exact & (v != kept[k])).sum())
            size += v.numel()
        # Of equal values it may keep others.
        if wrong <= len(kept):
            return None
        return f"claims to prune {self.prune:g}% and leaves {{:.2%}} as it should not", wrong / size

    def loud(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which columns get noise, by tensor: bool, broadcast along its first axis."""
        fisher = {k: v.square().mean(0) for k, v in values.items()}
        return {k: v != 0 for k, v in TopK(self.noisy / 100).map(fisher).items()}

    def stds(self, state: ModelState) -> dict[str, Tensor]:
        """Standard deviation of the noise in every tensor."""
        spread = {k: p.var(correction=min(1, p.numel() - 1)) for k, p in state.params.items()}
        return {k: self.scale * v.clamp(max=1) for k, v in spread.items()}

    def gathered(self, seen: Observation) -> Observation:
        """The round with the fewest zeros: one that was left alone, if there is any."""
        return replace(seen, exchanges=(max(seen.exchanges, key=_nonzero),))


def _nonzero(exchange: Exchange) -> int:
    return sum(int(v.count_nonzero()) for v in exchange.update.values.values())


@dataclass(frozen=True)
class _Perturbed(Counted):
    rule: Outpost

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if not self.inner.deterministic:
            raise IntractableLikelihood("outpost of a random update: its mean has no closed form")
        clean = self.inner.mean(state, batch)
        return Update(self.rule.top.map(clean.values), clean.kind)

    def sent(
        self,
        clean: Update,
        state: ModelState,
        batch: Batch,
        *,
        earlier: int,
        generator: torch.Generator,
    ) -> Update:
        rule = self.rule
        coin = float(torch.rand((), generator=generator, dtype=torch.float64))
        if coin >= 1 / (1 + rule.decay * earlier):
            return clean
        sent, loud, stds = rule.top.map(clean.values), rule.loud(clean.values), rule.stds(state)
        for k, v in sent.items():
            noise = normal(v.shape, generator=generator, dtype=v.dtype).to(v.device)
            sent[k] = v + stds[k] * noise * loud[k]
        return Update(sent, clean.kind)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """Exact values where these were sent; noisy columns weigh less the noisier they are.

        A column without zeros is a noisy one, unless the update as a whole was left alone. Where
        pruned, what exceeds the smallest magnitude sent as it is.
        """
        clean, stds = self.inner.predict(received, state, batch), self.rule.stds(state)
        sent = {k: received.values[k] for k in clean.values}
        touched = pruned(sent)
        found = {}
        for k, v in clean.values.items():
            kept, u = sent[k] != 0, sent[k]
            loud = kept.all(0).expand_as(kept) & touched
            exact = kept & ~loud
            least = u.abs().masked_fill(~exact, torch.inf).amin()
            beyond = v.sign() * (v.abs() - least).clamp(min=0)
            power = (u.square() * loud).sum() / loud.sum().clamp(min=1)
            share = stds[k].to(u) ** 2 / power.clamp(min=torch.finfo(u.dtype).tiny)
            noisy = u + (1 - share).clamp(min=0) * (v - u)
            found[k] = torch.where(exact, v, torch.where(loud, noisy, beyond))
        return Update(found, clean.kind)


def pruned(sent: Mapping[str, Tensor]) -> Tensor:
    """Whether more than a hundredth is zero besides whole rows and columns: 0-dim bool."""
    zeros, size = [], []
    for v in sent.values():
        kept = (v != 0).reshape(v.shape[0] if v.ndim else 1, -1)
        alive = kept.any(1, keepdim=True) & kept.any(0, keepdim=True)
        zeros.append((alive & ~kept).sum())
        size.append(alive.sum())
    return torch.stack(zeros).sum() > 0.01 * torch.stack(size).sum()
