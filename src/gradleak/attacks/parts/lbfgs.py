"""L-BFGS with a strong Wolfe line search, every trial at its own pace in one program.

A trial is a generator that yields the point it wants evaluated and receives value and gradient.
Each round evaluates the points of all live trials together, so trials never wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from torch import Tensor

from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Best, Search
from gradleak.attacks.parts.unknowns import Variables

Vector = NDArray[np.float64]
Evaluated = tuple[float, Vector]

_SUFFICIENT, _CURVATURE = 1e-4, 0.9
_TRIES = 25
_WATCHED = 50


def lbfgs(
    objective: Objective,
    start: Variables,
    *,
    steps: int,
    history: int = 100,
    solved: Sequence[float] | None = None,
    halving: Sequence[float] = (),
    watch: Callable[[Search], bool] = lambda found: False,
) -> Search:
    """Minimise every trial by L-BFGS (Nocedal & Wright, Numerical Optimization, 2006, ch. 7.2).

    A trial ends when its steps are spent, when no descent is found any more, or when one trial of
    its target reaches the target's tolerance. A line search steps back from non-finite values.

    Args:
        objective: what is minimised.
        start: variables of every trial; not modified. Bounds are not projected.
        steps: accepted steps per trial; evaluations are at most 1.5 times that, plus 25.
        history: curvature pairs kept.
        solved: per target, the objective at or below which it counts as solved.
        halving: shares of `steps`, counted in evaluations, after which every target drops the
            worse half of the trials that still run.
        watch: shown what was found so far after every 50 evaluations; true ends the search.
    """
    best = Best(start)
    tolerance = solved or [-math.inf] * (max(objective.targets) + 1)
    flat = torch.cat([v.flatten(1) for v in start.values()], 1).double().cpu().numpy()
    runs = {t: _minimise(flat[t], steps=steps, history=history) for t in range(best.count)}
    wanted = {t: next(run) for t, run in runs.items()}
    rounds = steps + steps // 2 + 25
    cuts = {math.ceil(share * steps) for share in halving}
    for round_ in range(rounds):
        objective.progress(round_ / rounds)
        trials = list(wanted)
        rows = _unflatten(np.stack([wanted[t] for t in trials]), start)
        values, gradients = objective.value_and_gradient(rows, trials)
        finite = best.record(rows, values, gradients, trials, keep_every=steps)
        joined = torch.cat([g.flatten(1) for g in gradients.values()], 1).double().cpu().numpy()
        for row, trial in enumerate(trials):
            value = float(values[row]) if finite[row] else math.inf
            try:
                wanted[trial] = runs[trial].send((value, joined[row]))
            except StopIteration:
                del wanted[trial]
                if not math.isfinite(float(best.values[trial])):
                    best.status[trial] = "diverged"
        won = {
            objective.targets[t]
            for t in trials
            if float(best.values[t]) <= tolerance[objective.targets[t]]
        }
        for trial in range(best.count):
            target = objective.targets[trial]
            if float(best.values[trial]) <= tolerance[target]:
                best.status[trial] = "solved"
            if target in won:
                wanted.pop(trial, None)
        if round_ + 1 in cuts:
            for trial in best.drop_worse_half(list(wanted), objective.targets):
                del wanted[trial]
        if not wanted or ((round_ + 1) % _WATCHED == 0 and watch(best.search())):
            break
    return best.search()


def _minimise(x: Vector, *, steps: int, history: int) -> Generator[Vector, Evaluated, None]:
    """One trial: yields points, receives (value, gradient), ends when it cannot descend."""
    model = _Curvature(x.size, history)
    f, g = yield x
    if not math.isfinite(f):
        return
    for _ in range(steps):
        direction = -model.times(g)
        slope = float(direction @ g)
        if not slope < 0:
            model.forget()
            direction, slope = -g, -float(g @ g)
            if slope == 0:
                return
        first = 1.0 if model.pairs else min(1.0, 1.0 / float(np.abs(g).sum()))
        found = yield from _wolfe(x, f, direction, slope, first)
        if found is None:
            if not model.pairs:
                return
            model.forget()  # a bad model of the curvature: try steepest descent once
            continue
        t, f, g_new = found
        step = t * direction
        model.learn(step, g_new - g)
        x, g = x + step, g_new


def _wolfe(
    x: Vector, f0: float, direction: Vector, slope0: float, t: float
) -> Generator[Vector, Evaluated, tuple[float, float, Vector] | None]:
    """Find t with f ≤ f0 + c₁ t f0′ and |f′| ≤ c₂ |f0′|; else any decrease found; else None."""
    low, high = (0.0, f0, slope0), (math.inf, math.inf, math.inf)
    fallback: tuple[float, float, Vector] | None = None
    for _ in range(_TRIES):
        f, g = yield x + t * direction
        slope = float(g @ direction) if math.isfinite(f) else math.inf
        if not math.isfinite(f) or f > f0 + _SUFFICIENT * t * slope0 or f > low[1]:
            high = (t, f, slope)
        elif abs(slope) <= -_CURVATURE * slope0:
            return t, f, g
        elif slope > 0:
            high, fallback = (t, f, slope), (t, f, g)
        else:
            low, fallback = (t, f, slope), (t, f, g)
        t = _next_step(low, high)
        if high[0] - low[0] <= 1e-14 * max(high[0], 1e-300):
            break
    return fallback if fallback is not None and fallback[1] < f0 else None


def _next_step(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """Cubic interpolation inside the bracket, kept off its ends; expansion while it is open."""
    (a, fa, da), (b, fb, db) = low, high
    if math.isinf(b):
        return 4 * a if a > 0 else 1.0
    width = b - a
    t = a + width / 2
    if math.isfinite(fb) and math.isfinite(db):
        z = da + db - 3 * (fb - fa) / width
        square = z * z - da * db
        if square >= 0:
            root = math.sqrt(square)
            below = db - da + 2 * root
            if below != 0:
                t = b - width * (db + root - z) / below
    return min(max(t, a + 0.1 * width), b - 0.1 * width)


class _Curvature:
    """Inverse Hessian model in compact form (Byrd, Nocedal & Schnabel, 1994, Theorem 2.2).

    H g = γ g + Sᵀ R⁻ᵀ ((D + γ Y Yᵀ) R⁻¹ S g − γ Y g) − γ Yᵀ R⁻¹ S g, R = upper triangle of S Yᵀ.
    """

    def __init__(self, size: int, history: int) -> None:
        self.history, self.begin, self.end = history, 0, 0
        self.s, self.y = np.empty((2 * history, size)), np.empty((2 * history, size))
        self.sy, self.yy = np.zeros((2 * history,) * 2), np.zeros((2 * history,) * 2)

    @property
    def pairs(self) -> int:
        return self.end - self.begin

    def forget(self) -> None:
        self.begin = self.end = 0

    def learn(self, s: Vector, y: Vector) -> None:
        if not s @ y > 1e-14 * np.linalg.norm(s) * np.linalg.norm(y):
            return
        if self.end == 2 * self.history:
            kept = slice(self.end - self.history, self.end)
            front = slice(0, self.history)
            self.s[front], self.y[front] = self.s[kept].copy(), self.y[kept].copy()
            self.sy[front, front] = self.sy[kept, kept].copy()
            self.yy[front, front] = self.yy[kept, kept].copy()
            self.begin, self.end = 0, self.history
        new = self.end
        self.s[new], self.y[new] = s, y
        self.end += 1
        self.begin = max(self.begin, self.end - self.history)
        now = slice(self.begin, self.end)
        self.sy[now, new] = self.s[now] @ y
        self.yy[now, new] = self.yy[new, now] = self.y[now] @ y

    def times(self, g: Vector) -> Vector:
        if not self.pairs:
            return g.copy()
        now = slice(self.begin, self.end)
        s, y = self.s[now], self.y[now]
        r = np.triu(self.sy[now, now])
        yy = self.yy[now, now]
        gamma = r[-1, -1] / yy[-1, -1]
        inner = solve_triangular(r, s @ g, check_finite=False)
        middle = np.diag(r) * inner + gamma * (yy @ inner) - gamma * (y @ g)
        outer = solve_triangular(r, middle, trans="T", check_finite=False)
        product: Vector = gamma * g + outer @ s - gamma * (inner @ y)
        return product


def _unflatten(points: Vector, like: Variables) -> dict[str, Tensor]:
    sizes = [v[0].numel() for v in like.values()]
    parts = torch.split(torch.from_numpy(points), sizes, 1)
    return {
        k: part.reshape(len(points), *v.shape[1:]).to(v)
        for (k, v), part in zip(like.items(), parts, strict=True)
    }
