"""Leakage beside cost: matching of trainings, the front, and who may decide a verdict."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from gradleak import jsonsafe
from gradleak.cli import run
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.report import costs
from gradleak.report.findings import findings, verdict_by_defense
from gradleak.report.html import render
from gradleak.report.view import Report
from gradleak.run.jobs import defense_spec
from tests.report import synthetic
from tests.report.synthetic import Case, trained

NOISE, TOP_K, CLIP = "gaussian-noise:std=1", "top-k:fraction=0.1", "clip:norm=1"


def full(notation: str) -> str:
    return defense_spec(notation)[1]


@pytest.fixture
def trainings(tmp_path: Path) -> list[str]:
    place = tmp_path / "trained"
    return [
        trained(place / "none", "none", 0.92),
        trained(place / "none-1", "none", 0.90, seed=1),
        trained(place / "noise", NOISE, 0.70, seconds=3.0),
        trained(place / "top-k", TOP_K, 0.90, bytes_up=200_000),
        trained(place / "clip", CLIP, 0.80),
        trained(place / "precode", "precode", 0.5, status="stopped"),
    ]


CASES = (
    Case("none", "dlg", 0.12),
    Case(full(NOISE), "dlg", 3.0),
    Case(full(NOISE), "dlg", 5.0, adaptive=False),
    Case(full(TOP_K), "dlg", 0.6),
    Case(full(TOP_K), "dlg", 2.0, adaptive=False),
    Case(full(CLIP), "dlg", 0.2),
    Case("laplace-noise:std=0.01,scope=update", "dlg", 1.0),
    Case(full("precode"), "dlg", 1.0),
)


def test_trainings_are_matched_and_what_is_unknown_is_listed(
    tmp_path: Path, trainings: list[str]
) -> None:
    out = tmp_path / "out"
    synthetic.write(out, CASES)
    costs.keep(out, trainings)
    result = jsonsafe.loads((out / "result.json").read_bytes())
    found = Report(result, out).tradeoff
    lines = {line.any.raw["defense"]: line for line in found.lines}
    noise = lines["gaussian-noise"].cost
    assert isinstance(noise, costs.Cost)
    assert noise.lost == pytest.approx(0.91 - 0.70), "against the mean of two seeds"
    assert noise.slower == pytest.approx(1.5)
    assert noise.interval.low < 0.70 < noise.interval.high
    sparse = lines["top-k"].cost
    assert isinstance(sparse, costs.Cost)
    assert sparse.larger == pytest.approx(0.2)
    assert {line.any.raw["defense"]: line.why for line in found.lines if line.why} == {
        "laplace-noise": "no training with this protection and these fields",
        "precode": "the training was stopped after 2 rounds: a client sent nan",
    }
    best = {line.any.raw["defense"] for line in found.lines if line.best}
    assert best == {"none", "top-k", "gaussian-noise"}, "clip costs more than top-k and leaks more"
    assert lines["gaussian-noise"].unaware is not None
    assert lines["none"].unaware is None
    page = render(out).read_text()
    assert "Leakage and cost" in page
    assert page.count('<circle class="bubble') == 4
    assert ">Unaware<" in page
    assert ">Adaptive<" in page


def test_other_conditions_are_no_price(tmp_path: Path) -> None:
    sources = [
        trained(tmp_path / "none", "none", 0.9, rounds=50),
        trained(tmp_path / "clip", CLIP, 0.8),
        trained(tmp_path / "noise", NOISE, 0.8, data="mnist"),
        trained(tmp_path / "top-k", TOP_K, None, status="interrupted"),
    ]
    costs.keep(tmp_path, sources)
    known = costs.kept(tmp_path)
    scene = {"data": "digits", "model": "lenet-tiny"}
    assert costs.cost_of(full(CLIP), scene, known) == (
        "no undefended training under the same conditions"
    )
    assert costs.cost_of(full(TOP_K), scene, known) == (
        "the training was interrupted after 2 rounds"
    )
    assert costs.cost_of(full(NOISE), scene, known) == "trained on mnist, lenet-tiny instead"


def test_the_front_is_what_nothing_dominates() -> None:
    points = [(0.0, 40.0), (1.0, 30.0), (1.0, 35.0), (5.0, 30.0), (9.0, 8.0), (0.0, 40.0)]
    assert costs.front(points) == [0, 1, 4, 5], "equal points stay together"
    assert costs.front([]) == []


def test_an_unaware_attack_never_protects_and_a_leak_by_it_counts(tmp_path: Path) -> None:
    """Misses of an unaware attack change no verdict; without its twin they leave it open."""
    (tmp_path / "tensors").mkdir()
    pool = synthetic.digits(channels=1)

    def verdict(*cases: Case) -> str:
        records = [
            synthetic.record(c, pool, tmp_path, targets=8, model="lenet-tiny")
            for c in (Case("none", "dlg", 0.1), *cases)
        ]
        return verdict_by_defense(findings(records))[NOISE]

    safe, blind = Case(NOISE, "dlg", math.inf), Case(NOISE, "dlg", math.inf, adaptive=False)
    open_ = Case(NOISE, "dlg", math.inf, optimiser_limited=True)
    assert verdict(safe) == verdict(safe, blind) == "protected"
    assert verdict(blind) == verdict(open_, blind) == "inconclusive"
    assert verdict(safe, dataclasses.replace(blind, sigma=0.1)) == "leaks"


def test_a_report_is_rendered_again_with_costs(
    tmp_path: Path, trainings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    synthetic.write(out, CASES[:2])
    assert run(["report", str(out)]) == 0
    assert "Leakage and cost" not in (out / "report.html").read_text()
    options = [word for source in trainings[:3] for word in ("--cost", source)]
    assert run(["report", str(out), *options]) == 0
    assert "Leakage and cost" in (out / "report.html").read_text()
    assert run(["report", str(out)]) == 0
    assert "Leakage and cost" in (out / "report.html").read_text(), "costs are kept"
    capsys.readouterr()
    assert run(["report", str(out), "--cost", str(tmp_path)]) == 2
    assert "expected --out of `gradleak train`" in capsys.readouterr().err


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no training\.json"):
        costs.check([str(tmp_path)])
    (tmp_path / "training.json").write_text('{"settings": {}}')
    with pytest.raises(CorruptFile, match="is not a training"):
        costs.check([str(tmp_path)])
    (tmp_path / "costs.json").write_text("[]")
    with pytest.raises(CorruptFile, match="was not written by this version"):
        costs.kept(tmp_path)
