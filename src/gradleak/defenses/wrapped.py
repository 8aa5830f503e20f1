"""What every protection that wraps a mechanism shares."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.errors import IntractableLikelihood, NotApplicable
from gradleak.mechanisms.aggregate import Aggregate, summed
from gradleak.mechanisms.denoising import Diffusing
from gradleak.mechanisms.likelihood import Likely
from gradleak.mechanisms.vertical import Vertical
from gradleak.types import (
    Batch,
    Likelihood,
    Mechanism,
    ModelState,
    Observation,
    Update,
    UpdateKind,
)


class Defense(Protocol):
    """A protection: Mechanism -> Mechanism, a frozen dataclass of its parameters."""

    id: ClassVar[str]
    title: ClassVar[str]
    sheet: ClassVar[Sheet]

    def __call__(self, mechanism: Mechanism) -> Mechanism: ...

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """What of its claims the change from `before` to `after` contradicts, if anything.

        Returns:
            A clause with one format field, and the number measured for it.
        """
        ...


class Noise(Protocol):
    """The symmetric law of independent noise on every coordinate."""

    def log_density(self, residual: Tensor) -> Tensor:
        """Log-density of noise at every coordinate, in nats, shaped as `residual`."""
        ...

    def log_cdf(self, x: Tensor) -> Tensor:
        """Log-probability of noise below x at every coordinate, in nats, exact in the tails."""
        ...

    def widened(self, factor: float) -> Self:
        """The same law, `factor` times as wide."""
        ...


class Separable(ABC):
    """A density under which coordinates of the update are independent, given the centre."""

    @abstractmethod
    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Log-density of every coordinate, in nats, shaped as the update."""

    def widened(self, factor: float) -> Self | None:
        """The same density with all its noise `factor` times as wide; None if it has none."""
        found = {}
        for one in fields(self):  # type: ignore[arg-type]  # all of them are dataclasses
            part = getattr(self, one.name)
            if hasattr(part, "widened") and (wide := part.widened(factor)) is not None:
                found[one.name] = wide
        return replace(self, **found) if found else None  # type: ignore[type-var]

    def __call__(self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensor:
        return -torch.stack([t.sum() for t in self.terms(centre, update).values()]).sum()


@dataclass(frozen=True)
class Around(Separable):
    """−log p of noise added to the centre: Σ_j −log n(u_j − c_j)."""

    noise: Noise

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {k: self.noise.log_density(update[k] - c) for k, c in centre.items()}


def log_mass(noise: Noise, low: Tensor, high: Tensor) -> Tensor:
    """log P(low < e < high) at every coordinate, in nats, exact in both tails."""
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    upper = noise.log_cdf(high)
    gap = (noise.log_cdf(low) - upper).clamp(max=-torch.finfo(low.dtype).eps)
    rest = torch.where(gap > -math.log(2), (-torch.expm1(gap)).log(), torch.log1p(-gap.exp()))
    return upper + rest


def separable(mechanism: Mechanism, *, batch_size: int) -> tuple[Mechanism, Separable]:
    """Centre and density of a mechanism whose coordinates are independent.

    Raises:
        IntractableLikelihood: it has no density, or not of this kind.
    """
    known = mechanism.likelihood(batch_size=batch_size)
    if not isinstance(known.density, Separable):
        raise IntractableLikelihood("coordinates of the update depend on each other: no density")
    return known.centre, known.density


def noise_inside(mechanism: Mechanism, *, batch_size: int) -> tuple[Mechanism, Noise]:
    """Centre and noise of a mechanism that ends in additive noise.

    Raises:
        IntractableLikelihood: it ends in something else.
    """
    known = mechanism.likelihood(batch_size=batch_size)
    if not isinstance(known.density, Around):
        raise IntractableLikelihood("not plain noise on the update: no exact density")
    return known.centre, known.density.noise


def noised(mechanism: Mechanism, noise: Noise) -> Likelihood:
    """The likelihood of what `mechanism` sends, plus noise.

    Raises:
        IntractableLikelihood: `mechanism` is random in a way that noise does not smooth exactly.
    """
    if mechanism.deterministic:
        return Likelihood(mechanism, Around(noise))
    if isinstance(mechanism, Wrapped):
        return mechanism.noised(noise)
    raise IntractableLikelihood(f"noise on a random {type(mechanism).__name__}: no exact density")


@dataclass(frozen=True)
class Wrapped(Likely):
    """A mechanism around another one: a layer of the onion, put there by `rule`."""

    inner: Mechanism
    rule: Defense

    @property
    def kind(self) -> UpdateKind:
        return self.inner.kind

    @property
    def deterministic(self) -> bool:
        return self.inner.deterministic

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        """What the inner mechanism trains on; draws before the inner sample are made here too."""
        return self.inner.trained_on(state, batch, generator=generator)

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        return self.inner.as_gradient(update, batch_size=batch_size)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self.inner.predict(received, state, batch)

    def seen_through(self) -> Mechanism | None:
        """A mechanism without this layer that predicts the same; None where there is none."""
        own = type(self).__mro__[: type(self).__mro__.index(Wrapped)]
        return None if any("predict" in vars(kind) for kind in own) else self.inner

    def spent(self, state: ModelState) -> frozenset[str]:
        return self.inner.spent(state)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        raise IntractableLikelihood(f"{self.rule.id}: no exact density is known")

    def noised(self, noise: Noise) -> Likelihood:
        """The likelihood of what this random mechanism sends, plus noise."""
        raise IntractableLikelihood(f"noise on a random {self.rule.id}: no exact density")


@dataclass(frozen=True)
class Unbiased(Wrapped):
    """A layer that is random, and whose expectation is that of what lies inside."""

    @property
    def deterministic(self) -> bool:
        return False

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)


