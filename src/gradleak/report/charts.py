"""Inline SVG charts: no script, no colour of their own (the style sheet has both schemes).

Every PSNR axis runs from 0 to 60 dB, so that charts of one report, and of two reports, compare by
eye. A value beyond the axis is drawn at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

PSNR_TOP = 60.0
"""Upper end of every PSNR axis, dB: beyond it images are equal to the eye and to 8 bits."""


@dataclass(frozen=True, slots=True)
class Point:
    """One position of a trend: a category with the attack's interval and its two references."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    control: float | None
    guess: float | None


def _x(psnr_db: float, left: float, right: float, top: float = PSNR_TOP) -> float:
    return left + (right - left) * min(max(psnr_db, 0.0), top) / top


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _svg(width: int, height: int, body: str, *, name: str, css: str) -> Markup:
    label = f'role="img" aria-label="{escape(name)}"' if name else 'aria-hidden="true"'
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f"{label}>{body}</svg>"
    )


def interval_strip(
    value: float | None,
    low: float | None,
    high: float | None,
    control: float | None,
    guess: float | None,
) -> Markup:
    """Draw one PSNR interval (dB) with the control and the guess as ticks; text stands beside."""
    width, height, left, right, middle = 160, 20, 4.0, 156.0, 10.0
    parts = [f'<path class="axis" d="M{left} {middle}H{right}"/>']
    for css, tick in (("guess", guess), ("control", control)):
        if tick is not None and _known(tick):
            x = _x(tick, left, right)
            parts.append(f'<path class="line {css}" d="M{x:.1f} 3V17"/>')
    if value is not None and _known(value):
        if low is not None and high is not None and _known(low) and _known(high):
            ends = f"M{_x(low, left, right):.1f} {middle}H{_x(high, left, right):.1f}"
            parts.append(f'<path class="whisker attack" d="{ends}"/>')
        parts.append(
            f'<circle class="dot attack" cx="{_x(value, left, right):.1f}" cy="10" r="4"/>'
        )
    return _svg(width, height, "".join(parts), name="", css="strip")


