"""Protocols that share long vectors by a ramp code: their first steps, keys and sealed letters.

keys      every client publishes a public key of this round
shares    every client writes a sealed letter with a share to every other, through the server
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from gradleak.crypto import keys
from gradleak.crypto.field import Residues
from gradleak.crypto.protocol import Party, Server, Step, Terms, Vector
from gradleak.crypto.ramp import Code
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.wire import Words, decode, encode


@dataclass(frozen=True)
class AskKey:
    """A public key, please."""


@dataclass(frozen=True)
class Key:
    """A client's public key of this round."""

    public: bytes


@dataclass(frozen=True)
class Keys:
    """Everybody's public keys."""

    public: dict[int, bytes]


@dataclass(frozen=True)
class Letters:
    """Sealed letters: by receiver on their way up, by sender on their way down."""

    sealed: dict[int, bytes]


@dataclass(frozen=True)
class Share:
    """What a letter holds, and what a client adds up of them."""

    values: Words


KEYS = Step("keys", AskKey, Key)
SHARES = Step("shares", Keys, Letters)

_SEALED = 12 + 16
"""Bytes that sealing adds."""


class CodedServer(Server):
    """The steps `KEYS` and `SHARES`, and answers that are shares in the last step.

    Args:
        terms: agreed.
        code: of the shares.
    """

    def __init__(self, terms: Terms, code: Code) -> None:
        super().__init__(terms)
        self._code = code
        self._width = code.sizes.width(terms.length)
        empty = Share(code.field.write(np.zeros(self._width, np.uint64)))
        self._sealed = _SEALED + len(encode(empty))
        self._public: dict[int, bytes] = {}
        self._letters: dict[int, dict[int, bytes]] = {}
        self._shares: dict[int, Residues] = {}

    def ask(self, step: int) -> Mapping[int, object]:
        if step == 0:
            return {client: AskKey() for client in self.terms.clients}
        if step == 1:
            return {client: Keys(self._public) for client in self._public}
        if step == 2:
            return {
                client: Letters({w: at[client] for w, at in self._letters.items() if w != client})
                for client in self._letters
            }
        raise AssertionError(step)

    def accept(self, step: int, sender: int, reply: Any) -> None:
        if step == 0:
            keys.agreed(keys.fresh(), reply.public, purpose=b"")  # of small order, or no key
            if reply.public in self._public.values():
                raise Rejected(Reason.REUSED_KEY, f"party {sender}'s key is another's")
            self._public[sender] = reply.public
        elif step == 1:
            if reply.sealed.keys() != self._public.keys() - {sender}:
                raise Rejected(Reason.WRONG_PEERS, f"letters to {len(reply.sealed)} parties")
            if wrong := {len(x) for x in reply.sealed.values()} - {self._sealed}:
                raise Rejected(
                    Reason.WRONG_LENGTH, f"letters of {wrong} bytes: expected {self._sealed}"
                )
            self._letters[sender] = reply.sealed
        else:
            self._shares[sender] = self._code.field.read(reply.values, self._width)

    def closed(self, step: int, answered: tuple[int, ...]) -> None:
        if len(answered) < self._code.sizes.needed:
            raise Aborted(
                f"{self.id}: {len(answered)} of {len(self.terms.clients)} clients answered "
                f"{self.steps[step].name}: expected at least {self._code.sizes.needed}"
            )

    def recovered(self) -> Residues:
        """The vector of the shares in the last step's answers.

        Raises:
            Aborted: they contradict one another.
        """
        places = {client: at for at, client in enumerate(self.terms.clients)}
        shares = {places[client]: share for client, share in self._shares.items()}
        return self._code.recover(shares, self.terms.length)


@dataclass(frozen=True)
class Memory:
    """What a client knows between steps.

    Attributes:
        secret: of its key.
        keys: shared with the others, by number.
        seed: of its mask, where there is one; empty otherwise.
        shares: by owner, its own included.
    """

    secret: bytes
    keys: dict[int, bytes]
    seed: bytes
    shares: dict[int, Words]


class CodedParty(Party):
    """The steps `KEYS` and `SHARES`, and the opening of letters.

    Args:
        terms: agreed.
        number: its own.
        vector: its private vector.
        code: of the shares.
    """

    def __init__(self, terms: Terms, number: int, vector: Vector | None, code: Code) -> None:
        super().__init__(terms, number, vector)
        self._code = code
        self._memory = Memory(b"", {}, b"", {})

    def kept(self) -> object:
        return self._memory

    def keep(self, raw: bytes) -> None:
        self._memory = decode(Memory, raw)

    @abstractmethod
    def secret(self, seed: bytes) -> Residues:
        """The vector that is shared."""

    def reply(self, step: int, request: Any) -> object:
        return self._published() if step == 0 else self._shared(request)

    def _published(self) -> Key:
        secret = keys.fresh()
        self._memory = Memory(secret, {}, b"", {})
        return Key(keys.public_key(secret))

    def _shared(self, request: Keys) -> Letters:
        public, own = request.public, self._memory.secret
        self._enough(len(public))
        if not public.keys() <= set(self.terms.clients) or self.number not in public:
            raise Rejected(Reason.WRONG_PEERS, f"keys of {sorted(public)}")
        if public[self.number] != keys.public_key(own):
            raise Rejected(Reason.INVALID_KEY, "a key that is said to be this party's")
        if len(set(public.values())) < len(public):
            raise Rejected(Reason.REUSED_KEY, "two parties with one key")
        purpose = f"{self.id} letters ".encode() + self.terms.session
        agreed = {
            v: keys.agreed(own, key, purpose=purpose)
            for v, key in public.items()
            if v != self.number
        }
        seed = keys.fresh()
        words = self._code.field.write(self._code.share(self.secret(seed)))
        shares = dict(zip(self.terms.clients, words, strict=True))
        sealed = {
            v: keys.seal(key, encode(Share(shares[v])), context=self._context(self.number, v))
            for v, key in agreed.items()
        }
        self._memory = Memory(own, agreed, seed, {self.number: shares[self.number]})
        return Letters(sealed)

    def opened(self, request: Letters) -> dict[int, Words]:
        """Everybody's shares of letters to this party, and its own."""
        if not request.sealed.keys() <= self._memory.keys.keys():
            raise Rejected(Reason.WRONG_PEERS, f"letters of {sorted(request.sealed)}")
        self._enough(len(request.sealed) + 1)
        width = self._code.sizes.width(self.terms.length)
        found = dict(self._memory.shares)
        for v, sealed in request.sealed.items():
            context = self._context(v, self.number)
            letter = decode(Share, keys.unseal(self._memory.keys[v], sealed, context=context))
            self._code.field.read(letter.values, width)
            found[v] = letter.values
        return found

    def added(self, shares: Mapping[int, Words]) -> Share:
        """The sum of shares."""
        field = self._code.field
        none = np.zeros(self._code.sizes.width(self.terms.length), np.uint64)
        return Share(field.write(reduce(field.add, shares.values(), none)))

    def _enough(self, peers: int) -> None:
        if peers < self._code.sizes.needed:
            raise Rejected(
                Reason.TOO_FEW_PEERS, f"{peers}: expected at least {self._code.sizes.needed}"
            )

    def _context(self, sender: int, receiver: int) -> bytes:
        return encode(_Context(self.id.encode(), self.terms.session, sender, receiver))


@dataclass(frozen=True)
class _Context:
    protocol: bytes
    session: bytes
    sender: int
    receiver: int