class UpdateMap(Defense, Protocol):
    """A protection that maps every update by one fixed function."""

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Mapped(Wrapped):
    """ũ = map(u): as deterministic as what it wraps."""

    rule: UpdateMap

    def mean(self, state: ModelState, batch: Batch) -> Update:
        if not self.inner.deterministic:
            raise IntractableLikelihood(
                f"{self.rule.id} of a random update: its mean has no closed form"
            )
        return self._mapped(self.inner.mean(state, batch))

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self._mapped(self.inner.sample(state, batch, generator=generator))

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self._mapped(self.inner.predict(received, state, batch))

    def _mapped(self, update: Update) -> Update:
        return Update(self.rule.map(update.values), update.kind)


@dataclass(frozen=True)
class Through(Separable):
    """The density of what a fixed map lets through, as one of what it maps."""

    density: Separable
    rule: UpdateMap

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return self.density.terms(self.rule.map(centre), update)


@dataclass(frozen=True)
class Masked(Mapped):
    """ũ = m ⊙ u with a mask m of zeros and ones that everybody knows: `map` is linear."""

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self._mapped(self.inner.mean(state, batch))

    def likelihood(self, *, batch_size: int) -> Likelihood:
        if self.deterministic:
            return super().likelihood(batch_size=batch_size)
        centre, density = separable(self.inner, batch_size=batch_size)
        return Likelihood(centre, _Sent(density, self.rule))

    def noised(self, noise: Noise) -> Likelihood:
        known = noised(self.inner, noise)
        if not isinstance(known.density, Separable):
            return super().noised(noise)
        return Likelihood(known.centre, _Sent(known.density, self.rule, noise))


