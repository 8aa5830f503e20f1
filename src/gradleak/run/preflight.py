"""Checks before an attack counts: is the update what the mechanism and its protections claim?

Published code of two protections silently changes nothing, and an objective that is not at its
floor at the truth measures the auditor's mistake. What is wrong goes into the record as a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from gradleak.defenses import Wrapped, difference, norm, rebased, undefended
from gradleak.mechanisms.aggregate import parts
from gradleak.mechanisms.client import normalises
from gradleak.scenario import Scenario
from gradleak.seeding import child
from gradleak.threat import Truth
from gradleak.types import ModelState, Observation

_RESIDUAL = 1e-3
"""Relative residual at the truth that rounding can explain, in float32."""


class Doubt(NamedTuple):
    """One thing that is not as claimed: a text with at most one format field, and its value."""

    text: str
    value: float = math.nan


def preflight(
    scenario: Scenario, seen: Observation, truth: Truth, *, generator: torch.Generator
) -> list[Doubt]:
    """Run every check on one simulated target.

    Args:
        scenario: what was simulated.
        seen: what the attacker gets.
        truth: the auditor's side.
        generator: the one `simulate` was called with; protections are replayed on its streams.
    """
    values = seen.update.values
    if not all(bool(v.isfinite().all()) for v in values.values()):
        return [Doubt("the update holds non-finite values: no attack on it means anything")]
    if not any(bool(v.any()) for v in values.values()):
        return [Doubt("the update is zero: nothing can leak, and no attack on it shows anything")]
    return [
        *_batch_norm(scenario, seen),
        *_residual(seen, truth),
        *_protections(scenario, seen.state, truth, generator=generator),
    ]


def objective_warnings(at_truth: Sequence[float], at_guess: Sequence[float]) -> list[str]:
    """Doubt an attack's objective that prefers a guess to the truth.

    Args:
        at_truth: the objective at the true batch of a noiseless update, one per target; nan where
            there is none. (Noise may well make a guess the better fit.)
        at_guess: the objective at the mean image with the true labels.
    """
    pairs = [(t, g) for t, g in zip(at_truth, at_guess) if math.isfinite(t) and math.isfinite(g)]
    worse = sum(t >= g for t, g in pairs)
    if not worse:
        return []
    return [
        f"the attack's objective is no lower at the truth than at the mean image "
        f"for {worse} of {len(pairs)} targets: it cannot find the truth"
    ]


def merged(doubts: Sequence[Sequence[Doubt]]) -> list[str]:
    """Every doubt once, in words, with the range of its values.

    Args:
        doubts: of each target; where not all targets share one, it says how many do.
    """
    values: dict[str, list[float]] = {}
    for of_target in doubts:
        for doubt in of_target:
            values.setdefault(doubt.text, []).append(doubt.value)
    n = len(doubts)
    warnings = []
    for text, found in values.items():
        words = re.sub(r"\{.*?\}", lambda form, found=found: _range(form[0], found), text)  # type: ignore[misc]
        warnings.append(words if len(found) == n else f"{words} ({len(found)} of {n} targets)")
    return warnings


def _range(form: str, values: Sequence[float]) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _batch_norm(scenario: Scenario, seen: Observation) -> list[Doubt]:
    if not normalises(seen.state.model):
        return []
    client = getattr(undefended(scenario.mechanism), "batch_norm", "eval")
    believed = getattr(undefended(seen.mechanism), "batch_norm", "eval")
    if client != believed:
        return [
            Doubt(
                f"the client normalises in {client} mode and the attacker assumes {believed} "
                "mode: misses show a wrong model of the client, not safety"
            )
        ]
    return []


def _residual(seen: Observation, truth: Truth) -> list[Doubt]:
    """The attacker's model of the client, at the true batch, against the update received."""
    believed = seen.mechanism
    if not believed.deterministic:
        return []
    with torch.no_grad():
        expected = believed.predict(seen.update, seen.state, truth.trained_on)
    residual = norm(difference(expected, seen.update)) / norm(seen.update)
    if residual <= _RESIDUAL:
        return []
    return [
        Doubt(
            "the attacker's model of the client misses the update at the truth by {:.0%} "
            "of its norm: the objective does not reach its floor there",
            residual,
        )
    ]


def _protections(
    scenario: Scenario, state: ModelState, truth: Truth, *, generator: torch.Generator
) -> list[Doubt]:
    """Replay every layer of the onion on equal draws and look at what it alone changed.

    Of several clients in a sum, the first one's.
    """
    doubts = []
    batch = parts(truth.batch, truth.clients)[0]
    layer = scenario.mechanism
    if truth.draws is not None:  # else every replay would draw its own
        layer = rebased(layer, draws=truth.draws)
    while isinstance(layer, Wrapped):
        with torch.no_grad():
            before = layer.inner.sample(state, batch, generator=_stream(generator))
            after = layer.sample(state, batch, generator=_stream(generator))
        name = layer.rule.id
        if norm(difference(after, before)) == 0:
            doubts.append(Doubt(f"{name} did not change the update: norm {{:.3g}}", norm(after)))
        elif contradiction := layer.rule.doubt(before, after):
            doubts.append(Doubt(f"{name} {contradiction[0]}", contradiction[1]))
        layer = layer.inner
    return doubts


def _stream(generator: torch.Generator) -> torch.Generator:
    return child(generator, "client/protection")
