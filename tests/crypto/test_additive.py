"""Additive sharing: exact sums, one list of clients, and shares that tell nothing alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from scipy.stats import chisquare

from gradleak.crypto import Aborted, FixedPoint, Reason, Rejected, keys
from gradleak.crypto.additive import STEPS, AdditiveHelper, AdditiveMpc, Kept, Shares
from gradleak.crypto.protocol import HELPER, Envelope, Party, Server, Terms
from gradleak.crypto.rehearsal import Cost, rehearse, terms_for
from gradleak.crypto.wire import decode, encode
from gradleak.errors import InvalidInput
from tests.crypto.forging import Change, flipped, forged, one

TWO, THREE = AdditiveMpc(), AdditiveMpc(servers=3)
VECTORS = {n: np.arange(20) / 8 - n for n in (0, 2, 3, 7)}
by_servers = pytest.mark.parametrize("protocol", [TWO, THREE], ids=["two", "three"])


@by_servers
def test_200_rounds_are_exact_or_abort(protocol: AdditiveMpc) -> None:
    draw, aborted = np.random.default_rng(protocol.servers), 0
    for _ in range(200):
        clients = sorted(map(int, draw.choice(50, draw.integers(2, 6), replace=False)))
        length = int(draw.integers(1, 30))
        vectors = {c: draw.integers(-(2**23), 2**23 + 1, length) / 2**20 for c in clients}
        drops = {c: int(draw.integers(1, 4)) for c in clients if draw.random() < 0.4}
        if draw.random() < 0.1:
            drops[HELPER + int(draw.integers(protocol.helpers))] = int(draw.choice([0, 2, 3]))
        left = [c for c in clients if drops.get(c, 4) > 1]
        try:
            total, _ = rehearse(protocol, vectors, drops=drops)
        except Aborted:
            assert len(left) < 2 or max(drops) >= HELPER
            aborted += 1
            continue
        assert total.clients == tuple(left)
        assert np.array_equal(total.values, sum(vectors[c] for c in left))
    assert 10 < aborted < 150


@by_servers
@pytest.mark.parametrize("step", [0, 2, 3])
def test_no_helping_server_may_drop_out(protocol: AdditiveMpc, step: int) -> None:
    with pytest.raises(Aborted, match="helping servers"):
        rehearse(protocol, VECTORS, drops={HELPER: step})


def test_the_largest_entries_fit_and_no_more() -> None:
    vectors = {n: np.full(5, (-1.0) ** n * 2.0**31) for n in range(4)}
    vectors |= dict.fromkeys(range(4, 2**5), vectors[0])
    terms = terms_for(vectors, FixedPoint(clip=2.0**31, fraction=21))
    total, _ = rehearse(TWO, vectors, terms=terms)
    assert np.array_equal(total.values, sum(vectors.values()))
    many = Terms(bytes(16), tuple(range(2**12)), 5, FixedPoint(clip=2.0**31, fraction=21))
    with pytest.raises(InvalidInput, match="overflow"):
        TWO.check(many)
    for wrong in ({"servers": 1}, {"servers": 4}):
        with pytest.raises(InvalidInput, match="servers"):
            AdditiveMpc(**wrong)
    for minimum in (1, 33):
        with pytest.raises(InvalidInput, match="minimum"):
            AdditiveMpc(minimum=minimum).check(terms)


def tampered(where: str, step: int, party: int, change: Change) -> Cost:
    kind = STEPS[step].request if where == "down" else STEPS[step].reply

    def tamper(at: int, number: int, raw: bytes) -> bytes:
        return forged(raw, kind, change) if (at, number) == (step, party) else raw

    total, cost = rehearse(THREE, VECTORS, **{where: tamper})  # type: ignore[arg-type]
    assert np.array_equal(total.values, sum(VECTORS[c] for c in total.clients))
    assert 2 not in total.clients
    return cost


@pytest.mark.parametrize(
    ("where", "change", "reason"),
    [
        ("up", lambda m: {"share": m.share[1:]}, Reason.WRONG_LENGTH),
        ("up", lambda m: {"share": m.share.astype(np.uint32)}, Reason.WRONG_LENGTH),
        ("up", lambda m: {"letters": {HELPER: b""}}, Reason.WRONG_PEERS),
        ("down", lambda m: {"keys": {}}, Reason.WRONG_PEERS),
        ("down", lambda m: {"keys": {**m.keys, HELPER + 2: bytes(32)}}, Reason.WRONG_PEERS),
        ("down", lambda m: {"keys": {**m.keys, HELPER: bytes(32)}}, Reason.INVALID_KEY),
        ("down", lambda m: {"keys": {**m.keys, HELPER: bytes(3)}}, Reason.INVALID_KEY),
    ],
)
def test_a_lie_to_or_of_a_client_leaves_the_others(
    where: str, change: Change, reason: Reason
) -> None:
    assert tampered(where, 1, 2, change).rejected == {2: reason}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {"share": m.share + np.uint64(1)},
        lambda m: {"key": keys.public_key(keys.fresh())},
        lambda m: {"key": bytes(32)},
        lambda m: {"letters": one(m.letters, flipped)},
        lambda m: {"letters": one(m.letters, lambda letter: letter[:5])},
        lambda m: {"letters": {HELPER: m.letters[HELPER + 1], HELPER + 1: m.letters[HELPER]}},
    ],
)
def test_an_upload_that_a_letter_does_not_vouch_for_is_left_out_by_all(change: Change) -> None:
    """Even where one helping server alone could tell: both sum over the same clients."""
    assert not tampered("up", 1, 2, change).rejected


PER_CLIENT = ("letters", "keys", "digests")
HELPER_LIES: list[tuple[str, int, Change, Reason]] = [
    ("up", 0, lambda m: {"key": m.key[1:]}, Reason.INVALID_KEY),
    ("up", 2, lambda m: {"clients": (0, 9)}, Reason.WRONG_PEERS),
    ("up", 2, lambda m: {"clients": (2, 0)}, Reason.WRONG_PEERS),
    ("up", 2, lambda m: {"lists": {}}, Reason.WRONG_PEERS),
    ("up", 3, lambda m: {"share": m.share[1:]}, Reason.WRONG_LENGTH),
    ("down", 2, lambda m: {"helpers": {HELPER: bytes(32)}}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {"helpers": {**m.helpers, HELPER: bytes(32)}}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {"helpers": {**m.helpers, HELPER + 1: bytes(32)}}, Reason.INVALID_KEY),
    ("down", 2, lambda m: {"letters": {9: b""}}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {"keys": {}}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {"digests": {}}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {k: {2: getattr(m, k)[2]} for k in PER_CLIENT}, Reason.TOO_FEW_PEERS),
    ("down", 3, lambda m: {"clients": (0, 2, 3)}, Reason.INCONSISTENT_SURVIVORS),
    ("down", 3, lambda m: {"clients": (0, 2)}, Reason.INCONSISTENT_SURVIVORS),
    ("down", 3, lambda m: {"clients": (2,)}, Reason.INCONSISTENT_SURVIVORS),
    ("down", 3, lambda m: {"clients": ()}, Reason.INCONSISTENT_SURVIVORS),
    ("down", 3, lambda m: {"clients": (2, 0, 3, 7)}, Reason.INCONSISTENT_SURVIVORS),
    ("down", 3, lambda m: {"clients": (0, 2, 3, 7, 9)}, Reason.INCONSISTENT_SURVIVORS),
    ("down", 3, lambda m: {"lists": {}}, Reason.WRONG_PEERS),
    ("down", 3, lambda m: {"lists": one(m.lists, flipped)}, Reason.NOT_AUTHENTIC),
]  # fmt: skip


@pytest.mark.parametrize(("where", "step", "change", "reason"), HELPER_LIES)
def test_a_lie_to_or_of_a_helping_server_ends_the_round_by_name(
    where: str, step: int, change: Change, reason: Reason
) -> None:
    kind = STEPS[step].request if where == "down" else STEPS[step].reply
    found: list[tuple[int, int, Reason]] = []
    server, parties = sides(THREE, terms_for(VECTORS))
    while not found:
        for number, request in server.requests().items():
            lies = (server.step, number) == (step, HELPER)
            if lies and where == "down":
                request = forged(request, kind, change)
            try:
                reply = parties[number].answer(request)
                if lies and where == "up":
                    reply = forged(reply, kind, change)
                server.receive(number, reply)
            except Rejected as refusal:
                found.append((server.step, number, refusal.reason))
        if not found:
            server.close()
    assert found == [(step, HELPER, reason)]
    with pytest.raises(Aborted, match="helping servers"):
        server.close()


def sides(protocol: AdditiveMpc, terms: Terms) -> tuple[Server, dict[int, Party]]:
    parties = {c: protocol.party(terms, c, lambda c=c: VECTORS[c]) for c in terms.clients}  # type: ignore[misc]
    helpers = {h: protocol.party(terms, h) for h in protocol.numbers()}
    return protocol.server(terms), {**parties, **helpers}


def test_a_helping_server_tells_one_sum_only() -> None:
    terms = terms_for(VECTORS)
    server, parties = sides(TWO, terms)
    for _ in range(3):
        for number, request in server.requests().items():
            server.receive(number, parties[number].answer(request))
        server.close()
    request = server.requests()[HELPER]
    resumed = TWO.party(terms, HELPER)
    assert isinstance(resumed, AdditiveHelper)
    resumed.keep(encode(parties[HELPER].kept()))
    resumed.step = parties[HELPER].step
    answer = resumed.answer(request)
    with pytest.raises(Rejected, match=Reason.REPEATED):
        resumed.answer(request)
    with pytest.raises(Rejected, match=Reason.REPEATED):
        resumed.answer(forged(request, STEPS[3].request, lambda m: {"clients": (0, 2)}))
    server.receive(HELPER, answer)
    server.close()
    assert np.array_equal(server.total.values, sum(VECTORS.values()))


def test_lists_from_another_session_or_for_another_reader_are_refused() -> None:
    one_server, one_side = sides(THREE, terms_for(VECTORS))
    two_server, two_side = sides(THREE, terms_for(VECTORS))
    for server, side in ((one_server, one_side), (two_server, two_side)):
        for _ in range(3):
            for number, request in server.requests().items():
                server.receive(number, side[number].answer(request))
            server.close()
    ours, theirs = one_server.requests(), two_server.requests()
    with pytest.raises(Rejected, match=Reason.OTHER_SESSION):
        one_side[HELPER].answer(theirs[HELPER])
    foreign = decode(STEPS[3].request, decode(Envelope, theirs[HELPER]).body).lists
    with pytest.raises(Rejected, match=Reason.NOT_AUTHENTIC):
        one_side[HELPER].answer(
            forged(ours[HELPER], STEPS[3].request, lambda m: {"lists": foreign})
        )


def views(protocol: AdditiveMpc, vector: float) -> list[Shares]:
    """What each server holds of one client's vector of 40000 equal entries."""
    vectors = {0: np.full(40_000, vector), 1: np.zeros(40_000)}
    shares: dict[int, Shares] = {}

    def up(step: int, number: int, raw: bytes) -> bytes:
        if (step, number) == (1, 0):
            shares[-1] = decode(STEPS[1].reply, decode(Envelope, raw).body).share
        return raw

    terms = terms_for(vectors)
    server = protocol.server(terms)
    parties = {c: protocol.party(terms, c, lambda c=c: vectors[c]) for c in vectors}  # type: ignore[misc]
    parties |= {h: protocol.party(terms, h) for h in protocol.numbers()}
    while requests := server.requests():
        for number, request in requests.items():
            server.receive(number, up(server.step, number, parties[number].answer(request)))
            kept = parties[number].kept()
            if number >= HELPER and isinstance(kept, Kept) and 0 in kept.seeds:
                shares[number] = keys.words64(kept.seeds[0], 40_000)
        server.close()
    assert np.array_equal(server.total.values, sum(vectors.values()))
    return [shares[key] for key in sorted(shares)]


