"""Coverage of reported intervals by simulation, where they hold as stated and just outside.

An interval passes if its hits are compatible with its nominal level at alpha = 1e-3, one-sided;
"exact" coverage is summed over all outcomes instead. The table of `docs/reading-a-report.md` holds
these figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from gradleak.metrics import (
    Interval,
    clopper_pearson,
    clustered_mean,
    clustered_rate,
    excess_risk,
    excess_risk_interval,
    mean_at_most,
    median_interval,
    paired_difference,
)

ALPHA = 1e-3
Law = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def covers(hits: int, draws: int, nominal: float = 0.95) -> bool:
    """Whether so many hits are compatible with covering at least `nominal`."""
    return hits >= stats.binom.ppf(ALPHA, draws, nominal)


def contains(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def shares(clients: int, law: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Possible sums of `clients` shares of images and their probabilities; shares in quarters."""
    one = np.zeros(5)
    for share, probability in law:
        one[round(4 * share)] += probability
    mass = functools.reduce(np.convolve, [one] * clients)
    return np.arange(len(mass)) / 4, mass


@pytest.mark.parametrize("clients", [1, 2, 8, 16])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75, 1.0])
def test_clustered_rate_covers_exactly_at_every_rate(clients: int, part: float) -> None:
    """A client loses none or `part` of its images, keeps none or `part`, or all, none or `part`."""
    cut = functools.cache(lambda total: clopper_pearson(total, clients))
    for q in np.linspace(0.002, 0.998, 83):
        for law in (
            [(0.0, 1 - q), (part, q)],
            [(1.0, 1 - q), (1 - part, q)],
            [(0.0, (1 - q) / 2), (part, q), (1.0, (1 - q) / 2)],
        ):
            rate = sum(share * probability for share, probability in law)
            sums, mass = shares(clients, law)
            inside = [contains(cut(float(total)), rate) for total in sums]
            assert mass[inside].sum() >= 0.95 - 1e-12


def test_the_cached_rate_is_the_reported_one() -> None:
    values = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0]]
    assert clustered_rate(values) == clopper_pearson(2.0, 3)


