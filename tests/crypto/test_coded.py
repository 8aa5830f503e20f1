"""LightSecAgg and FastSecAgg: exact sums within the design's limits, refusals beyond them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from gradleak.crypto import Aborted, FixedPoint, Reason, Rejected, Terms, keys
from gradleak.crypto.coded import AskKey, Key, Keys, Letters, Share
from gradleak.crypto.fastsecagg import FastSecAgg
from gradleak.crypto.field import M31
from gradleak.crypto.lightsecagg import LightSecAgg, LightSecAggParty, Masked, Survivors
from gradleak.crypto.rehearsal import rehearse, terms_for
from gradleak.crypto.wire import Words, encode
from gradleak.errors import InvalidInput
from tests.crypto.test_field import chi2

Coded = type[LightSecAgg] | type[FastSecAgg]
BOTH = pytest.mark.parametrize("protocol", [LightSecAgg, FastSecAgg])
STEPS = {LightSecAgg: 4, FastSecAgg: 3}
SENT = {LightSecAgg: 2, FastSecAgg: 1}
"""The step in which a vector leaves its client."""


def vectors(clients: int, length: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng([clients, length])
    return {7 * n + 2: rng.integers(-64, 65, length) / 8 for n in range(clients)}


def drawn(rng: np.random.Generator) -> tuple[int, int, int, dict[int, np.ndarray]]:
    """A round of 2 to 6 clients: their number, T, D < n − T, and vectors."""
    n = int(rng.integers(2, 7))
    private = int(rng.integers(1, n))
    dropped = int(rng.integers(0, n - private))
    return n, private, dropped, vectors(n, int(rng.integers(1, 12)))


def away(
    rng: np.random.Generator, protocol: Coded, given: dict[int, np.ndarray], count: int
) -> dict[int, int]:
    """So many dropouts, each at any step."""
    chosen = rng.choice(list(given), count, replace=False).tolist()
    return {client: int(rng.integers(STEPS[protocol])) for client in chosen}


@BOTH
def test_sums_are_exact_up_to_the_limit(protocol: Coded) -> None:
    """200 rounds with at most D dropouts: the sum is of the vectors that were sent."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        _, private, dropped, given = drawn(rng)
        drops = away(rng, protocol, given, int(rng.integers(dropped + 1)))
        total, cost = rehearse(protocol(private, dropped), given, drops=drops)
        sent = tuple(v for v in given if drops.get(v, STEPS[protocol]) > SENT[protocol])
        assert total.clients == sent
        assert np.array_equal(total.values, sum(given[v] for v in sent))
        assert not cost.rejected


@BOTH
def test_beyond_the_limit_there_is_no_sum(protocol: Coded) -> None:
    """50 rounds with more than D dropouts."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        n, private, dropped, given = drawn(rng)
        drops = away(rng, protocol, given, int(rng.integers(dropped + 1, n + 1)))
        with pytest.raises(Aborted, match=f"expected at least {n - dropped}"):
            rehearse(protocol(private, dropped), given, drops=drops)


@BOTH
@pytest.mark.parametrize("encoding", [FixedPoint(), FixedPoint(clip=2.0**20, fraction=26)])
def test_the_largest_sums_do_not_wrap_round(protocol: Coded, encoding: FixedPoint) -> None:
    """Every client at its bound, in the narrow field and in the wide one."""
    for sign in (1, -1):
        given = {n: np.full(3, sign * encoding.clip) for n in range(4)}
        total, _ = rehearse(protocol(), given, terms=terms_for(given, encoding), drops={1: 2})
        assert np.array_equal(total.values, sum(given[n] for n in total.clients))


@BOTH
def test_what_would_overflow_is_refused_beforehand(protocol: Coded) -> None:
    terms = Terms(bytes(16), tuple(range(300)), 4, FixedPoint(clip=2.0**20, fraction=32))
    with pytest.raises(InvalidInput, match="overflow"):
        protocol().check(terms)
    with pytest.raises(InvalidInput, match="privacy"):
        protocol().check(Terms(bytes(16), (3,), 4))


@BOTH
def test_a_client_may_move_to_another_process_between_steps(protocol: Coded) -> None:
    given = vectors(5, 6)
    server, parties = started(protocol, given)
    while requests := server.requests():
        for number, request in requests.items():
            moved = protocol().party(server.terms, number, partial(given.__getitem__, number))
            moved.keep(encode(parties[number].kept()))
            moved.step = parties[number].step
            parties[number] = moved
            server.receive(number, moved.answer(request))
        server.close()
    assert np.array_equal(server.total.values, sum(given.values()))


def started(protocol: Coded, given: dict[int, np.ndarray]) -> tuple[Any, dict[int, Any]]:
    terms = terms_for(given)
    parties = {n: protocol().party(terms, n, partial(given.__getitem__, n)) for n in given}
    return protocol().server(terms), parties


def advanced(
    protocol: Coded, step: int, given: dict[int, np.ndarray]
) -> tuple[Any, dict[int, Any]]:
    """A round whose first steps are done by all."""
    server, parties = started(protocol, given)
    for _ in range(step):
        for number, request in server.requests().items():
            server.receive(number, parties[number].answer(request))
        server.close()
    return server, parties


def uploads() -> np.ndarray:
    """What a server sees of equal vectors, one row for each of three clients."""
    server, parties = advanced(LightSecAgg, 2, {n: np.full(20_000, 0.25) for n in range(3)})
    return np.stack(
        [
            party.reply(2, server.ask(2)[number]).values.astype(np.uint64)
            for number, party in parties.items()
        ]
    )


def test_masked_vectors_are_uniform_and_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pearson's chi² in 64 cells, n = 20000 each, alpha = 1e-6: below 135. Also differences of
    two clients' uploads, which shared masks would cancel."""
    modulus = 2**31 - 1
    seen = uploads()
    assert max(chi2(row, modulus) for row in seen) < 135
    assert chi2((seen[0] + modulus - seen[1]) % modulus, modulus) < 135
    again = uploads()
    assert (seen != again).mean() > 0.99

    monkeypatch.setattr(
        LightSecAggParty, "_mask", lambda self, _: M31.uniform(bytes(32), self.terms.length)
    )
    seen = uploads()
    assert chi2((seen[0] + modulus - seen[1]) % modulus, modulus) > 135  # planted: one mask


