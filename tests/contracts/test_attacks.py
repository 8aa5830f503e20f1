"""What every registered attack must do; a new file is tested on arrival."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
import torch

import gradleak as gl
from gradleak import priors, registry
from gradleak.attacks import ATTACKS
from gradleak.data import Dataset, load, split
from gradleak.defenses import ConvolutionalBottleneck
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import Denoising
from gradleak.models import build
from gradleak.types import (
    Attack,
    DataSpec,
    Exchange,
    Fact,
    Knowledge,
    ModelState,
    Observation,
    Planting,
    Prior,
)
from tests.laws.small import stream

CHEAP = {
    "steps": 5, "restarts": 1, "target": 5, "latent_steps": 3, "candidates": 2, "lifting": 5,
}  # fmt: skip
ENOUGH = {
    "cafe-published": {"steps": 800},
    "continuation": {"steps": 300},
    "blind-mask": {"steps": 300, "restarts": 2},
    "dlg": {"steps": 300, "restarts": 2},
    "dlg-dm": {"steps": 40},
    "feature-fishing": {"steps": 300, "target": 5},
    "fishing": {"steps": 300, "target": 5},
    "fedavg-leakage": {"steps": 300},
    "idlg": {"steps": 300, "restarts": 2},
    "gradinversion": {"steps": 300, "restarts": 2},
    "gi-pip": {"steps": 300},
    "gidm-plus": {"steps": 60, "lifting": 50, "candidates": 2, "models": 0},
    "gidm": {"steps": 60, "latent_steps": 3, "candidates": 2, "lifting": 50},
    "gias": {"steps": 500, "latent_share": 0.2, "restarts": 1},
    "ggl": {"steps": 600},
    "gradient-guided-diffusion": {"steps": 150, "sampling": 4, "learning_rate": 0.02},
    "guided-sampling": {"steps": 20, "restarts": 1, "method": "moments", "inner": 3},
    "inverting-gradients": {"steps": 300},
    "invg-dm": {"steps": 100},
    "rog": {"steps": 300, "factor": 1},
    "latent-inversion": {"steps": 600, "total_variation": 1e-4},
    "mean-start": {"steps": 60},
    "sme": {"steps": 300},
    "user-level-diffusion": {"steps": 300, "prior_weight": 1e-3},
}
"""Settings that suffice for one digit through a small network, where cheap ones would not."""

_DIFFUSION = "diffusion:steps=120,batch_size=16,width=8,timesteps=50,averaging=0.9"

PRIORS = {
    "gias": "gan:steps=150,channels=8,latent=16,learning_rate=0.001,averaging=0.95",
    "ggl": "gan:steps=40,channels=8,latent=4,learning_rate=0.002,averaging=0.9",
    "gi-pip": "autoencoder:steps=300,hidden=64,code=16",
    "gradient-guided-diffusion": _DIFFUSION,
    "guided-sampling": _DIFFUSION,
    "user-level-diffusion": _DIFFUSION,
    "gidm": _DIFFUSION,
    "mean-start": "gaussian",
}
"""Small ones of what an attack needs, trained on the public half of the digits in a moment."""

DRAWN = {"ggl"}
"""Attacks that cannot leave their generator's range: they meet pictures that it drew."""

NETWORKS = {
    "april": "vit-tiny",
    **dict.fromkeys(("dlg-dm", "gidm", "invg-dm", "mean-start"), "unet"),
    "cocktail-party": "mlp",
    "gidm-plus": "unet",
    "latent-inversion": "lenet-tiny+cvb",
    "linear-layer": "mlp",
    "lone-rows": "mlp",
    "spear": "mlp",
    "trap-weights": "mlp",
}
"""Networks an attack's theory asks for; any other attack meets the small sigmoid LeNet."""


CLIENTS = {
    "gidm-plus": Denoising(timestep=200),
    "latent-inversion": ConvolutionalBottleneck()(gl.FedSGD()),
    **dict.fromkeys(("dlg-dm", "gidm", "invg-dm", "mean-start"), Denoising(timestep=200)),
}
"""Protections and clients an attack is made for."""

DRAWS = frozenset({Fact.TIMESTEPS, Fact.NOISE})
"""Facts that only the clients of attacks that need them have."""

