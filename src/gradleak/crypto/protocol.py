"""What every aggregation protocol is: steps, a server's side and a client's side.

A round is a sequence of steps. In each, the server writes one message to every party that is still
there, and each answers with one. Who does not answer in time has dropped out. Both sides are state
machines that take and give bytes; nothing is shared between them but those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from gradleak.crypto.encoding import Encoding, FixedPoint, Reals
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.wire import decode, decode_head, pieces
from gradleak.errors import InvalidInput

HELPER = 2**31
"""Numbers from here on are of helping servers, not of clients."""

SERVER = 2**32 - 1
"""The server's number as a sender."""

SESSION = 16
"""Bytes of a session's name."""

Vector = Callable[[], Reals]
"""A client's private vector, asked for once, when it is to be sent: training may happen then."""


@dataclass(frozen=True)
class Terms:
    """What everybody agrees on before a round.

    Args:
        session: 16 random bytes that name this round and no other.
        clients: numbers of all clients that may take part, ascending, each below 2³¹.
        length: of the vectors.
        encoding: reals to integers; protocols on real ciphertexts use its clip only if they say so.
        verifying: public signing keys by client, where the protocol signs.

    Raises:
        InvalidInput: one makes no sense.
    """

    session: bytes
    clients: tuple[int, ...]
    length: int
    encoding: Encoding = field(default_factory=FixedPoint)
    verifying: Mapping[int, bytes] | None = None

    def __post_init__(self) -> None:
        if len(self.session) != SESSION:
            raise InvalidInput(f"session of {len(self.session)} bytes: expected {SESSION}")
        if list(self.clients) != sorted(set(self.clients)) or not self.clients:
            raise InvalidInput(f"clients={self.clients}: expected ascending numbers, at least one")
        if not 0 <= self.clients[0] <= self.clients[-1] < HELPER:
            raise InvalidInput(f"clients={self.clients}: expected numbers from 0 to 2^31 - 1")
        if self.length < 1:
            raise InvalidInput(f"length={self.length}: expected at least 1")


@dataclass(frozen=True)
class Step:
    """One exchange: what is asked and what is answered.

    Args:
        name: as the literature calls it.
        request: type of the server's message.
        reply: type of the answer.
    """

    name: str
    request: type[Any]
    reply: type[Any]


@dataclass(frozen=True, eq=False)
class Total:
    """What the server learns.

    Attributes:
        values: the sum of the vectors, shape `(length,)`.
        clients: whose vectors it is the sum of.
    """

    values: Reals
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Envelope:
    """Before every message: what it belongs to, so that no other is taken for it."""

    protocol: bytes
    session: bytes
    step: int
    sender: int


def _wrap(protocol: str, terms: Terms, step: int, sender: int, message: object) -> bytes:
    envelope = Envelope(protocol.encode(), terms.session, step, sender)
    return b"".join((*pieces(envelope), *pieces(message)))


def _open(raw: bytes, protocol: str, terms: Terms, step: int, sender: int, kind: type[Any]) -> Any:
    found, body = decode_head(Envelope, raw)
    if found.protocol != protocol.encode():
        raise Rejected(Reason.OTHER_PROTOCOL, f"{found.protocol!r}: expected {protocol}")
    if found.session != terms.session:
        raise Rejected(Reason.OTHER_SESSION, f"session {found.session.hex()[:8]}…")
    if found.step != step:
        raise Rejected(Reason.OTHER_STEP, f"step {found.step}: expected {step}")
    if found.sender != sender:
        raise Rejected(Reason.OTHER_SENDER, f"sender {found.sender}: expected {sender}")
    return decode(kind, body)


class Party(ABC):
    """A client, or a helping server: it answers each step's request once.

    Args:
        terms: agreed.
        number: its own.
        vector: its private vector; None for a helping server.

    Attributes:
        signing: its Ed25519 secret, where the protocol signs; whoever holds it sets it.
    """

    id: str
    steps: tuple[Step, ...]
    skipped: ClassVar[frozenset[int]] = frozenset()
    """Steps at which such a party is not asked."""

    def __init__(self, terms: Terms, number: int, vector: Vector | None) -> None:
        self.terms, self.number, self._vector = terms, number, vector
        self.step = self._from(0)
        self.signing: bytes | None = None

    def _from(self, step: int) -> int:
        while step in self.skipped:
            step += 1
        return step

    def answer(self, request: bytes) -> bytes:
        """The answer to the next step's request; a rejected request changes nothing.

        Raises:
            Rejected: it is not the one that this party waits for, or asks what must not be told.
        """
        if self.step >= len(self.steps):
            raise Rejected(Reason.REPEATED, "all steps are answered")
        step = self.steps[self.step]
        message = _open(request, self.id, self.terms, self.step, SERVER, step.request)
        reply = _wrap(self.id, self.terms, self.step, self.number, self.reply(self.step, message))
        self.step = self._from(self.step + 1)
        return reply

    @abstractmethod
    def reply(self, step: int, request: Any) -> object:
        """The answer of a step; keeps nothing unless it returns."""

    @abstractmethod
    def kept(self) -> object:
        """What it must know at later steps: a message of `wire`, secrets included."""

    @abstractmethod
    def keep(self, raw: bytes) -> None:
        """Take up what another process kept, as `encode(kept())`."""

    def vector(self) -> Reals:
        """The private vector.

        Raises:
            InvalidInput: there is none, or of another length.
        """
        found = np.asarray(self._vector(), dtype=np.float64) if self._vector else None
        if found is None or found.shape != (self.terms.length,):
            raise InvalidInput(
                f"vector of shape {None if found is None else found.shape}: expected "
                f"({self.terms.length},)"
            )
        return found


