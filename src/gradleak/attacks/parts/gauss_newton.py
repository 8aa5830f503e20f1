"""L-BFGS in the units of a Gauss–Newton model that is sketched at the present iterate.

Squared distances of an update have the Hessian Jᵀ J near their minimum, with J the derivative of
the predicted update in all unknowns. For a network its condition is 10⁴ and more, and L-BFGS alone
needs thousands of steps to learn it. One evaluation of J costs as many gradients as there are
unknowns, and these run as one batch: for small images about what 200 steps cost. Random signs then
add J's rows into a few times as many as there are unknowns, which keeps Jᵀ J but for a constant
factor (a count sketch: Clarkson & Woodruff, STOC 2013), and in the units that make it the identity
a few dozen steps of L-BFGS reach rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.attacks.parts.client import differentiable_twice
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Unknown, Variables
from gradleak.types import Batch, Update

_ROWS = 5
"""Rows of the sketch per unknown."""
_SHIFT = 3e-3
"""Step of the finite differences, in units of the variables; the model is no more than a model."""
_DAMPING = 1e-7
"""Added to the model's diagonal, as a share of its largest eigenvalue."""
_AT_ONCE = 16
_WORTH = 100.0
MOST = 4000
"""Unknowns up to which a model is worth its time."""

Weights = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Received update → weight of every compared tensor in the squared distance."""


def model_bytes(unknowns: int) -> int:
    """Bytes of a model of so many unknowns: the sketch in both precisions, and three squares."""
    return unknowns**2 * (_ROWS * (4 + 8) + 3 * 8) if unknowns <= MOST else 0


def gauss_newton(
    objective: Objective,
    start: Variables,
    *,
    weights: Weights,
    rounds: int = 4,
    steps: int = 60,
    solved: float = 1e-18,
    free: Sequence[str] = (),
) -> Search:
    """Sketch the model, search in its units, and again while that is worth it, trial by trial.

    Args:
        objective: a weighted squared distance of updates, over unknowns that few numbers make.
        start: variables of every trial, near enough to a minimum for a model to help.
        weights: of the distance.
        rounds: models at most; one that gains less than a hundredfold is the last.
        steps: accepted steps of L-BFGS per model.
        solved: objective at which a trial ends.
        free: variables that move; none named are all.
    """
    found = [
        _one(objective, start, trial, weights, rounds, steps, solved, free)
        for trial in range(len(objective.targets))
    ]
    return Search(
        {k: torch.cat([f.variables[k] for f in found]) for k in start},
        torch.cat([f.values for f in found]),
        [f.status[0] for f in found],
        [f.evaluations[0] for f in found],
        [f.history[0] for f in found],
    )


def _one(
    objective: Objective,
    start: Variables,
    trial: int,
    weights: Weights,
    rounds: int,
    steps: int,
    solved: float,
    free: Sequence[str],
) -> Search:
    target = objective.targets[trial]
    now = {k: v[trial : trial + 1] for k, v in start.items()}
    moving = {k: v for k, v in now.items() if not free or k in free}
    held = {k: v for k, v in now.items() if k not in moving}
    alone = replace(objective, targets=(target,), engine="loop", progress=lambda share: None)
    tolerance, inner = [solved] * (target + 1), objective.unknown
    best: Search | None = None
    for number in range(rounds):
        jacobian = _sketched(objective, moving, held, target, weights)
        units = _Units(
            inner.spec,
            inner.batch_size,
            inner.labels,
            inner.dtype,
            inner=inner,
            origin=moving,
            held=held,
            whitening=_whitening(jacobian),
        )
        count = jacobian.shape[0]
        at = {"units": jacobian.new_zeros(1, count, dtype=objective.fit.dtype)}
        found = lbfgs(replace(alone, unknown=units), at, steps=steps, solved=tolerance)
        moving = {k: v.detach() for k, v in units.moved(found.variables["units"]).items()}
        before, value = found.history[0][0], float(found.values[0])
        evaluations = found.evaluations[0] + count
        if best is not None:
            evaluations += best.evaluations[0]
            found.history[0][:0] = best.history[0]
        best = replace(found, variables={**moving, **held}, evaluations=[evaluations])
        objective.progress((number + 1) / rounds)
        if value <= solved or not value < before / _WORTH:
            break
    assert best is not None
    return best


def _sketched(
    objective: Objective,
    moving: Variables,
    held: Variables,
    target: int,
    weights: Weights,
) -> Tensor:
    """Signed sums of the weighted predicted update's derivatives, (unknowns, rows) in float64."""
    fit, unknown = objective.fit, objective.unknown
    received = {k: fit.received[target][k].float() for k in fit.compared}
    scale = {k: float(w) ** 0.5 for k, w in weights(received).items()}
    flat = torch.cat([v.flatten(1) for v in moving.values()], 1).float()
    count, entries = flat.shape[1], sum(v.numel() for v in received.values())
    rows = _ROWS * count
    stream = torch.Generator().manual_seed(0)
    place = torch.randint(rows, (entries,), generator=stream)
    sign = torch.randint(2, (entries,), generator=stream).float() * 2 - 1
    sign *= torch.cat([torch.full((received[k].numel(),), scale[k]) for k in fit.compared])
    place, sign = place.to(fit.device), sign.to(fit.device)
    state = fit.state.to(torch.float32)
    whole = Update({k: v.float() for k, v in fit.received[target].items()}, fit.mechanism.kind)

    def predicted(inputs: Tensor, labels: Tensor) -> Tensor:
        with differentiable_twice():
            values = fit.mechanism.predict(whole, state, Batch(inputs, labels)).values
        return torch.cat([values[k].flatten() for k in fit.compared])

    def sketch(points: Tensor) -> Tensor:
        variables = {k: v.expand(len(points), *v.shape[1:]).float() for k, v in held.items()}
        variables |= _split(points, moving)
        with torch.no_grad():
            inputs, labels = unknown.decode(variables, [target] * len(points))
            if labels.is_floating_point():
                labels = labels.float()
            updates = torch.func.vmap(predicted)(inputs.float(), labels) * sign
        return updates.new_zeros(len(points), rows).index_add_(1, place, updates)

    base = sketch(flat)
    found = base.new_empty(count, rows)
    for first in range(0, count, _AT_ONCE):
        points = flat.repeat(min(_AT_ONCE, count - first), 1)
        index = torch.arange(len(points))
        points[index, first + index] += _SHIFT
        found[first : first + len(points)] = (sketch(points) - base) / _SHIFT
    return found.double()


