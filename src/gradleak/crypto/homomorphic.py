"""Rounds under a homomorphic key that the clients hold and the server does not.

    advertise   every client sends a public key for letters
    make        the first `spares` clients each draw a key and seal it to every client, itself
                included; the first key that arrives is the round's
    upload      every client opens its letter and sends Enc(x); the server adds: S ← S ⊕ Enc(x)
    open        the first `spares` clients of the sum decrypt it

A vector is cut into pieces, one to a ciphertext. Before each piece stand `TAGS` numbers that
client and piece draw from a secret of the key's holders, who know what they add up to: a sum with
a changed, missing or foreign ciphertext is refused when it is opened. Where the terms name
verifying keys, keys for letters are signed: the server cannot put its own in their place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from gradleak.crypto import keys
from gradleak.crypto.encoding import Integers, fits
from gradleak.crypto.protocol import Party, Server, Step, Terms, Total, Vector, check_minimum
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.sheet import Sheet
from gradleak.crypto.wire import Words, decode
from gradleak.errors import InvalidInput

TAGS = 3
"""Check numbers to a ciphertext, each of log₂(2·bound + 1) bits, rounded down."""


class Cipher(Protocol):
    """The secret key at work on pieces."""

    def encrypt(self, values: Integers) -> bytes:
        """Of at most as many integers as there are slots."""
        ...

    def decrypt(self, ciphertext: bytes, entries: int, clients: int) -> Integers:
        """The sum of some clients' integers.

        Raises:
            Rejected: BAD_CIPHERTEXT: it is no such sum.
        """
        ...


class Adder(Protocol):
    """What can be done without the secret key."""

    def take(self, ciphertext: bytes) -> Any:
        """A ciphertext in its own type.

        Raises:
            Rejected: BAD_CIPHERTEXT: it is none under this key.
        """
        ...

    def add(self, one: Any, other: Any) -> Any:
        """Their sum; may change `one`."""
        ...

    def give(self, ciphertext: Any) -> bytes:
        """As bytes."""
        ...


@dataclass(frozen=True)
class Homomorphic(ABC):
    """An additive cipher as an aggregation.

    Args:
        spares: clients that make a key, and clients that open the sum: all but one may drop out.
        minimum: fewest clients in a sum, ≥ 2; clients open no other.
    """

    spares: int = 3
    minimum: int = 2

    id: ClassVar[str]
    helpers: ClassVar[int] = 0

    @abstractmethod
    def make(self, terms: Terms) -> tuple[bytes, bytes]:
        """A fresh key: secret and public part."""

    @abstractmethod
    def cipher(self, terms: Terms, secret: bytes) -> Cipher:
        """For a client.

        Raises:
            Rejected: INVALID_KEY.
        """

    @abstractmethod
    def adder(self, terms: Terms, public: bytes) -> Adder:
        """For the server.

        Raises:
            Rejected: INVALID_KEY.
        """

    @abstractmethod
    def slots(self, terms: Terms) -> int:
        """Integers in a ciphertext, tags included."""

    def server(self, terms: Terms) -> Server:
        """Adds."""
        return HomomorphicServer(terms, self)

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> Party:
        """A client; where the terms name verifying keys, set its `signing`."""
        return HomomorphicParty(terms, number, vector, self)

    def check(self, terms: Terms) -> None:
        """Return if sums fit and ciphertexts have room.

        Raises:
            InvalidInput: they do not.
        """
        fits(terms.encoding, clients=len(terms.clients), modulus=2**63)
        if self.spares < 1:
            raise InvalidInput(f"spares={self.spares}: expected at least 1")
        check_minimum(self.minimum, terms)
        if terms.verifying is not None and not set(terms.verifying) >= set(terms.clients):
            raise InvalidInput("verifying keys of some clients only: expected all or none")
        if self.slots(terms) <= TAGS:
            raise InvalidInput(f"{self.slots(terms)} slots in a ciphertext: expected over {TAGS}")

    def room(self, terms: Terms) -> int:
        """Entries of a vector in a ciphertext."""
        return self.slots(terms) - TAGS

    def pieces(self, terms: Terms) -> int:
        """Ciphertexts of a vector."""
        return -(-terms.length // self.room(terms))


def promises(*, title: str, paper: str, link: str, cost: str) -> Sheet:
    """The data sheet of a cipher: what it promises, every one does."""
    return Sheet(
        title=title,
        paper=paper,
        link=link,
        trusts=(
            "No client hands the key to the server: one that does opens every upload. The server "
            "has one sum opened, of all who uploaded, and where nobody signs passes on public "
            "keys unchanged."
        ),
        survives=(
            "Any clients before their upload; all but one of `spares` at making the key and at "
            "opening the sum; at least `minimum` uploads."
        ),
        leaks="To the server nothing but the sum; the clients that open it learn it too.",
        cost=cost,
    )


class Holder:
    """A client with the round's key, piece by piece: no more than one ciphertext in memory.

    Args:
        letter: 32 bytes from which tags are drawn, then the secret key.

    Raises:
        Rejected: INVALID_KEY.
    """

    def __init__(self, scheme: Homomorphic, terms: Terms, letter: bytes) -> None:
        self._cipher = scheme.cipher(terms, letter[keys.SEED :])
        self._terms, self._room, self._count = terms, scheme.room(terms), scheme.pieces(terms)
        self._seeds = keys.stream(letter[: keys.SEED], keys.SEED * len(terms.clients))

    def _tags(self, client: int) -> Integers:
        """From −bound to bound at most, (pieces, TAGS)."""
        at = self._terms.clients.index(client) * keys.SEED
        words = keys.words64(bytes(self._seeds[at : at + keys.SEED]), self._count * TAGS)
        bound = self._terms.encoding.bound
        mask = 2 ** ((2 * bound + 1).bit_length() - 1) - 1
        return ((words & np.uint64(mask)).astype(np.int64) - bound).reshape(-1, TAGS)

    def encrypt_chunks(self, client: int, pieces: Iterable[Integers]) -> Iterator[bytes]:
        """Ciphertexts of a vector's pieces, `room` entries each."""
        for tags, piece in zip(self._tags(client), pieces, strict=True):
            yield self._cipher.encrypt(np.concatenate([tags, piece]))

    def decrypt_chunks(self, clients: tuple[int, ...], sums: Iterable[bytes]) -> Iterator[Integers]:
        """Pieces of the sum over these clients.

        Raises:
            Rejected: BAD_CIPHERTEXT, or INCONSISTENT_SURVIVORS: it is not the sum over them.
        """
        tags = sum((self._tags(c) for c in clients), np.zeros((self._count, TAGS), np.int64))
        left = self._terms.length
        for expected, ciphertext in zip(tags, sums, strict=True):
            entries = min(left, self._room)
            found = self._cipher.decrypt(ciphertext, TAGS + entries, len(clients))
            if not np.array_equal(found[:TAGS], expected):
                raise Rejected(
                    Reason.INCONSISTENT_SURVIVORS, f"tags of another sum than over {clients}"
                )
            left -= entries
            yield found[TAGS:]


