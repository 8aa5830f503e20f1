"""Sums under masks that cancel: both sides of a round over a graph of neighbours.

    yᵤ = xᵤ + PRG(bᵤ) + Σ_{v ∈ N(u), v > u} PRG(s_uv) − Σ_{v ∈ N(u), v < u} PRG(s_uv)   mod 2³² or 2⁶⁴

with s_uv agreed by Diffie-Hellman from this round's keys. Every client shares its seed bᵤ and its
secret key among its neighbours and itself, so that t of them can take bᵤ off if u's vector has
arrived, or u's pairwise masks if it has not; nobody ever gives both for one client.

Against an active server keys are signed, and survivors sign the list of survivors before they
unmask by it.

Source: Bonawitz et al., Practical Secure Aggregation, CCS 2017, figure 4.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from gradleak.crypto import keys
from gradleak.crypto.encoding import fits
from gradleak.crypto.protocol import Party, Server, Step, Terms, Total, Vector
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.sharing import join, split
from gradleak.crypto.wire import Words, decode
from gradleak.errors import InvalidInput

_BLOCK = 2**17
"""Bytes of a mask that are made at a time: they stay in the cache."""


def fold(words: NDArray[Any], *, plus: Iterable[bytes], minus: Iterable[bytes]) -> None:
    """Add and subtract the key streams of seeds, in place and block by block.

    Args:
        words: uint32 or uint64, contiguous; arithmetic is modulo 2³² or 2⁶⁴.
        plus: seeds of 32 bytes, none of which has served before.
        minus: likewise.
    """
    streams: list[tuple[Any, Any]] = [
        (Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor(), combine)
        for combine, seeds in ((np.add, plus), (np.subtract, minus))
        for seed in seeds
    ]
    zeros = memoryview(bytes(_BLOCK))
    mask: NDArray[Any] = np.empty(_BLOCK // words.itemsize, words.dtype.newbyteorder("<"))
    raw = mask.view(np.uint8).data
    for start in range(0, len(words), len(mask)):
        part = words[start : start + len(mask)]
        for stream, combine in streams:
            stream.update_into(zeros[: part.nbytes], raw[: part.nbytes])
            combine(part, mask[: len(part)], out=part)


@dataclass(frozen=True)
class Advertise:
    """Make keys for this round."""


@dataclass(frozen=True)
class Keys:
    """A client's public keys, 32 bytes each: for masks, for letters; then the signature if any."""

    bundle: bytes


@dataclass(frozen=True)
class Roster:
    """The receiver's neighbours that have keys, itself included, with their bundles."""

    bundles: dict[int, bytes]


@dataclass(frozen=True)
class Letters:
    """A client's sealed shares by receiver, and the hash of its seed."""

    commitment: bytes
    letters: dict[int, bytes]


@dataclass(frozen=True)
class Mailbox:
    """The letters to the receiver, by sender."""

    letters: dict[int, bytes]


@dataclass(frozen=True)
class Masked:
    """A client's vector under its masks."""

    values: Words


@dataclass(frozen=True)
class Survivors:
    """All clients whose masked vectors have arrived."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Of the list of survivors."""

    signature: bytes


@dataclass(frozen=True)
class Signatures:
    """Of the list of survivors, by client."""

    signatures: dict[int, bytes]


@dataclass(frozen=True)
class Shares:
    """Shares of survivors' seeds and of other clients' secret keys, by owner."""

    seeds: dict[int, bytes]
    keys: dict[int, bytes]


_OPENING = (
    Step("advertise-keys", Advertise, Keys),
    Step("share-keys", Roster, Letters),
    Step("masked-input", Mailbox, Masked),
)
PASSIVE = (*_OPENING, Step("unmask", Survivors, Shares))
ACTIVE = (
    *_OPENING,
    Step("consistency-check", Survivors, Signature),
    Step("unmask", Signatures, Shares),
)
_ADVERTISE, _SHARE, _MASK = range(3)
_SIGNATURE, _LETTER_SHARE = 64, 48


