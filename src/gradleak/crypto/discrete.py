"""Integer noise, exactly: discrete Gaussian, Poisson, Skellam.

Rejection below a staircase that halves every t integers, for any log-concave law on the integers
with mode m:

    K = ±(U + t·V),   U uniform below t = 2^j,   V geometric with ratio ½   (random bits alone)
    accept with probability p = exp(log P(m+K)/P(m) + V·ln 2 − c),   c = max over K, so that p ≤ 1

The one comparison, of a uniform number with p, is decided in floating point where the first 64
bits of the number and a bound on the rounding error of p leave no doubt, and otherwise with as
many further bits, of both, as it takes. What is drawn therefore has exactly the law, given that
ChaCha20's key stream under a fresh key of the operating system is uniform; no table is cut off and
no tail is missing. About half of the candidates are accepted.

Source: Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy",
algorithm 3 (rejection from a geometric hull); the halving staircase and the lazy comparison are
ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from gradleak.crypto.encoding import Integers, Reals
from gradleak.crypto.keys import fresh, words64
from gradleak.errors import InvalidInput

_LN2 = math.log(2.0)
_CHUNK = 1 << 18
_LARGEST = 2.0**50  # beyond, floats no longer hold every integer that may come


def discrete_gaussian(variance: float, count: int) -> Integers:
    """P(k) ∝ exp(−k²/2σ²) on the integers.

    Args:
        variance: σ², 0 < σ² ≤ 2⁵⁰; the law's own variance is at most that.
        count: how many.
    """
    _check(variance)
    return _sample(_Gaussian(variance), math.sqrt(variance), count)


def poisson(rate: float, count: int) -> Integers:
    """P(k) = e^−λ λ^k / k!."""
    _check(rate)
    return _sample(_Poisson(rate), math.sqrt(rate), count)


def skellam(variance: float, count: int) -> Integers:
    """The difference of two Poissons with rate μ/2: variance μ, and sums add variances."""
    return poisson(variance / 2, count) - poisson(variance / 2, count)


def _check(variance: float) -> None:
    if not 0 < variance <= _LARGEST:
        raise InvalidInput(f"variance={variance}: expected a positive number up to 2^50")


class _Law(Protocol):
    @property
    def mode(self) -> int: ...

    @property
    def error(self) -> float:
        """Bounds the error of `log_ratio` wherever it exceeds −90, four times over."""
        ...

    def log_ratio(self, k: Integers) -> Reals:
        """log P(m+k)/P(m)."""
        ...

    def exact(self, k: int) -> Any:
        """The same as an mpfr, at the precision that is set."""
        ...


@dataclass(frozen=True)
class _Gaussian:
    variance: float
    mode = 0
    error = 2.0**-40

    def log_ratio(self, k: Integers) -> Reals:
        return k.astype(np.float64) ** 2 / (-2 * self.variance)

    def exact(self, k: int) -> Any:
        from gmpy2 import mpfr

        return -(mpfr(k) ** 2) / (2 * mpfr(self.variance))


@dataclass(frozen=True)
class _Poisson:
    rate: float

    @property
    def mode(self) -> int:
        return math.floor(self.rate)

    @property
    def error(self) -> float:
        return 2.0**-34 + 2.0**-44 * math.sqrt(self.rate)

    def log_ratio(self, k: Integers) -> Reals:
        x = (self.mode + k).astype(np.float64)
        return self._log(x) - float(self._log(np.array([float(self.mode)]))[0])

    def _log(self, x: Reals) -> Reals:
        """log P(x), up to a constant; Stirling's series where its arguments are large."""
        if self.rate < 1024:
            known = np.maximum(x, 0)
            return np.where(x < 0, -np.inf, known * math.log(self.rate) - gammaln(known + 1))
        known = np.maximum(x, 32)  # below: too improbable to be told from 0
        away = (known - self.rate) / self.rate
        deviance = self.rate * ((1 + away) * np.log1p(away) - away)
        inverse = 1 / known
        series = inverse * (1 / 12 - inverse**2 * (1 / 360 - inverse**2 / 1260))
        return np.where(x < 32, -np.inf, -deviance - series - np.log(known) / 2)

    def exact(self, k: int) -> Any:
        from gmpy2 import lgamma, log, mpfr

        if self.mode + k < 0:
            return mpfr("-inf")
        return (
            k * log(mpfr(self.rate))
            + lgamma(mpfr(self.mode + 1))[0]
            - lgamma(mpfr(self.mode + k + 1))[0]
        )


def _sample(law: _Law, deviation: float, count: int) -> Integers:
    shift = max(0, math.floor(math.log2(1.177 * deviation)))
    steps = np.arange(128)
    ends = np.concatenate([steps, -steps]) << shift
    top = float((law.log_ratio(ends) + np.tile(steps, 2) * _LN2).max()) + 2.0**-20
    found: list[Integers] = []
    missing = count
    while missing > 0:
        size = min(2 * missing + missing // 8 + 64, _CHUNK)
        bits, halvings, uniform = words64(fresh(), 3 * size).reshape(3, size)
        negative = (bits & np.uint64(1)).astype(bool)
        v = _trailing_ones(halvings)
        k = (bits >> np.uint64(1) & np.uint64((1 << shift) - 1)).astype(np.int64) + (v << shift)
        k = np.where(negative, -k, k)
        kept = _below(law, k, v, top, uniform) & ~(negative & (k == 0))  # 0 has one sign only
        found.append(k[kept] + law.mode)
        missing -= len(found[-1])
    return np.concatenate(found)[:count] if found else np.zeros(0, np.int64)


def _trailing_ones(words: NDArray[np.uint64]) -> Integers:
    """A geometric number from each word, continued where the word is used up."""
    lowest = ~words & (words + np.uint64(1))  # the lowest zero, as a power of two
    ones = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
    if (full := lowest == 0).any():
        ones[full] = 64 + _trailing_ones(words64(fresh(), int(full.sum())))
    return ones


def _below(
    law: _Law, k: Integers, v: Integers, top: float, words: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Whether uniform numbers that begin with these 64 bits lie below exp(log ratio + v ln 2 − c).

    Outside `error` around the floating-point value there is no doubt.
    """
    bound = np.exp(law.log_ratio(k) + v * _LN2 - top)
    uniform = words.astype(np.float64) * 2.0**-64
    below = uniform + 2.0**-60 < bound * (1 - law.error)
    doubtful = ~below & (uniform - 2.0**-60 <= bound * (1 + law.error))
    for i in np.flatnonzero(doubtful):
        below[i] = _settled(law, int(k[i]), int(v[i]), top, int(words[i]))
    return below


def _settled(law: _Law, k: int, v: int, top: float, word: int) -> bool:
    """The same for one number, with as many further bits as it takes."""
    import gmpy2
    from gmpy2 import mpfr

    bits = 64
    while True:
        with gmpy2.context(precision=bits + 128):
            bound = gmpy2.exp(law.exact(k) + v * gmpy2.const_log2() - mpfr(top))
            bound = gmpy2.mul_2exp(bound, bits)
            slack = gmpy2.div_2exp(bound, bits + 32)
            if word + 1 <= bound - slack:
                return True
            if word >= bound + slack:
                return False
        word, bits = word << 64 | int.from_bytes(fresh(8)), bits + 64
