"""Who attacks and what they know: the only door from the truth to an attacker's knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from gradleak.defenses import rebased, undefended
from gradleak.errors import InvalidInput
from gradleak.mechanisms.aggregate import summed, without
from gradleak.mechanisms.client import running_statistics
from gradleak.mechanisms.denoising import Draws
from gradleak.types import (
    Batch,
    DataSpec,
    Exchange,
    Fact,
    Knowledge,
    Mechanism,
    Observation,
    Prior,
    ServerBehaviour,
    Update,
    View,
)

BatchNormKnowledge = Literal["exact", "running", "inferred", "none"]


@dataclass(frozen=True, slots=True)
class Truth:
    """What only the auditor holds.

    Attributes:
        batch: the client's private batch; of a sum, those of its honest clients in their order.
        trained_on: what its gradient was computed on: `batch`, or what a protection made of it.
        client: number of the client, or of the sum.
        clients: honest clients in the sum; client i holds the i-th of so many equal parts.
        colluders: updates of the clients in the sum that the server controls.
        bn_statistics: exact batch-normalisation statistics of the batch, by layer.
        order: example indices of every local step, for FedAvg.
        draws: noise and times of a client that trains a diffusion model.
    """

    batch: Batch
    trained_on: Batch
    client: int = 0
    clients: int = 1
    colluders: tuple[Update, ...] = ()
    bn_statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None
    order: tuple[tuple[int, ...], ...] | None = None
    draws: Draws | None = None


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """Server behaviour, view and granted facts.

    Args:
        knows: facts granted. By default the mechanism (Kerckhoffs) and the batch size.
        server: "honest" follows the protocol; "malicious" may alter what it broadcasts.
        view: whether single clients' updates are seen, or only their sum.
        colluding: clients in every sum who tell the server their updates.
        batch_norm: what is known of batch-normalisation layers. "exact": the private batch's
            statistics. "running": the broadcast running estimates serve as a proxy for them.
            "inferred": only the client's mode, statistics follow from the claim itself. "none":
            not even the mode; the attacker assumes evaluation mode.
    """

    knows: frozenset[Fact] = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE})
    server: ServerBehaviour = "honest"
    view: View = "client"
    colluding: int = 0
    batch_norm: BatchNormKnowledge = "inferred"

    def __post_init__(self) -> None:
        facts = frozenset(Fact(fact) for fact in self.knows)
        if self.colluding and self.view != "aggregate":
            raise InvalidInput(f"colluding={self.colluding}: expected view='aggregate'")
        if Fact.BN_STATISTICS in facts:
            if self.batch_norm not in ("exact", "inferred"):
                raise InvalidInput(
                    f"threat model grants bn_statistics but batch_norm={self.batch_norm!r}: "
                    "expected 'exact'"
                )
            object.__setattr__(self, "batch_norm", "exact")
        elif self.batch_norm == "exact":
            facts |= {Fact.BN_STATISTICS}
        object.__setattr__(self, "knows", facts)

    def grant(
        self,
        truth: Truth,
        exchanges: tuple[Exchange, ...],
        mechanism: Mechanism,
        data: DataSpec,
        prior: Prior | None = None,
    ) -> Observation:
        """Turn the truth into knowledge, fact by fact, and nothing else.

        Args:
            truth: the auditor's side; only granted facts are copied out of it.
            exchanges: what crossed the wire, or left the secure sum.
            mechanism: what the client, or every client in the sum, really ran.
            data: public form of the data.
            prior: fitted to public examples.

        Raises:
            InvalidInput: a prior is granted and there is none.
        """
        if Fact.PRIOR in self.knows and prior is None:
            raise InvalidInput("threat model grants a prior: expected Scenario(prior=...)")
        mechanism = summed(mechanism, truth.clients)
        if truth.colluders:
            exchanges = tuple(self._without_colluders(truth, each) for each in exchanges)
        belief = mechanism if Fact.MECHANISM in self.knows else undefended(mechanism)
        if Fact.MINIBATCH_ORDER in self.knows and truth.order is not None:
            belief = rebased(belief, fixed_order=truth.order)
        belief = rebased(belief, **self._granted_draws(truth, belief))
        if self.batch_norm == "none":
            belief = rebased(belief, batch_norm="eval")
        statistics = None
        if self.batch_norm == "exact" and truth.bn_statistics:
            statistics = {k: (m.clone(), v.clone()) for k, (m, v) in truth.bn_statistics.items()}
        elif self.batch_norm == "running":
            statistics = running_statistics(exchanges[-1].state) or None
        return Observation(
            exchanges=exchanges,
            mechanism=belief,
            data=data,
            knowledge=Knowledge(
                batch_size=len(truth.batch) if Fact.BATCH_SIZE in self.knows else None,
                labels=truth.batch.classes.clone() if Fact.LABELS in self.knows else None,
                bn_statistics=statistics,
                prior=prior if Fact.PRIOR in self.knows else None,
            ),
            server=self.server,
        )

    def _granted_draws(self, truth: Truth, belief: Mechanism) -> dict[str, object]:
        """What is known of a diffusion client's draws; a time that was fixed is a draw, too."""
        drawn = truth.draws or Draws()
        times = drawn.times if Fact.TIMESTEPS in self.knows else None
        noise = drawn.noise if Fact.NOISE in self.knows else None
        known = None if times is None and noise is None else Draws(times, noise)
        return {"draws": known} if times is not None else {"draws": known, "timestep": None}

    def _without_colluders(self, truth: Truth, exchange: Exchange) -> Exchange:
        """What the server makes of a sum by the updates that it knows: the honest clients' mean."""
        if len(truth.colluders) != self.colluding:
            raise InvalidInput(
                f"{len(truth.colluders)} updates of colluders: expected {self.colluding}"
            )
        clients = truth.clients + self.colluding
        return replace(exchange, update=without(exchange.update, truth.colluders, clients=clients))
