"""The exact input of a first linear layer with bias (Phong et al., 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from gradleak.attacks.closed_form.explained import no_solution
from gradleak.attacks.closed_form.first_layer import first_linear
from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.attacks.parts.needs import require
from gradleak.errors import NotApplicable
from gradleak.types import About, Batch, Fact, Observation, Reconstruction


@dataclass(frozen=True)
class LinearLayer:
    """x = (∂L/∂W_j) / (∂L/∂b_j) for any unit j of a first linear layer that is active.

    With z = W h + b and one example, ∂L/∂W = δ hᵀ and ∂L/∂b = δ, whatever follows the layer. An
    honest server divides; h is the flattened image after an elementwise affine normalisation,
    which is undone. Local training on one example scales both alike, so a delta works as well.

        h = Σ_j δ_j ∂L/∂W_j / Σ_j δ_j²          (over the coordinates that left the client)
        x = (h − h(0)) / (h(1) − h(0))

    Exact for one example; `no_solution` for several, without a bias, or behind another layer.
    """

    about: ClassVar[About] = About(
        id="linear-layer",
        title="Closed form of a first linear layer",
        paper="Phong et al., Privacy-Preserving Deep Learning: Revisited and Enhanced, ATIS 2017; "
        "Geiping et al., NeurIPS 2020, Prop. 3.1",
        link="https://arxiv.org/abs/2003.14053",
        modalities=frozenset({"image", "tabular"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        deviations=(
            "least squares over all units (published: one unit), the same without noise",
            "coordinates that a sparsifier dropped are left out of the sums",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        size = seen.knowledge.batch_size or 1
        refuse = partial(no_solution, seen)
        if size != 1:
            return refuse(f"the ratio is exact for one example, the batch has {size}")
        first = first_linear(seen.state, seen.data)
        if isinstance(first, str):
            return refuse(first)
        weight = seen.update.values[first.weight].double()
        bias = seen.update.values[first.bias].double()[:, None]
        if not (weight.isfinite().all() and bias.isfinite().all()):
            return refuse("the first layer's gradient holds non-finite values")
        used = (weight != 0) & (bias != 0)
        energy = (bias**2 * used).sum(0)
        if not energy.any():
            return refuse("the first layer's gradient is zero: no unit is active")
        hidden = (bias * weight * used).sum(0) / energy.masked_fill(energy == 0, 1.0)
        x = first.undo(hidden).clamp(*seen.data.bounds)
        try:
            labels = known_or_recovered(seen).cpu()
        except NotApplicable:
            labels = torch.zeros(1, dtype=torch.int64)
        return Reconstruction(Batch(x[None].cpu(), labels), math.nan, "solved")

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """A closed form minimises nothing: nan everywhere."""
        return lambda batch: math.nan
