"""What server and clients agree on before the first round, built once per process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from gradleak import data, defenses, models, registry
from gradleak.data import Dataset
from gradleak.defenses import advanced, undefended
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.federate.records import stored
from gradleak.federate.secure_sum import SecureSum, secure_sum
from gradleak.federate.settings import MECHANISMS, TrainSettings
from gradleak.federate.topology import Edges, Star
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.mechanisms.client import template
from gradleak.run.jobs import derive
from gradleak.run.replies import told
from gradleak.seeding import child
from gradleak.types import Batch, Mechanism, ModelState

FINAL_EXAMPLES = 10_000
"""Most public examples of the final test; none of them is one of a round's."""


@dataclass(frozen=True, eq=False)
class Federation:
    """Data, network and client of one training.

    Attributes:
        settings: what was asked for.
        dataset: all examples.
        parts: indices of every client's examples.
        public: indices of examples that are no client's.
        mechanism: local training with its protections.
        initial: state before the first round.
        secure_sum: under which the server sees a sum only; None where it sees every update.
    """

    settings: TrainSettings
    dataset: Dataset
    parts: tuple[Tensor, ...]
    public: Tensor
    mechanism: Mechanism
    initial: ModelState
    secure_sum: SecureSum | None

    def stream(self, name: str) -> torch.Generator:
        """Draws that derive from the seed."""
        return child(torch.Generator().manual_seed(self.settings.seed), name)

    @property
    def edges(self) -> Edges:
        """Neighbours of every client; empty for a star."""
        settings = self.settings
        if isinstance(settings.graph, Star):
            return ()
        return settings.graph.edges(settings.clients, seed=derive(settings.seed, "graph"))

    @property
    def helpers(self) -> int:
        """Nodes besides the clients."""
        return 0 if self.secure_sum is None else self.secure_sum.agreed.aggregation.helpers

    def batch(self, client: int, server_round: int) -> Batch:
        """The examples that a client draws in a round."""
        part = self.parts[client]
        size = self.settings.batch_size or len(part)
        draw = self.stream(f"client/{client}/round/{server_round}")
        return self.dataset.batch(part[torch.randperm(len(part), generator=draw)[:size]])

    def test(self, state: ModelState, *, final: bool = False) -> tuple[float, float, int]:
        """Accuracy, mean loss in nats and number of examples, on public examples.

        Normalises as the clients do. Those of the final test are others than those of the rounds.
        """
        rounds = self.public[: self.settings.test_examples]
        rest = self.public[len(rounds) :][:FINAL_EXAMPLES]
        chosen = rest if final and len(rest) else rounds
        core = undefended(self.mechanism)
        assert isinstance(core, FedSGD | FedAvg)
        network = template(state.model, core.batch_norm)
        right = total = 0.0
        with torch.no_grad():
            for indices in torch.split(chosen, 500):
                batch = self.dataset.batch(indices)
                logits = functional_call(
                    network, {**state.params, **state.buffers}, (batch.inputs,), strict=False
                )
                right += float((logits.argmax(1) == batch.labels).sum())
                total += float(torch.nn.functional.cross_entropy(logits, batch.labels)) * len(batch)
        return right / len(chosen), total / len(chosen), len(chosen)


@lru_cache(maxsize=2)
def federation(settings: TrainSettings) -> Federation:
    """Read the data, divide them, build network and client, and let a client try one step.

    Halves and initial weights are those of an audit with the same seed.

    Raises:
        InvalidInput: a name or a value makes no sense, there are fewer examples than clients, or a
            protection does not fit the network or the mechanism.
    """
    directory = None if settings.data_dir is None else Path(settings.data_dir)
    dataset = data.load(settings.data, data_dir=directory)
    halves = data.split(dataset, derive(settings.seed, "split"))
    if len(halves.clients) < settings.clients:
        raise InvalidInput(
            f"--clients {settings.clients}: the clients' half of {dataset.name} has "
            f"{len(halves.clients)} examples"
        )
    draw = child(torch.Generator().manual_seed(settings.seed), "partition")
    parts = settings.division(
        dataset.labels[halves.clients], clients=settings.clients, generator=draw
    )
    core = registry.build("mechanism", settings.mechanism, MECHANISMS)
    client = defenses.build(settings.defense)(core)
    initial = ModelState.of(
        models.build(settings.model, dataset.spec, seed=derive(settings.seed, "model"))
    )
    most = max(map(len, parts))
    summed = None
    if settings.aggregation != "none":
        summed = secure_sum(
            settings.aggregation,
            clip=settings.aggregation_clip,
            bits=settings.aggregation_bits,
            most_examples=min(settings.batch_size or most, most),
            least=max(2, settings.min_clients),
            kind=core.kind,
        )
        summed.agreed.check(settings.asked(settings.clients), stored(initial))
    return _tried(
        Federation(
            settings,
            dataset,
            tuple(halves.clients[part] for part in parts),
            halves.public,
            told(client, dataset, halves.public),
            initial,
            summed,
        )
    )


def _tried(made: Federation) -> Federation:
    """Let a client work on very few examples, so that what cannot work is refused at once."""
    core = undefended(made.mechanism)
    size = min(made.settings.batch_size or math.inf, getattr(core, "minibatch_size", None) or 2)
    batch = made.dataset.batch(made.parts[0][: int(size)])
    try:
        with torch.no_grad():
            advanced(made.mechanism, made.initial, batch, {}, generator=made.stream("trial"))
    except NotApplicable as reason:
        raise InvalidInput(f"--defense {made.settings.defense}: {reason}") from None
    return made
