"""Leakage beside its price: protections under unaware and adaptive attacks, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from gradleak.report import charts, wording
from gradleak.report.costs import Cost, cost_of, front
from gradleak.report.twins import is_adaptive

if TYPE_CHECKING:
    from gradleak.report.pictures import Picture
    from gradleak.report.view import Finding


NAMED = 3
"""Protections of the front that the title names."""


@dataclass(frozen=True, slots=True)
class Line:
    """One protection.

    Attributes:
        number: names it in the chart.
        unaware: the attack with the highest mean PSNR among those unaware of the protection.
        adaptive: the same among those that know it.
        cost: what it costs, or why nobody knows.
        best: whether no other protection with a known cost leaks less and costs less.
    """

    number: int
    verdict: str
    word: str
    unaware: Finding | None
    adaptive: Finding | None
    cost: Cost | str
    best: bool = False

    @property
    def any(self) -> Finding:
        """Some finding, for the protection's name."""
        found = self.adaptive or self.unaware
        assert found is not None
        return found

    @property
    def leakage(self) -> float | None:
        """Mean PSNR, dB, of the best attack; who knows the protection may also ignore it."""
        if self.adaptive is None:
            return None
        most = max(_psnr(f) for f in (self.adaptive, self.unaware) if f is not None)
        return most if math.isfinite(most) else None

    @property
    def known(self) -> bool:
        """Whether it can be drawn."""
        return isinstance(self.cost, Cost) and self.leakage is not None

    @property
    def why(self) -> str:
        """Why it cannot be drawn."""
        if isinstance(self.cost, str):
            return self.cost
        return "" if self.known else "no adaptive attack was measured"


@dataclass(frozen=True, slots=True)
class Picked:
    """The median target of an adaptive attack, and what the same attack finds unaware."""

    line: Line
    caption: str
    columns: tuple[tuple[str, str, Picture, str], ...]


class Tradeoff:
    """The section of a report; false where there is neither a cost nor an unaware twin."""

    def __init__(
        self,
        findings: Sequence[Finding],
        verdicts: Mapping[str, tuple[str, str]],
        trainings: Sequence[Mapping[str, Any]],
    ) -> None:
        self.priced = bool(trainings)
        by_spec: dict[str, list[Finding]] = {}
        for finding in findings:
            by_spec.setdefault(finding.spec, []).append(finding)
        self.paired = any(not is_adaptive(f.raw) for f in findings)
        lines = [
            Line(
                number,
                *verdicts[spec],
                _leakiest([f for f in group if not is_adaptive(f.raw)]),
                _leakiest([f for f in group if is_adaptive(f.raw)]),
                cost_of(spec, group[0].raw["scenario"], trainings),
            )
            for number, (spec, group) in enumerate(by_spec.items(), start=1)
        ]
        drawn = [(i, *_place(line)) for i, line in enumerate(lines) if line.known]
        best = {drawn[j][0] for j in front([point for _, *point in drawn])}  # type: ignore[misc]
        self.lines = [
            Line(x.number, x.verdict, x.word, x.unaware, x.adaptive, x.cost, i in best)
            for i, x in enumerate(lines)
        ]
        self.pictures = [p for line in self.lines if (p := _picked(line)) is not None]

    def __bool__(self) -> bool:
        return bool(self.lines) and (self.priced or self.paired)

    @property
    def title(self) -> str:
        """What the comparison shows."""
        best = [x for x in self.lines if x.best and x.any.raw["defense"] != "none"]
        if self.priced and not any(x.known for x in self.lines):
            return "What these protections cost is not known"
        if self.priced and not best:
            return "No protection leaks less than none at any price that was measured"
        if self.priced:
            words = [f"{x.any.name} ({_price(x)})" for x in best[:NAMED]]
            if len(best) > NAMED:
                words.append(wording.plural(len(best) - NAMED, "other protection"))
            return f"Nothing that was tried leaks less for less than {wording.listing(words, 'or')}"
        gains = [
            (_psnr(x.adaptive) - _psnr(x.unaware), x)
            for x in self.lines
            if x.adaptive is not None and x.unaware is not None
        ]
        if not gains:
            return "No protection was attacked both unaware and adaptively"
        gain, line = max(gains, key=lambda pair: pair[0])
        if gain < 0.05:
            return "Knowing the protection helps none of these attacks"
        return f"Knowing {line.any.name} raises the PSNR by {wording.decibels(gain)}"

    @property
    def chart(self) -> Markup:
        """Leakage against accuracy lost."""
        bubbles = [
            charts.Bubble(str(x.number), *_place(x), x.cost.slower, x.verdict, x.best)
            for x in self.lines
            if isinstance(x.cost, Cost) and x.known
        ]
        words = [f"{b.label}: {b.lost:.1f} points, {b.leakage:.1f} dB" for b in bubbles]
        return charts.pareto(bubbles, name=f"Mean PSNR against accuracy lost: {'; '.join(words)}")


def _place(line: Line) -> tuple[float, float]:
    """Accuracy lost in points, and leakage in dB."""
    assert isinstance(line.cost, Cost)
    assert line.leakage is not None
    return 100 * line.cost.lost, line.leakage


def _price(line: Line) -> str:
    lost, leakage = _place(line)
    return f"{wording.number(lost)} points of accuracy, {wording.decibels(leakage)}"


def _psnr(finding: Finding) -> float:
    value = finding.psnr.get("value")
    return -math.inf if value is None or math.isnan(value) else float(value)


def _leakiest(found: Sequence[Finding]) -> Finding | None:
    return max(found, key=_psnr, default=None)


def _picked(line: Line) -> Picked | None:
    """Pictures of one target under both attackers, where both attacked it."""
    adaptive, unaware = line.adaptive, line.unaware
    if adaptive is None or unaware is None:
        return None
    psnr = adaptive.target_psnr()
    order = sorted(range(len(psnr)), key=lambda i: (math.isnan(psnr[i]), psnr[i]))
    if not order:
        return None
    index = order[(len(order) - 1) // 2]
    same = [_identity(t) for t in unaware.targets]
    if _identity(adaptive.targets[index]) not in same:
        return None
    other = same.index(_identity(adaptive.targets[index]))
    known = {title: column for title, *column in adaptive.shown("Median", index).columns}
    blind = {title: column for title, *column in unaware.shown("Median", other).columns}
    if "Truth" not in known or "Attack" not in known or "Attack" not in blind:
        return None
    columns = (
        ("Truth", known["Truth"]),
        ("Unaware", blind["Attack"]),
        ("Adaptive", known["Attack"]),
    )
    return Picked(
        line,
        f"client {adaptive.targets[index].get('client', index)}: "
        f"{unaware.attack} and {adaptive.attack}",
        tuple((title, *column) for title, column in columns),  # type: ignore[misc]
    )


def _identity(target: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(target.get(name) for name in ("client", "seed", "group", "row"))
