"""Preflight finds planted faults, and is silent on sound scenarios."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from gradleak import data, models
from gradleak.defenses import build as build_defense
from gradleak.defenses import dithered
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.run.preflight import Doubt, merged, objective_warnings, preflight
from gradleak.scenario import Scenario, simulate
from gradleak.threat import ThreatModel
from gradleak.types import Exchange, Fact, Mechanism, ModelState, Observation, Update

DATA = data.load("digits")


def check(
    mechanism: Mechanism,
    *,
    model: str = "mlp",
    threat: ThreatModel | None = None,
    spoil: Callable[[Observation], Observation] = lambda seen: seen,
) -> list[str]:
    network = models.build(model, DATA.spec, seed=0)
    scenario = Scenario(
        data=DATA,
        model=ModelState.of(network),
        mechanism=mechanism,
        threat=threat or ThreatModel(),
        batch_size=2,
    )
    generator = torch.Generator().manual_seed(0)
    seen, truth = simulate(scenario, generator=generator)
    return merged([preflight(scenario, spoil(seen), truth, generator=generator)])


@pytest.mark.parametrize(
    "defense",
    [
        "none",
        "gaussian-noise:std=0.01",
        "laplace-noise:std=0.1",
        "top-k:fraction=0.1",
        "clip:norm=0.01",
        "clip:norm=0.01+gaussian-noise:std=0.1",
        "random-mask:share=0.3",
        "random-mask:share=0.3,seed=1+gaussian-noise:std=0.01",
        "partial-sharing",
        "partial-sharing:frozen=true",
        "dgc",
        "outpost",
        "censor",
        "quantize",
        "quantize:norm=max",
        "round",
        "round:rounding=stochastic",
        "sign",
        "sign:scaled=true",
        "top-k:fraction=0.1+sign",
    ],
)
@pytest.mark.parametrize("core", [FedSGD(), FedAvg(steps=2, learning_rate=0.1)])
def test_sound_scenarios_raise_no_warning(defense: str, core: Mechanism) -> None:
    assert check(build_defense(defense)(core)) == []


@pytest.mark.parametrize(
    "defense",
    ["clip:norm=0.01,scope=example", "gaussian-noise:scope=example", "laplace-noise:scope=example"],
)
def test_sound_scenarios_by_example_raise_no_warning(defense: str) -> None:
    assert check(build_defense(defense)(FedSGD())) == []


def test_a_clip_that_does_not_bite() -> None:
    (warning,) = check(build_defense("clip:norm=1e6")(FedSGD()))
    assert "clip did not change the update" in warning


def received(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[Observation], Observation]:
    def spoil(seen: Observation) -> Observation:
        values = {k: change(v) for k, v in seen.update.values.items()}
        exchange = Exchange(seen.state, Update(values, seen.update.kind))
        return dataclasses.replace(seen, exchanges=(exchange,))

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.zeros_like, "the update is zero"),
        (lambda v: v * torch.nan, "non-finite"),
        (lambda v: 1.01 * v, "misses the update at the truth by 1%"),
        (lambda v: -v, "misses the update at the truth by 200%"),
    ],
)
def test_spoilt_updates(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    (warning,) = check(FedSGD(), spoil=received(change))
    assert message in warning


def test_noise_with_another_strength_than_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradleak.defenses import GaussianNoise

    honest = GaussianNoise.draw
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, v, g: 1.2 * honest(self, v, g))
    (warning,) = check(build_defense("gaussian-noise:std=0.01")(FedSGD()))
    assert "claims std 0.01 and adds 0.012" in warning


@pytest.mark.parametrize(
    ("defense", "attribute", "fault", "message"),
    [
        ("gaussian-noise:scope=example", "draw", lambda v: 1.2 * torch.randn_like(v), "and adds"),
        ("random-mask:share=0.3", "drop", lambda v: torch.dropout(v, 0.6, True), "and drops"),
        ("random-mask:seed=1", "map", lambda v: torch.dropout(v, 0.7, True), "and drops"),
        ("partial-sharing", "map", lambda v: 2 * v, "and sends norm"),
        ("round", "map", lambda v: 0.001 * (v / 0.001).floor(), "and moves by"),
        ("round", "map", lambda v: v + 0.0001, "off its grid"),
        ("sign", "map", lambda v: -v.sign(), "another sign"),
        ("sign", "map", lambda v: v.sign() + 0.1 * v, "magnitudes that differ"),
    ],
)
def test_a_protection_that_does_something_else(
    defense: str,
    attribute: str,
    fault: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mechanism = build_defense(defense)(FedSGD())
    kind = type(mechanism.rule)  # type: ignore[attr-defined]
    if attribute == "map":
        broken = lambda self, values: {k: fault(v) for k, v in values.items()}  # type: ignore[misc]
    else:
        broken = lambda self, v, *_: fault(v)  # type: ignore[misc]
    monkeypatch.setattr(kind, attribute, broken)
    assert any(message in warning for warning in check(mechanism))


@pytest.mark.parametrize("defense", ["quantize", "round:rounding=stochastic"])
@pytest.mark.parametrize(("shift", "message"), [(0.3, "off its grid"), (2.0, "and moves by")])
def test_a_rounding_to_other_points(
    defense: str, shift: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = dithered._below

    def broken(value: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, above = honest(value, step)
        return low + shift, above

    monkeypatch.setattr(dithered, "_below", broken)
    assert any(message in warning for warning in check(build_defense(defense)(FedSGD())))


def test_a_protection_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradleak.defenses import TopK

    monkeypatch.setattr(TopK, "map", lambda self, values: values)
    (warning,) = check(build_defense("top-k")(FedSGD()))
    assert "top-k did not change the update" in warning


def test_batch_norm_mode_mismatch() -> None:
    mechanism = FedSGD(batch_norm="train")
    warnings = check(mechanism, model="resnet18", threat=ThreatModel(batch_norm="none"))
    assert any("normalises in train mode and the attacker assumes eval" in w for w in warnings)
    assert check(mechanism, model="resnet18") == []


def test_an_unaware_attacker_has_a_wrong_model() -> None:
    unaware = ThreatModel(knows=frozenset({Fact.BATCH_SIZE}))
    (warning,) = check(build_defense("top-k")(FedSGD()), threat=unaware)
    assert "model of the client misses the update" in warning


def test_an_objective_that_prefers_a_guess() -> None:
    assert objective_warnings([0.0, 0.1], [1.0, 1.0]) == []
    assert objective_warnings([float("nan")], [1.0]) == []
    assert "for 1 of 2 targets" in objective_warnings([0.0, 2.0], [1.0, 1.0])[0]


def test_warnings_are_merged() -> None:
    doubts = [[Doubt("a {:.0%} off", 0.1), Doubt("b")], [Doubt("a {:.0%} off", 0.3)]]
    assert merged(doubts) == ["a 10% to 30% off", "b (1 of 2 targets)"]
