"""Paillier and CKKS: exact sums, keys that the server never has, and every lie found by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from gradleak.crypto import Aborted, Aggregation, FixedPoint, Reason, Rejected, Terms, keys
from gradleak.crypto.ckks import (
    DEGREE,
    MODULI,
    SIZE,
    Ckks,
    _Adder,
    _context,
    _parameters,
    _scale,
)
from gradleak.crypto.homomorphic import (
    STEPS,
    TAGS,
    Holder,
    Homomorphic,
    HomomorphicParty,
    Kept,
    Running,
)
from gradleak.crypto.paillier import Paillier, _Cipher, _width
from gradleak.crypto.protocol import SESSION, Envelope
from gradleak.crypto.rehearsal import Cost, rehearse, terms_for
from gradleak.crypto.wire import decode, encode
from gradleak.errors import InvalidInput
from tests.crypto.forging import Change, flipped, forged, one

SMALL = Paillier(bits=256, unsafe_small_keys=True)
SCHEMES = [SMALL, Ckks()]
VECTORS = {n: np.arange(30) / 8 - n for n in (0, 2, 3, 7)}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=["paillier", "ckks"])


def expected(
    scheme: Homomorphic, clients: list[int], drops: Mapping[int, int]
) -> tuple[int, ...] | None:
    """Whose sum it should be, by counting alone; None for an abort."""
    there = [[c for c in clients if drops.get(c, 4) > step] for step in range(4)]
    if min(map(len, there[:3])) < scheme.minimum:
        return None
    makers = there[0][: scheme.spares]
    openers = there[2][: scheme.spares]
    if not set(makers) & set(there[1]) or not set(openers) & set(there[3]):
        return None
    return tuple(there[2])


def play_many(scheme: Homomorphic, rounds: int, longest: int, seed: int) -> tuple[int, int]:
    draw = np.random.default_rng(seed)
    summed = aborted = 0
    for _ in range(rounds):
        clients = sorted(map(int, draw.choice(50, draw.integers(2, 6), replace=False)))
        length = int(draw.integers(1, longest))
        vectors = {c: draw.integers(-(2**23), 2**23 + 1, length) / 2**20 for c in clients}
        drops = {c: int(draw.integers(4)) for c in clients if draw.random() < 0.25}
        want = expected(scheme, clients, drops)
        try:
            total, _ = rehearse(scheme, vectors, drops=drops)
        except Aborted:
            assert want is None, drops
            aborted += 1
            continue
        assert total.clients == want
        assert np.array_equal(total.values, sum(vectors[c] for c in total.clients))
        summed += 1
    return summed, aborted


def test_250_rounds_of_paillier_are_exact_or_abort() -> None:
    summed, aborted = play_many(Paillier(2, 2, 256, unsafe_small_keys=True), 250, 40, 1)
    assert summed > 100
    assert aborted > 25


def test_20_rounds_of_ckks_are_exact_or_abort() -> None:
    summed, aborted = play_many(Ckks(spares=1), 20, 2100, 2)
    assert summed > 5
    assert aborted > 2


@pytest.mark.slow
def test_200_rounds_of_ckks_are_exact_or_abort() -> None:
    summed, aborted = play_many(Ckks(spares=2), 200, 5000, 3)
    assert summed > 80
    assert aborted > 20


@by_scheme
@pytest.mark.parametrize("step", range(4))
def test_dropouts_up_to_the_limit_at_every_step(scheme: Homomorphic, step: int) -> None:
    few, limit = list(VECTORS)[:2], list(VECTORS)[:3]
    total, _ = rehearse(scheme, VECTORS, drops=dict.fromkeys(few, step))
    left = tuple(VECTORS) if step == 3 else (3, 7)
    assert total.clients == left
    assert np.array_equal(total.values, sum(VECTORS[c] for c in left))
    with pytest.raises(Aborted):
        rehearse(scheme, VECTORS, drops=dict.fromkeys(limit, step))


@by_scheme
def test_the_largest_entries_fit(scheme: Homomorphic) -> None:
    clip = {n: np.full(30, (-1.0) ** n * 8) for n in range(2)}
    for vectors in ({n: np.full(30, 8.0) for n in range(6)}, {0: clip[1], 1: clip[1]}, clip):
        total, _ = rehearse(scheme, vectors)
        assert np.array_equal(total.values, sum(vectors.values()))


@by_scheme
def test_a_process_may_take_over_at_every_step(scheme: Homomorphic) -> None:
    terms = terms_for(VECTORS)
    server = scheme.server(terms)
    parties = {c: scheme.party(terms, c) for c in VECTORS}
    while requests := server.requests():
        for c, request in requests.items():
            resumed = scheme.party(terms, c, lambda c=c: VECTORS[c])  # type: ignore[misc]
            resumed.keep(encode(parties[c].kept()))
            resumed.step = parties[c].step
            server.receive(c, resumed.answer(request))
            parties[c] = resumed
        server.close()
    assert np.array_equal(server.total.values, sum(VECTORS.values()))


# What travels: every lie is found, by name


def tampered(
    scheme: Homomorphic,
    where: str,
    step: int,
    change: Change,
    *,
    client: int = 2,
    terms: Terms | None = None,
    signing: Mapping[int, bytes] | None = None,
) -> Cost:
    kind = STEPS[step].request if where == "down" else STEPS[step].reply

    def tamper(at: int, number: int, raw: bytes) -> bytes:
        return forged(raw, kind, change) if (at, number) == (step, client) else raw

    total, cost = rehearse(scheme, VECTORS, **{where: tamper}, terms=terms, signing=signing)  # type: ignore[arg-type]
    assert np.array_equal(total.values, sum(VECTORS[c] for c in total.clients))
    return cost


def spoilt(value: Callable[[bytes], bytes]) -> Change:
    """An upload with another first ciphertext."""
    return lambda m: {"ciphertexts": one(m.ciphertexts, value)}


LIES: list[tuple[str, int, Change, Reason]] = [
    ("up", 0, lambda m: {"key": m.key[:31]}, Reason.INVALID_KEY),
    ("up", 1, lambda m: {"letters": {0: b""}}, Reason.WRONG_PEERS),
    ("up", 1, lambda m: {"public": m.public + b"x"}, Reason.INVALID_KEY),
    ("up", 2, lambda m: {"ciphertexts": {}}, Reason.WRONG_LENGTH),
    ("up", 2, lambda m: {"ciphertexts": {**m.ciphertexts, 99: b""}}, Reason.WRONG_LENGTH),
    ("up", 2, spoilt(lambda c: c[:-1]), Reason.BAD_CIPHERTEXT),
    ("up", 2, spoilt(lambda c: bytes(len(c))), Reason.BAD_CIPHERTEXT),
    ("up", 2, spoilt(lambda c: b"\xff" * len(c)), Reason.BAD_CIPHERTEXT),
    ("up", 2, spoilt(lambda c: c + c), Reason.BAD_CIPHERTEXT),
    ("up", 3, lambda m: {"values": m.values[1:]}, Reason.WRONG_LENGTH),
    ("up", 3, lambda m: {"values": m.values.astype(np.uint32)}, Reason.WRONG_LENGTH),
    ("up", 3, lambda m: {"values": m.values + np.uint64(2**40)}, Reason.OUT_OF_RANGE),
    ("down", 1, lambda m: {"keys": {2: m.keys[2]}}, Reason.TOO_FEW_PEERS),
    ("down", 1, lambda m: {"keys": {**m.keys, 9: m.keys[0]}}, Reason.WRONG_PEERS),
    ("down", 1, lambda m: {"keys": {**m.keys, 2: bytes(32)}}, Reason.WRONG_PEERS),
    ("down", 1, lambda m: {"keys": {**m.keys, 0: m.keys[2]}}, Reason.REUSED_KEY),
    ("down", 1, lambda m: {"keys": {**m.keys, 0: bytes(32)}}, Reason.INVALID_KEY),
    ("down", 1, lambda m: {"keys": {**m.keys, 0: bytes(5)}}, Reason.INVALID_KEY),
    ("down", 1, lambda m: {"signatures": {}}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {"maker": 1}, Reason.WRONG_PEERS),
    ("down", 2, lambda m: {"maker": 3}, Reason.NOT_AUTHENTIC),
    ("down", 2, lambda m: {"key": bytes(32)}, Reason.INVALID_KEY),
    ("down", 2, lambda m: {"key": keys.public_key(keys.fresh())}, Reason.NOT_AUTHENTIC),
    ("down", 2, lambda m: {"letter": flipped(m.letter)}, Reason.NOT_AUTHENTIC),
    ("down", 2, lambda m: {"letter": m.letter[:20]}, Reason.NOT_AUTHENTIC),
    ("down", 2, lambda m: {"letter": b""}, Reason.NOT_AUTHENTIC),
    ("down", 3, lambda m: {"clients": (2,)}, Reason.TOO_FEW_PEERS),
    ("down", 3, lambda m: {"clients": (0, 3, 7)}, Reason.WRONG_PEERS),
    ("down", 3, lambda m: {"clients": (0, 2, 2, 3)}, Reason.WRONG_PEERS),
    ("down", 3, lambda m: {"clients": (0, 2, 3, 8)}, Reason.WRONG_PEERS),
    ("down", 3, lambda m: {"sums": {}}, Reason.WRONG_LENGTH),
    ("down", 3, lambda m: {"sums": one(m.sums, lambda c: c[1:])}, Reason.BAD_CIPHERTEXT),
    ("down", 3, lambda m: {"sums": one(m.sums, lambda c: bytes(len(c)))}, Reason.BAD_CIPHERTEXT),
]  # fmt: skip


@by_scheme
@pytest.mark.parametrize(("where", "step", "change", "reason"), LIES)
def test_a_lie_is_refused_by_name_and_the_others_go_on(
    scheme: Homomorphic, where: str, step: int, change: Change, reason: Reason
) -> None:
    assert tampered(scheme, where, step, change).rejected[2] == reason


def test_a_key_in_the_place_of_a_clients_is_refused_where_they_sign() -> None:
    signing = {c: keys.signing_key() for c in VECTORS}
    verifying = {c: keys.verifying_key(secret) for c, secret in signing.items()}
    session, own = keys.fresh(SESSION), keys.public_key(keys.fresh())
    terms = Terms(session, tuple(VECTORS), 30, verifying=verifying)

    def rejected(where: str, step: int, change: Change) -> str:
        cost = tampered(SMALL, where, step, change, terms=terms, signing=signing)
        return cost.rejected[2]

    assert rejected("up", 0, lambda m: {"key": own}) == Reason.BAD_SIGNATURE
    assert rejected("down", 1, lambda m: {"keys": {**m.keys, 0: own}}) == Reason.BAD_SIGNATURE
    assert rejected("down", 2, lambda m: {"key": own}) == Reason.BAD_SIGNATURE
    assert rejected("down", 2, lambda m: {"signature": b""}) == Reason.BAD_SIGNATURE
    with pytest.raises(InvalidInput, match="no signing key"):
        rehearse(SMALL, VECTORS, terms=terms)
    some = Terms(session, tuple(VECTORS), 30, verifying={0: verifying[0]})
    with pytest.raises(InvalidInput, match="all or none"):
        SMALL.check(some)


@by_scheme
def test_an_upload_changed_within_its_range_ends_without_a_sum(scheme: Homomorphic) -> None:
    def up(step: int, client: int, raw: bytes) -> bytes:
        change = spoilt(lambda c: flipped(c, len(c) // 2))
        return forged(raw, STEPS[2].reply, change) if (step, client) == (2, 3) else raw

    with pytest.raises(Aborted, match="no client opened"):
        rehearse(scheme, VECTORS, up=up)


@by_scheme
def test_a_sum_over_others_than_named_is_refused(scheme: Homomorphic) -> None:
    cost = tampered(scheme, "down", 3, lambda m: {"clients": (2, 3, 7)})
    assert cost.rejected[2] in (Reason.INCONSISTENT_SURVIVORS, Reason.BAD_CIPHERTEXT)


@by_scheme
def test_one_clients_upload_is_not_opened_as_the_sum(scheme: Homomorphic) -> None:
    uploads: dict[int, dict[int, bytes]] = {}

    def up(step: int, client: int, raw: bytes) -> bytes:
        if step == 2:
            uploads[client] = decode(STEPS[2].reply, decode(Envelope, raw).body).ciphertexts
        return raw

    def down(step: int, client: int, raw: bytes) -> bytes:
        return forged(raw, STEPS[3].request, lambda m: {"sums": uploads[3]}) if step == 3 else raw

    refused: dict[int, str] = {}
    terms = terms_for(VECTORS)
    server = scheme.server(terms)
    parties = {c: scheme.party(terms, c, lambda c=c: VECTORS[c]) for c in VECTORS}  # type: ignore[misc]
    while requests := server.requests():
        for c, request in requests.items():
            try:
                server.receive(
                    c, up(server.step, c, parties[c].answer(down(server.step, c, request)))
                )
            except Rejected as refusal:
                refused[c] = refusal.reason
        if server.step == 3:
            break
        server.close()
    assert set(refused) == {0, 2, 3}
    assert set(refused.values()) <= {Reason.INCONSISTENT_SURVIVORS}


def test_openers_who_disagree_end_without_a_sum() -> None:
    def up(step: int, client: int, raw: bytes) -> bytes:
        change: Change = lambda m: {"values": m.values + np.uint64(1)}
        return forged(raw, STEPS[3].reply, change) if (step, client) == (3, 2) else raw

    with pytest.raises(Aborted, match="disagree"):
        rehearse(SMALL, VECTORS, up=up)


@by_scheme
def test_a_letter_with_another_key_in_it_is_refused(scheme: Homomorphic) -> None:
    terms = terms_for(VECTORS)
    secret, public = scheme.make(terms)
    for wrong in (b"", secret[1:], secret + b"x", bytes(len(secret)), b"\x01" * len(secret)):
        with pytest.raises(Rejected, match=Reason.INVALID_KEY):
            Holder(scheme, terms, bytes(32) + wrong)
    for wrong in (public + b"x", bytes(len(public) or 1), flipped(public, 0) if public else b"x"):
        with pytest.raises(Rejected, match=Reason.INVALID_KEY):
            scheme.adder(terms, wrong)


# What the server holds


def reachable(thing: Any, seen: set[int]) -> Iterator[Any]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    inner = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    if isinstance(thing, Mapping):
        inner += [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set)):
        inner += list(thing)
    for item in inner:
        yield from reachable(item, seen)


def holds_secret(server: object, letter: bytes) -> bool:
    """Whether a server has a holder's secrets, as bytes, as a prime, or as a context."""
    secret = letter[keys.SEED :]
    half = len(secret) // 2
    primes = {int.from_bytes(part, "little") for part in (secret[:half], secret[half:])}
    for thing in reachable(server, set()):
        if isinstance(thing, bytes) and (secret in thing or letter[: keys.SEED] in thing):
            return True
        if type(thing).__name__ in ("int", "mpz") and int(thing) in primes:
            return True
        if hasattr(thing, "has_secret_key") and thing.has_secret_key():
            return True
    return False


