"""SecAgg and SecAgg+: exact sums, uniform masks, what coalitions see, and what is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from gradleak.crypto import Aborted, FixedPoint, Reason, Rejected, Terms, keys, masking
from gradleak.crypto.masking import (
    Keys,
    Letters,
    Mailbox,
    Masked,
    Masking,
    Roster,
    Shares,
    Signature,
    Signatures,
    Survivors,
    fold,
)
from gradleak.crypto.protocol import SERVER, SESSION, _open, _wrap
from gradleak.crypto.rehearsal import rehearse
from gradleak.crypto.secagg import SecAgg
from gradleak.crypto.secagg_plus import SecAggPlus, _tail, degree
from gradleak.crypto.sharing import join
from gradleak.crypto.wire import encode
from gradleak.errors import InvalidInput

STEP = 2.0**-18
NARROW, WIDE = FixedPoint(8, 18), FixedPoint(2.0**30, 18)
RING = SecAggPlus(neighbours=2, dropouts=0.4)
PROTOCOLS: dict[str, tuple[Masking, int]] = {
    "secagg": (SecAgg(), 4),
    "active": (SecAgg(active=True), 4),
    "ring": (RING, 5),
    "plus": (SecAggPlus(colluding=0.2), 5),
    "active-plus": (SecAggPlus(neighbours=4, dropouts=0.2, active=True), 6),
}
Tamper = Callable[[Any], Any]


@dataclass
class Round:
    """A round whose messages a test can open, change and hold back."""

    protocol: Masking
    vectors: Mapping[int, Any]
    encoding: FixedPoint = NARROW

    def __post_init__(self) -> None:
        secrets = {n: keys.signing_key() for n in self.vectors}
        verifying = {n: keys.verifying_key(s) for n, s in secrets.items()}
        length = len(next(iter(self.vectors.values())))
        numbers = tuple(sorted(self.vectors))
        self.terms = Terms(keys.fresh(SESSION), numbers, length, self.encoding, verifying)
        self.protocol.check(self.terms)
        self.secrets = secrets
        self.server: Any = self.protocol.server(self.terms)
        self.parties: dict[int, Any] = {n: self.party(n) for n in numbers}

    def party(self, number: int) -> Any:
        made = self.protocol.party(self.terms, number, lambda: self.vectors[number])
        made.signing = self.secrets[number]
        return made

    def until(self, step: int, gone: Mapping[int, int] | None = None) -> Round:
        """Play all steps before this one."""
        for at in range(self.server.step, step):
            for number, request in self.server.requests().items():
                if (gone or {}).get(number, step) > at:
                    self.server.receive(number, self.parties[number].answer(request))
            self.server.close()
        return self

    def request(self, number: int, message: object) -> bytes:
        """The server's message of the open step, whatever it says."""
        return _wrap(self.protocol.id, self.terms, self.server.step, SERVER, message)

    def asked(self, number: int) -> Any:
        """The open step's message to a party."""
        kind = self.server.steps[self.server.step].request
        step = self.server.step
        raw = self.server.requests()[number]
        return _open(raw, self.protocol.id, self.terms, step, SERVER, kind)

    def answered(self, number: int) -> Any:
        """A party's answer to the open step, opened."""
        step = self.server.step
        raw = self.parties[number].answer(self.server.requests()[number])
        kind = self.server.steps[step].reply
        return _open(raw, self.protocol.id, self.terms, step, number, kind)

    def receive(self, number: int, message: object) -> None:
        self.server.receive(
            number, _wrap(self.protocol.id, self.terms, self.server.step, number, message)
        )


def vectors_of(clients: int, length: int = 3, *, seed: int = 0) -> dict[int, Any]:
    drawn = np.random.default_rng(seed).integers(-(2**21), 2**21, (clients, length))
    return {3 * n: drawn[n] * STEP for n in range(clients)}


