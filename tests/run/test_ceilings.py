"""Ceilings: which clients have one, and whether the audit's check finds planted faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak import data
from gradleak.cli import run
from gradleak.defenses import DPSGD, Clip, GaussianNoise, build
from gradleak.metrics import epsilon, gaussian_ceiling
from gradleak.report import html
from gradleak.run import trial
from gradleak.run.ceilings import Private, accounted, ceiling, private
from gradleak.run.trial import divide
from gradleak.threat import ThreatModel
from gradleak.types import Batch, Fact, Observation, Reconstruction
from tests.laws.small import SPEC, batch_of

PRIVATE: dict[str, tuple[Any, ...]] = {
    "clip:norm=2+gaussian-noise:std=1": (0.5, False),
    "clip:norm=2,scope=example+gaussian-noise:std=1": (2.0, True),  # sensitivity 2/4
    "clip:norm=2,scope=example+gaussian-noise:std=1,scope=example": (1.0, True),  # std 1/√4
    "top-k:fraction=0.5+clip:norm=2+gaussian-noise:std=1+sign": (0.5, False),
    "clip:norm=2+gaussian-noise:std=1+gaussian-noise:std=5": (0.5, False),
    "dp-sgd:norm=2,noise_multiplier=3": (3.0, False, DPSGD(2.0, 3.0)),
    "dp-sgd:norm=2,noise_multiplier=3,scope=example+top-k": (
        3.0,
        True,
        DPSGD(2.0, 3.0, "example"),
    ),
    "soteria+clip:norm=2+gaussian-noise:std=1+round:step=0.1": (0.5, False),
}
WITHOUT = {
    "none": "there is no protection",
    "clip:norm=1": "nothing is proved without noise",
    "top-k": "nothing is proved without noise",
    "gaussian-noise:std=1": "noise without clipping has no ceiling",
    "clip:norm=1+laplace-noise:std=1": "Laplace noise gives no ceiling",
    "gaussian-noise:std=1+clip:norm=1": "does not follow directly",
    "clip:norm=1+top-k+gaussian-noise:std=1": "does not follow directly",
    "clip:norm=1+gaussian-noise:std=1+soteria": "nothing is proved without noise",
}


@pytest.mark.parametrize("spec", PRIVATE)
def test_the_noise_multiplier_is_read_off_the_protections(spec: str) -> None:
    found = private(build(spec)(gl.FedSGD()), batch_size=4)
    assert not isinstance(found, str)
    assert found == Private(pytest.approx(PRIVATE[spec][0]), *PRIVATE[spec][1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", WITHOUT)
def test_other_clients_have_no_ceiling_and_it_says_why(spec: str) -> None:
    found = private(build(spec)(gl.FedSGD()), batch_size=4)
    assert isinstance(found, str)
    assert WITHOUT[spec] in found


def of_batch(spec: str, *facts: Fact, size: int = 2) -> dict[str, Any]:
    threat = ThreatModel(frozenset({Fact.MECHANISM, *facts}))
    client, bank = build(spec)(gl.FedSGD()), batch_of(9)
    return ceiling(client, threat, bank, SPEC, batch_size=size, guesses=size)


def test_the_ceiling_stands_on_the_best_guess() -> None:
    by_update = of_batch("clip:norm=1+gaussian-noise:std=1")
    assert by_update["kappa"] == pytest.approx(2 / 9)
    assert by_update["identified"] == gaussian_ceiling(by_update["kappa"], noise_multiplier=1)
    assert by_update["risk"][0] == 1.0, "every image is within 0 dB of some guess"
    assert by_update["risk"][60] == pytest.approx(by_update["identified"])
    assert all(a >= b for a, b in zip(by_update["risk"], by_update["risk"][1:]))
    by_example = of_batch("clip:norm=1,scope=example+gaussian-noise:std=1")
    assert by_example["kappa"] == pytest.approx(2 / 8), "the other example may be known"
    assert of_batch("clip:norm=1+gaussian-noise:std=1", Fact.LABELS, size=1)[
        "kappa"
    ] == pytest.approx(len(batch_of(9).labels.unique()) / 9)


def test_epsilon_is_told_with_the_ceiling() -> None:
    both = [
        of_batch(spec)
        for spec in (
            "clip:norm=1,scope=example+gaussian-noise:std=0.5",
            "dp-sgd:scope=example,rounds=9",
        )
    ]
    assert both[0]["epsilon"] == both[1]["epsilon"] == epsilon(1e-5, noise_multiplier=1)
    assert both[0]["identified"] == both[1]["identified"], "what one update proves is the same"
    assert both[0]["accounted"] is None
    spent = accounted(DPSGD(scope="example", rounds=9))
    assert both[1]["accounted"] == spent
    assert spent["epsilon"]["exact"] == epsilon(1e-5, noise_multiplier=1, steps=9)


def test_statistics_beside_the_update_void_the_ceiling() -> None:
    found = of_batch("clip:norm=1+gaussian-noise:std=1", Fact.BN_STATISTICS)
    assert "batch-normalisation statistics" in found["why_not"]


N, CLIP, MULTIPLIER = 24, 0.1, 0.5
COMPOSED = f"clip:norm={CLIP}+gaussian-noise:std={MULTIPLIER * CLIP}"
DP_SGD = f"dp-sgd:norm={CLIP},noise_multiplier={MULTIPLIER},scope=example"


def informed(candidates: Batch) -> Callable[..., list[Reconstruction]]:
    """The adversary of the theorem: he has the bank, and names the likeliest candidate."""

    def attack_all(_: object, seen: Sequence[Observation], **__: object) -> list[Reconstruction]:
        client, state = seen[0].mechanism, seen[0].state

        def mean(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return dict(client.mean(state, Batch(x[None], y[None])).values)

        with torch.no_grad():
            means = torch.func.vmap(mean)(candidates.inputs, candidates.labels)
        rows = torch.cat([v.flatten(1) for v in means.values()], 1)
        claims = []
        for one in seen:
            update = torch.cat([one.update.values[k].flatten() for k in means])
            best = int((rows - update).square().sum(1).argmin())
            batch = Batch(candidates.inputs[[best]], candidates.labels[[best]])
            claims.append(Reconstruction(batch, 0.0, "exhausted", evaluations=1))
        return claims

    return attack_all


def strongest(monkeypatch: pytest.MonkeyPatch, dataset: str = "digits") -> None:
    """Whatever attack is asked for, the informed adversary runs."""
    known = data.load(dataset)
    bank = known.batch(divide(known, 0).clients[:100])
    monkeypatch.setattr(trial, "attack_all", informed(bank))


def audited(
    out: Path, monkeypatch: pytest.MonkeyPatch, *, defense: str = COMPOSED
) -> dict[str, Any]:
    strongest(monkeypatch)
    monkeypatch.setattr(html, "render", lambda directory: directory)
    report = gl.audit(
        data="digits",
        model="mlp",
        attacks="linear-layer",
        defenses=defense,
        targets=N,
        workers=0,
        out=out,
    )
    return report.findings[1]


@pytest.mark.parametrize("defense", [COMPOSED, DP_SGD])
def test_the_strongest_adversary_of_an_honest_client_breaks_nothing(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H0: success ≤ ceiling; n = 24 clients, one-sided alpha = 0.001."""
    finding = audited(tmp_path, monkeypatch, defense=defense)
    (limit,) = finding["limits"]
    assert limit["limit"] == pytest.approx(
        gaussian_ceiling(0.01, noise_multiplier=MULTIPLIER), rel=1e-6
    )
    assert limit["demonstrated"]["value"] > 0, "the adversary is no straw man"
    assert limit["proved"]
    assert not limit["broken"]
    assert finding["violations"] == []


