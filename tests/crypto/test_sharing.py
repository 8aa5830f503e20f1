"""Shamir's shares: any threshold of them make the secret, fewer fit every secret."""

from __future__ import annotations

import os
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.crypto import Aborted, Reason, Rejected
from gradleak.crypto.field import M61
from gradleak.crypto.sharing import join, split
from gradleak.errors import InvalidInput

P = 2**61 - 1


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_shares_make_the_secret(secret: bytes, data: st.DataObject) -> None:
    numbers = data.draw(st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
    threshold = data.draw(st.integers(1, len(numbers)))
    shares = split(secret, threshold, sorted(numbers))
    chosen = data.draw(st.permutations(sorted(numbers)))[:threshold]
    assert join({v: shares[v] for v in chosen}, threshold) == secret
    assert join(shares, threshold) == secret
    with pytest.raises(Aborted, match=f"{threshold - 1} shares: expected at least {threshold}"):
        join({v: shares[v] for v in chosen[1:]}, threshold)


def test_a_large_round_and_the_hardest_secret() -> None:
    shares = split(b"\xff" * 32, 171, range(256))
    assert join({v: shares[v] for v in range(80, 256)}, 171) == b"\xff" * 32


def test_the_shares_are_those_of_a_polynomial_in_whole_numbers() -> None:
    """Lagrange's formula in Python integers, limb by limb."""
    secret = os.urandom(32)
    shares = split(secret, 3, [4, 0, 9])
    points = {v + 1: np.frombuffer(s[8:], "<u8").tolist() for v, s in shares.items()}
    assert {v: int.from_bytes(s[:8], "little") for v, s in shares.items()} == {4: 5, 0: 1, 9: 10}
    limbs = [0] * 5
    for x, values in points.items():
        weight = 1
        for other in points.keys() - {x}:
            weight = weight * other * pow(other - x, -1, P) % P
        limbs = [(limb + weight * value) % P for limb, value in zip(limbs, values, strict=True)]
    assert b"".join(limb.to_bytes(7, "little") for limb in limbs)[:32] == secret


def test_fewer_than_the_threshold_fit_every_secret_alike() -> None:
    """The random columns of every coalition below the threshold have full rank; a larger has not.

    Full rank means: for every secret there is exactly one choice of the coefficients that gives
    the coalition's shares, so the shares tell nothing of it.
    """
    threshold, points = 4, M61.residues(range(1, 8))
    columns = M61.powers(points, threshold)[:, 1:].astype(object)
    for size in range(1, threshold):
        for coalition in combinations(range(7), size):
            assert rank(columns[list(coalition)], P) == size
    assert rank(columns[:threshold], P) == threshold - 1 < threshold  # the check can fail


def rank(matrix: object, modulus: int) -> int:
    """By Gauss in Python integers."""
    rows = [[int(x) for x in row] for row in np.asarray(matrix)]
    found = 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column] % modulus), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        scale = pow(rows[found][column], -1, modulus)
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] * scale
            rows[i] = [
                (x - factor * y) % modulus for x, y in zip(rows[i], rows[found], strict=True)
            ]
        found += 1
        if found == len(rows):
            break
    return found


def test_shares_do_not_repeat() -> None:
    assert split(bytes(32), 2, [1, 2]) != split(bytes(32), 2, [1, 2])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda shares: {**shares, 1: shares[1][:-1]},
        lambda shares: {**shares, 1: shares[2]},
        lambda shares: {**shares, 1: shares[1][:-1] + b"\xff"},
        lambda shares: {**shares, 1: shares[1][:-8] + bytes(8)},
        lambda shares: {**shares, 1: split(bytes(32), 2, [1, 2, 3])[1]},
    ],
)
def test_a_spoilt_share_is_refused(spoil: object) -> None:
    shares = split(os.urandom(32), 2, [1, 2, 3])
    with pytest.raises(Rejected) as refusal:
        join(spoil(shares), 2)  # type: ignore[operator]
    assert refusal.value.reason == Reason.BAD_SHARE


@pytest.mark.parametrize(
    ("secret", "threshold", "numbers"),
    [(bytes(31), 1, [1]), (bytes(32), 0, [1]), (bytes(32), 3, [1, 2]), (bytes(32), 2, [1, 1])],
)
def test_what_cannot_be_split_is_refused(secret: bytes, threshold: int, numbers: list[int]) -> None:
    with pytest.raises(InvalidInput):
        split(secret, threshold, numbers)
