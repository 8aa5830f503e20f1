"""What coalitions learn: everything that the server and some clients hold, as linear algebra.

`learnt` counts the combinations of the honest clients' entries that a view determines. Those of a
private protocol are as many as the vectors are long: the sums. Keys and sealed letters stand for
nothing but the masks and shares that their holders make of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import numpy as np
import pytest

from gradleak.crypto import Reason, homomorphic, keys
from gradleak.crypto import lightsecagg as light
from gradleak.crypto.additive import AdditiveMpc, Summed, Upload
from gradleak.crypto.coded import Letters, Share
from gradleak.crypto.conformance import LAWS, Broken, Rehearsed, learnt, whole_seed
from gradleak.crypto.fastsecagg import FastSecAgg
from gradleak.crypto.field import M61
from gradleak.crypto.homomorphic import Holder
from gradleak.crypto.lightsecagg import LightSecAgg
from gradleak.crypto.masking import (
    Masked,
    MaskingParty,
    MaskingServer,
    Shares,
    Signature,
    Signatures,
    Survivors,
    fold,
)
from gradleak.crypto.protocol import HELPER
from gradleak.crypto.secagg import SecAgg
from gradleak.crypto.secagg_plus import SecAggPlus
from gradleak.crypto.sharing import join
from gradleak.crypto.wire import decode, encode
from tests.crypto.conformance.drive import Round, bent, opened, readdressed, refused
from tests.crypto.conformance.subjects import EACH, SUBJECTS

LENGTH = 1
SENDING = ("masked-input", "upload")
"""Names of steps in which masked vectors are sent."""
View = Callable[[Round, set[int]], list[Any]]
"""Words that the server and some parties hold after a round: the same columns in every round."""


@cache
def rounds(subject: Rehearsed, gone: tuple[int, ...], count: int, length: int) -> list[Round]:
    """Rounds in which some send no vector; one ring in all."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        sent = {c: rng.integers(-(2**22), 2**22, length) for c in range(subject.clients)}
        vectors = {c: x * 2.0**-20 for c, x in sent.items()}
        found.append(Round(subject, vectors=vectors, session=b"one for all ring"))
        for step in found[-1].server.steps:
            found[-1].play(silent=gone if step.name in SENDING else ())
    return found


def leaks(
    subject: Rehearsed,
    view: View,
    inside: Iterable[int],
    gone: tuple[int, ...] = (),
    count: int = 60,
    length: int = LENGTH,
) -> int:
    """Combinations learnt of what honest clients sent."""
    honest = [c for c in range(subject.clients) if c not in {*inside, *gone}]
    inputs: list[Any] = []
    views: list[Any] = []
    for round_ in rounds(subject, gone, count, length):
        sent = np.concatenate([round_.vectors[c] for c in honest])
        inputs.append((sent * 2.0**20).astype(np.int64))
        views.append([int(word) for words in view(round_, set(inside)) for word in words])
    assert count > len(inputs[0]) + len(views[0]) + 30
    return learnt(np.array(inputs), np.array(views, dtype=object), subject.modulus)


def masks_view(round_: Round, inside: set[int]) -> list[Any]:
    """Of SecAgg's server and some clients: uploads, and masks whose seeds their shares make."""
    rules = round_.server._rules  # type: ignore[attr-defined]
    memory: dict[int, Any] = {c: round_.parties[c].kept() for c in rules.terms.clients}
    told = [opened(raw, Shares) for raw in round_.sent[-1].values()]
    holders = list(round_.sent[-1])
    words = [opened(raw, Masked).values for raw in round_.sent[2].values()]
    for owner in rules.terms.clients:
        for kind in ("seed", "key"):
            shares = {c: memory[c].__dict__[f"{kind}_shares"].get(owner) for c in inside}
            for holder, answer in zip(holders, told, strict=True):
                shares.setdefault(holder, getattr(answer, f"{kind}s").get(owner))
            found = {c: share for c, share in shares.items() if share}
            if len(found) < rules.threshold:
                continue
            secret = join(found, rules.threshold)
            words += masks_of(rules, memory, owner, secret) if kind == "key" else [mask(secret)]
        if owner in inside:
            words += [mask(memory[owner].seed)]
            words += masks_of(rules, memory, owner, memory[owner].masking)
    return words