def uniform(words: Shares) -> float:
    """Smallest p of a chi-square over each of the eight bytes."""
    split = words.astype("<u8").view(np.uint8).reshape(-1, 8)
    return min(float(chisquare(np.bincount(split[:, k], minlength=256)).pvalue) for k in range(8))


@by_servers
def test_all_but_one_share_together_are_uniform(protocol: AdditiveMpc) -> None:
    """n = 40000 words of 8 bytes, every proper subset's sum; alpha = 1e-8 each, < 1e-6 in all."""
    shares = views(protocol, 3.0)
    assert len(shares) == protocol.servers
    for left_out in range(len(shares)):
        others = [share for k, share in enumerate(shares) if k != left_out]
        assert uniform(np.sum(others, axis=0, dtype=np.uint64)) > 1e-8
        assert all(uniform(share) > 1e-8 for share in others)
    whole: Shares = np.stack(shares).sum(axis=0, dtype=np.uint64)
    assert set(whole.tolist()) == {3 * 2**20}
    assert uniform(whole) < 1e-8
    assert uniform(shares[0] & np.uint64(2**63 - 1)) < 1e-8  # one bit that is always zero is found


def test_shares_of_two_rounds_have_nothing_in_common() -> None:
    """n = 40000 words; alpha = 1e-8."""
    first, second = views(TWO, 3.0), views(TWO, 3.0)
    assert uniform(first[0] - second[0]) > 1e-8
    assert uniform(first[1] - second[1]) > 1e-8
    assert uniform(first[0] - first[0]) < 1e-8


def test_a_seed_used_twice_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck: Mapping[int, bytes] = {32: b"\x07" * 32}
    monkeypatch.setattr(keys, "fresh", lambda size=32: stuck.get(size, bytes(size)))
    with pytest.raises(Aborted, match="helping servers"):  # three helpers' keys collide
        rehearse(THREE, VECTORS)
    assert uniform(views(TWO, 3.0)[0] - views(TWO, 3.0)[0]) < 1e-8
