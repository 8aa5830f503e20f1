"""Trap weights (Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov & Papernot, 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.active.claims import claimed, inside
from gradleak.attacks.closed_form.first_layer import first_linear
from gradleak.attacks.parts.needs import require
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.types import About, Batch, DataSpec, Fact, ModelState, Observation, Reconstruction

_SAME = 1e-3
"""Two rows that agree this closely, in widths of the box, hold one example."""


@dataclass(frozen=True)
class TrapWeights:
    """x = ∇W_j / ∇b_j for every unit j of a first linear layer that one example alone activates.

    A malicious server makes activations rare. In each row a random half of the weights is
    −|N(0, 1)| and the other half s times the same numbers, so that positive images mostly end below
    zero; s is chosen on public images so that a unit is active for 1 in b of them, when it
    is most often active for exactly one of the b. Reading the rows needs no honest server's help:

        images = rows whose quotient lies in the box
        take those that several rows repeat, then the rest by contrast,
        leaving out what earlier ones span: a mixture of them

    Read from an unaltered network the rows give the passive attack on a batch.

    Args:
        rate: share of public images that activate a unit, times b.
    """

    rate: float = 1.0

    about: ClassVar[About] = About(
        id="trap-weights",
        title="Curious Abandon Honesty: trap weights",
        paper="Boenisch et al., When the Curious Abandon Honesty: Federated Learning Is Not "
        "Private, EuroS&P 2023",
        link="https://arxiv.org/abs/2112.02918",
        modalities=frozenset({"image", "tabular"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        server="malicious",
        deviations=(
            "s follows from public images and the batch size (published: a constant)",
            "the layer keeps its norm",
            "the first layer must be linear: no identity kernels are put before it",
        ),
    )

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise InvalidInput(f"rate={self.rate}: expected a positive number")

    def plant(
        self,
        state: ModelState,
        public: Batch,
        *,
        data: DataSpec,
        batch_size: int,
        generator: torch.Generator,
    ) -> ModelState:
        """Replace the first linear layer's numbers.

        Raises:
            NotApplicable: the first layer is not linear with a bias, or does not see the data.
        """
        first = first_linear(state, data)
        if isinstance(first, str):
            raise NotApplicable(f"trap-weights: {first}")
        layer = state.params[first.weight]
        units, width = layer.shape
        sizes = torch.randn((units, width // 2), generator=generator, dtype=torch.float64).abs()
        places = torch.rand((units, width), generator=generator).argsort(1)
        lower, upper = places[:, : width // 2], places[:, width // 2 : 2 * (width // 2)]
        low, high = data.bounds
        shares = (public.inputs.flatten(1).cpu().double() - low) / (high - low)
        down = torch.zeros((units, width), dtype=torch.float64).scatter_(1, lower, sizes)
        up = torch.zeros((units, width), dtype=torch.float64).scatter_(1, upper, sizes)
        # Active where s · up > down: s is a quantile of their ratio.
        ratio = (shares @ down.T) / (shares @ up.T).clamp(min=1e-9)
        scale = ratio.flatten().kthvalue(max(1, int(ratio.numel() * self._share(batch_size))))[0]
        in_shares = scale * up - down
        # x = low + (high − low) · share = undo(h), affine in what enters the layer, h.
        offset = (first.undo(torch.zeros(width, dtype=torch.float64)).flatten() - low) / (
            high - low
        )
        slope = (first.undo(torch.ones(width, dtype=torch.float64)).flatten() - low) / (high - low)
        weight, bias = in_shares * (slope - offset), in_shares @ offset
        norm = layer.double().norm().cpu() / weight.norm()
        return replace(
            state,
            params={
                **state.params,
                first.weight: (norm * weight).to(layer),
                first.bias: (norm * bias).to(layer),
            },
        )

    def _share(self, batch_size: int) -> float:
        return min(1.0, self.rate / max(batch_size, 2))

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        nothing = torch.empty((0, *seen.data.shape))
        first = first_linear(seen.state, seen.data)
        if isinstance(first, str):
            return claimed(seen, nothing, first)
        weight = seen.update.values[first.weight].double()
        bias = seen.update.values[first.bias].double()
        if not (weight.isfinite().all() and bias.isfinite().all()):
            return claimed(seen, nothing, "the first layer's gradient holds non-finite values")
        used = bias != 0
        rows = [first.undo(h) for h in weight[used] / bias[used][:, None]]
        images = torch.stack(rows) if rows else nothing.double()
        images = images[inside(images, seen.data.bounds)]
        found = _told_apart(images, most=seen.knowledge.batch_size or 1, bounds=seen.data.bounds)
        message = (
            f"{len(found)} of {seen.knowledge.batch_size} examples claimed, from "
            f"{int(used.sum())} active units of {len(bias)}"
        )
        return claimed(seen, found, message)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """A closed form minimises nothing: nan everywhere."""
        return lambda batch: math.nan


def _told_apart(images: Tensor, *, most: int, bounds: tuple[float, float]) -> Tensor:
    """Examples among the quotients of rows (n, *shape), of which many repeat or mix others."""
    flat = images.flatten(1)
    same = torch.cdist(flat, flat, p=math.inf) < _SAME * (bounds[1] - bounds[0])
    repeated = same.sum(1)
    contrast = flat.std(1) if len(flat) else repeated.double()
    chosen: list[int] = []
    span = flat.new_zeros((flat.shape[1], 0))
    for i in sorted(range(len(flat)), key=lambda i: (-min(int(repeated[i]), 2), -contrast[i])):
        rest = flat[i] - span @ (span.T @ flat[i])
        rest = rest - span @ (span.T @ rest)
        if rest.norm() > 10 * _SAME * flat[i].norm():
            chosen.append(i)
            span = torch.cat([span, rest[:, None] / rest.norm()], 1)
        if len(chosen) == most:
            break
    return images[chosen]
