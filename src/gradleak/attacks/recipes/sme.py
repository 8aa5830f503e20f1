"""Surrogate Model Extension (Zhu, Yao & Blaschko, ICML 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from gradleak.attacks.labels.zlg import local_steps
from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.one_gradient import as_one_gradient
from gradleak.attacks.parts.surrogate import LineObjective, OnLine, Surrogate
from gradleak.attacks.recipes.inverting_gradients import InvertingGradients
from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import check_positive
from gradleak.types import About, Fact, Observation


@dataclass(frozen=True)
class SurrogateModelExtension(InvertingGradients):
    """min over x in the box and α in [0, 1] of 1 − cos(−∇ℓ(f(x; θ_0 + α u), y), u) + β · TV(x).

    An honest server saw the weights before and after local training, u = θ_T − θ_0. If these moved
    along a line, one gradient of the whole batch, taken somewhere on it, has the direction of u
    (the mean value theorem): no step, minibatch or order need be known.

        x ~ N(centre of the box, a quarter of its width), α = 1/2
        repeat: signs of the gradients in x and α; Adam step; clip to box and to [0, 1]

    Where the client takes one step, or sends a gradient, this is Inverting Gradients.

    Args:
        steps: gradient evaluations per restart.
        learning_rate: Adam's first step, in units of the box.
        total_variation: β.
        batch_norm: weight of the batch-normalisation penalty, used where statistics are granted.
        restarts: independent starts; the objective chooses.
        halving: drop the worse half of the restarts after …, 1/4 and 1/2 of the steps.
        place: α at the start, in [0, 1); from 0 it does not move, and the update counts as one
            gradient at the weights broadcast.
        place_rate: Adam's first step in α.
    """

    place: float = 0.5
    place_rate: float = 0.01

    about: ClassVar[About] = About(
        id="sme",
        title="Surrogate Model Extension",
        paper="Zhu, Yao & Blaschko, Surrogate Model Extension (SME): A Fast and Accurate Weight "
        "Update Attack on Federated Learning, ICML 2023",
        link="https://arxiv.org/abs/2306.00127",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="of directions (cosine), at a place on the line of weights",
        prior="total variation in the box",
        deviations=(
            *InvertingGradients.about.deviations,
            "Adam on signs with first step 0.1 of the box, α's 0.01 (published code: plain Adam, "
            "1 in normalised units and 0.001)",
        ),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.place < 1:
            raise InvalidInput(f"place={self.place}: expected a number from 0 to below 1")
        check_positive(place_rate=self.place_rate)

    def compose(self, seen: Sequence[Observation]) -> Objective:
        # Labels are counted over the local steps, which are then forgotten.
        known = [replace(o.knowledge, labels=known_or_recovered(o)) for o in seen]
        told = [replace(o, knowledge=k) for o, k in zip(seen, known, strict=True)]
        believed = [as_one_gradient(o) for o in told]
        plain = super().compose(believed)
        if local_steps(seen[0]) == 1 or self.place == 0:
            return plain
        low, high = seen[0].data.bounds
        unknown = OnLine(
            **vars(plain.unknown),
            first=self.place,
            pace=self.place_rate / (self.learning_rate * (high - low)),
        )
        fit = Surrogate(believed, cosine, dtype=self.dtype)
        return LineObjective(**vars(plain) | {"unknown": unknown, "fit": fit})
