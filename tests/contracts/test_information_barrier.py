"""The truth goes round the attack, never through it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak import priors
from gradleak.attacks import ATTACKS
from gradleak.attacks.active.feature_fishing import FeatureFishing
from gradleak.attacks.active.fishing import Fishing
from gradleak.attacks.recipes.gidm_plus import GIDMPlus
from gradleak.attacks.recipes.latent_inversion import LatentInversion
from gradleak.data import Dataset
from gradleak.defenses import Precode
from gradleak.defenses.precode import precode
from gradleak.errors import NotApplicable
from gradleak.mechanisms import Denoising, Draws
from gradleak.run.beliefs import fitted
from gradleak.run.trial import divide
from gradleak.threat import Truth
from gradleak.types import (
    Attack,
    Batch,
    Fact,
    Mechanism,
    ModelState,
    Observation,
    Planting,
    Reconstruction,
)
from tests.laws.small import SMALL_PRIORS, SPEC, Normalised, SmallDenoiser, stream

QUICK = {"steps": 4, "restarts": 1, "target": 2}


class Blinkered(nn.Module):
    """Sees the left half of the picture only, so that truths may differ where it is blind."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.hidden(x[..., :2].flatten(1))))


class BlinkeredDenoiser(Blinkered):
    """The same for a diffusion model's client: it predicts the noise of the left half."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.head = nn.Linear(4, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:  # type: ignore[override]
        angles = times[:, None].to(x) * x.new_tensor([1.0, 0.01])
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        left = self.head(torch.sigmoid(self.hidden(x[..., :2].flatten(1)) + time))
        return nn.functional.pad(left.view(-1, 1, 4, 2), (0, 2))


PUBLIC = Batch(torch.rand((9, 1, 4, 4), generator=stream(7)), torch.arange(9) % 3)


def two_worlds(
    attack: object = None,
    mechanism: Mechanism | None = None,
    *,
    size: int = 1,
    prior: str | None = None,
) -> list[tuple[Observation, Truth]]:
    """Two scenarios with equal observations and different truths.

    A malicious server changes the state if that leaves the network blind.
    """
    left = torch.rand((2, 1, 4, 4), generator=stream(0))
    right = left.clone()
    right[..., 2:] = torch.rand((2, 1, 4, 2), generator=stream(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = Blinkered()
        if isinstance(attack, LatentInversion):  # made for clients that draw a latent
            network, mechanism = precode(network, latent=3), Precode()(gl.FedSGD())
        drawn = attack.about.needs & DRAWS if isinstance(attack, Attack) else frozenset()
        if drawn or isinstance(attack, GIDMPlus):
            network, mechanism = BlinkeredDenoiser(), Denoising()
        state = ModelState.of(network)
    threat = gl.ThreatModel(
        gl.ThreatModel().knows | drawn,
        server="malicious" if isinstance(attack, Planting) else "honest",
    )
    granted = None
    if prior is not None:
        threat = replace(threat, knows=threat.knows | {Fact.PRIOR})
        granted = priors.fit(prior, PUBLIC, SPEC, seed=0)
    if isinstance(attack, Fishing | FeatureFishing):
        public = Batch(torch.rand((60, 1, 4, 4), generator=stream(7)), torch.arange(60) % 3)
        state = attack.plant(state, public, data=SPEC, batch_size=1, generator=stream(4))
    worlds = []
    for images in (left, right):
        data = replace(Dataset.of("world", images, torch.tensor([0, 2])), spec=SPEC)
        chosen = torch.arange(2 - size, 2)
        scenario = gl.Scenario(
            data,
            state,
            mechanism or gl.FedSGD(),
            threat=threat,
            batch_size=size,
            indices=chosen,
            prior=granted,
        )
        worlds.append(gl.simulate(scenario, generator=stream(2)))
    return worlds


DRAWS = frozenset({Fact.TIMESTEPS, Fact.NOISE})

FAMILIES = {
    "gi-pip": "autoencoder",
    **dict.fromkeys(
        ("gidm", "gradient-guided-diffusion", "guided-sampling", "user-level-diffusion"),
        "diffusion",
    ),
}
"""Priors that attacks ask for; the others take a GAN."""


def quick(kind: type) -> Attack:
    fields = {k: v for k, v in QUICK.items() if k in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    return kind(**fields)  # type: ignore[no-any-return]


def assert_blind(
    attack: Callable[..., Reconstruction], worlds: list[tuple[Observation, Truth]] | None = None
) -> None:
    """H0: the claim depends on the observation alone. Exact, no tolerance."""
    (seen, truth), (twin_seen, twin_truth) = worlds or two_worlds(attack)
    assert not torch.equal(truth.batch.inputs, twin_truth.batch.inputs)
    for name, value in seen.update.values.items():
        assert torch.equal(value, twin_seen.update.values[name])
    first, second = (attack(o, generator=stream(3)) for o in (seen, twin_seen))
    assert torch.equal(first.batch.inputs, second.batch.inputs)
    assert torch.equal(first.batch.labels, second.batch.labels)
    assert first.status == second.status


@pytest.mark.parametrize("identifier", ATTACKS)
def test_equal_observations_give_bitwise_equal_claims(identifier: str) -> None:
    needed = Fact.PRIOR in ATTACKS[identifier].about.needs
    family = FAMILIES.get(identifier, "gan")
    attack = quick(ATTACKS[identifier])
    assert_blind(attack, two_worlds(attack, prior=SMALL_PRIORS[family] if needed else None))


def test_a_planted_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of six published codes of eight: the private batch reaches the attack."""
    grant = gl.ThreatModel.grant

    def leaky(self: gl.ThreatModel, truth: Truth, *rest: object) -> Observation:
        seen = grant(self, truth, *rest)  # type: ignore[arg-type]
        state = replace(seen.state, buffers={"smuggled": truth.batch.inputs})
        return replace(seen, exchanges=(replace(seen.exchanges[0], state=state),))

    def cheat(seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        batch = Batch(seen.state.buffers["smuggled"], torch.zeros(1, dtype=torch.int64))
        return Reconstruction(batch, 0.0, "solved")

    monkeypatch.setattr(gl.ThreatModel, "grant", leaky)
    with pytest.raises(AssertionError):
        assert_blind(cheat)


def private_scenario(*facts: Fact) -> tuple[Observation, Truth]:
    images = torch.rand((4, 1, 4, 4), generator=stream(5))
    data = replace(Dataset.of("private", images, torch.tensor([0, 1, 2, 1])), spec=SPEC)
    knows = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, *facts})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ModelState.of(Normalised())
    mechanism = gl.FedAvg(order="shuffled", minibatch_size=1)
    scenario = gl.Scenario(
        data,
        state,
        mechanism,
        gl.ThreatModel(knows),
        batch_size=3,
        indices=torch.tensor([3, 1, 2]),
        prior=priors.fit("gaussian", PUBLIC, SPEC, seed=0),
    )
    return gl.simulate(scenario, generator=stream(6))