def masks_of(rules: Any, memory: dict[int, Any], owner: int, secret: bytes) -> list[Any]:
    publics = [memory[p].bundles[p][:32] for p in rules.peers(owner) if p != owner]
    return [mask(keys.agreed(secret, public, purpose=rules.naming("mask"))) for public in publics]


def mask(seed: bytes) -> Any:
    return keys.words32(seed, LENGTH)


def coalitions(clients: int, sizes: Iterable[int]) -> list[tuple[int, ...]]:
    return [c for k in sizes for c in itertools.combinations(range(clients), k)]


SMALL = Rehearsed(SecAgg(threshold=3), 4, survives=1, modulus=2**32)
SMALL_ACTIVE = Rehearsed(SecAgg(active=True), 4, survives=1, modulus=2**32, signed=True)
RING = Rehearsed(SecAggPlus(neighbours=4, threshold=3, dropouts=0.2), 6, survives=1, modulus=2**32)


@pytest.mark.parametrize(
    "inside",
    [(1, 3), *(pytest.param(c, marks=pytest.mark.slow) for c in coalitions(4, (0, 1, 2)))],
)
def test_fewer_than_the_threshold_and_the_server_learn_the_sum_alone(inside: Any) -> None:
    """Rank over F₂ of low bits, all coalitions below t = 3 of n = 4; false with P < 2⁻³⁰ each."""
    assert leaks(SMALL, masks_view, inside) == LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("inside", coalitions(3, (0, 1)), ids=str)
def test_a_client_that_is_lost_stays_hidden_and_the_sum_is_of_the_others(inside: Any) -> None:
    assert leaks(SMALL, masks_view, inside, gone=(3,)) == LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("inside", coalitions(4, (0, 1, 2)), ids=str)
def test_the_same_against_an_active_server(inside: Any) -> None:
    assert leaks(SMALL_ACTIVE, masks_view, inside) == LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("inside", coalitions(6, (0, 1, 2)), ids=str)
def test_the_same_in_a_ring_whose_honest_clients_are_connected(inside: Any) -> None:
    """Two of four neighbours cannot cut this ring, whose clients have two next on either side."""
    assert leaks(RING, masks_view, inside, count=110) == LENGTH


@pytest.mark.slow
def test_as_many_as_the_threshold_and_the_server_learn_everything() -> None:
    """Of the one that is left nothing is hidden; of four honest, t colluders open each."""
    wider = Rehearsed(SecAgg(threshold=3), 5, survives=2, modulus=2**32)
    assert leaks(wider, masks_view, (0, 1, 2), count=90) == 2 * LENGTH


def test_a_client_that_tells_both_shares_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(self: MaskingParty, survivors: tuple[int, ...]) -> Shares:
        return Shares(self._memory.seed_shares, self._memory.key_shares)

    monkeypatch.setattr(MaskingParty, "_unmask", both)
    monkeypatch.setattr(MaskingServer, "_match", lambda *_: None)
    rounds.cache_clear()
    assert leaks(SMALL, masks_view, (), count=70) == 4 * LENGTH
    rounds.cache_clear()


def coded_view(round_: Round, inside: set[int]) -> list[Any]:
    """Of LightSecAgg's or FastSecAgg's server and some clients: masked vectors, sums, shares."""
    steps = round_.server.steps
    words: list[Any] = [opened(raw, Share).values for raw in round_.sent[-1].values()]
    if steps[2].reply is light.Masked:
        words += [opened(raw, light.Masked).values for raw in round_.sent[2].values()]
    for client in sorted(inside):
        kept: Any = round_.parties[client].kept()
        party: Any = round_.parties[client]
        words += [round_.vectors[client] * 2**20, kept.shares[client]]
        for owner, key in kept.keys.items():
            sealed = opened(round_.sent[1][owner], Letters).sealed[client]
            context = party._context(owner, client)
            words += [decode(Share, keys.unseal(key, sealed, context=context)).values]
    return words


