"""Secure aggregation over Flower's messages: what it computes, survives and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("cryptography")

import torch

from gradleak import crypto, models
from gradleak.federate.federation import federation
from gradleak.federate.settings import TrainSettings
from gradleak.federate.training import train
from tests.crypto.plain import Plain

SMALL = TrainSettings(
    data="digits", model="mlp", clients=5, rounds=3, batch_size=8, test_examples=100, draws=1
)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    known = crypto.aggregations()
    monkeypatch.setattr(crypto, "aggregations", lambda: known | {"plain": Plain})
    federation.cache_clear()


def with_(**changes: Any) -> TrainSettings:
    return dataclasses.replace(SMALL, **changes)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    network = federation(SMALL).initial.model
    return dict(models.load_weights(directory / "model.safetensors", network).params)


@pytest.mark.parametrize("mechanism", ["fedsgd", "fedavg:learning_rate=0.1,epochs=2"])
def test_trains_the_same_model(tmp_path: Path, mechanism: str) -> None:
    settings = with_(mechanism=mechanism, batch_size=0, partition="dirichlet:0.5")
    train(settings, out=tmp_path / "each")
    summed = train(dataclasses.replace(settings, aggregation="plain"), out=tmp_path / "sum")
    print(json.dumps(summed["rounds"][0], indent=1))
    a, b = weights(tmp_path / "each"), weights(tmp_path / "sum")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
