"""`gradleak inspect`: ranks, a verdict, and one clear line where there is nothing to tell."""

from __future__ import annotations

import json

import pytest

from gradleak.cli.app import INVALID, run


def test_a_network_without_kinks_is_determined(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "lenet-tiny", "--data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "unknowns" in out
    assert "determines it, layer by layer" in out or "stops at" in out


def test_a_rectified_network_is_no_chain(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "convnet", "--data", "digits", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chain"] is False
    assert "ReLU cannot be inverted" in told["reason"]


def test_ranks_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "cnn6", "--data", "digits", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert len(layers) == 7
    assert all(layer["rank"] <= layer["unknowns"] for layer in layers)


def test_an_unknown_network_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "cnn7"]) == INVALID
    assert "cnn6" in capsys.readouterr().err
