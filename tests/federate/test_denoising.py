"""Federated training of a denoiser: what a round computes, draws, hides and is tested by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize, silu

from gradleak import models
from gradleak.cli import run
from gradleak.defenses import undefended
from gradleak.denoising import UNet
from gradleak.errors import InvalidInput
from gradleak.federate.federation import federation
from gradleak.federate.grid import FIRST_NODE
from gradleak.federate.settings import TrainSettings
from gradleak.federate.training import train
from gradleak.mechanisms import Denoising, Draws
from gradleak.models import MODELS, ModelAbout
from gradleak.run.recordings import read_exchange, read_recording

SMALL = TrainSettings(
    data="digits", model="unet-tiny", mechanism="denoising:timesteps=50", clients=3, rounds=2,
    batch_size=4, test_examples=40, samples=0, draws=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net of one level, known by a name of its own.

    Of 8 channels each would be normalised alone, and no time seen.
    """
    about = ModelAbout(
        "unet-tiny", "", lambda spec: UNet(1, width=16, multipliers=(1,)), denoiser=True
    )
    monkeypatch.setitem(MODELS, "unet-tiny", about)


def with_(**changes: Any) -> TrainSettings:
    return dataclasses.replace(SMALL, **changes)


def state_in(directory: Path) -> dict[str, Tensor]:
    initial = federation(SMALL).initial
    return dict(models.load_weights(directory / "model.safetensors", initial.model).params)


def plain(settings: TrainSettings, client: int, server_round: int) -> tuple[Tensor, ...]:
    """Images in [−1, 1], noise and times of a client's round, by its draws alone."""
    made = federation(settings)
    batch = made.batch(client, server_round)
    stream = made.stream(f"client/{client}/round/{server_round}/denoising")
    core = settings.client
    draws = core.draw(batch, generator=stream)  # type: ignore[union-attr]
    return 2 * batch.inputs - 1, draws.noise, draws.times


def test_a_round_is_a_step_along_the_mean_gradient_of_the_denoising_loss(tmp_path: Path) -> None:
    """Plain PyTorch on the clients' images, noise and times."""
    settings = with_(rounds=1, learning_rate=0.3)
    train(settings, out=tmp_path)
    made = federation(settings)
    network = UNet(1, width=16, multipliers=(1,))
    network.load_state_dict(dict(made.initial.params))
    alphas = (1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)).cumprod(0).float()
    total = torch.zeros(())
    for client in range(3):
        clean, noise, times = plain(settings, client, 1)
        a = alphas[times[:, 0]].reshape(-1, 1, 1, 1)
        noised = a.sqrt() * clean + (1 - a).sqrt() * noise[:, 0]
        total = total + mse_loss(network(noised, times[:, 0]), noise[:, 0]) / 3
    total.backward()  # type: ignore[no-untyped-call]
    found = state_in(tmp_path)
    for name, value in network.named_parameters():
        assert value.grad is not None
        want = value.detach() - 0.3 * value.grad
        torch.testing.assert_close(found[name], want, atol=2e-6, rtol=1e-4)


