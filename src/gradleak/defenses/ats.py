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

from gradleak.defenses.encoded import Encoded
from gradleak.defenses.sheet import Sheet
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
        """Shift as a share of the side, angle in degrees, threshold or bits of 8-bit values, …"""
        low, high = _RANGES.get(self.name, (0.0, 0.5))
        return low + (high - low) * self.level / 9

    @property
    def signs(self) -> tuple[int, ...]:
        """What it may draw."""
        return (1, -1) if self.name in _SIGNED else (1,)


_RANGES = {
    "shift-x": (0.0, 150 / 331),
    "shift-y": (0.0, 150 / 331),
    "shear-y": (0.0, 0.3),
    "rotate": (0.0, 30.0),
    "posterize": (8.0, 4.0),
    "solarize": (256.0, 0.0),
}
"""From level 0 to 9; of enhancements, how far the factor is from 1: 0 to 0.5."""
_SIGNED = {"shift-x", "shift-y", "shear-y", "contrast", "sharpness", "brightness", "colour"}

_LEVELS: dict[str, dict[int, int]] = {
    "shift-x": {3: 9, 21: 5},
    "shift-y": {7: 2, 24: 3, 42: 3, 43: 3, 48: 3},
    "shear-y": {6: 2, 10: 5},
    "rotate": {2: 2},
    "contrast": {1: 6, 18: 7},
    "sharpness": {4: 1, 5: 3, 14: 9, 19: 5, 25: 6},
    "brightness": {13: 5, 15: 9, 26: 6, 38: 3},
    "colour": {12: 3, 20: 5, 27: 8, 34: 5, 39: 0},
    "autocontrast": {8: 5, 23: 8, 31: 0, 36: 4, 41: 0, 44: 1, 49: 1},
    "equalize": {9: 2, 16: 5, 17: 1, 22: 7, 30: 0, 32: 8, 33: 4, 35: 5, 46: 5},
    "posterize": {11: 5},
    "solarize": {28: 0, 37: 4, 40: 1, 45: 1},
    "invert": {0: 7, 29: 0, 47: 0},
}
OPERATIONS: dict[int, Operation] = {
    number: Operation(name, level)
    for name, levels in _LEVELS.items()
    for number, level in levels.items()
}
"""The published list of 50 sub-policies, by index."""

Outcome = tuple[tuple[Operation, int], ...]
"""Operations in order, each with the sign it drew."""


