"""Charts draw what the numbers say, also where the numbers are not finite."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from gradleak.report import charts


def test_the_risk_curve_counts_what_exceeds() -> None:
    path = charts._survival([10.0, 30.0, math.inf, math.nan])
    height = charts._BOTTOM - charts._TOP
    levels = [charts._BOTTOM - height * share for share in (0.75, 0.5, 0.25)]
    drawn = [float(y) for y in re.findall(r"(?:M[\d.]+ |V)([\d.]+)", path)]
    assert drawn == pytest.approx(levels)
    assert path.endswith(f"H{charts._RIGHT}")


def test_bars_are_proportional() -> None:
    svg = ElementTree.fromstring(charts.stacked_bar([("a", 3), ("b", 1)], name="three and one"))
    widths = [float(part.attrib["width"]) for part in svg]
    assert widths == pytest.approx([238.5, 78.5])
    assert svg.attrib["aria-label"] == "three and one"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, -5.0, 1e9])
def test_no_chart_breaks_on_an_unusual_number(value: float | None) -> None:
    number = math.nan if value is None else value
    drawn = [
        charts.interval_strip(value, value, value, value, value),
        charts.risk_curve([number], [number], [], [number], name="<odd> & name"),
        charts.trend([charts.Point("a", value, value, value, value, value)] * 2, name="odd"),
    ]
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "nan" not in svg
        assert "inf" not in svg


def test_an_interval_open_to_one_side_is_drawn_to_the_end_of_the_axis() -> None:
    svg = charts.interval_strip(20.0, -math.inf, math.inf, None, None)
    assert "M4.0 10.0H156.0" in svg


def test_a_scatter_has_equal_axes_of_whole_decades() -> None:
    points = [(1e-3, 2e-2), (5e-4, 0.0), (3e-3, 0.9)]
    chart = str(charts.scatter(points, name="three targets"))
    assert chart.count("<circle") == 3
    for tick in ("10⁻⁴", "10⁻²", "10⁰"):
        assert chart.count(f">{tick}</text>") == 2
    assert 'cy="250.0"' in chart, "an error of zero lies at the lower end"
    assert str(charts.scatter([(0.0, 0.0)], name="exact")).count("<circle") == 1


def test_a_proved_limit_is_held_until_the_next_point() -> None:
    chart = str(charts.risk_curve([30.0], [], [], None, proved=[1.0, 0.5], name=""))
    assert 'class="line proved" d="M38.0 12.0H42.5V72.0"' in chart
