"""The audit in Python: from arguments to result.json, and again from the store."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import gradleak as gl
from gradleak import auditing, jsonsafe, priors
from gradleak.errors import InvalidInput
from gradleak.report.schema import validate_result
from gradleak.run import trial
from tests.report import synthetic

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "attacks": ["linear-layer", "inverting-gradients:steps=3"],
    "defenses": ["gaussian-noise:std=0.1"],
    "targets": 3,
    "workers": 0,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> gl.LeakageReport:
    return gl.audit(**SMALL, out=tmp_path_factory.mktemp("audit"), fail_on="psnr_db>60")


def test_what_is_written(report: gl.LeakageReport) -> None:
    result = jsonsafe.loads((report.directory / "result.json").read_text())
    validate_result(result)
    assert result["settings"]["given"]["targets"] == 3
    assert result["settings"]["defaulted"]["budget"] == "quick"
    assert "Stages of training other than init" in result["not_tested"]
    assert result["command"].startswith("gradleak audit --data digits --model mlp --attack linear")
    assert report.page.stat().st_size > 0


def test_a_granted_prior_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: gl.LeakageReport
) -> None:
    settings = report.result["settings"]["defaulted"]
    assert settings["prior"] is settings["prior_digest"] is None
    assert report.findings[0]["threat"]["prior"] is None

    held = []
    grant = gl.ThreatModel.grant

    def watched(*arguments: Any) -> gl.Observation:
        seen = grant(*arguments)
        held.append(seen.knowledge.prior)
        return seen

    monkeypatch.setattr(gl.ThreatModel, "grant", watched)
    small = SMALL | {"attacks": "linear-layer", "defenses": "none", "targets": 1}
    first = gl.audit(**small, knows="prior", prior="pca:rank=8", out=tmp_path)
    assert {type(prior) for prior in held} == {priors.Gaussians}
    given = first.result["settings"]["given"]
    assert given["prior"] == "pca:rank=8"
    (file,) = tmp_path.glob("tensors/prior-*.safetensors")
    assert given["prior_digest"] == priors.digest(priors.load(file))
    assert first.findings[0]["threat"]["prior_digest"] == given["prior_digest"]
    assert "Priors other than pca:rank=8" in first.result["not_tested"]

    monkeypatch.setattr(priors, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = gl.audit(**small, knows="prior", prior="pca:rank=8", out=tmp_path)
    assert again.findings == first.findings


def test_the_ceiling_is_the_auditors_and_changes_no_claim(tmp_path: Path) -> None:
    asked = {
        "data": "digits", "model": "mlp", "attacks": "posterior:steps=20,restarts=1",
        "defenses": "gaussian-noise:std=0.1", "targets": 2, "workers": 0,
    }  # fmt: skip
    plain = gl.audit(**asked, out=tmp_path / "plain")  # type: ignore[arg-type]
    with_it = gl.audit(**asked, ceiling=True, out=tmp_path / "ceiling")  # type: ignore[arg-type]
    for before, after in zip(plain.findings, with_it.findings, strict=True):
        own, begun = before["measurements"]["psnr_db"], after["measurements"]["psnr_db"]
        assert own["ceiling"] is None
        assert own["value"] == begun["value"]
        assert begun["ceiling"] > begun["value"]
        assert all("ceiling" in t for t in after["targets"])


def test_findings_are_named_and_measured(report: gl.LeakageReport) -> None:
    assert [f["id"] for f in report.findings] == [
        f"digits/mlp/init/fedsgd-b1/{defense}/{attack}"
        for defense in ("none", "gaussian-noise:std=0.1")
        for attack in ("linear-layer", "inverting-gradients:steps=3")
    ]
    exact = report.findings[0]
    assert exact["verdict"] == "leaks"
    assert exact["measurements"]["psnr_db"]["value"] > 60
    assert exact["measurements"]["psnr_db"]["control"] < 20
    assert report.conditions_met == ["psnr_db>60"]


def test_tensors_of_a_job(report: gl.LeakageReport) -> None:
    (name,) = report.findings[0]["tensors"]
    tensors = safetensors.torch.load_file(report.directory / name)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "truth": (3, 1, 1, 8, 8),
        "claim": (3, 1, 1, 8, 8),
        "control": (3, 1, 1, 8, 8),
        "baseline": (3, 1, 1, 8, 8),
        "labels": (3, 1),
        "claim_labels": (3, 1),
    }
    assert (tensors["claim"] - tensors["truth"]).abs().max() < 1e-3


def test_the_same_call_resumes(report: gl.LeakageReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "run_here", None)  # nothing is left to run
    again = gl.audit(**SMALL, out=report.directory, fail_on="psnr_db>60")
    assert again.findings == report.findings
    lines = (Path(again.directory) / "trials.jsonl").read_text().splitlines()
    assert again.result["seconds"] > max(json.loads(line)["elapsed"] for line in lines) > 0


def test_claims_are_compared_with_what_the_client_trained_on(tmp_path: Path) -> None:
    """The closed form finds the transformed image exactly, and the original it does not find."""
    report = gl.audit(
        data="digits", model="mlp", attacks="linear-layer", defenses="ats:policy=21-13-3",
        targets=2, workers=0, out=tmp_path,
    )  # fmt: skip
    plain, transformed = (f["measurements"]["psnr_db"] for f in report.findings)
    assert plain["original"] is None
    assert transformed["value"] > 100 > 30 > transformed["original"]
    assert all(t["original"] for t in report.findings[1]["targets"])
    assert report.findings[1]["warnings"] == []
    page = report.page.read_text()
    assert "before its transformation" in page
    assert "Original" in page


def test_both_attackers_and_the_price_in_one_audit(tmp_path: Path) -> None:
    prices = {"none": 0.9, "sign": 0.8}
    places = [tmp_path / name for name in prices]
    trained = list(map(synthetic.trained, places, prices, prices.values()))
    report = gl.audit(
        **SMALL | {"attacks": "inverting-gradients:steps=3", "defenses": "sign", "model": "lenet"},
        unaware=True,
        cost=trained,
        out=tmp_path / "out",
    )
    assert [(f["defense"], f["adaptive"]) for f in report.findings] == [
        ("none", True),
        ("sign", True),
        ("sign", False),
    ]
    assert report.findings[2]["id"] == report.findings[1]["id"] + " (unaware)"
    assert "mechanism" not in report.findings[2]["threat"]["knows"]
    page = report.page.read_text()
    assert "not in the chart: trained on digits, lenet-tiny instead" in page
    assert "inverting-gradients (unaware)" in page
    assert "Attackers who know the protection" not in page
    with pytest.raises(InvalidInput, match=r"no training\.json"):
        gl.audit(**SMALL, cost="nowhere", out=tmp_path / "never")
    assert not (tmp_path / "never" / "result.json").exists()


def test_a_broken_attack_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(trial, "attack_all", broken)
    report = gl.audit(**SMALL | {"attacks": "linear-layer"}, out=tmp_path)
    assert [f["state"] for f in report.findings] == ["error", "error"]
    assert report.failed == report.findings
    assert report.findings[0]["reason"] == "RuntimeError: out of luck"
    assert report.headline == "Nothing could be measured: no attack ran to an end."


def test_an_attack_that_does_not_apply(tmp_path: Path) -> None:
    report = gl.audit(**SMALL | {"knows": "no-batch_size"}, out=tmp_path)
    assert {f["state"] for f in report.findings} == {"not_applicable"}
    assert report.failed == []
    assert "batch_size" in report.findings[0]["reason"]


def test_a_protection_that_does_not_apply_to_the_network(tmp_path: Path) -> None:
    report = gl.audit(**SMALL | {"attacks": "dlg:steps=2", "defenses": ["precode"]}, out=tmp_path)
    assert {f["defense"]: f["state"] for f in report.findings} == {
        "none": "measured",
        "precode": "not_applicable",
    }


def test_training_stages_and_batches(tmp_path: Path) -> None:
    arguments = SMALL | {"stage": ["init", "3"], "batch_size": [1, 2], "targets": 1}
    report = gl.audit(**arguments | {"attacks": "linear-layer", "defenses": []}, out=tmp_path)
    assert [f["id"].split("/")[2:4] for f in report.findings] == [
        ["init", "fedsgd-b1"],
        ["init", "fedsgd-b2"],
        ["3", "fedsgd-b1"],
        ["3", "fedsgd-b2"],
    ]
    assert len(list((tmp_path / "tensors").glob("state-*.safetensors"))) == 2


def test_given_weights_are_what_is_attacked(tmp_path: Path) -> None:
    from gradleak import data, models

    network = models.build("mlp", data.load("digits").spec, seed=42)
    models.save_weights(gl.ModelState.of(network), tmp_path / "w.safetensors")
    report = gl.audit(
        **SMALL | {"attacks": "linear-layer", "targets": 1, "weights": tmp_path / "w.safetensors"},
        out=tmp_path / "out",
    )
    assert report.findings[0]["scenario"]["stage"] == "weights"
    assert report.findings[0]["measurements"]["psnr_db"]["value"] > 60


def test_fedavg(tmp_path: Path) -> None:
    report = gl.audit(
        **SMALL | {"mechanism": "fedavg", "local_steps": 2, "defenses": []}, out=tmp_path
    )
    assert report.findings[0]["scenario"]["local_steps"] == 2
    assert {f["state"] for f in report.findings} == {"measured"}


def test_vertical_rounds(tmp_path: Path) -> None:
    """Three digits, two a round: `cafe` attacks all rounds, the other attack the latest."""
    changes: dict[str, Any] = {
        "model": "lenet-tiny",
        "mechanism": "vertical:rounds=5,round_size=2",
        "batch_size": 3,
        "knows": "minibatch_order",
        "attacks": ["cafe:tolerance=0.01,steps=80", "inverting-gradients:steps=3"],
        "defenses": ["clip:norm=1+gaussian-noise:std=0.1"],
        "targets": 2,
    }
    report = gl.audit(**SMALL | changes, out=tmp_path)
    assert {f["state"] for f in report.findings} == {"measured"}
    first = report.findings[0]
    assert first["scenario"]["mechanism"] == "vertical"
    assert first["scenario"]["mechanism_spec"] == "vertical:rounds=5,round_size=2"
    assert first["measurements"]["psnr_db"]["value"] > 20
    assert not report.violations


def test_a_foreign_result_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"theirs": 1}))
    with pytest.raises(InvalidInput, match="was not written by gradleak"):
        gl.audit(**SMALL, out=tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == {"theirs": 1}


def test_engines_are_settled_once_per_attack_and_protection(report: gl.LeakageReport) -> None:
    """Closed forms may cover one protection and not the next."""
    engines = json.loads((report.directory / "engines.json").read_text())
    assert len(engines) == 2 * 2
    assert set(engines.values()) <= {"fast", "vmap", "loop"}


@pytest.mark.parametrize("knowledge", ["exact", "running", "inferred", "none"])
def test_what_is_known_of_batch_normalisation_is_explicit(
    knowledge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bnnet.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),\n"
        "                         nn.Linear(144, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    report = gl.audit(
        data="digits", model="bnnet:net", batch_norm="train", bn_knowledge=knowledge, targets=2,
        batch_size=2, attacks="inverting-gradients:steps=3", defenses=[], workers=0,
        out=tmp_path / "out",
    )  # fmt: skip
    (finding,) = report.findings
    assert finding["threat"]["batch_norm"] == knowledge
    assert ("bn_statistics" in finding["threat"]["knows"]) == (knowledge == "exact")
    assert any("train mode" in w for w in finding["warnings"]) == (knowledge == "none")
