"""Envelopes, steps and bookkeeping, on the smallest protocol."""

from __future__ import annotations

import numpy as np
import pytest

from gradleak.crypto import Aborted, FixedPoint, Reason, Rejected, Terms
from gradleak.crypto.encoding import centred, fits
from gradleak.crypto.rehearsal import rehearse, terms_for
from gradleak.errors import InvalidInput
from tests.crypto.plain import Plain

VECTORS = {n: np.arange(5) / 4 - n for n in range(4)}


def test_the_sum_is_exact_and_dropouts_are_not_in_it() -> None:
    total, cost = rehearse(Plain(), VECTORS, drops={2: 0})
    assert total.clients == (0, 1, 3)
    assert np.array_equal(total.values, sum(VECTORS[n] for n in total.clients))
    assert set(cost.bytes_up) == {0, 1, 3}
    assert not cost.rejected


def test_nobody_left_aborts() -> None:
    with pytest.raises(Aborted, match="no client"):
        rehearse(Plain(), VECTORS, drops=dict.fromkeys(VECTORS, 0))


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda raw: raw[:-1], Reason.TRUNCATED),
        (lambda raw: raw + b"x", Reason.TRAILING_BYTES),
        (lambda raw: raw.replace(b"plain", b"plane"), Reason.OTHER_PROTOCOL),
        (lambda raw: raw[:13] + bytes(16) + raw[29:], Reason.OTHER_SESSION),
    ],
)
def test_a_changed_answer_is_refused_by_name(tamper: object, reason: Reason) -> None:
    total, cost = rehearse(Plain(), VECTORS, up=lambda s, n, raw: tamper(raw) if n == 1 else raw)  # type: ignore[operator]
    assert 1 not in total.clients
    assert cost.rejected[1] == reason


def test_another_session_step_and_sender_are_refused() -> None:
    terms, other = terms_for(VECTORS), terms_for(VECTORS)
    server, party = Plain().server(terms), Plain().party(terms, 0, lambda: VECTORS[0])
    stranger = Plain().party(terms, 1, lambda: VECTORS[1])
    late = Plain().party(other, 0, lambda: VECTORS[0])
    requests = server.requests()
    answer = party.answer(requests[0])
    with pytest.raises(Rejected, match=Reason.REPEATED):
        party.answer(requests[0])
    with pytest.raises(Rejected, match=Reason.OTHER_SESSION):
        late.answer(requests[0])
    with pytest.raises(Rejected, match=Reason.OTHER_SENDER):
        server.receive(0, stranger.answer(requests[1]))
    with pytest.raises(Rejected, match=Reason.UNKNOWN_SENDER):
        server.receive(9, answer)
    server.receive(0, answer)
    with pytest.raises(Rejected, match=Reason.REPEATED):
        server.receive(0, answer)
    server.close()
    assert server.total.clients == (0,)


def test_stochastic_rounding_is_unbiased() -> None:
    """n = 200000 draws, alpha = 1e-6 (4.9 standard errors of a Bernoulli's mean)."""
    drawn = FixedPoint(clip=1, fraction=2).encode(np.full(200_000, 0.3))
    assert set(np.unique(drawn)) == {1, 2}
    error = abs(drawn.mean() - 1.2)
    assert error < 4.9 * (0.2 * 0.8 / 200_000) ** 0.5
    assert abs(np.floor(np.full(200_000, 1.2)).mean() - 1.2) > 0.1  # rounding down is found


def test_overflow_is_found_before_it_happens() -> None:
    encoding = FixedPoint(clip=8, fraction=20)
    fits(encoding, clients=255, modulus=2**32)
    with pytest.raises(InvalidInput, match="at most 255 clients"):
        fits(encoding, clients=256, modulus=2**32)
    wrapped = np.array([2**31 - 2, 2**31 - 1, 0, 1], np.uint64)
    assert centred(np.array([2**31 - 2, 0, 1], np.uint64), 2**31 - 1).tolist() == [-1, 0, 1]
    assert centred(wrapped, 2**32).tolist() == [2**31 - 2, 2**31 - 1, 0, 1]
    assert centred(np.array([2**64 - 3], np.uint64), 2**64).tolist() == [-3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": b"short"},
        {"clients": (2, 1)},
        {"clients": ()},
        {"length": 0},
    ],
)
def test_terms_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Terms(**{"session": bytes(16), "clients": (0, 1), "length": 3, **wrong})  # type: ignore[arg-type]
