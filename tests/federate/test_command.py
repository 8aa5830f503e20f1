"""`gradleak train`, in this process and killed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from gradleak import models
from gradleak.cli import run
from gradleak.federate.federation import federation
from gradleak.federate.settings import TrainSettings

SMALL = [
    "train", "--data", "digits", "--model", "mlp", "--clients", "3", "--batch-size", "8",
    "--test-examples", "50",
]  # fmt: skip


def test_train_prints_what_it_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--rounds", "2", "--defense", "clip:norm=1", "--out", str(tmp_path)]
    assert run([*arguments, "--record", str(tmp_path / "seen")]) == 0
    captured = capsys.readouterr()
    assert "training: 1 of 2 rounds" in captured.err
    assert "clip:norm=1" in captured.out
    assert "of 848 examples" in captured.out
    assert captured.out.rstrip().endswith(f"Written to: {tmp_path}")
    assert (tmp_path / "seen" / "recording.json").exists()
    assert run([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--partition", "dirichlets"], 2, "did you mean 'dirichlet'?"),
        (["--engine", "flowers"], 2, "did you mean 'flower'?"),
        (["--defense", "precode"], 2, "--defense precode: the network has no"),
        (["--clients", "5000"], 2, "--clients 5000: the clients' half of digits has 899"),
        (["--mechanism", "fedavg:minibatch_size=9"], 2, "minibatch_size=9"),
    ],
)
def test_what_cannot_work_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    words: str,
) -> None:
    assert run([*SMALL, *options, "--quiet", "--out", str(tmp_path / "out")]) == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_training_resumes_from_its_last_round(
    tmp_path: Path, ending: signal.Signals
) -> None:
    arguments = [*SMALL, "--rounds", "60", "--quiet", "--out"]
    assert run([*arguments, str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "gradleak", *arguments, str(tmp_path / "cut")]
    checkpoint = tmp_path / "cut" / "checkpoint.safetensors"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(ending)
        status = process.wait()
    assert status == (130 if ending == signal.SIGTERM else -signal.SIGKILL)
    record = tmp_path / "cut" / "training.json"
    found = json.loads(record.read_text())
    assert found["status"] == "interrupted"
    assert 0 < len(found["rounds"]) < 60
    assert run([*arguments, str(tmp_path / "cut")]) == 0
    model = federation(
        TrainSettings(
            data="digits", model="mlp", clients=3, batch_size=8, test_examples=50, rounds=60
        )
    ).initial.model
    whole, cut = (
        models.load_weights(tmp_path / name / "model.safetensors", model).params
        for name in ("whole", "cut")
    )
    assert all(whole[k].equal(cut[k]) for k in whole)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="needs ray")
def test_flowers_simulation_trains_the_same_model(tmp_path: Path) -> None:
    """The same apps on Ray: clients' numbers there are Flower's own, so all of them are asked."""
    arguments = [*SMALL, "--rounds", "3", "--quiet"]
    assert run([*arguments, "--out", str(tmp_path / "here")]) == 0
    command = [sys.executable, "-m", "gradleak", *arguments, "--engine", "flower"]
    environment = os.environ | {"RAY_worker_niceness": "0"}  # or a busy machine starves actors
    subprocess.run([*command, "--out", str(tmp_path / "ray")], check=True, env=environment)
    here, there = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("here", "ray")
    )
    assert there["status"] == "done"
    assert [r["failed"] for r in there["rounds"]] == [[], [], []]
    for a, b in zip(here["rounds"], there["rounds"], strict=True):
        assert a["bytes_up"] == b["bytes_up"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
