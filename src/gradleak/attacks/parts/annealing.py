"""Annealing of a posterior: wide noise, soft activations and warm probabilities at first.

    σ → σ / √f    (or the log-likelihood → f · log-likelihood, where it has no noise to widen)
    relu(a), max → their smooth copies at sharpness β
    logits → logits / T

with f from f₀ to 1, β from 1 to 32 and T from 2 to 1, all geometrically in stages, and then as the
client has them. Wide noise lets the prior lead; a smooth unit on the wrong side of its kink
still has a gradient that says so; and a softmax that is certain has none, so it is made less so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from gradleak.attacks.parts import smoothing
from gradleak.attacks.parts.objective import Objective
from gradleak.defenses.wrapped import Separable
from gradleak.errors import NotApplicable

Path = Callable[[int, int], Objective]
"""(step, steps) -> what is minimised then; the same object for as long as it is the same."""

_STAGES = 16
_BETA = (1.0, 32.0)
_TEMPERATURE = 2.0


def annealed(objective: Objective, *, first: float, share: float = 0.75, soft: bool = True) -> Path:
    """The path to an objective whose fit is a negative log-likelihood.

    Args:
        objective: where the path ends.
        first: f₀, at most 1.
        share: of the steps, after which the objective itself is minimised.
        soft: whether the network softens too.
    """
    networks = _soft_copies(objective) if soft else lambda _: objective
    start, known = min(first, 1.0), [(_STAGES, objective)]

    def path(step: int, steps: int) -> Objective:
        stage = min(_STAGES, int(step / (share * steps) * _STAGES))
        if known[-1][0] != stage:  # one stage in memory at a time
            known[-1] = (stage, objective if stage == _STAGES else at(stage / _STAGES))
        return known[-1][1]

    def at(done: float) -> Objective:
        return _widened(networks(done), start ** (1 - done))

    return path


def _widened(objective: Objective, factor: float) -> Objective:
    density = objective.fit.distance
    if isinstance(density, Separable) and (wide := density.widened(1 / math.sqrt(factor))):
        return replace(objective, fit=objective.fit.comparing(wide))
    return replace(objective, fit_weight=factor * objective.fit_weight)


def _soft_copies(objective: Objective) -> Callable[[float], Objective]:
    """Share of the path done -> the objective of the soft network there."""
    state = objective.fit.state
    network = smoothing.swapped(state.model)
    try:
        smoothing.measure(network, state, objective.unknown.spec)
    except NotApplicable:
        network = state.model

    def at(done: float) -> Objective:
        soft = smoothing.at_beta(network, _BETA[0] * (_BETA[1] / _BETA[0]) ** done)
        smoothing.divide_outputs(soft, _TEMPERATURE ** (1 - done))
        return _through(objective, soft)

    return at


def _through(objective: Objective, model: nn.Module) -> Objective:
    """The same objective of another network with the same parameters."""
    fit = objective.fit.through(replace(objective.fit.state, model=model))
    lost = objective.engine == "fast" and fit.fast is None
    return replace(objective, fit=fit, engine="vmap" if lost else objective.engine)
