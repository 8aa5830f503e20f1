"""Whole batches from a first linear layer with ReLU (SPEAR; Dimitrov et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.closed_form.explained import (
    labelled,
    no_solution,
    rounding,
    unexplained,
)
from gradleak.attacks.closed_form.mixture import mixture
from gradleak.attacks.parts.needs import require
from gradleak.seeding import child
from gradleak.types import About, Batch, Fact, Observation, Reconstruction

_ROUND = 4096
"""Submatrices that are drawn at a time."""
_MARGIN = 2
"""Zeros of a candidate, per row that was drawn to make them."""
_DEPENDENT = 1e-4


@dataclass(frozen=True)
class Spear:
    """Q with L Q sparse, where ∂L/∂W = L R has rank b: ReLU leaves one such Q.

    With Z = X Wᵀ + c the first layer's outputs, ∂L/∂W = (∂L/∂Z)ᵀ X has rank b, and for its
    singular value decomposition L R there is one b × b matrix Q with (∂L/∂Z)ᵀ = L Q, X = Q⁻¹ R.
    Column i of L Q is zero where example i leaves a unit dark.

    1. Draw b − 1 rows of L. If example i leaves all of them dark, what they send to zero is q_i.
    2. Keep candidates with more zeros than were drawn for; fit each again to all its zeros.
    3. Take the b with most zeros that are linearly independent.
    4. Lengths: L Q 1 = ∂L/∂c. Then X = Q⁻¹ R, and the labels from the head.
    5. Claim it if it explains the whole update; else draw on.

    An honest server needs neither labels nor a prior. Exact for fewer examples than units and
    inputs, noise-free gradients and enough units dark, about half of them; 2^(b − 1) draws an
    example, so seconds for 8 and out of reach for 20.

    Args:
        draws: submatrices drawn before giving up.
    """

    draws: int = 1_000_000

    about: ClassVar[About] = About(
        id="spear",
        title="Exact batches of a first ReLU layer (SPEAR)",
        paper="Dimitrov, Baader, Müller, Vechev, SPEAR: Exact Gradient Inversion of Batches in "
        "Federated Learning, NeurIPS 2024",
        link="https://arxiv.org/abs/2403.03945",
        modalities=frozenset({"image", "tabular"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        deviations=(
            "which candidates to keep is ours: greedily by zeros among the linearly independent "
            "(a mixture of k examples has fewer zeros and lies in their span); the paper has a "
            "threshold and a greedy search for consistent signs",
            "units dark for the whole batch are dropped before counting, rows are normalised, and "
            "a candidate is fitted again to all its zeros",
            "accepted by the gap of the whole update, where the paper counts consistent signs",
            "labels from the head, so that the claim is a batch",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        refuse = partial(no_solution, seen)
        mixed = mixture(seen)
        if isinstance(mixed, str):
            return refuse(mixed)
        enough = rounding(seen) ** 0.5
        search = _Directions(mixed.left, rounding(seen) ** (2 / 3))
        least = float("inf")
        for directions in search.selections(self.draws, child(generator, "submatrices")):
            pictures = mixed.pictures(directions)
            claim = None if pictures is None else labelled(seen, pictures)
            if isinstance(claim, str):
                return refuse(claim)
            gap = float("inf") if claim is None else unexplained(seen, claim)
            if claim is not None and gap <= enough:
                return Reconstruction(claim, gap, "solved")
            least = min(least, gap)
        if search.found < mixed.size:
            return refuse(
                f"{search.found} sparse directions in {self.draws} draws: expected {mixed.size}, "
                "units that ReLU leaves dark for one example and lit for others"
            )
        return refuse(f"the best selection leaves {least:.1%} of the update unexplained")

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """The share of the update that a claim leaves unexplained."""
        return partial(unexplained, seen)


class _Directions:
    """Candidates for the columns of Q: the b of most zeros that are linearly independent.

    Args:
        left: (units, b) L.
        tolerance: entries of L q, for unit rows and unit q, that count as zero.
    """

    def __init__(self, left: Tensor, tolerance: float) -> None:
        lengths = left.norm(dim=1)
        lit = lengths > tolerance * lengths.max()
        self.rows = left[lit] / lengths[lit, None]
        self.tolerance = tolerance
        self.chosen = left.new_empty((0, left.shape[1]))

    @property
    def found(self) -> int:
        return len(self.chosen)

    def selections(self, draws: int, stream: torch.Generator) -> Iterator[Tensor]:
        """Q (b, b) up to lengths, whenever drawing has changed it and it is complete."""
        size = self.rows.shape[1]
        if size == 1:
            yield torch.ones((1, 1), dtype=self.rows.dtype)
            return
        for _ in range(-(-draws // _ROUND)):
            if self._changed_by(self._drawn(stream)) and len(self.chosen) == size:
                yield self.chosen.T

    def _drawn(self, stream: torch.Generator) -> Tensor:
        """(n, b) unit vectors that more rows send to zero than were drawn for that."""
        units, size = self.rows.shape
        rows = torch.rand((_ROUND, units), generator=stream).topk(size - 1).indices
        gauge = torch.randn((_ROUND, 1, size), generator=stream, dtype=self.rows.dtype)
        wanted = torch.zeros((_ROUND, size), dtype=self.rows.dtype)
        wanted[:, -1] = 1
        q, _ = torch.linalg.solve_ex(torch.cat([self.rows[rows], gauge], 1), wanted)
        q = q / q.norm(dim=1, keepdim=True)
        kept = q.isfinite().all(1) & (self._zeros(q).sum(0) > _MARGIN * (size - 1))
        found: Tensor = q[kept]
        return found

    def _zeros(self, q: Tensor) -> Tensor:
        found: Tensor = (self.rows @ q.T).abs() <= self.tolerance
        return found

    def _changed_by(self, drawn: Tensor) -> bool:
        """Choose again, from what was chosen and drawn: greedily, by zeros."""
        pool = torch.cat([self.chosen, drawn])
        order = self._zeros(pool).sum(0).argsort(descending=True, stable=True)
        left, picked = pool[order], []
        for _ in range(pool.shape[1]):
            free = (left.norm(dim=1) > _DEPENDENT).nonzero()
            if not len(free):
                break
            place = int(free[0])
            picked.append(int(order[place]))
            direction = left[place] / left[place].norm()
            left = left - (left @ direction)[:, None] * direction
        changed = any(i >= len(self.chosen) for i in picked)
        if changed:
            zeros = self._zeros(pool[picked]).T
            self.chosen = torch.stack([torch.linalg.svd(self.rows[z])[2][-1] for z in zeros])
        return changed
