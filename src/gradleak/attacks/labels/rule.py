"""What a rule of label recovery is, and the head's gradient that every rule reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradleak.attacks.parts.smoothing import natural_like
from gradleak.errors import NotApplicable
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import Observation

_DUMMIES = 64


@dataclass(frozen=True, slots=True)
class RuleAbout:
    """What a reader needs to know about a rule.

    Attributes:
        id: its name.
        title: in a few words.
        paper: authors, title, place, year.
        link: to the paper.
        claims: "counts" of every class, only the "set" of classes present, or "soft" labels.
        assumes: what must hold for it to be right.
        deviations: where this differs from the paper.
    """

    id: str
    title: str
    paper: str
    link: str
    claims: str
    assumes: str
    deviations: tuple[str, ...] = ()


@runtime_checkable
class LabelRule(Protocol):
    """Observation -> how often every class occurs in the batch."""

    about: ClassVar[RuleAbout]

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Tensor:
        """Counts (classes,) int64 with a sum of at most b; of soft labels (b, classes) float64.

        Raises:
            NotApplicable: the rule does not cover what was seen.
        """
        ...


@dataclass(frozen=True)
class Head:
    """A linear classification head and its mean gradient, in float64.

    Attributes:
        weight: (classes, width).
        bias: (classes,), or None.
        weight_gradient: (classes, width) = mean of (p − y) eᵀ with e what enters the head.
        bias_gradient: (classes,) = mean of p − y; None without a bias, or where it does not leave.
        size: b.
    """

    weight: Tensor
    bias: Tensor | None
    weight_gradient: Tensor
    bias_gradient: Tensor | None
    size: int

    @classmethod
    def of(cls, seen: Observation) -> Head:
        """The head of an observation.

        Raises:
            NotApplicable: the batch size is not granted, or the network ends in something else.
        """
        size = seen.knowledge.batch_size
        if size is None:
            raise NotApplicable("label counts need the batch size, which is not granted")
        gradient = seen.mechanism.as_gradient(seen.update, batch_size=size).values
        names = list(seen.state.params)
        biased = len(names) > 1 and seen.state.params[names[-1]].ndim == 1
        name = names[-2] if biased else names[-1]
        if seen.state.params[name].shape[:1] != (seen.data.classes,) or gradient[name].ndim != 2:
            raise NotApplicable(
                f"label recovery: the last parameter {names[-1]!r} is not a head of "
                f"{seen.data.classes} classes"
            )
        found = cls(
            _double(seen.state.params[name]),
            _double(seen.state.params[names[-1]]) if biased else None,
            _double(gradient[name]),
            _double(gradient[names[-1]]) if biased and gradient[names[-1]].any() else None,
            size,
        )
        if not found.weight_gradient.isfinite().all():
            raise NotApplicable("label recovery: the head's gradient holds non-finite values")
        if not found.weight_gradient.any():
            raise NotApplicable("label recovery: the head's gradient is zero")
        return found

    @property
    def sums(self) -> Tensor:
        """(classes,) row sums of the weight's gradient; negative where a class is, if e ≥ 0."""
        return self.weight_gradient.sum(1)

    @property
    def errors(self) -> Tensor:
        """(classes,) mean of p − y.

        Raises:
            NotApplicable: no bias of the head left the client.
        """
        if self.bias_gradient is None:
            raise NotApplicable("this rule reads the gradient of the head's bias: there is none")
        return self.bias_gradient


@dataclass(frozen=True)
class Dummies:
    """What the attacker's own inputs do to the broadcast network, in float64.

    Attributes:
        features: (n, width) what enters the head.
        predictions: (n, classes) probabilities.
    """

    features: Tensor
    predictions: Tensor

    @classmethod
    def of(cls, seen: Observation, *, generator: torch.Generator) -> Dummies:
        """Random fields with the spectrum of photographs, or uniform numbers in the data's bounds.

        Raises:
            NotApplicable: the network's last parameters belong to no linear layer.
        """
        data, state = seen.data, seen.state
        model = template(state.model, "eval")
        name = next(n for n in reversed(list(state.params)) if state.params[n].ndim == 2)
        head = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(head, nn.Linear):
            raise NotApplicable(f"label recovery: {name!r} is no weight of a linear layer")
        if data.modality == "image":
            inputs = natural_like(data, _DUMMIES, generator=generator)
        else:
            low, high = data.bounds
            drawn = torch.rand((_DUMMIES, *data.shape), generator=generator, dtype=torch.float64)
            inputs = low + (high - low) * drawn
        entered: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        numbers = (dict(state.params), own_buffers(model, state))
        try:
            with torch.no_grad():
                like = state.params[name]
                logits = torch.func.functional_call(model, numbers, (inputs.to(like),))
        finally:
            handle.remove()
        return cls(_double(entered[-1].flatten(1)), _double(logits).softmax(1))


def _double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def apportioned(shares: Tensor, size: int) -> Tensor:
    """Counts (classes,) int64 with sum `size` that are nearest to `shares`, none negative.

    Clipped at zero and scaled to the sum; then rounded down, and one more for the largest rests.
    """
    shares = shares.clamp(min=0)
    total = float(shares.sum())
    shares = shares * size / total if total > 0 else torch.full_like(shares, size / len(shares))
    counts = shares.floor().long()
    rests = (shares - counts).argsort(descending=True, stable=True)
    counts[rests[: size - int(counts.sum())]] += 1
    return counts
