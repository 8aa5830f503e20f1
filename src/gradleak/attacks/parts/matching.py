"""Update matching: how far the update a claim would cause is from the one received."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gradleak.attacks.parts.carried import Wanted, carried
from gradleak.attacks.parts.client import differentiable_twice
from gradleak.attacks.parts.distances import Distance
from gradleak.attacks.parts.fast import FastFit
from gradleak.attacks.parts.plain import PlainFit
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.types import Batch, Mechanism, ModelState, Observation, Update, cast


class Matching:
    """D(predicted update of the claim, update received), for many trials at once.

    All observations share one broadcast state and one believed mechanism; each trial is matched
    against the update of its own target.

    Args:
        seen: one observation per target.
        distance: D.
        dtype: precision of the comparison.
    """

    def __init__(self, seen: Sequence[Observation], distance: Distance, *, dtype: torch.dtype):
        first = seen[0]
        if any(o.state is not first.state or o.mechanism != first.mechanism for o in seen):
            raise InvalidInput("observations differ in state or mechanism: expected one of each")
        self.seen = tuple(seen)
        self.state = first.state.to(dtype)
        self.mechanism = first.mechanism
        self.distance = distance
        self.spec = first.data
        self.batch_size = first.knowledge.batch_size or 1
        self.dtype = dtype
        self.received = [cast(o.update.values, dtype) for o in seen]
        self.compared = _compared(self.mechanism, self.state)
        self._stacked: tuple[tuple[int, ...], dict[str, Tensor]] = ((), {})

    def through(self, state: ModelState, *, mechanism: Mechanism | None = None) -> Matching:
        """The same updates matched through another network.

        Args:
            state: with parameters named as the network's, or some of them: only these are matched.
            mechanism: what the client is believed to do with it; None keeps the belief.
        """
        other = copy.copy(self)
        other.state = state.to(self.dtype)
        other.mechanism = mechanism or self.mechanism
        other.compared = _compared(other.mechanism, state)
        other.received = [{k: r[k] for k in state.params} for r in self.received]
        other._stacked = ((), {})
        for name in ("fast", "plain"):
            other.__dict__.pop(name, None)
        return other

    def comparing(self, distance: Distance) -> Matching:
        """The same updates matched by another distance."""
        other = self.through(self.state)
        other.distance = distance
        return other

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(iter(self.state.params.values())).device

    @property
    def parameters(self) -> int:
        """Number of coordinates of an update."""
        return sum(p.numel() for p in self.state.params.values())

    def one(self, inputs: Tensor, labels: Tensor, received: dict[str, Tensor]) -> Tensor:
        """Distance of one trial; inputs (b, *shape), labels (b,) or (b, classes)."""
        update = Update(received, self.mechanism.kind)
        with differentiable_twice():
            found = self.mechanism.predict(update, self.state, Batch(inputs, labels)).values
        return self.distance({name: found[name] for name in self.compared}, received)

    def __call__(self, inputs: Tensor, labels: Tensor, targets: Sequence[int]) -> Tensor:
        """Distances of several trials in one vectorised program, of one trial in a plain one.

        Args:
            inputs: (trials, b, *shape).
            labels: (trials, b) int64 or (trials, b, classes).
            targets: target of each trial.

        Returns:
            (trials,), once differentiable in inputs and soft labels.
        """
        if len(targets) == 1:

            def alone(x: Tensor, y: Tensor, wanted: Wanted) -> tuple[Tensor, list[Tensor | None]]:
                value, found = self.plain.evaluate(x[0], y[0], targets[0], wanted)
                return value[None], [None if g is None else g[None] for g in found]

            return carried(alone, inputs, labels)
        if len(set(targets)) == 1:
            shared = torch.func.vmap(self.one, (0, 0, None))
            return shared(inputs, labels, self.received[targets[0]])
        return torch.func.vmap(self.one)(inputs, labels, self._stacked_for(tuple(targets)))

    def _stacked_for(self, targets: tuple[int, ...]) -> dict[str, Tensor]:
        """The updates of these targets along a leading axis, kept for the next call."""
        if self._stacked[0] != targets:
            names = self.state.params
            stacked = {n: torch.stack([self.received[t][n] for t in targets]) for n in names}
            self._stacked = (targets, stacked)
        return self._stacked[1]

    @cached_property
    def plain(self) -> PlainFit:
        """The same distances one trial at a time, by double backward."""
        return PlainFit(
            self.mechanism, self.state, self.distance, self.received, compared=self.compared
        )

    @cached_property
    def fast(self) -> FastFit | None:
        """The same distances by closed forms, where these are known to cover the network."""
        return FastFit.of(self)

    def noise(self, batch: Batch, target: int, *, generator: torch.Generator) -> float:
        """D that the client's noise alone leaves, drawn once; 0 where its density is not known."""
        mechanism = self.mechanism
        try:
            centre = mechanism.likelihood(batch_size=len(batch)).centre
        except IntractableLikelihood:
            return 0.0
        received = {name: self.received[target][name] for name in self.compared}
        mean = centre.mean(self.state, batch).values
        drawn = mechanism.sample(self.state, batch, generator=generator).values
        noised = {name: value + drawn[name] - mean[name] for name, value in received.items()}
        return float(self.distance(noised, received))

    def norm(self, target: int) -> float:
        """L2 norm of the update received from `target`."""
        squares = [float((v.double() ** 2).sum()) for v in self.received[target].values()]
        return math.sqrt(sum(squares))


def _compared(mechanism: Mechanism, state: ModelState) -> list[str]:
    """Tensors of the update that are matched, in the state's order."""
    spent = mechanism.spent(state)
    return [name for name in state.params if name not in spent]
