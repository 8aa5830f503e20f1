"""The table of label recovery, on two batches of digits."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradleak import data
from gradleak.attacks.labels import LABEL_RULES
from gradleak.reproductions import label_recovery
from gradleak.reproductions.label_recovery import LabelRecovery, _Size
from gradleak.reproductions.reproduction import Request
from gradleak.reproductions.running import reproduce


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    monkeypatch.setattr(label_recovery, "available", lambda name, data_dir: ("digits", digits))
    size = _Size(("mnist",), ("ReLU",), (0, 2), batches=2)
    monkeypatch.setitem(label_recovery._SIZES, "quick", size)


def test_every_rule_stands_beside_the_guess_on_the_same_batches(tiny: None, tmp_path: Path) -> None:
    table = LabelRecovery()
    cells = table.plan(Request())
    assert len({cell.key for cell in cells}) == len(cells) == 4
    records = {
        cell.key: table.run(cell.content, [], data_dir=None, progress=lambda share: None)
        for cell in cells
    }
    rules = [name for name, rule in LABEL_RULES.items() if rule.about.claims != "soft"]
    rows = {row.row: row for row in table.rows(cells, records)}
    assert len(rows) == 4 * (1 + 2 * len(rules))
    line = "digits, ReLU, batch 64, step 0 / bias-zlg"
    guess = rows["digits, ReLU, batch 64, step 0 / guess"].ours.value
    assert rows[line].ours.value is not None
    assert guess is not None
    assert rows[line].ours.value > 0.95 > guess
    assert rows[f"{line} − guess"].ours.value == pytest.approx(rows[line].ours.value - guess)
    silent = rows["digits, ReLU, batch 64, step 0 / rlg"]
    assert silent.ours.value == guess
    assert "says nothing of 2 of 2 batches" in silent.note


def test_equal_cells_give_equal_records(tiny: None) -> None:
    table = LabelRecovery()
    cell = table.plan(Request())[0].content
    one, other = (table.run(cell, [], data_dir=None, progress=lambda share: None) for _ in "ab")
    assert one == other


def test_its_report_is_written(tiny: None, tmp_path: Path) -> None:
    reproduce(LabelRecovery(), Request(), out=tmp_path / "r", workers=0)
    assert "separated-head" in (tmp_path / "r" / "report.html").read_text()
