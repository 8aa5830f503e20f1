"""What differential privacy proves about reconstruction, whatever the attack and its knowledge.

An attacker who knows everything but one example names it among candidates. Without the update its
success is at most κ, the probability of the best guess. Let P be the law of the update, and Q the
law with that example left out (clipped sum without its term, same noise): Q knows nothing of the
example, so success under Q is at most κ, and under P at most

    γ(κ) = sup {P(E) : Q(E) ≤ κ} = 1 − f(κ)

with f the trade-off function of Q against P. Sensitivity is therefore that of *removing* one
example, the clipping norm C, even where the batch size is public; a guarantee for replacing it
(2C) would be valid too, and looser. A success rate above γ means that the protection is not what
it claims: noise not applied, wrong sensitivity, a random stream used twice.

Source: Balle, Cherubin and Hayes 2022, "Reconstructing training data with informed adversaries";
Kaissis et al. 2023, "Bounding data reconstruction attacks with the hypothesis testing
interpretation of differential privacy".
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr, ndtr, ndtri

from gradleak.errors import InvalidInput

PrivacyCurve = Callable[[float], float]
"""δ -> ε such that P(E) ≤ e^ε Q(E) + δ for every event E."""

_EPSILON_ERROR, _DELTA_ERROR = 0.01, 1e-12


def gaussian_ceiling(prior: float, *, noise_multiplier: float, steps: int = 1) -> float:
    """γ = Φ(Φ⁻¹(κ) + √T / m): T full-batch Gaussian steps, each showing the example.

    Nearly reached by one step on candidates with orthogonal clipped gradients.

    Args:
        prior: κ, success of the best guess without the update; 1/K for K equal candidates.
        noise_multiplier: m, standard deviation of the noise on the sum over the clipping norm.
        steps: T.

    Source: Dong, Roth and Su 2022, corollary 2 (Gaussian mechanisms compose to √T / m).
    """
    _check(prior, noise_multiplier, 1.0, steps)
    return float(ndtr(ndtri(prior) + math.sqrt(steps) / noise_multiplier))


def dp_ceiling(prior: float, curve: PrivacyCurve) -> float:
    """γ ≤ min over δ of e^ε(δ) κ + δ, from any (ε, δ) guarantee.

    Every δ gives a valid ceiling, so the search need not be exact. For one known pair (ε, δ) the
    ceiling is that sum itself.

    Args:
        prior: κ, in (0, 1).
        curve: δ -> ε.
    """
    _check(prior)

    def ceiling(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return math.exp(min(curve(delta), 700.0)) * prior + delta

    # The best δ is of the order of γ − κ, far above a usual δ, and the sum has one minimum in it.
    low = math.log(prior) - 9
    found = minimize_scalar(ceiling, bounds=(low, 0.0), method="bounded", options={"maxiter": 40})
    return min(1.0, float(found.fun))


def epsilon(
    delta: float,
    *,
    noise_multiplier: float,
    sample_rate: float = 1.0,
    steps: int = 1,
    accountant: Literal["prv", "rdp"] = "prv",
) -> float:
    """ε of (ε, δ)-differential privacy for clipped sums under Gaussian noise.

    Args:
        delta: δ, in (0, 1).
        noise_multiplier: m, standard deviation of the noise on the sum over the clipping norm.
        sample_rate: q; below 1 for Poisson sampling that the attacker does not see.
        steps: T.
        accountant: as for `epsilon_curve`; for q = 1 "prv" is the closed form, and needs no
            Opacus.

    Raises:
        InvalidInput: as for `epsilon_curve`.

    Source: Balle and Wang 2018, theorem 8 (closed form), with m / √T for T steps.
    """
    _check(delta, noise_multiplier, sample_rate, steps, name="delta")
    if sample_rate == 1 and accountant == "prv":
        return _gaussian_epsilon(delta, math.sqrt(steps) / noise_multiplier)
    curve = epsilon_curve(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=steps,
        accountant=accountant,
    )
    return curve(delta)


def _gaussian_epsilon(delta: float, shift: float) -> float:
    """The root of δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""

    def excess(eps: float) -> float:
        lost = math.exp(eps + float(log_ndtr(-shift / 2 - eps / shift)))
        return float(ndtr(shift / 2 - eps / shift)) - lost - delta

    if excess(0.0) <= 0:
        return 0.0
    high = shift * (shift / 2 - float(ndtri(delta)))  # the first term alone is δ there
    return float(brentq(excess, 0.0, high, xtol=1e-12))


