"""Fishing for user data, by class (Wen, Geiping, Fowl, Goldblum & Goldstein, ICML 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from gradleak.attacks.active.claims import claimed
from gradleak.attacks.active.head import Head
from gradleak.attacks.parts.needs import require
from gradleak.attacks.recipes.inverting_gradients import InvertingGradients
from gradleak.errors import InvalidInput
from gradleak.types import About, Batch, DataSpec, Fact, ModelState, Observation, Reconstruction


@dataclass(frozen=True)
class Fishing:
    """∂L/∂e_i = (p_ic − [y_i = c]) w_c: only examples of class c reach the network below the head.

    A malicious server clears the head's rows of all classes but c and takes `bias` nats from the
    logit of c. Then p_c = 0 for every example: those of other classes send nothing below the
    head, those of class c send −w_c. The update of a batch becomes that of its examples of class c.

        n_c = −b · ∂L/∂b_c, exactly                       (0: nothing was caught)
        invert the update below the head as that of n_c examples, by Inverting Gradients

    Args:
        target: c.
        bias: nats.
        steps: gradient evaluations of the inversion.
    """

    target: int = 0
    bias: float = 1000.0
    steps: int = 4800

    about: ClassVar[About] = About(
        id="fishing",
        title="Fishing by class",
        paper="Wen et al., Fishing for User Data in Large-Batch Federated Learning via Gradient "
        "Magnification, ICML 2022",
        link="https://arxiv.org/abs/2202.00580",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="of directions (cosine)",
        prior="total variation in the box",
        server="malicious",
        deviations=(
            "the head's own update is left out: other classes still write into it",
            "several examples of the class are inverted together; see feature-fishing",
        ),
    )
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"steps": 400},
        "thorough": {"steps": 24000},
    }

    def __post_init__(self) -> None:
        if not 0 < self.bias < math.inf:
            raise InvalidInput(f"bias={self.bias}: expected a positive number of nats")

    def plant(
        self,
        state: ModelState,
        public: Batch,
        *,
        data: DataSpec,
        batch_size: int,
        generator: torch.Generator,
    ) -> ModelState:
        """Replace the head.

        Raises:
            InvalidInput: there is no such class.
            NotApplicable: the network does not end in a linear head with biases.
        """
        head = head_for(state, data, target=self.target)
        weight = torch.zeros_like(state.params[head.weight])
        weight[self.target] = state.params[head.weight][self.target]
        bias = torch.zeros_like(state.params[head.bias])
        bias[self.target] = -self.bias
        return head.replaced(state, weight, bias)

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        head = head_for(seen.state, seen.data, target=self.target)
        size = seen.knowledge.batch_size or 1
        gradient = seen.mechanism.as_gradient(seen.update, batch_size=size).values[head.bias]
        caught = -size * float(gradient[self.target])
        count = round(caught) if math.isfinite(caught) else 0
        if not 1 <= count <= size:
            return claimed(
                seen,
                torch.empty((0, *seen.data.shape)),
                f"the head's bias counts {caught:.3g} examples of class {self.target}",
            )
        return inverted(seen, head, target=self.target, count=count, steps=self.steps, by=generator)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """Its inversion is of some examples alone: a whole batch has no value, nan everywhere."""
        return lambda batch: math.nan


def head_for(state: ModelState, data: DataSpec, *, target: int) -> Head:
    """The head, if it has this class.

    Raises:
        InvalidInput: it has not.
        NotApplicable: there is no linear head with biases.
    """
    if not 0 <= target < data.classes:
        raise InvalidInput(f"target={target}: expected a class from 0 to {data.classes - 1}")
    return Head.of(state, classes=data.classes)


def inverted(
    seen: Observation,
    head: Head,
    *,
    target: int,
    count: int,
    steps: int,
    by: torch.Generator,
) -> Reconstruction:
    """Claim the `count` examples of a class that reached the network below the head."""
    alone = head.below(seen, torch.full((count,), target))
    (claim,) = InvertingGradients(steps=steps).on_group([alone], generators=[by], engine="loop")
    found = claimed(seen, claim.batch.inputs, f"{count} of class {target} isolated")
    labels = found.batch.labels.clone()
    if seen.knowledge.labels is None:
        labels[:count] = target
    return Reconstruction(
        Batch(found.batch.inputs, labels),
        claim.objective,
        claim.status,
        message=found.message,
        evaluations=claim.evaluations,
        history=claim.history,
        engine=claim.engine,
    )
