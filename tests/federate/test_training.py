"""Federated training: what it computes, what it survives, and where it goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from safetensors.torch import load_file
from torch import Tensor

from gradleak import models
from gradleak.defenses import build
from gradleak.errors import InvalidInput
from gradleak.federate import training
from gradleak.federate.client import MEMORY, client_app
from gradleak.federate.federation import federation
from gradleak.federate.gossip import unmixed
from gradleak.federate.grid import InProcessGrid
from gradleak.federate.records import arrays_of, size, state_of, stored, tensors_of
from gradleak.federate.server import Stopped
from gradleak.federate.settings import TrainSettings
from gradleak.federate.topology import metropolis
from gradleak.federate.training import train
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Batch

SMALL = TrainSettings(
    data="digits", model="mlp", clients=4, rounds=4, batch_size=8, test_examples=100, draws=1
)


def weights(directory: Path) -> dict[str, Tensor]:
    made = federation(SMALL)
    return dict(models.load_weights(directory / "model.safetensors", made.initial.model).params)


def with_(**changes: Any) -> TrainSettings:
    return dataclasses.replace(SMALL, **changes)


def with_mods(monkeypatch: pytest.MonkeyPatch, *mods: Mod) -> None:
    """Let every client of `train` have these modifiers."""
    monkeypatch.setattr(
        training, "client_app", lambda settings: client_app(settings, mods=list(mods))
    )


def test_records_hold_what_flower_would_write_and_read() -> None:
    values = {"a": torch.randn(3, 2), "b": torch.tensor(4), "c": torch.zeros(0, 2).double()}
    plain = ArrayRecord(dict(values))
    ours = arrays_of(values)
    for name, value in values.items():
        assert ours[name].data == plain[name].data
        assert torch.equal(torch.from_numpy(ours[name].numpy()), value)
        assert torch.equal(tensors_of(plain)[name], value)
    across = arrays_of({"a": values["a"].T})
    assert torch.equal(tensors_of(across)["a"], values["a"].T)
    config = ConfigRecord({"n": 1, "word": "abc", "raw": b"ab", "on": True, "many": [1.5, 2.0]})
    assert size(RecordDict({"config": config})) == config.count_bytes()
    assert size(RecordDict({"config": ConfigRecord({"empty": b"", "none": []})})) == 9
    assert size(RecordDict({"arrays": ours})) == sum(len(a.data) + 1 for a in ours.values())


def test_a_round_is_a_step_along_the_mean_gradient(tmp_path: Path) -> None:
    train(with_(rounds=1, learning_rate=0.3), out=tmp_path)
    made = federation(with_(rounds=1, learning_rate=0.3))
    batches = [made.batch(i, 1) for i in range(4)]
    together = Batch(torch.cat([b.inputs for b in batches]), torch.cat([b.labels for b in batches]))
    gradient = FedSGD().mean(made.initial, together).values
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, made.initial.params[name] - 0.3 * gradient[name])


def test_a_round_of_local_training_is_the_mean_change_by_examples(tmp_path: Path) -> None:
    mechanism = "fedavg:learning_rate=0.1,minibatch_size=5,epochs=2"
    settings = with_(rounds=1, mechanism=mechanism, batch_size=0, partition="dirichlet:0.3")
    train(settings, out=tmp_path)
    made = federation(settings)
    sizes = [len(part) for part in made.parts]
    assert len(set(sizes)) > 1
    client = FedAvg(learning_rate=0.1, minibatch_size=5, epochs=2)
    deltas = [client.mean(made.initial, made.batch(i, 1)).values for i in range(4)]
    for name, value in weights(tmp_path).items():
        mean = sum(n / sum(sizes) * d[name] for n, d in zip(sizes, deltas, strict=True))
        torch.testing.assert_close(value, made.initial.params[name] + mean, atol=1e-6, rtol=1e-5)


def test_the_record_says_what_happened(tmp_path: Path) -> None:
    told: list[tuple[float, int, int]] = []

    class Watching:
        def running(self, done: float, *, total: int, resumed: int) -> None:
            told.append((done, total, resumed))

    settings = with_(schedule="step:every=2,factor=0.5", fraction=0.5)
    trained = train(settings, out=tmp_path, watcher=Watching())
    assert trained == json.loads((tmp_path / "training.json").read_text())
    assert (trained["schema_version"], trained["status"], trained["reason"]) == (1, "done", None)
    assert trained["settings"]["defense"] == "none"
    rounds = trained["rounds"]
    assert [r["round"] for r in rounds] == [1, 2, 3, 4]
    assert [r["learning_rate"] for r in rounds] == [0.1, 0.1, 0.05, 0.05]
    assert {r["clients"] for r in rounds} == {2}
    assert told == [(n, 4, 0) for n in (1, 2, 3, 4)]
    parameters = sum(v.numel() for v in federation(settings).initial.params.values())
    for entry in rounds:
        # Two clients; NumPy's headers and metrics besides four bytes per parameter.
        assert 0 < entry["bytes_up"] - 8 * parameters < 2000
        assert 0 < entry["bytes_down"] - 8 * parameters < 2000
        assert 0 < entry["client_seconds"] < entry["seconds"]
    assert trained["test_examples"] == 898 - 100
    assert train(settings, out=tmp_path) == trained  # nothing is left to do


def test_training_learns(tmp_path: Path) -> None:
    """A guess names 10 % of 798 digits; binomial P(> 15 % by chance) < 1e-5."""
    trained = train(with_(rounds=40, learning_rate=0.5), out=tmp_path)
    assert trained["accuracy"] > 0.5
    assert trained["rounds"][-1]["loss"] < trained["rounds"][0]["loss"]


@pytest.mark.parametrize("topology", ["star", "gossip:graph=ring"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: str
) -> None:
    settings = with_(topology=topology, defense="gaussian-noise:std=0.01")
    train(settings, out=tmp_path / "whole")

    def stop(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if (message.content["config"]["server-round"], context.node_config["partition-id"]) == (
            3,
            2,
        ):
            raise KeyboardInterrupt
        return call_next(message, context)

    with monkeypatch.context() as patch:
        with_mods(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings, out=tmp_path / "cut")
    halfway = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert (halfway["status"], len(halfway["rounds"])) == ("interrupted", 2)
    trained = train(settings, out=tmp_path / "cut")
    assert trained["status"] == "done"
    assert len(trained["rounds"]) == 4
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_round_that_is_on_record_but_not_in_the_checkpoint_is_played_again(
    tmp_path: Path,
) -> None:
    """What a kill leaves between the two files."""
    train(SMALL, out=tmp_path / "whole")
    train(with_(), out=tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint.safetensors").unlink()
    record = tmp_path / "cut" / "training.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps(found | {"status": "interrupted"}))
    train(SMALL, out=tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_other_settings_do_not_go_on_with_a_training(tmp_path: Path) -> None:
    train(SMALL, out=tmp_path)
    with pytest.raises(InvalidInput, match="another rounds, seed"):
        train(with_(rounds=5, seed=1), out=tmp_path)


def raising(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    raise RuntimeError("a mod\nraises")


def dying(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    raise SystemExit(1)


def not_a_number(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    reply = call_next(message, context)
    values = tensors_of(reply.content["arrays"])
    first = next(iter(values))
    reply.content["arrays"] = arrays_of(values | {first: values[first] * float("nan")})
    return reply


def misshapen(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    reply = call_next(message, context)
    values = tensors_of(reply.content["arrays"])
    first = next(iter(values))
    reply.content["arrays"] = arrays_of(values | {first: values[first][:1]})
    return reply


def empty(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    return Message(RecordDict(), reply_to=message)


def weightless(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    reply = call_next(message, context)
    reply.content["metrics"] = MetricRecord({"num-examples": 0})
    return reply


FAULTS: dict[str, tuple[Mod, str]] = {
    "raising": (raising, "RuntimeError: a mod raises"),
    "dying": (dying, "SystemExit: 1"),
    "nan": (not_a_number, "non-finite"),
    "shape": (misshapen, "expected ("),
    "empty": (empty, "reply without 'arrays'"),
    "weightless": (weightless, "num-examples=0.0: expected a positive number"),
}


def only_client_2(fault: Mod) -> Mod:
    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        faulty = context.node_config["partition-id"] == 2
        return fault(message, context, call_next) if faulty else call_next(message, context)

    return mod


@pytest.mark.parametrize("name", FAULTS)
def test_a_client_of_no_use_is_named_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fault, words = FAULTS[name]
    with_mods(monkeypatch, only_client_2(fault))
    trained = train(with_(rounds=2), out=tmp_path)
    assert trained["status"] == "done"
    for entry in trained["rounds"]:
        ((failed),) = entry["failed"]
        assert failed["client"] == 2
        assert words in failed["reason"]
    assert all(bool(v.isfinite().all()) for v in weights(tmp_path).values())


def test_too_few_clients_stop_training_and_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_(min_clients=3)
    train(settings, out=tmp_path / "whole")

    def late(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        broken = context.node_config["partition-id"] in (0, 3)
        if broken and message.content["config"]["server-round"] == 3:
            raise RuntimeError("planted")
        return call_next(message, context)

    with monkeypatch.context() as patch:
        with_mods(patch, late)
        with pytest.raises(Stopped, match="2 of 4 clients sent an update of use"):
            train(settings, out=tmp_path / "cut")
    found = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert found["status"] == "stopped"
    assert "expected at least 3; client 0: RuntimeError: planted" in found["reason"]
    assert len(found["rounds"]) == 2
    assert train(settings, out=tmp_path / "cut")["reason"] is None
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_clients_that_never_answer_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = InProcessGrid.pull_messages
    monkeypatch.setattr(
        InProcessGrid,
        "pull_messages",
        lambda self, ids: [m for m in pull(self, ids) if m.metadata.src_node_id != 3],
    )
    trained = train(with_(rounds=1), out=tmp_path)
    assert trained["rounds"][0]["failed"] == [{"client": 1, "reason": "no answer"}]


def huge(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    reply = call_next(message, context)
    values = tensors_of(reply.content["arrays"])
    reply.content["arrays"] = arrays_of({k: v + 1e38 for k, v in values.items()})
    return reply


def test_a_state_that_is_no_longer_finite_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_mods(monkeypatch, huge)
    with pytest.raises(Stopped, match="smaller --learning-rate"):
        train(with_(learning_rate=10.0), out=tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_what_a_protection_remembers_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        before = context.state.get(MEMORY, arrays_of({"n": torch.zeros(1)}))
        context.state[MEMORY] = arrays_of({"n": tensors_of(before)["n"] + 1})
        if message.content["config"]["server-round"] == 3 and not again:
            raise KeyboardInterrupt
        return call_next(message, context)

    again = False
    with_mods(monkeypatch, counting)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, out=tmp_path)
    again = True
    train(SMALL, out=tmp_path)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert [float(kept[f"memory/{i}/n"]) for i in range(4)] == [4, 4, 4, 4]


def test_protections_draw_from_the_operating_system_unless_told(tmp_path: Path) -> None:
    settings = with_(defense="gaussian-noise:std=0.1", rounds=1)
    for name in ("a", "b"):
        train(settings, out=tmp_path / name)
        train(
            with_(defense="gaussian-noise:std=0.1", rounds=1, draws=None),
            out=tmp_path / f"os-{name}",
        )
    first = next(iter(weights(tmp_path / "a")))
    assert torch.equal(weights(tmp_path / "a")[first], weights(tmp_path / "b")[first])
    assert not torch.equal(weights(tmp_path / "os-a")[first], weights(tmp_path / "os-b")[first])


def test_the_wire_carries_the_protected_update(tmp_path: Path) -> None:
    settings = with_(defense="top-k:fraction=0.1")
    made = federation(settings)
    grid = InProcessGrid(client_app(settings), nodes=4)
    config = ConfigRecord({"server-round": 1, "learning-rate": 0.1, "node": 0})
    content = RecordDict({"arrays": arrays_of(stored(made.initial)), "config": config})
    (reply,) = grid.send_and_receive([Message(content, 2, "train")])
    values = tensors_of(reply.content["arrays"])
    want = build("top-k:fraction=0.1")(FedSGD()).mean(made.initial, made.batch(0, 1)).values
    assert values.keys() == want.keys()
    for name in want:
        assert torch.equal(values[name], want[name])


def test_precode_trains_and_needs_its_network(tmp_path: Path) -> None:
    trained = train(with_(model="mlp+precode", defense="precode", rounds=2), out=tmp_path)
    assert trained["status"] == "done"
    with pytest.raises(InvalidInput, match="NAME\\+precode"):
        federation(with_(defense="precode"))


def test_deployed_apps_read_their_settings_from_the_run(tmp_path: Path) -> None:
    train(SMALL, out=tmp_path / "here")
    config = SMALL.as_config()
    grid = InProcessGrid(client_app(), nodes=4, run_config=config)
    config["out"] = str(tmp_path / "there")
    training.app(grid, Context(1, 1, {}, RecordDict(), config))
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there")
    assert all(torch.equal(here[k], there[k]) for k in here)


def test_batch_normalisation_by_the_batch_is_tested_as_it_is_trained(tmp_path: Path) -> None:
    """With running estimates that nobody trains, accuracy stays near a guess."""
    settings = with_(
        model="convnet-bn", mechanism="fedsgd:batch_norm=train", rounds=8, learning_rate=0.1
    )
    trained = train(settings, out=tmp_path)
    assert trained["rounds"][-1]["loss"] < trained["rounds"][0]["loss"]


@pytest.mark.parametrize("mechanism", ["fedsgd", "fedavg:learning_rate=0.1"])
def test_gossip_mixes_and_steps_and_the_attacker_unmixes(tmp_path: Path, mechanism: str) -> None:
    """Of a complete graph the attacker sees all; of a ring it does in the first round."""
    for graph, exact in (("complete", (1, 2)), ("ring", (1,))):
        settings = with_(topology=f"gossip:graph={graph}", mechanism=mechanism, rounds=2, clients=5)
        made = federation(settings)
        states = dict.fromkeys(range(5), made.initial)
        nodes = [made.initial] * 5
        for number in (1, 2):
            after = []
            for i in range(5):
                update = made.mechanism.mean(nodes[i], made.batch(i, number))
                mean = {
                    k: sum(w * nodes[j].params[k] for j, w in metropolis(made.edges, i).items())
                    for k in made.initial.params
                }
                sign = -0.1 if update.kind == "gradient" else 1.0
                values = {k: v + sign * update.values[k] for k, v in mean.items()}
                after.append(state_of({**made.initial.buffers, **values}, made.initial))
                if i in made.edges[0]:
                    seen = {j: nodes[j] for j in (0, *made.edges[0])}
                    guess = unmixed(made, seen, after[i], victim=i, rate=0.1)
                    error = max(
                        float((guess.values[k] - v).abs().max()) for k, v in update.values.items()
                    )
                    assert (error < 1e-5) == (number in exact)
            nodes = after
        directory = tmp_path / graph
        train(settings, out=directory)
        mean = {k: sum(n.params[k] for n in nodes) / 5 for k in states[0].params}
        for name, value in weights(directory).items():
            torch.testing.assert_close(value, mean[name], atol=1e-6, rtol=1e-5)


def test_gossip_reaches_agreement_and_learns(tmp_path: Path) -> None:
    """A guess names 10 % of 798 digits; binomial P(> 15 % by chance) < 1e-5."""
    settings = with_(topology="gossip:graph=ring", rounds=40, learning_rate=0.5)
    assert train(settings, out=tmp_path)["accuracy"] > 0.3
