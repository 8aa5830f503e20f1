"""The seven words of gradleak as immutable records.

    Scenario --simulate--> Observation --Attack--> Reconstruction --metrics--> Measurement

Records check shapes and kinds when they are built and have no other behaviour. Nothing in this
module knows the truth: an `Observation` holds what an attacker may use, and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput

UpdateKind = Literal["gradient", "delta"]
ServerBehaviour = Literal["honest", "malicious"]
View = Literal["client", "aggregate"]
Modality = Literal["image", "tabular", "text"]
Status = Literal["solved", "exhausted", "dropped", "diverged", "no_solution", "failed"]


class Fact(enum.StrEnum):
    """A piece of knowledge that a threat model may grant to the attacker."""

    MECHANISM = "mechanism"
    """The client's protection and its parameters (Kerckhoffs); without it the attack is unaware."""
    BATCH_SIZE = "batch_size"
    """The number of examples in the client's batch."""
    LABELS = "labels"
    """The labels of the client's batch, in order."""
    BN_STATISTICS = "bn_statistics"
    """Mean and variance of the private batch at the input of every batch-normalisation layer."""
    MINIBATCH_ORDER = "minibatch_order"
    """Which examples every step visited: the order of local training, or the batch indices of
    vertical rounds."""
    TIMESTEPS = "timesteps"
    """Of a diffusion model's client: the step t that every image was noised to."""
    NOISE = "noise"
    """Of a diffusion model's client: the noise ε that every image was mixed with."""
    PRIOR = "prior"
    """What is believed of private inputs before any update, fitted from public data."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """What is publicly known about the form of the data: never a value of it.

    Attributes:
        modality: kind of data.
        shape: shape of one example, e.g. (3, 32, 32).
        bounds: smallest and largest value an entry can take.
        classes: number of classes.
        class_names: names in label order, or empty.
    """

    modality: Modality
    shape: tuple[int, ...]
    bounds: tuple[float, float]
    classes: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape or any(side < 1 for side in self.shape):
            raise InvalidInput(f"data shape {self.shape}: expected positive sides")
        if not self.bounds[0] < self.bounds[1]:
            raise InvalidInput(f"data bounds {self.bounds}: expected (low, high) with low < high")
        if self.classes < 1:
            raise InvalidInput(f"data classes {self.classes}: expected at least 1")
        if self.class_names and len(self.class_names) != self.classes:
            raise InvalidInput(
                f"{len(self.class_names)} class names: expected {self.classes}, one per class"
            )

    @classmethod
    def image(
        cls,
        shape: tuple[int, int, int],
        classes: int,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        class_names: tuple[str, ...] = (),
    ) -> DataSpec:
        """Describe images of `shape` (channels, height, width)."""
        if len(shape) != 3:
            raise InvalidInput(f"image shape {shape}: expected (channels, height, width)")
        return cls("image", tuple(shape), bounds, classes, class_names)


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and labels of one client step, or a claim about them.

    Attributes:
        inputs: (b, *shape), inside the bounds of the data's spec.
        labels: (b,) int64 classes, or (b, k) rows of class probabilities.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim < 2:
            raise InvalidInput(f"batch inputs {tuple(self.inputs.shape)}: expected (b, *shape)")
        if self.labels.ndim not in (1, 2) or self.labels.shape[0] != self.inputs.shape[0]:
            raise InvalidInput(
                f"batch labels {tuple(self.labels.shape)}: expected ({self.inputs.shape[0]},) "
                f"or ({self.inputs.shape[0]}, classes)"
            )
        if self.labels.ndim == 1 and self.labels.dtype != torch.int64:
            raise InvalidInput(f"batch labels of {self.labels.dtype}: expected int64 classes")

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def classes(self) -> Tensor:
        """The most probable class of each example, (b,) int64."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)


@dataclass(frozen=True, slots=True)
class Update:
    """What leaves the client: one tensor per trainable parameter.

    `kind` is "gradient" (of the mean loss) or "delta" (parameters after − before).
    """

    values: Mapping[str, Tensor]
    kind: UpdateKind

    def __post_init__(self) -> None:
        if self.kind not in ("gradient", "delta"):
            raise InvalidInput(f"update kind {self.kind!r}: expected 'gradient' or 'delta'")
        if not self.values:
            raise InvalidInput("update is empty: expected one tensor per trainable parameter")


