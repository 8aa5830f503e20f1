"""Arbitrary and mutated bytes: a message is taken or `Rejected`, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradleak.crypto import Rejected
from gradleak.crypto.protocol import HELPER, Envelope
from gradleak.crypto.wire import decode, encode
from tests.crypto.conformance.drive import Round, body_of, readdressed
from tests.crypto.conformance.subjects import EACH, SUBJECTS

KINDS = sorted(
    {
        kind
        for subject in SUBJECTS.values()
        for step in subject.aggregation.server(subject.terms(1)[0]).steps
        for kind in (step.request, step.reply)
    }
    | {Envelope}
    | {type(Round(subject).parties[0].kept()) for subject in SUBJECTS.values()},
    key=lambda kind: (kind.__module__, kind.__name__),
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.__module__.split('.')[-1]}.{k.__name__}")
@FEW
@given(raw=st.binary(max_size=80))
def test_bytes_are_a_message_of_one_encoding_or_refused(kind: type[Any], raw: bytes) -> None:
    try:
        found = decode(kind, raw)
    except Rejected:
        return
    assert encode(found) == raw


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some bytes cut, put in, or changed, at places relative to the length."""
    where, kind = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 2))
    new, length = draw(st.binary(min_size=1, max_size=9)), draw(st.integers(1, 40))

    def mutate(raw: bytes) -> bytes:
        at = int(where * len(raw))
        cut = {0: 0, 1: len(new), 2: length}[kind]
        return raw[:at] + (b"" if kind == 2 else new) + raw[at + cut :]

    return mutate


@pytest.mark.parametrize("name", EACH)
@settings(FEW, max_examples=6)
@given(data=st.data())
def test_a_round_survives_mutated_messages(name: str, data: st.DataObject) -> None:
    """At each step a client, a helper and the server get mutated messages before the right ones.

    Who takes one is not asked again; where a mutated upload is taken, the sum is another: a client
    may send what it likes. What is refused changes nothing: else the sum is exact.
    """
    round_ = Round(SUBJECTS[name])
    for step in range(len(round_.server.steps)):
        for number, request in round_.to(step).items():
            party = round_.parties[number]
            if number not in (1, HELPER):
                continue
            kept = encode(party.kept())
            for _ in range(2):
                body = data.draw(mutations())(body_of(request))
                for raw in (data.draw(mutations())(request), readdressed(request, body=body)):
                    if raw == request:
                        continue
                    try:
                        party.answer(raw)
                    except Rejected:
                        assert encode(party.kept()) == kept
                    else:
                        return
            answer = party.answer(request)
            body = data.draw(mutations())(body_of(answer))
            for raw in (data.draw(mutations())(answer), readdressed(answer, body=body)):
                if raw == answer:
                    continue
                try:
                    round_.server.receive(number, raw)
                except Rejected:
                    assert number not in round_.server.answered[step]
                else:
                    return
            round_.server.receive(number, answer)
        round_.play()
    round_.finish()
