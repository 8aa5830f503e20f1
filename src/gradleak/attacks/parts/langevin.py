"""Posterior means by the Metropolis-adjusted Langevin algorithm, all trials at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.unknowns import Variables
from gradleak.seeding import child, normal

_PROBES = 16
_ACCEPTANCE = 0.574
"""Optimal acceptance rate of MALA (Roberts & Rosenthal, JRSS B 60, 1998)."""


def posterior_mean(
    objective: Objective, start: Variables, *, steps: int, generator: torch.Generator
) -> Variables:
    """Mean of exp(−objective) over the inputs, the other variables as they are.

    Proposals x − (ε/2) P ∇U + √(ε P) n, with P the inverse diagonal of the Hessian at the start;
    ε is tuned in the first half of the steps, and the second half is averaged.

    Args:
        objective: U, in nats, of every trial.
        start: where every chain starts, a minimum of U best.
        steps: proposals per chain.
        generator: of the proposals.
    """
    trials = list(range(len(objective.targets)))
    stream = child(generator, "langevin")
    x, fixed = start["inputs"].clone(), {k: v for k, v in start.items() if k != "inputs"}

    def at(inputs: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = objective.value_and_gradient({"inputs": inputs, **fixed}, trials)
        return values, gradients["inputs"]

    u, slope = at(x)
    scale = _inverse_diagonal(at, x, slope, stream)
    length = torch.full((len(trials),), 1.0 / x[0].numel() ** (1 / 3), dtype=x.dtype)
    total, kept = torch.zeros_like(x), 0
    for step in range(steps):
        reach = _along(length.to(x.device), x)
        noise = normal(x.shape, generator=stream, dtype=x.dtype).to(x.device)
        there = x - 0.5 * reach * scale * slope + (reach * scale).sqrt() * noise
        u_there, slope_there = at(there)
        back = x - there + 0.5 * reach * scale * slope_there
        forth = (reach * scale).sqrt() * noise
        ratio = u - u_there + (((forth**2) - (back**2)) / (2 * reach * scale)).flatten(1).sum(1)
        draw = torch.rand(len(trials), generator=stream, dtype=torch.float64).log().to(ratio)
        moved = (draw < ratio) & u_there.isfinite()
        x = torch.where(_along(moved, x), there, x)
        slope = torch.where(_along(moved, x), slope_there, slope)
        u = torch.where(moved, u_there, u)
        if step < steps // 2:
            gain = 1 / math.sqrt(step + 1)
            length = length * torch.exp(gain * (moved.to(length) - _ACCEPTANCE)).cpu()
        else:
            total, kept = total + x, kept + 1
        objective.progress((step + 1) / steps)
    return {"inputs": total / max(1, kept), **fixed}


def _inverse_diagonal(
    at: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, slope: Tensor, stream: torch.Generator
) -> Tensor:
    """1 / diag ∇²U ≈ 1 / mean of z ⊙ (∇U(x + h z) − ∇U(x)) / h over signs z, floored."""
    step = 1e-3
    found = torch.zeros_like(x)
    for _ in range(_PROBES):
        signs = (torch.randint(2, x.shape, generator=stream) * 2 - 1).to(x)
        found += signs * (at(x + step * signs)[1] - slope) / (step * _PROBES)
    typical = found.abs().flatten(1).mean(1)
    return 1 / torch.maximum(found, 0.1 * _along(typical, x)).clamp(min=1e-12)


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
