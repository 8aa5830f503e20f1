"""Demonstrated beside proved, and foretold beside realised: pure functions of records.

An attack breaks a proved limit when the whole interval of what it demonstrates, at one-sided
`ALPHA`, lies beyond it. Then an assumption of the proof does not hold in this audit (noise or
clipping not applied, a random stream used twice), and nothing it says of the protection counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from gradleak.metrics import METRICS, Interval, clustered_mean, clustered_rate

Json = Mapping[str, Any]
Clusters = Sequence[Sequence[float]]

ALPHA = 0.001
"""One-sided probability that an honest pair is called broken, where its limit is just reached."""

_BASIS = ("kappa", "noise_multiplier", "epsilon", "delta", "accounted", "risk")
_CONFIDENCE = 1 - 2 * ALPHA
_SCORES = {"posterior_trace": 1, "dfil": -1, "influence": 1}
"""What is foretold of a target, and whether it rises (1) or falls (−1) with the error."""


def limits(
    proved: Json | None, floor: Json | None, identified: Clusters, mse: Clusters
) -> list[dict[str, Any]]:
    """What a condition proves or foretells, beside what one attack on it demonstrates.

    A floor is a score: it presumes that targets follow the prior, which real ones do not exactly.

    Args:
        proved: ceiling of the condition, or why there is none; None where nobody asked.
        floor: floor under the mean squared error, likewise.
        identified: 0 or 1 for every image, by client.
        mse: mean squared error of every image, by client.

    Returns:
        One for each that is not None: "metric", "side" ("at most" or "at least"), "limit" or None,
        "proved" (or a score), "demonstrated" with its interval, "broken", and "why" in words.
    """
    found = []
    if proved is not None and identified:
        share = proved.get("identified")
        seen = clustered_rate(identified, confidence=_CONFIDENCE)
        broken = share is not None and seen.low > share
        why = [str(proved["why_not"])] if share is None else []
        found.append(
            _limit("identified", "at most", share, identified, seen, broken, why=why)
            | {"proved": share is not None}
            | {k: proved[k] for k in _BASIS if proved.get(k) is not None}
        )
    if floor is not None and mse:
        least = floor.get("mse")
        seen = clustered_mean(mse, confidence=_CONFIDENCE, limits=METRICS["mse"].limits)
        broken = least is not None and seen.high < least
        why = [str(floor["why_not"])] if least is None else list(floor["unless"])
        found.append(
            _limit("mse", "at least", least, mse, seen, broken, why=why) | {"proved": False}
        )
    return found


def violations(found: Sequence[Json]) -> list[str]:
    """The proved limits that are broken, each in a sentence."""
    return [
        f"{x['demonstrated']['value']:.1%} of images identified "
        f"({x['demonstrated']['confidence']:.1%} interval from {x['demonstrated']['low']:.1%}), "
        f"where at most {x['limit']:.1%} is possible: noise or clipping is not what it claims"
        for x in found
        if x["proved"] and x["broken"]
    ]


def ranking(foretold: Sequence[Json], mse: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of every score with the error that an attack realised.

    Args:
        foretold: scores of each target.
        mse: error of each target.

    Returns:
        "rho" (1: the order of the targets was foretold; None where undefined) and "n", by score.
    """
    found = {}
    for name, sign in _SCORES.items():
        pairs = [
            (sign * float(scores[name]), error)
            for scores, error in zip(foretold, mse, strict=True)
            if scores.get(name) is not None and math.isfinite(error)
        ]
        if pairs:
            found[name] = {"rho": _spearman(np.array(pairs)), "n": len(pairs)}
    return found


def _spearman(pairs: np.ndarray[Any, Any]) -> float | None:
    if len(pairs) < 3 or (pairs == pairs[0]).all(0).any():
        return None
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def _limit(
    metric: str,
    side: str,
    limit: float | None,
    values: Clusters,
    seen: Interval,
    broken: bool,
    *,
    why: list[str],
) -> dict[str, Any]:
    return {
        "metric": metric,
        "side": side,
        "limit": limit,
        "demonstrated": {
            "value": float(np.mean([np.mean(v) for v in values])),
            "low": seen.low,
            "high": seen.high,
            "confidence": seen.confidence,
            "n": len(values),
        },
        "broken": broken,
        "why": why,
    }
