"""Protections as client mods: what they promise in the laws they keep in anybody's Flower app."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import gradleak.federate.client_mod as module
from gradleak.defenses import DEFENSES, Sent, Soteria, build
from gradleak.errors import InvalidInput
from gradleak.federate import client_update, protect
from gradleak.federate.grid import FIRST_NODE, InProcessGrid
from gradleak.federate.records import arrays_of as written
from gradleak.federate.secrecy import secret_generator
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Batch, ModelState, Update
from tests.defenses.test_rounds import Late
from tests.laws.small import TwoTwins, batch_of, state_of

ALPHA = 1e-6
NEED_THE_BATCH = frozenset(
    ("soteria", "ats", "precode", "cvb", "mixup", "instahide", "label-smoothing", "censor")
)
"""Protections that no message can carry; any other protects one."""

Weights = dict[str, Tensor]


def weights(seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    return {
        "0.weight": torch.randn(30, 40, generator=g),
        "0.bias": torch.randn(30, generator=g),
        "1.running_mean": torch.randn(30, generator=g),
        "1.num_batches_tracked": torch.tensor(seed),
    }


def app_of(
    *mods: module.Mod, reply: Callable[[Message], Mapping[str, Tensor]] = lambda _: weights(1)
) -> ClientApp:
    """An app whose training always ends at given weights."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 7, "loss": 0.5})
        content = RecordDict({"arrays": written(reply(message)), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": written(weights(2))}), reply_to=message)

    return app


def sent(app: ClientApp, kind: str = "train", *, rounds: int = 1) -> Message:
    """The answer of one node, in the last round."""
    grid = InProcessGrid(app, nodes=1)
    for _ in range(rounds):
        content = RecordDict({"arrays": written(weights(0))})
        (answer,) = grid.send_and_receive([Message(content, FIRST_NODE, kind)])
    return answer


def arrays(message: Message) -> Weights:
    return dict(message.content["arrays"].to_torch_state_dict())


def delta(after: Weights) -> Weights:
    return {k: after[k] - weights(0)[k] for k in ("0.weight", "0.bias")}


@pytest.mark.parametrize("defense", DEFENSES)
def test_every_protection_protects_or_says_why_not(defense: str) -> None:
    if defense in NEED_THE_BATCH:
        with pytest.raises(InvalidInput, match="which a message does not carry: train by"):
            protect(defense)
        return
    mod = protect(defense)
    answer = sent(app_of(mod))
    assert not answer.has_error(), answer.error.reason
    after, clean = arrays(answer), delta(weights(1))
    assert list(after) == list(weights(1))
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(after[name], weights(1)[name])
    assert dict(answer.content["metrics"]) == {"num-examples": 7, "loss": 0.5}
    client = build(defense)(Sent(Update(clean, "delta")))
    state = ModelState(nn.Identity(), {k: weights(0)[k] for k in clean})
    got = Update(delta(after), "delta")
    if client.deterministic:
        want = client.mean(state, batch_of(1)).values
        for name, value in got.values.items():
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)
    # The protection's own test of what it claims; a mod that does nothing would fail it.
    if hasattr(client, "rule") and defense not in {"round", "quantize"}:  # blurred by adding θ
        before = client.inner.sample(state, batch_of(1), generator=torch.Generator())
        assert client.rule.doubt(before, got) is None


def test_noise_has_its_size_and_is_never_the_same() -> None:
    """n = 1230 coordinates, chi-square of the squared noise at alpha 1e-6, and of none at all."""
    runs = [delta(arrays(sent(app_of(protect("gaussian-noise:std=0.5"))))) for _ in range(2)]
    clean = delta(weights(1))
    noise = [torch.cat([(run[k] - clean[k]).flatten() for k in clean]).double() for run in runs]
    n = len(noise[0])
    assert n == 1230

    def outside(values: Tensor) -> bool:
        total = float((values / 0.5).square().sum())
        return not stats.chi2.ppf(ALPHA / 2, n) < total < stats.chi2.isf(ALPHA / 2, n)

    assert not outside(noise[0])
    assert not outside(noise[1])
    assert not outside((noise[0] - noise[1]) / math.sqrt(2))
    assert outside(noise[0] * 1.25)  # planted
    assert outside(noise[0] * 0)


def test_draws_cannot_be_replayed_from_a_seed() -> None:
    """PyTorch forgets all but 32 bits of a seed: the whole state must come from the system."""
    seeded = [torch.Generator().manual_seed(s) for s in (5, 5 + 2**32)]
    first, second = (torch.rand(8, generator=g) for g in seeded)
    assert torch.equal(first, second)
    generator = secret_generator()
    again = torch.Generator().manual_seed(generator.initial_seed())
    assert not torch.equal(torch.rand(8, generator=again), torch.rand(8, generator=generator))
    words = torch.rand(20_000, generator=secret_generator(), dtype=torch.float64)
    assert stats.kstest(words.numpy(), "uniform").pvalue > ALPHA


def test_other_messages_pass_untouched() -> None:
    answer = sent(app_of(protect("gaussian-noise:std=1")), "evaluate")
    for name, value in arrays(answer).items():
        assert torch.equal(value, weights(2)[name])


def test_a_client_remembers_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build", lambda _: Late())
    first = delta(arrays(sent(app_of(protect("late")))))
    second = delta(arrays(sent(app_of(protect("late")), rounds=2)))
    clean = delta(weights(1))
    for name, value in clean.items():
        torch.testing.assert_close(first[name], value / 2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


def _without(message: Message) -> Weights:
    return {k: v for k, v in weights(1).items() if k != "0.bias"}


def _nan(message: Message) -> Weights:
    return weights(1) | {"0.bias": torch.full((30,), math.nan)}


def _misshapen(message: Message) -> Weights:
    return weights(1) | {"0.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (_without, "missing ['0.bias']"),
        (_nan, "'0.bias' holds NaN or infinite values after training"),
        (_misshapen, "'0.bias' is (3,) in the reply: expected (30,)"),
    ],
)
def test_what_cannot_be_protected_is_never_sent(
    reply: Callable[[Message], Weights], words: str
) -> None:
    answer = sent(app_of(protect("clip:norm=1"), reply=reply))
    assert answer.has_error()
    assert words in answer.error.reason
    assert answer.error.reason.startswith("protect('clip:norm=1'): ")


def test_errors_pass_and_other_records_are_refused() -> None:
    mod = protect("clip:norm=1")

    def broken(message: Message, context: Context) -> Message:
        return Message(Error(2, "the app's own"), reply_to=message)

    message = Message(RecordDict({"arrays": written(weights(0))}), FIRST_NODE, "train")
    InProcessGrid(app_of(), nodes=1)  # who sends
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(1, FIRST_NODE, {}, RecordDict(), {})
    assert mod(message, context, broken).error.reason == "the app's own"
    message.content["more"] = ArrayRecord()
    answer = mod(message, context, broken)
    assert "2 ArrayRecords: expected one" in answer.error.reason


@pytest.mark.parametrize("defense", ["clpi", "clip:nrom=1", "clip:norm=-1", "clip:scope=example"])
def test_slips_are_told_when_the_app_starts(defense: str) -> None:
    with pytest.raises(InvalidInput):
        protect(defense)


def test_gradients_are_protected_as_they_are() -> None:
    after = arrays(sent(app_of(protect("clip:norm=1", kind="gradient"))))
    total = sum(float(after[k].square().sum()) for k in ("0.weight", "0.bias"))
    assert total == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("core", [FedAvg(learning_rate=0.1), FedSGD()])
def test_inside_the_training_loop(core: FedAvg | FedSGD) -> None:
    """Soteria around one step; the same as what the mechanism itself sends."""
    state, batch = state_of(TwoTwins), batch_of(2)
    model = TwoTwins().to(next(iter(state.params.values())).dtype)
    model.load_state_dict({**state.params, **state.buffers})
    client = Soteria()(core)
    rate = 0.1 if core.kind == "gradient" else None
    client_update(model, batch, client, learning_rate=rate)
    want = client.sample(state, batch, generator=torch.Generator()).values
    for name, parameter in model.named_parameters():
        moved = want[name] * (-rate if rate else 1)
        torch.testing.assert_close(parameter.detach(), state.params[name] + moved)


def test_a_learning_rate_belongs_to_gradients() -> None:
    batch = Batch(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    for mechanism, rate in ((FedSGD(), None), (FedAvg(), 0.1)):
        with pytest.raises(InvalidInput, match="learning_rate"):
            client_update(nn.Linear(1, 2), batch, mechanism, learning_rate=rate)
