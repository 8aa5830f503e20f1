"""The comparison with a peer, gradleak's side of it, on embedded data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
Command = Callable[..., str]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python benchmarks/compare.py ...` in this process: what it prints."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from compare import main

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        main()
        return capsys.readouterr().out

    return run


def test_a_case_is_written_attacked_once_and_tabled(compare: Command, tmp_path: Path) -> None:
    folder = str(tmp_path / "case")
    digits = ["--data", "digits", "--from", "100", "--to", "200"]
    size = ["--batch", "2", "--targets", "3", "--train-steps", "1"]
    compare("case", folder, *digits, *size, "--network", "lenet-tiny")
    about = json.loads((tmp_path / "case" / "case.json").read_text())
    chosen = [i for target in about["indices"] for i in target]
    assert len(set(chosen)) == 6
    assert set(chosen) <= set(range(100, 200))

    attack = ["--attack", "inverting-gradients:steps=3", "--knows", "labels"]
    compare("ours", folder, *attack, "--targets", "2")
    second = compare("ours", folder, *attack)
    assert "target 0" in second
    assert "target 2" not in second, "a stored result is not computed again"

    lines = (tmp_path / "case" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["target"] for row in rows) == [0, 1, 2]
    assert all(len(row["psnr_db"]) == 2 and row["label_accuracy"] == 1 for row in rows)
    assert "| inverting-gradients:steps=3 | labels | 3 |" in compare("table", folder)
