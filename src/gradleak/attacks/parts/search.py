"""Searches over all trials at once; a diverged trial is frozen, never its neighbours.

A search returns, for every trial, the best iterate it *scored*, not the one after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.unknowns import Variables
from gradleak.types import Status

_HISTORY_POINTS = 60


@dataclass
class Search:
    """Outcome of a search, one entry per trial.

    Attributes:
        variables: best iterate scored.
        values: (trials,) objective there; inf if no finite value was seen.
        status: why each trial stopped.
        evaluations: gradient evaluations of each trial.
        history: (evaluation, value) pairs of each trial, thinned.
    """

    variables: Variables
    values: Tensor
    status: list[Status]
    evaluations: list[int]
    history: list[list[float]] = field(default_factory=list)


def step_decay(step: int, steps: int) -> float:
    """1, 0.1, 0.01, 0.001 from 3/8, 5/8, 7/8 of the budget on (Geiping et al., NeurIPS 2020)."""
    return float(0.1 ** sum(step >= steps * eighths // 8 for eighths in (3, 5, 7)))


def adam(
    objective: Objective,
    start: Variables,
    *,
    steps: int,
    learning_rate: float,
    signed: bool = False,
    schedule: Callable[[int, int], float] = step_decay,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> Search:
    """Adam (Kingma & Ba, 2015), optionally on the sign of the gradient.

    Args:
        objective: what is minimised.
        start: variables of every trial; not modified.
        steps: gradient evaluations per trial.
        learning_rate: step length before decay, in units of the variables.
        signed: replace the gradient by its sign before Adam sees it.
        schedule: (step, steps) -> factor on the learning rate.
        betas: decay of the first and second moment.
        epsilon: added to the root of the second moment.
    """
    current = {k: v.clone() for k, v in start.items()}
    first = {k: torch.zeros_like(v) for k, v in start.items()}
    second = {k: torch.zeros_like(v) for k, v in start.items()}
    best = Best(start)
    trials = list(range(len(objective.targets)))
    for step in range(steps):
        rows = current if len(trials) == best.count else {k: v[trials] for k, v in current.items()}
        values, gradients = objective.value_and_gradient(rows, trials)
        alive = best.record(rows, values, gradients, trials, keep_every=steps)
        if not all(alive):
            keep = [i for i, ok in enumerate(alive) if ok]
            trials = [trials[i] for i in keep]
            gradients = {k: g[keep] for k, g in gradients.items()}
            if not trials:
                break
        whole = len(trials) == best.count
        rate = learning_rate * schedule(step, steps)
        for k, g in gradients.items():
            if signed:
                g = g.sign()
            m = first[k] if whole else first[k][trials]
            v = second[k] if whole else second[k][trials]
            m.lerp_(g, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            root = (v / (1 - betas[1] ** (step + 1))).sqrt_().add_(epsilon)
            move = m.div(root).mul_(-rate / (1 - betas[0] ** (step + 1)))
            if whole:
                current[k].add_(move)
            else:
                first[k][trials], second[k][trials] = m, v
                current[k][trials] += move
        objective.unknown.project_(current)
        objective.progress((step + 1) / steps)
    return best.search()


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
        """Take note of one evaluation of `trials`; tell which of them may go on."""
        finite = values.isfinite()
        for g in gradients.values():
            finite = finite & g.flatten(1).isfinite().all(1)
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

    def search(self) -> Search:
        return Search(self.variables, self.values, self.status, self.evaluations, self.history)