@by_scheme
def test_the_server_never_holds_the_secret_key(scheme: Homomorphic) -> None:
    terms = terms_for(VECTORS)
    server = scheme.server(terms)
    parties = {c: scheme.party(terms, c, lambda c=c: VECTORS[c]) for c in VECTORS}  # type: ignore[misc]
    while requests := server.requests():
        for c, request in requests.items():
            server.receive(c, parties[c].answer(request))
        kept = parties[0].kept()
        assert isinstance(kept, Kept)
        if kept.letter:
            assert not holds_secret(server, kept.letter)
        server.close()
    server.planted = [kept.letter]  # type: ignore[attr-defined]
    assert holds_secret(server, kept.letter)
    server.planted = {0: Holder(scheme, terms, kept.letter)}  # type: ignore[attr-defined]
    assert holds_secret(server, kept.letter)


# Paillier


def test_keys_that_can_be_factored_are_refused() -> None:
    assert Paillier().bits >= 2048
    for bits in (1024, 2040, 2047, 2049):
        with pytest.raises(InvalidInput, match="bits="):
            Paillier(bits=bits)
    terms = terms_for(VECTORS)
    with pytest.raises(InvalidInput, match="slots"):
        Paillier(bits=64, unsafe_small_keys=True).check(terms)


def test_obfuscators_are_the_nth_powers_each_as_likely() -> None:
    """n = 16000 draws of 160 values; alpha = 1e-6."""
    cipher = _Cipher(11, 17, 4, terms_for(VECTORS))
    drawn = [int(cipher.power()) for _ in range(16_000)]
    powers = sorted({pow(r, 187, 187**2) for r in range(1, 187) if r % 11 and r % 17})
    assert len(powers) == 160
    assert set(drawn) <= set(powers)
    assert chisquare([drawn.count(power) for power in powers]).pvalue > 1e-6
    halved = [power for power in drawn if power in powers[:80]] * 2  # a generator that misses half
    assert chisquare([halved.count(power) for power in powers]).pvalue < 1e-6


