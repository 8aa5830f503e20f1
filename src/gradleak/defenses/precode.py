"""PRECODE: a variational bottleneck before the head (Scheliga, Mäder & Seeland, WACV 2022)."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Wrapped, check_classifies, rebased, undefended
from gradleak.denoising import denoises
from gradleak.errors import IntractableLikelihood, InvalidInput, NotApplicable
from gradleak.mechanisms.client import Loss
from gradleak.mechanisms.fedavg import FedAvg
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.mechanisms.vertical import Vertical
from gradleak.seeding import normal
from gradleak.types import Batch, Mechanism, ModelState, Update

_NOISE = "latent_noise"
_WEIGHT = "divergence_weight"


class VariationalBottleneck(nn.Module):
    """h → decoder(μ + σ ε) with (μ, s) = encoder(h) in halves of its channels, σ = softplus(s).

    In training mode ε ~ N(0, 1); else it is the buffer `latent_noise`, zero unless a client's draw
    stands in for it, so that the network stays a pure function.

    Args:
        encoder: (b, …) → (b, 2 · latent[0], …).
        decoder: (b, *latent) → (b, …).
        latent: form of ε.
        weight: of the divergence in the client's loss.
    """

    latent_noise: Tensor
    divergence_weight: Tensor
    given: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, latent: tuple[int, ...], weight: float
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer(_NOISE, torch.zeros(1, *latent))
        self.register_buffer(_WEIGHT, torch.tensor(weight))

    def forward(self, h: Tensor) -> Tensor:
        statistics = self.encoder(h)
        mean, scale = statistics.chunk(2, dim=1)
        noise = self.latent_noise[: h.shape[0]]
        if self.training:
            noise, self.given = torch.randn_like(mean), statistics
        decoded: Tensor = self.decoder(mean + softplus(scale) * noise)
        return decoded

    def penalty(self) -> Tensor:
        """What the last batch in training mode adds to the loss."""
        return self.divergence_weight * divergence(self.given).mean()


def precode(model: nn.Module, *, latent: int = 256, weight: float = 1e-3) -> nn.Module:
    """Put a `VariationalBottleneck` before the last linear layer of `model`, in place.

    Sizes and weight are those of the authors' code.

    Raises:
        InvalidInput: there is no linear layer with a name, or none that images pass through.
    """
    if denoises(model):
        raise InvalidInput("precode: expected a classifier; of a denoiser, cvb")
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n]
    if not heads:
        raise InvalidInput("precode: expected a network with a linear layer")
    name, head = heads[-1]
    width = head.in_features
    encoder, decoder = nn.Linear(width, 2 * latent), nn.Linear(latent, width)
    bottleneck = VariationalBottleneck(encoder, decoder, latent=(latent,), weight=weight)
    model.set_submodule(name, nn.Sequential(bottleneck, head))
    return model


def divergence(statistics: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) in bits, per example: (b, 2 latent, …) → (b,)."""
    mean, scale = statistics.chunk(2, dim=1)
    sigma = softplus(scale)
    nats = 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).flatten(1).sum(1)
    return nats / math.log(2)


@runtime_checkable
class Latent(Protocol):
    """A mechanism that is deterministic given standard normal numbers its client draws.

    A search may vary claim and latent together, with −log p(latent) = ½ ‖latent‖² + constant.
    """

    def latent_shape(self, state: ModelState, *, batch_size: int) -> tuple[int, ...]:
        """Form of the latent."""
        ...

    def predict_given(
        self, received: Update, state: ModelState, batch: Batch, latent: Tensor
    ) -> Update:
        """What `received` should have been for this batch and latent; differentiable in both."""
        ...


