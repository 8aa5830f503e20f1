"""A denoising diffusion model: what it predicts of noised images tells likely from unlikely."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.denoising import Prediction, Schedule, UNet, ddim, guided_output
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.priors.family import Fitted, check_counts
from gradleak.priors.network import Network, Training, check_training, initialised, train
from gradleak.seeding import child, normal
from gradleak.types import Batch, DataSpec

_MEANS = "class_means"
_NETWORK = "network."
_WARM = 100
"""Steps over which the rate rises."""
_DROPPED = 0.1
"""Share of the examples whose class a conditional network does not see."""
_SAMPLING = 50

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class Denoiser(Network):
    """ε̂(x_t, t), or v̂, of images scaled to [−1, 1]; by class where the family is conditional.

    Besides the network it keeps the mean image of every class, to start searches from.
    """

    family: Diffusion

    def __post_init__(self) -> None:
        wanted = self.family.shapes(self.data)
        found = {name: tuple(v.shape) for name, v in self.weights.items()}
        if found != wanted:
            unlike = sorted(found.items() ^ wanted.items())[:3]
            raise InvalidInput(f"weights of a diffusion model differ from its family's: {unlike}")

    @property
    def schedule(self) -> Schedule:
        return self.family.noise_schedule

    @property
    def network(self) -> Mapping[str, Tensor]:
        """The U-Net's own weights, by its own names."""
        return {
            k.removeprefix(_NETWORK): v for k, v in self.weights.items() if k.startswith(_NETWORK)
        }

    def output(
        self,
        noised: Tensor,
        times: Tensor,
        labels: Tensor | None = None,
        *,
        guidance: float = 0.0,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The network's output, differentiable in `noised` and `weights`.

        Args:
            noised: x_t (n, *shape) in [−1, 1] but for its noise.
            times: (n,).
            labels: (n,) classes; None where unknown, and without effect on an unconditional prior.
            guidance: weight of classifier-free guidance, where labels are given.
            weights: instead of the network's own, by its names.
        """
        known = self.network if weights is None else weights
        cast = {k: v.to(noised) for k, v in known.items()}

        def called(labels: Tensor | None) -> Tensor:
            found: Tensor = torch.func.functional_call(
                self._template, cast, (noised, times, labels)
            )
            return found

        if labels is None or not self.family.conditional:
            return called(None)
        if guidance == 0:
            return called(labels)
        return guided_output(called(labels), called(None), guidance)

    def scaled(self, inputs: Tensor) -> Tensor:
        """From the data's bounds to [−1, 1]."""
        low, high = self.data.bounds
        return (inputs - low) * (2 / (high - low)) - 1

    def unscaled(self, clean: Tensor) -> Tensor:
        """From [−1, 1] to the data's bounds."""
        low, high = self.data.bounds
        return low + (clean + 1) * ((high - low) / 2)

    def images(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        *,
        steps: int = _SAMPLING,
        guidance: float = 0.0,
        eta: float = 0.0,
        weights: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images (n, *shape) in the data's bounds, of latents x_T (n, *shape), by DDIM.

        Differentiable in latents and weights; deterministic without eta.
        """

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            return self.output(x, times, labels, guidance=guidance, weights=weights)

        drawn = ddim(self.schedule, denoise, latents, steps=steps, eta=eta, generator=generator)
        return self.unscaled(drawn)

    def anomaly(self, inputs: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Mean of (ε − ε̂(x_t, t))² of inputs (n, *shape): (n,)."""
        noised = self.schedule.noised(self.scaled(inputs), noise, times)
        found = self.schedule.noise(noised, self.output(noised, times), times)
        return ((found - noise) ** 2).flatten(1).mean(1)

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        raise NotApplicable(
            "prior 'diffusion' has no density that is cheap: expected an attack that denoises"
        )

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        count = labels if isinstance(labels, int) else len(labels)
        shape = (count, *self.data.shape)
        latents = normal(shape, generator=child(generator, "latents"), dtype=torch.float32)
        classes = None if isinstance(labels, int) else labels
        if classes is not None and classes.ndim == 2:
            drawn = child(generator, "classes")
            classes = classes.double().multinomial(1, generator=drawn)[:, 0]
        with torch.no_grad():
            found = self.images(
                latents,
                classes,
                eta=1.0,
                generator=child(generator, "steps"),
                steps=min(_SAMPLING, self.schedule.timesteps),
            )
        return found.double()

    def mean(self, labels: Tensor | int) -> Tensor:
        means = self.weights[_MEANS]
        if isinstance(labels, int):
            return means.mean(0, keepdim=True).repeat(labels, *[1] * len(self.data.shape))
        if labels.ndim == 1:
            return means[labels]
        return torch.einsum("nc,c...->n...", labels.to(means), means)

    @cached_property
    def _template(self) -> nn.Module:
        return self.family.build(self.data).eval()


@dataclass(frozen=True)
class Diffusion:
    """A denoising diffusion model (Ho, Jain & Abbeel, NeurIPS 2020) on a small U-Net.

        E ‖ε − ε̂(√ᾱ_t x + √(1 − ᾱ_t) ε, t, y)‖²,  t uniform

    Times of a minibatch are spread evenly. The weights kept are the moving average of the steps.

    Args:
        steps: of Adam; the rate rises over 100 and falls to zero as a cosine does.
        batch_size: images of a step.
        learning_rate: Adam's largest.
        width: channels of the network's first level.
        conditional: whether the network is told classes, for nine images of ten.
        schedule: of the noise, by its name in `diffusers`.
        timesteps: T.
        prediction: what the network predicts.
        averaging: decay of the moving average, once it is long.
        precision: of the network's passes while it is trained.
    """

    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1e-3
    width: int = 32
    conditional: bool = True
    schedule: str = "linear"
    timesteps: int = 1000
    prediction: Prediction = "epsilon"
    averaging: float = 0.999
    precision: Precision = "float32"

    id: ClassVar[str] = "diffusion"
    title: ClassVar[str] = "Denoising diffusion model"
    proper: ClassVar[bool] = False
    fitted: ClassVar[type[Fitted]] = Denoiser

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size, width=self.width)
        check_training(learning_rate=self.learning_rate)
        if not 0 <= self.averaging < 1:
            raise InvalidInput(f"averaging={self.averaging}: expected a share in [0, 1)")
        Schedule(self.schedule, self.timesteps, self.prediction)

    @property
    def noise_schedule(self) -> Schedule:
        return Schedule(self.schedule, self.timesteps, self.prediction)

    def build(self, data: DataSpec) -> UNet:
        """The network, with weights of no meaning."""
        if len(data.shape) != 3:
            raise InvalidInput(f"prior 'diffusion' of data {data.shape}: expected images")
        classes = data.classes if self.conditional else 0
        return UNet(data.shape[0], width=self.width, classes=classes)

    def shapes(self, data: DataSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name."""
        with torch.device("meta"):
            network = self.build(data)
        found = {f"{_NETWORK}{k}": tuple(v.shape) for k, v in network.state_dict().items()}
        return found | {_MEANS: (data.classes, *data.shape)}

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Network:
        """Train to the end."""
        return train(self, public, data, seed=seed)

    def begin(self, data: DataSpec, *, seed: int) -> Training:
        return _Denoising(self, data, seed=seed)


class _Denoising(Training):
    """The network, its moving average, and the mean image of every class so far."""

    def __init__(self, family: Diffusion, data: DataSpec, *, seed: int) -> None:
        self.family, self.data = family, data
        network = initialised(lambda: family.build(data), torch.Generator().manual_seed(seed))
        self.modules = {
            "network": network,
            "average": copy.deepcopy(network),
            "seen": _Seen(data),
        }
        self.optimisers = {
            "network": torch.optim.Adam(network.parameters(), lr=family.learning_rate)
        }

    def step(self, inputs: Tensor, labels: Tensor, *, generator: torch.Generator) -> float:
        family, schedule = self.family, self.family.noise_schedule
        seen = self.modules["seen"]
        assert isinstance(seen, _Seen)
        done = seen.add(inputs, labels)
        low, high = self.data.bounds
        clean = (inputs - low) * (2 / (high - low)) - 1
        count = len(clean)
        within = torch.rand((), generator=generator)
        times = ((torch.arange(count) + within) * (schedule.timesteps / count)).long()
        noise = normal(clean.shape, generator=generator, dtype=clean.dtype)
        hidden = torch.rand(count, generator=generator) < _DROPPED
        times, noise, hidden = (v.to(clean.device) for v in (times, noise, hidden))
        told = labels.masked_fill(hidden, self.data.classes) if family.conditional else None
        network, optimiser = self.modules["network"], self.optimisers["network"]
        half = family.precision == "bfloat16"
        noised = schedule.noised(clean, noise, times)
        with torch.autocast(clean.device.type, torch.bfloat16) if half else nullcontext():
            output = network(noised, times, told)
        loss = F.mse_loss(output.float(), schedule.target(clean, noise, times))
        for group in optimiser.param_groups:
            group["lr"] = family.learning_rate * _rate(done, family.steps)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        decay = min(family.averaging, (done + 1) / (done + 10))
        with torch.no_grad():
            pairs = zip(self.modules["average"].parameters(), network.parameters(), strict=True)
            for kept, new in pairs:
                kept.lerp_(new, 1 - decay)
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        numbers = self.modules["average"].state_dict()
        seen = self.modules["seen"]
        assert isinstance(seen, _Seen)
        return {f"{_NETWORK}{k}": v.clone() for k, v in numbers.items()} | {_MEANS: seen.means()}


class _Seen(nn.Module):
    """Sums of the images of every class that steps have seen, and how many steps."""

    sums: Tensor
    counts: Tensor
    steps: Tensor

    def __init__(self, data: DataSpec) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(data.classes, *data.shape))
        self.register_buffer("counts", torch.zeros(data.classes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def add(self, inputs: Tensor, labels: Tensor) -> int:
        """Take note of a minibatch; return the steps before it."""
        done = int(self.steps)
        self.sums.index_add_(0, labels, inputs)
        self.counts.index_add_(0, labels, self.counts.new_ones(len(labels)))
        self.steps += 1
        return done

    def means(self) -> Tensor:
        """Mean image of every class; of all images where a class was never seen."""
        overall = self.sums.sum(0) / self.counts.sum().clamp(min=1)
        count = self.counts.reshape(-1, *[1] * overall.ndim)
        return torch.where(count > 0, self.sums / count.clamp(min=1), overall)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
