"""(ε, δ) of sums to which every client added its share of integer noise.

A client is protected as a whole: neighbours differ in one client, whose vector is replaced by zero
while its noise stays. Two integer vectors that enter the sum are then at most Δ₂ = √`norm2` apart,
and Δ₁ ≤ min(√d Δ₂, Δ₂²). The wrapping round of a sum is done to it afterwards and costs nothing.

Rényi divergences of order α for one round, σ² the variance of the noise of n clients together:

    discrete Gaussian   min{α Δ₂²/2σ² + τd,   α/2 (Δ₂²/σ² + 2τΔ₁/σ + τ²d),   α/2 (Δ₂/σ + τ√d)²}
                        τ = 10 Σ_{k<n} exp(−2π² (σ²/n) k/(k+1))
    Skellam             α Δ₂²/2σ² + min{((2α−1) Δ₂² + 6Δ₁)/4σ⁴,   3Δ₁/2σ²}

The discrete Gaussian has a second, tighter way to ε: for s² < σ², adding it to integers is, but
for a factor e^±h, the continuous Gaussian mechanism of variance σ² − s² with its output rounded to
the integers at random, so that what is known of that one holds, its closed form and its sampling
included.

    Σ_y exp(−(y−c)²/2s²) = s√2π (1 + η_c),   |η_c| ≤ η = 2q/(1−q),   q = exp(−2π²s²)

so a discrete Gaussian N(c, s²) around c ~ x + N(0, σ²−s²) has each probability that N(x, σ²) on
the integers has, within log (1+η)/(1−η). Sums lose as much for each client more, with
s² = (σ²/n) k/(k+1). Over d coordinates and T rounds h adds up, and
ε ≤ ε_Gauss(δ e^−h) + 2h.

Source: Kairouz, Liu and Steinke 2021, theorem 1 and proposition 14; Agarwal, Kairouz and Liu 2021,
corollary 4.1; Peikert 2010, theorem 3.1 (convolution of discrete Gaussians).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from gradleak.errors import InvalidInput
from gradleak.metrics.privacy import epsilon, rdp_epsilon

ORDERS = (*range(2, 64), *(int(a) for a in np.geomspace(64, 2048, 61)))
"""Whole ones: the Skellam bound and the sampling theorem are stated for them."""


def distributed_epsilon(
    delta: float,
    *,
    noise: Literal["skellam", "discrete-gaussian"],
    variance: float,
    survivors: int,
    norm2: int,
    length: int,
    rounds: int = 1,
    sample_rate: float = 1.0,
) -> float:
    """ε of a client's whole contribution, against everybody who sees the sums.

    Call it for every number of survivors: with fewer than were planned there is less noise, and
    the answer is what still holds.

    Args:
        delta: δ, in (0, 1).
        noise: its law.
        variance: of each client's share, on the grid.
        survivors: honest clients whose noise is in the sum, the protected one included; who drops
            out or colludes is none. Of several rounds, in the one with the fewest.
        norm2: largest squared norm of an integer vector before the noise.
        length: d.
        rounds: how many the client may take part in.
        sample_rate: q; below 1 only where each client decides by itself, in secret and with
            probability q, whether to send its vector or zeros, with its noise in either case. Where
            a server chooses, or sees who takes part, or the noise depends on it, q is 1 and
            `rounds` counts the rounds in which the client did.

    Raises:
        InvalidInput: a parameter is out of range, or several discrete Gaussians of variance below
            ¼ are summed, where no bound is proved.

    Source: as above; Steinke 2022, theorem 11, with Mironov, Talwar and Zhang 2019, theorem 5
    (sampling).
    """
    if not 0 < delta < 1:
        raise InvalidInput(f"delta={delta}: expected a probability in (0, 1)")
    if not 0 < variance < math.inf or survivors < 1 or length < 1 or norm2 < 1 or rounds < 1:
        raise InvalidInput(
            f"variance={variance}, survivors={survivors}, length={length}, norm2={norm2}, "
            f"rounds={rounds}: expected positive numbers"
        )
    if not 0 < sample_rate <= 1:
        raise InvalidInput(f"sample_rate={sample_rate}: expected a share in (0, 1]")
    if noise == "discrete-gaussian" and survivors > 1 and variance < 0.25:
        raise InvalidInput(f"variance={variance}: expected at least 0.25 of each client's noise")
    divergences = renyi(
        noise=noise, variance=variance, survivors=survivors, norm2=norm2, length=length
    )
    spent = rounds * (divergences if sample_rate == 1 else _sampled(divergences, sample_rate))
    found = rdp_epsilon(delta, ORDERS, list(spent))
    if noise == "discrete-gaussian":
        found = min(
            found,
            _by_gaussian(delta, variance, survivors, norm2, length, rounds, sample_rate),
        )
    return max(found, 0.0)


def renyi(
    *,
    noise: Literal["skellam", "discrete-gaussian"],
    variance: float,
    survivors: int,
    norm2: int,
    length: int,
) -> NDArray[np.float64]:
    """Bounds on the Rényi divergences of one round, at `ORDERS`, without sampling."""
    orders = np.array(ORDERS, dtype=np.float64)
    total = survivors * variance
    norm1 = min(math.sqrt(length * norm2), float(norm2))
    if noise == "skellam":
        excess = np.minimum(
            ((2 * orders - 1) * norm2 + 6 * norm1) / (4 * total**2), 3 * norm1 / (2 * total)
        )
        return np.asarray(orders * norm2 / (2 * total) + excess)
    k = np.arange(1, survivors)
    tau = 10 * float(np.exp(-2 * math.pi**2 * variance * k / (k + 1)).sum())
    published = np.stack(
        [
            orders * norm2 / (2 * total) + tau * length,
            orders / 2 * (norm2 / total + 2 * tau * norm1 / math.sqrt(total) + tau**2 * length),
            orders / 2 * (math.sqrt(norm2 / total) + tau * math.sqrt(length)) ** 2,
        ]
    )
    return np.asarray(published.min(axis=0))


def _sampled(divergences: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Divergences where each client takes part with probability q.

    log Σ_k C(α, k) (1−q)^(α−k) q^k e^((k−1) D_k) / (α−1). Orders that are left out are bounded by
    the next one: D grows with its order.
    """
    every = np.arange(2, ORDERS[-1] + 1)
    known = np.array(divergences)[np.searchsorted(ORDERS, every)]
    found = []
    for order in ORDERS:
        k = np.arange(order + 1)
        exponents = np.concatenate([[0.0, 0.0], (every - 1) * known])[: order + 1]
        terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        terms += k * math.log(rate) + (order - k) * math.log1p(-rate) + exponents
        found.append(float(logsumexp(terms)) / (order - 1))
    return np.asarray(np.minimum(found, divergences))


def _by_gaussian(
    delta: float,
    variance: float,
    survivors: int,
    norm2: int,
    length: int,
    rounds: int,
    sample_rate: float,
) -> float:
    """ε by comparison with the continuous Gaussian mechanism; infinite where there is none."""
    rounded = math.log(1e10 * length * rounds) / (2 * math.pi**2)  # s²: h is below 10⁻⁹ of it
    left = survivors * variance - rounded
    parts = [rounded, *(variance * k / (k + 1) for k in range(1, survivors))]
    apart = length * rounds * sum(map(_log_ratio, parts))
    if left <= 0 or apart > 1:
        return math.inf
    gaussian = epsilon(
        delta * math.exp(-apart),
        noise_multiplier=math.sqrt(left / norm2),
        sample_rate=sample_rate,
        steps=rounds,
    )
    return gaussian + 2 * apart


def _log_ratio(smoothing: float) -> float:
    q = math.exp(-2 * math.pi**2 * smoothing)
    eta = 2 * q / (1 - q)
    return math.log1p(eta) - math.log1p(-eta) if eta < 1 else math.inf
