"""The smallest protocol: every client sends its vector in the clear. Model and yardstick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gradleak.crypto.protocol import Party, Server, Step, Terms, Total, Vector
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.wire import Words


@dataclass(frozen=True)
class Ask:
    """Send it."""


@dataclass(frozen=True)
class Upload:
    """A vector's integers modulo 2⁶⁴."""

    values: Words


STEPS = (Step("upload", Ask, Upload),)


class PlainServer(Server):
    id, steps = "plain", STEPS

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self._sum = np.zeros(terms.length, np.uint64)

    def ask(self, step: int) -> Mapping[int, object]:
        return {client: Ask() for client in self.terms.clients}

    def accept(self, step: int, sender: int, reply: Any) -> None:
        if len(reply.values) != self.terms.length:
            raise Rejected(Reason.WRONG_LENGTH, f"{len(reply.values)} words")
        self._sum += reply.values

    def closed(self, step: int, answered: tuple[int, ...]) -> None:
        if not answered:
            raise Aborted("no client answered: expected at least one")

    def total_of(self) -> Total:
        answered = tuple(self.answered[0])
        whole = self._sum.view(np.int64)
        return Total(self.terms.encoding.decode(whole, clients=len(answered)), answered)


@dataclass(frozen=True)
class Nothing:
    """No memory."""


class PlainParty(Party):
    id, steps = "plain", STEPS

    def reply(self, step: int, request: Any) -> object:
        return Upload(self.terms.encoding.encode(self.vector()).view(np.uint64))

    def kept(self) -> object:
        return Nothing()

    def keep(self, raw: bytes) -> None: ...


@dataclass(frozen=True)
class Plain:
    id: ClassVar[str] = "plain"
    helpers: ClassVar[int] = 0

    def check(self, terms: Terms) -> None: ...

    def server(self, terms: Terms) -> Server:
        return PlainServer(terms)

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> Party:
        return PlainParty(terms, number, vector)