@dataclass(frozen=True, slots=True)
class ModelState:
    """What the server broadcasts: an architecture and its numbers.

    `model` is used as a template only (`torch.func.functional_call`); its own tensors are ignored.
    """

    model: nn.Module
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Copy the present parameters and buffers of `model`."""
        params = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
        frozen = {k: v.detach().clone() for k, v in model.named_parameters() if not v.requires_grad}
        buffers = {k: v.detach().clone() for k, v in model.named_buffers()}
        if not params:
            raise InvalidInput(f"{type(model).__name__} has no trainable parameter")
        return cls(model, params, frozen | buffers)

    def to(self, target: torch.dtype | torch.device) -> ModelState:
        """Return the state with its floating-point tensors cast or moved."""
        return replace(self, params=cast(self.params, target), buffers=cast(self.buffers, target))


def cast(values: Mapping[str, Tensor], target: torch.dtype | torch.device) -> dict[str, Tensor]:
    """Cast floating-point tensors to a dtype, or move all tensors to a device."""
    if isinstance(target, torch.device):
        return {k: v.to(target) for k, v in values.items()}
    return {k: v.to(target) if v.is_floating_point() else v for k, v in values.items()}


Density = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""(centre, update) -> −log p(update | centre) in nats, 0-dim, differentiable in the centre."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """p(update | state, batch) = exp(−density(centre.mean(state, batch), update)).

    Attributes:
        centre: a deterministic mechanism.
        density: of updates around what `centre` sends.
    """

    centre: Mechanism
    density: Density


class Mechanism(Protocol):
    """p(update | state, batch): local training and protection as one randomised map.

    Laws (tested for every registered mechanism): `mean` is the expectation of `sample`; `log_prob`
    integrates to one; equal generators give equal samples; noise is independent across tensors.
    """

    @property
    def kind(self) -> UpdateKind: ...

    @property
    def deterministic(self) -> bool:
        """Whether `sample` equals `mean` for every generator."""
        ...

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        """Draw what the client really sends."""
        ...

    def trained_on(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Batch:
        """The batch whose gradient `sample` takes with an equal generator.

        `batch` itself, unless a protection transforms inputs. For the auditor, who owns the
        client's generator.
        """
        ...

    def mean(self, state: ModelState, batch: Batch) -> Update:
        """Expectation of `sample`, differentiable in the inputs and in soft labels.

        Raises:
            IntractableLikelihood: the expectation has no computable form.
        """
        ...

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """What `received` should have been if the client's batch were `batch`; differentiable.

        The mean, sharpened by what `received` shows openly (the support a sparsifier kept, say).
        Equals `received` for a deterministic mechanism at the true batch. Where `mean` has no
        form this is a plug-in approximation, good enough to search with.
        """
        ...

    def spent(self, state: ModelState) -> frozenset[str]:
        """Tensors that `predict` has used up: a search gains nothing by comparing them."""
        ...

    def as_gradient(self, update: Update, *, batch_size: int) -> Update:
        """The average gradient that `update` amounts to (a delta divided by −lr · steps)."""
        ...

    def likelihood(self, *, batch_size: int) -> Likelihood:
        """The density of what is sent for a batch of this size.

        Raises:
            IntractableLikelihood: the mechanism is deterministic, or its density has no exact form.
        """
        ...

    def log_prob(self, update: Update, state: ModelState, batch: Batch) -> Tensor:
        """Log-density of `update` in nats, 0-dimensional; raises as `likelihood` does."""
        ...


class Prior(Protocol):
    """p(inputs | labels): what is believed of private data before an update, from public data only.

    Examples are independent. Labels are (…,) int64 classes, or (…, classes) rows of class
    probabilities, over which p is averaged: Σ_c π_c p(x | c). Unknown labels are averaged over the
    public class shares.

    Laws (tested for every registered prior): `log_prob` of a proper one integrates to one and is
    the density of `sample`, whose expectation is `mean`; equal generators give equal samples.
    """

    @property
    def id(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def proper(self) -> bool:
        """Whether `log_prob` is a density; if not, it is known up to a constant only."""
        ...

    def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-density in nats, summed over the examples; differentiable in inputs and soft labels.

        Args:
            inputs: (trials, b, *shape), of any floating-point type and device.
            labels: (trials, b) int64 or (trials, b, classes); None where unknown.

        Returns:
            (trials,), of the type and device of the inputs.
        """
        ...

    def sample(self, labels: Tensor | int, *, generator: torch.Generator) -> Tensor:
        """Draw inputs (n, *shape), perhaps outside the data's bounds.

        Args:
            labels: (n,) int64 or (n, classes); or n, where labels are unknown.
            generator: source of the draws.

        Raises:
            InvalidInput: the prior is improper.
        """
        ...

    def mean(self, labels: Tensor | int) -> Tensor:
        """Expectation of `sample` (n, *shape), to start from; for an improper prior the centre."""
        ...

    def to(self, target: torch.dtype | torch.device) -> Prior:
        """The prior with its numbers cast or moved, so that `log_prob` need not."""
        ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """One round seen by the attacker: the state broadcast and the update received."""

    state: ModelState
    update: Update

    def __post_init__(self) -> None:
        missing = self.state.params.keys() - self.update.values.keys()
        extra = self.update.values.keys() - self.state.params.keys()
        if missing or extra:
            raise InvalidInput(
                f"update keys differ from the model's parameters: missing {sorted(missing)[:3]}, "
                f"unknown {sorted(extra)[:3]}"
            )
        for name, value in self.update.values.items():
            want = tuple(self.state.params[name].shape)
            if tuple(value.shape) != want:
                raise InvalidInput(f"update {name!r} is {tuple(value.shape)}: expected {want}")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Facts granted to the attacker; None where a fact is not granted.

    Attributes:
        batch_size: examples in the client's batch.
        labels: (b,) int64.
        bn_statistics: per batch-normalisation layer (mean, biased variance), each (channels,),
            exact for the private batch, or the running estimates where only those are known.
        prior: what public data say of private inputs.
    """

    batch_size: int | None = None
    labels: Tensor | None = None
    bn_statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None
    prior: Prior | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything an attacker may use, and nothing else.

    Attributes:
        exchanges: rounds in order.
        mechanism: the attacker's belief; the true one iff the threat model grants it.
        data: public form of the data.
        knowledge: granted facts.
        server: whether the server may have altered the broadcast state.
    """

    exchanges: tuple[Exchange, ...]
    mechanism: Mechanism
    data: DataSpec
    knowledge: Knowledge = Knowledge()
    server: ServerBehaviour = "honest"

    def __post_init__(self) -> None:
        if not self.exchanges:
            raise InvalidInput("observation without an exchange: expected at least one")

    @property
    def state(self) -> ModelState:
        """The latest state broadcast."""
        return self.exchanges[-1].state

    @property
    def update(self) -> Update:
        """The latest update received."""
        return self.exchanges[-1].update


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """An attacker's claim, with its own objective and status.

    Attributes:
        batch: the claim; inputs inside the data's bounds.
        objective: the attack's own objective at the claim, lower is better; nan if it has none.
        status: "solved" (own tolerance reached), "exhausted" (budget spent), "dropped" (a restart
            given up for better ones of its target; never a claim's), "diverged", "no_solution" (a
            closed form does not apply; `message` says why), "failed".
        message: one line of diagnosis.
        evaluations: gradient evaluations spent, over all restarts.
        history: objective of the chosen restart along the search (thinned).
        engine: how the work was run ("fast", "vmap", "loop", ...), for the record.
    """

    batch: Batch
    objective: float
    status: Status
    message: str = ""
    evaluations: int = 0
    history: tuple[float, ...] = ()
    engine: str = ""


