"""A reproduction that takes no time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradleak.reproductions.reproduction import Cell, Estimate, Reproduction, Request, Row


class Fake(Reproduction):
    """A cell that others need, and four of those; `slow` is a file that makes them wait."""

    id = "fake"
    title = "A fake table"
    paper = "Nobody, Nothing, 2000"
    link = "https://example.org"
    method = "Nothing is done."
    deviations = ("everything",)

    def plan(self, request: Request) -> list[Cell]:
        first = Cell({"value": request.seed}, trials=2)
        return [first, *(Cell({"add": i}, needs=(first.key,)) for i in range(4))]

    def run(
        self,
        cell: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        *,
        data_dir: str | None,
        progress: Callable[[float], None],
    ) -> dict[str, Any]:
        if data_dir is not None:
            with (Path(data_dir) / "ran").open("a") as log:
                log.write("x")
            if cell.get("add") == 2 and (Path(data_dir) / "broken").exists():
                raise ArithmeticError("no\nluck")
            if cell.get("add") == 2 and (Path(data_dir) / "killed").exists():
                (Path(data_dir) / "killed").unlink()
                import os
                import signal

                os.kill(os.getpid(), signal.SIGKILL)
        progress(0.5)
        return {"value": cell["value"] if not found else found[0]["value"] + cell["add"]}

    def rows(self, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        values = [float(records[c.key]["value"]) for c in cells]
        named = {"metric": "psnr_db", "unit": "dB"}
        return [
            Row(row="Set / noise / first", ours=Estimate.mean(values), note="<why>", **named),
            Row(row="Set / noise / second", ours=Estimate.nothing(), note="not run", **named),
            Row(
                row="Set / slices / first",
                ours=Estimate.difference(values, [0.0] * 5),
                note="read",
                paper=9.41,
                paper_source="Table 2",
                agrees=False,
                **named,
            ),
        ]
