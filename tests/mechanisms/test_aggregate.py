"""Laws of the mean of several clients' updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gradleak.data import load
from gradleak.defenses import DEFENSES, GaussianNoise, LaplaceNoise, TopK, undefended
from gradleak.defenses.dp_sgd import DPSGD
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms import Aggregate, FedAvg, FedSGD, Vertical, summed
from gradleak.mechanisms.aggregate import joined, parts
from gradleak.models import build
from gradleak.scenario import Scenario, simulate
from gradleak.threat import ThreatModel
from gradleak.types import Batch, Fact, Mechanism, ModelState, Update
from tests.laws.small import NEEDED, Normalised, OneWeight, TwoTwins, batch_of, state_of, stream
from tests.laws.test_mechanisms import assert_mean


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def by_hand(inner: Mechanism, state: ModelState, batch: Batch, clients: int) -> Tensor:
    each = [flat(inner.mean(state, part)) for part in parts(batch, clients)]
    return torch.stack(each).sum(0) / clients


TRAINED = FedAvg(steps=2, learning_rate=0.1)


@pytest.mark.parametrize(
    ("defense", "core"),
    [*((d, FedSGD()) for d in DEFENSES), *((d, TRAINED) for d in ("gaussian-noise", "top-k"))],
)
def test_a_sum_is_the_mean_of_its_clients(defense: str, core: Mechanism) -> None:
    """Equal in law: the mean is the clients' mean, and the sample's expectation (z, ALPHA)."""
    inner, state = DEFENSES[defense]()(core), state_of(NEEDED.get(defense, TwoTwins))
    batch = batch_of(4)
    for subject in {Aggregate(inner, 2), summed(inner, 2)}:
        received = subject.sample(state, batch, generator=stream(0))
        assert torch.equal(flat(received), flat(subject.sample(state, batch, generator=stream(0))))
        assert subject.kind == inner.kind
        assert subject.deterministic == inner.deterministic
        try:
            mean = flat(subject.mean(state, batch))
        except IntractableLikelihood:
            continue
        torch.testing.assert_close(mean, by_hand(inner, state, batch, 2), rtol=1e-10, atol=1e-13)
        assert_mean(subject, state, batch, draws=2 if subject.deterministic else 40)
        predicted = flat(subject.predict(received, state, batch))
        if subject.deterministic:
            torch.testing.assert_close(predicted, flat(received), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clients", [2, 5])
def test_fedsgd_of_n_clients_is_one_batch_and_fedavg_is_not(clients: int) -> None:
    state, batch = state_of(TwoTwins), batch_of(2 * clients)
    assert summed(FedSGD(), clients) == FedSGD()
    one = flat(FedSGD().mean(state, batch))
    torch.testing.assert_close(
        flat(Aggregate(FedSGD(), clients).mean(state, batch)), one, rtol=1e-12, atol=1e-15
    )
    trained = FedAvg(steps=3, learning_rate=0.5)
    gap = flat(summed(trained, clients).mean(state, batch)) - flat(trained.mean(state, batch))
    assert gap.norm() > 1e-4 * flat(trained.mean(state, batch)).norm()


def test_clients_that_normalise_by_their_own_batches_are_not_one_batch() -> None:
    state, batch, client = state_of(Normalised), batch_of(4), FedSGD(batch_norm="train")
    subject = summed(client, 2)
    assert isinstance(subject, Aggregate)
    torch.testing.assert_close(flat(subject.mean(state, batch)), by_hand(client, state, batch, 2))
    assert not torch.allclose(flat(subject.mean(state, batch)), flat(client.mean(state, batch)))


def test_one_client_is_no_aggregation() -> None:
    client, state, batch = GaussianNoise(0.1)(FedSGD()), state_of(TwoTwins), batch_of(3)
    assert summed(client, 1) is client
    assert torch.equal(
        flat(Aggregate(client).sample(state, batch, generator=stream(3))),
        flat(client.sample(state, batch, generator=stream(3))),
    )


@pytest.mark.parametrize(
    "client",
    [
        GaussianNoise(0.1)(FedSGD()),
        GaussianNoise(0.1, "example")(FedSGD()),
        GaussianNoise(0.1)(FedAvg(steps=2)),
        DPSGD(norm=0.5, noise_multiplier=0.2)(FedSGD()),
    ],
    ids=["noise", "by example", "fedavg", "dp-sgd"],
)
def test_gaussian_noise_of_n_clients_has_an_exact_density(client: Mechanism) -> None:
    """Around the mean update, of std s/√n: also what samples show (n = 300, 6 SE)."""
    state, batch, n = state_of(OneWeight), batch_of(8, classes=2), 4
    subject = Aggregate(client, n)
    mean = float(flat(subject.mean(state, batch)))
    std = 0.1 / math.sqrt(n)
    if client == GaussianNoise(0.1, "example")(FedSGD()):
        std /= math.sqrt(2)
    for u in (mean, mean + 0.03, mean - 0.2):
        update = Update({"w": torch.tensor([u], dtype=torch.float64)}, client.kind)
        want = -(((u - mean) / std) ** 2) / 2 - math.log(std * math.sqrt(2 * math.pi))
        for known in (subject, summed(client, n)):
            assert float(known.log_prob(update, state, batch)) == pytest.approx(want)
    generator, draws = stream(0), 300
    drawn = torch.stack(
        [flat(subject.sample(state, batch, generator=generator)) for _ in range(draws)]
    )
    assert float(drawn.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * draws))


@pytest.mark.parametrize("client", [LaplaceNoise(0.1)(FedSGD()), TopK(0.1)(FedSGD()), FedSGD()])
def test_other_sums_have_no_density(client: Mechanism) -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    subject = Aggregate(client, 2)
    received = subject.sample(state, batch, generator=stream(0))
    with pytest.raises(IntractableLikelihood):
        subject.log_prob(received, state, batch)


def test_clients_draw_independently() -> None:
    """H0: E ‖ū − mean‖² = d s²/n; sharing one stream would give d s² (400 draws of 111 entries)."""
    state, batch = state_of(TwoTwins), batch_of(4)
    subject, generator = Aggregate(LaplaceNoise(0.1)(FedSGD()), 4), stream(1)
    mean = flat(subject.mean(state, batch))
    energy = [
        (flat(subject.sample(state, batch, generator=generator)) - mean).square().mean()
        for _ in range(400)
    ]
    assert float(torch.stack(energy).mean()) == pytest.approx(0.1**2 / 4, rel=0.1)


def test_a_server_unaware_of_protections_still_knows_of_the_sum() -> None:
    trained = FedAvg(steps=2)
    assert undefended(summed(GaussianNoise()(TopK()(trained)), 3)) == Aggregate(trained, 3)
    assert undefended(summed(GaussianNoise()(TopK()(FedSGD())), 3)) == FedSGD()


def test_unequal_parts_are_refused() -> None:
    with pytest.raises(InvalidInput, match="as many of each"):
        parts(batch_of(3), 2)
    assert len(joined(parts(batch_of(6), 3))) == 6


DATA = load("digits")
FACTS = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, Fact.LABELS})


def scenario(
    clients: int, colluding: int = 0, *, mechanism: Mechanism | None = None, examples: int = 0
) -> Scenario:
    network = build("lenet", DATA.spec, seed=1)
    return Scenario(
        data=DATA,
        model=ModelState.of(network),
        mechanism=mechanism or FedSGD(),
        threat=ThreatModel(view="aggregate", colluding=colluding, knows=FACTS),
        batch_size=2,
        indices=torch.arange(2 * clients) + examples,
        clients=clients,
    )


PROTECTED = GaussianNoise(0.01)(FedAvg(steps=2, minibatch_size=1, order="shuffled"))


@pytest.mark.parametrize("mechanism", [FedSGD(), PROTECTED], ids=["plain", "protected"])
def test_all_but_one_colluding_is_no_aggregation(mechanism: Mechanism) -> None:
    """The same client, to float32's rounding of a mean over n and back; law n−1."""
    alone, truth = simulate(
        Scenario(
            data=DATA,
            model=scenario(1).model,
            mechanism=mechanism,
            threat=ThreatModel(knows=FACTS),
            batch_size=2,
            indices=torch.arange(2),
        ),
        generator=stream(5),
    )
    for n in (1, 2, 6):
        seen, theirs = simulate(scenario(n, n - 1, mechanism=mechanism), generator=stream(5))
        assert seen.mechanism == alone.mechanism
        assert torch.equal(theirs.batch.inputs, truth.batch.inputs)
        assert len(theirs.colluders) == n - 1
        left, single = flat(seen.update), flat(alone.update)
        assert (left - single).norm() <= (0 if n == 1 else 1e-6 * n) * single.norm()