CODES = [
    Rehearsed(LightSecAgg(privacy=2, dropouts=1), 5, survives=1, modulus=2**31 - 1),
    Rehearsed(FastSecAgg(privacy=2, dropouts=1), 5, survives=1, modulus=15 * 2**27 + 1),
]


@pytest.mark.parametrize(
    "inside", [(1, 3), *(pytest.param(c, marks=pytest.mark.slow) for c in coalitions(5, (0, 1, 2)))]
)
@pytest.mark.parametrize("subject", CODES, ids=lambda s: s.aggregation.id)
def test_as_many_as_a_code_allows_and_the_server_learn_the_sum_alone(
    subject: Rehearsed, inside: Any
) -> None:
    """Rank modulo p, all coalitions of at most T = 2 of n = 5: false with P < p⁻³⁰ each."""
    assert leaks(subject, coded_view, inside, count=100, length=2) == 2


@pytest.mark.slow
@pytest.mark.parametrize("subject", CODES, ids=lambda s: s.aggregation.id)
def test_beyond_what_a_code_allows_more_is_learnt(subject: Rehearsed) -> None:
    """T + 1 = 3 clients have a combination of either honest one's two entries; U = 4 have all."""
    for inside in coalitions(5, (3,)):
        assert leaks(subject, coded_view, inside, count=100, length=2) == 3
    for inside in coalitions(5, (4,)):
        assert leaks(subject, coded_view, inside, count=100, length=2) == 2


@pytest.mark.slow
def test_a_client_lost_after_sharing_its_mask_stays_hidden() -> None:
    for inside in coalitions(4, (0, 2)):
        assert leaks(CODES[0], coded_view, inside, gone=(4,), count=100, length=2) == 2


def servers_view(round_: Round, inside: set[int]) -> list[Any]:
    """Of additive sharing: what asking server (number -1), helpers and clients among them hold."""
    words: list[Any] = []
    if -1 in inside:
        words += [opened(raw, Upload).share for raw in round_.sent[1].values()]
        words += [opened(raw, Summed).share for raw in round_.sent[3].values()]
    for number in sorted(inside):
        if number >= HELPER:
            kept: Any = round_.parties[number].kept()
            words += [keys.words64(seed, LENGTH) for seed in kept.seeds.values()]
    return words or [[0]]


TRIO = Rehearsed(AdditiveMpc(servers=3), 3, survives=1, modulus=2**64)


@pytest.mark.parametrize(
    ("inside", "combinations"),
    [
        ((-1,), LENGTH),
        ((HELPER,), 0),
        ((HELPER, HELPER + 1), 0),
        ((-1, HELPER), LENGTH),
        ((-1, HELPER + 1), LENGTH),
        ((-1, HELPER, HELPER + 1), 3 * LENGTH),
    ],
)
def test_servers_learn_the_sum_unless_all_collude(inside: Any, combinations: int) -> None:
    assert leaks(TRIO, servers_view, inside) == combinations


@pytest.mark.parametrize("name", EACH)
def test_no_secret_crosses_the_server_in_the_clear(name: str) -> None:
    assert not in_the_clear(SUBJECTS[name])


@pytest.mark.parametrize("name", ["secagg", "lightsecagg", "additive-mpc", "paillier", "ckks"])
def test_letters_that_are_not_sealed_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        keys, "seal", lambda key, letter, *, context: bytes(12) + letter + bytes(16)
    )
    monkeypatch.setattr(keys, "unseal", lambda key, sealed, *, context: sealed[12:-16])
    assert in_the_clear(SUBJECTS[name])
    with pytest.raises(Broken):
        LAWS["uniform"](SUBJECTS["fastsecagg"])  # whose clients keep nothing of letters


PUBLIC = ("bundles", "helpers")


