"""Leakage risk of every tensor of an update: how strongly it moves with the inputs.

R_l² = (1/n) Σ_i ‖∂g_l(x_i)/∂x_i‖_F²   over n examples that everybody knows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.types import Batch, ModelState

Gradient = Callable[[Tensor], dict[str, Tensor]]


def frobenius_risk(
    state: ModelState, public: Batch, *, client: FedSGD, probes: int
) -> dict[str, float]:
    """R_l by Hutchinson's estimator, all tensors at once.

    With ḡ the mean gradient of n examples and u of random signs in the shape of all of their
    inputs, R_l² = n E‖(∂ḡ_l/∂x) u‖²: one derivative of ḡ along u per probe.

    Args:
        state: broadcast state.
        public: the examples.
        client: whose gradient is meant; one that draws knows its draws for these examples.
        probes: draws of u.
    """
    draws = np.random.default_rng(0)  # by NumPy: `vmap` forbids draws inside its programs
    squares = dict.fromkeys(state.params, 0.0)
    for _ in range(probes):
        signs = torch.from_numpy(2.0 * draws.integers(0, 2, public.inputs.shape) - 1)
        moved = pushed(state, public, signs, client=client)
        for name, change in moved.items():
            squares[name] += float(change.square().sum())
    return {k: math.sqrt(len(public) * v / probes) for k, v in squares.items()}


def pushed(state: ModelState, public: Batch, signs: Tensor, *, client: FedSGD) -> dict[str, Tensor]:
    """(∂ḡ_l/∂x) u of every tensor, u in the shape of the inputs.

    In reverse twice, as w ↦ (∂ḡ/∂x)ᵀ w is linear: forward rules are missing for some layers.
    """
    gradient = _gradient(state, public, client)
    reached, pull = torch.func.vjp(gradient, public.inputs)  # type: ignore[misc]
    nowhere = {k: torch.zeros_like(v) for k, v in reached.items()}
    _, push = torch.func.vjp(lambda w: pull(w)[0], nowhere)  # type: ignore[misc]
    moved: dict[str, Tensor] = push(signs.to(public.inputs))[0]
    return moved


def all_ones_risk(state: ModelState, public: Batch, *, client: FedSGD) -> dict[str, float]:
    """(1/n) Σ_i ‖∂(Σ_j ḡ_lj)/∂x_i‖₂, what the published code computes in place of R_l.

    Signs cancel. Under a softmax the entries of the last layer's gradient sum to zero for every
    input, so that its risk is zero.
    """
    reached, pull = torch.func.vjp(  # type: ignore[misc]
        _gradient(state, public, client), public.inputs
    )
    nothing = {k: torch.zeros_like(v) for k, v in reached.items()}
    found = {}
    for name, value in reached.items():
        slope = pull({**nothing, name: torch.ones_like(value)})[0]
        found[name] = float(slope.flatten(1).norm(dim=1).mean())
    return found


def _gradient(state: ModelState, public: Batch, client: FedSGD) -> Gradient:
    def gradient(x: Tensor) -> dict[str, Tensor]:
        core, claim = client.foreseen(Batch(x, public.labels))
        return core.gradient(state, state.params, claim)

    return gradient


def cumulative(sizes: list[int], risks: list[float], slices: int) -> list[Tensor]:
    """Indices of slices of equal risk, each tensor's spread evenly over its coordinates.

    Coordinate j lies in slice ⌊slices · c_j⌋ with c_j the share of risk before it.
    """
    weight = np.repeat([r / n for r, n in zip(risks, sizes, strict=True)], sizes)
    if not weight.any():
        weight = np.ones(len(weight))
    before = np.cumsum(weight) - weight / 2
    owner = np.minimum(slices * before / weight.sum(), slices - 1).astype(int)
    return [torch.from_numpy(np.flatnonzero(owner == j)) for j in range(slices)]


def greedy(sizes: list[int], risks: list[float], slices: int) -> list[Tensor]:
    """Indices of slices as the published code forms them.

    Atoms of gcd(sizes) coordinates are added while a slice's risk stays below the mean; the last
    slice takes what is left. Neighbours share a coordinate. An atom that reaches the mean alone
    leaves its slice, and every later one but the last, with a single coordinate.
    """
    atom = math.gcd(*sizes)
    counts = [n // atom for n in sizes]
    risk = np.repeat([r / n for r, n in zip(risks, counts, strict=True)], counts)
    mean, start, bounds = sum(risks) / slices, 0, [0]
    for _ in range(slices - 1):
        reached = np.cumsum(risk[start:]) >= mean
        start += int(reached.argmax()) if reached.any() else len(reached)
        bounds.append(start * atom - 1)
    bounds.append(len(risk) * atom - 1)
    total = sum(sizes)
    ranges = [np.arange(a, b + 1) % total for a, b in itertools.pairwise(bounds)]
    return [torch.from_numpy(indices) for indices in ranges]