def test_what_the_server_sees_is_the_mean_of_the_honest() -> None:
    seen, truth = simulate(scenario(5, 2), generator=stream(0))
    assert truth.clients == 3
    assert seen.knowledge.batch_size == 6
    assert torch.equal(seen.knowledge.labels, truth.batch.labels)  # type: ignore[arg-type]
    want = FedSGD().mean(seen.state, truth.batch)
    torch.testing.assert_close(flat(seen.update), flat(want), rtol=1e-4, atol=1e-7)


def test_colluders_reach_the_server_through_the_threat_model_alone() -> None:
    """Another honest client's examples change what is seen; the colluders' change nothing of it."""
    base = scenario(3, 2)
    moved = Scenario(
        **{f: getattr(base, f) for f in ("data", "model", "mechanism", "threat", "batch_size")},
        indices=torch.tensor([0, 1, 12, 13, 14, 15]),
        clients=3,
    )
    one, other = (flat(simulate(s, generator=stream(0))[0].update) for s in (base, moved))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    sums = [flat(simulate(scenario(3, examples=e), generator=stream(0))[0].update) for e in (0, 20)]
    assert not torch.allclose(*sums)


@dataclass(frozen=True)
class Refused:
    changes: dict[str, object]
    words: str


@pytest.mark.parametrize(
    "case",
    [
        Refused({"clients": 2, "threat": ThreatModel()}, "view='aggregate'"),
        Refused({"clients": 2, "threat": ThreatModel(view="aggregate", colluding=2)}, "fewer than"),
        Refused(
            {"clients": 2, "threat": ThreatModel(view="aggregate", batch_norm="exact")},
            "bn_statistics",
        ),
        Refused({"mechanism": Vertical(), "threat": ThreatModel(view="aggregate")}, "vertical"),
    ],
)
def test_sums_that_make_no_sense_are_refused(case: Refused) -> None:
    settings = {"data": DATA, "model": build("lenet", DATA.spec, seed=1)} | case.changes
    with pytest.raises(InvalidInput, match=case.words):
        Scenario(**settings)  # type: ignore[arg-type]


def test_collusion_needs_a_sum() -> None:
    with pytest.raises(InvalidInput, match="aggregate"):
        ThreatModel(colluding=1)