def test_phe_and_gradleak_read_each_other() -> None:
    import phe

    terms = terms_for(VECTORS)
    secret, public = SMALL.make(terms)
    cipher, n = SMALL.cipher(terms, secret), int.from_bytes(public, "little")
    peer = phe.PaillierPrivateKey(
        phe.PaillierPublicKey(n), *(int.from_bytes(h, "little") for h in (secret[:16], secret[16:]))
    )
    values = np.array([5, -7, 2**23])
    width, bound = _width(terms), terms.encoding.bound
    plain = sum((int(v) + bound) << (k * width) for k, v in enumerate(values))
    ours = [int.from_bytes(cipher.encrypt(values), "little") for _ in range(2)]
    assert [peer.raw_decrypt(c) for c in ours] == [plain, plain]
    assert ours[0] != ours[1]
    assert all(c % n != 1 for c in ours)
    assert peer.public_key.raw_encrypt(plain, r_value=1) % n == 1  # one without obfuscation
    theirs = peer.public_key.raw_encrypt(plain).to_bytes(64, "little")
    assert np.array_equal(cipher.decrypt(theirs, 3, 1), values)


def test_guard_bits_are_as_many_as_the_sum_needs() -> None:
    for clients in (2, 3, 4, 5, 64):
        terms = Terms(bytes(16), tuple(range(clients)), 9, FixedPoint(clip=1, fraction=3))
        assert 2 ** (_width(terms) - 1) <= 2 * clients * 8 < 2 ** _width(terms)
        cipher = SMALL.cipher(terms, SMALL.make(terms)[0])
        running = Running(SMALL.adder(terms, _modulus(cipher)))
        for _ in range(clients):
            running.add_chunks([cipher.encrypt(np.full(6, 8))])
        (total,) = running.chunks()
        assert cipher.decrypt(total, 6, clients).tolist() == [8 * clients] * 6
        with pytest.raises(Rejected, match=Reason.BAD_CIPHERTEXT):  # one client too few is told
            cipher.decrypt(total, 6, clients - 1)


