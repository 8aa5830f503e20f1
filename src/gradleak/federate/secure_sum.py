"""Secure aggregation in anybody's Flower app: a client mod, and a grid around the server's."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from gradleak import crypto
from gradleak.crypto import Terms
from gradleak.crypto.distributed_dp import DistributedDP
from gradleak.crypto.encoding import Reals
from gradleak.crypto.protocol import HELPER
from gradleak.crypto.protocol import SESSION as NAME
from gradleak.crypto.wire import encode
from gradleak.errors import GradleakError, InvalidInput
from gradleak.federate import weights
from gradleak.federate.agreement import (
    DIGEST,
    LETTER,
    Agreement,
    digest_of,
    fixed_point,
    letter,
)
from gradleak.federate.client_mod import Train
from gradleak.federate.records import EXAMPLES
from gradleak.federate.sum_grid import SumGrid
from gradleak.types import UpdateKind

STATE = "gradleak.secure_sum"
SESSION, VECTOR, PAST, CONTENT = (f"{STATE}.{n}" for n in ("session", "vector", "past", "content"))
"""Records of `context.state`: the session in play with its secrets, what was trained last, the
sessions so far, and what the server asks to be trained, a record for each of its."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


def secure_sum(
    aggregation: str,
    *,
    clip: float = 8.0,
    bits: int = 24,
    most_examples: int = 1000,
    least: int = 2,
    attempts: int = 3,
    kind: UpdateKind = "delta",
) -> SecureSum:
    """Secure aggregation of an app: its server learns one sum per round, and no client's update.

        agreed = secure_sum("secagg-plus")
        app = ClientApp(mods=[agreed, protect(...)])  # every client
        strategy.start(grid=agreed.at_server(grid), ...)  # the server

    Both sides must be given the same values. Any strategy that takes a weighted mean works as it
    is: it receives one reply, with the mean and the clients' examples together.

    Args:
        aggregation: a protocol, "ID:field=value,...".
        clip: larger changes of a number are cut to it.
        bits: of an encoded number, sign included.
        most_examples: a client with more counts as one with so many.
        least: fewest clients of a session and of a sum.
        attempts: sessions over one broadcast, before a round is given up.
        kind: "delta" where the app replies weights; "gradient" where it replies gradients.

    Raises:
        InvalidInput: unknown notation, values without sense, or noise around a sum.
    """
    made = crypto.build(aggregation)
    if isinstance(made, DistributedDP):
        raise InvalidInput(f"{made.id}: its noise would drown the weights of a mean, it is no sum")
    encoding = fixed_point(clip, bits)
    return SecureSum(Agreement(made, encoding, most_examples, least, attempts, kind))