@dataclass(frozen=True)
class ATS:
    """u = g(T(x), y) with T a fixed policy of augmentations, its signs drawn for every image.

    A policy such as 3-1-7 applies sub-policies 3, 1 and 7 of the published list; of several joined
    by "/" (published: "+") every image draws one. Shifts fill with black, enhancements multiply by
    1 ± strength, values stay in [0, 1]. `ats_search.search` looks for policies.

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
    mixes_labels: ClassVar[bool] = False
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
                    f"policy={self.policy!r}: {number!r} is none of the sub-policies 0 to 49"
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
            signs = itertools.product(*(operation.signs for operation in operations))
            found += [tuple(zip(operations, drawn, strict=True)) for drawn in signs]
        return found

    def draw(self, generator: torch.Generator) -> Outcome:
        """The transformation of one image."""
        outcomes = self.outcomes
        return outcomes[int(torch.randint(len(outcomes), (), generator=generator))]

    def encode(self, state: ModelState, batch: Batch, generator: torch.Generator) -> Batch:
        """The transformed images that the client trains on."""
        return transformed(batch, [self.draw(generator) for _ in range(len(batch))])


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


def _autocontrast(inputs: Tensor) -> Tensor:
    """Every channel stretched to [0, 1]; a constant one stays."""
    low, high = inputs.amin((2, 3), keepdim=True), inputs.amax((2, 3), keepdim=True)
    width = torch.where(high > low, high - low, 1.0)
    return torch.where(high > low, (inputs - low) / width, inputs)


def _equalized(inputs: Tensor) -> Tensor:
    """Every channel's 8-bit histogram flattened, by Pillow's table of whole numbers."""
    grey = (inputs * 255).round().long()
    planes = []
    for plane in grey.flatten(0, 1).flatten(1):
        counts = torch.bincount(plane, minlength=256)
        filled = counts[counts > 0]
        step = int(filled.sum() - filled[-1]) // 255
        if len(filled) > 1 and step:
            before = counts.cumsum(0) - counts
            plane = ((step // 2 + before) // step)[plane]
        planes.append(plane)
    return torch.stack(planes).reshape(inputs.shape).to(inputs) / 255


def _posterized(inputs: Tensor, bits: float) -> Tensor:
    """Only the leading bits of 8-bit values."""
    rest = 2.0 ** (8 - round(bits))
    return ((inputs * 255).round() / rest).floor() * rest / 255


def _rotated(inputs: Tensor, degrees: float) -> Tensor:
    """Turned counter-clockwise about the centre, nearest pixel, grey outside."""
    height, width = inputs.shape[-2:]
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in (height, width))
    cos, sin = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))
    column = (cos * x[None, :] + sin * y[:, None] + width / 2).floor().long()
    row = (-sin * x[None, :] + cos * y[:, None] + height / 2).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    turned = inputs[..., row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return torch.where(inside.to(inputs.device), turned, 128 / 255)


def _sheared(inputs: Tensor, share: float) -> Tensor:
    """x'(row, column) = x(row + share · column, column) by Pillow's bicubic, black outside."""
    height, width = inputs.shape[-2:]
    column = torch.arange(width)
    place = torch.arange(height)[:, None] + 0.5 + share * (column[None, :] + 0.5).double()
    first = (place - 0.5).floor()
    d = place - 0.5 - first
    weights = (
        -d + 2 * d**2 - d**3,
        1 - 2 * d**2 + d**3,
        d + d**2 - d**3,
        -(d**2) + d**3,
    )
    found = torch.zeros_like(inputs)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        row = (first.long() + offset).clamp(0, height - 1)
        found = found + weight.to(inputs) * inputs[..., row, column.expand(height, width)]
    inside = (place >= 0) & (place < height)
    return torch.where(inside.to(inputs.device), found.clamp(0, 1), 0.0)


_OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "shift-x": lambda x, share: _shift(x, share, 3),
    "shift-y": lambda x, share: _shift(x, share, 2),
    "shear-y": _sheared,
    "rotate": _rotated,
    "contrast": lambda x, change: _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), change),
    "sharpness": lambda x, change: _blend(x, _smooth(x), change),
    "brightness": lambda x, change: _blend(x, torch.zeros_like(x), change),
    "colour": lambda x, change: _blend(x, _grey(x), change),
    "autocontrast": lambda x, _: _autocontrast(x),
    "equalize": lambda x, _: _equalized(x),
    "posterize": _posterized,
    "solarize": lambda x, threshold: torch.where(x * 255 < threshold, x, 1 - x),
    "invert": lambda x, _: 1 - x,
}


@dataclass(frozen=True)
class _Transformed(Encoded):
    rule: ATS

    def mean(self, state: ModelState, batch: Batch) -> Update:
        """Over every combination of draws, where these are few."""
        outcomes = self.rule.outcomes
        if len(outcomes) ** len(batch) > _MOST_OUTCOMES:
            raise IntractableLikelihood(f"ats: too many transformations of {len(batch)} images")
        draws = itertools.product(outcomes, repeat=len(batch))
        updates = [self.inner.mean(state, transformed(batch, each)).values for each in draws]
        means = {k: torch.stack([u[k] for u in updates]).mean(0) for k in updates[0]}
        return Update(means, self.kind)


def transformed(batch: Batch, outcomes: Sequence[Outcome]) -> Batch:
    """The batch that the client trains on.

    Raises:
        NotApplicable: the data are no images.
    """
    if batch.inputs.ndim != 4:
        raise NotApplicable("ats: expected images (b, channels, height, width)")
    images = [applied(o, batch.inputs[i : i + 1]) for i, o in enumerate(outcomes)]
    return Batch(torch.cat(images), batch.labels)
