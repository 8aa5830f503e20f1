"""CAFE with its first two steps in closed form (Jin et al., NeurIPS 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.parts.entries import Entries, entries_of
from gradleak.attacks.parts.inversion import Features, inverted, misfits
from gradleak.attacks.parts.needs import require
from gradleak.attacks.parts.rounds import Rounds, rounds_of
from gradleak.defenses.wrapped import undefended
from gradleak.mechanisms.client import BatchNormMode
from gradleak.types import About, Batch, Fact, Observation, Reconstruction

_REFINEMENTS = 3
_LIT = 1e-12
_DEPENDENT = 1e-7
_REACHED = 1e-4
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Cafe:
    """Every example of vertical training from the summed gradients of many rounds.

    An honest server that names the examples S_t of every round sees u_t = (1/b) Σ_{n∈S_t} g_n,
    linear in what each example sends. At a party's first linear layer z = W h + b, v = ∂ℓ/∂z,

        I    ∂L_t/∂b = (1/b) Σ_{n∈S_t} v_n             solved for v
        II   ∂L_t/∂W = (1/b) Σ_{n∈S_t} v_n h_nᵀ        solved for h
        III  h(x_n) = h_n                              Adam in the box

    I and II are exact for weights that stay, as many rounds as examples, batch indices of full rank
    and errors that are linearly independent, round by round; else `no_solution`. A network that is
    not divided is one party, and FedSGD one round.

    Args:
        steps: of step III, for every example.
        learning_rate: of step III, in units of the box, falling as a cosine.
        total_variation: its weight in step III.
        matching: weight in step III of the gradients of what stands before the layer.
        tolerance: share of the equations of I and II that may stay unexplained.
    """

    steps: int = 200
    learning_rate: float = 1.0
    total_variation: float = 0.0
    matching: float = 0.0
    tolerance: float = 1e-4

    about: ClassVar[About] = About(
        id="cafe",
        title="Vertical rounds in closed form (CAFE)",
        paper="Jin et al., CAFE: Catastrophic Data Leakage in Vertical Federated Learning, "
        "NeurIPS 2021",
        link="https://arxiv.org/abs/2110.15122",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE, Fact.MINIBATCH_ORDER}),
        likelihood="exact equations, then Gaussian (squared L2) of features and gradients",
        prior="total variation in the box",
        deviations=(
            "steps I and II are solved as linear systems in float64 (published: SGD and Adam)",
            "step III fits features alone, by larger steps (published: gradients too); `matching` "
            "adds the gradients before the first linear layer, and no soft labels are searched",
            "labels from the head's gradient of single examples, by the equations of step I",
        ),
    )
    budgets: ClassVar = {"thorough": {"steps": 2000}}

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        size = seen.knowledge.batch_size or 1
        blank = torch.full((size, *seen.data.shape), sum(seen.data.bounds) / 2)
        nothing = Batch(blank, torch.zeros(size, dtype=torch.int64))
        rounds, entries = rounds_of(seen), _entries(seen)
        if isinstance(rounds, str) or isinstance(entries, str):
            why = rounds if isinstance(rounds, str) else str(entries)
            return Reconstruction(nothing, math.nan, "no_solution", message=why)
        known = self.features(rounds, entries, generator=generator)
        if isinstance(known, str):
            return Reconstruction(nothing, math.nan, "no_solution", message=known)
        x = self.images(rounds, entries, known, generator=generator)
        with torch.no_grad():
            missed = misfits(entries, known, x, torch.arange(size))
        dark = [int((~layer.lit).sum()) for layer in known]
        message = f"features of {max(dark)} examples are unknown at a party" if any(dark) else ""
        return Reconstruction(
            Batch(x.cpu(), _labels(seen, rounds)),
            float(missed.mean()),
            "solved" if float(missed.max()) <= _REACHED and not any(dark) else "exhausted",
            message=message,
            evaluations=self.steps,
        )

    def features(
        self, rounds: Rounds, entries: Entries, *, generator: torch.Generator
    ) -> list[Features] | str:
        """Steps I and II at every party, or why they have no solution."""
        known = []
        for layer in entries.names:
            found = solved(rounds, layer)
            if isinstance(found, str):
                return found
            if not found.unexplained <= self.tolerance:
                return (
                    f"the equations of {layer!r} leave {found.unexplained:.1%} unexplained: "
                    "weights moved, batch indices are wrong, or the updates are protected"
                )
            known.append(found)
        return known

    def images(
        self,
        rounds: Rounds,
        entries: Entries,
        known: list[Features],
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Step III."""
        data = rounds.seen.data
        low, high = data.bounds
        drawn = torch.rand((rounds.examples, *data.shape), generator=generator)
        return inverted(
            entries,
            known,
            rounds,
            data,
            start=low + (high - low) * (0.45 + 0.1 * drawn),
            visits=math.ceil(self.steps * rounds.examples / len(rounds.visits[0])),
            learning_rate=self.learning_rate,
            variation=self.total_variation,
            matching=self.matching,
        )

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """Mean of Σ_m ‖h_m(x_n) − h_mn‖² / ‖h_mn‖² over the examples; nan without a solution."""
        rounds, entries = rounds_of(seen), _entries(seen)
        if isinstance(rounds, str) or isinstance(entries, str):
            return lambda batch: math.nan
        known = Cafe.features(self, rounds, entries, generator=torch.Generator())
        if isinstance(known, str):
            return lambda batch: math.nan
        every = torch.arange(rounds.examples)

        def at(batch: Batch) -> float:
            with torch.no_grad():
                return float(misfits(entries, known, batch.inputs.cpu().float(), every).mean())

        return at