def in_the_clear(subject: Rehearsed) -> list[str]:
    """Fields of what parties keep whose bytes pass the server before the last step."""
    round_ = Round(subject)
    round_.to(len(round_.server.steps) - 1)
    seen = b"".join(raw for sent in round_.sent for raw in sent.values())
    return [
        f"{number}: {name}"
        for number, party in round_.parties.items()
        for name, value in vars(party.kept()).items()
        if name not in PUBLIC
        for secret in (value.values() if isinstance(value, dict) else [value])
        if len(raw := bytes(secret)) >= 8 and raw[-16:] in seen
    ]


@pytest.mark.parametrize("name", ["secagg", "additive-mpc"])
def test_secrets_from_a_seeded_generator_are_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "fresh", lambda size=32: np.random.bytes(size))  # noqa: NPY002
    with pytest.raises(Broken, match="the same"):
        LAWS["unseeded"](SUBJECTS[name])


def test_every_bit_of_a_seed_counts_wherever_one_is_expanded() -> None:
    def folded(seed: bytes) -> Any:
        words = np.zeros(8, np.uint32)
        fold(words, plus=[seed], minus=[])
        return words

    for expand in (
        folded,
        lambda seed: keys.words64(seed, 8),
        lambda seed: M61.uniform(seed, 8),
    ):
        whole_seed(expand)


# What is known to be learnt, by design.


def test_a_lying_server_and_one_client_open_a_vector_where_nobody_signs() -> None:
    """Passive SecAgg at t = 3 of 5: two honest clients are told that 4 is lost, two that it is not.

    Client 0 colludes and tells both shares, so either secret has three.
    """
    round_ = Round(SUBJECTS["secagg"])
    requests = round_.to(3)
    kept: Any = round_.parties[0].kept()
    seeds, secrets = {0: kept.seed_shares[4]}, {0: kept.key_shares[4]}
    for number in (1, 2, 3, 4):
        lie = (0, 1, 2, 3) if number in (2, 3) else (0, 1, 2, 3, 4)
        answer = round_.parties[number].answer(bent(requests[number], Survivors, numbers=lie))
        told = opened(answer, Shares)
        seeds |= {number: told.seeds[4]} if 4 in told.seeds else {}
        secrets |= {number: told.keys[4]} if 4 in told.keys else {}
    theirs: Any = round_.parties[4].kept()
    assert join(seeds, 3) == theirs.seed
    assert join(secrets, 3) == theirs.masking


def test_the_same_lie_is_refused_where_survivors_sign() -> None:
    round_ = Round(SUBJECTS["secagg-active"])
    requests = round_.to(3)
    lists = {c: (0, 1, 2, 3) if c == 3 else (0, 1, 2, 3, 4) for c in range(4)}
    signed = {
        c: round_.parties[c].answer(bent(requests[c], Survivors, numbers=numbers))
        for c, numbers in lists.items()
    }
    signatures = {c: opened(raw, Signature).signature for c, raw in signed.items()}
    request = readdressed(requests[0], step=4, body=encode(Signatures(signatures)))
    refused(Reason.INCONSISTENT_SURVIVORS, round_.parties[0].answer, request)


def test_a_client_set_back_to_an_older_state_answers_twice() -> None:
    """Kept state must never be restored after it was used: no message tells that it was."""
    round_ = Round(SUBJECTS["secagg"])
    requests, party = round_.to(3), round_.parties[0]
    before = encode(party.kept())
    first = opened(party.answer(bent(requests[0], Survivors, numbers=(0, 1, 2))), Shares)
    party.keep(before)
    party.step = 3
    second = opened(party.answer(requests[0]), Shares)
    assert 3 in first.keys
    assert 3 in second.seeds


@pytest.mark.parametrize("name", ["paillier", "ckks"])
def test_one_client_and_the_server_open_every_upload_under_a_shared_key(name: str) -> None:
    round_ = Round(SUBJECTS[name])
    round_.to(3)
    scheme, kept = SUBJECTS[name].aggregation, cast(Any, round_.parties[0].kept())
    (upload,) = opened(round_.sent[2][1], homomorphic.Upload).ciphertexts.values()
    (found,) = Holder(scheme, round_.terms, kept.letter).decrypt_chunks((1,), [upload])  # type: ignore[arg-type]
    assert np.array_equal(round_.terms.encoding.decode(found, clients=1), round_.vectors[1])
