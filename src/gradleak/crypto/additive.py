"""Additive secret sharing between two or three servers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gradleak.crypto import keys
from gradleak.crypto.encoding import fits
from gradleak.crypto.protocol import (
    HELPER,
    Party,
    Server,
    Step,
    Terms,
    Total,
    Vector,
    check_minimum,
)
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.sheet import Sheet
from gradleak.crypto.wire import Words, decode, encode
from gradleak.errors import InvalidInput

Shares = NDArray[np.uint64]


@dataclass(frozen=True)
class Advertise:
    """Send a key for letters."""


@dataclass(frozen=True)
class Advertised:
    """X25519."""

    key: bytes


@dataclass(frozen=True)
class Split:
    """The helping servers' keys."""

    keys: dict[int, bytes]


@dataclass(frozen=True)
class Upload:
    """The asking server's share, a key for letters, and a seed in a letter to each helper."""

    share: Words
    key: bytes
    letters: dict[int, bytes]


@dataclass(frozen=True)
class Forward:
    """What clients wrote to a helper, and digests of the shares that came with it."""

    helpers: dict[int, bytes]
    keys: dict[int, bytes]
    letters: dict[int, bytes]
    digests: dict[int, bytes]


@dataclass(frozen=True)
class Opened:
    """Clients whose letters open; the same list sealed for each other helper."""

    clients: tuple[int, ...]
    lists: dict[int, bytes]


@dataclass(frozen=True)
class Sum:
    """The clients to sum over, and the other helpers' sealed lists."""

    clients: tuple[int, ...]
    lists: dict[int, bytes]


@dataclass(frozen=True)
class Summed:
    """The helper's shares, added."""

    share: Words


@dataclass(frozen=True)
class _List:
    """As it is sealed."""

    clients: tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """A helper's secret key, the others' keys, and the seeds that it accepted."""

    secret: bytes
    helpers: dict[int, bytes]
    seeds: dict[int, bytes]


STEPS = (
    Step("advertise", Advertise, Advertised),
    Step("share", Split, Upload),
    Step("forward", Forward, Opened),
    Step("sum", Sum, Summed),
)


def _digest(share: Words) -> bytes:
    return hashlib.sha256(share.astype("<u8", copy=False).tobytes()).digest()


def _same(found: Any, expected: Any) -> None:
    if list(found) != list(expected):
        raise Rejected(Reason.WRONG_PEERS, f"{list(found)}: expected {list(expected)}")


def _shared(secret: bytes, public: bytes, terms: Terms) -> bytes:
    return keys.agreed(secret, public, purpose=b"additive-mpc letters " + terms.session)


def _context(terms: Terms, writer: int, reader: int, digest: bytes = b"") -> bytes:
    return f"additive-mpc {writer} {reader} ".encode() + terms.session + digest


