"""An autoencoder: what it cannot reproduce is unlike the examples it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.errors import InvalidInput
from gradleak.priors.family import Fitted, check_counts
from gradleak.priors.network import Network, Training, check_training, initialised, train
from gradleak.types import Batch, DataSpec

_ERROR = "error"
_MEMORY = 0.99
"""Decay of the running mean of the squared error."""


@dataclass(frozen=True, eq=False)
class Manifold(Network):
    """log p(x) = −‖x − A(x)‖² / (2 s²), s² the mean squared error of public examples per entry."""

    family: Autoencoder

    def __post_init__(self) -> None:
        wanted = self.family.shapes(self.data)
        found = {name: tuple(v.shape) for name, v in self.weights.items()}
        if found != wanted:
            raise InvalidInput(f"weights of an autoencoder {found}: expected {wanted}")

    def reproduced(self, inputs: Tensor) -> Tensor:
        """A(x) of inputs (..., *shape)."""
        h = inputs.flatten(-len(self.data.shape))
        count = len(self.family.widths)
        for layer in range(count):
            w, b = (self.weights[f"{layer}.{part}"].to(h) for part in ("weight", "bias"))
            h = F.linear(h, w, b)
            if layer < count - 1:
                h = F.silu(h)
        return h.reshape(inputs.shape)

    def anomaly(self, inputs: Tensor) -> Tensor:
        """Mean of (x − A(x))² of inputs (trials, b, *shape): (trials,), in squared units."""
        return ((self.check(inputs) - self.reproduced(inputs)) ** 2).flatten(1).mean(1)

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        count = inputs.shape[1] * math.prod(self.data.shape)
        return -count * self.anomaly(inputs) / (2 * self.weights[_ERROR].to(inputs))

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        raise InvalidInput(
            "prior 'autoencoder' is improper, it cannot be sampled: expected a proper one"
        )

    def mean(self, labels: Tensor | int) -> Tensor:
        return self.centre(labels)


@dataclass(frozen=True)
class Autoencoder:
    """A fully connected autoencoder with one hidden layer on either side of its code.

    Args:
        steps: of Adam on the squared error.
        batch_size: examples of a step.
        learning_rate: Adam's.
        hidden: width of the hidden layers.
        code: numbers that an example is squeezed into.
    """

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    hidden: int = 256
    code: int = 32

    id: ClassVar[str] = "autoencoder"
    title: ClassVar[str] = "Error of an autoencoder"
    proper: ClassVar[bool] = False
    fitted: ClassVar[type[Fitted]] = Manifold

    def __post_init__(self) -> None:
        check_counts(
            steps=self.steps, batch_size=self.batch_size, hidden=self.hidden, code=self.code
        )
        check_training(learning_rate=self.learning_rate)

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of every layer but the last, and 0 for that one, which are the data's."""
        return self.hidden, self.code, self.hidden, 0

    def shapes(self, data: DataSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name."""
        before = entries = math.prod(data.shape)
        found: dict[str, tuple[int, ...]] = {_ERROR: ()}
        for layer, width in enumerate(self.widths):
            found[f"{layer}.weight"] = (width or entries, before)
            found[f"{layer}.bias"] = (width or entries,)
            before = width
        return found

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Network:
        """Train to the end."""
        return train(self, public, data, seed=seed)

    def begin(self, data: DataSpec, *, seed: int) -> Training:
        return _Squeezing(self, data, seed=seed)


class _Squeezing(Training):
    """The autoencoder and the running mean of its error."""

    def __init__(self, family: Autoencoder, data: DataSpec, *, seed: int) -> None:
        shapes = family.shapes(data)
        layers = [shapes[f"{n}.weight"] for n in range(len(family.widths))]

        def build() -> nn.Module:
            parts: list[nn.Module] = []
            for out, into in layers:
                parts += [nn.Linear(into, out), nn.SiLU()]
            return nn.Sequential(*parts[:-1])

        network = initialised(build, torch.Generator().manual_seed(seed))
        network.register_buffer(_ERROR, torch.zeros(()))
        self.floor = ((data.bounds[1] - data.bounds[0]) / 255) ** 2 / 12
        self.modules = {"network": network}
        self.optimisers = {
            "network": torch.optim.Adam(network.parameters(), lr=family.learning_rate)
        }

    def step(self, inputs: Tensor, labels: Tensor, *, generator: torch.Generator) -> float:
        network, optimiser = self.modules["network"], self.optimisers["network"]
        rows = inputs.flatten(1)
        loss = F.mse_loss(network(rows), rows)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        known = network.get_buffer(_ERROR)
        known.copy_(torch.where(known > 0, known, loss.detach()).lerp(loss.detach(), 1 - _MEMORY))
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        numbers = self.modules["network"].state_dict()
        found = {_ERROR: numbers.pop(_ERROR).clamp(min=self.floor)}
        return found | {
            f"{int(name.split('.')[0]) // 2}.{name.split('.')[1]}": value
            for name, value in numbers.items()
        }