def outcome(protocol: Masking, terms: Terms, gone: Mapping[int, int]) -> tuple[int, ...] | None:
    """Whose sum there must be, by sets alone; None for none."""
    rules = protocol.rules(terms)
    last = len(rules.steps) - 1
    left = [{c for c in terms.clients if gone.get(c, last + 1) > s} for s in range(last + 1)]
    summed = left[2]
    for step, here in enumerate(left):
        open_to = {c for c in left[1] if set(rules.peers(c)) & summed}
        owners = here if step < 2 else summed | open_to
        shares = [len(here & set(rules.peers(c))) for c in owners]
        if len(here) < rules.quorum or min(shares) < rules.threshold:
            return None
    return tuple(sorted(summed))


@pytest.mark.parametrize("rounds", [30, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_sums_are_exact_or_there_is_none(name: str, rounds: int) -> None:
    """Clients are lost at every step, within the limit and beyond it."""
    protocol, clients = PROTOCOLS[name]
    draw = random.Random(name)
    made = aborted = 0
    for trial in range(rounds):
        vectors = vectors_of(clients, draw.choice((1, 7)), seed=trial)
        game = Round(protocol, vectors, WIDE if draw.random() < 0.2 else NARROW)
        lost = draw.sample(sorted(vectors), draw.choice((0, 1, 1, 1, 2)))
        gone = {c: draw.randrange(len(game.server.steps)) for c in lost}
        expected = outcome(protocol, game.terms, gone)
        try:
            total, cost = rehearse(
                protocol, vectors, terms=game.terms, drops=gone, signing=game.secrets
            )
        except Aborted:
            assert expected is None
            aborted += 1
            continue
        assert total.clients == expected
        assert np.array_equal(total.values, sum(vectors[c] for c in total.clients))
        assert not cost.rejected
        made += 1
    assert made > rounds / 3
    assert aborted > rounds / 20


def test_the_limit_of_secagg_is_its_threshold() -> None:
    vectors = vectors_of(5)
    for step in range(4):
        total, _ = rehearse(SecAgg(threshold=3), vectors, drops={0: step, 6: step})
        assert len(total.clients) == (5 if step == 3 else 3)
        with pytest.raises(Aborted, match="2 clients are left: expected at least 3"):
            rehearse(SecAgg(threshold=3), vectors, drops={0: step, 6: 3, 12: step})


def test_masks_are_one_key_stream_each_whatever_the_blocks(monkeypatch: Any) -> None:
    seeds = [keys.fresh() for _ in range(3)]
    for count, word, words in (
        (70_001, np.uint32, keys.words32),
        (33_333, np.uint64, keys.words64),
    ):
        found = np.zeros(count, word)
        fold(found, plus=seeds[:2], minus=seeds[2:])
        a, b, c = (words(s, count) for s in seeds)  # type: ignore[operator]
        assert np.array_equal(found, a + b - c)


def test_pairwise_masks_cancel() -> None:
    for protocol in (SecAgg(), RING):
        game = Round(protocol, {n: np.zeros(50) for n in range(5)}).until(2)
        total = np.zeros(50, np.uint32)
        for n, party in game.parties.items():
            total += game.answered(n).values
            fold(total, plus=[], minus=[party._memory.seed])
        assert not total.any()


def too_large(chi2: float, degrees: int) -> bool:
    """A chi-square above its quantile at 1 − 1e-6, by Wilson and Hilferty."""
    spread = 2 / (9 * degrees)
    return bool(chi2 > degrees * (1 - spread + 4.753 * spread**0.5) ** 3)


def looks_random(raw: bytes) -> bool:
    """No bit of a byte and no byte comes too often; alpha = 2e-6 altogether."""
    values = np.frombuffer(raw, np.uint8)
    bits = np.unpackbits(values).reshape(-1, 32).sum(0)
    rows = len(values) / 4
    by_bit = float(((bits - rows / 2) ** 2 / (rows / 4)).sum())
    counts = np.bincount(values, minlength=256)
    by_byte = float(((counts - len(values) / 256) ** 2).sum() / (len(values) / 256))
    return not too_large(by_bit, 32) and not too_large(by_byte, 255)


def upload(length: int = 20_000) -> Masked:
    game = Round(SecAgg(), {n: np.zeros(length) for n in range(3)}).until(2)
    found: Masked = game.answered(0)
    return found


def test_masked_uploads_are_uniform(monkeypatch: Any) -> None:
    """n = 20000 words of one upload, alpha = 2e-6; no mask, and masks of small words, are found."""
    assert looks_random(upload().values.tobytes())
    monkeypatch.setattr(masking, "fold", lambda words, plus, minus: None)
    assert not looks_random(upload().values.tobytes())

    def small(words: Any, plus: Any, minus: Any) -> None:
        words += np.random.default_rng(0).integers(0, 2**28, len(words), np.uint32)

    monkeypatch.setattr(masking, "fold", small)
    assert not looks_random(upload().values.tobytes())


def seeds_of_rounds(rounds: int, monkeypatch: Any) -> list[list[bytes]]:
    """All seeds that clients mask with, by round, each once per client who uses it."""
    used: list[list[bytes]] = []
    with monkeypatch.context() as patch:
        patch.setattr(masking, "fold", lambda words, plus, minus: used[-1].extend((*plus, *minus)))
        for _ in range(rounds):
            used.append([])
            game = Round(SecAgg(), vectors_of(4)).until(2)
            for n in game.parties:
                game.answered(n)
    return used


def stale_bits(seeds: list[bytes]) -> int:
    """Bits of seeds that come too often or too seldom (n seeds, alpha = 1e-6 each, two-sided)."""
    bits = np.unpackbits(np.frombuffer(b"".join(seeds), np.uint8)).reshape(len(seeds), -1)
    far = abs(bits.sum(0) - len(seeds) / 2) > 4.9 * (len(seeds) / 4) ** 0.5
    return int(far.sum())


def test_seeds_are_fresh_and_have_256_bits(monkeypatch: Any) -> None:
    """10 rounds of 10 seeds, 100 in all; seeds of 28 bits and seeds used again are found."""
    used = seeds_of_rounds(10, monkeypatch)
    for seeds in used:  # 4 own ones, and 6 of pairs, twice each
        assert sorted(map(seeds.count, set(seeds))) == [1] * 4 + [2] * 6
    distinct = [s for seeds in used for s in set(seeds)]
    assert len(set(distinct)) == 100
    assert {len(s) for s in distinct} == {32}
    assert stale_bits(distinct) == 0

    whole = keys.agreed_each

    def weak(secret: bytes, publics: Any, *, purpose: bytes) -> list[bytes]:
        def fold28(seed: bytes) -> bytes:
            return (int.from_bytes(seed[:4], "little") & 0x7F7F7F7F).to_bytes(32, "little")

        return [fold28(s) for s in whole(secret, publics, purpose=purpose)]

    monkeypatch.setattr(keys, "agreed_each", weak)
    pairs = [s for seeds in seeds_of_rounds(10, monkeypatch) for s in seeds if seeds.count(s) == 2]
    assert stale_bits(pairs) == 256 - 28
    monkeypatch.setattr(keys, "agreed_each", whole)
    again = iter(itertools.cycle(bytes([i]) * 32 for i in range(1, 13)))
    monkeypatch.setattr(keys, "fresh", lambda size=32: next(again)[:size])
    again_used = seeds_of_rounds(2, monkeypatch)
    assert len({s for seeds in again_used for s in seeds}) < 20


def left_open(
    game: Round, coalition: set[int], used: Mapping[int, tuple[list[bytes], list[bytes]]]
):  # type: ignore[no-untyped-def]
    """Honest survivors, and the rank of the masks on them that server and coalition do not know.

    Also the largest number of shares that they have of any secret that the round has not opened.
    """
    server, summed = game.server, sorted(game.server._survivors)
    rules, lost = server._rules, game.server._dropped
    known = {s for c in coalition for kind in used.get(c, ([], [])) for s in kind}
    known |= {join(server._seed_shares[u], rules.threshold) for u in summed}
    for u in lost:
        known |= {s for kind in used[u] for s in kind if s != game.parties[u]._memory.seed}
    honest = [u for u in summed if u not in coalition]
    unknown = sorted({s for u in honest for kind in used[u] for s in kind} - known)
    rows = [
        [(s in used[u][0]) - (s in used[u][1]) for s in unknown] for u in honest
    ]  # what stays on each upload
    shares = 0
    for u in set(game.parties) - coalition:
        name = "key_shares" if u in summed else "seed_shares"
        opened = server._key_shares if u in summed else server._seed_shares
        have = sum(u in getattr(game.parties[c]._memory, name) for c in coalition)
        shares = max(shares, have + len(opened.get(u, {})))
    rank = np.linalg.matrix_rank(np.array(rows, float)) if unknown else 0
    return honest, int(rank), shares


@pytest.mark.parametrize(
    ("protocol", "clients", "most"),
    [(SecAgg(), 5, 2), (SecAggPlus(neighbours=4, dropouts=0.4), 7, 2)],
)
def test_coalitions_below_the_threshold_see_only_the_sum(
    protocol: Masking, clients: int, most: int, monkeypatch: Any
) -> None:
    """Exact: the masks left on honest uploads have rank h − 1, so every split of the sum is alike.

    All coalitions; one client is lost before its upload. A client without pairwise masks, and a
    threshold's worth of colluders, are found by the same measures.
    """
    used: dict[int, tuple[list[bytes], list[bytes]]] = {}
    whole = fold
    game = Round(protocol, {n: np.zeros(2) for n in range(clients)}).until(2)
    for n, party in game.parties.items():

        def watch(words: Any, plus: Any, minus: Any, n: int = n) -> None:
            used[n] = (list(plus), list(minus))
            whole(words, plus=plus, minus=minus)

        monkeypatch.setattr(masking, "fold", watch)
        raw = party.answer(game.server.requests()[n])
        monkeypatch.setattr(masking, "fold", whole)
        if n != 1:
            game.server.receive(n, raw)
    game.server.close()
    game.until(4)
    threshold = game.server._rules.threshold
    for size in range(most + 1):
        for coalition in itertools.combinations(range(clients), size):
            honest, rank, shares = left_open(game, set(coalition), used)
            assert shares < threshold, coalition
            assert rank == len(honest) - 1, coalition
    full = set(game.server._rules.peers(0)[-threshold:])
    assert left_open(game, full, used)[2] >= threshold
    pairs = {s for kind in used[0] for s in kind}
    bare = {
        n: ([s for s in plus if s not in pairs], [s for s in minus if s not in pairs])
        for n, (plus, minus) in used.items()
    }
    honest, rank, _ = left_open(game, set(), bare)  # client 0 has no mask with anybody
    assert rank == len(honest) - 2


def lying_server(game: Round) -> tuple[Round, dict[int, Survivors]]:
    """All have uploaded; 0 and 3 are told that all survive, 6 and 9 that client 0 does not."""
    game.until(3)
    everybody = tuple(game.vectors)
    lists = {n: everybody if n in (0, 3, 12) else everybody[1:] for n in game.vectors}
    return game, {n: Survivors(numbers) for n, numbers in lists.items()}


def test_two_lists_and_one_colluder_open_a_vector_if_nobody_checks() -> None:
    """Known weakness of the passive mode: n = 5, t = 3, client 12 helps the lying server."""
    vectors = vectors_of(5)
    game = Round(SecAgg(), vectors)
    game.until(2)
    uploads = {n: game.answered(n).values for n in vectors}
    for n, values in uploads.items():
        game.receive(n, Masked(values))
    game.server.close()
    game, lists = lying_server(game)
    colluder = game.parties[12]._memory
    seeds, masking_keys = {12: colluder.seed_shares[0]}, {12: colluder.key_shares[0]}
    for n in (0, 3, 6, 9):
        raw = game.parties[n].answer(game.request(n, lists[n]))
        found = _open(raw, "secagg", game.terms, 3, n, Shares)
        assert not found.seeds.keys() & found.keys.keys()
        for kind, kept in ((found.seeds, seeds), (found.keys, masking_keys)):
            if 0 in kind:
                kept[n] = kind[0]
    secret, seed = join(masking_keys, 3), join(seeds, 3)
    shared = [
        keys.agreed(secret, masking._masking(game.server._bundles[n]), purpose=purpose)
        for n in (3, 6, 9, 12)
        for purpose in [game.server._rules.naming("mask")]
    ]
    bare = uploads[0].copy()
    fold(bare, plus=[], minus=[seed, *shared])
    assert np.array_equal(bare.view(np.int32) * STEP, vectors[0])


@pytest.mark.parametrize("protocol", [SecAgg(active=True), SecAggPlus(dropouts=0.2, active=True)])
def test_signed_lists_reject_a_server_that_tells_two(protocol: Masking) -> None:
    game, lists = lying_server(Round(protocol, vectors_of(5)))
    signed = {}
    for n, numbers in lists.items():
        told = numbers if n else Survivors(tuple(game.vectors))
        raw = game.parties[n].answer(game.request(n, told))
        signed[n] = _open(raw, protocol.id, game.terms, 3, n, Signature).signature
    game.server.step += 1
    for n, party in game.parties.items():
        near = {c: s for c, s in signed.items() if c in lists[n].numbers or not n}
        with pytest.raises(Rejected, match=Reason.INCONSISTENT_SURVIVORS):
            party.answer(game.request(n, Signatures(near)))
        fitting = {c: s for c, s in near.items() if lists[c] == lists[n]}
        with pytest.raises(Rejected, match=Reason.TOO_FEW_PEERS):
            party.answer(game.request(n, Signatures(fitting)))


def bundles(change: Callable[[dict[int, bytes]], object]) -> Tamper:
    def changed(message: Roster) -> Roster:
        found = dict(message.bundles)
        change(found)
        return Roster(found)

    return changed


def letters(change: Callable[[dict[int, bytes]], object]) -> Tamper:
    def changed(message: Mailbox) -> Mailbox:
        found = dict(message.letters)
        change(found)
        return Mailbox(found)

    return changed


def survivors(*numbers: int) -> Tamper:
    return lambda message: Survivors(numbers)


def swapped(found: dict[int, bytes]) -> None:
    found[3], found[6] = found[6], found[3]


REQUESTS: list[tuple[str, int, Tamper, Reason]] = [
    ("no-own-key", 1, bundles(lambda b: b.pop(0)), Reason.WRONG_PEERS),
    ("own-key-changed", 1, bundles(lambda b: b.update({0: b[3]})), Reason.INVALID_KEY),
    ("one-key-twice", 1, bundles(lambda b: b.update({3: b[6]})), Reason.REUSED_KEY),
    ("one-key-for-both", 1, bundles(lambda b: b.update({3: b[3][:32] * 2})), Reason.REUSED_KEY),
    (
        "masking-key-twice",
        1,
        bundles(lambda b: b.update({3: b[6][:32] + b[3][32:]})),
        Reason.REUSED_KEY,
    ),
    ("short-key", 1, bundles(lambda b: b.update({3: b[3][:-1]})), Reason.INVALID_KEY),
    (
        "small-order",
        1,
        bundles(lambda b: b.update({3: b[3][:32] + bytes(32)})),
        Reason.INVALID_KEY,
    ),
    ("a-stranger", 1, bundles(lambda b: b.update({4: b[3]})), Reason.WRONG_PEERS),
    ("few-keys", 1, bundles(lambda b: [b.pop(c) for c in (3, 6)]), Reason.TOO_FEW_PEERS),
    ("letters-swapped", 2, letters(swapped), Reason.NOT_AUTHENTIC),
    ("letter-cut", 2, letters(lambda b: b.update({3: b[3][:11]})), Reason.NOT_AUTHENTIC),
    ("letter-changed", 2, letters(lambda b: b.update({3: b[3][:-1] + b"x"})), Reason.NOT_AUTHENTIC),
    ("letter-of-a-stranger", 2, letters(lambda b: b.update({4: b[3]})), Reason.WRONG_PEERS),
    ("letter-of-its-own", 2, letters(lambda b: b.update({0: b[3]})), Reason.WRONG_PEERS),
    ("few-letters", 2, letters(lambda b: [b.pop(c) for c in (3, 6)]), Reason.TOO_FEW_PEERS),
    ("without-itself", 3, survivors(3, 6, 9), Reason.WRONG_PEERS),
    ("few-survivors", 3, survivors(0, 3), Reason.TOO_FEW_PEERS),
    ("survivors-twice", 3, survivors(0, 3, 3, 6), Reason.MALFORMED),
    ("survivors-unsorted", 3, survivors(3, 0, 6), Reason.MALFORMED),
    ("strange-survivor", 3, survivors(0, 3, 4, 6), Reason.MALFORMED),
]


@pytest.mark.parametrize(
    ("step", "change", "reason"), [c[1:] for c in REQUESTS], ids=[c[0] for c in REQUESTS]
)
def test_requests_are_refused_by_name_and_then_answered(
    step: int, change: Tamper, reason: Reason
) -> None:
    game = Round(SecAgg(), vectors_of(4)).until(step)
    before = encode(game.parties[0].kept())
    with pytest.raises(Rejected) as caught:
        game.parties[0].answer(game.request(0, change(game.asked(0))))
    assert caught.value.reason == reason
    assert encode(game.parties[0].kept()) == before
    game.until(4)
    assert len(game.server.total.clients) == 4


def test_a_survivor_that_sent_no_letter_is_refused() -> None:
    game = Round(SecAgg(), vectors_of(5)).until(3, gone={3: 1})
    with pytest.raises(Rejected, match=Reason.WRONG_PEERS):
        game.parties[0].answer(game.request(0, Survivors((0, 3, 6, 9))))


@pytest.mark.parametrize("protocol", [SecAgg(active=True), SecAggPlus(dropouts=0.2, active=True)])
def test_signatures_are_verified_on_both_sides(protocol: Masking) -> None:
    game = Round(protocol, vectors_of(5))
    stranger = keys.signing_key()
    mine = game.answered(3).bundle
    forged = mine[:64] + keys.sign(stranger, game.server._rules.naming("keys", 3) + mine[:64])
    with pytest.raises(Rejected, match=Reason.BAD_SIGNATURE):
        game.receive(3, Keys(forged))
    game.receive(3, Keys(mine))
    for n in (0, 6, 9, 12):
        game.server.receive(n, game.parties[n].answer(game.server.requests()[n]))
    game.server.close()
    middle = bundles(lambda b: b.update({3: keys.fresh() + keys.fresh() + b[3][64:]}))
    with pytest.raises(Rejected, match=Reason.BAD_SIGNATURE):
        game.parties[0].answer(game.request(0, middle(game.asked(0))))
    unsigned = bundles(lambda b: b.update({3: b[3][:64]}))
    with pytest.raises(Rejected, match=Reason.INVALID_KEY):
        game.parties[0].answer(game.request(0, unsigned(game.asked(0))))
    game.until(3)
    with pytest.raises(Rejected, match=Reason.BAD_SIGNATURE):
        game.receive(0, Signature(keys.sign(stranger, b"anything")))
    game.until(4)
    signed = game.asked(0).signatures
    for changed, reason in (
        ({**signed, 3: signed[6]}, Reason.INCONSISTENT_SURVIVORS),
        ({**signed, 4: signed[6]}, Reason.WRONG_PEERS),
        ({c: signed[c] for c in (0, 3, 6)}, Reason.TOO_FEW_PEERS),
    ):
        with pytest.raises(Rejected, match=reason):
            game.parties[0].answer(game.request(0, Signatures(changed)))
    game.until(5)
    assert len(game.server.total.clients) == 5


ANSWERS: list[tuple[str, int, Tamper, Reason]] = [
    ("short-keys", 0, lambda m: Keys(m.bundle[:-1]), Reason.INVALID_KEY),
    ("one-key-for-both", 0, lambda m: Keys(m.bundle[:32] * 2), Reason.REUSED_KEY),
    ("no-letters", 1, lambda m: replace(m, letters={}), Reason.WRONG_PEERS),
    (
        "letter-to-a-stranger",
        1,
        lambda m: Letters(m.commitment, {**m.letters, 4: b""}),
        Reason.WRONG_PEERS,
    ),
    ("short-vector", 2, lambda m: Masked(m.values[:-1]), Reason.WRONG_LENGTH),
    ("wide-vector", 2, lambda m: Masked(m.values.astype(np.uint64)), Reason.WRONG_LENGTH),
    ("no-shares", 3, lambda m: Shares({}, m.keys), Reason.WRONG_PEERS),
    ("both-kinds", 3, lambda m: Shares(m.seeds, m.seeds), Reason.WRONG_PEERS),
    ("short-share", 3, lambda m: Shares({**m.seeds, 3: b""}, m.keys), Reason.BAD_SHARE),
]


@pytest.mark.parametrize(
    ("step", "change", "reason"), [c[1:] for c in ANSWERS], ids=[c[0] for c in ANSWERS]
)
def test_answers_are_refused_by_name_and_their_sender_is_lost(
    step: int, change: Tamper, reason: Reason
) -> None:
    vectors = vectors_of(4)
    game = Round(SecAgg(), vectors).until(step)
    answer = game.answered(9)
    with pytest.raises(Rejected) as caught:
        game.receive(9, change(answer))
    assert caught.value.reason == reason
    game.until(4, gone={9: step})
    clients = (0, 3, 6, 9) if step == 3 else (0, 3, 6)
    assert game.server.total.clients == clients
    assert np.array_equal(game.server.total.values, sum(vectors[c] for c in clients))


def test_anothers_key_is_refused() -> None:
    game = Round(SecAgg(), vectors_of(4))
    first, second = game.answered(0), game.answered(3)
    game.receive(0, first)
    for stolen in (first.bundle, second.bundle[:32] + first.bundle[:32]):
        with pytest.raises(Rejected, match=Reason.REUSED_KEY):
            game.receive(3, Keys(stolen))
    game.receive(3, second)


@pytest.mark.parametrize("lost", [False, True])
def test_a_changed_share_aborts_and_makes_no_wrong_sum(lost: bool) -> None:
    game = Round(SecAgg(), vectors_of(5)).until(3, gone={12: 2} if lost else {})
    for n in game.server.requests():
        found = game.answered(n)
        kind = dict(found.keys if lost else found.seeds)
        owner = 12 if lost else 3
        if n == 0:
            kind[owner] = kind[owner][:8] + bytes([kind[owner][8] ^ 1]) + kind[owner][9:]
        game.receive(n, Shares(found.seeds, kind) if lost else Shares(kind, found.keys))
    with pytest.raises(Aborted, match="client"):
        game.server.close()


def test_shares_of_one_kind_are_given_once() -> None:
    game = Round(SecAgg(), vectors_of(5)).until(3, gone={12: 2})
    given = game.answered(0)
    assert set(given.seeds) == {0, 3, 6, 9}
    assert set(given.keys) == {12}
    with pytest.raises(Rejected, match=Reason.REPEATED):
        game.parties[0].answer(game.request(0, Survivors((0, 3, 6))))


@pytest.mark.parametrize("protocol", [SecAgg(), SecAgg(active=True), RING])
def test_a_party_goes_on_in_another_process(protocol: Masking) -> None:
    vectors = vectors_of(5)
    game = Round(protocol, vectors)
    for step in range(len(game.server.steps)):
        game.until(step + 1, gone={6: 2})
        for n, party in game.parties.items():
            raw = encode(party.kept())
            game.parties[n] = game.party(n)
            game.parties[n].keep(raw)
            game.parties[n].step = party.step
    assert np.array_equal(game.server.total.values, sum(v for n, v in vectors.items() if n != 6))


def test_the_ring_is_narrow_where_the_sum_fits() -> None:
    for encoding, word in ((NARROW, np.uint32), (WIDE, np.uint64)):
        assert Round(SecAgg(), vectors_of(3), encoding).server._sum.dtype == word
    terms = Terms(bytes(SESSION), tuple(range(2**13)), 3, FixedPoint(2.0**10, 42))
    with pytest.raises(InvalidInput, match="overflow"):
        SecAgg().check(terms)


@pytest.mark.parametrize(
    ("protocol", "clients", "message"),
    [
        (SecAgg(threshold=2), 4, "threshold=2 of 4 shares: expected 3 to 4"),
        (SecAgg(threshold=5), 4, "expected 3 to 4"),
        (SecAgg(threshold=3, active=True), 5, "expected at least 4 against an active server"),
        (SecAggPlus(dropouts=0.4, active=True), 5, "against an active server"),
        (SecAggPlus(dropouts=0.6), 5, "expected at least 3 to be left"),
        (SecAggPlus(neighbours=3), 6, "neighbours=3: expected an even number"),
        (SecAggPlus(neighbours=6), 6, "neighbours=6"),
        (SecAgg(), 1, "expected at least 2"),
    ],
)
def test_rules_that_protect_nobody_are_refused(
    protocol: Masking, clients: int, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        Round(protocol, vectors_of(clients))


def test_signing_needs_keys() -> None:
    game = Round(SecAgg(active=True), vectors_of(4))
    with pytest.raises(InvalidInput, match="verifying"):
        SecAgg(active=True).check(replace(game.terms, verifying=None))
    game.parties[0].signing = None
    with pytest.raises(InvalidInput, match="client 0 has no signing key"):
        game.until(1)
    for wrong in ({"threshold": 3}, {"colluding": 1.0}, {"dropouts": -0.1}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            SecAggPlus(**wrong)  # type: ignore[arg-type]


def test_the_ring_is_the_sessions() -> None:
    terms = Round(RING, vectors_of(9)).terms
    ring = SecAggPlus(neighbours=4).rules(terms).peers
    for a in terms.clients:
        assert len(ring(a)) == 5
        assert a in ring(a)
        assert all(a in ring(b) for b in ring(a))
    other = SecAggPlus(neighbours=4).rules(replace(terms, session=keys.fresh(SESSION))).peers
    assert [ring(c) for c in terms.clients] != [other(c) for c in terms.clients]


def test_tails_are_exact_and_degrees_the_least() -> None:
    for others, marked, drawn, least in ((8, 3, 4, 2), (7, 5, 3, 3), (6, 0, 3, 1)):
        hits = [
            sum(i < marked for i in some) >= least
            for some in itertools.combinations(range(others), drawn)
        ]
        assert _tail(others, marked, drawn, least) == sum(hits) / len(hits)
    k, t = degree(1000, 100, 100)
    assert 1000 * _tail(999, 100, k, t) <= 2**-40
    assert 1000 * _tail(999, 100, k, k - t + 1) <= 2**-30
    assert 1000 * 0.2 ** (k // 2) <= 2**-20
    assert k < degree(1000, 100, 300)[0] <= degree(1000, 200, 300)[0]
    assert degree(5, 1, 1) == (4, 3)
