"""Forged, foreign and inconsistent messages, each with the reason for which it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from gradleak.crypto import Aborted, FixedPoint, Reason
from gradleak.crypto.keys import public_key
from gradleak.crypto.protocol import HELPER
from gradleak.crypto.wire import encode
from gradleak.errors import InvalidInput
from tests.crypto.conformance.drive import Round, bent, readdressed, refused
from tests.crypto.conformance.subjects import EACH, SUBJECTS

Change = Callable[[Any], Any]


def but(number: int, value: Any) -> Change:
    """A mapping with another value, or a function of the old one, at one key."""
    return lambda d: {**d, number: value(d[number]) if callable(value) else value}


def without(*numbers: int) -> Change:
    return lambda d: {k: v for k, v in d.items() if k not in numbers}


def swapped(one: int, other: int) -> Change:
    return lambda d: {**d, one: d[other], other: d[one]}


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


@dataclass(frozen=True)
class Case:
    """What a party is asked, or the server answered, at a step, and why it is refused."""

    subject: str
    step: int
    about: str
    changes: dict[str, Any]
    reason: Reason
    to: int = 0
    """Number of the party that is asked; -1 for its answer to the server."""


R = Reason
SMALL_ORDER = bytes(32)

MASKED = [
    Case("", 1, "own keys missing", {"bundles": without(0)}, R.WRONG_PEERS),
    Case("", 1, "a stranger's keys", {"bundles": but(99, bytes(64))}, R.WRONG_PEERS),
    Case("", 1, "own keys changed", {"bundles": but(0, flipped)}, R.INVALID_KEY),
    Case("", 1, "too few keys", {"bundles": without(1, 2, 3)}, R.TOO_FEW_PEERS),
    Case("", 1, "short keys", {"bundles": but(1, bytes(63))}, R.INVALID_KEY),
    Case("", 1, "one key for both uses", {"bundles": but(1, b"k" * 64)}, R.REUSED_KEY),
    Case("", 2, "letter changed", {"letters": but(1, flipped)}, R.NOT_AUTHENTIC),
    Case("", 2, "letter emptied", {"letters": but(1, b"")}, R.NOT_AUTHENTIC),
    Case("", 2, "letter cut", {"letters": but(1, lambda s: s[:-1])}, R.NOT_AUTHENTIC),
    Case("", 2, "letters swapped", {"letters": swapped(1, 2)}, R.NOT_AUTHENTIC),
    Case("", 2, "a stranger's letter", {"letters": but(99, bytes(124))}, R.WRONG_PEERS),
    Case("", 2, "a letter from itself", {"letters": but(0, bytes(124))}, R.WRONG_PEERS),
    Case("", 2, "too few letters", {"letters": without(2, 3, 4)}, R.TOO_FEW_PEERS),
    Case("", 3, "survivors without it", {"numbers": lambda n: n[1:]}, R.WRONG_PEERS),
    Case("", 3, "a survivor twice", {"numbers": lambda n: (0, *n)}, R.MALFORMED),
    Case("", 3, "survivors unordered", {"numbers": lambda n: n[::-1]}, R.MALFORMED),
    Case("", 3, "a stranger survives", {"numbers": lambda n: (*n, 99)}, R.MALFORMED),
    Case("", 3, "too few survivors", {"numbers": lambda n: n[:2]}, R.TOO_FEW_PEERS),
    Case("", 0, "keys cut", {"bundle": lambda b: b[1:]}, R.INVALID_KEY, -1),
    Case("", 0, "equal keys", {"bundle": b"k" * 64}, R.REUSED_KEY, -1),
    Case("", 1, "a letter missing", {"letters": without(1)}, R.WRONG_PEERS, -1),
    Case("", 1, "a letter to a stranger", {"letters": but(99, b"")}, R.WRONG_PEERS, -1),
    Case("", 2, "short vector", {"values": lambda v: v[1:]}, R.WRONG_LENGTH, -1),
    Case("", 2, "long vector", {"values": lambda v: np.append(v, v)}, R.WRONG_LENGTH, -1),
    Case("", 2, "wider words", {"values": lambda v: v.astype("<u8")}, R.WRONG_LENGTH, -1),
    Case("", 3, "a share missing", {"seeds": without(1)}, R.WRONG_PEERS, -1),
    Case("", 3, "a key's share unasked", {"keys": but(1, bytes(48))}, R.WRONG_PEERS, -1),
]
KEY = public_key(b"s" * 32)
SIGNED = [
    Case("secagg-active", 0, "keys unsigned", {"bundle": lambda b: b[:64]}, R.INVALID_KEY, -1),
    Case("secagg-active", 0, "keys forged", {"bundle": flipped}, R.BAD_SIGNATURE, -1),
    Case("secagg-active", 1, "peer's keys forged", {"bundles": but(1, flipped)}, R.BAD_SIGNATURE),
    Case(
        "secagg-active",
        1,
        "the server's key in a peer's place",
        {"bundles": but(1, lambda b: KEY + b[32:])},
        R.BAD_SIGNATURE,
    ),
    Case("secagg-active", 1, "keys swapped", {"bundles": swapped(1, 2)}, R.BAD_SIGNATURE),
    Case("secagg-active", 3, "survivors forged", {"signature": flipped}, R.BAD_SIGNATURE, -1),
    Case(
        "secagg-active",
        4,
        "another list signed",
        {"signatures": but(1, flipped)},
        R.INCONSISTENT_SURVIVORS,
    ),
    Case(
        "secagg-active",
        4,
        "signatures swapped",
        {"signatures": swapped(1, 2)},
        R.INCONSISTENT_SURVIVORS,
    ),
    Case("secagg-active", 4, "too few signatures", {"signatures": without(1, 2)}, R.TOO_FEW_PEERS),
    Case("secagg-active", 4, "a stranger signs", {"signatures": but(99, b"")}, R.WRONG_PEERS),
]
SERVERS = [
    Case("additive-mpc-3", 0, "helper's key cut", {"key": b"k"}, R.INVALID_KEY, -1),
    Case("additive-mpc-3", 1, "a helper missing", {"keys": without(HELPER)}, R.WRONG_PEERS),
    Case("additive-mpc-3", 1, "a helper too many", {"keys": but(7, KEY)}, R.WRONG_PEERS),
    Case("additive-mpc-3", 1, "small order", {"keys": but(HELPER, SMALL_ORDER)}, R.INVALID_KEY),
    Case("additive-mpc-3", 1, "short key", {"keys": but(HELPER, b"k")}, R.INVALID_KEY),
    Case("additive-mpc-3", 1, "short share", {"share": lambda v: v[1:]}, R.WRONG_LENGTH, -1),
    Case(
        "additive-mpc-3",
        1,
        "narrow words",
        {"share": lambda v: v.astype("<u4")},
        R.WRONG_LENGTH,
        -1,
    ),
    Case("additive-mpc-3", 1, "a letter missing", {"letters": without(HELPER)}, R.WRONG_PEERS, -1),
    Case(
        "additive-mpc-3", 2, "own key changed", {"helpers": but(HELPER, KEY)}, R.WRONG_PEERS, HELPER
    ),
    Case(
        "additive-mpc-3",
        2,
        "a helper missing",
        {"helpers": without(HELPER + 1)},
        R.WRONG_PEERS,
        HELPER,
    ),
    Case("additive-mpc-3", 2, "a key missing", {"keys": without(1)}, R.WRONG_PEERS, HELPER),
    Case("additive-mpc-3", 2, "a digest missing", {"digests": without(1)}, R.WRONG_PEERS, HELPER),
    Case(
        "additive-mpc-3",
        2,
        "shares that clients did not send",
        {"digests": lambda d: dict.fromkeys(d, bytes(32))},
        R.TOO_FEW_PEERS,
        HELPER,
    ),
    Case(
        "additive-mpc-3",
        3,
        "a client left out",
        {"clients": lambda c: c[1:]},
        R.INCONSISTENT_SURVIVORS,
        HELPER,
    ),
    Case(
        "additive-mpc-3", 3, "a client alone", {"clients": (0,)}, R.INCONSISTENT_SURVIVORS, HELPER
    ),
    Case("additive-mpc-3", 3, "a helper's list missing", {"lists": {}}, R.WRONG_PEERS, HELPER),
    Case(
        "additive-mpc-3",
        3,
        "a helper's list forged",
        {"lists": but(HELPER + 1, flipped)},
        R.NOT_AUTHENTIC,
        HELPER,
    ),
]
CIPHERS = [
    Case("", 0, "short key", {"key": b"k"}, R.INVALID_KEY, -1),
    Case("", 1, "own key changed", {"keys": but(0, KEY)}, R.WRONG_PEERS),
    Case("", 1, "own key missing", {"keys": without(0)}, R.WRONG_PEERS),
    Case("", 1, "two with one key", {"keys": lambda d: {**d, 1: d[2]}}, R.REUSED_KEY),
    Case("", 1, "small order", {"keys": but(1, SMALL_ORDER)}, R.INVALID_KEY),
    Case("", 1, "one client alone", {"keys": without(1, 2, 3)}, R.TOO_FEW_PEERS),
    Case("", 1, "a stranger's key", {"keys": but(99, KEY)}, R.WRONG_PEERS),
    Case("", 1, "a letter missing", {"letters": without(1)}, R.WRONG_PEERS, -1),
    Case("", 2, "letter changed", {"letter": flipped}, R.NOT_AUTHENTIC),
    Case("", 2, "letter emptied", {"letter": b""}, R.NOT_AUTHENTIC),
    Case("", 2, "another maker named", {"maker": 1}, R.NOT_AUTHENTIC),
    Case("", 2, "a stranger makes the key", {"maker": 99}, R.WRONG_PEERS),
    Case("", 2, "maker's key of small order", {"key": SMALL_ORDER}, R.INVALID_KEY),
    Case("", 2, "a piece missing", {"ciphertexts": {}}, R.WRONG_LENGTH, -1),
    Case("", 2, "ciphertext cut", {"ciphertexts": but(0, lambda c: c[1:])}, R.BAD_CIPHERTEXT, -1),
    Case("", 3, "fewer than are named", {"clients": lambda c: c[:-1]}, R.INCONSISTENT_SURVIVORS),
    Case("", 3, "a sum without the opener", {"clients": lambda c: c[1:]}, R.WRONG_PEERS),
    Case("", 3, "one upload alone", {"clients": (0,)}, R.TOO_FEW_PEERS),
    Case("", 3, "a piece missing", {"sums": {}}, R.WRONG_LENGTH),
    Case("", 3, "sum cut", {"sums": but(0, lambda c: c[1:])}, R.BAD_CIPHERTEXT),
    Case("", 3, "short sum", {"values": lambda v: v[1:]}, R.WRONG_LENGTH, -1),
    Case(
        "", 3, "an impossible sum", {"values": lambda v: v + np.uint64(2**40)}, R.OUT_OF_RANGE, -1
    ),
]
CODED = [
    Case("", 0, "short key", {"public": b"k"}, R.INVALID_KEY, -1),
    Case("", 0, "small order", {"public": SMALL_ORDER}, R.INVALID_KEY, -1),
    Case("", 1, "own key missing", {"public": without(0)}, R.WRONG_PEERS),
    Case("", 1, "own key changed", {"public": but(0, KEY)}, R.INVALID_KEY),
    Case("", 1, "a stranger's key", {"public": but(99, KEY)}, R.WRONG_PEERS),
    Case("", 1, "two with one key", {"public": lambda d: {**d, 1: d[2]}}, R.REUSED_KEY),
    Case("", 1, "small order", {"public": but(1, SMALL_ORDER)}, R.INVALID_KEY),
    Case("", 1, "too few keys", {"public": without(1, 2)}, R.TOO_FEW_PEERS),
    Case("", 1, "a letter missing", {"sealed": without(1)}, R.WRONG_PEERS, -1),
    Case("", 1, "a letter to a stranger", {"sealed": but(99, b"")}, R.WRONG_PEERS, -1),
    Case("", 1, "letter cut", {"sealed": but(1, lambda s: s[1:])}, R.WRONG_LENGTH, -1),
    Case("", 2, "letter changed", {"sealed": but(1, flipped)}, R.NOT_AUTHENTIC),
    Case("", 2, "letters swapped", {"sealed": swapped(1, 2)}, R.NOT_AUTHENTIC),
    Case("", 2, "letter emptied", {"sealed": but(1, b"")}, R.NOT_AUTHENTIC),
    Case("", 2, "a stranger's letter", {"sealed": but(99, b"")}, R.WRONG_PEERS),
    Case("", 2, "too few letters", {"sealed": without(1, 2)}, R.TOO_FEW_PEERS),
    Case("", 2, "short words", {"values": lambda v: v[1:]}, R.WRONG_LENGTH, -1),
    Case("", 2, "no residues", {"values": lambda v: v | np.uint32(2**32 - 1)}, R.OUT_OF_RANGE, -1),
]
SURVIVORS = [
    Case("lightsecagg", 3, about, {"clients": clients}, reason)
    for about, clients, reason in (
        ("survivors without it", (1, 2, 3, 4), R.INCONSISTENT_SURVIVORS),
        ("a survivor twice", (0, 0, 1, 2, 3), R.INCONSISTENT_SURVIVORS),
        ("survivors unordered", (3, 2, 1, 0), R.INCONSISTENT_SURVIVORS),
        ("a stranger survives", (0, 1, 2, 99), R.INCONSISTENT_SURVIVORS),
        ("too few survivors", (0, 1, 2), R.TOO_FEW_PEERS),
        ("one repeated to be enough", (0, 0, 0, 0), R.INCONSISTENT_SURVIVORS),
    )
]
CASES = [
    *(replace(case, subject="secagg") for case in MASKED),
    *(replace(case, subject=name) for name in ("lightsecagg", "fastsecagg") for case in CODED),
    *SURVIVORS,
    *SIGNED,
    *SERVERS,
    *(replace(case, subject=name) for name in ("paillier", "ckks") for case in CIPHERS),
]


ALL = [
    pytest.param(
        case,
        id=f"{case.subject}: {case.step}, {case.about}, {case.to}",
        marks=[pytest.mark.slow] * (case.subject == "ckks"),
    )
    for case in CASES
]


@pytest.mark.parametrize("case", ALL)
def test_a_forged_message_is_refused_by_name_and_the_round_goes_on(case: Case) -> None:
    round_ = Round(SUBJECTS[case.subject])
    requests = round_.to(case.step)
    step = round_.server.steps[case.step]
    number = case.to if case.to >= 0 else min(requests)
    party = round_.parties[number]
    if case.to >= 0:
        kept = encode(party.kept())
        forged = bent(requests[number], step.request, **case.changes)
        refused(case.reason, party.answer, forged)
        assert encode(party.kept()) == kept
    else:
        answer = party.answer(requests[number])
        forged = bent(answer, step.reply, **case.changes)
        refused(case.reason, round_.server.receive, number, forged)
        round_.server.receive(number, answer)
    round_.finish()


def test_a_key_of_small_order_is_refused_when_it_is_used() -> None:
    """X25519 of it is the same with every secret."""
    round_ = Round(SUBJECTS["secagg"])
    planted = round_.to(1)
    for at in range(5):
        halves = but(1, lambda b: SMALL_ORDER + b[32:])
        request = bent(planted[at], round_.server.steps[1].request, bundles=halves)
        if at != 1:
            round_.server.receive(at, round_.parties[at].answer(request))
    requests = round_.to(2)
    letters = requests[0]
    refused(Reason.INVALID_KEY, round_.parties[0].answer, letters)


def test_two_clients_with_one_key_are_refused_on_both_sides() -> None:
    round_ = Round(SUBJECTS["secagg"])
    requests = round_.to(0)
    answers = {n: round_.parties[n].answer(requests[n]) for n in range(5)}
    round_.server.receive(0, answers[0])
    copied = readdressed(answers[0], sender=1)
    refused(Reason.REUSED_KEY, round_.server.receive, 1, copied)
    for n in range(1, 5):
        round_.server.receive(n, answers[n])
    request = bent(
        round_.to(1)[0], round_.server.steps[1].request, bundles=lambda d: {**d, 1: d[2]}
    )
    refused(Reason.REUSED_KEY, round_.parties[0].answer, request)


@pytest.mark.parametrize("name", ["secagg", "secagg-active", "secagg-plus"])
def test_wrong_shares_make_no_sum(name: str) -> None:
    """A client that hands out others' shares is not found, but nothing wrong comes of it."""
    round_ = Round(SUBJECTS[name])
    last = len(round_.server.steps) - 1
    requests = round_.to(last)
    for number, request in requests.items():
        answer = round_.parties[number].answer(request)
        if number == 0:
            answer = bent(answer, round_.server.steps[last].reply, seeds=_cycled)
        round_.server.receive(number, answer)
    with pytest.raises(Aborted):
        round_.server.close()


def _cycled(shares: dict[int, bytes]) -> dict[int, bytes]:
    return dict(zip(shares, [*list(shares.values())[1:], shares[min(shares)]], strict=True))


class Wide(FixedPoint):
    """Three of its vectors overflow 64 bits."""

    @property
    def bound(self) -> int:
        return 2**62


@pytest.mark.parametrize("name", EACH)
def test_a_sum_that_could_overflow_is_refused_before_the_round(name: str) -> None:
    with pytest.raises(InvalidInput, match="overflow"):
        Round(replace(SUBJECTS[name], encoding=Wide()))


@pytest.mark.parametrize("name", EACH)
def test_sums_at_the_edge_are_exact(name: str) -> None:
    subject = SUBJECTS[name]
    clip = subject.encoding.clip
    vectors = {c: np.array([clip, -clip, clip if c else -clip]) for c in range(subject.clients)}
    Round(subject, vectors=vectors).finish()
