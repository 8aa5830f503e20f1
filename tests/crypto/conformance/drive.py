"""A round that stops where a test wants to look, and messages that are bent on their way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from gradleak.crypto import Aggregation, Party, Reason, Rejected, Server, Terms
from gradleak.crypto.conformance import Rehearsed
from gradleak.crypto.encoding import Reals
from gradleak.crypto.keys import fresh
from gradleak.crypto.protocol import HELPER, SESSION, Envelope
from gradleak.crypto.wire import decode, decode_head, encode


class Round:
    """Server and parties of one round, played step by step."""

    def __init__(
        self,
        subject: Rehearsed,
        length: int = 3,
        vectors: Mapping[int, Reals] | None = None,
        session: bytes | None = None,
    ) -> None:
        self.subject = subject
        self.vectors: Mapping[int, Reals] = vectors or {
            c: np.arange(length) - float(c) for c in range(subject.clients)
        }
        terms, self.signing = subject.terms(len(self.vectors[0]))
        self.terms = dataclasses.replace(terms, session=session or fresh(SESSION))
        self.sent: list[dict[int, bytes]] = []
        protocol = subject.aggregation
        protocol.check(self.terms)
        self.server: Server = protocol.server(self.terms)
        helpers = range(HELPER, HELPER + protocol.helpers)
        self.parties = {number: self.party(number) for number in (*self.terms.clients, *helpers)}

    def party(self, number: int) -> Party:
        """A new one, as another process would make it."""
        vectors = self.vectors
        made = self.subject.aggregation.party(
            self.terms, number, (lambda: vectors[number]) if number < HELPER else None
        )
        made.signing = self.signing.get(number)
        return made

    def to(self, step: int) -> Mapping[int, bytes]:
        """Play up to a step; its requests."""
        while self.server.step < step:
            self.play()
        return self.server.requests()

    def play(self, silent: tuple[int, ...] = ()) -> None:
        """The open step, as far as it is not played."""
        sent: dict[int, bytes] = {}
        for number, request in self.server.requests().items():
            answered = number in self.server.answered[self.server.step]
            if number not in silent and not answered:
                sent[number] = self.parties[number].answer(request)
                self.server.receive(number, sent[number])
        self.sent.append(sent)
        self.server.close()

    def finish(self) -> None:
        """The rest; the sum must be exact."""
        self.to(len(self.server.steps))
        total = self.server.total
        expected = sum(self.vectors[c] for c in total.clients)
        assert np.abs(total.values - expected).max() <= self.subject.tolerance


def opened(raw: bytes, kind: type[Any]) -> Any:
    """The message in an envelope."""
    return decode(kind, body_of(raw))


def bent(raw: bytes, kind: type[Any], **changes: Any) -> bytes:
    """A message in its envelope with other fields: values, or functions of the old ones."""
    message = opened(raw, kind)
    new = {
        name: change(getattr(message, name)) if callable(change) else change
        for name, change in changes.items()
    }
    return readdressed(raw, body=encode(dataclasses.replace(message, **new)))


def body_of(raw: bytes) -> bytes:
    """What follows the envelope's fields."""
    return bytes(decode_head(Envelope, raw)[1])


def readdressed(raw: bytes, body: bytes | None = None, **changes: Any) -> bytes:
    """The message, or another, behind other fields."""
    head, old = decode_head(Envelope, raw)
    return encode(dataclasses.replace(head, **changes)) + (bytes(old) if body is None else body)


def refused(reason: Reason | None, call: Callable[..., object], *arguments: object) -> None:
    """Assert that it is, and by this name; by any where it is None."""
    with pytest.raises(Rejected) as caught:
        call(*arguments)
    assert reason in (None, caught.value.reason), caught.value


class Forgetful:
    """A protocol whose parties are made anew before every step, from what they kept."""

    def __init__(self, aggregation: Aggregation) -> None:
        self._aggregation = aggregation
        self.id, self.helpers = aggregation.id, aggregation.helpers
        self.check, self.server = aggregation.check, aggregation.server

    def party(self, terms: Terms, number: int, vector: Any = None) -> Any:
        return _Reborn(lambda: self._aggregation.party(terms, number, vector))


class _Reborn:
    def __init__(self, make: Callable[[], Party]) -> None:
        self._make, self._party = make, make()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "signing":
            self._party.signing = value
        else:
            super().__setattr__(name, value)

    def answer(self, request: bytes) -> bytes:
        old, new = self._party, self._make()
        new.keep(encode(old.kept()))
        new.step, new.signing = old.step, old.signing
        self._party = new
        return new.answer(request)
