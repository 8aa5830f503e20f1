"""What a federated training is asked to do: every option of `gradleak train`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradleak import models, registry
from gradleak.errors import InvalidInput, nearest
from gradleak.federate.partition import PARTITIONS, Partition
from gradleak.federate.schedule import SCHEDULES, Schedule
from gradleak.federate.topology import TOPOLOGIES, Gossip, Star
from gradleak.mechanisms import Denoising, DenoisingAvg, FedAvg, FedSGD
from gradleak.mechanisms.client import check_positive
from gradleak.mechanisms.denoising import Diffusing
from gradleak.run.settings import option

MECHANISMS: Mapping[str, type[FedSGD] | type[FedAvg]] = {
    m.id: m for m in (FedSGD, FedAvg, Denoising, DenoisingAvg)
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One federated training; server and clients are built from it alone.

    Attributes:
        data: name of a data set, or a path.
        data_dir: where downloaded data sets lie; None takes $GRADLEAK_DATA or the user cache.
        model: name of a network, or `module:factory`.
        weights: safetensors file that training begins with; None begins with drawn ones.
        mechanism: what a client does in a round, `ID:field=value,...`.
        defense: protections of every client, `ID:field=value,...` joined by "+".
        clients: among whom the clients' half of the data is divided.
        rounds: of training.
        batch_size: examples that a client draws in a round; 0 takes all it has.
        aggregation: protocol under which the server sees a sum only, `ID:field=value,...`.
        aggregation_clip: larger numbers of an update are cut to it there.
        aggregation_bits: of an encoded number there, sign included.
        fraction: share of the clients asked in a round.
        min_clients: usable updates without which a round stops the training.
        partition: how the data are divided, `iid` or `dirichlet:ALPHA`.
        learning_rate: the server's, on gradients; changes of parameters are added as they are.
        schedule: of the learning rate, `constant`, `step:every=,factor=` or `cosine:floor=`.
        topology: `star`, or `gossip:graph=ring|regular|complete,degree=,attacker=`.
        test_examples: public examples that every round is tested on.
        samples: images drawn from a denoiser in the end, to compare with public ones; 0 for none.
        timeout: seconds that a round waits for its clients.
        seed: division, initial weights and the choice of clients and examples derive from it.
        draws: seed of protections' draws, for tests; None leaves them to the operating system.
    """

    data: str = "mnist-5k"
    data_dir: str | None = None
    model: str = "lenet"
    weights: str | None = None
    mechanism: str = "fedsgd"
    defense: str = "none"
    aggregation: str = "none"
    aggregation_clip: float = 8.0
    aggregation_bits: int = 24
    clients: int = 10
    rounds: int = 100
    batch_size: int = 32
    fraction: float = 1.0
    min_clients: int = 1
    partition: str = "iid"
    learning_rate: float = 0.1
    schedule: str = "constant"
    topology: str = "star"
    test_examples: int = 1000
    samples: int = 256
    timeout: float = 3600.0
    seed: int = 0
    draws: int | None = None

    def __post_init__(self) -> None:
        check_positive(
            clients=self.clients,
            rounds=self.rounds,
            min_clients=self.min_clients,
            learning_rate=self.learning_rate,
            test_examples=self.test_examples,
            timeout=self.timeout,
        )
        if self.batch_size < 0:
            raise InvalidInput(f"--batch-size {self.batch_size}: expected a whole number, or 0")
        if not 0 < self.fraction <= 1:
            raise InvalidInput(f"--fraction {self.fraction}: expected a share in (0, 1]")
        if self.min_clients > self.clients:
            raise InvalidInput(
                f"--min-clients {self.min_clients} contradicts --clients {self.clients}"
            )
        if not 0 <= self.seed < 2**63:
            raise InvalidInput(f"--seed {self.seed}: expected a whole number from 0 to 2^63 − 1")
        if self.aggregation != "none" and not isinstance(self.graph, Star):
            raise InvalidInput(
                f"--aggregation {self.aggregation} contradicts --topology {self.topology}: "
                "neighbours see states, expected star"
            )
        if self.samples < 0 or self.samples == 1:
            raise InvalidInput(f"--samples {self.samples}: expected at least 2 images, or 0")
        _ = self.client, self.division, self.rate, self.graph

    @property
    def client(self) -> FedSGD | FedAvg:
        """The mechanism that is named.

        Raises:
            InvalidInput: unknown notation, or one that trains another kind of network than `model`.
        """
        core = registry.build("mechanism", self.mechanism, MECHANISMS)
        if isinstance(core, Diffusing) and (core.carried or core.freed):
            raise InvalidInput(
                f"--mechanism {self.mechanism}: carried and freed are no settings of a client's"
            )
        models.check_task(self.model, core)
        return core

    @property
    def division(self) -> Partition:
        """The partition that is named."""
        name, colon, rest = self.partition.partition(":")
        short = bool(colon) and "=" not in rest
        spec = f"{name}:alpha={rest}" if short else self.partition
        return registry.build("partition", spec, PARTITIONS)

    @property
    def rate(self) -> Schedule:
        """The schedule that is named."""
        return registry.build("schedule", self.schedule, SCHEDULES)

    def asked(self, present: int) -> int:
        """How many of the clients that are there a round asks."""
        return max(self.min_clients, round(self.fraction * present), 1)

    @property
    def graph(self) -> Star | Gossip:
        """The topology that is named."""
        found = registry.build("topology", self.topology, TOPOLOGIES)
        found.check(self.clients)
        return found

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TrainSettings:
        """Build from option names (hyphens or underscores), checking every value's type.

        Raises:
            InvalidInput: an unknown name (the nearest is told), or a value of another type.
        """
        hints = typing.get_type_hints(cls)
        values = {}
        for name, value in given.items():
            known = name.replace("-", "_")
            if known not in hints:
                words = [option(n).removeprefix("--") for n in hints]
                raise InvalidInput(f"unknown setting {name!r}: {nearest(name, words)}")
            values[known] = registry.convert(str(value), hints[known], where=option(known))
        return cls(**values)

    def as_config(self) -> dict[str, bool | float | int | str]:
        """The settings as a Flower run configuration, from which `of` builds them again."""
        values = dataclasses.asdict(self)
        return {k.replace("_", "-"): v for k, v in values.items() if v is not None}
