"""Networks and batches small enough for laws to be checked by brute force."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradleak.defenses import Wrapped, undefended
from gradleak.defenses.cvb import cvb
from gradleak.defenses.precode import precode
from gradleak.mechanisms import Diffusing
from gradleak.types import Batch, DataSpec, Mechanism, ModelState

SPEC = DataSpec.image((1, 4, 4), 3)


class TwoTwins(nn.Module):
    """A network whose hidden layers have equal shapes: twins that must not share noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 4)
        self.twin = nn.Linear(4, 4)
        self.other_twin = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        return self.head(torch.tanh(self.other_twin(torch.tanh(self.twin(h)))))


class Bottlenecked(TwoTwins):
    """The same with a variational bottleneck before its head, for protections that need one."""

    def __init__(self) -> None:
        super().__init__()
        precode(self, latent=3)


class Convolved(TwoTwins):
    """The same behind a convolution with a variational bottleneck of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.widen = nn.Linear(8, 16)
        cvb(self, SPEC.shape)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.widen(torch.tanh(self.conv(x)).flatten(1)))


class SmallDenoiser(nn.Module):
    """The same twins for clients of diffusion models: (x_t, times) → (b, 1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 4)
        self.clock = nn.Linear(2, 4)
        self.twin = nn.Linear(4, 4)
        self.other_twin = nn.Linear(4, 4)
        self.head = nn.Linear(4, 16)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        angle = times.to(x)[:, None] / 100
        clock = self.clock(torch.cat([angle.sin(), angle.cos()], 1))
        h = torch.tanh(self.first(x.flatten(1)) + clock)
        return self.head(torch.tanh(self.other_twin(torch.tanh(self.twin(h))))).reshape(x.shape)


class ConvolvedDenoiser(SmallDenoiser):
    """The same behind a convolution with a variational bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.widen = nn.Linear(32, 16)
        cvb(self, SPEC.shape)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        wide = self.widen(torch.tanh(self.conv(x)).flatten(1))
        return super().forward(wide.reshape(x.shape), times)


class OneWeightDenoiser(nn.Module):
    """output = w x: an update of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return self.w * x


NEEDED: dict[str, type[nn.Module]] = {"precode": Bottlenecked, "cvb": Convolved}
"""Networks that a protection is made for; any other takes every network."""


def network_for(mechanism: Mechanism) -> type[nn.Module]:
    """The small network for a client and its outermost protection."""
    rule = mechanism.rule.id if isinstance(mechanism, Wrapped) else ""
    if isinstance(undefended(mechanism), Diffusing):
        return ConvolvedDenoiser if rule == "cvb" else SmallDenoiser
    return NEEDED.get(rule, TwoTwins)


class OneWeight(nn.Module):
    """logits = (w x, 0): an update of one number, so that densities integrate by quadrature."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        product = self.w * x.flatten(1).sum(1, keepdim=True)
        return torch.cat([product, torch.zeros_like(product)], 1)


class Normalised(nn.Module):
    """A convolution with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(48, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def state_of(network: type[nn.Module], *, seed: int = 0) -> ModelState:
    """A float64 state of a freshly initialised network, leaving the global generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ModelState.of(network()).to(torch.float64)


def batch_of(size: int, *, seed: int = 0, classes: int = 3) -> Batch:
    """A random float64 batch inside the box."""
    stream = torch.Generator().manual_seed(seed)
    inputs = torch.rand((size, 1, 4, 4), generator=stream, dtype=torch.float64)
    return Batch(inputs, torch.randint(classes, (size,), generator=stream))


def stream(seed: int) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


SMALL_PRIORS: dict[str, str] = {
    "autoencoder": "autoencoder:steps=20,hidden=16,code=4",
    "diffusion": "diffusion:steps=4,width=8,timesteps=20",
    "gan": "gan:steps=4,channels=2,latent=3",
}
"""Networks that are trained in a moment; any other prior is fitted as it is."""
