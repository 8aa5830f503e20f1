"""Field arithmetic and transforms against Python integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.crypto import Reason, Rejected, ntt
from gradleak.crypto.field import M31, M61, Field
from gradleak.crypto.keys import words32
from gradleak.errors import InvalidInput

FIELDS = [M31, M61, ntt.N31, ntt.N50, Field(2), Field(257)]
SEED = bytes(range(32))


def drawn(field: Field, *shape: int) -> np.ndarray:
    """Uniform, with the hardest residues among them."""
    values = field.uniform(SEED, int(np.prod(shape)))
    edges = [0, 1, field.modulus - 1, field.modulus // 2, field.modulus // 2 + 1]
    values[: len(edges)] = np.array(edges[: len(values)], np.uint64) % field.modulus
    return values.reshape(shape)


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: str(f.modulus))
def test_operations_are_those_of_whole_numbers(field: Field) -> None:
    p, a = field.modulus, drawn(field, 40)
    x, y = a[:, None], a
    big, own = x.astype(object), y.astype(object)
    assert (field.add(x, y) == (big + own) % p).all()
    assert (field.sub(x, y) == (big - own) % p).all()
    assert (field.mul(x, y) == big * own % p).all()
    assert field.power(a, 29).tolist() == [pow(v, 29, p) for v in a.tolist()]
    assert field.product(a[a > 0]) == np.prod(a[a > 0].astype(object)) % p
    assert (field.mul(a[a > 0], field.inverse(a[a > 0])) == 1).all()
    assert field.powers(a, 7).tolist() == [[pow(v, k, p) for k in range(7)] for v in a.tolist()]
    assert field.residues([1 - p, -1, 0, p - 1]).tolist() == [1, p - 1, 0, p - 1]
    with pytest.raises(ZeroDivisionError):
        field.inverse(a[:1])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FIELDS), st.integers(0, 2**61), st.integers(0, 2**61))
def test_products_of_any_two(field: Field, a: int, b: int) -> None:
    a, b = a % field.modulus, b % field.modulus
    assert int(field.mul([a], [b])[0]) == a * b % field.modulus


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: str(f.modulus))
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 300, 7), (2, 5, 2050)])
def test_products_of_matrices_are_exact(field: Field, shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    a, b = drawn(field, n, k), drawn(field, k, m)
    assert (field.matmul(a, b) == a.astype(object) @ b.astype(object) % field.modulus).all()


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: str(f.modulus))
@pytest.mark.parametrize("half", [0, 1])
def test_the_largest_sums_of_products_are_exact(field: Field, half: int) -> None:
    """All limbs at their extremes, over more terms than are added at once."""
    extremes = [np.uint64(field.modulus // 2 + half), np.uint64(field.modulus // 2 + 1 - half)]
    a = np.full((1, 4100), extremes[0])
    b = np.full((4100, 2), extremes)
    limbs = np.uint64(sum(2**15 << 16 * k for k in range(4)) % field.modulus)
    for left, right in ((a, b), (np.full_like(a, limbs), np.full_like(b, limbs))):
        expected = left.astype(object) @ right.astype(object) % field.modulus
        assert (field.matmul(left, right) == expected).all()


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: str(f.modulus))
def test_uniform_residues(field: Field) -> None:
    """Pearson's chi², n = 64000 in at most 64 cells; alpha = 1e-6: below 135 at 63 degrees."""
    drawn = field.uniform(SEED, 64_000)
    assert drawn.dtype == np.uint64
    assert drawn.max() < field.modulus
    assert chi2(drawn, field.modulus) < 135
    assert (field.uniform(SEED, 100) == drawn[:100]).all()
    folded = np.minimum(drawn, np.uint64(field.modulus - 1) - drawn)  # a planted fault
    assert chi2(folded, field.modulus) > 135


def chi2(values: np.ndarray, modulus: int) -> float:
    cells = min(64, modulus)
    edges = [-(-k * modulus // cells) for k in range(cells + 1)]
    found = np.histogram(values.astype(np.float64), bins=[e - 0.5 for e in edges])[0]
    expected = len(values) * np.diff([float(e) for e in edges]) / modulus
    return float(((found - expected) ** 2 / expected).sum())


def test_rejection_leaves_no_bias_where_a_remainder_does() -> None:
    """Modulo 3·2³⁰ + 1, remainders of 32 bits are below 2³⁰ half of the time instead of a third;
    n = 30000, alpha = 1e-6 (4.9 standard errors)."""
    modulus, near = 3 * 2**30 + 1, 4.9 * (2 / 9 / 30_000) ** 0.5
    assert abs(np.mean(Field(modulus).uniform(SEED, 30_000) < 2**30) - 1 / 3) < near
    assert abs(np.mean(words32(SEED, 30_000) % modulus < 2**30) - 1 / 3) > near


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (np.zeros(2, np.uint32), Reason.WRONG_LENGTH),
        (np.zeros(3, np.uint64), Reason.MALFORMED),
        (np.array([0, 2**31 - 1, 0], np.uint32), Reason.OUT_OF_RANGE),
    ],
)
def test_words_that_are_no_residues_are_refused(words: np.ndarray, reason: Reason) -> None:
    with pytest.raises(Rejected) as refusal:
        M31.read(words, 3)
    assert refusal.value.reason == reason
    assert M31.read(M31.write(drawn(M31, 5)), 5).tolist() == drawn(M31, 5).tolist()
    assert M61.read(M61.write(drawn(M61, 5)), 5).tolist() == drawn(M61, 5).tolist()


@pytest.mark.parametrize("field", [ntt.N31, ntt.N50], ids=lambda f: str(f.modulus))
@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_the_transform_is_the_naive_one(field: Field, size: int) -> None:
    omega, x = ntt.root(field, size), drawn(field, size, 3)
    assert [k for k in range(1, size + 1) if pow(omega, k, field.modulus) == 1] == [size]
    matrix = np.array(
        [[pow(omega, i * j, field.modulus) for j in range(size)] for i in range(size)], object
    )
    assert (ntt.forward(field, x) == matrix @ x.astype(object) % field.modulus).all()
    assert (ntt.backward(field, ntt.forward(field, x)) == x).all()
    assert (ntt.forward(field, x[:, 0]) == ntt.forward(field, x)[:, 0]).all()


@pytest.mark.parametrize("size", [0, 3, 2**21])
def test_sizes_without_a_root_are_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match="power of two"):
        ntt.root(ntt.N50, size)
