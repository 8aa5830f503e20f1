"""One trial by double backward: two passes of automatic differentiation and nothing in between.

    g = ∇_θ ℓ(f_θ(x), y),   v = ∂D(g, G)/∂g,   ∂D/∂x = vᵀ ∂g/∂x

v comes from a closed form, so that differentiating D costs no graph of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.attacks.parts.carried import Wanted
from gradleak.attacks.parts.client import (
    differentiable_twice,
    gradient_client,
    loaded,
    trained_tensors,
)
from gradleak.attacks.parts.distances import Distance, Slope, slope
from gradleak.mechanisms.client import template
from gradleak.types import Batch, Mechanism, ModelState, Update


class PlainFit:
    """D(predicted update, u_t) and its gradient, for any client and any distance.

    Args:
        mechanism: what the client is believed to do.
        state: broadcast state in the precision of the search.
        distance: D.
        received: one update per target, keyed as the state's parameters.
        compared: names of the tensors that D sees.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        state: ModelState,
        distance: Distance,
        received: Sequence[dict[str, Tensor]],
        *,
        compared: Sequence[str],
    ) -> None:
        self.mechanism, self.state = mechanism, state
        self.distance, self.received, self.compared = distance, received, compared
        self._slopes: dict[int, Slope] = {}
        self._client = gradient_client(mechanism)
        if self._client is not None:
            network = template(state.model, self._client.batch_norm)
            self._model = loaded(network, state, trained=True)
            self._parameters = list(trained_tensors(self._model, state).values())

    def evaluate(
        self, inputs: Tensor, labels: Tensor, target: int, wanted: Wanted
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Distance of one trial, and its gradient in inputs and labels where `wanted`.

        Args:
            inputs: (b, *shape).
            labels: (b,) or (b, classes).
            target: whose update is matched.
            wanted: whether gradients in inputs and in labels are.
        """
        leaves = [
            v.detach().requires_grad_(want)
            for v, want in zip((inputs, labels), wanted, strict=True)
        ]
        predicted = self._predicted(Batch(*leaves), target, create_graph=any(wanted))
        if target not in self._slopes:
            received = {name: self.received[target][name] for name in self.compared}
            self._slopes[target] = slope(self.distance, received)
        value, slopes = self._slopes[target]([p.detach() for p in predicted])
        gradients: list[Tensor | None] = [None, None]
        if any(wanted):
            live = [(p, s) for p, s in zip(predicted, slopes, strict=True) if p.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [p for p, _ in live],
                    [leaf for leaf, want in zip(leaves, wanted, strict=True) if want],
                    [s for _, s in live],
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            gradients = [next(found) if want else None for want in wanted]
        return value, gradients

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the network of a plain client gives for (b, *shape)."""
        with torch.no_grad():
            found: Tensor = self._model(inputs)
        return found

    def _predicted(self, batch: Batch, target: int, *, create_graph: bool) -> Sequence[Tensor]:
        with torch.enable_grad(), differentiable_twice():
            if self._client is not None:
                client, batch = self._client.foreseen(batch)
                loss = client.objective(self._model, batch)
                return torch.autograd.grad(
                    loss,
                    self._parameters,
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
            received = Update(self.received[target], self.mechanism.kind)
            found = self.mechanism.predict(received, self.state, batch).values
            return [found[name] for name in self.compared]