@BOTH
def test_letters_hide_the_shares_from_the_server(protocol: Coded) -> None:
    """No letter opens without a key of its two ends, nor as another's letter, nor elsewhere."""
    server, parties = advanced(protocol, 2, vectors(3, 5))
    box = server.ask(2)[2].sealed
    opened = parties[2].opened(Letters(box))
    assert all(encode(Share(share)) not in box[v] for v, share in opened.items() if v != 2)
    for swapped in ({9: box[16], 16: box[9]}, {9: box[9], 16: box[16][:-1] + b"x"}):
        with pytest.raises(Rejected) as refusal:
            parties[2].reply(2, Letters(swapped))
        assert refusal.value.reason == Reason.NOT_AUTHENTIC
    with pytest.raises(Rejected, match=Reason.NOT_AUTHENTIC):
        parties[9].reply(2, Letters({2: box[9], 16: box[16]}))
    parties[2].reply(2, Letters(box))


def other_key(_: bytes) -> bytes:
    return keys.public_key(keys.fresh())


@BOTH
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda k: {2: k[2]}, Reason.TOO_FEW_PEERS),
        (lambda k: {9: k[9], 16: k[16], 23: k[23]}, Reason.WRONG_PEERS),
        (lambda k: {**k, 5: other_key(k)}, Reason.WRONG_PEERS),
        (lambda k: {**k, 2: other_key(k)}, Reason.INVALID_KEY),
        (lambda k: {**k, 9: k[16]}, Reason.REUSED_KEY),
        (lambda k: {**k, 9: bytes(32)}, Reason.INVALID_KEY),
        (lambda k: {**k, 9: k[9][:-1]}, Reason.INVALID_KEY),
    ],
)
def test_a_client_refuses_wrong_keys(protocol: Coded, spoil: Any, reason: Reason) -> None:
    server, parties = advanced(protocol, 1, vectors(4, 5))
    before = parties[2].kept()
    with pytest.raises(Rejected) as refusal:
        parties[2].reply(1, Keys(spoil(server.ask(1)[2].public)))
    assert refusal.value.reason == reason
    assert parties[2].kept() is before