ANY_PRIOR = {"mean-start"}
"""Attacks that take every prior."""

ONE_EXAMPLE = {"idlg"}
"""Attacks whose theory is about a single example and that say so."""


def attack_of(identifier: str, settings: dict[str, float]) -> Attack:
    kind = ATTACKS[identifier]
    known = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in settings.items() if k in known})  # type: ignore[no-any-return]


@cache
def prior_of(spec: str) -> Prior:
    digits = load("digits")
    public = digits.batch(split(digits, 0).public)
    return priors.fit(spec, public, digits.spec, seed=0)


def pictures_for(identifier: str) -> Dataset:
    digits = load("digits")
    if identifier not in DRAWN:
        return digits
    drawn = prior_of(PRIORS[identifier]).sample(20, generator=stream(3)).float()
    return replace(Dataset.of("drawn", drawn, digits.labels[:20]), spec=digits.spec)


def digit(identifier: str, index: int, *, size: int = 1) -> tuple[Observation, torch.Tensor]:
    digits = pictures_for(identifier)
    state = ModelState.of(build(NETWORKS.get(identifier, "lenet-tiny"), digits.spec, seed=0))
    chosen = torch.arange(index, index + size)
    attack = attack_of(identifier, CHEAP)
    if isinstance(attack, Planting):
        state = attack.plant(
            state,
            digits.batch(torch.arange(1000, 1700)),
            data=digits.spec,
            batch_size=size,
            generator=stream(3),
        )
    threat, prior = gl.ThreatModel(server=attack.about.server), None
    threat = replace(threat, knows=threat.knows | (attack.about.needs & DRAWS))
    if Fact.PRIOR in attack.about.needs:
        threat = replace(threat, knows=threat.knows | {Fact.PRIOR})
        prior = prior_of(PRIORS[identifier])
    scenario = gl.Scenario(
        digits,
        state,
        CLIENTS.get(identifier, gl.FedSGD()),
        threat=threat,
        batch_size=size,
        indices=chosen,
        prior=prior,
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return seen, truth.batch.inputs


def altered(seen: Observation, change: object) -> Observation:
    values = {k: change(v.clone()) for k, v in seen.update.values.items()}  # type: ignore[operator]
    return replace(seen, exchanges=(Exchange(seen.state, replace(seen.update, values=values)),))


@pytest.fixture(params=ATTACKS)
def identifier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_about_is_complete(identifier: str) -> None:
    about = ATTACKS[identifier].about
    assert about.id == identifier
    assert about.title
    assert about.paper
    assert about.link.startswith("https://")
    assert about.modalities
    assert about.needs <= frozenset(Fact)
    assert is_dataclass(ATTACKS[identifier])
    first_line = (ATTACKS[identifier].__doc__ or "").splitlines()[0]
    assert first_line.endswith(".") or "=" in first_line


def test_a_spec_describes_the_attack_and_builds_it_again(identifier: str) -> None:
    attack = ATTACKS[identifier]()
    assert registry.build("attack", registry.describe(attack), ATTACKS) == attack
    assert gl.attacks.build(identifier) == attack


@pytest.mark.parametrize("size", [1, 3])
def test_a_claim_has_the_form_of_the_data(identifier: str, size: int) -> None:
    seen, _ = digit(identifier, 0, size=size)
    attack = attack_of(identifier, CHEAP)
    if size > 1 and identifier in ONE_EXAMPLE:
        with pytest.raises(NotApplicable, match="one example"):
            attack(seen, generator=stream(1))
        return
    claim = attack(seen, generator=stream(1))
    assert claim.batch.inputs.shape == (size, *seen.data.shape)
    assert len(claim.batch.labels) == size
    assert claim.batch.inputs.isfinite().all()
    assert claim.batch.inputs.min() >= seen.data.bounds[0]
    assert claim.batch.inputs.max() <= seen.data.bounds[1]
    if claim.status == "no_solution":
        assert claim.message


def test_equal_generators_give_equal_claims(identifier: str) -> None:
    seen, _ = digit(identifier, 2)
    attack = attack_of(identifier, CHEAP)
    first, again = (attack(seen, generator=stream(4)).batch.inputs for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("fault", ["zero", "nan", "huge"])
def test_a_broken_update_gives_a_status_and_a_finite_claim(identifier: str, fault: str) -> None:
    seen, _ = digit(identifier, 0)
    change = {
        "zero": torch.zeros_like,
        "nan": lambda v: v.fill_(torch.nan),
        "huge": lambda v: v * 1e30,
    }[fault]
    try:
        claim = attack_of(identifier, CHEAP)(altered(seen, change), generator=stream(1))
    except NotApplicable:
        return
    assert claim.batch.inputs.isfinite().all()
    if fault == "nan":
        assert claim.status in ("diverged", "no_solution", "failed")


def test_a_wrong_shape_never_reaches_an_attack(identifier: str) -> None:
    seen, _ = digit(identifier, 0)
    with pytest.raises(InvalidInput, match="expected"):
        altered(seen, lambda v: v[None])


def test_a_missing_fact_is_not_applicable_and_no_crash(identifier: str) -> None:
    seen, _ = digit(identifier, 0)
    attack = attack_of(identifier, CHEAP)
    if Fact.BATCH_SIZE in attack.about.needs:
        with pytest.raises(NotApplicable, match="batch_size"):
            attack(replace(seen, knowledge=Knowledge()), generator=stream(0))
    if Fact.PRIOR in attack.about.needs:
        for prior in (None, *([] if identifier in ANY_PRIOR else [prior_of("gaussian")])):
            with pytest.raises(NotApplicable, match="prior"):
                attack(
                    replace(seen, knowledge=replace(seen.knowledge, prior=prior)),
                    generator=stream(0),
                )
    for fact in attack.about.needs & DRAWS:
        core = seen.mechanism
        assert isinstance(core, Denoising)
        assert core.draws is not None
        name = "times" if fact is Fact.TIMESTEPS else "noise"
        less = replace(core, timestep=None, draws=replace(core.draws, **{name: None}))
        with pytest.raises(NotApplicable, match=f"needs {fact}: not granted"):
            attack(replace(seen, mechanism=less), generator=stream(0))
    foreign = replace(seen, data=DataSpec("text", seen.data.shape, (0.0, 1.0), 10))
    if "text" not in attack.about.modalities:
        with pytest.raises(NotApplicable, match="text"):
            attack(foreign, generator=stream(0))


def test_only_a_malicious_server_alters_the_broadcast(identifier: str) -> None:
    attack = attack_of(identifier, CHEAP)
    assert isinstance(attack, Planting) == (attack.about.server == "malicious")
    if isinstance(attack, Planting):
        seen, _ = digit(identifier, 5)
        with pytest.raises(NotApplicable, match="needs a malicious server"):
            attack(replace(seen, server="honest"), generator=stream(0))


def test_it_recovers_a_digit_and_nothing_of_an_unrelated_one(identifier: str) -> None:
    """Sanity, not speed: beats the mean digit by 6 dB; on another's update it does not."""
    digits = pictures_for(identifier)
    seen, truth = digit(identifier, 5)
    unrelated, _ = digit(identifier, 6)
    attack = attack_of(identifier, ENOUGH.get(identifier, {}))
    mean = digits.images.double().mean(0) / (1 if digits.images.is_floating_point() else 255)

    def psnr(claim: torch.Tensor) -> float:
        return float(-10 * ((claim.double() - truth[0]) ** 2).mean().log10())

    guess = psnr(mean)
    claims = [attack(o, generator=stream(2)).batch.inputs[0] for o in (seen, unrelated)]
    assert psnr(claims[0]) > guess + 6
    assert psnr(claims[1]) < guess + 3


def test_the_objective_of_the_truth_is_no_worse_than_of_another_digit(identifier: str) -> None:
    seen, truth = digit(identifier, 5)
    _, other = digit(identifier, 7)
    labels = pictures_for(identifier).labels
    objective = attack_of(identifier, CHEAP).objective(seen)  # type: ignore[attr-defined]
    at_truth = objective(gl.Batch(truth, labels[5:6]))
    at_other = objective(gl.Batch(other, labels[7:8]))
    assert at_truth != at_truth or at_truth < at_other
