"""What a condition proves about every attack on it, from the parameters of its protections alone.

A client clips to C and adds Gaussian noise to what it sends, once. Without one example the law of
the update is another by at most C (the whole update clipped: compared with an update of zero) or
C / b (every example clipped: compared with the sum of the others, whom the attacker may know). The
private example is any of the bank's, equally likely: the audit drew it, so it is not to be learned
from anything public, weights that have seen it included. One update of a client that is known to
take part composes to nothing and is amplified by nothing, so the closed form is exact and no
accountant is asked. What `dp-sgd` spends over the rounds that it is said to run, `accounted` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from gradleak.defenses import DPSGD, Clip, GaussianNoise, Wrapped, undefended
from gradleak.errors import InvalidInput
from gradleak.mechanisms import Vertical
from gradleak.metrics import SAME, best_guess, epsilon, gaussian_ceiling
from gradleak.threat import ThreatModel
from gradleak.types import Batch, DataSpec, Fact, Mechanism

PSNR_DB = tuple(range(61))
"""Where the ceiling of the risk curve is computed, dB."""

_FUNCTIONS_OF_THE_UPDATE = (
    "clip", "gaussian-noise", "laplace-noise", "top-k", "random-mask", "partial-sharing",
    "quantize", "round", "sign",
)  # fmt: skip
"""Protections that look at nothing else: what noise has covered stays covered."""

DELTA = 1e-5
"""δ at which the ε of one update is told, where the protection names none."""

SEVERAL = "the rounds of vertical training are several updates of one private set"
"""Why nothing that holds for one update of a batch is said."""


class Private(NamedTuple):
    """A Gaussian mechanism.

    Attributes:
        multiplier: standard deviation of the noise over the sensitivity.
        by_example: whether examples were clipped, and not their update.
        rule: the protection, where it is accounted for over several rounds.
    """

    multiplier: float
    by_example: bool
    rule: DPSGD | None = None


def ceiling(
    mechanism: Mechanism,
    threat: ThreatModel,
    bank: Batch,
    spec: DataSpec,
    *,
    batch_size: int,
    guesses: int,
    clients: int = 1,
) -> dict[str, Any]:
    """The largest success that any attack can expect against a protected client.

    Args:
        mechanism: the client.
        threat: what the attacker is given besides the update.
        bank: candidates, the private examples among them.
        spec: form of the data.
        batch_size: examples of the client.
        guesses: claims per update.
        clients: honest ones, whose mean alone is seen: that divides what one of them changes by
            n and the noise by √n.

    Returns:
        "identified", a share, its "kappa" and "noise_multiplier", the "epsilon" of one update at
        "delta", and "risk": shares that exceed the PSNR values of `PSNR_DB`; or "why_not" in
        words. For `dp-sgd` also what is "accounted".
    """
    found = private(mechanism, batch_size=batch_size)
    if Fact.BN_STATISTICS in threat.knows:
        found = "batch-normalisation statistics are granted, which no noise covers"
    if isinstance(found, str):
        return {"why_not": found}
    multiplier, examples = found.multiplier * math.sqrt(clients), batch_size * clients
    low, high = spec.bounds
    radii = [(high - low) * 10 ** (-psnr / 20) for psnr in PSNR_DB]
    kappas = best_guess(
        bank.inputs,
        [SAME, *((2 * radius) ** 2 for radius in radii)],
        labels=bank.classes if Fact.LABELS in threat.knows else None,
        guesses=max(guesses, examples),
        others=examples - 1 if found.by_example else 0,
    )
    proved = [gaussian_ceiling(k, noise_multiplier=multiplier) if k < 1 else 1.0 for k in kappas]
    delta = found.rule.delta if found.rule else DELTA
    return {
        "noise_multiplier": multiplier,
        "epsilon": epsilon(delta, noise_multiplier=multiplier),
        "delta": delta,
        "accounted": accounted(found.rule) if found.rule else None,
        "kappa": kappas[0],
        "identified": proved[0],
        "risk": proved[1:],
    }


@lru_cache(maxsize=32)
def accounted(rule: DPSGD) -> Mapping[str, Any]:
    """What `dp-sgd` spends over all its rounds.

    Returns:
        "rounds", "sample_rate", "delta", and "epsilon" by accountant ("PRV", in closed form
        "exact", and "RDP"; None where there is no Opacus to ask).
    """
    spent: dict[str, float | None] = {}
    names = {"prv": "exact" if rule.sample_rate == 1 else "PRV", "rdp": "RDP"}
    for accountant, name in names.items():
        try:
            spent[name] = epsilon(
                rule.delta,
                noise_multiplier=rule.noise_multiplier,
                sample_rate=rule.sample_rate,
                steps=rule.rounds,
                accountant=accountant,  # type: ignore[arg-type]
            )
        except InvalidInput:
            spent[name] = None
    return {
        "rounds": rule.rounds,
        "sample_rate": rule.sample_rate,
        "delta": rule.delta,
        "epsilon": spent,
    }


def private(mechanism: Mechanism, *, batch_size: int) -> Private | str:
    """Read the Gaussian mechanism off a client's protections, or say why there is none."""
    if isinstance(undefended(mechanism), Vertical):
        return SEVERAL
    seen: list[str] = []
    layer = mechanism
    while isinstance(layer, Wrapped):
        rule, inner = layer.rule, layer.inner
        if isinstance(rule, DPSGD):
            return Private(rule.noise_multiplier, rule.scope == "example", rule)
        if isinstance(rule, GaussianNoise) and isinstance(inner, Wrapped):
            clip = inner.rule
            if isinstance(clip, Clip):
                std = rule.std / math.sqrt(batch_size if rule.scope == "example" else 1)
                by_example = clip.scope == "example"
                return Private(std * (batch_size if by_example else 1) / clip.norm, by_example)
        seen.append(rule.id)
        if rule.id not in _FUNCTIONS_OF_THE_UPDATE:
            break
        layer = inner
    return _why_not(seen)


def _why_not(seen: list[str]) -> str:
    noise = {"gaussian-noise", "laplace-noise"} & set(seen)
    if not noise:
        return "nothing is proved without noise" if seen else "there is no protection"
    if "clip" not in seen:
        return "noise without clipping has no ceiling"
    if "gaussian-noise" not in seen:
        return "clipping bounds the length of an update, which Laplace noise gives no ceiling for"
    return "the noise does not follow directly on the clipping"
