"""Integer noise against the exact laws."""

from __future__ import annotations

from collections.abc import Callable

import gmpy2
import numpy as np
import pytest
from scipy import special, stats

from gradleak.crypto import discrete
from gradleak.crypto.discrete import _below, _Gaussian, _Poisson, _settled, _trailing_ones
from gradleak.crypto.encoding import Integers, Reals
from gradleak.crypto.keys import fresh, words64
from gradleak.errors import InvalidInput

N = 100_000
ALPHA = 1e-6  # per test below

Pmf = Callable[[Integers], Reals]


def p_value(drawn: Integers, pmf: Pmf) -> float:
    """χ² over every integer that is expected at least ten times; the rest is one cell."""
    k = np.arange(drawn.min(), drawn.max() + 1)
    expected = pmf(k) * len(drawn)
    often = expected >= 10
    seen = np.bincount(drawn - drawn.min(), minlength=len(k))[often]
    rest = len(drawn) - expected[often].sum()
    cells = ((seen - expected[often]) ** 2 / expected[often]).sum()
    cells += (len(drawn) - seen.sum() - rest) ** 2 / max(rest, 1.0)
    return float(stats.chi2.sf(cells, len(seen)))


def gaussian(variance: float) -> Pmf:
    whole = np.exp(-(np.arange(-4000, 4001) ** 2) / (2 * variance)).sum()
    return lambda k: np.exp(-(k**2) / (2 * variance)) / whole


def skellam(variance: float) -> Pmf:
    return lambda k: np.asarray(special.ive(np.abs(k), variance))


def poisson(rate: float) -> Pmf:
    return lambda k: np.asarray(stats.poisson.pmf(k, rate))


LAWS = [
    (discrete.discrete_gaussian, gaussian, (0.02, 0.25, 1.0, 9.0, 2500.0)),
    (discrete.skellam, skellam, (0.02, 0.25, 1.0, 9.0, 2500.0)),
    (discrete.poisson, poisson, (0.3, 7.5, 1023.9, 1024.5, 90000.0)),
]


@pytest.mark.parametrize(
    ("draw", "pmf", "size"), [(draw, pmf, size) for draw, pmf, sizes in LAWS for size in sizes]
)
def test_draws_have_the_law(
    draw: Callable[[float, int], Integers], pmf: Callable[[float], Pmf], size: float
) -> None:
    """n = 100000, χ² at alpha = 1e-6."""
    assert p_value(draw(size, N), pmf(size)) > ALPHA


@pytest.mark.parametrize("variance", [0.25, 1.0])
def test_the_test_finds_a_rounded_gaussian(variance: float) -> None:
    """Its P(0) is 0.68 instead of 0.79 at σ = ½; at σ = 1 its variance is 1.083."""
    rounded = np.rint(np.random.default_rng(0).normal(0, variance**0.5, N)).astype(np.int64)
    assert p_value(rounded, gaussian(variance)) < ALPHA


def test_the_test_tells_the_laws_apart() -> None:
    assert p_value(discrete.skellam(1.0, N), gaussian(1.0)) < ALPHA
    assert p_value(discrete.discrete_gaussian(1.0, N), skellam(1.0)) < ALPHA


@pytest.mark.parametrize("variance", [1e6, 1e10, 2.0**48])
@pytest.mark.parametrize("draw", [discrete.discrete_gaussian, discrete.skellam])
def test_large_noise_is_nearly_gaussian(
    draw: Callable[[float, int], Integers], variance: float
) -> None:
    """Kolmogorov–Smirnov, n = 50000, alpha = 1e-6; a tenth less deviation is found."""
    drawn = draw(variance, 50_000) / variance**0.5
    assert stats.kstest(drawn, "norm").pvalue > ALPHA
    assert stats.kstest(drawn * 0.9, "norm").pvalue < ALPHA


@pytest.mark.parametrize("law", [_Gaussian(7.0), _Gaussian(1e9), _Poisson(300.2), _Poisson(1e11)])
def test_quick_decisions_are_the_exact_ones(law: _Gaussian | _Poisson) -> None:
    """Words within 2⁻³⁵ of p on either side, and anywhere."""
    size = 300
    spread = 2 * (law.variance if isinstance(law, _Gaussian) else law.rate) ** 0.5
    k = (np.linspace(-spread, spread, size)).astype(np.int64)
    v, top = np.zeros(size, np.int64), 0.5
    bound = np.exp(law.log_ratio(k) - top) * 2.0**64
    near = (bound * (1 + np.repeat([-1, 1], size // 2) * 2.0**-35)).astype(np.uint64)
    for words in (near, words64(fresh(), size)):
        exact = [_settled(law, int(k[i]), 0, top, int(words[i])) for i in range(size)]
        assert _below(law, k, v, top, words).tolist() == exact


@pytest.mark.parametrize("size", [0.3, 40.0, 1023.9, 1024.5, 1e7, 2.0**49])
@pytest.mark.parametrize("kind", [_Gaussian, _Poisson])
def test_rounding_errors_are_within_what_is_allowed(
    kind: type[_Gaussian] | type[_Poisson], size: float
) -> None:
    """A quarter of it, at 400 integers out to 12 deviations, against 256 bits."""
    law = kind(size)
    k = np.linspace(-12 * size**0.5, 12 * size**0.5, 400).astype(np.int64)
    k = k[k + law.mode >= 0]
    found = np.exp(law.log_ratio(k))
    with gmpy2.context(precision=256):
        exact = [gmpy2.exp(law.exact(int(i))) for i in k]
        wrong = max(abs(f / e - 1) for f, e in zip(found.tolist(), exact, strict=True))
    assert wrong < law.error / 4


def test_doubt_is_settled_with_further_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All by the exact comparison: n = 3000, χ² at alpha = 1e-6."""
    monkeypatch.setattr(_Gaussian, "error", 2.0)
    assert p_value(discrete.discrete_gaussian(2.0, 3_000), gaussian(2.0)) > ALPHA
    law = _Gaussian(2.0)
    word = int(np.exp(-1.25) * 2.0**64) >> 11 << 11  # as near to p as a float comes
    lower, upper = word - (1 << 13), word + (1 << 13)
    assert _settled(law, 1, 0, 1.0, lower)
    assert not _settled(law, 1, 0, 1.0, upper)


def test_halvings_are_counted_beyond_a_word() -> None:
    words = np.array([0, 1, 0b1011, 2**64 - 1, 2**63 - 1], np.uint64)
    found = _trailing_ones(words)
    assert found[[0, 1, 2, 4]].tolist() == [0, 1, 2, 63]
    assert found[3] >= 64


def test_no_two_draws_repeat_and_seeds_do_nothing() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = discrete.skellam(1e6, 1000)
    np.random.seed(0)  # noqa: NPY002
    assert (first == discrete.skellam(1e6, 1000)).mean() < 0.1
    assert len(discrete.skellam(3.0, 0)) == 0


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), 2.0**51])
def test_what_is_no_variance_is_refused(variance: float) -> None:
    for draw in (discrete.discrete_gaussian, discrete.skellam):
        with pytest.raises(InvalidInput, match="variance"):
            draw(variance * 2, 3)
