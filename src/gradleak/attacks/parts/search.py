"""Searches over all trials at once; a trial that diverged or was dropped is frozen, no other.

A search returns, for every trial, the best iterate it *scored*, not the one after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adam import adam as adam_step

from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.unknowns import Variables
from gradleak.types import Status

_HISTORY_POINTS = 60

Drift = Callable[[Variables, Sequence[int], float], None]
"""(variables of all trials, those that still run, the rate of the step just made) -> moves the
variables of these in place. Trials may look at others of their target here, and nowhere else."""


@dataclass
class Search:
    """Outcome of a search, one entry per trial.

    Attributes:
        variables: best iterate scored.
        values: (trials,) objective there; inf if no finite value was seen.
        status: why each trial stopped.
        evaluations: gradient evaluations of each trial.
        history: (evaluation, value) pairs of each trial, thinned.
        notes: by target, a line on the claim instead of the number of restarts.
    """

    variables: Variables
    values: Tensor
    status: list[Status]
    evaluations: list[int]
    history: list[list[float]] = field(default_factory=list)
    notes: dict[int, str] = field(default_factory=dict)


def step_decay(step: int, steps: int) -> float:
    """1, 0.1, 0.01, 0.001 from 3/8, 5/8, 7/8 of the budget on (Geiping et al., NeurIPS 2020)."""
    return float(0.1 ** sum(step >= steps * eighths // 8 for eighths in (3, 5, 7)))


def warm_cosine(step: int, steps: int, *, warmup: int = 50) -> float:
    """(1 + cos πt/T) / 2, after a linear rise over the first steps."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def halvings(restarts: int) -> tuple[float, ...]:
    """Shares of the budget, …, 1/4, 1/2, at which halving `restarts` trials leaves one.

    2^k trials cost as much as 1 + k/2 that run to the end (Jamieson & Talwalkar, AISTATS 2016).
    """
    rounds = (restarts - 1).bit_length()
    return tuple(0.5 ** (rounds - r) for r in range(rounds))


def adam(
    objective: Objective,
    start: Variables,
    *,
    steps: int,
    learning_rate: float,
    signed: bool = False,
    schedule: Callable[[int, int], float] = step_decay,
    path: Callable[[int, int], Objective] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    halving: Sequence[float] = (),
    drifts: Sequence[Drift] = (),
) -> Search:
    """Adam (Kingma & Ba, 2015), optionally on the sign of the gradient.

    Args:
        objective: what is minimised.
        start: variables of every trial; not modified.
        steps: gradient evaluations per trial.
        learning_rate: step length before decay, in units of the variables.
        signed: replace the gradient by its sign before Adam sees it.
        schedule: (step, steps) -> factor on the learning rate.
        path: (step, steps) -> what is minimised at that step, `objective` in the end. The best
            iterate is among those after the last change.
        betas: decay of the first and second moment.
        epsilon: added to the root of the second moment.
        halving: shares of the steps after which every target drops the worse half of its trials;
            their values there are of one objective.
        drifts: what moves trials after every step besides the objective, in units of the rate.
    """
    current = {k: v.clone() for k, v in start.items()}
    first = [torch.zeros_like(v) for v in current.values()]
    second = [torch.zeros_like(v) for v in current.values()]
    counts = [torch.zeros((), device=v.device) for v in current.values()]
    best = Best(start)
    trials = list(range(best.count))
    present = objective
    cuts = {math.ceil(share * steps) for share in halving}
    for step in range(steps):
        wanted = path(step, steps) if path else objective
        if wanted is not present:
            present = wanted
            best.values.fill_(math.inf)
        rows = current if len(trials) == best.count else {k: v[trials] for k, v in current.items()}
        values, gradients = present.value_and_gradient(rows, trials)
        alive = best.record(rows, values, gradients, trials, keep_every=steps)
        if step + 1 in cuts:
            running = [t for t, ok in zip(trials, alive, strict=True) if ok]
            dropped = best.drop_worse_half(running, objective.targets)
            alive = [ok and t not in dropped for t, ok in zip(trials, alive, strict=True)]
        if not all(alive):
            keep = [i for i, ok in enumerate(alive) if ok]
            trials = [trials[i] for i in keep]
            gradients = {k: g[keep] for k, g in gradients.items()}
            if not trials:
                break
        if signed:
            gradients = {k: g.sign() for k, g in gradients.items()}
        if len(trials) < best.count:  # a frozen trial moves on unseen
            gradients = {k: _spread(g, trials, best.count) for k, g in gradients.items()}
        rate = learning_rate * schedule(step, steps)
        adam_step(
            list(current.values()),
            [gradients[k] for k in current],
            first,
            second,
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=0.0,
            eps=epsilon,
            maximize=False,
        )
        for drift in drifts:
            drift(current, trials, rate)
        objective.unknown.project_(current)
        objective.progress((step + 1) / steps)
    return best.search()


def _spread(rows: Tensor, trials: Sequence[int], count: int) -> Tensor:
    """The rows of some trials among zeros for the others."""
    whole = rows.new_zeros((count, *rows.shape[1:]))
    whole[list(trials)] = rows
    return whole


class Best:
    """Keeps, per trial, the best iterate scored, and freezes what is no longer finite."""

    def __init__(self, start: Variables) -> None:
        self.count = len(next(iter(start.values())))
        self.variables = {k: v.clone() for k, v in start.items()}
        self.values = torch.full((self.count,), math.inf, dtype=torch.float64)
        self.status: list[Status] = ["exhausted"] * self.count
        self.evaluations = [0] * self.count
        self.history: list[list[float]] = [[] for _ in range(self.count)]

    def record(
        self,
        rows: Variables,
        values: Tensor,
        gradients: Variables,
        trials: Sequence[int],
        *,
        keep_every: int,
    ) -> list[bool]:
        """Take note of one evaluation of `trials`; tell which of them may go on.

        A trial may not once its value, or the sum of its gradient, is no longer finite.
        """
        finite = values.isfinite()
        for g in gradients.values():
            finite = finite & g.flatten(1).sum(1).isfinite()
        known = values.double().cpu()
        better = finite.cpu() & (known < self.values[list(trials)])
        index = [t for t, b in zip(trials, better.tolist(), strict=True) if b]
        if index:
            self.values[index] = known[better]
            for k, v in rows.items():
                self.variables[k][index] = v[better.to(v.device)]
        stride = max(1, keep_every // _HISTORY_POINTS)
        for i, trial in enumerate(trials):
            if self.evaluations[trial] % stride == 0:
                self.history[trial].append(float(known[i]))
            self.evaluations[trial] += 1
        alive: list[bool] = finite.tolist()
        for trial, ok in zip(trials, alive, strict=True):
            if not ok:
                self.status[trial] = "diverged"
        return alive

    def drop_worse_half(self, running: Sequence[int], targets: Sequence[int]) -> set[int]:
        """Give up, of every target's running trials, the half with the higher values, rounded down.

        Of equal values the earlier trial stays. Targets do not influence each other, and each
        keeps at least one of its running trials.

        Args:
            running: trials that search on.
            targets: target of every trial.
        """
        dropped: set[int] = set()
        for target in {targets[t] for t in running}:
            own = sorted((t for t in running if targets[t] == target), key=self._rank)
            dropped.update(own[(len(own) + 1) // 2 :])
        for trial in dropped:
            self.status[trial] = "dropped"
        return dropped

    def _rank(self, trial: int) -> tuple[float, int]:
        return float(self.values[trial]), trial

    def search(self) -> Search:
        return Search(self.variables, self.values, self.status, self.evaluations, self.history)