class Running:
    """A sum of ciphertexts to which uploads are added as they come: the server's memory."""

    def __init__(self, adder: Adder) -> None:
        self._adder, self._sums = adder, list[Any]()

    def add_chunks(self, chunks: Iterable[bytes]) -> None:
        """Add an upload, ciphertext by ciphertext.

        Raises:
            Rejected: BAD_CIPHERTEXT; those before it are added.
        """
        self.add(map(self._adder.take, chunks))

    def add(self, taken: Iterable[Any]) -> None:
        """Add an upload's ciphertexts, in their own type."""
        first = not self._sums
        for k, one in enumerate(taken):
            if first:
                self._sums.append(one)
            else:
                self._sums[k] = self._adder.add(self._sums[k], one)

    def chunks(self) -> Iterator[bytes]:
        """The sum, ciphertext by ciphertext."""
        return map(self._adder.give, self._sums)


@dataclass(frozen=True)
class Advertise:
    """Send a key for letters."""


@dataclass(frozen=True)
class Advertised:
    """X25519; the signature is empty where nobody signs."""

    key: bytes
    signature: bytes


@dataclass(frozen=True)
class Make:
    """Make a key for these clients; for nobody: nothing is asked for."""

    keys: dict[int, bytes]
    signatures: dict[int, bytes]


@dataclass(frozen=True)
class Made:
    """The key's public part, and its secret one in a letter to each client."""

    public: bytes
    letters: dict[int, bytes]


@dataclass(frozen=True)
class Deliver:
    """Whose key it is, their key for letters, its signature, and the letter."""

    maker: int
    key: bytes
    signature: bytes
    letter: bytes


@dataclass(frozen=True)
class Upload:
    """Ciphertexts, by piece."""

    ciphertexts: dict[int, bytes]


@dataclass(frozen=True)
class Open:
    """A sum over clients, by piece."""

    clients: tuple[int, ...]
    sums: dict[int, bytes]


