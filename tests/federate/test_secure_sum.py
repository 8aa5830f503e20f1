"""Secure aggregation over Flower's messages: what it computes, survives and refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("cryptography")

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from gradleak import crypto, models
from gradleak.crypto.protocol import HELPER
from gradleak.errors import InvalidInput
from gradleak.federate import client, protect, record, secure_sum, training
from gradleak.federate.agreement import LETTER, Agreement, fixed_point
from gradleak.federate.client import client_app
from gradleak.federate.federation import federation
from gradleak.federate.grid import FIRST_NODE, InProcessGrid
from gradleak.federate.records import arrays_of, tensors_of
from gradleak.federate.secure_sum import CONTENT, PAST, SESSION, VECTOR, SecureSum
from gradleak.federate.server import Stopped
from gradleak.federate.settings import TrainSettings
from gradleak.federate.training import train
from gradleak.run.recordings import read_recording
from tests.crypto.plain import Plain

SMALL = TrainSettings(
    data="digits",
    model="lenet-tiny",
    clients=5,
    rounds=1,
    batch_size=8,
    test_examples=50,
    draws=1,
)
SPECS = {
    "paillier": "paillier:bits=512,unsafe_small_keys=true",
    "secagg-plus": "secagg-plus:neighbours=4,threshold=3,dropouts=0.4",
}
"""Settings under which five small clients may lose two."""

PROTOCOLS = [SPECS.get(n, n) for n in crypto.aggregations() if n != "distributed-dp"]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    known = crypto.aggregations()
    monkeypatch.setattr(crypto, "aggregations", lambda: known | {"plain": Plain})


def with_(**changes: Any) -> TrainSettings:
    return dataclasses.replace(SMALL, **changes)


def weights(directory: Path) -> dict[str, Tensor]:
    network = federation(SMALL).initial.model
    return dict(models.load_weights(directory / "model.safetensors", network).params)


def assert_same(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=2e-6, rtol=1e-5)


def with_mods(monkeypatch: pytest.MonkeyPatch, *mods: Mod) -> None:
    """Let every client of `train` have these modifiers, outside the protocol."""
    monkeypatch.setattr(
        training, "client_app", lambda settings: client_app(settings, mods=list(mods))
    )


def at_step(fault: Mod, step: int, clients: tuple[int, ...], *, attempts: int = 99) -> Mod:
    """A fault of some clients at a step of their first sessions."""
    seen: Counter[int] = Counter()
    sessions: Counter[int] = Counter()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        place = int(context.node_config["partition-id"])
        told = message.content.config_records[LETTER]
        if "nonce" in told:
            seen[place] = 0
            sessions[place] += 1
        seen[place] += "request" in told
        faulty = place in clients and sessions[place] <= attempts and seen[place] == step + 1
        return (fault if faulty else passing)(message, context, call_next)

    return mod


def passing(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    return call_next(message, context)


def dying(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    raise SystemExit(1)


def garbling(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    reply = call_next(message, context)
    raw = bytes(reply.content[LETTER]["reply"])
    reply.content[LETTER] = ConfigRecord({"reply": raw[:-1]})
    return reply


def mute(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    call_next(message, context)
    return Message(RecordDict(), reply_to=message)


@pytest.mark.parametrize("aggregation", PROTOCOLS)
def test_the_sum_trains_the_same_model(tmp_path: Path, aggregation: str) -> None:
    """Clients of unequal sizes, gradients and local training, weighted by their examples."""
    for mechanism in ("fedsgd", "fedavg:learning_rate=0.1,minibatch_size=9"):
        settings = with_(mechanism=mechanism, batch_size=30, partition="dirichlet:0.2", rounds=2)
        name = mechanism[:6]
        train(settings, out=tmp_path / name)
        trained = train(
            dataclasses.replace(settings, aggregation=aggregation), out=tmp_path / f"{name}-sum"
        )
        assert_same(tmp_path / name, tmp_path / f"{name}-sum")
        assert [r["failed"] for r in trained["rounds"]] == [[], []]


def test_the_record_says_what_was_played(tmp_path: Path) -> None:
    (entry,) = train(with_(aggregation="secagg"), out=tmp_path)["rounds"]
    names = [step["name"] for step in entry["steps"]]
    assert names == ["advertise-keys", "share-keys", "masked-input", "unmask"]
    assert entry["bytes_up"] == sum(step["bytes_up"] for step in entry["steps"])
    assert entry["bytes_down"] == sum(step["bytes_down"] for step in entry["steps"])
    parameters = sum(v.numel() for v in federation(SMALL).initial.params.values())
    assert entry["bytes_up"] > 5 * 4 * parameters
    assert 0 < entry["aggregation_seconds"] < entry["seconds"]
    assert entry["client_seconds"] is None  # nothing of single clients


@pytest.mark.parametrize("fault", [dying, garbling, mute])
@pytest.mark.parametrize("step", range(4))
def test_two_of_five_lost_at_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, fault: Mod
) -> None:
    """The sum is over those whose vectors arrived, whatever happens to them after."""
    with_mods(monkeypatch, at_step(fault, step, (1, 4)))
    (entry,) = train(with_(aggregation="secagg"), out=tmp_path / "sum")["rounds"]
    lost = entry["steps"][step]["rejected" if fault is garbling else "dropped"]
    assert [each["client"] for each in lost] == [1, 4]
    words = {dying: "SystemExit", garbling: "truncated", mute: "no step of the protocol"}[fault]
    assert all(words in each["reason"] for each in lost)
    outside = [each["client"] for each in entry["failed"]]
    assert outside == ([1, 4] if step <= 2 else [])
    monkeypatch.undo()

    def absent(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if context.node_config["partition-id"] in outside:
            raise RuntimeError("absent")
        return call_next(message, context)

    with_mods(monkeypatch, absent)
    train(SMALL, out=tmp_path / "each")
    assert_same(tmp_path / "each", tmp_path / "sum")


@pytest.mark.parametrize("aggregation", [p for p in PROTOCOLS if p != "secagg"])
def test_one_of_five_lost_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    with_mods(monkeypatch, at_step(dying, 0, (3,)))
    (entry,) = train(with_(aggregation=aggregation), out=tmp_path / "sum")["rounds"]
    assert [each["client"] for each in entry["failed"]] == [3]


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often every client trained in every round."""
    calls: Counter[tuple[int, int]] = Counter()
    original = client._round

    def counting(made: Any, place: int, state: Any, config: Any, context: Any) -> Any:
        calls[place, int(config["server-round"])] += 1
        return original(made, place, state, config, context)

    monkeypatch.setattr(client, "_round", counting)
    return calls


