"""Demonstrated beside proved, and foretold beside realised, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from markupsafe import Markup

from gradleak.report import charts, wording
from gradleak.report.findings import NO_CLAIM
from gradleak.report.wording import Json


class Pair(Protocol):
    """An attack against a protection, as `view.Finding` has it."""

    raw: Json
    attack: str
    spec: str
    name: str
    fields: str
    setting: str
    targets: list[Json]


@dataclass(frozen=True, slots=True)
class Line:
    """One limit of one condition, beside the attack that comes nearest to it.

    Attributes:
        css: "leaks" where a proved limit is broken, "protected" where it holds, else "untested".
        word: the same for a reader.
    """

    pair: Pair
    demonstrated: str
    interval: str
    limit: str
    basis: str
    css: str
    word: str


def lines(pairs: Iterable[Pair]) -> list[Line]:
    """A line per condition and limit, in order of appearance."""
    nearest: dict[tuple[str, str, str], tuple[Pair, Json]] = {}
    for pair in pairs:
        for limit in pair.raw.get("limits") or ():
            key = (pair.setting, pair.spec, limit["metric"])
            if key not in nearest or _reach(limit) > _reach(nearest[key][1]):
                nearest[key] = (pair, limit)
    return [_line(pair, limit) for pair, limit in nearest.values()]


def title(found: Sequence[Line]) -> str:
    """What the comparison shows."""
    broken = sum(line.css == "leaks" for line in found)
    holding = sum(line.css == "protected" for line in found)
    if broken:
        verb = "is" if broken == 1 else "are"
        return (
            f"{wording.plural(broken, 'proved limit')} {verb} broken: the audit contradicts itself"
        )
    if not holding:
        return "Nothing is proved about these conditions"
    return f"No attack beats what is proved ({wording.plural(holding, 'condition')})"


def _reach(limit: Json) -> tuple[bool, float]:
    value = float(limit["demonstrated"]["value"])
    return bool(limit["broken"]), value if limit["side"] == "at most" else -value


def _line(pair: Pair, limit: Json) -> Line:
    seen, why = limit["demonstrated"], wording.listing(limit["why"])
    if limit["metric"] == "identified":
        what, write, sign = "identified", wording.percent, "≤"
    else:
        what, write, sign = "mean squared error", wording.significant, "≥"
    basis = why
    if limit["proved"]:
        basis = (
            f"noise {wording.significant(limit.get('noise_multiplier'))} × sensitivity; "
            f"a guess has {wording.percent(limit.get('kappa'))}{_epsilon(limit)}"
        )
    if limit["limit"] is None:
        named = "Nothing proved" if limit["metric"] == "identified" else "Not computed"
        css, word = "untested", named
    elif limit["proved"]:
        css, word = ("leaks", "Error: broken") if limit["broken"] else ("protected", "Holds")
    else:
        css, word = "untested", "Score, beaten" if limit["broken"] else "Score, not proved"
    return Line(
        pair=pair,
        demonstrated=f"{write(seen['value'])} {what}",
        interval=f"{write(seen['low'])} to {write(seen['high'])} "
        f"({wording.number(100 * seen['confidence'])} %)",
        limit="–" if limit["limit"] is None else f"{sign} {write(limit['limit'])}",
        basis=basis,
        css=css,
        word=word,
    )


def _epsilon(limit: Json) -> str:
    """The ε of one update, and what `dp-sgd` is accounted for; nothing in older results."""
    if limit.get("epsilon") is None:
        return ""
    at = f"at δ = {wording.significant(limit['delta'])}"
    words = f"; one update has ε = {wording.significant(limit['epsilon'])} {at}"
    known = limit.get("accounted") or {}
    if known.get("rounds", 1) > 1 or known.get("sample_rate", 1) < 1:
        rate = wording.percent(known["sample_rate"])
        words += f", {known['rounds']} rounds at a sampling rate of {rate} have "
        words += wording.accounted(known["epsilon"])
    return words


@dataclass(frozen=True, slots=True)
class Scatter:
    """Foretold beside realised error of every target of a pair that made a claim."""

    pair: Pair
    words: str
    chart: Markup


def scatters(pairs: Iterable[Pair]) -> list[Scatter]:
    """A panel per pair for whose targets an error was foretold."""
    found = []
    for pair in pairs:
        points = [p for target in pair.targets if (p := _point(target)) is not None]
        if not points:
            continue
        rank = _ranking(pair).get("posterior_trace", {})
        rho, n = rank.get("rho"), rank.get("n", len(points))
        words = f"rank correlation {wording.number(rho, 2)}, n = {n}"
        if rho is None:
            words = f"n = {n}, too few to rank"
        others = [
            f"{_NAMES[name]} {wording.number(other['rho'], 2)}"
            for name, other in _ranking(pair).items()
            if name != "posterior_trace" and other.get("rho") is not None
        ]
        if others:
            words += f" ({', '.join(others)})"
        name = f"{pair.name}, {pair.attack}: foretold and realised error, {words}"
        found.append(Scatter(pair, words, charts.scatter(points, name=name)))
    return found


_NAMES = {"dfil": "dFIL", "influence": "I²F bound"}


def scatter_title(found: Sequence[Scatter]) -> str:
    """How well errors were foretold, where most targets tell."""
    ranked = [(r["n"], r["rho"], s.pair) for s in found if (r := _posterior(s.pair))]
    if not ranked:
        return "Too few targets to tell whether errors were foretold"
    n, rho, pair = max(ranked, key=lambda item: item[0])
    return (
        f"Foretold and realised error: rank correlation {wording.number(rho, 2)} "
        f"over {n} targets behind {pair.spec}"
    )


def _posterior(pair: Pair) -> Mapping[str, Any] | None:
    rank = _ranking(pair).get("posterior_trace")
    return rank if rank and rank.get("rho") is not None else None


def _ranking(pair: Pair) -> Mapping[str, Any]:
    return (pair.raw.get("foretold") or {}).get("ranking") or {}


def _point(target: Json) -> tuple[float, float] | None:
    """(foretold, realised) mean squared error of a target with a claim."""
    foretold = (target.get("foretold") or {}).get("posterior_trace")
    errors = (target.get("scores") or {}).get("mse")
    if foretold is None or not errors or target["status"] in NO_CLAIM:
        return None
    return float(foretold), sum(errors) / len(errors)
