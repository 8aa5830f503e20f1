"""Flower's SecAgg+ (1.41) held to the same laws: what holds, and what does not.

`docs/findings/flower-secagg-plus.md` tells what follows. A test that shows a limit passes while the
limit is there, so that a new Flower is noticed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)

from gradleak.crypto.conformance import LAWS, Broken, whole_seed
from gradleak.federate.grid import FIRST_NODE
from tests.crypto.conformance.flower import FlowerSecAggPlus, Grid

VECTORS = {c: np.full(3, c, float) for c in range(5)}
ZERO, ONE, TWO = FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("flwr").setLevel(before)


def told(stage: str, client: int, changes: dict[str, Any]) -> tuple[Grid, Message]:
    """A round in which one client is told something else at one stage, and that client's answer.

    A change is a new value of the stage's record, or a function of the old one.
    """

    def edit(at: str, receiver: int, message: Message) -> None:
        if (at, receiver) == (stage, client):
            record = message.content.config_records[RECORD_KEY_CONFIGS]
            for key, change in changes.items():
                record[key] = change(record[key]) if callable(change) else change

    _, grid = FlowerSecAggPlus().run(VECTORS, {}, edit, last=stage)
    (answer,) = (a for s, c, a in grid.answers if (s, c) == (stage, client))
    return grid, answer


def record(answer: Message) -> Any:
    return answer.content.config_records[RECORD_KEY_CONFIGS]


# What holds.


@pytest.mark.parametrize("law", ["uniform", "fresh", "unseeded"])
def test_masks_are_uniform_fresh_and_not_seeded_from_outside(law: str) -> None:
    """n = 4097 words of each of 5 clients; the laws' levels."""
    LAWS[law](FlowerSecAggPlus())


@pytest.mark.slow
def test_a_lost_client_never_makes_a_wrong_sum() -> None:
    LAWS["never_wrong"](FlowerSecAggPlus())


def test_clients_lost_after_the_keys_are_shared_are_survived() -> None:
    for drops in ({1: 2, 3: 2}, {1: 2, 3: 3}):
        total = FlowerSecAggPlus().play(VECTORS, drops).total
        assert total.values == pytest.approx(sum(VECTORS[c] for c in total.clients))


@pytest.mark.parametrize(
    ("stage", "changes", "why"),
    [
        (Stage.SHARE_KEYS, {str(ONE): lambda k: [k[0], k[0]]}, "public keys are identical"),
        (Stage.SHARE_KEYS, {str(ZERO): lambda k: k[::-1]}, "Own public keys"),
        (Stage.SHARE_KEYS, {str(ONE): [b"no key", b"no key either"]}, "ValueError"),
        (Stage.SHARE_KEYS, {Key.STAGE: Stage.UNMASK}, "Abort secure aggregation"),
        (Stage.COLLECT_MASKED_VECTORS, {Key.STAGE: Stage.SHARE_KEYS}, "Abort secure aggregation"),
        (Stage.COLLECT_MASKED_VECTORS, {Key.SOURCE_LIST: lambda s: s[::-1]}, "InvalidToken"),
        (
            Stage.COLLECT_MASKED_VECTORS,
            {Key.CIPHERTEXT_LIST: lambda c: [c[0][:-9] + b"A" + c[0][-8:], *c[1:]]},
            "InvalidToken",
        ),
        (
            Stage.COLLECT_MASKED_VECTORS,
            {Key.CIPHERTEXT_LIST: lambda c: c[:1], Key.SOURCE_LIST: lambda s: s[:1]},
            "Not enough available",
        ),
        (Stage.UNMASK, {Key.ACTIVE_NODE_ID_LIST: [ONE]}, "smaller than threshold"),
    ],
    ids=[
        "duplicated-key",
        "own-key-changed",
        "no-key",
        "step-skipped",
        "step-repeated",
        "letters-swapped",
        "letter-changed",
        "too-few-letters",
        "too-few-survivors",
    ],
)
def test_a_client_refuses(stage: str, changes: dict[str, Any], why: str) -> None:
    _, answer = told(stage, 0, changes)
    assert answer.has_error()
    assert why in answer.error.reason


# What does not.


def test_a_client_lost_before_the_vectors_ends_the_round() -> None:
    """One of five, three needed: the others are asked for shares that they never had."""
    for step in (0, 1):
        strategy, grid = FlowerSecAggPlus().run(VECTORS, {1: step})
        assert strategy.mean is None
        last = [answer.error.reason for stage, _, answer in grid.answers if stage == Stage.UNMASK]
        assert last == [f"KeyError: {ONE}"] * 4
    with pytest.raises(Broken, match="must survive"):
        LAWS["exact"](FlowerSecAggPlus())


def test_an_even_number_of_shares_ends_the_round() -> None:
    """Clients are told the number before the workflow makes it odd: 4 shares for 5 holders."""
    vectors = {c: np.zeros(3) for c in range(7)}
    strategy, grid = FlowerSecAggPlus(clients=7, shares=4, threshold=2).run(vectors, {})
    assert strategy.mean is None
    errors = [a.error.reason for s, _, a in grid.answers if s == Stage.SHARE_KEYS]
    assert errors == ["IndexError: list index out of range"] * 7
    assert FlowerSecAggPlus(clients=7, shares=5, threshold=2).run(vectors, {})[0].mean is not None