@pytest.mark.parametrize("step", range(4))
def test_a_session_with_too_few_is_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """No client trains twice, also where its vector was sent in vain."""
    train(SMALL, out=tmp_path / "each")
    calls = counted(monkeypatch)
    with_mods(monkeypatch, at_step(dying, step, (0, 1, 4), attempts=1))
    (entry,) = train(with_(aggregation="secagg"), out=tmp_path / "sum")["rounds"]
    assert [s["attempt"] for s in entry["steps"]] == [1] * (step + 1) + [2] * 4
    assert entry["failed"] == []
    assert calls == {(i, 1): 1 for i in range(5)}
    assert_same(tmp_path / "each", tmp_path / "sum")


def test_training_stops_where_no_session_ends_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_(aggregation="secagg", rounds=2, defense="gaussian-noise:std=0.01")
    train(dataclasses.replace(settings, aggregation="none"), out=tmp_path / "each")

    def late(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.content.config_records.get("config", {}).get("server-round") == 2:
            raise RuntimeError("planted")
        return call_next(message, context)

    with monkeypatch.context() as patch:
        with_mods(patch, late)
        with pytest.raises(Stopped, match="no sum in 3 attempts"):
            train(settings, out=tmp_path / "cut")
    found = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert (found["status"], len(found["rounds"])) == ("stopped", 1)
    assert "client 0: advertise-keys: RuntimeError: planted" in found["reason"]
    assert train(settings, out=tmp_path / "cut")["status"] == "done"
    assert_same(tmp_path / "each", tmp_path / "cut")


def test_who_is_slow_drops_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = InProcessGrid.pull_messages
    late = FIRST_NODE + 1
    monkeypatch.setattr(
        InProcessGrid,
        "pull_messages",
        lambda self, ids: [m for m in pull(self, ids) if m.metadata.src_node_id != late],
    )
    (entry,) = train(with_(aggregation="secagg"), out=tmp_path)["rounds"]
    assert entry["failed"] == [{"client": 1, "reason": "advertise-keys: no answer"}]


def test_helping_servers_are_nodes_of_their_own(tmp_path: Path) -> None:
    settings = with_(aggregation="additive-mpc:servers=3")
    made = federation(settings)
    grid = InProcessGrid(client_app(settings), nodes=7)
    assert made.helpers == 2
    assert made.secure_sum is not None
    seen = made.secure_sum.at_server(grid)
    assert list(seen.get_node_ids()) == list(grid.get_node_ids())[:5]
    (entry,) = train(settings, out=tmp_path)["rounds"]
    assert entry["clients"] == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topology": "gossip:graph=ring"}, "contradicts --topology"),
        ({"aggregation": "secag"}, "did you mean 'secagg'"),
        ({"clients": 1}, "a sum over 1 clients: expected at least 2"),
        ({"aggregation_clip": -1.0}, "clip=-1.0"),
        ({"aggregation_bits": 60}, "fraction=56"),
        ({"aggregation": "secagg:threshold=9"}, "threshold"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        federation(with_(**{"aggregation": "secagg", **changes}))


# What a client lets a server do.


AGREED = SecureSum(Agreement(Plain(), fixed_point(8.0, 24), 1000, 2, 2, "delta"))
STEP = 2**-20 * 1000 / 6
"""Most that a mean is off: a step of the encoding over the weight of six examples of a thousand."""

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(4)}


def trained(message: Message, context: Context) -> Message:
    """Add a step of one to every weight, from six examples; with a loss that nobody must see."""
    context.state["calls"] = MetricRecord(
        {"n": 1 + context.state.metric_records.get("calls", {"n": 0})["n"]}
    )
    values = tensors_of(message.content["arrays"])
    metrics = MetricRecord({"num-examples": 6, "loss": 0.7})
    content = {"arrays": arrays_of(values | {"weight": values["weight"] + 1}), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


def app_of(*mods: Mod) -> ClientApp:
    app = ClientApp(mods=list(mods))
    app.train()(trained)
    return app


def broadcast(state: dict[str, Tensor] = STATE, **config: Any) -> RecordDict:
    content = {"arrays": arrays_of(state), "config": ConfigRecord({"server-round": 1, **config})}
    return RecordDict(content)


def asked(grid: InProcessGrid, agreed: SecureSum, content: RecordDict) -> list[Message]:
    messages = [Message(content, node, "train") for node in grid.get_node_ids()]
    return list(agreed.at_server(grid).send_and_receive(messages))


class Tapped(InProcessGrid):
    """A grid that shows what goes over it, and lets a test change what is sent."""

    tap: Callable[[Message], None] = staticmethod(lambda _: None)
    sent: list[Message]
    replies: list[Message]
    held: tuple[RecordDict, ...] = ()

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        sent = list(messages)
        for message in sent:
            self.tap(message)
        self.sent = [
            Message(RecordDict(dict(m.content)), m.metadata.dst_node_id, "train") for m in sent
        ]
        self.replies = list(super().send_and_receive(sent, timeout=timeout))
        self.held += (self.states[0],)
        return self.replies


def reasons(agreed: SecureSum, tap: Any) -> dict[int, str]:
    """Why clients refuse what a server makes of its first letters."""
    grid = Tapped(app_of(AGREED), nodes=3)
    grid.tap = tap or grid.tap
    server = agreed.at_server(grid)
    list(server.send_and_receive([Message(broadcast(), n, "train") for n in grid.get_node_ids()]))
    return {node: r for s in server.played.steps for node, r in s.dropped.items()}


def told(message: Message, **changes: Any) -> None:
    message.content[LETTER] = ConfigRecord({**message.content[LETTER], **changes})


def test_only_the_protocol_leaves_a_client() -> None:
    grid = Tapped(app_of(AGREED), nodes=3)
    (answer,) = asked(grid, AGREED, broadcast())
    for reply in grid.replies:
        assert set(reply.content) == {LETTER}
        assert set(reply.content[LETTER]) == {"reply"}
    values = tensors_of(answer.content["arrays"])
    assert torch.allclose(values["weight"], STATE["weight"] + 1, atol=STEP)
    assert torch.equal(values["steps"], STATE["steps"])
    assert dict(answer.content["metrics"]) == {"num-examples": 18}


def test_secrets_are_kept_between_steps_and_erased_with_the_last() -> None:
    for attempts in (1, 3):
        agreed = secure_sum("secagg", attempts=attempts)
        grid = Tapped(app_of(agreed), nodes=3)
        asked(grid, agreed, broadcast())
        held = [set(state) for state in grid.held]
        assert [SESSION in state for state in held] == [True, True, True, False]
        assert [f"{CONTENT}/arrays" in state for state in held] == [True, True, False, False]
        kept = {PAST, "calls"} | ({VECTOR} if attempts > 1 else set())
        for state in grid.states.values():
            assert set(state) == kept


def test_a_client_never_trains_in_the_clear() -> None:
    grid = InProcessGrid(app_of(AGREED), nodes=1)
    (reply,) = grid.send_and_receive([Message(broadcast(), FIRST_NODE, "train")])
    assert "asks for an update in the clear" in reply.error.reason
    assert dict(grid.states[0]) == {}


def test_protections_come_after_the_sum_or_nothing_is_sent() -> None:
    mods = [protect("clip:norm=1"), AGREED]
    grid = InProcessGrid(app_of(*mods), nodes=3)
    assert asked(grid, AGREED, broadcast()) == []
    grid = InProcessGrid(app_of(*reversed(mods)), nodes=3)
    (answer,) = asked(grid, AGREED, broadcast())
    step = tensors_of(answer.content["arrays"])["weight"] - STATE["weight"]
    assert float(step.norm()) == pytest.approx(1, abs=STEP)


@pytest.mark.parametrize(
    "weaker",
    [
        {"clip": 4.0},
        {"bits": 20},
        {"least": 3},
        {"attempts": 1},
        {"most_examples": 10},
        {"kind": "gradient"},
        {"aggregation": "secagg"},
    ],
)
def test_a_client_keeps_to_its_own_terms(weaker: dict[str, Any]) -> None:
    other = secure_sum(**({"aggregation": "plain", "attempts": 2} | weaker))
    found = reasons(other, None)
    assert set(found) == set(range(FIRST_NODE, FIRST_NODE + 3))
    assert all("the server's terms are" in reason for reason in found.values())


def test_a_client_refuses_a_threshold_below_its_own() -> None:
    """Of protocols, too, the parameters are its own."""
    agreed, weaker = secure_sum("secagg:threshold=3"), secure_sum("secagg:threshold=2")
    grid = InProcessGrid(app_of(agreed), nodes=3)
    assert asked(grid, weaker, broadcast()) == []
    assert len(asked(grid, agreed, broadcast())) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients": [0]}, "session of 1 clients"),
        ({"clients": [5, 6]}, "this one among them"),
        ({"number": HELPER}, "this one among them"),
        ({"nonce": b"x"}, "other-session"),
        ({"clients": [0, 1, 2, 3]}, "other-session"),
        ({"clients": "all"}, "clients is 'all': expected list"),
        ({"request": 5}, "request is 5: expected bytes"),
        ({"request": b""}, "truncated"),
    ],
)
def test_a_client_refuses_other_members_and_nonsense(changes: Any, words: str) -> None:
    found = reasons(AGREED, lambda m: told(m, **changes))
    assert all(words in reason for reason in found.values())
    assert len(found) >= 3