def epsilon_curve(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    accountant: Literal["prv", "rdp"] = "prv",
) -> PrivacyCurve:
    """ε(δ) of DP-SGD with Poisson sampling, by Opacus's accountants.

    Amplification by sampling needs the choice of examples to be unknown to the attacker.

    Args:
        noise_multiplier: m, standard deviation of the noise on the sum over the clipping norm.
        sample_rate: q; for q = 1 and "prv" use `gaussian_ceiling` and `epsilon`, which are exact.
        steps: T.
        accountant: "prv" (numerical, tight to 0.01 in ε) or "rdp" (analytic, looser). Opacus's
            third, by central limit, is an approximation and proves nothing.

    Raises:
        InvalidInput: Opacus is not installed, or a parameter is out of range.

    Source: Gopi, Lee and Wutschitz 2021 (PRV); Mironov, Talwar and Zhang 2019 (RDP).
    """
    _check(0.5, noise_multiplier, sample_rate, steps)
    if sample_rate == 1 and accountant == "prv":
        raise InvalidInput("sample_rate=1: expected less; gaussian_ceiling is exact there")
    _need_opacus()
    from opacus import accountants
    from opacus.accountants.analysis import rdp

    if accountant == "rdp":
        orders = accountants.RDPAccountant.DEFAULT_ALPHAS
        spent = rdp.compute_rdp(
            q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=orders
        )

        return lambda delta: rdp_epsilon(delta, orders, spent)

    prv = accountants.PRVAccountant()
    prv.history = [(noise_multiplier, sample_rate, steps)]
    with np.errstate(all="ignore"):
        loss = prv._get_dprv(eps_error=_EPSILON_ERROR, delta_error=_DELTA_ERROR)

    def by_loss(delta: float) -> float:
        try:
            with np.errstate(over="raise", invalid="raise"):
                return float(loss.compute_epsilon(delta, _DELTA_ERROR, _EPSILON_ERROR)[2])
        except (ArithmeticError, RuntimeError, ValueError):  # beyond what it resolves
            return math.inf

    return by_loss


def rdp_epsilon(delta: float, orders: Sequence[float], spent: Sequence[float]) -> float:
    """ε from Rényi differential privacy at several orders, by Opacus's conversion.

    Args:
        delta: δ.
        orders: α > 1.
        spent: Rényi divergence at each, over all rounds.

    Raises:
        InvalidInput: Opacus is not installed.
    """
    _need_opacus()
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order may be the last one: still valid
        return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])


def _need_opacus() -> None:
    if importlib.util.find_spec("opacus") is None:
        raise InvalidInput("DP accounting needs Opacus: pip install 'gradleak[dp]'")


def _check(
    share: float,
    noise_multiplier: float = 1.0,
    sample_rate: float = 1.0,
    steps: int = 1,
    *,
    name: str = "prior",
) -> None:
    if not 0 < share < 1:
        raise InvalidInput(f"{name}={share}: expected a probability in (0, 1)")
    if not 0 < noise_multiplier < math.inf:
        raise InvalidInput(f"noise_multiplier={noise_multiplier}: expected a positive number")
    if not 0 < sample_rate <= 1:
        raise InvalidInput(f"sample_rate={sample_rate}: expected a share in (0, 1]")
    if steps < 1:
        raise InvalidInput(f"steps={steps}: expected at least 1")