@dataclass(frozen=True, eq=False)
class Rules:
    """What both sides of a round derive alike.

    Args:
        id: the protocol's.
        terms: the round's.
        active: whether the server may lie: keys and survivors are signed.
        threshold: shares that open a secret.
        quorum: survivors that a sum must have at least.
        peers: of a client: itself and its neighbours, ascending. Neighbours are mutual.
    """

    id: str
    terms: Terms
    active: bool
    threshold: int
    quorum: int
    peers: Callable[[int], tuple[int, ...]]

    @property
    def steps(self) -> tuple[Step, ...]:
        """Four, or five with the consistency check."""
        return ACTIVE if self.active else PASSIVE

    @property
    def word(self) -> np.dtype[Any]:
        """Of the narrowest ring in which no sum overflows."""
        wide = 2 * len(self.terms.clients) * self.terms.encoding.bound >= 2**32
        return np.dtype(np.uint64 if wide else np.uint32)

    def check(self) -> None:
        """Return if a round by these rules can be private and exact.

        Raises:
            InvalidInput: it cannot.
        """
        clients = self.terms.clients
        if len(clients) < 2:
            raise InvalidInput(f"{len(clients)} clients: expected at least 2, for a sum to hide in")
        shares = len(self.peers(clients[0]))
        if not shares < 2 * self.threshold <= 2 * shares:
            raise InvalidInput(
                f"threshold={self.threshold} of {shares} shares: expected {shares // 2 + 1} to "
                f"{shares}, so that no two halves open both secrets of a client"
            )
        least = 2 * len(clients) // 3 + 1
        if self.active and self.quorum < least:
            raise InvalidInput(
                f"{self.quorum} of {len(clients)} clients may make a sum: expected at least "
                f"{least} against an active server"
            )
        if self.active and set(self.terms.verifying or {}) < set(clients):
            raise InvalidInput("an active server needs terms with every client's verifying key")
        fits(self.terms.encoding, clients=len(clients), modulus=2**64)

    def naming(self, use: str, *numbers: int) -> bytes:
        """Bytes of protocol, use, session and numbers: no two uses have the same."""
        head = f"{self.id}/{use}/".encode()
        return head + self.terms.session + struct.pack(f"<{len(numbers)}Q", *numbers)

    def verify(self, client: int, signature: bytes, statement: bytes) -> None:
        """Return if this client has signed the statement.

        Raises:
            Rejected: BAD_SIGNATURE.
        """
        keys.verify((self.terms.verifying or {})[client], signature, statement)

    def check_bundle(self, client: int, bundle: bytes) -> None:
        """Return if a bundle is one, and this client's by its signature.

        Raises:
            Rejected: INVALID_KEY, REUSED_KEY, BAD_SIGNATURE.
        """
        size = 2 * keys.SEED + self.active * _SIGNATURE
        if len(bundle) != size:
            raise Rejected(Reason.INVALID_KEY, f"keys of {len(bundle)} bytes: expected {size}")
        if _masking(bundle) == _sealing(bundle):
            raise Rejected(Reason.REUSED_KEY, f"client {client} has one key for both uses")
        if self.active:
            public, signature = bundle[:-_SIGNATURE], bundle[-_SIGNATURE:]
            self.verify(client, signature, self.naming("keys", client) + public)


def _masking(bundle: bytes) -> bytes:
    return bundle[: keys.SEED]


def _sealing(bundle: bytes) -> bytes:
    return bundle[keys.SEED : 2 * keys.SEED]


def _commitment(rules: Rules, client: int, seed: bytes) -> bytes:
    return hashlib.sha256(rules.naming("seed", client) + seed).digest()


@dataclass(frozen=True)
class Memory:
    """What a client keeps from step to step: this round's secrets, and what others shared."""

    masking: bytes = b""
    sealing: bytes = b""
    seed: bytes = b""
    bundles: dict[int, bytes] = field(default_factory=dict)
    seed_shares: dict[int, bytes] = field(default_factory=dict)
    key_shares: dict[int, bytes] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()