def test_who_is_sent_other_parameters_is_in_another_session() -> None:
    """No sum holds the update of a client that was sent a model of its own."""

    def tap(message: Message) -> None:
        if message.metadata.dst_node_id == FIRST_NODE:
            planted = {"weight": STATE["weight"] * 2, "steps": STATE["steps"]}
            message.content["arrays"] = arrays_of(planted)

    assert "other-session" in reasons(AGREED, tap)[FIRST_NODE]

    def other_config(message: Message) -> None:
        if message.metadata.dst_node_id == FIRST_NODE:
            message.content["config"] = ConfigRecord({"server-round": 1, "learning-rate": 9.0})

    assert "other-session" in reasons(AGREED, other_config)[FIRST_NODE]


def test_a_session_is_never_played_twice_nor_a_step_out_of_one() -> None:
    grid = Tapped(app_of(AGREED), nodes=3)
    asked(grid, AGREED, broadcast())
    again = grid.sent
    for reply in InProcessGrid.send_and_receive(grid, again):
        assert "took part in this session" in reply.error.reason
    for message in again:
        told_ = {"request": message.content[LETTER]["request"]}
        message.content = RecordDict({LETTER: ConfigRecord(told_)})
    for reply in InProcessGrid.send_and_receive(grid, again):
        assert "a step of no session" in reply.error.reason