@dataclass(frozen=True, slots=True)
class About:
    """What a reader needs to know about an attack before trusting a number of it.

    `likelihood` and `prior` say which posterior it maximises: p(update | claim) and p(claim) of the
    Bayesian framework (Balunović et al., ICLR 2022). `classifiers` says whether it reads what
    networks that denoise do not have: a head, labels, layers in a row.
    """

    id: str
    title: str
    paper: str
    link: str
    modalities: frozenset[Modality]
    needs: frozenset[Fact]
    likelihood: str
    prior: str
    server: ServerBehaviour = "honest"
    deviations: tuple[str, ...] = ()
    classifiers: bool = False


@runtime_checkable
class Attack(Protocol):
    """Observation -> Reconstruction."""

    about: ClassVar[About]

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction: ...


@runtime_checkable
class Planting(Protocol):
    """What an attack of a malicious server has besides: it crafts the state that it broadcasts."""

    def plant(
        self,
        state: ModelState,
        public: Batch,
        *,
        data: DataSpec,
        batch_size: int,
        generator: torch.Generator,
    ) -> ModelState:
        """Alter a state, knowing public examples alone.

        Args:
            state: what an honest server would broadcast.
            public: examples that are none of the clients'.
            data: form of the data.
            batch_size: examples that a client will use.
            generator: the server's randomness.

        Raises:
            NotApplicable: the network has no place for it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number with unit, interval, sample size, baseline and control."""

    value: float
    low: float
    high: float
    confidence: float
    n: int
    unit: str
    baseline: float | None = None
    control: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)