@BOTH
def test_a_client_refuses_letters_of_too_few_or_of_strangers(protocol: Coded) -> None:
    server, parties = advanced(protocol, 2, vectors(4, 5))
    box = server.ask(2)[2].sealed
    before = parties[2].kept()
    for wrong, reason in [
        ({9: box[9]}, Reason.TOO_FEW_PEERS),
        ({**box, 5: box[9]}, Reason.WRONG_PEERS),
        ({**box, 2: box[9]}, Reason.WRONG_PEERS),
    ]:
        with pytest.raises(Rejected) as refusal:
            parties[2].reply(2, Letters(wrong))
        assert refusal.value.reason == reason
    key = parties[9].kept().keys[2]
    wrong_words: list[tuple[Words, Reason]] = [
        (np.zeros(1, np.uint32), Reason.WRONG_LENGTH),
        (np.zeros(5, np.uint64), Reason.MALFORMED),
        (np.full(5, 2**32 - 1, np.uint32), Reason.OUT_OF_RANGE),
    ]
    for values, reason in wrong_words:
        letter = keys.seal(key, encode(Share(values)), context=parties[9]._context(9, 2))
        with pytest.raises(Rejected) as refusal:
            parties[2].reply(2, Letters({**box, 9: letter}))
        assert refusal.value.reason == reason
    assert parties[2].kept() is before


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        ((2, 9), Reason.TOO_FEW_PEERS),
        ((2, 2, 9), Reason.INCONSISTENT_SURVIVORS),
        ((9, 2, 16), Reason.INCONSISTENT_SURVIVORS),
        ((9, 16, 23), Reason.INCONSISTENT_SURVIVORS),
        ((2, 9, 16, 30), Reason.INCONSISTENT_SURVIVORS),
    ],
)
def test_a_client_refuses_survivors_that_cannot_be(
    survivors: tuple[int, ...], reason: Reason
) -> None:
    _, parties = advanced(LightSecAgg, 3, vectors(4, 5))
    with pytest.raises(Rejected) as refusal:
        parties[2].reply(3, Survivors(survivors))
    assert refusal.value.reason == reason
    parties[2].reply(3, Survivors((2, 9, 16)))


def test_a_client_answers_once() -> None:
    server, parties = advanced(LightSecAgg, 3, vectors(4, 5))
    request = server.requests()[2]
    parties[2].answer(request)
    with pytest.raises(Rejected, match=Reason.REPEATED):
        parties[2].answer(request)


@BOTH
@pytest.mark.parametrize(
    ("step", "reply", "reason"),
    [
        (0, lambda r: Key(b""), Reason.INVALID_KEY),
        (0, lambda r: Key(bytes(32)), Reason.INVALID_KEY),
        (1, lambda r: Letters({}), Reason.WRONG_PEERS),
        (1, lambda r: Letters({**r.sealed, 2: r.sealed[9]}), Reason.WRONG_PEERS),
        (1, lambda r: Letters({**r.sealed, 9: b""}), Reason.WRONG_LENGTH),
        (-1, lambda r: Share(r.values[1:]), Reason.WRONG_LENGTH),
        (-1, lambda r: Share(r.values.astype(np.uint64)), Reason.MALFORMED),
        (-1, lambda r: Share(r.values | np.uint32(2**31)), Reason.OUT_OF_RANGE),
    ],
)
def test_the_server_refuses_wrong_answers(
    protocol: Coded, step: int, reply: Any, reason: Reason
) -> None:
    step %= STEPS[protocol]
    server, parties = advanced(protocol, step, vectors(4, 5))
    right = parties[2].reply(step, server.ask(step)[2])
    with pytest.raises(Rejected) as refusal:
        server.accept(step, 2, reply(right))
    assert refusal.value.reason == reason
    server.accept(step, 2, right)


def test_the_server_refuses_wrong_uploads_and_a_key_given_twice() -> None:
    server, parties = advanced(LightSecAgg, 2, vectors(4, 5))
    for values in (np.zeros(4, np.uint32), np.full(5, 2**31 - 1, np.uint32)):
        with pytest.raises(Rejected):
            server.accept(2, 2, Masked(values))
    server, parties = started(LightSecAgg, vectors(4, 5))
    key = parties[2].reply(0, AskKey())
    server.accept(0, 2, key)
    with pytest.raises(Rejected, match=Reason.REUSED_KEY):
        server.accept(0, 9, key)


@BOTH
def test_a_wrong_sum_of_shares_among_more_than_enough_ends_the_round(protocol: Coded) -> None:
    last = STEPS[protocol] - 1
    server, parties = advanced(protocol, last, vectors(5, 6))
    for number, request in server.ask(last).items():
        reply = parties[number].reply(last, request)
        if number == 9:
            reply = Share(reply.values ^ np.uint32(1))
        server.accept(last, number, reply)
        server.answered[last].append(number)
    with pytest.raises(Aborted, match="contradict"):
        server.close()


@BOTH
def test_nothing_secret_is_kept_longer_than_needed(protocol: Coded) -> None:
    """After an upload, no client knows the seed of its own mask any more."""
    _, parties = advanced(protocol, SENT[protocol] + 1, vectors(4, 5))
    assert not any(party.kept().seed for party in parties.values())
