"""ATS: train on transformed images (Gao et al., CVPR 2021)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Wrapped
from gradleak.errors import IntractableLikelihood, InvalidInput, NotApplicable
from gradleak.types import Batch, Mechanism, ModelState, Update

_LUMA = (0.299, 0.587, 0.114)
_MOST_OUTCOMES = 64


class Operation(NamedTuple):
    """One sub-policy: what it does, and how strongly on the scale 0 to 9 of the published list."""

    name: str
    level: int

    @property
    def strength(self) -> float:
        """Shift as a share of the side, or how far the factor of an enhancement is from 1."""
        return self.level / 9 * (150 / 331 if self.name.startswith("shift") else 0.5)


_LEVELS: dict[str, dict[int, int]] = {
    "shift-x": {3: 9, 21: 5},
    "shift-y": {7: 2, 24: 3, 42: 3, 43: 3, 48: 3},
    "contrast": {1: 6, 18: 7},
    "sharpness": {4: 1, 5: 3, 14: 9, 19: 5, 25: 6},
    "brightness": {13: 5, 15: 9, 26: 6, 38: 3},
}
OPERATIONS: dict[int, Operation] = {
    number: Operation(name, level)
    for name, levels in _LEVELS.items()
    for number, level in levels.items()
}
"""The sub-policies of the published list of 50 that its selected policies are made of, by index."""

Outcome = tuple[tuple[Operation, int], ...]
"""Operations in order, each with the sign it drew."""


@dataclass(frozen=True)
class ATS:
    """u = g(T(x), y) with T a fixed policy of augmentations, its signs drawn for every image.

    A policy such as 3-1-7 applies sub-policies 3, 1 and 7 of the published list; of several joined
    by "/" (published: "+") every image draws one. Shifts fill with black, enhancements multiply by
    1 ± strength, values stay in [0, 1].

    The gradient is an ordinary one of T(x), so the attack needs no change and claims T(x), with
    which audits compare its claims: what T shows, the server sees.

    Source: Gao et al., "Privacy-preserving Collaborative Learning with Automatic Transformation
    Search", CVPR 2021; list, ranges and signs as in its code, which ignores the listed
    probabilities. Without its usual cropping and flipping, and without rounding to 8 bits.

    Args:
        policy: indices of sub-policies, e.g. 3-1-7, 43-18-18, 21-13-3, 7-4-15 or 3-1-7/43-18-18.
    """

    policy: str = "3-1-7"

    id: ClassVar[str] = "ats"
    title: ClassVar[str] = "Automatic transformation search"
    sheet: ClassVar[Sheet] = Sheet(
        paper=(
            "Gao et al., Privacy-preserving Collaborative Learning with Automatic Transformation "
            "Search, CVPR 2021"
        ),
        link="https://arxiv.org/abs/2011.12505",
        promises="Gradients of transformed images reveal nothing of the images.",
        broken_by=(
            "any attack, unchanged: it recovers the transformed image, in which the original "
            "shows; early in training best"
        ),
        cost="accuracy of training under strong augmentation; no time",
    )

    def __post_init__(self) -> None:
        policies = [one.split("-") for one in re.split("[+/]", self.policy)]
        if len({len(one) for one in policies}) > 1:
            raise InvalidInput(f"policy={self.policy!r}: expected policies of one length")
        for number in itertools.chain(*policies):
            if not (number.isascii() and number.isdigit() and int(number) in OPERATIONS):
                raise InvalidInput(
                    f"policy={self.policy!r}: {number!r} is none of the sub-policies "
                    f"{', '.join(map(str, sorted(OPERATIONS)))}"
                )

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Transformed(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """It claims nothing of the update's statistics."""
        return None

    @property
    def outcomes(self) -> list[Outcome]:
        """Every draw there is, all equally likely."""
        found: list[Outcome] = []
        for one in re.split("[+/]", self.policy):
            operations = [OPERATIONS[int(n)] for n in one.split("-")]
            signs = itertools.product((1, -1), repeat=len(operations))
            found += [tuple(zip(operations, drawn, strict=True)) for drawn in signs]
        return found

    def draw(self, generator: torch.Generator) -> Outcome:
        """The transformation of one image."""
        outcomes = self.outcomes
        return outcomes[int(torch.randint(len(outcomes), (), generator=generator))]