def test_an_update_is_in_few_sums_and_trained_once() -> None:
    """Else a server that plays on with fewer and fewer clients learns each of them."""
    grid = InProcessGrid(app_of(AGREED), nodes=3)
    for _ in range(2):
        assert len(asked(grid, AGREED, broadcast())) == 1
    assert asked(grid, AGREED, broadcast()) == []
    assert all(state["calls"]["n"] == 1 for state in grid.states.values())
    assert len(asked(grid, AGREED, broadcast(**{"server-round": 2}))) == 1
    assert all(state["calls"]["n"] == 2 for state in grid.states.values())


def test_one_content_for_all() -> None:
    grid = InProcessGrid(app_of(AGREED), nodes=2)
    contents = [broadcast(), broadcast(rate=1.0)]
    messages = [Message(c, n, "train") for c, n in zip(contents, grid.get_node_ids(), strict=True)]
    with pytest.raises(InvalidInput, match="one content"):
        AGREED.at_server(grid).send_and_receive(messages)
    with pytest.raises(InvalidInput, match="send_and_receive"):
        AGREED.at_server(grid).push_messages(messages)


# Anybody's app.


def test_an_ordinary_strategy_gets_the_mean_and_a_recorder_the_sum(tmp_path: Path) -> None:
    initial = arrays_of(STATE)
    found = {}
    for name, mods in (("each", []), ("sum", [AGREED])):
        grid: Any = InProcessGrid(app_of(record(tmp_path / "client"), *mods), nodes=4)
        strategy = record(tmp_path / name).at_server(FedAvg(fraction_evaluate=0))
        grid = AGREED.at_server(grid) if mods else grid
        found[name] = tensors_of(strategy.start(grid, initial, num_rounds=2).arrays)
    assert torch.equal(found["each"]["weight"], STATE["weight"] + 2)
    assert torch.allclose(found["sum"]["weight"], found["each"]["weight"], atol=2 * STEP)
    each, summed = read_recording(tmp_path / "each"), read_recording(tmp_path / "sum")
    assert [(e.view, e.clients) for e in each] == [("client", 1)] * 8
    assert [(e.view, e.clients, e.num_examples) for e in summed] == [("aggregate", 4, 24)] * 2
    assert len(read_recording(tmp_path / "client")) == 8  # those of the app without a sum