def _modulus(cipher: Any) -> bytes:
    n: int = cipher._key.public_key.n
    return n.to_bytes(32, "little")


def test_ciphertexts_that_are_none_are_refused() -> None:
    terms = terms_for(VECTORS)
    secret, public = SMALL.make(terms)
    adder, n = SMALL.adder(terms, public), int.from_bytes(public, "little")
    p = int.from_bytes(secret[:16], "little")
    for wrong in (0, n, p, 7 * p, n * n, n * n + 1, 2**512 - 1):
        with pytest.raises(Rejected, match=Reason.BAD_CIPHERTEXT):
            adder.take(wrong.to_bytes(64, "little"))


# CKKS


def test_sums_that_noise_could_spoil_are_refused() -> None:
    fine = Terms(bytes(16), tuple(range(10)), 5, FixedPoint(clip=8, fraction=34))
    Ckks().check(fine)
    for clip, fraction, clients in ((8, 40, 100), (2.0**20, 30, 10)):
        terms = Terms(bytes(16), tuple(range(clients)), 5, FixedPoint(clip, fraction))
        with pytest.raises(InvalidInput, match="noise"):
            Ckks().check(terms)


def test_the_finest_sums_are_exact_at_full_range() -> None:
    encoding = FixedPoint(clip=8, fraction=36)
    draw = np.random.default_rng(5)
    signs = draw.choice([-8.0, 8.0], 4090)
    vectors = {
        n: signs - draw.integers(0, 2**30, 4090) * 2.0**-36 * np.sign(signs) for n in range(4)
    }
    terms = terms_for(vectors, encoding)
    total, _ = rehearse(Ckks(spares=1), vectors, terms=terms)
    assert np.array_equal(total.values, sum(vectors.values()))