def intervals(
    lines: Sequence[tuple[str, float, float, float]],
    *,
    name: str,
    axis: str = "mean PSNR (dB)",
    top: float = PSNR_TOP,
) -> Markup:
    """Draw PSNR intervals (dB) below each other; a line is (label, value, low, high)."""
    width, left, right, step = 640, 150.0, 628.0, 22.0
    bottom = step * len(lines) + 6
    body = ""
    for tick in _ticks(top):
        x = _x(tick, left, right, top)
        body += f'<path class="grid" d="M{x:.1f} 4V{bottom:.0f}"/>'
        body += f'<text x="{x:.0f}" y="{bottom + 15:.0f}" text-anchor="middle">{tick}</text>'
    body += (
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 32:.0f}" text-anchor="middle">'
        f"{axis}</text>"
    )
    for position, (label, value, low, high) in enumerate(lines):
        y = step * (position + 0.5) + 4
        ends = f"M{_x(low, left, right, top):.1f} {y:.1f}H{_x(high, left, right, top):.1f}"
        body += (
            f'<text x="{left - 10:.0f}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        body += f'<path class="whisker attack" d="{ends}"/>'
        x = _x(value, left, right, top)
        body += f'<circle class="dot attack" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return _svg(width, int(bottom + 38), body, name=name, css="plot wide") if lines else Markup()


def stacked_bar(parts: Sequence[tuple[str, int]], *, name: str) -> Markup:
    """Draw counts as one bar; `parts` are (class, count), `name` says the same in words."""
    width, height = 320, 16
    total = sum(count for _, count in parts)
    body, x = "", 0.0
    for css, count in parts:
        if count:
            step = width * count / total
            shown = max(step - 1.5, 1.0)
            body += f'<rect class="part {css}" x="{x:.1f}" y="0" width="{shown:.1f}" height="16"/>'
            x += step
    return Markup(
        f'<svg class="bar" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(name)}">{body}</svg>'
    )


_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 38.0, 306.0, 12.0, 132.0, 316, 172


def risk_curve(
    attack: Sequence[float],
    control: Sequence[float],
    guess: Sequence[float],
    undefended: Sequence[float] | None,
    *,
    begun: Sequence[float] = (),
    proved: Sequence[float] = (),
    name: str,
) -> Markup:
    """Draw the share of private images whose PSNR (dB) exceeds x, against both references.

    Args:
        attack: of every image, as for `control`, `guess`, `undefended` and `begun` at the truth.
        proved: the largest possible share above 0, 1, 2 … dB.
        name: says the same in words.
    """
    body = _frame([(f"{share} %", 1 - share / 100) for share in (0, 50, 100)])
    for tick in range(0, int(PSNR_TOP) + 1, 20):
        x = _x(tick, _LEFT, _RIGHT)
        anchor = "end" if tick == PSNR_TOP else "middle"
        body += f'<text x="{x:.0f}" y="{_BOTTOM + 15:.0f}" text-anchor="{anchor}">{tick}</text>'
    body += (
        f'<text x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_BOTTOM + 32:.0f}" text-anchor="middle">'
        "PSNR exceeds (dB)</text>"
    )
    body += f'<path class="area" d="{_survival(attack)}V{_BOTTOM}H{_LEFT}Z"/>'
    if undefended:
        body += f'<path class="line undefended" d="{_survival(undefended)}"/>'
    if proved:
        body += f'<path class="line proved" d="{_steps(proved)}"/>'
    for css, values in (
        ("begun", begun), ("guess", guess), ("control", control), ("attack", attack),
    ):  # fmt: skip
        if values:
            body += f'<path class="line {css}" d="{_survival(values)}"/>'
    return _svg(_WIDTH, _HEIGHT, body, name=name, css="plot")


def _steps(shares: Sequence[float]) -> str:
    """Path of shares at 0, 1, 2 … dB, each held until the next: a limit is never understated."""
    height = _BOTTOM - _TOP
    path = f"M{_LEFT} {_BOTTOM - height * shares[0]:.1f}"
    for psnr_db, share in enumerate(shares[1:], start=1):
        path += f"H{_x(psnr_db, _LEFT, _RIGHT):.1f}V{_BOTTOM - height * share:.1f}"
    return path


def _survival(values: Sequence[float]) -> str:
    """Path of the share of `values` above x; nan counts in the denominator and exceeds nothing."""
    height = _BOTTOM - _TOP
    steps = sorted(v for v in values if not math.isnan(v))
    share = len(steps) / len(values) if values else 0.0
    path = f"M{_LEFT} {_BOTTOM - height * share:.1f}"
    for position, value in enumerate(steps):
        if value >= PSNR_TOP:
            break
        share = (len(steps) - position - 1) / len(values)
        path += f"H{_x(value, _LEFT, _RIGHT):.1f}V{_BOTTOM - height * share:.1f}"
    return f"{path}H{_RIGHT}"


def scatter(points: Sequence[tuple[float, float]], *, name: str) -> Markup:
    """Draw (foretold, realised) mean squared errors on equal logarithmic axes, and the diagonal.

    Axes span whole decades, as many as the points need; errors of zero lie at their lower end.
    """
    width, height, left, right, top, bottom = 316, 300, 52.0, 296.0, 10.0, 250.0
    logs = [math.log10(error) for pair in points for error in pair if error > 0] or [0.0]
    low = math.floor(min(logs))
    high = max(math.ceil(max(logs)), low + 2)

    def place(error: float, start: float, end: float) -> float:
        log = math.log10(error) if error > 0 else low
        return start + (end - start) * (log - low) / (high - low)

    body = ""
    for decade in range(low, high + 1, -(-(high - low) // 5)):
        x, y = place(10.0**decade, left, right), place(10.0**decade, bottom, top)
        tick = f"10{str(decade).translate(_RAISED)}"
        body += f'<path class="grid" d="M{left} {y:.1f}H{right}M{x:.1f} {top}V{bottom}"/>'
        body += f'<text x="{left - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{tick}</text>'
        body += f'<text x="{x:.0f}" y="{bottom + 16:.0f}" text-anchor="middle">{tick}</text>'
    middle = (top + bottom) / 2
    body += (
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 36:.0f}" text-anchor="middle">'
        "mean squared error, foretold</text>"
        f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        "realised</text>"
        f'<path class="line control" d="M{left} {bottom}L{right} {top}"/>'
    )
    for foretold, realised in points:
        x, y = place(foretold, left, right), place(realised, bottom, top)
        body += f'<circle class="dot attack" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return _svg(width, height, body, name=name, css="plot")


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def trend(
    points: Sequence[Point], *, name: str, axis: str = "mean PSNR (dB)", top: float = PSNR_TOP
) -> Markup:
    """Draw mean PSNR (dB) with intervals over categories such as training stages.

    With `top` 1 the values are shares.
    """
    height = _BOTTOM - _TOP

    def y(value: float) -> float:
        return _BOTTOM - height * min(max(value, 0.0), top) / top

    ticks = range(0, int(PSNR_TOP) + 1, 20) if top == PSNR_TOP else (0, 50, 100)
    body = _frame([(str(tick), 1 - tick / ticks[-1]) for tick in ticks])
    step = (_RIGHT - _LEFT) / len(points)
    centres = [_LEFT + step * (position + 0.5) for position in range(len(points))]
    for x, point in zip(centres, points, strict=True):
        body += (
            f'<text x="{x:.0f}" y="{_BOTTOM + 15:.0f}" text-anchor="middle">'
            f"{escape(point.label)}</text>"
        )
    body += (
        f'<text x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_BOTTOM + 32:.0f}" text-anchor="middle">'
        f"{axis}</text>"
    )
    for css, values in (
        ("guess", [p.guess for p in points]),
        ("control", [p.control for p in points]),
        ("attack", [p.value for p in points]),
    ):
        known = [
            (x, v) for x, v in zip(centres, values, strict=True) if v is not None and _known(v)
        ]
        if known:
            path = "L".join(f"{x:.1f} {y(v):.1f}" for x, v in known)
            body += f'<path class="line {css}" d="M{path}"/>'
    for x, point in zip(centres, points, strict=True):
        if point.value is None or not _known(point.value):
            continue
        if point.low is not None and point.high is not None and _known(point.low):
            ends = f"M{x:.1f} {y(point.low):.1f}V{y(point.high):.1f}"
            body += f'<path class="whisker attack" d="{ends}"/>'
        body += f'<circle class="dot attack" cx="{x:.1f}" cy="{y(point.value):.1f}" r="4"/>'
    return _svg(_WIDTH, _HEIGHT, body, name=name, css="plot")


@dataclass(frozen=True, slots=True)
class Bubble:
    """A protection: accuracy lost (points), leakage (dB), size, and whether it is on the front."""

    label: str
    lost: float
    leakage: float
    size: float
    css: str
    best: bool


def pareto(bubbles: Sequence[Bubble], *, name: str) -> Markup:
    """Draw leakage (dB) against accuracy lost; areas grow with `size`, a line joins the front."""
    if not bubbles:
        return Markup()
    width, height, left, right, top, bottom = 640, 360, 52.0, 612.0, 16.0, 312.0
    low, high = min(b.lost for b in bubbles), max(b.lost for b in bubbles)
    step = next(s for s in (0.5, 1, 2, 5, 10, 20) if s >= (max(high, 0) - min(low, 0)) / 8)
    first, last = math.floor(min(low, 0) / step) - 1, math.ceil(max(high, 0) / step) + 1

    def x(lost: float) -> float:
        return left + (right - left) * (lost / step - first) / (last - first)

    def y(psnr_db: float) -> float:
        return bottom - (bottom - top) * min(max(psnr_db, 0.0), PSNR_TOP) / PSNR_TOP

    body = ""
    for tick in range(0, int(PSNR_TOP) + 1, 10):
        body += f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/>'
        body += f'<text x="{left - 8:.0f}" y="{y(tick) + 4:.0f}" text-anchor="end">{tick}</text>'
    for number in range(first, last + 1):
        at, words = x(number * step), f"{number * step:g}".replace("-", "−")
        body += f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>'
        body += f'<text x="{at:.0f}" y="{bottom + 16:.0f}" text-anchor="middle">{words}</text>'
    body += (
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 36:.0f}" text-anchor="middle">'
        "accuracy lost (percentage points)</text>"
        f'<text transform="translate(14 {(top + bottom) / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">mean PSNR of the best attack (dB)</text>'
    )
    best = sorted((b.lost, -b.leakage) for b in bubbles if b.best)
    if best:
        path = f"M{x(best[0][0]):.1f} {y(-best[0][1]):.1f}"
        path += "".join(f"H{x(lost):.1f}V{y(-up):.1f}" for lost, up in best[1:])
        body += f'<path class="line front" d="{path}"/>'
    taken: list[tuple[float, float]] = []
    for b in sorted(bubbles, key=lambda b: -b.size):
        radius = 7 * math.sqrt(min(b.size, 12.0)) if b.size > 0 else 7.0
        at, level = x(b.lost), y(b.leakage)
        css = f"bubble {b.css}{' best' if b.best else ''}"
        body += f'<circle class="{css}" cx="{at:.1f}" cy="{level:.1f}" r="{radius:.1f}"/>'
        beside, beneath = at + radius + 4, level + 4
        while any(abs(beside - u) < 18 and abs(beneath - v) < 12 for u, v in taken):
            beneath += 12
        taken.append((beside, beneath))
        body += f'<text class="tag" x="{beside:.1f}" y="{beneath:.1f}">{escape(b.label)}</text>'
    return _svg(width, height, body, name=name, css="plot wide")


Interval = tuple[float, float, float]
"""Value, low and high."""

_STYLES = ("undefended", "attack", "control", "guess")


def curves(
    positions: Sequence[str],
    lines: Mapping[str, Sequence[Interval | None]],
    *,
    name: str,
    axis: str = "training steps; mean PSNR (dB)",
    top: float = PSNR_TOP,
) -> Markup:
    """Draw PSNR (dB) of several lines over positions, named in a legend beside them."""
    width, right, height = 640.0, 480.0, 220.0
    bottom = height - 36

    def y(psnr_db: float) -> float:
        return bottom - (bottom - _TOP) * min(max(psnr_db, 0.0), top) / top

    body = ""
    for tick in _ticks(top):
        body += f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{right}"/>'
        body += f'<text x="{_LEFT - 6:.0f}" y="{y(tick) + 4:.0f}" text-anchor="end">{tick}</text>'
    step = (right - _LEFT) / len(positions)
    centres = [_LEFT + step * (i + 0.5) for i in range(len(positions))]
    for x, position in zip(centres, map(escape, positions), strict=True):
        body += f'<text x="{x:.0f}" y="{bottom + 15:.0f}" text-anchor="middle">{position}</text>'
    middle = (_LEFT + right) / 2
    body += f'<text x="{middle:.0f}" y="{bottom + 32:.0f}" text-anchor="middle">{axis}</text>'
    for number, (label, points) in enumerate(lines.items()):
        css = _STYLES[number % len(_STYLES)]
        known = [(x, p) for x, p in zip(centres, points, strict=True) if p is not None]
        path = "L".join(f"{x:.1f} {y(p[0]):.1f}" for x, p in known)
        body += f'<path class="line {css}" d="M{path}"/>'
        for x, (value, low, high) in known:
            whisker = f"M{x:.1f} {y(low):.1f}V{y(high):.1f}"
            body += f'<path class="whisker {css}" d="{whisker}"/>'
            body += f'<circle class="dot {css}" cx="{x:.1f}" cy="{y(value):.1f}" r="3"/>'
        level = _TOP + 18 * number + 8
        body += f'<path class="line {css}" d="M{right + 10} {level}h24"/>'
        body += f'<text x="{right + 40:.0f}" y="{level + 4}">{escape(label)}</text>'
    return _svg(int(width), int(height), body, name=name, css="plot wide")


def _ticks(top: float) -> range:
    return range(0, int(top) + 1, int(top) // 6)


def _frame(ticks: Sequence[tuple[str, float]]) -> str:
    """Horizontal grid lines; a tick is (label, share of the height from the top)."""
    body = ""
    for label, share in ticks:
        y = _TOP + (_BOTTOM - _TOP) * share
        body += f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
        body += f'<text x="{_LEFT - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{label}</text>'
    return body