def test_draws_follow_the_seed_and_differ_by_client_and_round() -> None:
    first = plain(SMALL, 0, 1)
    assert torch.equal(first[1], plain(SMALL, 0, 1)[1])
    for other in ((SMALL, 1, 1), (SMALL, 0, 2), (with_(seed=1), 0, 1)):
        assert not torch.equal(first[1], plain(*other)[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"mechanism": "denoising-fedavg:timesteps=50,minibatch_size=2,epochs=2"},
        {"topology": "gossip:graph=ring"},
        {"defense": "clip:norm=0.1+gaussian-noise:std=0.01"},
        {"defense": "clip:norm=0.1,scope=example"},
        {"defense": "dp-sgd:norm=0.1,noise_multiplier=0.1"},
        {"defense": "dp-sgd:norm=0.1,noise_multiplier=0.1,scope=example"},
        {"defense": "top-k:fraction=0.1"},
        {"defense": "partial-sharing:withheld=time_embedding/time,frozen=true"},
    ],
    ids=lambda changes: next(iter(changes.values())).partition(":")[0],
)
def test_every_protection_and_topology_trains_twice_alike(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    for name in ("a", "b"):
        trained = train(with_(rounds=1, **changes), out=tmp_path / name)
        assert trained["status"] == "done"
        assert all(entry["failed"] == [] for entry in trained["rounds"])
    a, b = state_in(tmp_path / "a"), state_in(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    before = federation(SMALL).initial.params
    moved = {k for k in a if not torch.equal(a[k], before[k])}
    assert {"first.weight", "last.weight"} <= moved
    timed = any("time" in k for k in moved)
    assert timed != ("partial-sharing" in str(changes))


def test_a_secure_sum_is_the_training_without(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    train(with_(rounds=1), out=tmp_path / "plain")
    train(with_(rounds=1, aggregation="secagg", min_clients=2), out=tmp_path / "summed")
    a, b = state_in(tmp_path / "plain"), state_in(tmp_path / "summed")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


def test_the_test_is_the_denoising_loss(tmp_path: Path) -> None:
    """A network that predicts no noise has the loss of the noise itself: 1; n = 858 · 64 numbers.

    Their mean square has a standard deviation of 0.006; the interval is six of them.
    """
    made = federation(SMALL)
    silent = {k: torch.zeros_like(v) for k, v in made.initial.params.items()}
    silent = dataclasses.replace(made.initial, params=silent)
    accuracy, loss, count = made.test(silent, final=True)
    assert (accuracy, count) == (None, 858)
    assert abs(loss - 1) < 0.036
    assert made.test(silent)[1] == made.test(silent)[1]


def test_the_record_holds_a_loss_and_the_quality_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradleak.run.sample_quality._STEPS", 20)
    command = [
        "train", "--data", "digits", "--model", "unet-tiny", "--clients", "3", "--rounds", "1",
        "--mechanism", "denoising:timesteps=20", "--batch-size", "4", "--test-examples", "40",
        "--samples", "20", "--quiet", "--out", str(tmp_path),
    ]  # fmt: skip
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "denoising loss" in told
    assert "from 20 samples to public images" in told
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["accuracy"] is None
    assert record["rounds"][0]["accuracy"] is None
    quality = record["sample_quality"]
    assert quality["samples"] == 20
    assert 0 < quality["floor"] < quality["frechet"]  # one step makes no digits
    assert run(command) == 0  # nothing is left to do
    assert json.loads((tmp_path / "training.json").read_text()) == record


def test_training_begins_with_given_weights(tmp_path: Path) -> None:
    train(SMALL, out=tmp_path / "first")
    weights = str(tmp_path / "first" / "model.safetensors")
    trained = federation(with_(weights=weights)).initial.params
    assert all(torch.equal(v, trained[k]) for k, v in state_in(tmp_path / "first").items())


def test_networks_and_mechanisms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInput, match="--model lenet is a classifier and denoising trains"):
        with_(model="lenet")
    with pytest.raises(InvalidInput, match="is a denoiser: expected --mechanism denoising"):
        with_(mechanism="fedsgd")
    with pytest.raises(InvalidInput, match="no settings of a client"):
        with_(mechanism="denoising:carried=true")
    with pytest.raises(InvalidInput, match="--samples 1"):
        with_(samples=1)


def test_a_recorded_update_tells_the_client_s_time_and_is_its_gradient(tmp_path: Path) -> None:
    """At batch size 1 the first time layer's gradient is δ wᵀ, w the sinusoids of t.

    Of 50 times the one whose sinusoids lie along it is the client's. The same update is what the
    mechanism predicts from the client's image, noise and time, and from no other image.
    """
    settings = with_(batch_size=1, rounds=1)
    train(settings, out=tmp_path / "out", record_to=tmp_path / "seen")
    made = federation(settings)
    core = made.mechanism
    assert isinstance(core, Denoising)
    entries = read_recording(tmp_path / "seen")
    assert len(entries) == 3
    for entry in entries:
        client = int(entry.node) - FIRST_NODE
        state, update, _ = read_exchange(tmp_path / "seen", entry, made.initial.model)
        batch = made.batch(client, 1)
        _, noise, times = plain(settings, client, 1)
        assert told(made.initial.model, update["time_embedding.linear_1.weight"]) == int(times)
        known = dataclasses.replace(core, draws=Draws(times, noise))
        want = known.mean(state, batch).values
        for name, value in update.items():
            torch.testing.assert_close(value, want[name], atol=1e-6, rtol=1e-4)
        other = known.mean(state, made.batch((client + 1) % 3, 1)).values
        assert not torch.allclose(update["last.weight"], other["last.weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("withheld", "tells"), [("time_embedding", True), ("time_embedding/time", False)]
)
def test_blocks_tell_the_time_unless_they_are_kept_at_home_as_well(
    withheld: str, tells: bool
) -> None:
    """The gradient of a block's time layer is δ eᵀ, e the embedding of t: 8 of 8 times, or none."""
    made = federation(with_(defense=f"partial-sharing:withheld={withheld}", batch_size=1))
    network = UNet(1, width=16, multipliers=(1,))
    network.load_state_dict(dict(made.initial.params))
    with torch.no_grad():
        embedded = normalize(silu(network.time_embedding(torch.arange(50))), dim=1)
    for server_round in range(1, 9):
        batch = made.batch(0, server_round)
        client = made.client_of(0, server_round, batch)
        update = client.sample(made.initial, batch, generator=torch.Generator().manual_seed(0))
        gradient = update.values["middle.time.weight"]
        if not tells:
            assert not gradient.any()
            continue
        found = (embedded @ torch.linalg.svd(gradient).Vh[0]).abs().argmax()
        core = undefended(client)
        assert int(found) == int(core.draws.times)  # type: ignore[attr-defined]


def told(network: nn.Module, gradient: Tensor) -> int:
    """The time whose sinusoids span a gradient (width, sinusoids) of rank 1."""
    embedding = network.time_embedding
    waves: list[Tensor] = []
    hook = embedding.linear_1.register_forward_pre_hook(lambda _, given: waves.append(given[0]))  # type: ignore[union-attr,operator]
    with torch.no_grad():
        embedding(torch.arange(50))  # type: ignore[operator]
    hook.remove()
    direction = torch.linalg.svd(gradient).Vh[0]
    along = waves[0] / waves[0].norm(dim=1, keepdim=True)
    return int((along @ direction).abs().argmax())