def test_the_error_is_that_of_the_encoding_alone() -> None:
    draw = np.random.default_rng(6)
    vectors = {n: draw.normal(size=3000) for n in range(10)}
    terms = terms_for(vectors, FixedPoint(clip=8, fraction=26))
    total, _ = rehearse(Ckks(spares=1), vectors, terms=terms)
    assert np.abs(total.values - sum(vectors.values())).max() <= 10 * 2.0**-26 < 1e-6


def key_found(opened: list[list[float]], ciphertexts: list[bytes]) -> bool:
    """Li and Micciancio's attack, on real parts: do three ciphertexts agree on one key?

    With r the decrypted slots, m = encode(2r) and i* = N − 1 − i the conjugate of position i,
    c₀[i] + c₀[i*] + c₁[i]s[i] + c₁[i*]s[i*] = m[i] modulo q: two ciphertexts give s[i] and s[i*],
    which the third confirms or does not.
    """
    from tenseal import sealapi

    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    moduli = sealapi.CoeffModulus.Create(DEGREE, list(MODULI))
    parameters.set_coeff_modulus(moduli)
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    encoder, q = sealapi.CKKSEncoder(context), moduli[0].value()
    rows = []
    for slots, raw in zip(opened, ciphertexts, strict=True):
        plain = sealapi.Plaintext()
        level = context.first_parms_id()
        encoder.encode([2 * slot for slot in slots], level, 2.0**20, plain)
        at = raw.index(bytes.fromhex("28b52ffd")) + 10 + 97  # an uncompressed zstd frame
        zero, one = (
            np.frombuffer(raw[at : at + SIZE], "<u8").reshape(2, DEGREE)[:, [0, -1]].tolist()
        )
        rows.append((*one, (plain.data(0) - sum(zero)) % q))
    (a, b, x), (c, d, y), (e, f, z) = rows
    inverse = pow(a * d - b * c, -1, q)
    s, conjugate = (x * d - b * y) * inverse, (a * y - c * x) * inverse
    return (e * s + f * conjugate - z) % q == 0