def test_a_round_without_a_sum_is_skipped_by_an_ordinary_strategy() -> None:
    grid = AGREED.at_server(InProcessGrid(app_of(dying), nodes=3))
    result = FedAvg(fraction_evaluate=0).start(grid, arrays_of(STATE), num_rounds=1)
    assert result.arrays is None or "weight" not in result.arrays
    assert grid.played.attempts == 2
    assert grid.played.reason == "no client answered: expected at least one"


# Vectors.


def test_a_mean_is_what_is_summed() -> None:
    agreed = Agreement(Plain(), fixed_point(2.0, 20), 100, 2, 1, "delta")
    assert (agreed.encoding.clip, agreed.encoding.fraction) == (2.0, 18)
    draw = torch.Generator().manual_seed(1)
    before = {"w": torch.randn(4, 3, generator=draw), "n": torch.tensor(3)}
    after = [before | {"w": before["w"] + torch.randn(4, 3, generator=draw)} for _ in range(3)]
    sizes = [7, 40, 250]
    vectors = [agreed.vector(before, a, examples=n) for a, n in zip(after, sizes, strict=True)]
    total = crypto.Total(sum(vectors), (0, 1, 2))
    mean, examples = agreed.mean(total, before)
    counted = [7, 40, 100]
    assert examples == sum(counted)
    want = before["w"].double() + sum(
        n * (a["w"] - before["w"]).double().clamp(-2, 2)
        for n, a in zip(counted, after, strict=True)
    ) / sum(counted)
    torch.testing.assert_close(mean["w"].double(), want, atol=1e-5, rtol=0)
    assert all(abs(v).max() <= 2 for v in vectors)
    weight = vectors[0][-1] * 2**18
    assert weight == round(weight)  # exact in the encoding
    with pytest.raises(InvalidInput, match="not one of weights"):
        agreed.mean(crypto.Total(-sum(vectors), (0, 1, 2)), before)


