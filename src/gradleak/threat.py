"""Who attacks and what they know: the only door from the truth to an attacker's knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradleak.defenses import rebased, undefended
from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import running_statistics
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
    View,
)

BatchNormKnowledge = Literal["exact", "running", "inferred", "none"]


@dataclass(frozen=True, slots=True)
class Truth:
    """What only the auditor holds.

    Attributes:
        batch: the client's private batch.
        trained_on: what its gradient was computed on: `batch`, or what a protection made of it.
        client: number of the client.
        bn_statistics: exact batch-normalisation statistics of the batch, by layer.
        order: example indices of every local step, for FedAvg.
    """

    batch: Batch
    trained_on: Batch
    client: int = 0
    bn_statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None
    order: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """Server behaviour, view and granted facts.

    Args:
        knows: facts granted. By default the mechanism (Kerckhoffs) and the batch size.
        server: "honest" follows the protocol; "malicious" may alter what it broadcasts.
        view: whether single clients' updates are seen, or only their sum.
        batch_norm: what is known of batch-normalisation layers. "exact": the private batch's
            statistics. "running": the broadcast running estimates serve as a proxy for them.
            "inferred": only the client's mode, statistics follow from the claim itself. "none":
            not even the mode; the attacker assumes evaluation mode.
    """

    knows: frozenset[Fact] = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE})
    server: ServerBehaviour = "honest"
    view: View = "client"
    batch_norm: BatchNormKnowledge = "inferred"

    def __post_init__(self) -> None:
        facts = frozenset(Fact(fact) for fact in self.knows)
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
            exchanges: what crossed the wire.
            mechanism: what the client really ran.
            data: public form of the data.
            prior: fitted to public examples.

        Raises:
            InvalidInput: a prior is granted and there is none.
        """
        if Fact.PRIOR in self.knows and prior is None:
            raise InvalidInput("threat model grants a prior: expected Scenario(prior=...)")
        belief = mechanism if Fact.MECHANISM in self.knows else undefended(mechanism)
        if Fact.MINIBATCH_ORDER in self.knows and truth.order is not None:
            belief = rebased(belief, fixed_order=truth.order)
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