def test_unrounded_sums_would_give_the_key_away_and_rounded_ones_do_not() -> None:
    import tenseal

    context = _context(2.0**20)
    vectors = [tenseal.ckks_vector(context, [k, 1.0] + [0.0] * 2046) for k in range(3)]
    opened = [vector.decrypt() for vector in vectors]
    ciphertexts = [vector.serialize() for vector in vectors]
    assert key_found(opened, ciphertexts)
    assert not key_found([np.rint(slots).tolist() for slots in opened], ciphertexts)


def test_malformed_ciphertexts_are_refused_and_never_crash() -> None:
    """n = 600 changes of a valid one: refused, by the server or when opened, or of no effect."""
    import tenseal

    terms = terms_for(VECTORS)
    scale, values = _scale(terms), np.arange(30)
    cipher = Ckks().cipher(terms, Ckks().make(terms)[0])
    adder = _Adder(tenseal.context_from(_parameters(scale)), scale)
    whole = cipher.encrypt(values)
    draw = np.random.default_rng(7)

    def outcome(raw: bytes) -> str:
        try:
            adder.take(raw)
        except Rejected as refusal:
            return f"server: {refusal.reason}"
        try:
            return "right" if np.array_equal(cipher.decrypt(raw, 30, 1), values) else "wrong"
        except Rejected as refusal:
            return f"holder: {refusal.reason}"

    found: Counter[str] = Counter()
    for k in range(600):
        at = k if k < 200 else -1 - (k % 60) if k < 320 else int(draw.integers(len(whole)))
        wrong = bytearray(whole)
        wrong[at] ^= 1 << int(draw.integers(8))
        found[outcome(bytes(wrong))] += 1
    assert set(found) == {"server: bad-ciphertext", "holder: bad-ciphertext", "right"}
    assert found["server: bad-ciphertext"] > 100
    assert found["holder: bad-ciphertext"] > 100
    other = Ckks().cipher(terms, Ckks().make(terms)[0])
    assert outcome(other.encrypt(values)) == "holder: bad-ciphertext"