def test_what_is_clipped_is_told_to_nobody_but_the_client(caplog: pytest.LogCaptureFixture) -> None:
    agreed = Agreement(Plain(), fixed_point(0.3, 24), 10, 2, 1, "gradient")
    assert 0 <= 0.3 - agreed.encoding.clip < 2**-24
    before = {"a": torch.zeros(3), "b": torch.zeros(2)}
    vector = agreed.vector(before, {"a": torch.tensor([0.1, -5.0, 0.2])}, examples=10)
    want = torch.tensor([0.1, -0.3, 0.2, 0, 0, 0.3]).double()
    torch.testing.assert_close(torch.from_numpy(vector), want, atol=1e-7, rtol=0)
    assert "1 of 5 numbers were clipped to ±0.3" in caplog.text


@pytest.mark.parametrize(
    ("after", "examples", "words"),
    [
        ({"a": torch.zeros(2)}, 1.0, "'a' is \\(2,\\)"),
        ({"a": torch.tensor([0, 0, float("nan")])}, 1.0, "NaN"),
        ({"b": torch.zeros(3)}, 1.0, "missing \\['a'\\], unknown \\['b'\\]"),
        ({"a": torch.zeros(3)}, 0.0, "num-examples=0"),
        ({"a": torch.zeros(3)}, float("nan"), "num-examples=nan"),
    ],
)
def test_what_cannot_be_summed_is_not_sent(after: Any, examples: float, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        AGREED.agreed.vector({"a": torch.zeros(3)}, after, examples=examples)


def test_a_session_is_named_after_all_that_is_agreed() -> None:
    base: Any = {"nonce": b"n" * 16, "clients": (0, 1), "length": 3, "digest": b"d"}
    agreed = AGREED.agreed

    def name(agreed: Agreement = agreed, **changes: Any) -> bytes:
        given = base | changes
        return agreed.terms(
            given["nonce"], given["clients"], length=given["length"], digest=given["digest"]
        ).session

    names = [
        name(),
        name(nonce=b"m" * 16),
        name(clients=(0, 2)),
        name(length=4),
        name(digest=b"e"),
        name(dataclasses.replace(agreed, attempts=9)),
    ]
    assert len(set(names)) == len(names)
    assert name() == names[0]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="needs ray")
@pytest.mark.parametrize("aggregation", ["secagg-plus", "additive-mpc"])
def test_on_flowers_simulation(tmp_path: Path, aggregation: str) -> None:
    """Steps of a session reach other processes there, and helping servers have random numbers."""
    train(with_(rounds=2), out=tmp_path / "here")
    options = [
        "--data", "digits", "--model", "lenet-tiny", "--clients", "5", "--batch-size", "8",
        "--test-examples", "50", "--rounds", "2", "--engine", "flower", "--quiet",
        "--aggregation", SPECS.get(aggregation, aggregation), "--out", str(tmp_path / "ray"),
    ]  # fmt: skip
    environment = os.environ | {"RAY_worker_niceness": "0"}  # or a busy machine starves actors
    subprocess.run(
        [sys.executable, "-m", "gradleak", "train", *options], check=True, env=environment
    )
    rounds = json.loads((tmp_path / "ray" / "training.json").read_text())["rounds"]
    assert [r["failed"] for r in rounds] == [[], []]
    assert_same(tmp_path / "here", tmp_path / "ray")


def test_noise_around_a_sum_is_refused_for_weights_would_drown_in_it() -> None:
    with pytest.raises(InvalidInput, match="distributed-dp"):
        secure_sum("distributed-dp:inner=secagg")
