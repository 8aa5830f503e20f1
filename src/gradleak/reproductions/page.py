"""report.html of a reproduction: one self-contained page, a pure function of reproduction.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gradleak.errors import CorruptFile
from gradleak.report import charts
from gradleak.report.html import jinja_environment, write_page
from gradleak.report.wording import Json
from gradleak.reproductions.reproduction import Reproduction
from gradleak.run.store import read_json

RESULT_FILE = "reproduction.json"
PAGE = "report.html"
_DRAWN = {"psnr_db": "Mean PSNR", "median_psnr_db": "Median PSNR"}
"""What charts show, by metric."""


def render(directory: Path) -> Path:
    """Write report.html into `directory` from its reproduction.json.

    Raises:
        CorruptFile: reproduction.json is missing, or not what a reproduction writes.
        InvalidInput: the page cannot be written.
    """
    result = read_json(directory / RESULT_FILE)
    try:
        page = compose(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptFile(
            f"{str(directory / RESULT_FILE)!r} is not what a reproduction writes: {error}"
        ) from None
    return write_page(directory / PAGE, page)


def compose(result: Json) -> str:
    """Return the page."""
    template = jinja_environment().get_template("reproduction.html.jinja")
    positions = result.get("positions", Reproduction.positions)
    return template.render(result=result, tables=tables(result["rows"], positions=positions))


def tables(rows: list[Json], *, positions: str) -> list[dict[str, Any]]:
    """Rows by table, the part of their name before the last " / ", each with its chart.

    Charts of one page share their axis.

    Args:
        rows: of the result.
        positions: what the positions of curves are.
    """
    drawn = [r["ours"]["value"] for r in rows if r["metric"] in _DRAWN]
    most = max((v for v in drawn if v is not None and math.isfinite(v)), default=0.0)
    top = charts.PSNR_TOP * max(1, math.ceil(most / charts.PSNR_TOP))
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        table, _, line = row["row"].rpartition(" / ")
        named.setdefault(table, []).append({**row, "line": line})
    return [
        {
            "name": name,
            "rows": lines,
            "chart": _curves(lines, name, positions, top)
            or charts.intervals(
                [
                    (r["line"], r["ours"]["value"], r["ours"]["low"], r["ours"]["high"])
                    for r in lines
                    if r["metric"] in _DRAWN and r["ours"]["value"] is not None
                ],
                name=_caption(lines, name),
                axis=f"{_metric(lines)} (dB)",
                top=top,
            ),
        }
        for name, lines in named.items()
    ]


def _caption(rows: list[dict[str, Any]], name: str) -> str:
    return f"{_metric(rows)} with 95 % intervals: {name}"


def _metric(rows: list[dict[str, Any]]) -> str:
    """What the chart of a table shows."""
    return _DRAWN[next((row["metric"] for row in rows if row["metric"] in _DRAWN), "psnr_db")]


def _curves(rows: list[dict[str, Any]], name: str, positions_are: str, top: float) -> Markup | None:
    """The figure of a table whose rows are points of curves, if they are."""
    points = [row for row in rows if row.get("curve")]
    positions = list(dict.fromkeys(row["curve"][1] for row in points))
    lines: dict[str, list[charts.Interval | None]] = {}
    for row in points:
        line, position = row["curve"]
        found = lines.setdefault(line, [None] * len(positions))
        ours = row["ours"]
        found[positions.index(position)] = (ours["value"], ours["low"], ours["high"])
    if not points:
        return None
    axis = f"{positions_are}; {_metric(points)} (dB)"
    return charts.curves(positions, lines, name=_caption(points, name), axis=axis, top=top)