# Piece by piece


@by_scheme
def test_streamed_sums_are_those_of_a_round(scheme: Homomorphic) -> None:
    vectors = {n: np.arange(4500) % 7 - n for n in range(3)}
    terms = Terms(bytes(16), (0, 1, 2), 4500)
    secret, public = scheme.make(terms)
    holder = Holder(scheme, terms, keys.fresh() + secret)
    running, room = Running(scheme.adder(terms, public)), scheme.room(terms)
    for client, vector in vectors.items():
        pieces = (vector[at : at + room] for at in range(0, 4500, room))
        running.add_chunks(holder.encrypt_chunks(client, pieces))
    total = np.concatenate(list(holder.decrypt_chunks((0, 1, 2), running.chunks())))
    assert np.array_equal(total, sum(vectors.values()))
    first, *rest = running.chunks()
    for wrong in ([rest[0], *rest], [rest[0], first, *rest[1:]]):  # pieces repeated or swapped
        with pytest.raises(Rejected, match=Reason.INCONSISTENT_SURVIVORS):
            list(holder.decrypt_chunks((0, 1, 2), wrong))


@pytest.mark.slow
def test_eleven_million_entries_stream_within_a_gibibyte() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "homomorphic.py"
    asked = [sys.executable, str(script), "stream", "--length", "11000000", "--clients", "2"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["resident_mib"] < 1024
    assert found["error"] <= 1e-6


def test_every_scheme_is_found() -> None:
    from gradleak.crypto import aggregations, build

    assert {"paillier", "ckks", "additive-mpc"} <= set(aggregations())
    built: Aggregation = build("paillier:bits=3072,spares=2")
    assert built == Paillier(bits=3072, spares=2)
    assert Paillier().slots(terms_for(VECTORS)) > TAGS
    assert isinstance(Ckks().party(terms_for(VECTORS), 0), HomomorphicParty)
