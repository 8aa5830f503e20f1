"""What a server, or a neighbour in a gossip, recorded of a training shows its clients' images."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")

import torch

from gradleak.attacks import build
from gradleak.federate.federation import federation
from gradleak.federate.grid import FIRST_NODE
from gradleak.federate.settings import TrainSettings
from gradleak.federate.training import train
from gradleak.metrics import psnr_db
from gradleak.observation import observe
from gradleak.run.recordings import read_exchange, read_recording
from tests.laws.small import stream


@pytest.mark.parametrize("mechanism", ["fedsgd", "fedavg:learning_rate=0.1,steps=2"])
@pytest.mark.parametrize(
    ("topology", "rounds", "views"),
    [
        ("star", {1, 2}, 10),
        ("gossip:graph=complete,attacker=3", {1, 2}, 8),
        ("gossip:graph=ring,attacker=3", {1}, 2),
    ],
)
def test_whoever_sees_an_update_sees_the_image(
    tmp_path: Path, mechanism: str, topology: str, rounds: set[int], views: int
) -> None:
    """At batch size 1 the first layer's gradient is the image; the mean image gives 12 dB.

    Updates of local training are read off differences of single-precision states.
    """
    settings = TrainSettings(
        data="digits", model="mlp", clients=5, rounds=2, batch_size=1, test_examples=10,
        mechanism=mechanism, topology=topology,
    )  # fmt: skip
    made = federation(settings)
    train(settings, out=tmp_path / "out", record_to=tmp_path / "seen")
    seen = [e for e in read_recording(tmp_path / "seen") if e.round in rounds]
    assert len(seen) == views
    for entry in seen:
        client = int(entry.node) - (FIRST_NODE if topology == "star" else 0)
        state, update, _ = read_exchange(tmp_path / "seen", entry, made.initial.model)
        observation = observe(
            state,
            update=update,
            kind=entry.kind,
            data=made.dataset.spec,
            mechanism=made.mechanism,
            batch_size=1,
        )
        claim = build("linear-layer")(observation, generator=stream(0)).batch
        truth = made.batch(client, entry.round)
        assert psnr_db(claim, truth) > 25
        other = made.batch((client + 1) % 5, entry.round)
        assert not torch.equal(other.inputs, truth.inputs)
        assert psnr_db(claim, other) < 20