class MaskingParty(Party):
    """A client."""

    def __init__(self, rules: Rules, number: int, vector: Vector | None) -> None:
        super().__init__(rules.terms, number, vector)
        self.id, self.steps, self._rules = rules.id, rules.steps, rules
        self._memory = Memory()

    def kept(self) -> object:
        return self._memory

    def keep(self, raw: bytes) -> None:
        self._memory = decode(Memory, raw)

    def reply(self, step: int, request: Any) -> object:
        if step == _ADVERTISE:
            return self._advertise()
        if step == _SHARE:
            return self._share(request.bundles)
        if step == _MASK:
            return self._mask(request.letters)
        if isinstance(request, Signatures):
            return self._unmask_signed(request.signatures)
        return self._sign(request.numbers) if self._rules.active else self._unmask(request.numbers)

    def _advertise(self) -> Keys:
        secrets = Memory(keys.fresh(), keys.fresh(), keys.fresh())
        bundle = keys.public_key(secrets.masking) + keys.public_key(secrets.sealing)
        if self._rules.active:
            bundle += self._signed(self._rules.naming("keys", self.number) + bundle)
        self._memory = replace(secrets, bundles={self.number: bundle})
        return Keys(bundle)

    def _share(self, bundles: dict[int, bytes]) -> Letters:
        rules, memory = self._rules, self._memory
        if not set(bundles) <= set(rules.peers(self.number)) or self.number not in bundles:
            raise Rejected(Reason.WRONG_PEERS, f"keys of {tuple(bundles)}")
        self._enough(bundles)
        if bundles[self.number] != memory.bundles[self.number]:
            raise Rejected(Reason.INVALID_KEY, "its own keys are others than it sent")
        for client, bundle in bundles.items():
            rules.check_bundle(client, bundle)
        if len({half(b) for b in bundles.values() for half in (_masking, _sealing)}) < 2 * len(
            bundles
        ):
            raise Rejected(Reason.REUSED_KEY, "two clients with one key")
        seeds = split(memory.seed, rules.threshold, bundles)
        masking = split(memory.masking, rules.threshold, bundles)
        letters = {
            client: keys.seal(
                self._letter_key(client, bundle),
                seeds[client] + masking[client],
                context=rules.naming("letter", self.number, client),
            )
            for client, bundle in bundles.items()
            if client != self.number
        }
        own = self.number
        self._memory = replace(
            memory,
            bundles=bundles,
            seed_shares={own: seeds[own]},
            key_shares={own: masking[own]},
        )
        return Letters(_commitment(rules, own, memory.seed), letters)

    def _mask(self, letters: dict[int, bytes]) -> Masked:
        rules, memory = self._rules, self._memory
        if not set(letters) <= set(memory.bundles) - {self.number}:
            raise Rejected(Reason.WRONG_PEERS, f"letters of {tuple(letters)}")
        self._enough([*letters, self.number])
        seed_shares, key_shares = dict(memory.seed_shares), dict(memory.key_shares)
        plus: list[bytes] = [memory.seed]
        minus: list[bytes] = []
        for client, sealed in letters.items():
            bundle = memory.bundles[client]
            context = rules.naming("letter", client, self.number)
            letter = keys.unseal(self._letter_key(client, bundle), sealed, context=context)
            if len(letter) != 2 * _LETTER_SHARE:
                raise Rejected(Reason.BAD_SHARE, f"{len(letter)} bytes of shares")
            seed_shares[client], key_shares[client] = (
                letter[:_LETTER_SHARE],
                letter[_LETTER_SHARE:],
            )
            seed = keys.agreed(memory.masking, _masking(bundle), purpose=rules.naming("mask"))
            (plus if client > self.number else minus).append(seed)
        values: Words = self.terms.encoding.encode(self.vector()).astype(rules.word)
        fold(values, plus=plus, minus=minus)
        self._memory = replace(memory, seed_shares=seed_shares, key_shares=key_shares)
        return Masked(values)

    def _sign(self, survivors: tuple[int, ...]) -> Signature:
        self._check_survivors(survivors)
        self._memory = replace(self._memory, survivors=survivors)
        return Signature(self._signed(self._rules.naming("survivors", *survivors)))

    def _unmask_signed(self, signatures: dict[int, bytes]) -> Shares:
        survivors = self._memory.survivors
        if not set(signatures) <= set(survivors):
            raise Rejected(Reason.WRONG_PEERS, "signatures of clients that are no survivors")
        if len(signatures) < self._rules.quorum:
            raise Rejected(
                Reason.TOO_FEW_PEERS,
                f"{len(signatures)} signatures: expected at least {self._rules.quorum}",
            )
        statement = self._rules.naming("survivors", *survivors)
        for client, signature in signatures.items():
            try:
                self._rules.verify(client, signature, statement)
            except Rejected as error:
                raise Rejected(
                    Reason.INCONSISTENT_SURVIVORS, f"client {client} has not signed this list"
                ) from error
        return self._unmask(survivors)

    def _unmask(self, survivors: tuple[int, ...]) -> Shares:
        self._check_survivors(survivors)
        here, memory = set(survivors), self._memory
        return Shares(
            {u: share for u, share in memory.seed_shares.items() if u in here},
            {u: share for u, share in memory.key_shares.items() if u not in here},
        )

    def _check_survivors(self, survivors: tuple[int, ...]) -> None:
        here, clients = set(survivors), self.terms.clients
        if list(survivors) != sorted(here) or not here <= set(clients):
            raise Rejected(Reason.MALFORMED, f"survivors {survivors}")
        if self.number not in here:
            raise Rejected(Reason.WRONG_PEERS, "survivors without the receiver")
        near = here & set(self._rules.peers(self.number))
        if not near <= set(self._memory.seed_shares):
            raise Rejected(Reason.WRONG_PEERS, "survivors that sent no letter")
        if len(here) < self._rules.quorum:
            raise Rejected(
                Reason.TOO_FEW_PEERS,
                f"{len(here)} survivors: expected at least {self._rules.quorum}",
            )
        self._enough(near)

    def _enough(self, near: Iterable[int]) -> None:
        count, needed = len(set(near)), self._rules.threshold
        if count < needed:
            raise Rejected(Reason.TOO_FEW_PEERS, f"{count} are left: expected at least {needed}")

    def _letter_key(self, client: int, bundle: bytes) -> bytes:
        purpose = self._rules.naming("letters")
        return keys.agreed(self._memory.sealing, _sealing(bundle), purpose=purpose)

    def _signed(self, statement: bytes) -> bytes:
        if self.signing is None:
            raise InvalidInput(f"client {self.number} has no signing key")
        return keys.sign(self.signing, statement)


