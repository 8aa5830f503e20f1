"""The server's side of a secure sum: a grid that plays the protocol beneath any strategy."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from gradleak.crypto import Aborted, Rejected, Total
from gradleak.crypto.protocol import HELPER, SESSION
from gradleak.errors import InvalidInput
from gradleak.federate import weights
from gradleak.federate.agreement import LETTER, Agreement, digest_of
from gradleak.federate.records import EXAMPLES, METRICS, arrays_of, content_of, size

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that a node has to say whether it is a helping server."""

_log = logging.getLogger(__name__)


@dataclass
class Exchange:
    """One step of a session.

    Attributes:
        attempt: which session, from 1.
        name: of the step.
        dropped: who was silent, failed or refused, by node, and why.
        rejected: whose answer the server did not accept, by node, and why.
        bytes_down: of the records sent.
        bytes_up: of the records received.
    """

    attempt: int
    name: str
    dropped: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass
class Played:
    """What became of a round.

    Attributes:
        attempts: sessions that were played.
        steps: of all of them.
        summed: nodes whose vectors are in the sum.
        seconds: CPU of the server in the protocol.
        reason: why there is no sum.
    """

    attempts: int = 0
    steps: list[Exchange] = field(default_factory=list)
    summed: tuple[int, ...] = ()
    seconds: float = 0.0
    reason: str | None = None

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the CPU that is used here."""
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - began


class SumGrid(Grid):  # type: ignore[misc]
    """Plays a session over the messages that ask for training, and answers with the mean alone.

    One step is one exchange of messages, each of which waits as long as the strategy says. A
    session with too few left is played again, with a fresh name and all clients, up to the
    agreed attempts; then nobody answers, and an ordinary strategy goes on to its next round.

    Attributes:
        played: the last round's account.
    """

    def __init__(self, grid: Grid, agreed: Agreement) -> None:
        self._grid, self._agreed = grid, agreed
        self._helpers: dict[int, int] = {}
        self.played = Played()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer messages that ask for training with one; pass others on."""
        sent = list(messages)
        asked = [m for m in sent if weights.trains(m)]
        if not asked:
            answers: Iterable[Message] = self._grid.send_and_receive(sent, timeout=timeout)
            return answers
        if len(asked) < len(sent) or len({digest_of(m.content) for m in asked}) > 1:
            raise InvalidInput("a secure sum needs one content for all clients that train")
        name, before = weights.read(asked[0].content, where="the strategy's message")
        self.played = played = Played()
        for played.attempts in range(1, self._agreed.attempts + 1):
            try:
                total, nodes = self._session(asked, before, timeout)
                with played.timed():
                    mean, examples = self._agreed.mean(total, before)
            except (Aborted, InvalidInput) as reason:
                played.reason = str(reason)
                _log.warning("secure_sum: attempt %d: %s", played.attempts, reason)
                continue
            played.reason, played.summed = None, tuple(nodes[n] for n in total.clients)
            records = {
                name: arrays_of(mean),
                METRICS: MetricRecord({EXAMPLES: examples}),
                LETTER: ConfigRecord({"clients": len(total.clients)}),
            }
            return [Message(RecordDict(records), reply_to=asked[0])]
        return []

    def get_node_ids(self) -> Iterable[int]:
        """The clients; helping servers are found by asking every node once."""
        nodes = list(self._grid.get_node_ids())
        if not self._agreed.aggregation.helpers:
            return nodes
        content = RecordDict({LETTER: ConfigRecord()})
        unknown = [Message(content, n, MessageType.TRAIN) for n in nodes if n not in self._helpers]
        for answer in self._grid.send_and_receive(unknown, timeout=PATIENCE) if unknown else ():
            with contextlib.suppress(InvalidInput):
                told = _told(content_of(answer), "helper", int)
                self._helpers[answer.metadata.src_node_id] = told
        return [n for n in nodes if self._helpers.get(n) == -1]

    def set_run(self, run: Run) -> None:
        """Set the run of the messages to come."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the messages."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message from the server."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages that do not ask for training."""
        sent = list(messages)
        if any(weights.trains(m) for m in sent):
            raise InvalidInput("a secure sum takes several exchanges: expected send_and_receive")
        identifiers: Iterable[str] = self._grid.push_messages(sent)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there."""
        answers: Iterable[Message] = self._grid.pull_messages(message_ids)
        return answers

    def _session(
        self, asked: list[Message], before: weights.Weights, timeout: float | None
    ) -> tuple[Total, Mapping[int, int]]:
        """One session's sum, and nodes by number."""
        agreed, played, broadcast = self._agreed, self.played, asked[0].content
        nodes = dict(enumerate(sorted(m.metadata.dst_node_id for m in asked)))
        clients, nonce = tuple(nodes), secrets.token_bytes(SESSION)
        digest, entries = digest_of(broadcast), agreed.length(before)
        terms = agreed.terms(nonce, clients, length=entries, digest=digest)
        agreed.aggregation.check(terms)
        first = {
            "nonce": nonce,
            "terms": agreed.text,
            "clients": list(clients),
            "digest": digest,
            "length": entries,
        }
        nodes |= {HELPER + k: node for node, k in self._helpers.items() if k >= 0}
        here, new = set(nodes), set(nodes)
        with played.timed():
            server = agreed.aggregation.server(terms)
            requests = server.requests()
        while requests:
            letters = {}
            for number in sorted(here & requests.keys()):
                told: dict[str, Any] = {"request": requests[number]}
                records: dict[str, Any] = {}
                if number in new:
                    told |= first | {"number": number}
                    records = {} if number >= HELPER else dict(broadcast.items())
                letters[number] = RecordDict(records | {LETTER: ConfigRecord(told)})
            new -= letters.keys()
            meta = asked[0].metadata
            messages = [
                Message(c, nodes[n], meta.message_type, ttl=meta.ttl, group_id=meta.group_id)
                for n, c in letters.items()
            ]
            answers = {
                a.metadata.src_node_id: a
                for a in self._grid.send_and_receive(messages, timeout=timeout)
            }
            step = Exchange(played.attempts, server.steps[server.step].name)
            played.steps.append(step)
            step.bytes_down = sum(size(c) for c in letters.values())
            for number in letters:
                node = nodes[number]
                try:
                    content = content_of(answers.get(node))
                    step.bytes_up += size(content)
                    reply = _told(content, "reply", bytes)
                    with played.timed():
                        server.receive(number, reply)
                except (InvalidInput, Rejected) as reason:
                    lost = step.rejected if isinstance(reason, Rejected) else step.dropped
                    lost[node] = str(reason)
                    here.discard(number)
            with played.timed():
                server.close()
                requests = server.requests()
        if len(server.total.clients) < agreed.least:
            raise Aborted(
                f"{len(server.total.clients)} clients are left: expected at least {agreed.least}"
            )
        return server.total, nodes


def _told(content: RecordDict, entry: str, kind: type[T]) -> T:
    """What a party's answer holds.

    Raises:
        InvalidInput: it is none of the protocol's.
    """
    found = content.config_records.get(LETTER, {}).get(entry)
    if not isinstance(found, kind):
        raise InvalidInput("an answer that is no step of the protocol")
    return found
