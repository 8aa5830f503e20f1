"""A recorder that keeps what a curious server sees of an app's training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message
from flwr.serverapp.strategy import Strategy

from gradleak.federate import weights
from gradleak.federate.agreement import letter
from gradleak.federate.client_mod import Train
from gradleak.run.recordings import Entry, keep
from gradleak.types import UpdateKind

S = TypeVar("S", bound=Strategy)


@dataclass(frozen=True)
class Recorder:
    """Keeps broadcasts and replies of training. Where it cannot write, training stops.

        strategy = record("DIR").at_server(strategy)      # the curious server
        app = ClientApp(mods=[record("DIR"), protect(...)])  # for simulations, on one machine

    As a mod it comes first: Flower's first mod is the outermost, and sees what leaves the client.
    Of a secure sum, the server's recorder keeps the mean; a client's keeps nothing.
    """

    directory: Path
    rounds: int | None
    clients: int | None
    kind: UpdateKind

    def __call__(self, message: Message, context: Context, train: Train) -> Message:
        """Pass a message on and keep it with its reply."""
        reply = train(message, context)
        if weights.trains(message) and letter(message.content) is None:
            number = _round(message)
            node = context.node_id
            self._keep([_Seen(number, context.run_id, node, message, reply)])
        return reply

    def at_server(self, strategy: S) -> S:
        """Let `strategy` keep what it sends out and receives; returns the same strategy."""
        configure, aggregate = strategy.configure_train, strategy.aggregate_train
        sent: dict[int, Message] = {}

        def configured(*given: Any, **named: Any) -> list[Message]:
            messages = list(configure(*given, **named))
            sent.clear()
            sent.update({m.metadata.dst_node_id: m for m in messages})
            return messages

        def aggregated(server_round: int, replies: Iterable[Message], **named: Any) -> Any:
            received = list(replies)
            seen = [
                _Seen(server_round, r.metadata.run_id, node, sent[node], r)
                for r in received
                if (node := r.metadata.src_node_id) in sent
            ]
            self._keep(seen)
            return aggregate(server_round, received, **named)

        # On the object itself, for a strategy may have a `start` of its own.
        strategy.configure_train = configured
        strategy.aggregate_train = aggregated
        return strategy

    def _keep(self, seen: list[_Seen]) -> None:
        entries = []
        for one in seen:
            if one.reply.has_error():
                continue
            _, broadcast = weights.read(one.message.content, where="the server's message")
            _, reply = weights.read(one.reply.content, where="the client's reply")
            metrics = {
                k: v
                for record in one.reply.content.metric_records.values()
                for k, v in record.items()
                if isinstance(v, int | float)
            }
            summed = letter(one.reply.content)
            entry = Entry(
                run=str(one.run),
                round=one.round,
                node=str(one.node) if summed is None else "0",
                view="client" if summed is None else "aggregate",
                clients=1 if summed is None else int(summed["clients"]),
                kind=self.kind,
                message_type=one.message.metadata.message_type,
                num_examples=metrics.get("num-examples"),
                metrics=metrics,
            )
            entries.append((entry, broadcast, reply))
        keep(self.directory, entries, rounds=self.rounds, clients=self.clients)


@dataclass(frozen=True)
class _Seen:
    round: int
    run: int
    node: int
    message: Message
    reply: Message


def record(
    directory: str | Path,
    *,
    rounds: int | None = 10,
    clients: int | None = 10,
    kind: UpdateKind = "delta",
) -> Recorder:
    """A recorder of what the server sees, as safetensors and a manifest, for `gradleak audit`.

    Args:
        directory: made if missing; further runs are added to it.
        rounds: most rounds of a run that are kept; None keeps all.
        clients: most replies of a round that are kept; None keeps all.
        kind: "delta" where clients reply weights, "gradient" where they reply gradients.
    """
    return Recorder(Path(directory), rounds, clients, kind)


def _round(message: Message) -> int:
    """The server's round, from where its strategies write it."""
    for config in message.content.config_records.values():
        if isinstance(config.get("server-round"), int):
            return int(config["server-round"])
    group = str(message.metadata.group_id)
    return int(group) if group.isdecimal() else 0