@dataclass(frozen=True)
class SecureSum:
    """A client's side as a mod, and the server's as a grid.

    The app is asked to train once per broadcast, when the protocol wants its vector. Keys, shares
    and masks lie in `context.state` between messages, for the next may reach another process; they
    are erased with the last step's answer, or when another session begins. What was trained stays
    until then too, so that a session played again needs no second training.

    A client refuses to train in the clear, other terms than its own, a session that it knows, and
    more sessions over one broadcast than `attempts`.
    """

    agreed: Agreement

    def at_server(self, grid: Grid) -> SumGrid:
        """The grid to start a strategy with."""
        return SumGrid(grid, self.agreed)

    def __call__(self, message: Message, context: Context, train: Train) -> Message:
        """Answer a step of the protocol; messages other than training pass."""
        if not weights.trains(message):
            return train(message, context)
        try:
            answer = self._answer(message, context, train)
        except _NotTrained as other:
            return other.reply
        except GradleakError as reason:
            words = f"secure_sum: {reason}"
            _log.error(words)
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, words), reply_to=message)
        return Message(RecordDict({LETTER: ConfigRecord(answer)}), reply_to=message)

    def _answer(self, message: Message, context: Context, train: Train) -> dict[str, Any]:
        """The record of the answer to a step; the state changes only where there is one."""
        told, state = letter(message.content), context.state
        if told is None:
            raise InvalidInput("the server asks for an update in the clear: expected a secure sum")
        if "request" not in told:
            return {"helper": self._helper(context)}
        past = _Past.of(state)
        if "nonce" in told:
            session = self._joined(told, message.content, context)
            content = RecordDict({k: v for k, v in message.content.items() if k != LETTER})
            past.check(session, attempts=self.agreed.attempts)
        else:
            session = _Session.of(state)
            content = RecordDict({k: state[f"{CONTENT}/{k}"] for k in session.content})
        known = state.get(VECTOR) if past.last == session.digest else None
        trained: list[Reals] = []

        def vector() -> Reals:
            if known is None:
                trained.append(self._trained(message, content, context, train))
            else:
                trained.append(known["values"].numpy())
            return trained[0]

        terms = Terms(session.name, tuple(session.clients), session.length, self.agreed.encoding)
        party = self.agreed.aggregation.party(
            terms, session.number, None if session.number >= HELPER else vector
        )
        if session.step:
            party.keep(session.kept)
            party.step = session.step
        reply = party.answer(_entry(told, "request", bytes))
        for name in [k for k in state if k == SESSION or k.startswith(CONTENT)]:
            del state[name]
        if "nonce" in told:
            if known is None:
                state.pop(VECTOR, None)
            past.add(session, state)
        if trained and self.agreed.attempts > 1:
            state[VECTOR] = ArrayRecord({"values": Array(trained[0])})
        if party.step < len(party.steps):
            waiting = {} if trained else content
            for name, record in waiting.items():
                state[f"{CONTENT}/{name}"] = record
            kept = encode(party.kept())
            state[SESSION] = ConfigRecord(
                asdict(replace(session, step=party.step, kept=kept, content=list(waiting)))
            )
        return {"reply": reply}

    def _joined(self, told: ConfigRecord, content: RecordDict, context: Context) -> _Session:
        """The session that a server begins, if its terms are one's own."""
        agreed, helper = self.agreed, self._helper(context)
        if (theirs := _entry(told, "terms", str)) != agreed.text:
            raise InvalidInput(f"the server's terms are {theirs!r}: expected {agreed.text!r}")
        nonce, clients = _entry(told, "nonce", bytes), _entry(told, "clients", list)
        number = _entry(told, "number", int)
        if helper >= 0:
            digest, size = _entry(told, "digest", bytes), _entry(told, "length", int)
        else:
            _, before = weights.read(content, where="the server's message")
            digest, size = digest_of(content), agreed.length(before)
        if len(clients) < agreed.least or number not in (
            [HELPER + helper] if helper >= 0 else clients
        ):
            raise InvalidInput(
                f"session of {len(clients)} clients, party {number}: expected at least "
                f"{agreed.least}, and this one among them"
            )
        terms = agreed.terms(nonce, tuple(clients), length=size, digest=digest)
        agreed.aggregation.check(terms)
        return _Session(terms.session, digest, clients, number, size)

    def _trained(
        self, message: Message, content: RecordDict, context: Context, train: Train
    ) -> Reals:
        """What the app makes of the server's message, as a vector."""
        _, before = weights.read(content, where="the server's message")
        letters, message.content = message.content, content
        try:
            reply = train(message, context)
        finally:
            message.content = letters
        if reply.has_error():
            raise _NotTrained(reply)
        _, after = weights.read(reply.content, where="the client's reply")
        found = [r[EXAMPLES] for r in reply.content.metric_records.values() if EXAMPLES in r]
        if len(found) != 1 or isinstance(found[0], list):
            raise InvalidInput(f"the client's reply holds no one {EXAMPLES}: expected a number")
        return self.agreed.vector(before, after, examples=float(found[0]))

    def _helper(self, context: Context) -> int:
        """Which helping server a node is: the last partitions are; -1 for a client."""
        helpers, config = self.agreed.aggregation.helpers, context.node_config
        if not helpers:
            return -1
        try:
            place = int(config["partition-id"]) - int(config["num-partitions"]) + helpers
        except KeyError as error:
            raise InvalidInput(
                f"the node's configuration lacks {error}: the last {helpers} partitions are the "
                "helping servers"
            ) from None
        return max(-1, place)


@dataclass(frozen=True)
class _Session:
    """A session that a client takes part in, as it lies in the client's state.

    Attributes:
        name: that of its terms.
        digest: of what the server asks to be trained.
        clients: numbers of all.
        number: one's own.
        length: of the vectors.
        step: the next.
        kept: what the protocol keeps, secrets included.
        content: names of the records that are yet to be trained on.
    """

    name: bytes
    digest: bytes
    clients: list[int]
    number: int
    length: int
    step: int = 0
    kept: bytes = b""
    content: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, state: RecordDict) -> _Session:
        if SESSION not in state:
            raise InvalidInput("a step of no session: expected its first step")
        return cls(**state[SESSION])


@dataclass
class _Past:
    """The sessions that a client took part in, in their order, and what each was over."""

    names: bytes = b""
    digests: bytes = b""

    @classmethod
    def of(cls, state: RecordDict) -> _Past:
        return cls(**state[PAST]) if PAST in state else cls()

    @property
    def last(self) -> bytes:
        return self.digests[-DIGEST:]

    def check(self, session: _Session, *, attempts: int) -> None:
        """Return if the session is new, and not one too many over the same broadcast."""
        if session.name in _pieces(self.names, NAME):
            raise InvalidInput("took part in this session: expected a fresh one")
        if _pieces(self.digests, DIGEST).count(session.digest) >= attempts:
            raise InvalidInput(f"sums of the same update: expected at most {attempts} sessions")

    def add(self, session: _Session, state: RecordDict) -> None:
        names, digests = self.names + session.name, self.digests + session.digest
        state[PAST] = ConfigRecord({"names": names, "digests": digests})


def _entry(told: ConfigRecord, name: str, kind: type[T]) -> T:
    """What a server's letter says, if it is of its type."""
    found = told.get(name)
    if not isinstance(found, kind):
        raise InvalidInput(f"{name} is {found!r}: expected {kind.__name__}")
    return found


def _pieces(whole: bytes, size: int) -> list[bytes]:
    return [whole[i : i + size] for i in range(0, len(whole), size)]


class _NotTrained(Exception):
    """The app answers with an error of its own."""

    def __init__(self, reply: Message) -> None:
        super().__init__()
        self.reply = reply