@pytest.mark.parametrize("fault", ["noise", "clipping"])
def test_a_planted_fault_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of the noise, or no clipping, while the protections claim both; n = 24."""
    if fault == "noise":
        draw = GaussianNoise.draw
        monkeypatch.setattr(GaussianNoise, "draw", lambda *given: draw(*given) / 5)
    else:
        monkeypatch.setattr(Clip, "map", lambda _, values: dict(values))
    finding = audited(tmp_path, monkeypatch)
    assert len(finding["violations"]) == 1
    assert "noise or clipping is not what it claims" in finding["violations"][0]


def test_a_broken_limit_is_an_error_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise that is claimed and not added: the closed form names 8 clients of 8."""
    monkeypatch.setattr(GaussianNoise, "draw", lambda _, like, __: torch.zeros_like(like))
    audit = [
        "audit", "--data", "digits", "--model", "mlp", "--attack", "linear-layer", "--workers", "0",
        "--defense", "clip:norm=1+gaussian-noise:std=1", "--quiet", "--out", str(tmp_path),
    ]  # fmt: skip
    assert run(audit) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("error: digits/mlp/init/fedsgd-b1/clip:norm=1+gaussian-noise")
    assert captured.err.count("\n") == 1
    assert "100% (≤ 9%)" in captured.out
    assert "ERROR" in captured.out
    assert "broken-limit" in (tmp_path / "report.html").read_text()
    assert run([*audit, "--fail-on", "psnr_db>20"]) == 1


def one_layer() -> nn.Module:
    """The gradient of a canary, one bright pixel, is orthogonal to that of every other."""
    return nn.Sequential(nn.Flatten(), nn.Linear(15 * 15, 2, bias=False))


def test_half_of_the_accounted_noise_is_an_error_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Canaries; n = 24 clients, one-sided alpha = 0.001, against the strongest adversary."""
    canaries = str(tmp_path / "canaries.npz")
    images = np.eye(15 * 15, dtype=np.float32).reshape(-1, 15, 15)
    np.savez(canaries, images=images, labels=np.arange(15 * 15) % 2)
    strongest(monkeypatch, canaries)
    audit = [
        "audit", "--data", canaries, "--model", f"{__name__}:one_layer", "--workers", "0",
        "--attack", "linear-layer", "--defense", "dp-sgd:norm=0.1,noise_multiplier=0.6,rounds=4",
        "--targets", "24", "--quiet", "--out",
    ]  # fmt: skip
    assert run([*audit, str(tmp_path / "honest")]) == 0
    noise = DPSGD.noise
    monkeypatch.setattr(DPSGD, "noise", lambda *given: noise(*given).widened(0.5))
    assert run([*audit, str(tmp_path / "half")]) == 3
    assert "noise or clipping is not what it claims" in capsys.readouterr().err
    page = (tmp_path / "half" / "report.html").read_text()
    assert "broken-limit" in page
    assert "one update has ε = 8 at δ = 1e−05" in page
    assert "4 rounds at a sampling rate of 100 % have ε = " in page
