"""Ramp codes: any U shares recover, T tell nothing, checked over every small coalition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from gradleak.crypto import Aborted, FixedPoint, Terms, ntt
from gradleak.crypto.field import M31, M61, Field
from gradleak.crypto.ramp import (
    Code,
    Sizes,
    field_for,
    interpolation,
    lagrange,
    lagrange_code,
    sizes,
    spectral_code,
)
from gradleak.errors import InvalidInput
from tests.crypto.test_field import chi2
from tests.crypto.test_sharing import rank

Make = Callable[[Field, Sizes], Code]
CODES = [(lagrange_code, M31), (lagrange_code, M61), (spectral_code, ntt.N31)]
SIZES = [Sizes(2, 1, 2), Sizes(5, 2, 3), Sizes(6, 3, 5), Sizes(8, 2, 5)]


def generator(code: Code) -> np.ndarray:
    """The shares of unit blocks; random ones come last."""
    return code.spread(np.eye(code.sizes.needed, dtype=np.uint64))


def private(code: Code, matrix: np.ndarray, size: int) -> bool:
    """Whether every coalition of a size sees random columns of full rank, so that its shares fit
    every vector alike."""
    return all(
        rank(matrix[list(coalition), code.sizes.blocks :], code.field.modulus) == size
        for coalition in combinations(range(code.sizes.holders), size)
    )


@pytest.mark.parametrize(("make", "field"), CODES)
@pytest.mark.parametrize("of", SIZES, ids=str)
def test_coalitions_of_t_learn_nothing_and_any_u_recover(
    make: Make, field: Field, of: Sizes
) -> None:
    code = make(field, of)
    matrix = generator(code)
    assert all(private(code, matrix, size) for size in range(1, of.private + 1))
    assert not private(code, matrix, of.private + 1)  # one more does learn: the check can fail
    assert all(
        rank(matrix[list(chosen)], field.modulus) == of.needed
        for chosen in combinations(range(of.holders), of.needed)
    )


def test_codes_that_are_not_private_are_found() -> None:
    """Planted: shares that are the blocks themselves; random blocks that are not neighbours."""
    code = lagrange_code(M31, Sizes(6, 3, 5))
    systematic = np.vstack([np.eye(5, dtype=np.uint64), generator(code)[5:]])
    assert not private(code, systematic, 3)
    holed = ntt.forward(ntt.N31, np.eye(8, dtype=np.uint64))[:, [1, 2, 3, 0, 4]]
    assert not private(spectral_code(ntt.N31, Sizes(8, 2, 5)), holed, 2)


@pytest.mark.parametrize(("make", "field"), CODES)
@pytest.mark.parametrize("of", SIZES, ids=str)
@pytest.mark.parametrize("length", [1, 7])
def test_any_u_shares_recover_the_sum(make: Make, field: Field, of: Sizes, length: int) -> None:
    """Also where there are fewer words than blocks, and where blocks are padded."""
    code = make(field, of)
    vectors = field.uniform(bytes(32), 2 * length).reshape(2, length)
    shares = field.add(*(code.share(vector) for vector in vectors))
    assert shares.shape == (of.holders, -(-length // of.blocks))
    for count in (of.needed, of.holders):
        for chosen in combinations(range(of.holders), count):
            found = code.recover({place: shares[place] for place in chosen}, length)
            assert (found == field.add(*vectors)).all()
    with pytest.raises(Aborted, match=f"expected at least {of.needed}"):
        code.recover({place: shares[place] for place in range(of.needed - 1)}, length)


@pytest.mark.parametrize(("make", "field"), CODES)
def test_a_wrong_share_among_more_than_enough_is_found(make: Make, field: Field) -> None:
    code = make(field, Sizes(6, 2, 4))
    shares = dict(enumerate(code.share(field.uniform(bytes(32), 9))))
    shares[1] = field.add(shares[1], field.residues([0, 0, 1, 0, 0]))
    with pytest.raises(Aborted, match="contradict"):
        code.recover(shares, 9)


@pytest.mark.parametrize(("make", "field"), CODES)
def test_shares_are_uniform_and_fresh(make: Make, field: Field) -> None:
    """Shares of zeros; Pearson's chi², n = 40000 in 64 cells, alpha = 1e-6: below 135."""
    code, zeros = make(field, Sizes(4, 1, 3)), np.zeros(20_000, np.uint64)
    shares = code.share(zeros)
    assert max(chi2(share, field.modulus) for share in shares) < 135
    assert (shares != code.share(zeros)).mean() > 0.99
    blank = code.spread(np.zeros((3, 10_000), np.uint64))  # planted: no random blocks
    assert chi2(blank[0], field.modulus) > 135


@pytest.mark.parametrize("field", [M31, M61, ntt.N50], ids=lambda f: str(f.modulus))
def test_interpolation_in_whole_numbers(field: Field) -> None:
    """A polynomial's values give its coefficients and its values elsewhere."""
    p, points = field.modulus, field.residues([3, 0, 1000, 17, 5])
    coefficients = field.uniform(bytes(32), 5)

    def at(x: int) -> int:
        return sum(int(c) * pow(x, k, p) for k, c in enumerate(coefficients)) % p

    values = np.array([[at(x)] for x in points.tolist()], np.uint64)
    assert (field.matmul(interpolation(field, points), values)[:, 0] == coefficients).all()
    others = field.residues([1, 2, 99])
    found = field.matmul(lagrange(field, points, others), values)[:, 0]
    assert found.tolist() == [at(x) for x in (1, 2, 99)]


@pytest.mark.parametrize(
    ("holders", "privacy", "dropouts", "expected"),
    [
        (100, 0.5, 0.3, Sizes(100, 50, 70)),
        (100, 0.29, 0.29, Sizes(100, 29, 71)),
        (10, 3, 0.3, Sizes(10, 3, 7)),
        (2, 0.5, 0.3, Sizes(2, 1, 2)),
        (3, 2, 0, Sizes(3, 2, 3)),
    ],
)
def test_fractions_and_counts(
    holders: int, privacy: float, dropouts: float, expected: Sizes
) -> None:
    assert sizes(holders, privacy, dropouts) == expected


@pytest.mark.parametrize(
    ("holders", "privacy", "dropouts"),
    [
        (1, 0.5, 0.3),
        (10, 0, 0),
        (10, 0.05, 0),
        (10, 0.5, 0.5),
        (10, 7, 3),
        (9, -1, 0),
        (9, 1.5, 0),
        (9, 1, float("nan")),
    ],
)
def test_sizes_that_protect_nothing_or_recover_nothing_are_refused(
    holders: int, privacy: float, dropouts: float
) -> None:
    with pytest.raises(InvalidInput, match=r"privacy|dropouts"):
        sizes(holders, privacy, dropouts)


def test_the_field_is_the_first_that_no_sum_overflows() -> None:
    def terms(clients: int, clip: float = 8.0, fraction: int = 20) -> Terms:
        encoding = FixedPoint(clip=clip, fraction=fraction)
        return Terms(bytes(16), tuple(range(clients)), 1, encoding)

    assert field_for(terms(127), M31, M61) == M31
    assert field_for(terms(128), M31, M61) == M61
    with pytest.raises(InvalidInput, match="overflow modulo 2305843009213693951"):
        field_for(terms(256, 2.0**20, 32), M31, M61)