class Server(ABC):
    """The server's side: it asks, accepts answers, closes steps, and has a total at the end.

    Args:
        terms: agreed.

    Attributes:
        step: the number of the one that is open; `len(steps)` when all are closed.
        answered: who answered, by step.
    """

    id: str
    steps: tuple[Step, ...]

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.step = 0
        self.answered: list[list[int]] = [[] for _ in self.steps]
        self._asked: dict[int, bytes] | None = None
        self._total: Total | None = None

    def requests(self) -> Mapping[int, bytes]:
        """The open step's messages by receiver; none when all steps are closed."""
        if self.step == len(self.steps):
            return {}
        if self._asked is None:
            asked = self.ask(self.step)
            one_each = {id(message): message for message in asked.values()}  # many get the same
            raw = {
                key: _wrap(self.id, self.terms, self.step, SERVER, message)
                for key, message in one_each.items()
            }
            self._asked = {number: raw[id(message)] for number, message in asked.items()}
        return self._asked

    def receive(self, sender: int, reply: bytes) -> None:
        """Take one answer to the open step; a rejected one changes nothing.

        Raises:
            Rejected: it is none of those that are waited for.
        """
        if self.step == len(self.steps) or sender not in self.requests():
            raise Rejected(Reason.UNKNOWN_SENDER, f"party {sender} was not asked")
        if sender in self.answered[self.step]:
            raise Rejected(Reason.REPEATED, f"party {sender} has answered")
        kind = self.steps[self.step].reply
        message = _open(reply, self.id, self.terms, self.step, sender, kind)
        self.accept(self.step, sender, message)
        self.answered[self.step].append(sender)

    def close(self) -> None:
        """End the open step: who has not answered has dropped out.

        Raises:
            Aborted: too few have.
        """
        self.requests()
        self.answered[self.step].sort()
        self.closed(self.step, tuple(self.answered[self.step]))
        self.step += 1
        self._asked = None
        if self.step == len(self.steps):
            self._total = self.total_of()

    @property
    def total(self) -> Total:
        """The sum.

        Raises:
            Aborted: there is none yet.
        """
        if self._total is None:
            raise Aborted(f"{self.id}: step {self.step} of {len(self.steps)} is not closed")
        return self._total

    @abstractmethod
    def ask(self, step: int) -> Mapping[int, object]:
        """The step's messages by receiver."""

    @abstractmethod
    def accept(self, step: int, sender: int, reply: Any) -> None:
        """Judge an answer and keep what is needed of it.

        Raises:
            Rejected: it is not acceptable; nothing is kept.
        """

    @abstractmethod
    def closed(self, step: int, answered: tuple[int, ...]) -> None:
        """Return if enough have answered, ascending numbers.

        Raises:
            Aborted: too few, with how many are needed.
        """

    @abstractmethod
    def total_of(self) -> Total:
        """The sum, after the last step."""


def check_minimum(minimum: int, terms: Terms) -> None:
    """Return if a sum can have, and must have, so many clients.

    Raises:
        InvalidInput: fewer than 2, or more than there are.
    """
    if not 2 <= minimum <= len(terms.clients):
        raise InvalidInput(f"minimum={minimum}: expected 2 to {len(terms.clients)}, the clients")


class Aggregation(Protocol):
    """A protocol with its parameters: it makes both sides of a round.

    `id` is its identifier; `helpers` counts its helping servers, numbered from `HELPER`.
    """

    id: ClassVar[str]

    @property
    def helpers(self) -> int:
        """Helping servers besides the one that asks."""
        ...

    def check(self, terms: Terms) -> None:
        """Return if the parameters suit the terms.

        Raises:
            InvalidInput: they do not (overflow, thresholds, sizes).
        """
        ...

    def server(self, terms: Terms) -> Server:
        """The server's side of one round."""
        ...

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> Party:
        """A client's side of one round, or a helping server's."""
        ...
