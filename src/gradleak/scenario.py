"""A scenario plays the clients' step for real and separates what is seen from what is true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradleak.data import Dataset
from gradleak.defenses import rebased, undefended
from gradleak.errors import InvalidInput
from gradleak.mechanisms import Diffusing, Draws, FedAvg, FedSGD, Vertical
from gradleak.mechanisms.aggregate import joined, mean
from gradleak.mechanisms.client import batch_norm_statistics
from gradleak.mechanisms.denoising import check_network
from gradleak.mechanisms.fedavg import Order
from gradleak.seeding import child
from gradleak.threat import ThreatModel, Truth
from gradleak.types import Batch, Exchange, Fact, Mechanism, ModelState, Observation, Prior

_LATEST = "client/protection"
"""Stream of what the protection draws in the latest round."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One client and one round, or as many rounds as its mechanism has; or several in a sum.

    Attributes:
        data: the data set the client's batch comes from.
        model: network broadcast by the server, as a module or as a state.
        mechanism: local training with its protections.
        threat: what the attacker is and knows.
        batch_size: examples in the client's batch.
        indices: examples, `batch_size` of every client in turn; None draws them at random.
        client: number of the client, or of the sum, for the record.
        clients: whose updates are summed, where the threat model's view is "aggregate"; its last
            ones collude with the server.
        prior: fitted to examples that are none of the clients'; the threat model may grant it.
    """

    data: Dataset
    model: nn.Module | ModelState
    mechanism: Mechanism = field(default_factory=FedSGD)
    threat: ThreatModel = field(default_factory=ThreatModel)
    batch_size: int = 1
    indices: Tensor | None = None
    client: int = 0
    clients: int = 1
    prior: Prior | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.data):
            raise InvalidInput(
                f"batch size {self.batch_size}: expected 1 to {len(self.data)}, "
                f"the size of {self.data.name}"
            )
        template = self.model.model if isinstance(self.model, ModelState) else self.model
        check_network(template, undefended(self.mechanism))
        examples = self.clients * self.batch_size
        if self.indices is not None and len(self.indices) != examples:
            raise InvalidInput(
                f"{len(self.indices)} examples chosen: expected batch_size={self.batch_size}"
                + (f" of each of {self.clients} clients" if self.clients > 1 else "")
            )
        if self.threat.view == "aggregate":
            self._check_sum()
        elif self.clients != 1:
            raise InvalidInput(f"clients={self.clients}: expected ThreatModel(view='aggregate')")

    def _check_sum(self) -> None:
        if not 0 <= self.threat.colluding < self.clients:
            raise InvalidInput(
                f"colluding={self.threat.colluding}: expected fewer than the {self.clients} "
                "clients of the sum"
            )
        if isinstance(undefended(self.mechanism), Vertical):
            raise InvalidInput("a sum of vertical clients: expected fedsgd or fedavg")
        if self.clients == 1:
            return
        for fact in (Fact.BN_STATISTICS, Fact.MINIBATCH_ORDER, Fact.TIMESTEPS, Fact.NOISE):
            if fact in self.threat.knows:
                raise InvalidInput(f"a sum of {self.clients} clients has no {fact} to grant")

    @property
    def state(self) -> ModelState:
        """What the server broadcasts."""
        return self.model if isinstance(self.model, ModelState) else ModelState.of(self.model)


def simulate(scenario: Scenario, *, generator: torch.Generator) -> tuple[Observation, Truth]:
    """Let the clients compute and protect their updates; return what is seen and what is true.

    The update is computed in the precision of the broadcast parameters.

    Args:
        scenario: what happens.
        generator: source of the client's draws (examples, order, noise), as named streams.
    """
    indices = scenario.indices
    if indices is None:
        draw = child(generator, "client/examples")
        examples = scenario.clients * scenario.batch_size
        indices = torch.randperm(len(scenario.data), generator=draw)[:examples]
    plays = [
        _play(
            scenario, own, generator=child(generator, f"client/{i} in the sum") if i else generator
        )
        for i, own in enumerate(torch.split(indices, scenario.batch_size))
    ]
    honest = plays[: scenario.clients - scenario.threat.colluding]
    exchanges = honest[0].exchanges
    if len(plays) > 1:
        updates = [play.exchanges[-1].update for play in plays]
        exchanges = (Exchange(exchanges[-1].state, mean(updates)),)
    alone = len(honest) == 1
    batch, trained_on = joined(p.batch for p in honest), joined(p.trained_on for p in honest)
    if all(p.trained_on.inputs is p.batch.inputs for p in honest):
        trained_on = Batch(batch.inputs, trained_on.labels)
    truth = Truth(
        batch,
        trained_on,
        client=scenario.client,
        clients=len(honest),
        colluders=tuple(play.exchanges[-1].update for play in plays[len(honest) :]),
        bn_statistics=honest[0].bn_statistics or None if alone else None,
        order=honest[0].order if alone else None,
        draws=honest[0].draws if alone else None,
    )
    seen = scenario.threat.grant(
        truth, exchanges, scenario.mechanism, scenario.data.spec, scenario.prior
    )
    return seen, truth


class _Play(NamedTuple):
    """What one client does."""

    exchanges: tuple[Exchange, ...]
    batch: Batch
    trained_on: Batch
    bn_statistics: dict[str, tuple[Tensor, Tensor]]
    order: Order | None
    draws: Draws | None


def _play(scenario: Scenario, indices: Tensor, *, generator: torch.Generator) -> _Play:
    state = scenario.state
    reference = next(iter(state.params.values()))
    raw = scenario.data.batch(indices)
    batch = Batch(raw.inputs.to(reference), raw.labels.to(reference.device))

    mechanism = scenario.mechanism
    core, order = undefended(mechanism), None
    if isinstance(core, FedAvg | Vertical):
        order = core.draw_order(len(batch), generator=child(generator, "client/order"))
        mechanism = rebased(mechanism, fixed_order=order)
    draws = None
    if isinstance(core, Diffusing):
        draws = core.draw(batch, generator=child(generator, "client/noise"))
        mechanism = rebased(mechanism, draws=draws)
    with torch.no_grad():
        exchanges = tuple(_rounds(mechanism, state, batch, generator=generator))
        state = exchanges[-1].state
        trained_on = mechanism.trained_on(state, batch, generator=child(generator, _LATEST))
        statistics = batch_norm_statistics(state, trained_on.inputs)
    return _Play(exchanges, batch, trained_on, statistics, order, draws)


def _rounds(
    mechanism: Mechanism, state: ModelState, batch: Batch, *, generator: torch.Generator
) -> Iterator[Exchange]:
    """Play every round; the protection draws anew in each, the latest from the plain stream."""
    core = undefended(mechanism)
    if not isinstance(core, Vertical):
        stream = child(generator, _LATEST)
        yield Exchange(state, mechanism.sample(state, batch, generator=stream))
        return
    visits = core.fixed_order or ()
    for left, visit in zip(range(len(visits) - 1, -1, -1), visits, strict=True):
        stream = child(generator, f"client/protection/{left} to come" if left else _LATEST)
        update = rebased(mechanism, fixed_order=(visit,)).sample(state, batch, generator=stream)
        yield Exchange(state, update)
        state = core.after(state, update)