def exponential(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.exponential(size=size) - 1


def laplace(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.laplace(size=size)


def mean_hits(law: Law, clients: int, draws: int = 4000) -> int:
    samples = law(np.random.default_rng(0), (draws, clients))
    return sum(contains(clustered_mean(row[:, None]), 0) for row in samples)


def test_student_covers_symmetric_laws_and_misses_by_what_is_documented_on_skewed_ones() -> None:
    assert covers(mean_hits(laplace, 8), 4000)
    assert covers(mean_hits(exponential, 8), 4000, 0.90)
    assert not covers(mean_hits(exponential, 8), 4000), "just outside its theory"


def test_differences_of_equally_skewed_scores_are_covered() -> None:
    """Both attacks miss by exponential amounts; one of them alone would not be covered."""
    rng = np.random.default_rng(1)
    first, second = rng.exponential(size=(2, 2000, 8, 1))
    ends = [paired_difference(a, b) for a, b in zip(first, second, strict=True)]
    assert covers(sum(contains(end, 0) for end in ends), 2000)
    narrow = sum(abs(end.high + end.low) <= 0.75 * (end.high - end.low) for end in ends)
    assert not covers(narrow, 2000), "planted fault: three quarters of the width"


def correlated(law: Law, draws: int, clients: int, images: int) -> np.ndarray:
    """Values of `law` in pairs of clients' images: each repeats its client's with chance 1/2."""
    rng = np.random.default_rng(2)
    own, common = law(rng, (draws, clients, images)), law(rng, (draws, clients, 1))
    return np.where(rng.random(own.shape) < 0.5, own, common)


@pytest.mark.parametrize("clients", [6, 8, 17])
def test_median_of_images_is_covered_for_clients_of_several(clients: int) -> None:
    """Skewed images, 4 to a client; the median of client means is another number."""
    values = correlated(exponential, 800, clients, 4)
    median = math.log(2) - 1
    assert covers(sum(contains(median_interval(v), median) for v in values), 800)
    if clients == 17:
        of_means = [median_interval(v.mean(1, keepdims=True)) for v in values]
        assert not covers(sum(contains(e, median) for e in of_means), 800), "planted fault"


def test_median_interval_of_single_images_is_thompsons() -> None:
    values = np.random.default_rng(3).normal(size=17)
    rank = int((stats.binom.cdf(np.arange(17), 17, 0.5) <= 0.025).sum())
    ordered = np.sort(values)
    found = median_interval(values[:, None])
    assert (found.low, found.high) == (ordered[rank - 1], ordered[-rank])


@pytest.mark.parametrize(("attack", "control"), [(0.9, 0.1), (0.5, 0.3), (0.3, 0.5), (0.99, 0.9)])
@pytest.mark.parametrize("together", [-1, 0, 1])
def test_excess_risk_is_covered_however_attack_and_control_depend(
    attack: float, control: float, together: int
) -> None:
    """16 clients, 3000 draws; both from one uniform, from opposite ones, or from their own."""
    rng = np.random.default_rng(4)
    mine, other = rng.random((2, 3000, 16))
    theirs = {-1: 1 - mine, 0: other, 1: mine}[together]

    @functools.cache
    def ends(a: int, c: int) -> Interval:
        return excess_risk_interval(
            [[float(i < a)] for i in range(16)], [[float(i < c)] for i in range(16)]
        )

    truth = excess_risk(attack, control)
    wins, losses = (mine < attack).sum(1), (theirs < control).sum(1)
    hits = sum(contains(ends(int(a), int(c)), truth) for a, c in zip(wins, losses, strict=True))
    assert covers(hits, 3000)
    naive = sum(abs(excess_risk(a / 16, c / 16) - truth) < 0.1 for a, c in zip(wins, losses))
    assert (attack, control) != (0.5, 0.3) or not covers(naive, 3000), "planted fault"


BOUNDED, SKEWED, HEAVY, WILD = "bounded", "exponential", "normal to the 4th", "log-normal, 2"
INFORMATION: dict[str, tuple[Law, float]] = {
    BOUNDED: (lambda rng, size: (1 + np.sin(rng.normal(size=size))) / 2, 0.5),
    SKEWED: (lambda rng, size: rng.exponential(size=size), 1.0),
    HEAVY: (lambda rng, size: rng.normal(size=size) ** 4, 3.0),
    WILD: (lambda rng, size: rng.lognormal(0, 2, size), math.exp(2)),
}
"""Non-negative laws, such as the information of an update over its prior, and their means."""


def below(name: str, n: int, *, draws: int = 4000) -> int:
    law, mean = INFORMATION[name]
    samples = law(np.random.default_rng(5), (draws, n))
    return sum(mean_at_most(row) >= mean for row in samples)


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("name", INFORMATION)
def test_the_upper_limit_of_a_skewed_mean_covers(name: str, n: int) -> None:
    assert covers(below(name, n), 4000)


@pytest.mark.parametrize("name", [SKEWED, HEAVY, WILD])
def test_student_alone_would_not_cover_a_skewed_mean(name: str) -> None:
    """Planted fault: the same without the further value and without the refusal; n = 20."""
    law, mean = INFORMATION[name]
    x = law(np.random.default_rng(5), (4000, 20))
    high = x.mean(1) + stats.t.ppf(0.95, 19) * x.std(1, ddof=1) / math.sqrt(20)
    assert not covers(int((high >= mean).sum()), 4000)


def test_an_unseen_mode_is_beyond_any_limit() -> None:
    """One draw in twenty holds nine tenths of the mean: 20 draws miss it in 36 % of samples."""
    rng = np.random.default_rng(6)
    x = 20.0 * (rng.random((4000, 20)) < 0.05) + 0.2 * rng.random((4000, 20))
    hits = sum(mean_at_most(row) >= 1.1 for row in x)
    assert 0.60 < hits / 4000 < 0.68


def test_the_upper_limit_is_tight_where_values_hardly_vary() -> None:
    values = 1 + 0.1 * np.random.default_rng(7).random(20)
    assert values.mean() < mean_at_most(values) < 1.05 * values.mean()
    assert mean_at_most([0.01] * 19 + [1.0]) == math.inf