@dataclass(frozen=True)
class Opened:
    """The sum's integers, modulo 2⁶⁴."""

    values: Words


@dataclass(frozen=True)
class Kept:
    """Secret key for letters, and the letter's contents."""

    secret: bytes
    letter: bytes


STEPS = (
    Step("advertise", Advertise, Advertised),
    Step("make", Make, Made),
    Step("upload", Deliver, Upload),
    Step("open", Open, Opened),
)


def _complete(found: Mapping[int, bytes], count: int) -> None:
    if list(found) != list(range(count)):
        raise Rejected(Reason.WRONG_LENGTH, f"{len(found)} pieces: expected 0 to {count - 1}")


def _statement(protocol: str, terms: Terms, client: int, key: bytes) -> bytes:
    return f"{protocol} letters {client} ".encode() + terms.session + key


def _judge(protocol: str, terms: Terms, client: int, key: bytes, signature: bytes) -> None:
    """Return if it is a client's key for letters, as far as the terms let anybody tell."""
    if len(key) != keys.SEED:
        raise Rejected(Reason.INVALID_KEY, f"public key of {len(key)} bytes")
    if terms.verifying is not None:
        statement = _statement(protocol, terms, client, key)
        keys.verify(terms.verifying[client], signature, statement)


def _distinct(found: Mapping[int, bytes]) -> None:
    if len(set(found.values())) < len(found):
        raise Rejected(Reason.REUSED_KEY, "two clients with one public key")


class HomomorphicServer(Server):
    """Adds ciphertexts; holds no secret."""

    steps = STEPS

    def __init__(self, terms: Terms, scheme: Homomorphic) -> None:
        super().__init__(terms)
        self.id, self._scheme = scheme.id, scheme
        self._keys: dict[int, bytes] = {}
        self._signatures: dict[int, bytes] = {}
        self._made: dict[int, tuple[Made, Adder]] = {}
        self._opened: dict[int, Integers] = {}

    def ask(self, step: int) -> Mapping[int, object]:
        spares = self._scheme.spares
        if step == 0:
            return {c: Advertise() for c in self.terms.clients}
        if step == 1:
            asked, idle = Make(self._keys, self._signatures), Make({}, {})
            return {c: asked if k < spares else idle for k, c in enumerate(self._keys)}
        if step == 2:
            maker, letters = self._maker, self._made[self._maker][0].letters
            key, signature = self._keys[maker], self._signatures[maker]
            return {c: Deliver(maker, key, signature, letters[c]) for c in self.answered[1]}
        clients = tuple(self.answered[2])
        message = Open(clients, dict(enumerate(self._running.chunks())))
        return dict.fromkeys(clients[:spares], message)

    def accept(self, step: int, sender: int, reply: Any) -> None:
        if step == 0:
            _judge(self.id, self.terms, sender, reply.key, reply.signature)
            _distinct({**self._keys, sender: reply.key})
            self._keys[sender], self._signatures[sender] = reply.key, reply.signature
        elif step == 1:
            asked = list(self._keys).index(sender) < self._scheme.spares
            if list(reply.letters) != (list(self._keys) if asked else []):
                raise Rejected(Reason.WRONG_PEERS, f"letters to {list(reply.letters)}")
            if asked:
                self._made[sender] = reply, self._scheme.adder(self.terms, reply.public)
        elif step == 2:
            _complete(reply.ciphertexts, self._scheme.pieces(self.terms))
            self._running.add([self._adder.take(c) for c in reply.ciphertexts.values()])
        else:
            self._opened[sender] = self._judged(reply.values)

    def _judged(self, values: Words) -> Integers:
        if len(values) != self.terms.length or values.dtype != np.uint64:
            raise Rejected(Reason.WRONG_LENGTH, f"{len(values)} words of {values.dtype}")
        whole = values.view(np.int64)
        most = len(self.answered[2]) * self.terms.encoding.bound
        if whole.min() < -most or whole.max() > most:
            raise Rejected(Reason.OUT_OF_RANGE, f"a sum with entries over {most}")
        return whole

    def closed(self, step: int, answered: tuple[int, ...]) -> None:
        if len(answered) < self._scheme.minimum and step < 3:
            raise Aborted(f"{len(answered)} clients left: expected at least {self._scheme.minimum}")
        if step == 0:
            self._keys = dict(sorted(self._keys.items()))
        elif step == 1:
            if not self._made:
                raise Aborted(f"no key: all {self._scheme.spares} makers dropped out")
            self._maker = min(self._made)
            self._adder = self._made[self._maker][1]
            self._running = Running(self._adder)
        elif step == 3:
            if not answered:
                raise Aborted("no client opened the sum")
            first = self._opened[answered[0]]
            if not all(np.array_equal(first, self._opened[c]) for c in answered):
                raise Aborted("the clients that opened the sum disagree")

    def total_of(self) -> Total:
        clients = tuple(self.answered[2])
        whole = self._opened[self.answered[3][0]]
        return Total(self.terms.encoding.decode(whole, clients=len(clients)), clients)