class AdditiveServer(Server):
    """The asking server: it holds one share of every vector."""

    id, steps = "additive-mpc", STEPS

    def __init__(self, terms: Terms, protocol: AdditiveMpc) -> None:
        super().__init__(terms)
        self._protocol = protocol
        self._helpers = protocol.numbers()
        self._keys: dict[int, bytes] = {}
        self._uploads: dict[int, tuple[Upload, bytes]] = {}
        self._opened: dict[int, Opened] = {}
        self._shares: dict[int, Shares] = {}

    def ask(self, step: int) -> Mapping[int, object]:
        if step == 0:
            return {h: Advertise() for h in self._helpers}
        if step == 1:
            return {c: Split(self._keys) for c in self.terms.clients}
        if step == 2:
            return {
                h: Forward(
                    self._keys,
                    {c: self._uploads[c][0].key for c in self.answered[1]},
                    {c: self._uploads[c][0].letters[h] for c in self.answered[1]},
                    {c: self._uploads[c][1] for c in self.answered[1]},
                )
                for h in self._helpers
            }
        return {
            h: Sum(self._clients, {o: self._opened[o].lists[h] for o in self._helpers if o != h})
            for h in self._helpers
        }

    def accept(self, step: int, sender: int, reply: Any) -> None:
        if step == 0:
            if len(reply.key) != keys.SEED:
                raise Rejected(Reason.INVALID_KEY, f"public key of {len(reply.key)} bytes")
            if reply.key in self._keys.values():
                raise Rejected(Reason.REUSED_KEY, "two helpers with one public key")
            self._keys[sender] = reply.key
        elif step == 1:
            self._length(reply.share)
            _same(reply.letters, self._helpers)
            self._uploads[sender] = reply, _digest(reply.share)
        elif step == 2:
            if list(reply.clients) != sorted(set(reply.clients) & set(self.answered[1])):
                raise Rejected(Reason.WRONG_PEERS, f"clients {reply.clients}")
            _same(reply.lists, [h for h in self._helpers if h != sender])
            self._opened[sender] = reply
        else:
            self._length(reply.share)
            self._shares[sender] = reply.share

    def _length(self, share: Words) -> None:
        if len(share) != self.terms.length or share.dtype != np.uint64:
            raise Rejected(Reason.WRONG_LENGTH, f"{len(share)} words of {share.dtype}")

    def closed(self, step: int, answered: tuple[int, ...]) -> None:
        if step == 1:
            self._enough(answered)
        elif gone := sorted(set(self._helpers) - set(answered)):
            raise Aborted(f"helping servers {gone} dropped out: expected all of {self._helpers}")
        if step == 2:
            lists = [set(found.clients) for found in self._opened.values()]
            self._clients = tuple(sorted(set.intersection(*lists)))
            self._enough(self._clients)

    def _enough(self, clients: tuple[int, ...]) -> None:
        if len(clients) < self._protocol.minimum:
            raise Aborted(
                f"{len(clients)} clients left: expected at least {self._protocol.minimum}"
            )

    def total_of(self) -> Total:
        total = np.zeros(self.terms.length, np.uint64)
        for share in [*self._shares.values(), *(self._uploads[c][0].share for c in self._clients)]:
            total += share
        values = self.terms.encoding.decode(total.view(np.int64), clients=len(self._clients))
        return Total(values, self._clients)


class AdditiveClient(Party):
    """Splits its vector; one answer is all."""

    id, steps, skipped = "additive-mpc", STEPS, frozenset({0, 2, 3})

    def __init__(
        self, terms: Terms, number: int, vector: Vector | None, protocol: AdditiveMpc
    ) -> None:
        super().__init__(terms, number, vector)
        self._helpers = protocol.numbers()

    def reply(self, step: int, request: Any) -> object:
        _same(request.keys, self._helpers)
        secret, seeds = keys.fresh(), {h: keys.fresh() for h in self._helpers}
        shared = {h: _shared(secret, request.keys[h], self.terms) for h in self._helpers}
        share = self.terms.encoding.encode(self.vector()).view(np.uint64)
        for seed in seeds.values():
            share = share - keys.words64(seed, len(share))
        digest = _digest(share)
        letters = {
            h: keys.seal(key, seeds[h], context=_context(self.terms, self.number, h, digest))
            for h, key in shared.items()
        }
        return Upload(share, keys.public_key(secret), letters)

    def kept(self) -> object:
        return Kept(b"", {}, {})

    def keep(self, raw: bytes) -> None:
        decode(Kept, raw)