class MaskingServer(Server):
    """The server."""

    def __init__(self, rules: Rules) -> None:
        self.id, self.steps, self._rules = rules.id, rules.steps, rules
        super().__init__(rules.terms)
        self._bundles: dict[int, bytes] = {}
        self._public: set[bytes] = set()
        self._commitments: dict[int, bytes] = {}
        self._letters: dict[int, dict[int, bytes]] = {}
        self._sum = np.zeros(rules.terms.length, rules.word)
        self._survivors: frozenset[int] = frozenset()
        self._dropped: frozenset[int] = frozenset()
        self._signatures: dict[int, bytes] = {}
        self._seed_shares: dict[int, dict[int, bytes]] = {}
        self._key_shares: dict[int, dict[int, bytes]] = {}

    def ask(self, step: int) -> Mapping[int, object]:
        name = self.steps[step].request
        if name is Advertise:
            return dict.fromkeys(self.terms.clients, Advertise())
        before = self.answered[step - 1]
        if name is Roster:
            rosters: dict[tuple[int, ...], Roster] = {}
            return {c: self._roster(self._rules.peers(c), rosters) for c in before}
        if name is Mailbox:
            return {c: self._mailbox(c) for c in before}
        if name is Survivors:
            return dict.fromkeys(before, Survivors(tuple(before)))
        return dict.fromkeys(before, Signatures(self._signatures))

    def _roster(self, peers: tuple[int, ...], known: dict[tuple[int, ...], Roster]) -> Roster:
        if peers not in known:
            known[peers] = Roster({p: self._bundles[p] for p in peers if p in self._bundles})
        return known[peers]

    def _mailbox(self, client: int) -> Mailbox:
        senders = (p for p in self._rules.peers(client) if p != client and p in self._letters)
        return Mailbox({p: self._letters[p][client] for p in senders})

    def accept(self, step: int, sender: int, reply: Any) -> None:
        if isinstance(reply, Keys):
            self._rules.check_bundle(sender, reply.bundle)
            if {_masking(reply.bundle), _sealing(reply.bundle)} & self._public:
                raise Rejected(Reason.REUSED_KEY, f"client {sender} has another's key")
            self._public |= {_masking(reply.bundle), _sealing(reply.bundle)}
            self._bundles[sender] = reply.bundle
        elif isinstance(reply, Letters):
            self._match(reply.letters, self._near(sender, self._bundles) - {sender})
            self._letters[sender] = reply.letters
            self._commitments[sender] = reply.commitment
        elif isinstance(reply, Masked):
            if reply.values.dtype != self._sum.dtype or len(reply.values) != len(self._sum):
                raise Rejected(
                    Reason.WRONG_LENGTH,
                    f"{len(reply.values)} words of {reply.values.itemsize} bytes: expected "
                    f"{len(self._sum)} of {self._sum.itemsize}",
                )
            self._sum += reply.values
        elif isinstance(reply, Signature):
            statement = self._rules.naming("survivors", *self._survivors)
            self._rules.verify(sender, reply.signature, statement)
            self._signatures[sender] = reply.signature
        else:
            self._match(reply.seeds, self._near(sender, self._survivors))
            self._match(reply.keys, self._near(sender, self._dropped))
            for shares, kind in ((reply.seeds, self._seed_shares), (reply.keys, self._key_shares)):
                for owner, share in shares.items():
                    kind.setdefault(owner, {})[sender] = share

    def _near(self, client: int, among: Container[int]) -> set[int]:
        return {p for p in self._rules.peers(client) if p in among}

    def _match(self, found: Mapping[int, bytes], expected: set[int]) -> None:
        if set(found) != expected:
            raise Rejected(Reason.WRONG_PEERS, f"for {sorted(found)}: expected {sorted(expected)}")

    def closed(self, step: int, answered: tuple[int, ...]) -> None:
        here, rules = set(answered), self._rules
        if len(here) < rules.quorum:
            raise Aborted(f"{len(here)} clients are left: expected at least {rules.quorum}")
        if self.steps[step].reply is Masked:
            self._survivors = frozenset(here)
            self._dropped = frozenset(self._letters) - here
        lost = {c for c in self._dropped if self._near(c, self._survivors)}
        owners = (self._survivors or here) | lost
        for client in sorted(owners):
            left = len(self._near(client, here))
            if left < rules.threshold:
                raise Aborted(
                    f"{left} holders of client {client}'s shares are left: expected at least "
                    f"{rules.threshold}"
                )

    def total_of(self) -> Total:
        plus: list[bytes] = []
        minus: list[bytes] = []
        for client in sorted(self._survivors):
            seed = self._joined(self._seed_shares[client], client)
            if _commitment(self._rules, client, seed) != self._commitments[client]:
                raise Aborted(f"the shares of client {client}'s seed make another one")
            minus.append(seed)
        for client in sorted(self._dropped & self._key_shares.keys()):
            secret = self._joined(self._key_shares[client], client)
            if keys.public_key(secret) != _masking(self._bundles[client]):
                raise Aborted(f"the shares of client {client}'s key make another one")
            for peer in self._near(client, self._survivors):
                public = _masking(self._bundles[peer])
                seed = keys.agreed(secret, public, purpose=self._rules.naming("mask"))
                (plus if client < peer else minus).append(seed)
        fold(self._sum, plus=plus, minus=minus)
        signed = self._sum.view(np.int64 if self._sum.itemsize == 8 else np.int32)
        clients = tuple(sorted(self._survivors))
        values = self.terms.encoding.decode(signed.astype(np.int64), clients=len(clients))
        return Total(values, clients)

    def _joined(self, shares: Mapping[int, bytes], client: int) -> bytes:
        try:
            return join(shares, self._rules.threshold)
        except Rejected as error:
            raise Aborted(f"client {client}: {error}") from error


@dataclass(frozen=True)
class Masking(ABC):
    """A protocol of this kind: its parameters say who neighbours whom, and the thresholds."""

    id: ClassVar[str]
    helpers: ClassVar[int] = 0

    @abstractmethod
    def rules(self, terms: Terms) -> Rules:
        """The round's rules.

        Raises:
            InvalidInput: the parameters do not suit the terms.
        """

    def check(self, terms: Terms) -> None:
        """Return if thresholds, keys and the largest sum suit the terms."""
        self.rules(terms).check()

    def server(self, terms: Terms) -> Server:
        """The server's side of one round."""
        return MaskingServer(self.rules(terms))

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> Party:
        """A client's side of one round; where the protocol signs, set its `signing`."""
        return MaskingParty(self.rules(terms), number, vector)