def _entries(seen: Observation) -> Entries | str:
    mode: BatchNormMode = getattr(undefended(seen.mechanism), "batch_norm", "eval")
    state = seen.state.to(torch.device("cpu"))
    return entries_of(state, seen.data, batch_norm=mode, dtype=torch.float32)


def _labels(seen: Observation, rounds: Rounds) -> Tensor:
    """Labels granted, else the class that every example's own gradient pulls down at the head."""
    if seen.knowledge.labels is not None:
        return seen.knowledge.labels.cpu()
    head = list(seen.state.params)[-1]
    own = rounds.solved(rounds.stacked(head))
    if isinstance(own, str) or own.shape[1] % seen.data.classes:
        return torch.zeros(rounds.examples, dtype=torch.int64)
    return own.view(rounds.examples, seen.data.classes, -1).sum(2).argmin(1)


def solved(rounds: Rounds, layer: str) -> Features | str:
    """Inputs h_n and errors v_n of one linear layer with bias, or why they are not determined.

    With u_t = (1/b) Σ_{n∈S_t} g_n for frozen weights and S_tn = 1/b,

        I    ∂L_t/∂b = Σ_n S_tn v_n            v = S⁺ ∂L/∂b
        II   ∂L_t/∂W = Σ_n S_tn v_n h_nᵀ       [(SᵀS) ∘ (V Vᵀ)] h = Σ_t S_tn v_nᵀ ∂L_t/∂W

    Step II takes the normal equations of all rounds, refined on the equations themselves.

    Args:
        rounds: with known batch indices.
        layer: name of the layer.
    """
    sums = rounds.stacked(f"{layer}.bias")
    if not sums.isfinite().all():
        return f"the gradient of {layer!r} holds non-finite values"
    if not sums.any():
        return f"no gradient reaches {layer!r}"
    errors = rounds.solved(sums)
    if isinstance(errors, str):
        return errors
    gap = rounds.unexplained(errors, sums)
    lengths = errors.norm(dim=1)
    lit = lengths > _LIT * lengths.max()
    found = inputs_given(rounds, layer, errors, lit)
    if isinstance(found, str):
        return found
    inputs, left = found
    return Features(inputs, errors, lit, max(gap, left))


def inputs_given(
    rounds: Rounds, layer: str, errors: Tensor, lit: Tensor
) -> tuple[Tensor, float] | str:
    """Step II: inputs (examples, width), and the share of its equations not explained."""
    lengths = errors.norm(dim=1, keepdim=True)
    units = torch.where(lit[:, None], errors / lengths.clamp(min=_TINY), 0)
    overlaps = rounds.indicator.T @ rounds.indicator
    normal = overlaps * (units @ units.T)
    normal[~lit, ~lit] = 1
    scales = normal.diagonal().sqrt()
    factor, fault = torch.linalg.cholesky_ex(normal / scales / scales[:, None])
    if fault or float(factor.diagonal().min()) < _DEPENDENT:
        return f"the errors at {layer!r} are linearly dependent: inputs are not determined"
    width = rounds.of(0, f"{layer}.weight").shape[1]
    scaled = errors.new_zeros((rounds.examples, width))
    for _ in range(1 + _REFINEMENTS):
        residual = errors.new_zeros(scaled.shape)
        missed = total = 0.0
        for number, visit in enumerate(rounds.visits):
            mine, share = units[visit], 1 / len(visit)
            gradient = rounds.of(number, f"{layer}.weight")
            gap = gradient - share * mine.T @ scaled[visit]
            residual[visit] += share * mine @ gap
            missed += float(gap.square().sum())
            total += float(gradient.square().sum())
        if not total < float("inf"):
            return f"the gradient of {layer!r} holds non-finite values"
        step = torch.cholesky_solve(residual / scales[:, None], factor) / scales[:, None]
        scaled = scaled + step
    inputs = torch.where(lit[:, None], scaled / lengths.clamp(min=_TINY), 0)
    return inputs, (missed / total) ** 0.5 if total else 0.0