class AdditiveHelper(Party):
    """A helping server: it holds seeds, and tells their sum once."""

    id, steps, skipped = "additive-mpc", STEPS, frozenset({1})

    def __init__(self, terms: Terms, number: int, protocol: AdditiveMpc) -> None:
        super().__init__(terms, number, None)
        self._protocol, self._others = protocol, [h for h in protocol.numbers() if h != number]
        self._secret = b""
        self._keys: Mapping[int, bytes] = {}
        self._seeds: Mapping[int, bytes] = {}

    def reply(self, step: int, request: Any) -> object:
        if step == 0:
            self._secret = keys.fresh()
            return Advertised(keys.public_key(self._secret))
        return self._open(request) if step == 2 else self._sum(request)

    def _open(self, request: Forward) -> Opened:
        _same(request.helpers, self._protocol.numbers())
        if request.helpers[self.number] != keys.public_key(self._secret):
            raise Rejected(Reason.WRONG_PEERS, "a list with another key for its reader")
        if not set(request.letters) <= set(self.terms.clients):
            raise Rejected(Reason.WRONG_PEERS, f"letters of {list(request.letters)}")
        _same(request.keys, request.letters)
        _same(request.digests, request.letters)
        seeds = {}
        for client, letter in request.letters.items():
            context = _context(self.terms, client, self.number, request.digests[client])
            try:
                shared = _shared(self._secret, request.keys[client], self.terms)
                seed = keys.unseal(shared, letter, context=context)
            except Rejected:
                continue
            if len(seed) == keys.SEED:
                seeds[client] = seed
        self._enough(tuple(seeds))
        message = encode(_List(tuple(seeds)))
        lists = {
            h: keys.seal(
                _shared(self._secret, request.helpers[h], self.terms),
                message,
                context=_context(self.terms, self.number, h),
            )
            for h in self._others
        }
        self._keys, self._seeds = request.helpers, seeds
        return Opened(tuple(seeds), lists)

    def _sum(self, request: Sum) -> Summed:
        _same(request.lists, self._others)
        agreed = set(self._seeds)
        for other, sealed in request.lists.items():
            shared = _shared(self._secret, self._keys[other], self.terms)
            message = keys.unseal(shared, sealed, context=_context(self.terms, other, self.number))
            agreed &= set(decode(_List, message).clients)
        if list(request.clients) != sorted(agreed):
            raise Rejected(
                Reason.INCONSISTENT_SURVIVORS,
                f"clients {request.clients}: the helping servers agree on {sorted(agreed)}",
            )
        self._enough(request.clients)
        total = np.zeros(self.terms.length, np.uint64)
        for client in request.clients:
            total += keys.words64(self._seeds[client], self.terms.length)
        return Summed(total)

    def _enough(self, clients: tuple[int, ...]) -> None:
        least = self._protocol.minimum
        if len(clients) < least:
            raise Rejected(Reason.TOO_FEW_PEERS, f"{len(clients)} clients: expected {least}")

    def kept(self) -> object:
        return Kept(self._secret, dict(self._keys), dict(self._seeds))

    def keep(self, raw: bytes) -> None:
        found = decode(Kept, raw)
        self._secret, self._keys, self._seeds = found.secret, found.helpers, found.seeds


@dataclass(frozen=True)
class AdditiveMpc:
    """Every client splits its vector between servers, who each tell the sum of their shares.

        x = x₀ + Σ_h PRG(s_h) mod 2⁶⁴,   Σx = Σ_i x₀,i + Σ_h Σ_i PRG(s_h,i)

    The asking server gets x₀, each helping server a seed of 32 bytes in a letter that opens only
    with the digest of the x₀ that came with it. The helping servers sum over the clients whose
    letters all of them could open: they tell each other which, sealed, and refuse any other list,
    a second one, and lists of fewer than `minimum` clients.

    Not checked: that entries lie within the bound. A client can send any numbers modulo 2⁶⁴; proofs
    of the range, which Prio is named for, are not here.

    Args:
        servers: 2 or 3, the asking one included.
        minimum: fewest clients in a sum, ≥ 2.

    Raises:
        InvalidInput: one is out of range.

    Source: Corrigan-Gibbs and Boneh (Prio), NSDI 2017.
    """

    servers: int = 2
    minimum: int = 2

    id: ClassVar[str] = "additive-mpc"
    sheet: ClassVar[Sheet] = Sheet(
        title="Additive sharing between servers",
        paper="Corrigan-Gibbs and Boneh (Prio), NSDI 2017",
        link="https://www.usenix.org/conference/nsdi17/technical-sessions/presentation/corrigan-gibbs",
        trusts=(
            "One of the servers does not collude with the others; the asking one passes on public "
            "keys unchanged and invents no clients."
        ),
        survives="Any clients before their upload while `minimum` are left; no helping server.",
        leaks="Nothing but the sum to any server; out-of-range entries are not found.",
        cost="1 upload of 8 bytes an entry for a client; a key stream per client for each helper.",
    )

    def __post_init__(self) -> None:
        if self.servers not in (2, 3):
            raise InvalidInput(f"servers={self.servers}: expected 2 or 3")

    @property
    def helpers(self) -> int:
        """All servers but the asking one."""
        return self.servers - 1

    def numbers(self) -> list[int]:
        """Of the helping servers."""
        return [HELPER + k for k in range(self.helpers)]

    def check(self, terms: Terms) -> None:
        """Return if the sum fits.

        Raises:
            InvalidInput: it does not, or there are too few clients.
        """
        fits(terms.encoding, clients=len(terms.clients), modulus=2**64)
        check_minimum(self.minimum, terms)

    def server(self, terms: Terms) -> Server:
        """The asking server."""
        return AdditiveServer(terms, self)

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> Party:
        """A client, or from `HELPER` on a helping server."""
        if number >= HELPER:
            return AdditiveHelper(terms, number, self)
        return AdditiveClient(terms, number, vector, self)