def contains(seen: Observation, private: Tensor) -> bool:
    """Whether any example's bytes, or its exact values in a tensor, can be found in `seen`."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer).dump(seen)
    dump = buffer.getvalue()
    return any(row.contiguous().numpy().tobytes() in dump for row in private)


@pytest.mark.parametrize("facts", [(), tuple(Fact)], ids=["default", "everything granted"])
def test_a_pickled_observation_holds_no_private_input(facts: tuple[Fact, ...]) -> None:
    seen, truth = private_scenario(*facts)
    assert not contains(seen, truth.batch.inputs)


def test_the_search_for_private_bytes_can_succeed() -> None:
    seen, truth = private_scenario()
    state = replace(seen.state, buffers={"smuggled": truth.batch.inputs})
    assert contains(
        replace(seen, exchanges=(replace(seen.exchanges[0], state=state),)), truth.batch.inputs
    )


def diffusing_scenario(*facts: Fact) -> tuple[Observation, Truth]:
    """A client of a diffusion model, at a time that an experiment fixes."""
    data = Dataset.of("d", torch.rand((6, 1, 4, 4), generator=stream(5)), torch.arange(6) % 3)
    threat = gl.ThreatModel(frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, *facts}))
    client = Denoising(timestep=77)
    scenario = gl.Scenario(data, SmallDenoiser(), client, threat=threat, batch_size=2)
    return gl.simulate(scenario, generator=stream(6))


def test_noise_and_times_of_a_diffusion_client_stay_with_it() -> None:
    """No tensor of a pickled observation holds them; granted, they are found."""
    seen, truth = diffusing_scenario()
    assert truth.draws is not None
    assert truth.draws.noise is not None
    assert not contains(seen, truth.draws.noise)
    assert not contains(seen, truth.batch.inputs)
    assert "77" not in repr(seen.mechanism)
    seen, truth = diffusing_scenario(Fact.NOISE, Fact.TIMESTEPS)
    assert contains(seen, truth.draws.noise)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("fact", Fact)
def test_a_fact_is_known_only_if_granted(fact: Fact) -> None:
    def known(seen: Observation) -> bool:
        draws = getattr(seen.mechanism, "draws", None) or Draws()
        return {
            Fact.LABELS: seen.knowledge.labels is not None,
            Fact.BATCH_SIZE: seen.knowledge.batch_size is not None,
            Fact.BN_STATISTICS: seen.knowledge.bn_statistics is not None,
            Fact.MINIBATCH_ORDER: getattr(seen.mechanism, "fixed_order", None) is not None,
            Fact.MECHANISM: True,
            Fact.PRIOR: seen.knowledge.prior is not None,
            Fact.TIMESTEPS: draws.times is not None,
            Fact.NOISE: draws.noise is not None,
        }[fact]

    scenario = diffusing_scenario if fact in (Fact.TIMESTEPS, Fact.NOISE) else private_scenario
    granted, truth = scenario(fact)
    assert known(granted)
    assert known(scenario()[0]) == (fact in (Fact.MECHANISM, Fact.BATCH_SIZE))
    if fact is Fact.LABELS:
        assert torch.equal(granted.knowledge.labels, truth.batch.labels)  # type: ignore[arg-type]


def test_a_granted_prior_must_exist() -> None:
    data = Dataset.of("d", torch.rand((4, 1, 4, 4)), torch.tensor([0, 1, 2, 1]))
    threat = gl.ThreatModel(frozenset({Fact.PRIOR}))
    with pytest.raises(gl.InvalidInput, match=r"Scenario\(prior=\.\.\.\)"):
        gl.simulate(gl.Scenario(data, Normalised(), threat=threat), generator=stream(0))


@pytest.mark.parametrize("identifier", priors.PRIORS)
def test_no_private_example_reaches_the_prior_of_a_run(identifier: str, tmp_path: Path) -> None:
    """H0: the prior depends on the public half alone. Exact: the digest covers every bit."""
    images, labels = torch.rand((60, 1, 4, 4), generator=stream(8)), torch.arange(60) % 3
    data = Dataset.of("before", images, labels)
    division = divide(data, 0)

    def prior_of(changed: Tensor, name: str) -> str:
        other = images.clone()
        other[changed] = torch.rand((1, 1, 4, 4), generator=stream(9))
        (tmp_path / name / "tensors").mkdir(parents=True)
        world = Dataset.of(name, other, labels)
        assert torch.equal(divide(world, 0).public, division.public)
        spec = SMALL_PRIORS.get(identifier, identifier)
        return fitted(spec, world, division.public, seed=0, directory=tmp_path / name).digest

    before = prior_of(division.clients[:0], "before")
    assert prior_of(division.clients, "private examples replaced") == before
    if identifier != "box":  # which knows the bounds alone; the others show that the test can fail
        assert prior_of(division.public[:1], "a public example replaced") != before


def test_an_unaware_attacker_believes_in_no_protection() -> None:
    (seen, _), _ = two_worlds()
    data = Dataset.of("d", torch.rand((4, 1, 4, 4)), torch.tensor([0, 1, 2, 1]))
    scenario = gl.Scenario(
        data,
        seen.state,
        gl.defenses.Clip(0.1)(gl.FedSGD()),
        gl.ThreatModel(frozenset({Fact.BATCH_SIZE})),
    )
    unaware, _ = gl.simulate(scenario, generator=stream(0))
    assert unaware.mechanism == gl.FedSGD()


def test_observe_has_no_door_for_private_inputs() -> None:
    import inspect

    names = set(inspect.signature(gl.observe).parameters)
    assert names == {
        "model", "update", "data", "batch_size", "kind", "loss", "mechanism", "labels", "buffers",
        "prior",
    }  # fmt: skip


@pytest.mark.parametrize("identifier", ATTACKS)
def test_attacks_leave_the_observation_untouched(identifier: str) -> None:
    (seen, _), _ = two_worlds()
    before = copy.deepcopy({k: v.clone() for k, v in seen.update.values.items()})
    params = {k: v.clone() for k, v in seen.state.params.items()}
    try:
        quick(ATTACKS[identifier])(seen, generator=stream(0))
    except NotApplicable:
        return
    assert all(torch.equal(v, seen.update.values[k]) for k, v in before.items())
    assert all(torch.equal(v, seen.state.params[k]) for k, v in params.items())
