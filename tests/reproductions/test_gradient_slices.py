"""The table of gradient slices, on two digits and two rounds of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradleak import data
from gradleak.errors import InvalidInput
from gradleak.reproductions import gradient_slices
from gradleak.reproductions.gradient_slices import (
    ATTACKS,
    HIDDEN_DB,
    LINES,
    PROTECTIONS,
    PUBLISHED,
    GradientSlices,
    _attack_rows,
    _same_side,
    _Size,
)
from gradleak.reproductions.reproduction import Estimate, Request
from gradleak.reproductions.running import reproduce

pytest.importorskip("flwr")
FEW = ("none", "slices", "slices, blind mask")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    monkeypatch.setattr(gradient_slices, "available", lambda name, data_dir: ("digits", digits))
    monkeypatch.setattr(gradient_slices, "LINES", {name: LINES[name] for name in FEW})
    protections = {name: PROTECTIONS[name] for name in ("none", "slices")}
    monkeypatch.setattr(gradient_slices, "PROTECTIONS", protections)
    size = _Size(
        {"mnist": "mnist"}, targets=2, group=2, steps={"DLG": 2, "IG": 2}, rounds=2, timed=2
    )
    monkeypatch.setitem(gradient_slices._SIZES, "quick", size)


def test_leakage_accuracy_and_time_stand_beside_the_papers(tiny: None, tmp_path: Path) -> None:
    made = reproduce(GradientSlices(), Request(), out=tmp_path / "r", workers=0)
    rows = {(row["row"], row["metric"]): row for row in made.result["rows"]}
    for attack in ATTACKS:
        for line in FEW:
            assert rows[f"mnist, {attack} / {line}", "psnr_db"]["ours"]["n"] == 2
        published = rows[f"mnist, {attack} / slices", "psnr_db"]
        assert published["paper"] == PUBLISHED["mnist", attack]["slices"][0]
        assert published["paper_source"] != "unverified"
        assert rows[f"mnist, {attack} / slices, blind mask", "psnr_db"]["paper"] is None
    accuracy = rows["mnist, cost / slices", "accuracy"]
    assert 0 < accuracy["ours"]["low"] <= accuracy["ours"]["value"] <= accuracy["ours"]["high"]
    assert rows["mnist, cost / slices", "round_time_overhead"]["ours"]["n"] == 2
    assert "blind mask" in made.page.read_text()


def test_no_cell_is_planned_twice(tiny: None) -> None:
    keys = [cell.key for cell in GradientSlices().plan(Request())]
    assert len(set(keys)) == len(keys)


def test_equal_cells_train_and_attack_alike(tiny: None) -> None:
    table = GradientSlices()
    cells = [c for c in table.plan(Request()) if c.content["part"] != "time"]
    for cell in (cells[0], cells[-1]):
        one, other = (
            table.run(cell.content, [], data_dir=None, progress=lambda share: None) for _ in "ab"
        )
        one.pop("client_seconds", None), other.pop("client_seconds", None)
        assert one == other


def test_two_figures_agree_that_an_image_is_hidden_or_seen_or_cannot_tell() -> None:
    def ours(low: float, high: float) -> Estimate:
        return Estimate((low + high) / 2, low, high, 0.95, 8)

    assert _same_side(ours(8, 9), 9.4)
    assert _same_side(ours(20, 30), 18.5)
    assert not _same_side(ours(20, 30), 9.4)
    assert _same_side(ours(HIDDEN_DB - 1, HIDDEN_DB + 1), 9.4) is None


@pytest.mark.parametrize(("undefended", "agrees"), [(40.0, True), (8.0, None)])
def test_an_attack_that_fails_alone_says_nothing_of_protections(
    undefended: float, agrees: bool | None
) -> None:
    """Every protected image ends at 8 dB."""
    found = []
    for attack in ATTACKS:
        for line in LINES:
            psnr = undefended if line == "none" else 8.0
            scores = {"psnr_db": [psnr, psnr + 0.1], "ssim": [0.1, 0.1], "guess": [12.0, 12.0]}
            found.append(({"attack": attack, "line": line, "data": "mnist"}, scores))
    rows = {(r.row, r.metric): r for r in _attack_rows("mnist", found)}
    assert rows["mnist, DLG / slices", "psnr_db"].agrees is agrees


def test_every_published_table_has_the_same_lines() -> None:
    lines = {frozenset(table) for table in PUBLISHED.values()}
    assert len(lines) == 1
    assert lines.pop() <= set(LINES)


def test_without_flower_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"gradleak\[federate\]"):
        GradientSlices().plan(Request())
