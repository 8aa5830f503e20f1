"""Fishing for user data, by a feature (Wen, Geiping, Fowl, Goldblum & Goldstein, ICML 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradleak.attacks.active.claims import claimed
from gradleak.attacks.active.fishing import head_for, inverted
from gradleak.attacks.parts.needs import require
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.types import About, Batch, DataSpec, Fact, ModelState, Observation, Reconstruction

_MOST_PUBLIC = 2048


@dataclass(frozen=True)
class FeatureFishing:
    """p_ic = [⟨v, e_i⟩ > θ]: of class c only an example below the threshold sends a gradient.

    Where a batch holds several examples of class c, fishing by class returns their sum. A malicious
    server makes the head a hard gate, z_c = β (⟨v, e⟩ − θ) and all other logits 0:

        ∂L/∂e_i = (p_ic − [y_i = c]) β v    (0 above θ for class c, and below θ for the others)

    v separates c from the rest on public features (ridge regression) and θ is the quantile at which
    one example in the n_c expected lies below. If −b · ∂L/∂b_c, which is those of c below less
    those of other classes above, is one, the update below the head is inverted as that of one.

    Args:
        target: c.
        steepness: β, in standard deviations of the public scores.
        steps: gradient evaluations of the inversion.
    """

    target: int = 0
    steepness: float = 1000.0
    steps: int = 4800

    about: ClassVar[About] = About(
        id="feature-fishing",
        title="Fishing by a feature",
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
            "a direction fitted on public features (published: one feature), since an example of "
            "another class above the threshold is caught as well",
            "one round: the threshold comes from public examples, not from earlier queries",
            "the head's own update is left out: other classes still write into it",
        ),
    )
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"steps": 400},
        "thorough": {"steps": 24000},
    }

    def __post_init__(self) -> None:
        if not 0 < self.steepness < math.inf:
            raise InvalidInput(f"steepness={self.steepness}: expected a positive number")

    def plant(
        self,
        state: ModelState,
        public: Batch,
        *,
        data: DataSpec,
        batch_size: int,
        generator: torch.Generator,
    ) -> ModelState:
        """Replace the head by the gate.

        Raises:
            InvalidInput: there is no such class.
            NotApplicable: no linear head with biases, or too few public examples of the class.
        """
        head = head_for(state, data, target=self.target)
        like = state.params[head.weight]
        order = torch.randperm(len(public), generator=generator)[:_MOST_PUBLIC]
        features = head.features(state, public.inputs[order].to(like)).cpu().double()
        own = (public.classes[order] == self.target).cpu()
        half = len(order) // 2
        if int(own[:half].sum()) < 2 or int(own[half:].sum()) < 2:
            raise NotApplicable(
                f"feature-fishing: {int(own.sum())} public examples of class {self.target}, "
                "expected at least 4"
            )
        direction = _separating(features[:half], own[:half])
        scores = features[half:] @ direction  # the other half: thresholds must not be fitted
        expected = max(1.0, batch_size * float(own.double().mean()))
        threshold = torch.quantile(scores[own[half:]], 1 / expected)
        gain = self.steepness / scores.std()
        weight, bias = torch.zeros_like(like), torch.zeros_like(state.params[head.bias])
        weight[self.target] = gain * direction
        bias[self.target] = -gain * threshold
        return head.replaced(state, weight, bias)

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        head = head_for(seen.state, seen.data, target=self.target)
        size = seen.knowledge.batch_size or 1
        gradient = seen.mechanism.as_gradient(seen.update, batch_size=size).values
        caught = -size * float(gradient[head.bias][self.target])
        below = [v for k, v in gradient.items() if k not in (head.weight, head.bias)]
        if not abs(caught - 1) < 0.5 or not any(bool(v.any()) for v in below):
            return claimed(
                seen,
                torch.empty((0, *seen.data.shape)),
                f"the gate lets {caught:.3g} examples pass, not one",
            )
        return inverted(seen, head, target=self.target, count=1, steps=self.steps, by=generator)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """Its inversion is of one example alone: a whole batch has no value, nan everywhere."""
        return lambda batch: math.nan


def _separating(features: Tensor, own: Tensor) -> Tensor:
    """Ridge regression of [y = c] on features (n, width), in the n dimensions of its dual."""
    centred = features - features.mean(0)
    gram = centred @ centred.T
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    wanted = own.double() - own.double().mean()
    dual: Tensor = torch.linalg.solve(gram + ridge, wanted)
    return centred.T @ dual
