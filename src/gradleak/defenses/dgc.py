"""Deep gradient compression: what is not sent waits, with momentum (Lin et al., ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.clip import Clip
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.sparsify import TopK
from gradleak.defenses.wrapped import Memory, Wrapped
from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import check_positive
from gradleak.types import Batch, Exchange, Likelihood, Mechanism, ModelState, Observation, Update

_ROUND, _VELOCITY, _RESIDUAL = "round", "velocity/", "residual/"


@dataclass(frozen=True)
class DGC:
    """v ← momentum · v + clip(u), r ← r + v; send r on its top-k, and clear v and r there.

    A client's memory is the velocity v, the residual r and the number of the round; in its first
    round it sends the top-k of clip(u). Nothing is lost, only delayed: with momentum = 0 all that
    was sent and the residual add up to all gradients, which is top-k with error feedback.

    In warm-up round t of w the share sent is fraction^((t+1)/(w+1)): 25, 6.3, 1.6, 0.4 and then
    0.1 % for the published four.

    Source: Lin et al., "Deep Gradient Compression", ICLR 2018, Alg. 4, by round where that counts
    epochs.

    Args:
        fraction: share of coordinates sent after the warm-up, in (0, 1].
        momentum: in [0, 1).
        warm_up: rounds until then.
        norm: largest L2 norm of u, the published threshold over the root of the number of
            clients; None does not clip.
        scope: rank within every tensor, as published, or over the whole update.
    """

    fraction: float = 0.001
    momentum: float = 0.9
    warm_up: int = 4
    norm: float | None = None
    scope: Literal["tensor", "global"] = "tensor"

    id: ClassVar[str] = "dgc"
    title: ClassVar[str] = "Deep gradient compression"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Lin et al., Deep Gradient Compression: Reducing the Communication Bandwidth for "
        "Distributed Training, ICLR 2018",
        link="https://arxiv.org/abs/1712.01887",
        promises="270 to 600 times fewer bytes at equal accuracy; it claims no privacy",
        broken_by="matching on the support that was sent; over several rounds of one batch, while "
        "the weights hardly move, all that was sent divides out to the gradient itself",
        cost="two copies of the update in memory; a top-k per tensor",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InvalidInput(f"momentum={self.momentum}: expected a factor in [0, 1)")
        if self.warm_up < 0:
            raise InvalidInput(f"warm_up={self.warm_up}: expected a number of rounds, 0 or more")
        if self.norm is not None:
            check_positive(norm=self.norm)
        self.top(0)

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Compressed(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        return self.top(0).doubt(before, after)

    def top(self, number: int) -> TopK:
        """What ranks in this round, counted from 0."""
        share = min(1.0, (number + 1) / (self.warm_up + 1))
        return TopK(self.fraction**share, self.scope)

    def first(self, inner: Mechanism) -> Mechanism:
        """The client of the first round, who remembers nothing."""
        clipped = inner if self.norm is None else Clip(self.norm)(inner)
        return self.top(0)(clipped)

    def gathered(self, seen: Observation) -> Observation:
        """Rounds from the first on as one, exact for one batch and weights that stay.

        After i rounds of a gradient g with nothing sent the residual is
        g Σ_{j≤i} (1 − m^j)/(1 − m), so g is all that was sent over the sum of these factors.
        """
        found = {}
        for k, like in seen.update.values.items():
            total, weight, due, speed = (torch.zeros_like(like) for _ in range(4))
            for sent in (e.update.values[k] for e in seen.exchanges):
                speed = self.momentum * speed + 1
                due = due + speed
                kept = sent != 0
                total, weight = total + sent, weight + due * kept
                due, speed = due * ~kept, speed * ~kept
            found[k] = total / weight.clamp(min=1)
        one = Exchange(seen.state, Update(found, seen.update.kind))
        return replace(seen, exchanges=(one,))


@dataclass(frozen=True)
class _Compressed(Wrapped):
    rule: DGC

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.rule.first(self.inner).mean(state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.rule.first(self.inner).sample(state, batch, generator=generator)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """That of the first round's top-k; later rounds are for `gathered`."""
        return self.rule.first(self.inner).predict(received, state, batch)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        return self.rule.first(self.inner).likelihood(batch_size=batch_size)

    def advance(
        self, state: ModelState, batch: Batch, memory: Memory, *, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        rule, clean = self.rule, self.inner.sample(state, batch, generator=generator)
        values = clean.values if rule.norm is None else Clip(rule.norm).map(clean.values)
        number = memory.get(_ROUND, torch.tensor(0))
        velocity, residual = {}, {}
        for k, v in values.items():
            moved = memory.get(_VELOCITY + k)
            velocity[k] = v if moved is None else rule.momentum * moved + v
            waiting = memory.get(_RESIDUAL + k)
            residual[k] = velocity[k] if waiting is None else waiting + velocity[k]
        sent = rule.top(int(number)).map(residual)
        kept: dict[str, Tensor] = {_ROUND: number + 1}
        for k, v in sent.items():
            kept[_VELOCITY + k] = velocity[k] * (v == 0)
            kept[_RESIDUAL + k] = residual[k] * (v == 0)
        return Update(sent, clean.kind), kept