class HomomorphicParty(Party):
    """A client: every one holds the secret key."""

    steps = STEPS

    def __init__(
        self, terms: Terms, number: int, vector: Vector | None, scheme: Homomorphic
    ) -> None:
        super().__init__(terms, number, vector)
        self.id, self._scheme = scheme.id, scheme
        self._secret = self._letter = b""

    def reply(self, step: int, request: Any) -> object:
        if step == 0:
            return self._advertise()
        if step == 1:
            return self._make(request) if request.keys else Made(b"", {})
        if step == 2:
            return self._upload(request)
        return self._open(request)

    def _advertise(self) -> Advertised:
        secret, signature = keys.fresh(), b""
        key = keys.public_key(secret)
        if self.terms.verifying is not None:
            if self.signing is None:
                raise InvalidInput(f"client {self.number} has no signing key")
            signature = keys.sign(self.signing, _statement(self.id, self.terms, self.number, key))
        self._secret = secret
        return Advertised(key, signature)

    def _make(self, request: Make) -> Made:
        peers = request.keys
        self._known(tuple(peers))
        if list(request.signatures) != list(peers):
            raise Rejected(Reason.WRONG_PEERS, f"signatures of {list(request.signatures)}")
        for client, key in peers.items():
            _judge(self.id, self.terms, client, key, request.signatures[client])
        if peers.get(self.number) != keys.public_key(self._secret):
            raise Rejected(Reason.WRONG_PEERS, "a list with another key for its reader")
        _distinct(peers)
        shared = {c: self._shared(public, self.number) for c, public in peers.items()}
        secret, public = self._scheme.make(self.terms)
        letter = keys.fresh() + secret
        return Made(
            public,
            {
                c: keys.seal(key, letter, context=self._context(self.number, c))
                for c, key in shared.items()
            },
        )

    def _upload(self, request: Deliver) -> Upload:
        if request.maker not in self.terms.clients:
            raise Rejected(Reason.WRONG_PEERS, f"a key of {request.maker}, no client")
        _judge(self.id, self.terms, request.maker, request.key, request.signature)
        shared = self._shared(request.key, request.maker)
        context = self._context(request.maker, self.number)
        letter = keys.unseal(shared, request.letter, context=context)
        holder = Holder(self._scheme, self.terms, letter)
        whole, room = self.terms.encoding.encode(self.vector()), self._scheme.room(self.terms)
        pieces = (whole[at : at + room] for at in range(0, len(whole), room))
        chunks = holder.encrypt_chunks(self.number, pieces)
        upload = Upload(dict(enumerate(chunks)))
        self._letter = letter
        return upload

    def _open(self, request: Open) -> Opened:
        self._known(request.clients)
        _complete(request.sums, self._scheme.pieces(self.terms))
        if self.number not in request.clients:
            raise Rejected(Reason.WRONG_PEERS, "a sum without the one who is to open it")
        holder = Holder(self._scheme, self.terms, self._letter)
        found = holder.decrypt_chunks(request.clients, request.sums.values())
        return Opened(np.concatenate(list(found)).view(np.uint64))

    def _known(self, clients: tuple[int, ...]) -> None:
        if len(clients) < self._scheme.minimum:
            raise Rejected(
                Reason.TOO_FEW_PEERS, f"{len(clients)} clients: expected {self._scheme.minimum}"
            )
        if list(clients) != sorted(set(clients) & set(self.terms.clients)):
            raise Rejected(Reason.WRONG_PEERS, f"clients {clients}: expected some of the round's")

    def _shared(self, public: bytes, maker: int) -> bytes:
        purpose = f"{self.id} key {maker} ".encode() + self.terms.session
        return keys.agreed(self._secret, public, purpose=purpose)

    def _context(self, maker: int, reader: int) -> bytes:
        return f"{self.id} {maker} {reader} ".encode() + self.terms.session

    def kept(self) -> object:
        return Kept(self._secret, self._letter)

    def keep(self, raw: bytes) -> None:
        found = decode(Kept, raw)
        self._secret, self._letter = found.secret, found.letter
