"""Many steps of local training, differentiable without keeping the graph of every step.

Differentiating through K steps plainly keeps K graphs. Here training is cut into segments of
s ≈ √(K/2) steps: each keeps the parameters it began with and nothing else, and is trained again
when its gradient is asked for. Memory is that of s graphs and K/s sets of parameters, for one more
evaluation of every step (Chen et al., 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradleak.types import Batch

Params = dict[str, Tensor]
Visit = tuple[int, ...]
Step = Callable[[Params, Batch, Visit], Params]
"""(parameters, client's batch, examples visited) -> parameters after one local step."""

PLAIN_STEPS = 8
"""Up to so many steps every graph is kept: recomputation would cost more than it saves."""


def unroll(step: Step, params: Params, batch: Batch, order: Sequence[Visit]) -> Params:
    """Parameters after the steps of `order`, differentiable in `params`, inputs and soft labels.

    Numbers and gradients are those of the plain loop; `torch.func` transforms pass through.

    Args:
        step: one local step; differentiable in what it is given and in nothing else.
        params: where training starts.
        batch: the client's.
        order: examples of every step.
    """
    names = list(params)
    parts = list(segments(order))
    for number, part in enumerate(parts, start=1):

        def train(
            inputs: Tensor, labels: Tensor, *values: Tensor, part: Sequence[Visit] = part
        ) -> tuple[Tensor, ...]:
            now = dict(zip(names, values, strict=True))
            for visit in part:
                now = step(now, Batch(inputs, labels), visit)
            return tuple(now.values())

        # The last graph is the first that is needed: forgetting it would save nothing.
        run = train if number == len(parts) else _again(train)
        after = run(batch.inputs, batch.labels, *params.values())
        params = dict(zip(names, after, strict=True))
    return params


def segments(order: Sequence[Visit]) -> Iterator[Sequence[Visit]]:
    """Cut the steps into segments of about √(K/2); few steps stay together."""
    count = len(order)
    length = count if count <= PLAIN_STEPS else math.ceil(math.sqrt(count / 2))
    return (order[begin : begin + length] for begin in range(0, count, length))


def _again(train: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *tensors: _Segment.apply(train, *tensors)  # type: ignore[no-untyped-call]


class _Segment(torch.autograd.Function):
    """Keeps the arguments of a function instead of its graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(train: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return train(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.train = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def train(*varied: Tensor) -> tuple[Tensor, ...]:
            arguments = list(tensors)
            for i, value in zip(wanted, varied, strict=True):
                arguments[i] = value
            return ctx.train(*arguments)  # type: ignore[no-any-return]

        pull: Callable[..., tuple[Tensor, ...]] = torch.func.vjp(
            train, *(tensors[i] for i in wanted)
        )[1]
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(wanted, pull(cotangents), strict=True):
            gradients[i] = gradient
        return None, *gradients
