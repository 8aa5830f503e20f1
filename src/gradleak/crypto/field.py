"""Vectors over prime fields: residues in uint64, no overflow, products of matrices by BLAS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradleak.crypto import keys
from gradleak.crypto.encoding import Integers
from gradleak.crypto.rejection import Reason, Rejected
from gradleak.crypto.wire import Words

Residues = NDArray[np.uint64]

_MERSENNE = 2**61 - 1
_COLUMNS = 2048


@dataclass(frozen=True)
class Field:
    """The integers modulo a prime, which is below 2⁵⁰, or 2⁶¹ − 1.

    Operations take residues (below the modulus) of shapes that broadcast, and give residues.

    Args:
        modulus: the prime.
    """

    modulus: int

    @property
    def bits(self) -> int:
        """Of the largest residue."""
        return self.modulus.bit_length()

    @property
    def word(self) -> type[np.uint32] | type[np.uint64]:
        """The narrowest word for a residue on the wire."""
        return np.uint32 if self.bits <= 32 else np.uint64

    def residues(self, integers: Integers | Iterable[int]) -> Residues:
        """Residues of integers between −modulus and modulus, both excluded."""
        words = np.asarray(integers, dtype=np.int64).view(np.uint64)  # negative ones are huge
        found: Residues = np.minimum(words, words + np.uint64(self.modulus))
        return found

    def write(self, residues: Residues) -> Words:
        """Residues in the narrowest words, as they are sent."""
        return residues.astype(np.uint32) if self.word is np.uint32 else residues

    def read(self, words: Words, length: int) -> Residues:
        """Residues that arrived.

        Raises:
            Rejected: WRONG_LENGTH, MALFORMED (another word), or OUT_OF_RANGE.
        """
        if len(words) != length:
            raise Rejected(Reason.WRONG_LENGTH, f"{len(words)} words: expected {length}")
        if words.itemsize != self.word().itemsize:
            raise Rejected(Reason.MALFORMED, f"{words.dtype} words: expected {self.word.__name__}")
        if (words >= self.modulus).any():
            raise Rejected(Reason.OUT_OF_RANGE, f"words modulo {self.modulus} that exceed it")
        return words.astype(np.uint64)

    def uniform(self, seed: bytes, count: int) -> Residues:
        """Residues drawn from a seed's key stream, those that are none being skipped."""
        missed = count * (2**self.bits - self.modulus) // self.modulus
        spare, drawn = 8 + missed + 4 * int(missed**0.5), np.empty(0, self.word)
        while len(drawn) < count:
            raw = np.frombuffer(
                keys.stream(seed, (count + spare) * drawn.itemsize), np.dtype(self.word)
            )
            raw &= self.word(2**self.bits - 1)
            good = raw < self.modulus
            drawn, spare = raw if good.all() else raw[good], 2 * spare
        return drawn[:count].astype(np.uint64)

    def add(self, a: ArrayLike, b: ArrayLike) -> Residues:
        """a + b."""
        total = np.add(a, b, dtype=np.uint64)
        found: Residues = np.minimum(total, total - np.uint64(self.modulus))
        return found

    def sub(self, a: ArrayLike, b: ArrayLike) -> Residues:
        """a − b."""
        difference = np.subtract(a, b, dtype=np.uint64)
        found: Residues = np.minimum(difference, difference + np.uint64(self.modulus))
        return found

    def mul(self, a: ArrayLike, b: ArrayLike) -> Residues:
        """a · b.

        Below 2⁵⁰ the quotient ⌊ab/p⌋ is guessed in float64: three roundings of a number below p
        err by less than 3·2⁻⁵³·2⁵⁰ < 1, so the remainder modulo 2⁶⁴ is off by at most one p.
        """
        a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
        if self.modulus == _MERSENNE:
            return _mul61(a, b)
        guess = (a.astype(np.float64) * b * (1.0 / self.modulus)).astype(np.uint64)
        rest = a * b - guess * np.uint64(self.modulus)
        rest = np.minimum(rest, rest + np.uint64(self.modulus))
        found: Residues = np.minimum(rest, rest - np.uint64(self.modulus))
        return found

    def power(self, a: ArrayLike, exponent: int) -> Residues:
        """a to an exponent ≥ 0."""
        square, found = np.asarray(a, np.uint64), np.ones_like(np.asarray(a, np.uint64))
        while exponent:
            if exponent & 1:
                found = self.mul(found, square)
            square, exponent = self.mul(square, square), exponent >> 1
        return found

    def inverse(self, a: ArrayLike) -> Residues:
        """1/a, by Fermat.

        Raises:
            ZeroDivisionError: one is zero.
        """
        if not np.all(a):
            raise ZeroDivisionError("0 has no inverse")
        return self.power(a, self.modulus - 2)

    def product(self, a: Residues) -> Residues:
        """Product over the first axis."""
        while len(a) > 1:
            half = len(a) // 2
            a = np.concatenate([self.mul(a[:half], a[half : 2 * half]), a[2 * half :]])
        found: Residues = a[0]
        return found

    def powers(self, base: Residues, count: int) -> Residues:
        """Vandermonde's matrix: 1, a, …, a^(count−1) of each, shape `(len(base), count)`."""
        found = np.ones((len(base), 1), np.uint64)
        while (have := found.shape[1]) < count:
            step = self.power(base, have)
            found = np.concatenate([found, self.mul(found, step[:, None])], axis=1)
        return found[:, :count]

    def matmul(self, a: Residues, b: Residues) -> Residues:
        """a @ b, shapes (n, k) and (k, m), exactly, by float64 BLAS on limbs.

        Residues are centred, |x| < 2^(bits−1), and cut into signed limbs of w bits, of at most
        2^(w−1) (the highest possibly one more). Limbs of u and w bits multiplied and added over at
        most 2^(54−u−w) terms stay below 2⁵³, where float64 adds integers without rounding:

            bits   limbs of a   limbs of b   terms
              31       1 × 31       2 × 16     128
              50       2 × 25       3 × 17    4096
              61       3 × 21       3 × 21    2048, as up to three are of equal place
        """
        (n, k), m = a.shape, b.shape[1]
        left, right, terms = _CUTS[31 if self.bits <= 31 else 50 if self.bits <= 50 else 61]
        found = np.zeros((n, m), np.uint64)
        for low in range(0, k, terms):
            rows = [np.ascontiguousarray(x) for x in self._limbs(a[:, low : low + terms], *left)]
            for at in range(0, m, _COLUMNS):
                here = np.s_[:, at : at + _COLUMNS]
                limbs = self._limbs(b[low : low + terms][here], *right)
                part = self._joined(rows, limbs, left[1], right[1])
                found[here] = self.add(found[here], part) if low else part
        return found

    def _limbs(self, a: Residues, count: int, width: int) -> list[NDArray[np.float64]]:
        rest = a.astype(np.int64)
        rest -= (rest > self.modulus // 2) * np.int64(self.modulus)
        limbs, half = [], 1 << (width - 1)
        for _ in range(count - 1):
            low = ((rest + half) & (2 * half - 1)) - half
            limbs.append(low.astype(np.float64))
            rest = (rest - low) >> width
        return [*limbs, rest.astype(np.float64)]

    def _joined(
        self,
        rows: list[NDArray[np.float64]],
        columns: list[NDArray[np.float64]],
        u: int,
        w: int,
    ) -> Residues:
        """Σᵢⱼ rowsᵢ @ columnsⱼ · 2^(ui + wj), by Horner's rule."""
        if self.bits <= 31:  # |residue·2¹⁶ + low| < 2⁴⁷ + 2⁵² still is exact
            high = self._reduced(rows[0] @ columns[1])
            return self._reduced(high * 2.0**w + rows[0] @ columns[0]).astype(np.uint64)
        parts: dict[int, NDArray[np.float64]] = {}
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                parts[u * i + w * j] = parts.get(u * i + w * j, 0.0) + row @ column
        found: Residues = np.zeros((len(rows[0]), columns[0].shape[1]), np.uint64)
        above = max(parts)
        for shift in sorted(parts, reverse=True):
            part = parts[shift] if self.modulus == _MERSENNE else self._reduced(parts[shift])
            found = self._shifted(found, above - shift)
            found, above = self.add(found, self.residues(part.astype(np.int64))), shift
        return found

    def _shifted(self, a: Residues, places: int) -> Residues:
        """a · 2^places, below 2⁶¹; modulo 2⁶¹ − 1, bits go round."""
        if self.modulus != _MERSENNE:
            return self.mul(a, 2**places)
        up, down = np.uint64(places), np.uint64(61 - places)
        return ((a << up) & np.uint64(_MERSENNE)) | (a >> down)

    def _reduced(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Residues below 2⁵⁰ of integers below 2⁵³; the guessed quotient is off by at most one."""
        p = float(self.modulus)
        x = x - np.floor(x * (1.0 / p)) * p
        x -= p * (x >= p)
        return x + p * (x < 0)


_CUTS = {
    31: ((1, 31), (2, 16), 128),
    50: ((2, 25), (3, 17), 4096),
    61: ((3, 21), (3, 21), 2048),
}


def _mul61(a: Residues, b: Residues) -> Residues:
    """Modulo 2⁶¹ − 1: halves of 32 bits, 2⁶¹ being 1."""
    p, low = np.uint64(_MERSENNE), np.uint64(2**32 - 1)
    high_a, low_a, high_b, low_b = a >> 32, a & low, b >> 32, b & low
    middle = high_a * low_b + low_a * high_b  # < 2⁶²
    least = low_a * low_b
    total = ((high_a * high_b) << 3) + (middle >> 29) + ((middle << 32) & p) + (least & p)
    total += least >> 61  # < 4·2⁶¹
    total = (total & p) + (total >> 61)
    found: Residues = np.minimum(total, total - p)
    return found


M31 = Field(2**31 - 1)
M61 = Field(_MERSENNE)