@dataclass(frozen=True)
class _Sent(Separable):
    """The density of what a known mask lets through; the rest is exactly zero, or noise alone."""

    density: Separable
    rule: UpdateMap
    noise: Noise | None = None

    def terms(
        self, centre: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        mask = self.rule.map({k: torch.ones_like(u) for k, u in update.items()})
        sent = self.density.terms(centre, update)
        return {k: torch.where(mask[k] != 0, t, self._rest(update[k])) for k, t in sent.items()}

    def _rest(self, update: Tensor) -> Tensor:
        if self.noise is not None:
            return self.noise.log_density(update)
        return torch.zeros_like(update).masked_fill(update != 0, -math.inf)


@dataclass(frozen=True)
class Sent(Likely):
    """A client that sends one given update, whatever its batch: the core of what is on its way."""

    update: Update

    deterministic: ClassVar[bool] = True

    @property
    def kind(self) -> UpdateKind:
        return self.update.kind

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.update

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.update

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        return self.update

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        return update

    def likelihood(self, *, batch_size: int) -> Likelihood:
        raise IntractableLikelihood("an update on its way has no density")


Memory = Mapping[str, Tensor]
"""What a client keeps from round to round, by name; empty before its first round."""


class Remembering(Protocol):
    """A layer whose client keeps something from round to round; `sample` is its first round."""

    def advance(
        self, state: ModelState, batch: Batch, memory: Memory, *, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Send one round's update, and return what the client keeps for the next."""
        ...


@dataclass(frozen=True)
class Counted(Wrapped, ABC):
    """A random layer that treats later rounds otherwise: its clients count them."""

    @property
    def deterministic(self) -> bool:
        return False

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self.advance(state, batch, {}, generator=generator)[0]

    def advance(
        self, state: ModelState, batch: Batch, memory: Memory, *, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """One round, and the number of rounds so far."""
        clean = self.inner.sample(state, batch, generator=generator)
        number = memory.get("round", torch.tensor(0))
        sent = self.sent(clean, state, batch, earlier=int(number), generator=generator)
        return sent, {"round": number + 1}

    @abstractmethod
    def sent(
        self,
        clean: Update,
        state: ModelState,
        batch: Batch,
        *,
        earlier: int,
        generator: torch.Generator,
    ) -> Update:
        """What is made of the layer inside's update, `earlier` rounds after the first."""


@dataclass(frozen=True)
class _Carried(Wrapped):
    """What lies inside a layer, for one round: it notes the memory that the round leaves."""

    memory: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        update, kept = advanced(self.inner, state, batch, dict(self.memory), generator=generator)
        self.memory.clear()
        self.memory.update(kept)
        return update


def advanced(
    mechanism: Mechanism,
    state: ModelState,
    batch: Batch,
    memory: Memory,
    *,
    generator: torch.Generator,
) -> tuple[Update, Memory]:
    """One round of a client that may remember earlier ones.

    Args:
        mechanism: the client; at most one of its layers remembers.
        state: broadcast state.
        batch: the round's examples.
        memory: what the previous round returned; empty in the first.
        generator: the client's randomness.

    Returns:
        The update, equal to that of `sample` in the first round, and the new memory.
    """
    if (advance := getattr(mechanism, "advance", None)) is not None:  # `Remembering`, told fast
        sent: tuple[Update, Memory] = advance(state, batch, memory, generator=generator)
        return sent
    if not isinstance(mechanism, Wrapped) or not _remembers(mechanism.inner):
        return mechanism.sample(state, batch, generator=generator), memory
    inside = _Carried(mechanism.inner, mechanism.rule, dict(memory))
    update = _around(mechanism, inside).sample(state, batch, generator=generator)
    return update, inside.memory


def _remembers(mechanism: Mechanism) -> bool:
    if hasattr(mechanism, "advance"):
        return True
    return isinstance(mechanism, Wrapped) and _remembers(mechanism.inner)


@runtime_checkable
class Gathering(Protocol):
    """A protection whose rounds on one batch tell more together than the latest one does."""

    def gathered(self, seen: Observation) -> Observation:
        """The same as one round, where this protection is the outermost."""
        ...


def gathered(seen: Observation) -> Observation:
    """What several rounds on one batch amount to as one, where the protection believed in says."""
    layer = seen.mechanism
    if len(seen.exchanges) == 1 or not isinstance(layer, Wrapped):
        return seen
    if isinstance(undefended(layer), Vertical) or not isinstance(layer.rule, Gathering):
        return seen
    return layer.rule.gathered(seen)


@runtime_checkable
class Informed(Protocol):
    """A protection that needs examples which everybody knows, to be told before it runs."""

    def informed(self, public: Batch) -> Self:
        """The same protection, knowing some public examples."""
        ...


@dataclass(frozen=True)
class OnPublic:
    """A protection that keeps the public examples that it is told of."""

    public: Batch | None = field(default=None, init=False, repr=False, compare=False)

    def informed(self, public: Batch) -> Self:
        """The same protection, with public examples."""
        told = copy.copy(self)
        object.__setattr__(told, "public", public)
        return told


def asks_for_public(mechanism: Mechanism) -> bool:
    """Whether any layer asks for public examples."""
    if not isinstance(mechanism, Wrapped):
        return False
    return isinstance(mechanism.rule, Informed) or asks_for_public(mechanism.inner)


def informed(mechanism: Mechanism, public: Batch) -> Mechanism:
    """Tell every layer that asks for them some public examples."""
    if not isinstance(mechanism, Wrapped):
        return mechanism
    told: Mechanism = _around(mechanism, informed(mechanism.inner, public))
    if isinstance(mechanism.rule, Informed):
        object.__setattr__(told, "rule", mechanism.rule.informed(public))
    return told


@runtime_checkable
class Compensating(Protocol):
    """A protection with a part of its own at the server."""

    def compensated(self, values: Mapping[str, Tensor], *, clients: int) -> dict[str, Tensor]:
        """What the server makes of the mean of the updates of some clients."""
        ...


def compensated(mechanism: Mechanism, mean: Update, *, clients: int) -> Update:
    """What the server makes of the mean update: undo layer by layer, the outermost first."""
    while isinstance(mechanism, Wrapped):
        if isinstance(mechanism.rule, Compensating):
            mean = Update(mechanism.rule.compensated(mean.values, clients=clients), mean.kind)
        mechanism = mechanism.inner
    return mean


def norm(update: Update) -> float:
    """L2 norm over all tensors together, in float64."""
    return math.sqrt(sum(float(v.double().square().sum()) for v in update.values.values()))


def difference(a: Update, b: Update) -> Update:
    """Tensor by tensor, a − b."""
    return Update({k: a.values[k] - b.values[k] for k in a.values}, a.kind)


def undefended(mechanism: Mechanism) -> Mechanism:
    """Peel every protection off: what an attacker unaware of them believes."""
    while isinstance(mechanism, Wrapped):
        mechanism = mechanism.inner
    if isinstance(mechanism, Aggregate):
        return summed(undefended(mechanism.inner), mechanism.clients)
    return mechanism


def check_classifies(defense: str, mechanism: Mechanism, *, why: str) -> None:
    """Refuse a protection of classifiers to a client that trains a diffusion model.

    Raises:
        NotApplicable: it is one.
    """
    core = undefended(mechanism)
    if isinstance(core, Diffusing):
        raise NotApplicable(
            f"{defense}: expected a classifier, the client's {core.id} trains a denoiser, {why}"
        )


def rebased(mechanism: Mechanism, **changes: object) -> Mechanism:
    """Return the same onion around a changed core mechanism; unknown fields are left alone."""
    if isinstance(mechanism, Wrapped):
        outer: Mechanism = _around(mechanism, rebased(mechanism.inner, **changes))
        return outer
    if isinstance(mechanism, Aggregate):
        return summed(rebased(mechanism.inner, **changes), mechanism.clients)
    if not is_dataclass(mechanism):
        return mechanism
    known = {k: v for k, v in changes.items() if hasattr(mechanism, k)}
    return replace(mechanism, **known)


def _around(layer: Wrapped, inner: Mechanism) -> Any:
    """The same layer around another mechanism."""
    outer = copy.copy(layer)
    object.__setattr__(outer, "inner", inner)
    return outer
