"""Clients that train a diffusion model: FedSGD and FedAvg on the denoising loss.

    ℓ(θ; x, ε, t) = mean (f_θ(√ᾱ_t x + √(1 − ᾱ_t) ε, t) − target)²,  ε ~ N(0, 1), t uniform

Source: Ho, Jain & Abbeel, NeurIPS 2020, Algorithm 1; federated as in Huang, Hong, Roos & Chen,
"GIDM: Gradient Inversion of Federated Diffusion Models", ARES 2025 (arXiv 2405.20380).

An image may carry its draws: noise and time follow it in further channels, ε and a plane that
holds t for every visit of it. Layers that handle images one by one, and searches that vary noise
and time, then need to know nothing of diffusion.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradleak.denoising import Prediction, Schedule, denoises
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms.client import Call, Loss
from gradleak.mechanisms.fedavg import FedAvg, Order
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.seeding import child, normal
from gradleak.types import Batch, Mechanism, ModelState, Update


@dataclass(frozen=True, eq=False)
class Draws:
    """What a client drew for its batch, or the part of it that somebody knows.

    Attributes:
        times: (b, visits) int64.
        noise: (b, visits, *shape).
    """

    times: Tensor | None = None
    noise: Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.times is not None and self.noise is not None


@dataclass(frozen=True)
class Diffusing:
    """What clients of diffusion models share.

    Args:
        schedule: of the noise, by its name in `gradleak.denoising`.
        timesteps: T.
        prediction: what the network predicts.
        timestep: t of every image, where the protocol or an experiment fixes it; None draws it.
        bounds: of the images, which the client scales to [−1, 1].
        draws: noise and times, as far as they are known; of the attacker's belief, what the threat
            model grants.
        carried: whether inputs carry their draws.
        freed: whether, instead of image and noise, inputs carry x_t and a residual r, and the loss
            is (2/n) ⟨f(x_t), r⟩: its gradient is that of the squared error where f − target is r,
            and is linear in r.
        mixed: planes behind image and noise that carry, instead of t, a share of every time: the
            image is noised to the mean ᾱ, and the network is given the shares (b, T).
    """

    schedule: str = "linear"
    timesteps: int = 1000
    prediction: Prediction = "epsilon"
    timestep: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    draws: Draws | None = None
    carried: bool = False
    freed: bool = False
    mixed: int = 0
    loss: Loss = mse_loss

    id: ClassVar[str]

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
        if self.timestep is not None and not 0 <= self.timestep < self.timesteps:
            raise InvalidInput(
                f"timestep={self.timestep}: expected 0 to {self.timesteps - 1}, or none"
            )
        Schedule(self.schedule, self.timesteps, self.prediction)

    @cached_property
    def noise_schedule(self) -> Schedule:
        return Schedule(self.schedule, self.timesteps, self.prediction)

    @abstractmethod
    def visits(self, batch_size: int) -> int:
        """Most times that one image is used in a round."""

    def draw(self, batch: Batch, *, generator: torch.Generator) -> Draws:
        """Draw what the client does for this batch; what is known already stays."""
        known = self.draws or Draws()
        b, visits = len(batch), self.visits(len(batch))
        times, noise = known.times, known.noise
        if times is None:
            if self.timestep is None:
                stream = child(generator, "times")
                times = torch.randint(self.timesteps, (b, visits), generator=stream)
            else:
                times = torch.full((b, visits), self.timestep)
        if noise is None:
            shape = (b, visits, *batch.inputs.shape[1:])
            noise = normal(shape, generator=child(generator, "noise"), dtype=batch.inputs.dtype)
        if len(times) != b or len(noise) != b:
            raise InvalidInput(f"draws for {len(times)} images: expected {b}, the batch")
        return Draws(times.to(batch.inputs.device), noise.to(batch.inputs))

    def carrying(self, batch: Batch, draws: Draws) -> tuple[Self, Batch]:
        """The same client on images that carry these draws."""
        return replace(self, carried=True), carry(batch, draws)

    def settled(self, batch: Batch, *, generator: torch.Generator) -> tuple[Self, Batch]:
        """The same client once it has drawn: deterministic, on images that carry their draws."""
        if self.carried:
            return self, batch
        # Named streams keep to the seed, and layers may share a generator: a seed of one's own.
        seed = int(torch.randint(2**62, (), generator=generator))
        own = torch.Generator().manual_seed(seed)
        return self.carrying(batch, self.draw(batch, generator=own))

    def foreseen(self, batch: Batch) -> tuple[Self, Batch]:
        """The same client as `predict` takes it: no noise, and the middle time, where unknown."""
        if self.carried:
            return self, batch
        known = self.draws or Draws()
        shape = (len(batch), self.visits(len(batch)))
        middle = self.timesteps // 2 if self.timestep is None else self.timestep
        times = torch.full(shape, middle) if known.times is None else known.times
        noise = known.noise
        if noise is None:
            noise = batch.inputs.new_zeros((*shape, *batch.inputs.shape[1:]))
        return self.carrying(batch, Draws(times.to(batch.inputs.device), noise))

    @property
    def given(self) -> bool:
        """Whether nothing is left to draw."""
        return self.carried or (self.draws is not None and self.draws.complete)

    def determined(self, batch_size: int) -> bool:
        """Whether predictions rest on the batch alone: whoever draws knows more."""
        return self.given

    def objective(self, network: Call, batch: Batch) -> Tensor:
        """Denoising loss of images that carry the draws of one visit, 0-dimensional."""
        channels = (batch.inputs.shape[1] - (self.mixed or 1)) // 2
        images, noise = batch.inputs[:, :channels], batch.inputs[:, channels : 2 * channels]
        planes = batch.inputs[:, 2 * channels :].flatten(1)
        times = planes[:, : self.timesteps] if self.mixed else planes[:, 0]
        if self.freed:
            return 2 * (network(images, times) * noise).mean()
        low, high = self.bounds
        clean = (images - low) * (2 / (high - low)) - 1
        schedule = self.noise_schedule
        output = network(schedule.noised(clean, noise, times), times)
        return self.loss(output, schedule.target(clean, noise, times))


def carry(batch: Batch, draws: Draws) -> Batch:
    """Images that carry their draws: (b, c + visits · (c + 1), h, w).

    Times may lie between whole ones, and all of it be differentiated.
    """
    assert draws.times is not None
    assert draws.noise is not None
    images = batch.inputs
    planes = draws.times.to(images).reshape(*draws.times.shape, *[1] * (images.ndim - 1))
    planes = planes.expand(*draws.times.shape, 1, *images.shape[2:])
    behind = torch.cat([draws.noise.to(images), planes], 2).flatten(1, 2)
    return Batch(torch.cat([images, behind], 1), batch.labels)


def carried_images(inputs: Tensor, *, visits: int = 1) -> Tensor:
    """The images (…, c, h, w) of inputs (…, c + visits · (c + 1), h, w) that carry their draws."""
    channels = (inputs.shape[-3] - visits) // (visits + 1)
    return inputs[..., :channels, :, :]


@dataclass(frozen=True)
class Denoising(Diffusing, FedSGD):
    """u = ∇_θ (1/b) Σ_i ℓ(θ; x_i, ε_i, t_i): one step of training a diffusion model.

    Args: those of `Diffusing`; labels are not used.
    """

    loss: Loss = mse_loss

    id: ClassVar[str] = "denoising"

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return self.given

    def visits(self, batch_size: int) -> int:
        return 1

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if not self.given:
            raise IntractableLikelihood(f"{self.id}: its mean over noise and times has no form")
        core, carrying = self.foreseen(batch)
        return Update(core.gradient(state, state.params, carrying), "gradient")

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        core, carrying = self.settled(batch, generator=generator)
        return core.mean(state, carrying)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        core, carrying = self.foreseen(batch)
        return core.mean(state, carrying)

    def pooled(self, clients: int) -> FedSGD | None:
        return self


def one_step(core: Diffusing) -> Denoising:
    """One step on the loss of `core`, without its draws or a time that it fixes."""
    shared = {each.name: getattr(core, each.name) for each in fields(Diffusing)}
    return Denoising(**shared | {"timestep": None, "draws": None, "carried": False, "freed": False})


def check_network(network: nn.Module, core: Mechanism, *, name: str = "the network") -> None:
    """Refuse a classifier for a client that denoises, and a denoiser for one that classifies.

    Raises:
        InvalidInput: network and client do not fit together.
    """
    if denoises(network) == isinstance(core, Diffusing):
        return
    if isinstance(core, Diffusing):
        raise InvalidInput(
            f"{name} classifies and {core.id} trains a denoiser: expected a network "
            "(x_t, times) → x, such as unet"
        )
    raise InvalidInput(
        f"{name} is a denoiser, called with (x_t, times): expected mechanism 'denoising' or "
        "'denoising-fedavg', or a classifier"
    )


@dataclass(frozen=True)
class DenoisingAvg(Diffusing, FedAvg):
    """FedAvg on the denoising loss: every visit of an image has noise and time of its own.

    Args: those of `FedAvg` and of `Diffusing`; labels are not used.
    """

    loss: Loss = mse_loss

    id: ClassVar[str] = "denoising-fedavg"

    def determined(self, batch_size: int) -> bool:
        return self.given and (self.ordered or self._minibatch(batch_size) == batch_size)

    @property
    def deterministic(self) -> bool:
        return self.given and self.ordered

    def visits(self, batch_size: int) -> int:
        return self._epochs_needed(batch_size)

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if not self.given:
            raise IntractableLikelihood(f"{self.id}: its mean over noise and times has no form")
        core, carrying = self.foreseen(batch)
        return super(DenoisingAvg, core).mean(state, carrying)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        core, carrying = self.settled(batch, generator=generator)
        return super(DenoisingAvg, core).sample(state, carrying, generator=generator)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        core, carrying = self.foreseen(batch)
        return super(DenoisingAvg, core).predict(received, state, carrying)

    def drawn(self, batch: Batch, *, generator: torch.Generator) -> Callable[[Call], Tensor]:
        client, given = self.settled(batch, generator=generator)
        copies = client._copies(given)
        return lambda network: client.objective(network, copies)

    def _copies(self, batch: Batch) -> Batch:
        """One copy of every image for every visit of it, each with its own draws."""
        visits = self.visits(len(batch))
        channels = (batch.inputs.shape[1] - visits) // (visits + 1)
        images, behind = batch.inputs[:, :channels], batch.inputs[:, channels:]
        copies = [torch.cat([images, one], 1) for one in torch.split(behind, channels + 1, 1)]
        labels = batch.labels.repeat(visits, *[1] * (batch.labels.ndim - 1))
        return Batch(torch.cat(copies), labels)

    def _train(self, state: ModelState, batch: Batch, order: Order) -> Update:
        b = len(batch)
        seen = [0] * b
        numbered = []
        for visit in order:
            numbered.append(tuple(seen[i] * b + i for i in visit))
            for i in visit:
                seen[i] += 1
        return super()._train(state, self._copies(batch), tuple(numbered))