@dataclass(frozen=True)
class Precode:
    """u = ∇_θ (1/b) Σ_i [ℓ(f_θ(x_i, ε_i), y_i) + w · KL(N(μ_i, σ_i²) ‖ N(0, 1))], ε ~ N(0, 1).

    The network has to be built with the bottleneck (`precode(model)`, `--model lenet+precode`); w
    belongs to it. An update of one example shows ε: the decoder's gradient is an outer product with
    z = μ + σ ε, the encoder's one with h, and (μ, σ) follow from h. The adaptive attack reads ε off
    and matches the deterministic rest. For a batch it takes ε = 0 and mutes the bottleneck. Under
    local training every step sees the same ε.

    Source: Scheliga, Mäder & Seeland, "PRECODE - A Generic Model Extension to Prevent Deep Gradient
    Leakage", WACV 2022; softplus, bits and constants as in its code.
    """

    id: ClassVar[str] = "precode"
    title: ClassVar[str] = "PRECODE"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Scheliga, Mäder, Seeland, PRECODE, WACV 2022",
        link="https://arxiv.org/abs/2108.04725",
        promises="Latent noise before the head makes every gradient random.",
        broken_by=(
            "a first linear layer in closed form, whatever the noise; elsewhere muting the "
            "bottleneck, whose noise one example gives away"
        ),
        cost="parameters: the bottleneck is larger than a small network",
    )

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        check_classifies(self.id, mechanism, why="whose linear layers read times alone (cvb fits)")
        return _Read(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """One update cannot contradict a claim about noise inside the network."""
        return None


def bottleneck_of(state: ModelState) -> str:
    """Name of the network's bottleneck, traced networks included.

    Raises:
        NotApplicable: there is none.
    """
    for name in state.buffers:
        if name.endswith(f".{_NOISE}"):
            return name.removesuffix(f".{_NOISE}")
    raise NotApplicable(
        "the network has no variational bottleneck: expected --model NAME+precode or NAME+cvb"
    )


@dataclass(frozen=True)
class _WithDivergence:
    """The loss on outputs, plus the divergence of what the encoder gave on the way to them."""

    loss: Loss
    weight: float
    given: list[Tensor]

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(outputs, labels) + self.weight * divergence(self.given.pop()).mean()


_watched: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, list[Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def _watching(model: nn.Module, encoder: str) -> tuple[nn.Module, list[Tensor]]:
    """A copy of `model` on its own parameters, and where its encoder leaves what it gives."""
    if model not in _watched:
        copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        given: list[Tensor] = []

        def leave(_: nn.Module, arguments: tuple[Tensor, ...], statistics: Tensor) -> None:
            given[:] = [statistics]

        copied.get_submodule(encoder).register_forward_hook(leave)
        _watched[model] = copied, given
    return _watched[model]


@dataclass(frozen=True)
class DrawnLatent(Wrapped):
    """A client that draws the noise of its network's bottleneck; attacks hold it at zero."""

    @property
    def deterministic(self) -> bool:
        return False

    def mean(self, state: ModelState, batch: Batch) -> Update:
        raise IntractableLikelihood(
            f"{self.rule.id}: no closed form of the mean over its latent noise"
        )

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        inner, given = self._given(state, self._drawn(state, batch, generator))
        return inner.sample(given, batch, generator=generator)

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        self._drawn(state, batch, generator)
        return self.inner.trained_on(state, batch, generator=generator)

    def _drawn(self, state: ModelState, batch: Batch, generator: torch.Generator) -> Tensor:
        shape = self.latent_shape(state, batch_size=len(batch))
        latent = normal(shape, generator=generator, dtype=batch.inputs.dtype)
        return latent.to(batch.inputs.device)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        blank = torch.zeros_like(state.buffers[f"{bottleneck_of(state)}.{_NOISE}"])
        return self.predict_given(received, state, batch, blank)

    def latent_shape(self, state: ModelState, *, batch_size: int) -> tuple[int, ...]:
        blank = state.buffers[f"{bottleneck_of(state)}.{_NOISE}"]
        return (batch_size, *blank.shape[1:])

    def predict_given(
        self, received: Update, state: ModelState, batch: Batch, latent: Tensor
    ) -> Update:
        inner, given = self._given(state, latent)
        return inner.predict(received, given, batch)

    def _given(self, state: ModelState, latent: Tensor) -> tuple[Mechanism, ModelState]:
        """The deterministic client for one draw, and the state it works on."""
        name = bottleneck_of(state)
        model, statistics = _watching(state.model, f"{name}.encoder")
        weight = float(state.buffers[f"{name}.{_WEIGHT}"])
        core = undefended(self.inner)
        if not isinstance(core, FedSGD | FedAvg | Vertical):
            what = f"{self.rule.id} of {type(core).__name__}"
            raise NotApplicable(f"{what}: expected a built-in mechanism")
        loss = _WithDivergence(core.loss, weight, statistics)
        buffers = {**state.buffers, f"{name}.{_NOISE}": latent}
        return rebased(self.inner, loss=loss), replace(state, model=model, buffers=buffers)


@dataclass(frozen=True)
class _Read(DrawnLatent):
    """PRECODE's: linear, so that an update of one example shows ε; muted for a batch."""

    rule: Precode

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        if len(batch) == 1:
            latent = self.latent_of(received, state)
            return self.predict_given(received, state, batch, latent)
        clean = super().predict(received, state, batch)
        name = bottleneck_of(state)
        muted = {k: v for k, v in received.values.items() if k.startswith(f"{name}.")}
        return Update({**clean.values, **muted}, clean.kind)

    def spent(self, state: ModelState) -> frozenset[str]:
        """The bottleneck: read off or muted, and so much larger that it would drown the rest."""
        name = bottleneck_of(state)
        own = frozenset(k for k in state.params if k.startswith(f"{name}."))
        return own | self.inner.spent(state)

    def latent_of(self, received: Update, state: ModelState) -> Tensor:
        """The noise behind an update of one example, (1, latent); exact for a gradient."""
        name = bottleneck_of(state)
        h = _read_by(received.values, f"{name}.encoder")
        z = _read_by(received.values, f"{name}.decoder")
        weight, bias = (state.params[f"{name}.encoder.{part}"] for part in ("weight", "bias"))
        mean, scale = (weight @ h + bias).chunk(2)
        return ((z - mean) / softplus(scale))[None]


def _read_by(gradient: Mapping[str, Tensor], layer: str) -> Tensor:
    """What a linear layer with bias read, (width,): Σ_j δ_j ∂L/∂W_j / Σ_j δ_j², δ = ∂L/∂b."""
    errors = gradient[f"{layer}.bias"]
    energy = (errors**2).sum()
    return errors @ gradient[f"{layer}.weight"] / energy.clamp(min=torch.finfo(energy.dtype).tiny)