def applied(outcome: Outcome, inputs: Tensor) -> Tensor:
    """T(x) of images (b, c, h, w) in [0, 1]; differentiable."""
    for operation, sign in outcome:
        inputs = _OPERATORS[operation.name](inputs, sign * operation.strength)
    return inputs


def _shift(inputs: Tensor, share: float, dim: int) -> Tensor:
    """x'(p) = x(p + share · side), black where that lies outside."""
    side = inputs.shape[dim]
    step = math.floor(share * side + 0.5)
    source = torch.arange(side, device=inputs.device) + step
    inside = ((source >= 0) & (source < side)).to(inputs)
    shape = [side if d == dim else 1 for d in range(inputs.ndim)]
    return inputs.index_select(dim, source.clamp(0, side - 1)) * inside.reshape(shape)


def _grey(inputs: Tensor) -> Tensor:
    """Luminance (b, 1, h, w)."""
    if inputs.shape[1] != 3:
        return inputs.mean(1, keepdim=True)
    return (inputs * inputs.new_tensor(_LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def _smooth(inputs: Tensor) -> Tensor:
    """A weighted 3×3 mean with the centre counted five times; the outermost pixels stay."""
    if min(inputs.shape[-2:]) < 3:
        return inputs
    kernel = inputs.new_ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 5
    channels = inputs.flatten(0, 1)[:, None]
    inner = conv2d(channels, kernel / 13).reshape(
        *inputs.shape[:2], *(n - 2 for n in inputs.shape[2:])
    )
    middle = torch.cat([inputs[..., 1:-1, :1], inner, inputs[..., 1:-1, -1:]], -1)
    return torch.cat([inputs[..., :1, :], middle, inputs[..., -1:, :]], -2)


def _blend(inputs: Tensor, other: Tensor, change: float) -> Tensor:
    """other + (1 + change) · (x − other), clipped."""
    return (other + (1 + change) * (inputs - other)).clamp(0, 1)


_OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "shift-x": lambda x, share: _shift(x, share, 3),
    "shift-y": lambda x, share: _shift(x, share, 2),
    "contrast": lambda x, change: _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), change),
    "sharpness": lambda x, change: _blend(x, _smooth(x), change),
    "brightness": lambda x, change: _blend(x, torch.zeros_like(x), change),
}


@dataclass(frozen=True)
class _Transformed(Wrapped):
    rule: ATS

    @property
    def deterministic(self) -> bool:
        return False

    def mean(self, state: ModelState, batch: Batch) -> Update:
        """Over every combination of draws, where these are few."""
        outcomes = self.rule.outcomes
        if len(outcomes) ** len(batch) > _MOST_OUTCOMES:
            raise IntractableLikelihood(f"ats: too many transformations of {len(batch)} images")
        draws = itertools.product(outcomes, repeat=len(batch))
        updates = [self.inner.mean(state, transformed(batch, each)).values for each in draws]
        means = {k: torch.stack([u[k] for u in updates]).mean(0) for k in updates[0]}
        return Update(means, self.kind)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.inner.sample(state, self._transformed(batch, generator), generator=generator)

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        transformed = self._transformed(batch, generator)
        return self.inner.trained_on(state, transformed, generator=generator)

    def _transformed(self, batch: Batch, generator: torch.Generator) -> Batch:
        return transformed(batch, [self.rule.draw(generator) for _ in range(len(batch))])


def transformed(batch: Batch, outcomes: Sequence[Outcome]) -> Batch:
    """The batch that the client trains on.

    Raises:
        NotApplicable: the data are no images.
    """
    if batch.inputs.ndim != 4:
        raise NotApplicable("ats: expected images (b, channels, height, width)")
    images = [applied(o, batch.inputs[i : i + 1]) for i, o in enumerate(outcomes)]
    return Batch(torch.cat(images), batch.labels)
