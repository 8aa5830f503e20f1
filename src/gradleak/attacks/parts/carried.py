"""A value whose gradient was computed together with it, as a step of automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Wanted = tuple[bool, bool]
Evaluate = Callable[[Tensor, Tensor, Wanted], tuple[Tensor, list[Tensor | None]]]
"""(inputs, labels, gradients wanted in them) -> values (trials,), and these gradients or None."""


def carried(evaluate: Evaluate, inputs: Tensor, labels: Tensor) -> Tensor:
    """Values (trials,) of `evaluate`, once differentiable in inputs and labels.

    Args:
        evaluate: gives every trial's value and its gradient in the trial's own rows.
        inputs: (trials, ...).
        labels: (trials, ...).
    """
    values: Tensor = _Carried.apply(inputs, labels, evaluate)  # type: ignore[no-untyped-call]
    return values


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, labels: Tensor, evaluate: Evaluate) -> Tensor:
        wanted = (bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1]))
        values, ctx.gradients = evaluate(inputs, labels, wanted)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first, second = [
            None if g is None else g * outer.view(-1, *[1] * (g.ndim - 1)) for g in ctx.gradients
        ]
        return first, second, None
