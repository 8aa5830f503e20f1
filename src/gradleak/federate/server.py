"""The server as a Flower strategy: rounds, what failed in them, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from gradleak.defenses import compensated
from gradleak.errors import GradleakError, InvalidInput
from gradleak.federate.client import RATE, ROUND
from gradleak.federate.federation import Federation
from gradleak.federate.recording import record
from gradleak.federate.records import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    METRICS,
    SECONDS,
    arrays_of,
    checked,
    content_of,
    moved,
    size,
    state_of,
    stored,
    tensors_of,
)
from gradleak.types import ModelState, Update

PATIENCE = 60.0
"""Seconds that the first round waits for all clients to be there, and any round for enough."""


Good = Mapping[int, tuple[Mapping[str, Tensor], float]]
"""Replies of use and their numbers of examples, by client."""


class Stopped(GradleakError):
    """A training that cannot go on."""


class Rounds(FedAvg):  # type: ignore[misc]
    """Asks some clients for updates, drops those of no use, and applies the mean of the rest.

        θ ← θ − η_r C(Σ_i n_i u_i / Σ_i n_i),   or  θ ← θ + C(...) for changes of parameters

    with C the protections' part at the server.

    Args:
        made: data, network and client.
        done: rounds of earlier runs.
    """

    message_type = "train"

    def __init__(self, made: Federation, *, done: int = 0) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.made, self.done = made, done
        self.entry: dict[str, Any] = {}
        self._numbers: dict[int, int] = {}
        self._asked: dict[int, Message] = {}
        self._began = 0.0

    def summary(self) -> None:
        """Say nothing: progress is shown by whoever started the training."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose clients and write to them."""
        self._began = time.perf_counter()
        settings, number = self.made.settings, self.done + server_round
        nodes = self._present(grid, number)
        count = settings.asked(len(nodes))
        draw = self.made.stream(f"server/round/{number}")
        chosen = [nodes[i] for i in torch.randperm(len(nodes), generator=draw)[:count].sort()[0]]
        rate = settings.learning_rate * settings.rate(number, settings.rounds)
        self.entry = {
            "round": number,
            "clients": len(chosen),
            "failed": [],
            "learning_rate": rate if self.made.mechanism.kind == "gradient" else 1.0,
        }
        self._asked = {}
        common = ConfigRecord({**config, ROUND: number, RATE: rate})
        for node in chosen:
            content = self.letter(self._numbers[node], arrays, common)
            self._asked[node] = Message(content, node, self.message_type)
        self.entry["bytes_down"] = sum(size(m.content) for m in self._asked.values())
        return list(self._asked.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies, and make the next state of those of use.

        Raises:
            Stopped: too few are of use, or the state is no longer finite.
        """
        began = time.process_time()
        good = self.judged({r.metadata.src_node_id: r for r in replies})
        following = self.combine(good, next(iter(self._asked.values())).content)
        if not all(bool(v.isfinite().all()) for v in following.params.values()):
            raise Stopped(
                f"round {self.entry['round']}: the state is no longer finite: expected a smaller "
                "--learning-rate"
            )
        arrays = arrays_of(stored(following))
        self.entry |= {
            "seconds": time.perf_counter() - self._began,
            "server_seconds": time.process_time() - began,
        }
        return arrays, None

    def judged(self, received: Mapping[int, Message]) -> Good:
        """The replies of use, from all by node; what they cost goes on record.

        Raises:
            Stopped: too few are of use.
        """
        good: dict[int, tuple[Mapping[str, Tensor], float]] = {}
        seconds, up = [], 0
        for node in self._asked:
            number = self._numbers[node]
            try:
                content = content_of(received.get(node))
                like = self.made.initial.params if self.raw else stored(self.made.initial)
                values = checked(tensors_of(content[ARRAYS]), like, what="reply")
                examples = float(content[METRICS][EXAMPLES])
                if not 0 < examples < float("inf"):
                    raise InvalidInput(f"{EXAMPLES}={examples}: expected a positive number")
            except (GradleakError, KeyError, TypeError, ValueError) as error:
                lack = "reply without " if isinstance(error, KeyError) else ""
                reason = f"{lack}{' '.join(str(error).split())}"[:300]
                self.entry["failed"].append({"client": number, "reason": reason})
                continue
            good[number] = values, examples
            seconds.append(float(content[METRICS].get(SECONDS, float("nan"))))
            up += size(content)
        number, least = self.entry["round"], self.made.settings.min_clients
        if len(good) < least:
            first = self.entry["failed"][0]
            raise Stopped(
                f"round {number}: {len(good)} of {self.entry['clients']} clients sent an update of "
                f"use, expected at least {least}; client {first['client']}: {first['reason']}"
            )
        self.entry |= {"client_seconds": sum(seconds) / len(seconds), "bytes_up": up}
        return good

    @property
    def raw(self) -> bool:
        """Whether clients reply gradients, not states."""
        return self.made.mechanism.kind == "gradient"

    def letter(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """What a client is sent."""
        return RecordDict({ARRAYS: arrays, CONFIG: config})

    def combine(self, good: Good, sent: RecordDict) -> ModelState:
        """The next state, from replies and numbers of examples by client, to what was sent."""
        state = state_of(tensors_of(sent[ARRAYS]), self.made.initial)
        total = sum(examples for _, examples in good.values())
        mean = {k: torch.zeros_like(v) for k, v in state.params.items()}
        for values, examples in good.values():
            for k, v in mean.items():
                v.add_(
                    values[k] if self.raw else values[k] - state.params[k], alpha=examples / total
                )
        update = Update(mean, self.made.mechanism.kind)
        clients = self.entry["clients"] - len(self.entry["failed"])
        update = compensated(self.made.mechanism, update, clients=clients)
        return moved(state, update, rate=self.entry["learning_rate"])

    def tensors(self) -> dict[str, Tensor]:
        """What the next round needs besides the state."""
        return {}

    def kept_in(self, directory: Path) -> None:
        """Keep broadcasts and replies there, as a curious server does."""
        record(directory, kind=self.made.mechanism.kind).at_server(self)

    def _present(self, grid: Grid, number: int) -> list[int]:
        """The nodes that are there, sorted; each has a number from its first round on.

        Raises:
            Stopped: there are too few.
        """
        settings, end = self.made.settings, time.monotonic() + PATIENCE
        wanted = settings.min_clients if self._numbers else settings.clients
        while len(nodes := sorted(grid.get_node_ids())) < wanted and time.monotonic() < end:
            time.sleep(0.1)
        if len(nodes) < settings.min_clients:
            raise Stopped(
                f"round {number}: {len(nodes)} clients are there, expected at least "
                f"{settings.min_clients}"
            )
        for node in nodes:
            self._numbers.setdefault(node, len(self._numbers))
        return nodes