def test_mask_seeds_have_32_bits_and_those_of_pairs_28() -> None:
    """n = 200 keys: a bit that varies is seen to, but with probability 28·2⁻¹⁹⁹."""
    with pytest.raises(Broken, match="give one mask"):
        whole_seed(lambda seed: pseudo_rand_gen(seed, 2**32, [(8,)])[0].astype(np.uint64))
    public = generate_key_pairs()[1]
    folds = [
        np.bitwise_xor.reduce(np.frombuffer(generate_shared_key(secret, public), "<u4"))
        for secret in (generate_key_pairs()[0] for _ in range(200))
    ]
    varying = np.bitwise_or.reduce([fold ^ folds[0] for fold in folds])
    assert int(varying).bit_count() == 28
    folds = [np.bitwise_xor.reduce(np.frombuffer(os.urandom(32), "<u4")) for _ in range(200)]
    assert int(np.bitwise_or.reduce([f ^ folds[0] for f in folds])).bit_count() == 32


def test_masks_leave_out_the_two_largest_values() -> None:
    """n = 1000 draws below 4: with all values possible, P(3 never) = 0.75^1000."""
    (mask,) = pseudo_rand_gen(bytes(32), 4, [(1000,)])
    assert set(mask.tolist()) == {0, 1, 2}


def test_a_client_gives_both_shares_of_a_peer_named_alive_and_dead() -> None:
    _, answer = told(Stage.UNMASK, 0, {Key.DEAD_NODE_ID_LIST: [ONE]})
    assert not answer.has_error()
    shares = [
        s for n, s in zip(*map(record(answer).get, (Key.NODE_ID_LIST, Key.SHARE_LIST))) if n == ONE
    ]
    assert [len(share) for share in shares] == [4 + 48, 4 + 320]  # of the seed, of the key


def test_clients_told_of_different_survivors_all_answer() -> None:
    grid, _ = told(
        Stage.UNMASK,
        0,
        {
            Key.ACTIVE_NODE_ID_LIST: lambda ids: [i for i in ids if i != ONE],
            Key.DEAD_NODE_ID_LIST: [ONE],
        },
    )
    assert not any(a.has_error() for stage, _, a in grid.answers if stage == Stage.UNMASK)


def test_one_survivor_named_three_times_is_three_survivors() -> None:
    _, answer = told(Stage.UNMASK, 0, {Key.ACTIVE_NODE_ID_LIST: [ONE] * 3})
    assert not answer.has_error()


def test_one_letter_sent_twice_is_two_letters() -> None:
    twice = partial(lambda items: items[:1] * 2)
    changes = {Key.CIPHERTEXT_LIST: twice, Key.SOURCE_LIST: twice}
    _, answer = told(Stage.COLLECT_MASKED_VECTORS, 0, changes)
    assert not answer.has_error()


def test_keys_are_believed_from_the_server() -> None:
    """The server puts its own key in a peer's place and opens the letter meant for that peer."""
    secret, public = generate_key_pairs()
    planted = public_key_to_bytes(public)
    grid, answer = told(Stage.SHARE_KEYS, 0, {str(ONE): lambda keys: [keys[0], planted]})
    (keys,) = (record(a) for s, c, a in grid.answers if (s, c) == (Stage.SETUP, 0))
    shared = generate_shared_key(secret, bytes_to_public_key(keys[Key.PUBLIC_KEY_2]))
    place = record(answer)[Key.DESTINATION_LIST].index(ONE)
    letter = decrypt(shared, record(answer)[Key.CIPHERTEXT_LIST][place])
    assert share_keys_plaintext_separate(letter)[:2] == (ZERO, ONE)


def test_clients_take_any_threshold_and_modulus() -> None:
    _, answer = told(Stage.SETUP, 0, {Key.THRESHOLD: 1, Key.MOD_RANGE: 2})
    assert not answer.has_error()


def test_numbers_of_examples_and_metrics_are_in_the_clear() -> None:
    strategy, _ = FlowerSecAggPlus(examples=400).run(VECTORS, {})
    assert {(r.num_examples, r.metrics["loss"]) for _, r in strategy.results} == {(400, 0.5)}


@pytest.mark.parametrize(("examples", "right"), [(1000, True), (260_000, False)])
def test_weights_beyond_the_largest_wrap_round(examples: int, right: bool) -> None:
    """Five weights of 260·2²² pass 2³²: a warning is logged and a wrong mean is returned."""
    vectors = {c: np.full(3, 0.01) for c in range(5)}
    strategy, _ = FlowerSecAggPlus(examples=examples).run(vectors, {})
    assert strategy.mean is not None
    assert np.allclose(strategy.mean, 0.01, atol=1e-4) == right


def test_1024_clients_at_the_clip_wrap_round() -> None:
    """Only a number of shares above it is warned of, and only where it is an integer."""
    (top,) = quantize([np.full(3, 8.0)], 8.0, 2**22)
    assert (1023 * top.astype(np.int64) % 2**32 == 1023 * 2**22).all()
    assert (1024 * top.astype(np.int64) % 2**32 == 0).all()
