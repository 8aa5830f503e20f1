"""Every protocol of the package held to the laws, and to what every round has in common."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gradleak.crypto import Reason, aggregations
from gradleak.crypto.conformance import LAWS
from gradleak.crypto.protocol import HELPER, SERVER
from gradleak.crypto.wire import encode
from tests.crypto.conformance.drive import Forgetful, Round, body_of, readdressed, refused
from tests.crypto.conformance.subjects import EACH, LONG, SUBJECTS


def test_every_protocol_is_examined() -> None:
    """But for noise around any of these, whose sums are not exact: test_distributed_dp."""
    examined = {subject.aggregation.id for subject in SUBJECTS.values()}
    assert examined | {"distributed-dp"} == set(aggregations())


MATRIX = [
    pytest.param(
        name,
        law,
        marks=[pytest.mark.slow] * (name in LONG or name in ("secagg-active", "paillier")),
    )
    for name in SUBJECTS
    for law in LAWS
]


@pytest.mark.parametrize(("name", "law"), MATRIX)
def test_a_protocol_holds_a_law(name: str, law: str) -> None:
    LAWS[law](SUBJECTS[name])


@pytest.mark.parametrize("name", EACH)
def test_what_is_kept_is_all_that_is_needed(name: str) -> None:
    """The sum and the dropouts survive parties that are made anew at every step."""
    subject = SUBJECTS[name]
    again = dataclasses.replace(subject, aggregation=Forgetful(subject.aggregation))
    vectors = {c: np.arange(5) * c / 8 for c in range(subject.clients)}
    for drops in ({}, {1: subject.steps - 1}):
        total = again.play(vectors, drops).total
        expected = sum(vectors[c] for c in total.clients)
        assert np.abs(total.values - expected).max() <= subject.tolerance


WRONG = {
    "truncated": (lambda raw: raw[:-1], Reason.TRUNCATED),
    "empty": (lambda raw: b"", Reason.TRUNCATED),
    "trailing": (lambda raw: raw + b"\0", Reason.TRAILING_BYTES),
    "other-protocol": (lambda raw: readdressed(raw, protocol=b"sum"), Reason.OTHER_PROTOCOL),
    "other-session": (lambda raw: readdressed(raw, session=bytes(16)), Reason.OTHER_SESSION),
    "short-session": (lambda raw: readdressed(raw, session=b""), Reason.OTHER_SESSION),
    "other-step": (lambda raw: readdressed(raw, step=9), Reason.OTHER_STEP),
    "largest-step": (lambda raw: readdressed(raw, step=2**64 - 1), Reason.OTHER_STEP),
    "other-sender": (lambda raw: readdressed(raw, sender=2), Reason.OTHER_SENDER),
    "trailing-inside": (lambda raw: readdressed(raw, body=body_of(raw) + b"\0"), None),
    "nothing-inside": (lambda raw: readdressed(raw, body=b""), None),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", EACH)
def test_at_every_step_a_wrong_message_is_refused_by_name_and_changes_nothing(
    name: str, case: str
) -> None:
    change, reason = WRONG[case]
    round_ = Round(SUBJECTS[name])
    for step in range(len(round_.server.steps)):
        for number, request in round_.to(step).items():
            if number not in (0, HELPER):
                continue
            party, kept = round_.parties[number], encode(round_.parties[number].kept())
            if case != "nothing-inside" or body_of(request):
                refused(reason, party.answer, change(request))
            assert encode(party.kept()) == kept
            reply = party.answer(request)
            if case != "nothing-inside" or body_of(reply):
                refused(reason, round_.server.receive, number, change(reply))
            assert number not in round_.server.answered[step]
            round_.server.receive(number, reply)
        round_.play()
    round_.finish()


@pytest.mark.parametrize("name", EACH)
def test_at_every_step_replays_reorderings_and_strangers_are_refused(name: str) -> None:
    round_, other = Round(SUBJECTS[name]), Round(SUBJECTS[name])
    last = len(round_.server.steps) - 1
    before: dict[int, bytes] = {}
    for step in range(last + 1):
        requests, strange = round_.to(step), other.to(step)
        answers: dict[int, bytes] = {}
        for number, request in requests.items():
            party = round_.parties[number]
            if number in before:  # an old request again
                refused(Reason.OTHER_STEP, party.answer, before[number])
            refused(Reason.OTHER_SESSION, party.answer, strange[number])
            own = readdressed(request, sender=number)
            refused(Reason.OTHER_SENDER, party.answer, own)
            answers[number] = party.answer(request)
            again = Reason.REPEATED if party.step > last else Reason.OTHER_STEP
            refused(again, party.answer, request)
            before[number] = request
        first, second, *_ = (*answers, None)
        if second is not None:
            refused(Reason.OTHER_SENDER, round_.server.receive, first, answers[second])
        refused(Reason.UNKNOWN_SENDER, round_.server.receive, 77, answers[first])
        refused(Reason.UNKNOWN_SENDER, round_.server.receive, SERVER, answers[first])
        for number, answer in answers.items():
            round_.server.receive(number, answer)
            refused(Reason.REPEATED, round_.server.receive, number, answer)
        round_.server.close()
        other.play()
    refused(Reason.UNKNOWN_SENDER, round_.server.receive, first, answers[first])
    round_.finish()
