"""Search without gradients: covariance matrix adaptation, by the package `cma`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import numpy as np
import torch

from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Best, Search
from gradleak.attacks.parts.unknowns import Variables
from gradleak.errors import InvalidInput


def cma_es(
    objective: Objective, start: Variables, *, steps: int, spread: float, seeds: Sequence[int]
) -> Search:
    """CMA-ES (Hansen & Ostermeier, 2001): each trial evolves a population of its own.

    A generation of a trial is evaluated in one vectorised program. What leaves the bounds of the
    unknown is scored where the unknown puts it back.

    Args:
        objective: what is minimised; its unknown has one variable.
        start: mean of every trial's first generation.
        steps: evaluations of the objective per trial, rounded down to whole generations, at
            least one.
        spread: standard deviation of the first generation.
        seeds: of every trial's draws.

    Raises:
        InvalidInput: the package is not installed.
    """
    if importlib.util.find_spec("cma") is None:
        raise InvalidInput("CMA-ES needs the package cma: pip install 'gradleak[cma]'")
    import cma

    ((name, means),) = start.items()
    best = Best(start)
    for trial, (mean, seed) in enumerate(zip(means, seeds, strict=True)):
        draws = np.random.default_rng(seed)
        options = {
            "randn": lambda *shape, draws=draws: draws.standard_normal(shape),
            "seed": math.nan,  # the global generator is left alone
            "verbose": -9,
        }
        evolution = cma.CMAEvolutionStrategy(mean.flatten().double().cpu().numpy(), spread, options)
        target = objective.targets[trial]
        for generation in range(max(1, steps // evolution.popsize)):
            asked = evolution.ask()
            rows = {name: torch.from_numpy(np.stack(asked)).to(mean).reshape(-1, *mean.shape)}
            objective.unknown.project_(rows)
            values = objective.scores(rows, [target] * len(asked))
            winner = int(values.argmin())
            one, no_gradient = {name: rows[name][winner][None]}, {name: values.new_zeros(1, 1)}
            best.record(one, values[winner][None], no_gradient, [trial], keep_every=steps)
            best.evaluations[trial] += len(asked) - 1
            if not bool(values.isfinite().all()):
                best.status[trial] = "diverged"
                break
            evolution.tell(asked, values.double().cpu().tolist())
            done = (generation + 1) * evolution.popsize / steps
            objective.progress((trial + min(done, 1)) / best.count)
    return best.search()
