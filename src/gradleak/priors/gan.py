"""A generative adversarial network: no density, but every picture it can draw looks like data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.errors import InvalidInput, NotApplicable
from gradleak.priors.family import Fitted, check_counts
from gradleak.priors.network import Network, Training, check_training, initialised, train
from gradleak.seeding import child, normal
from gradleak.types import Batch, DataSpec

_SMALLEST = 8
"""Sides up to which a generator doubles its pictures from."""
_AVERAGED = 512
"""Draws that stand for the expectation."""
_NEAREST_START, _NEAREST_STEPS, _NEAREST_RATE = 0.1, 300, 0.05
_CALIBRATION = 2048
"""Latents that the statistics of batch normalisation come from."""


@dataclass(frozen=True, eq=False)
class Generator(Network):
    """x = G(z), z ~ N(0, 1): a linear layer, then convolutions that double the sides.

    Batch normalisation is part of the weights: a layer is a weight, a bias and a ReLU.
    """

    family: Gan

    def __post_init__(self) -> None:
        wanted = self.family.shapes(self.data)
        found = {name: tuple(v.shape) for name, v in self.weights.items()}
        if found != wanted:
            raise InvalidInput(f"weights of a generator {found}: expected {wanted}")

    @property
    def latent(self) -> int:
        """Numbers that a picture is drawn from."""
        return self.family.latent

    def images(self, latents: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Pictures (..., *shape) of latents (..., latent), in the latents' type.

        Args:
            latents: z.
            weights: one copy of the generator's weights for every latent, (..., *its shape); None
                takes the trained ones.
        """
        ahead = latents.shape[:-1]
        rows = latents.flatten(0, -2)
        if weights is None:
            drawn = self._draw(rows, {k: v.to(rows) for k, v in self.weights.items()})
        else:
            own = {k: v.flatten(0, len(ahead) - 1) for k, v in weights.items()}
            drawn = torch.func.vmap(lambda z, w: self._draw(z[None], w)[0])(rows, own)
        return drawn.reshape((*ahead, *self.data.shape))

    def nearest(self, inputs: Tensor) -> Tensor:
        """Latents (..., latent) whose pictures come near inputs (..., *shape), by Adam."""
        shape = (*inputs.shape[: -len(self.data.shape)], self.latent)
        stream = torch.Generator().manual_seed(0)
        z = (_NEAREST_START * normal(shape, generator=stream, dtype=torch.float64)).to(inputs)
        z.requires_grad_()
        adam = torch.optim.Adam([z], lr=_NEAREST_RATE)
        with torch.enable_grad():
            for _ in range(_NEAREST_STEPS):
                adam.zero_grad()
                ((self.images(z) - inputs) ** 2).sum().backward(inputs=[z])  # type: ignore[no-untyped-call]
                adam.step()
        return z.detach()

    def _draw(self, z: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        first, *later = range(len(weights) // 2)
        x = F.linear(z, weights[f"{first}.weight"], weights[f"{first}.bias"])
        x = x.reshape((len(z), *self.family.smallest(self.data)))
        for layer in later:
            w, b = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
            x = F.conv_transpose2d(F.relu(x), w, b, stride=2, padding=1)
        low, high = self.data.bounds
        _, height, width = self.data.shape
        return low + (high - low) * x[..., :height, :width].sigmoid()

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        raise NotApplicable(
            "prior 'gan' has no density: expected an attack that searches its latents"
        )

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        count = labels if isinstance(labels, int) else len(labels)
        shape = (count, self.latent)
        with torch.no_grad():
            return self.images(normal(shape, generator=generator, dtype=torch.float64))

    def mean(self, labels: Tensor | int) -> Tensor:
        count = labels if isinstance(labels, int) else len(labels)
        drawn = self.sample(_AVERAGED, generator=torch.Generator().manual_seed(0))
        return drawn.mean(0, keepdim=True).repeat(count, *[1] * len(self.data.shape))


@dataclass(frozen=True)
class Gan:
    """A small DCGAN (Radford, Metz & Chintala, ICLR 2016) for pictures of any size.

        D: −log D(x) − log(1 − D(G(z)));   G: −log D(G(z))

    The generator kept is the moving average of the steps.

    Args:
        steps: of both networks.
        batch_size: pictures of a step.
        learning_rate: Adam's, for both.
        latent: numbers that a picture is drawn from.
        channels: of the generator's last hidden layer; those before have twice as many each.
        averaging: decay of the moving average.
    """

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-4
    latent: int = 64
    channels: int = 48
    averaging: float = 0.995

    id: ClassVar[str] = "gan"
    title: ClassVar[str] = "Generative adversarial network"
    proper: ClassVar[bool] = False
    fitted: ClassVar[type[Fitted]] = Generator

    def __post_init__(self) -> None:
        check_counts(
            steps=self.steps,
            batch_size=self.batch_size,
            latent=self.latent,
            channels=self.channels,
        )
        check_training(learning_rate=self.learning_rate)
        if not 0 <= self.averaging < 1:
            raise InvalidInput(f"averaging={self.averaging}: expected a share in [0, 1)")

    def fit(self, public: Batch, data: DataSpec, *, seed: int) -> Network:
        """Train to the end."""
        return train(self, public, data, seed=seed)

    def begin(self, data: DataSpec, *, seed: int) -> Training:
        return _Adversaries(self, data, seed=seed)

    def smallest(self, data: DataSpec) -> tuple[int, int, int]:
        """Form of the features that the convolutions start from."""
        if len(data.shape) != 3:
            raise InvalidInput(f"prior 'gan' of data {data.shape}: expected images")
        times = self._doublings(data)
        height, width = (math.ceil(side / 2**times) for side in data.shape[1:])
        return self.channels * 2 ** (times - 1), height, width

    def shapes(self, data: DataSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the generator's weights by name."""
        c, height, width = self.smallest(data)
        rows = c * height * width
        found: dict[str, tuple[int, ...]] = {
            "0.weight": (rows, self.latent),
            "0.bias": (rows,),
        }
        for layer in range(1, self._doublings(data) + 1):
            following = c // 2 if layer < self._doublings(data) else data.shape[0]
            found[f"{layer}.weight"] = (c, following, 4, 4)
            found[f"{layer}.bias"] = (following,)
            c = following
        return found

    def _doublings(self, data: DataSpec) -> int:
        return max(2, math.ceil(math.log2(max(data.shape[1:]) / _SMALLEST)))


class _Adversaries(Training):
    """The generator with its normalisation, its moving average, and the discriminator."""

    def __init__(self, family: Gan, data: DataSpec, *, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        self.family, self.data = family, data
        generator = initialised(lambda: _generator(family, data), child(source, "generator"))
        critic = initialised(lambda: _discriminator(family, data), child(source, "critic"))
        average = copy.deepcopy(generator)
        self.modules = {"generator": generator, "critic": critic, "average": average}
        self.optimisers = {
            name: torch.optim.Adam(
                self.modules[name].parameters(), lr=family.learning_rate, betas=(0.5, 0.999)
            )
            for name in ("generator", "critic")
        }

    def step(self, inputs: Tensor, labels: Tensor, *, generator: torch.Generator) -> float:
        low, high = self.data.bounds
        real = (inputs - low) * (2 / (high - low)) - 1
        z = normal((len(real), self.family.latent), generator=generator, dtype=torch.float32)
        z = z.to(inputs.device)
        draw, critic = self.modules["generator"], self.modules["critic"]
        fake = draw(z)
        doubt = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        self._descend("critic", doubt)
        deceit = F.softplus(-critic(fake)).mean()
        self._descend("generator", deceit)
        with torch.no_grad():
            for kept, new in zip(
                self.modules["average"].parameters(), draw.parameters(), strict=True
            ):
                kept.lerp_(new, 1 - self.family.averaging)
        return doubt.item() + deceit.item()

    def _descend(self, name: str, loss: Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad()
        loss.backward(inputs=list(self.modules[name].parameters()))  # type: ignore[no-untyped-call]
        optimiser.step()

    def weights(self) -> dict[str, Tensor]:
        """The average's weights, batch normalisation folded into the layer before it.

        tanh(a) on [−1, 1] is sigmoid(2a) on [0, 1].
        """
        network = copy.deepcopy(self.modules["average"])
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        stream = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _ in range(_CALIBRATION // 128):
                network(normal((128, self.family.latent), generator=stream, dtype=torch.float32))
        layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
        found: dict[str, Tensor] = {}
        for number, layer in enumerate(layers):
            w, b = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
            last = number == len(norms)
            scale, shift = torch.full((len(b),), 2.0), b.new_zeros(len(b))
            if not last:
                norm = norms[number]
                scale = norm.weight.detach() / (norm.get_buffer("running_var") + norm.eps) ** 0.5
                shift = norm.bias.detach() - norm.get_buffer("running_mean") * scale
                scale, shift = (v.repeat_interleave(len(b) // len(v)) for v in (scale, shift))
            along = (-1, 1) if isinstance(layer, nn.Linear) else (1, -1, 1, 1)
            found[f"{number}.weight"] = (w * scale.reshape(along)).contiguous()
            found[f"{number}.bias"] = b * scale + shift
        return found


def _generator(family: Gan, data: DataSpec) -> nn.Module:
    shapes = family.shapes(data)
    c, height, width = smallest = family.smallest(data)
    layers: list[nn.Module] = [
        nn.Linear(family.latent, c * height * width),
        nn.Unflatten(1, smallest),
    ]
    for layer in range(1, len(shapes) // 2):
        before, after = shapes[f"{layer}.weight"][:2]
        layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    return _drawn(nn.Sequential(*layers, _Crop(data.shape[1:]), nn.Tanh()))


def _discriminator(family: Gan, data: DataSpec) -> nn.Module:
    c, times = data.shape[0], len(family.shapes(data)) // 2 - 1
    layers: list[nn.Module] = []
    for level in range(times):
        width = family.channels * 2**level
        layers.append(nn.Conv2d(c, width, 4, 2, 1))
        if level:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.LeakyReLU(0.2))
        c = width
    sides = [side // 2**times for side in data.shape[1:]]
    return _drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * math.prod(sides), 1)))


def _drawn(network: nn.Sequential) -> nn.Sequential:
    """Weights ~ N(0, 0.02²) as published, biases 0."""
    for module in network:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0, 0.02)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return network


class _Crop(nn.Module):
    """The upper left corner of a size."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size[0], : self.size[1]]
