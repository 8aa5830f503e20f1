"""Accounted ε against sums over the exact laws, closed forms, and an attack on canaries."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import pytest
from scipy import special

from gradleak.crypto import discrete
from gradleak.crypto.distributed_dp import DistributedNoise
from gradleak.errors import InvalidInput
from gradleak.metrics import clopper_pearson, distributed_epsilon, dp_ceiling, epsilon
from gradleak.metrics.distributed_privacy import ORDERS, _sampled, renyi

pytest.importorskip("opacus", reason="Opacus is not installed")

Noise = Literal["skellam", "discrete-gaussian"]
NOISES: list[Noise] = ["skellam", "discrete-gaussian"]
DELTA = 1e-5
Array = np.ndarray


def law(noise: Noise, variance: float, survivors: int = 1) -> Array:
    """Probabilities of the noise of all survivors together, from −w to w."""
    if noise == "skellam":
        total = variance * survivors
        width = math.ceil(25 * math.sqrt(total)) + 120
        return np.asarray(special.ive(np.abs(np.arange(-width, width + 1)), total))
    width = math.ceil(25 * math.sqrt(variance)) + 60
    one = np.exp(-(np.arange(-width, width + 1) ** 2) / (2 * variance))
    one /= one.sum()
    found = one
    for _ in range(survivors - 1):
        found = np.convolve(found, one)
    return found


def beside(found: Array, shift: int) -> tuple[Array, Array]:
    """The law and itself moved, on common support."""
    return np.pad(found, (0, shift)), np.pad(found, (shift, 0))


def exact_epsilon(p: Array, q: Array, delta: float = DELTA) -> float:
    """The least ε with Σ max(P − e^ε Q, 0) ≤ δ, in both directions."""
    low, high = 0.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        excess = max(np.maximum(a - math.exp(middle) * b, 0).sum() for a, b in ((p, q), (q, p)))
        low, high = (middle, high) if excess > delta else (low, middle)
    return low


def accounted(noise: Noise, variance: float, shift: int, **more: float) -> float:
    settings = {"survivors": 1, "length": 1, **more}
    return distributed_epsilon(
        DELTA,
        noise=noise,
        variance=variance,
        norm2=shift**2,
        **settings,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("noise", "sigma", "shift", "within"),
    [
        ("discrete-gaussian", 0.3, 1, 0.3),  # below what sums of several are accounted for
        ("discrete-gaussian", 0.7, 1, 0.09),
        ("discrete-gaussian", 2.0, 1, 0.09),
        ("discrete-gaussian", 3.0, 3, 0.09),
        ("discrete-gaussian", 5.0, 2, 0.03),
        ("discrete-gaussian", 10.0, 3, 0.01),
        ("discrete-gaussian", 50.0, 10, 0.001),
        ("discrete-gaussian", 50.0, 100, 0.001),
        ("skellam", 0.3, 1, 9.0),  # the published bound is loose on so coarse a grid
        ("skellam", 1.0, 1, 2.0),
        ("skellam", 3.0, 3, 0.5),
        ("skellam", 5.0, 2, 0.25),
        ("skellam", 10.0, 3, 0.13),
        ("skellam", 50.0, 10, 0.11),
        ("skellam", 50.0, 100, 0.09),
    ],
)
def test_one_coordinate_is_never_below_the_exact_epsilon(
    noise: Noise, sigma: float, shift: int, within: float
) -> None:
    exact = exact_epsilon(*beside(law(noise, sigma**2), shift))
    assert exact <= accounted(noise, sigma**2, shift) <= (1 + within) * exact


@pytest.mark.parametrize("survivors", [2, 3, 6])
@pytest.mark.parametrize("sigma", [0.5, 0.6, 0.8, 1.0, 2.0])
def test_sums_of_discrete_gaussians(sigma: float, survivors: int) -> None:
    """From the edge of the theorem on, where such a sum is far from one discrete Gaussian."""
    p, q = beside(law("discrete-gaussian", sigma**2, survivors), 1)
    exact = exact_epsilon(p, q)
    found = accounted("discrete-gaussian", sigma**2, 1, survivors=survivors)
    assert exact <= found
    if sigma >= 1:
        assert found <= 1.1 * exact


@pytest.mark.parametrize("noise", NOISES)
def test_several_coordinates_at_once(noise: Noise) -> None:
    """Two, moved by (2, 1): the exact law of the pair, n = 2 survivors."""
    found = law(noise, 2.0, 2)
    found = found[len(found) // 2 - 60 : len(found) // 2 + 61]
    (p, q), (r, s) = beside(found, 2), beside(found, 1)
    exact = exact_epsilon(np.outer(p, r).ravel(), np.outer(q, s).ravel())
    got = distributed_epsilon(DELTA, noise=noise, variance=2.0, survivors=2, norm2=5, length=2)
    assert exact <= got


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("sigma", "shift"), [(1.0, 1), (3.0, 2), (20.0, 20)])
def test_divergences_are_bounded_at_every_order(noise: Noise, sigma: float, shift: int) -> None:
    k = np.arange(-1000, 1001)
    log_p = -(k**2) / (2 * sigma**2)
    if noise == "skellam":
        values = special.ive(np.abs(k), sigma**2)
        log_p = np.log(values[values > 1e-290])
    log_p = log_p - special.logsumexp(log_p)
    bounds = renyi(noise=noise, variance=sigma**2, survivors=1, norm2=shift**2, length=1)
    for order, bound in zip(ORDERS[:12], bounds[:12], strict=True):
        terms = order * log_p[shift:] + (1 - order) * log_p[:-shift]
        assert special.logsumexp(terms) / (order - 1) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("noise", NOISES)
def test_less_noise_than_claimed_is_found_by_the_exact_law(noise: Noise) -> None:
    p, q = beside(law(noise, 25.0), 5)
    assert exact_epsilon(p, q) > accounted(noise, 100.0, 5)
    p, q = beside(law(noise, 100.0), 10)  # and a sensitivity that is too small
    assert exact_epsilon(p, q) > accounted(noise, 100.0, 5)


@pytest.mark.parametrize(("multiplier", "rounds"), [(0.7, 1), (2.0, 1), (8.0, 1), (8.0, 100)])
def test_a_fine_grid_tends_to_the_continuous_gaussian(multiplier: float, rounds: int) -> None:
    """The discrete Gaussian to its closed form, Skellam to its Rényi accounting."""
    norm2 = 10**8
    common = {
        "variance": norm2 * multiplier**2 / 10,
        "survivors": 10,
        "norm2": norm2,
        "length": 1000,
        "rounds": rounds,
    }
    exact = epsilon(DELTA, noise_multiplier=multiplier, steps=rounds)
    gaussian = distributed_epsilon(DELTA, noise="discrete-gaussian", **common)  # type: ignore[arg-type]
    assert exact <= gaussian <= exact * 1.0001
    skellam = distributed_epsilon(DELTA, noise="skellam", **common)  # type: ignore[arg-type]
    assert exact <= skellam <= exact * 1.13


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("rate", "rounds"), [(0.4, 1), (0.05, 2)])
def test_secret_sampling(noise: Noise, rate: float, rounds: int) -> None:
    """Against the exact mixture, both directions, one round and the pair of two."""
    found = law(noise, 16.0)
    found = found[len(found) // 2 - 60 : len(found) // 2 + 61]
    q, moved = beside(found, 4)
    p = rate * moved + (1 - rate) * q
    if rounds == 2:
        p, q = np.outer(p, p).ravel(), np.outer(q, q).ravel()
    exact = exact_epsilon(p, q)
    got = accounted(noise, 16.0, 4, sample_rate=rate, rounds=rounds)
    assert exact <= got
    assert got < accounted(noise, 16.0, 4, rounds=rounds)


def test_sampled_divergences_against_the_mixture() -> None:
    """At every order, in both directions."""
    q, moved = beside(law("skellam", 9.0), 3)
    p = 0.2 * moved + 0.8 * q
    spent = renyi(noise="skellam", variance=9.0, survivors=1, norm2=9, length=1)
    for order, bound in list(zip(ORDERS, _sampled(spent, 0.2), strict=True))[:10]:
        for a, b in ((p, q), (q, p)):
            known = (a > 1e-200) & (b > 1e-200)
            terms = order * np.log(a[known]) + (1 - order) * np.log(b[known])
            assert special.logsumexp(terms) / (order - 1) <= bound


@pytest.mark.parametrize("noise", NOISES)
def test_every_client_that_drops_out_costs(noise: Noise) -> None:
    """What was planned for is reached with as many survivors as planned, and not with fewer."""
    encoding = DistributedNoise(20, 1000, multiplier=2.0, noise=noise, tolerated=5, bits=20)
    by_survivors = [
        distributed_epsilon(
            DELTA,
            noise=noise,
            variance=encoding.variance,
            survivors=survivors,
            norm2=encoding.norm2,
            length=1000,
        )
        for survivors in range(1, 21)
    ]
    assert all(a > b for a, b in itertools.pairwise(by_survivors))
    planned = epsilon(DELTA, noise_multiplier=2.0)
    assert planned <= by_survivors[14] <= planned * 1.11
    assert by_survivors[13] > planned
    assert by_survivors[0] > 4 * planned


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 0.0}, "delta"),
        ({"variance": 0.0}, "variance"),
        ({"survivors": 0}, "survivors"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"variance": 0.2, "survivors": 2}, "expected at least 0.25"),
    ],
)
def test_outside_of_the_theory_there_is_no_answer(wrong: dict[str, float], message: str) -> None:
    usual = {"delta": DELTA, "variance": 9.0, "survivors": 1, "norm2": 4, "length": 1}
    settings = {**usual, **wrong}
    with pytest.raises(InvalidInput, match=message):
        distributed_epsilon(
            settings.pop("delta"),
            noise="discrete-gaussian",
            **settings,  # type: ignore[arg-type]
        )


CLIENTS, TRIALS = 4, 20_000


def encoding_of(noise: Noise) -> DistributedNoise:
    """Every coordinate is an experiment of its own, with a canary of one unit and z = 1."""
    root = math.sqrt(TRIALS)
    return DistributedNoise(CLIENTS, TRIALS, clip=root, multiplier=1 / root, noise=noise)


def told(encoding: DistributedNoise, canary: float) -> int:
    """How often the likelihood ratio calls a client's canary present.

    Both laws are symmetric and log-concave, so that the ratio grows with the sum.
    """
    sent = [np.full(TRIALS, canary), *[np.zeros(TRIALS)] * (CLIENTS - 1)]
    whole = np.sum([encoding.encode(vector) for vector in sent], axis=0)
    return int((whole > 1.28 * encoding.scale).sum())


def caught(encoding: DistributedNoise) -> bool:
    """Whether the attack beats the ceiling: n = 20000 with and without, α = 1e-6."""

    def curve(delta: float) -> float:
        return distributed_epsilon(
            delta,
            noise=encoding.noise,
            variance=encoding.variance,
            survivors=CLIENTS,
            norm2=math.ceil(encoding.scale) ** 2,
            length=1,
        )

    confidence = 1 - 1e-6
    found, mistaken = (
        clopper_pearson(told(encoding, canary), TRIALS, confidence=confidence)
        for canary in (1.0, 0.0)
    )
    return found.low > dp_ceiling(mistaken.high, curve)


@pytest.mark.parametrize("noise", NOISES)
def test_no_canary_is_told_beyond_the_ceiling(noise: Noise) -> None:
    assert not caught(encoding_of(noise))


@pytest.mark.parametrize("noise", NOISES)
def test_half_of_the_noise_is_found(noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skellam", "discrete_gaussian"):
        draw = getattr(discrete, name)
        monkeypatch.setattr(discrete, name, lambda v, n, draw=draw: draw(v / 4, n))
    assert caught(encoding_of(noise))


@pytest.mark.parametrize("noise", NOISES)
def test_noise_that_only_the_server_adds_is_found(
    noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client's share in place of all four: half of the standard deviation, by another way."""
    encoding, times = encoding_of(noise), iter(range(2 * CLIENTS))
    drawn = discrete.skellam if noise == "skellam" else discrete.discrete_gaussian
    lazy = lambda v, n: drawn(v, n) * (next(times) % CLIENTS == 0)
    monkeypatch.setattr(discrete, drawn.__name__, lazy)
    assert caught(encoding)
