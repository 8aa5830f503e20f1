"""The objective of a search: unknowns, fit and penalties behind one door, value and gradient.

Trials run by closed forms ("fast"), as one vectorised program ("vmap") or one after the other
("loop"), whichever a short measurement finds cheaper for the model at hand; the numbers are the
same up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.memory import Limit
from gradleak.attacks.parts.penalties import Penalty
from gradleak.attacks.parts.unknowns import Unknown, Variables
from gradleak.errors import InvalidInput
from gradleak.types import Batch

Engine = Literal["auto", "fast", "vmap", "loop"]

_STACKED_COORDINATES = 100_000_000
_FAST_COORDINATES = 200_000_000
_FAST_TRIALS = 64
_ADVANTAGE = 1.1
_LOOPED = 2
_LARGE = 1_000_000


@dataclass(frozen=True)
class Objective:
    """fit_weight · fit(claim) + Σ weight · penalty(claim), for the trials of several targets.

    Attributes:
        unknown: what is varied.
        fit: update matching.
        penalties: (weight, penalty) pairs.
        fit_weight: of the fit.
        targets: target of every trial.
        engine: how several trials are evaluated; "auto" must be settled by `calibrated` first.
        progress: searches tell it the share of their budget spent.
        limit: how many trials memory lets step together; shared by all that descend from this.
        streams: the attacker's randomness for every target, for searches that draw.
    """

    unknown: Unknown
    fit: Matching
    penalties: tuple[tuple[float, Penalty], ...] = ()
    fit_weight: float = 1.0
    targets: tuple[int, ...] = (0,)
    engine: Engine = "loop"
    progress: Callable[[float], None] = lambda share: None
    limit: Limit = field(default_factory=Limit)
    streams: tuple[torch.Generator, ...] = ()

    def values(self, variables: Variables, targets: Sequence[int]) -> Tensor:
        """Objective of several trials (trials,), differentiable in the variables."""
        inputs, labels = self.unknown.decode(variables, targets)
        total = self.fit_weight * self.distances(variables, inputs, labels, targets)
        for weight, penalty in self.penalties:
            total = total + weight * penalty(inputs, targets)
        return total

    def distances(
        self, variables: Variables, inputs: Tensor, labels: Tensor, targets: Sequence[int]
    ) -> Tensor:
        """The fit (trials,) of what the variables decode to."""
        if self.engine != "fast":
            return self.fit(inputs, labels, targets)
        if self.fit.fast is None:
            raise InvalidInput("engine 'fast': no closed forms cover this network and mechanism")
        return self.fit.fast(inputs, labels, targets)

    def value_and_gradient(
        self, variables: Variables, trials: Sequence[int]
    ) -> tuple[Tensor, Variables]:
        """Objective (len(trials),) and its gradient at the variables of `trials`.

        Args:
            variables: rows of the given trials only, in the same order.
            trials: which trials these are.
        """

        def evaluate(rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            leaves = {k: v[rows].detach().requires_grad_() for k, v in variables.items()}
            value = self.values(leaves, [self.targets[t] for t in trials[rows]])
            # A search may hold some of its variables still.
            return value.detach(), torch.autograd.grad(
                value.sum(), list(leaves.values()), materialize_grads=True
            )

        parts = self.limit.in_parts(evaluate, len(trials), most=self._chunk)
        values, gradients = zip(*parts, strict=True)
        joined = [torch.cat(each) for each in zip(*gradients, strict=True)]
        return torch.cat(values), dict(zip(variables, joined, strict=True))

    def scores(self, variables: Variables, targets: Sequence[int]) -> Tensor:
        """Objective (len(targets),) of claims for these targets, without a gradient."""

        def evaluate(rows: slice) -> Tensor:
            return self.values({k: v[rows] for k, v in variables.items()}, targets[rows])

        with torch.no_grad():
            return torch.cat(self.limit.in_parts(evaluate, len(targets), most=self._chunk))

    @property
    def _chunk(self) -> int:
        return 1 if self.engine == "loop" else self.trials_at_once

    @property
    def trials_at_once(self) -> int:
        """Trials that fit one program of the engine in memory; more gain nothing."""
        if self.engine == "fast":
            most = min(_FAST_TRIALS, _FAST_COORDINATES // self.fit.parameters)
        else:
            most = _STACKED_COORDINATES // self.fit.parameters
        return max(1, min(most, self.limit.trials))

    def at(self, batch: Batch, *, target: int = 0) -> float:
        """The objective at a batch somebody supplies, for the target's update."""
        device = self.fit.device
        batch = self.unknown.searched(batch)
        inputs = batch.inputs.to(device, self.fit.dtype)
        labels = batch.labels.to(device)
        if labels.is_floating_point():
            labels = labels.to(self.fit.dtype)
        with torch.no_grad():
            total = self.fit_weight * self.fit(inputs[None], labels[None], [target])
            for weight, penalty in self.penalties:
                total = total + weight * penalty(inputs[None], [target])
        return float(total)


def calibrated(objective: Objective, variables: Variables) -> Engine:
    """Measure which engine is cheaper per trial, in CPU seconds, on these very variables.

    Closed forms always win on large networks, where measuring would cost many seconds. A lone
    trial is not measured either, so that equal calls give equal bits.
    """
    trials = list(range(len(objective.targets)))
    if objective.fit.parameters >= _LARGE and objective.fit.fast is not None:
        return "fast"
    if len(trials) == 1:
        return "loop"

    def seconds(engine: Engine) -> float:
        candidate = replace(objective, engine=engine)
        count = min(len(trials), _LOOPED if engine == "loop" else candidate.trials_at_once)
        rows = {k: v[:count] for k, v in variables.items()}
        spent = []
        for _ in range(3):
            before = time.process_time()
            candidate.value_and_gradient(rows, trials[:count])
            spent.append(time.process_time() - before)
        return min(spent) / count

    rivals: list[Engine] = []
    if objective.fit.fast is not None:
        rivals.append("fast")
    if min(len(trials), replace(objective, engine="vmap").trials_at_once) > 1:
        rivals.append("vmap")
    if not rivals:
        return "loop"
    costs = {engine: seconds(engine) for engine in rivals}
    best = min(rivals, key=lambda engine: costs[engine])
    return best if costs[best] * _ADVANTAGE < seconds("loop") else "loop"