def _whitening(jacobian: Tensor) -> Tensor:
    """R with Rᵀ (Jᵀ J + λ) R = 1, (unknowns, unknowns)."""
    model = jacobian @ jacobian.mT
    largest = float(torch.linalg.eigvalsh(model)[-1])
    model.diagonal().add_(max(_DAMPING * largest, torch.finfo(model.dtype).tiny))
    lower = torch.linalg.cholesky(model)
    eye = torch.eye(len(model), dtype=model.dtype, device=model.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.mT.contiguous()


def _split(flat: Tensor, like: Variables) -> Variables:
    sizes = [v[0].numel() for v in like.values()]
    parts = torch.split(flat, sizes, 1)
    return {
        k: part.reshape(len(flat), *v.shape[1:])
        for (k, v), part in zip(like.items(), parts, strict=True)
    }


@dataclass(frozen=True)
class _Units(Unknown):
    """Another unknown's variables as a point plus R times `units` (1, unknowns)."""

    inner: Unknown
    origin: Variables
    held: Variables
    whitening: Tensor

    def moved(self, units: Tensor) -> Variables:
        """The variables at `units`."""
        change = _split(units.double() @ self.whitening.mT, self.origin)
        return {k: v + change[k].to(v) for k, v in self.origin.items()}

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.inner.decode({**self.held, **self.moved(variables["units"])}, targets)

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        return {"units": torch.zeros(restarts, len(self.whitening), dtype=self.dtype)}

    def encode(self, claims: Sequence[Batch]) -> Variables:
        return self.inner.encode(claims)
