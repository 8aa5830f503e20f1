"""A reproduction end to end: what it writes, how it resumes, how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradleak.cli import run
from gradleak.errors import InvalidInput
from gradleak.reproductions import REPRODUCTIONS
from gradleak.reproductions.reproduction import Request
from gradleak.reproductions.running import CellsFailed, reproduce
from tests.reproductions.fake import Fake


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the fake writes an x for each cell that it computes."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "ran"


def request(log: Path, **more: Any) -> Request:
    return Request(data_dir=str(log.parent), **more)


def test_the_files_have_the_promised_form(tmp_path: Path) -> None:
    outcome = reproduce(Fake(), Request(seed=1), out=tmp_path / "out", workers=0)
    result = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert result == outcome.result
    assert result["schema_version"] == 1
    assert (result["id"], result["paper"], result["budget"]) == ("fake", Fake.paper, "quick")
    for row in result["rows"]:
        assert set(row) == {
            "row", "metric", "unit", "paper", "paper_source", "ours", "agrees", "note", "curve",
            "picture",
        }  # fmt: skip
        assert set(row["ours"]) == {"value", "low", "high", "confidence", "n"}
        assert (row["paper"] is None) == (row["paper_source"] == "unverified")
        assert row["agrees"] is None or row["paper"] is not None
    # 1, 1, 2, 3, 4: mean 2.2, standard error √(1.7 / 5), t(4) at 97.5 % is 2.776
    ours = result["rows"][0]["ours"]
    half = 2.776445 * (1.7 / 5) ** 0.5
    assert ours == {
        "value": pytest.approx(2.2), "low": pytest.approx(2.2 - half),
        "high": pytest.approx(2.2 + half), "confidence": 0.95, "n": 5,
    }  # fmt: skip

    page = outcome.page.read_text()
    assert page.count("<svg") == 2
    assert "&lt;why&gt;" in page
    assert "9.41" in page
    assert "gradleak reproduce fake --budget quick --seed 1" in page
    assert "src=" not in page
    assert "<script" not in page
    before = outcome.page.read_bytes()
    assert run(["report", str(tmp_path / "out")]) == 0
    assert outcome.page.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_loses_the_cell_in_flight(tmp_path: Path, log: Path) -> None:
    (log.parent / "killed").touch()
    code = (
        "from pathlib import Path;"
        "from tests.reproductions.fake import Fake;"
        "from gradleak.reproductions.reproduction import Request;"
        "from gradleak.reproductions.running import reproduce;"
        f"reproduce(Fake(), Request(data_dir={str(log.parent)!r}), out=Path({str(tmp_path)!r}), "
        "workers=0)"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *sys.path])
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert process.returncode == -9
    store = tmp_path / "trials.jsonl"
    assert len(store.read_text().splitlines()) == 3
    with store.open("a") as file:
        file.write('{"key": "torn')
    resumed = reproduce(Fake(), request(log), out=tmp_path, workers=0)
    assert log.read_text() == "x" * 6
    assert resumed.result["rows"][0]["ours"]["n"] == 5
    reproduce(Fake(), request(log), out=tmp_path, workers=0)
    assert log.read_text() == "x" * 6
    reproduce(Fake(), request(log, seed=1), out=tmp_path, workers=0)
    assert log.read_text() == "x" * 11


def test_workers_and_this_process_agree(tmp_path: Path, log: Path) -> None:
    there = reproduce(Fake(), request(log), out=tmp_path / "there", workers=1)
    here = reproduce(Fake(), request(log), out=tmp_path / "here", workers=0)
    assert there.result["rows"] == here.result["rows"]


def test_a_failed_cell_is_told_and_runs_again(tmp_path: Path, log: Path) -> None:
    (log.parent / "broken").touch()
    with pytest.raises(CellsFailed, match=r"1 of 4 cells failed, .* ArithmeticError: no luck"):
        reproduce(Fake(), request(log), out=tmp_path, workers=0)
    assert not (tmp_path / "reproduction.json").exists()
    (log.parent / "broken").unlink()
    assert reproduce(Fake(), request(log), out=tmp_path, workers=0).page.exists()
    assert log.read_text() == "x" * 6


def test_other_results_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InvalidInput, match="holds other results"):
        reproduce(Fake(), Request(), out=tmp_path, workers=0)


def test_the_command_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(REPRODUCTIONS, "fake", Fake)
    assert run(["reproduce", "fake", "--out", str(tmp_path), "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert "loading data" in captured.err
    assert "Set / noise / first" in captured.out
    assert captured.out.rstrip().endswith(f"Report: {tmp_path / 'report.html'}")
    assert run(["list", "reproductions"]) == 0
    assert "A fake table" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["bayse"], "did you mean 'bayes'"),
        (["bayes", "--budget", "fulll"], "did you mean 'full'"),
        (["bayes", "--seed", "-1"], "--seed"),
        (["bayes", "--workers", "-1"], "--workers"),
        (["bayes", "--data-dir", "/nowhere"], "no such directory"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["reproduce", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error:")]) == 1
    assert said in error[-1]
    assert not Path("gradleak-reproduce-bayes").exists()


def test_missing_data_are_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "bayes", "--data-dir", str(tmp_path), "--quiet"]) == 2
    assert "no file" in capsys.readouterr().err


def test_every_reproduction_says_what_it_is() -> None:
    for name, reproduction in REPRODUCTIONS.items():
        assert reproduction.id == name
        assert reproduction.link.startswith("https://")
        assert all((reproduction.title, reproduction.paper, reproduction.method))
